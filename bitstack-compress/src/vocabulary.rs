//! What the parts of an embedding, or of a head, count for.

use bitstack_model::{WeightRole, WeightSpec};

/// Tokens for every token of the text that are taken to be spread evenly over the vocabulary: texts of other kinds use what this one does not.
const UNSEEN: f64 = 0.02;

/// Shares what was measured of the parts of an embedding, and of those of a head, by how frequent their tokens are in a text: to each part the
/// mean of its share of what was measured and its share of the tokens. A run on a hundred tokens meets few of the rare ones, or none.
///
/// Errors count as often as their rows are used: looked up, or predicted (own derivation: with logits off by δ the divergence is
/// ½ Var_p(δ), which weighs each token by its probability).
pub(crate) fn share_by_frequency(divergences: &mut [f64], specs: &[WeightSpec], tokens: &[u32]) {
    for role in [WeightRole::Embedding, WeightRole::Head] {
        let parts: Vec<usize> = (0..specs.len()).filter(|&weight| specs[weight].role == role).collect();
        if parts.len() < 2 || tokens.is_empty() {
            continue;
        }
        let sum: f64 = parts.iter().map(|&part| divergences[part].max(0.0)).sum();
        for part in parts {
            let spec = &specs[part];
            let rows = spec.first_row..spec.first_row + spec.rows;
            let seen = tokens.iter().filter(|token| rows.contains(&(**token as usize))).count();
            let evenly = spec.rows as f64 / spec.tensor_rows as f64;
            let frequency = (seen as f64 / tokens.len() as f64 + UNSEEN * evenly) / (1.0 + UNSEEN);
            divergences[part] = 0.5 * (divergences[part].max(0.0) + sum * frequency);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_share_what_was_measured_of_them_all_half_of_it_by_their_tokens() {
        let part = |role, first_row| WeightSpec {
            name: String::new(),
            first_row,
            rows: 10,
            tensor_rows: 20,
            cols: 1,
            role,
            layer: None,
        };
        let specs = [
            part(WeightRole::Embedding, 0),
            part(WeightRole::Embedding, 10),
            part(WeightRole::Query, 0),
            part(WeightRole::Head, 0),
        ];
        let mut found = [3.0, 1.0, 7.0, 5.0];
        share_by_frequency(&mut found, &specs, &[1, 2, 3, 4, 5, 9, 9, 19]);
        // Seven tokens of eight, and half of those that might come.
        let frequency = (7.0 / 8.0 + UNSEEN / 2.0) / (1.0 + UNSEEN);
        assert!((found[0] - 0.5 * (3.0 + 4.0 * frequency)).abs() < 1e-12, "{found:?}");
        assert!((found[0] + found[1] - 4.0).abs() < 1e-12 && found[2..] == [7.0, 5.0], "{found:?}");
        let mut rare = [0.0, 4.0, 7.0, 5.0];
        share_by_frequency(&mut rare, &specs, &[11]);
        assert!(rare[0] > 0.0, "no part is worth nothing: {rare:?}");
    }
}
