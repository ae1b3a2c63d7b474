//! What each weight counts for: the divergence of the model when it alone is rounded, from gradients.

use crate::stream::{Slot, Streamed};
use bitstack_engine::{Decoder, EngineError, math};
use bitstack_model::config::{Experts, FeedForwardInput, Mlp};
use bitstack_model::{Checkpoint, ModelConfig, Part, Progress};
use faer::{MatMut, MatRef};
use ndarray::{Array2, ArrayView1, ArrayView2, Axis, Slice, Zip};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// The step of the rounding, in root mean squares of a row: an error of 3 %, as at level 3 or 4.
const ROUNDING_STEP: f64 = 0.6;

/// Rows whose rounding is looked at for its error.
const ROUNDING_ROWS: usize = 256;

/// Rows of a weight whose gradient is in memory at a time.
const PANEL_ROWS: usize = 64;

/// Tokens whose logits are in memory at a time, per window.
const HEAD_TOKENS: usize = 128;

/// Weights, by their indices in the model, and what was found of each.
type Shares = Vec<(usize, f64)>;

/// Per stacked weight (`stacked` are their indices in the model, rising), the divergence of the model, in nats per token, when it alone is rounded: each row to multiples of
/// [`ROUNDING_STEP`] times its root mean square.
///
/// To second order it is ½ Σ F ⊙ Δ², where Δ is what rounding changes, whose signs are as good as random, and F the diagonal of the Fisher
/// information: the expectation of the squared gradient of −log p(y), over windows of text and next tokens y that the model itself draws at
/// each position (Kullback and Leibler's divergence has the Fisher information as its Hessian; own derivation of the rest). One draw per
/// position does for the layers, where a gradient has many elements; for the head the expectation is exact: p (1 − p) x². An embedding counts
/// where it is looked up too. On SmolLM2-135M and 3,072 tokens it is .02 ± .11 levels above what runs with 49 of its weights rounded measure,
/// one by one, on the same text; those on 96 tokens scatter by .3.
///
/// The model goes forward through all windows once and backward once, a layer in memory at a time; the states in front of all layers are
/// kept.
pub(crate) fn roundings(
    checkpoint: &Checkpoint,
    stacked: &[usize],
    windows: &[&[u32]],
    seed: u64,
    progress: &dyn Progress,
) -> Result<Vec<f64>, EngineError> {
    let (config, specs) = (checkpoint.config(), checkpoint.config().weights());
    let n_tokens: usize = windows.iter().map(|window| window.len()).sum();
    progress.part(Part::Importance, n_tokens as u64);
    progress.stage("importance (layers)", 2 * config.n_layers() as u64 + 1);
    let is_stacked: Vec<bool> = (0..specs.len()).map(|index| stacked.binary_search(&index).is_ok()).collect();
    let mut sums = vec![0.0; specs.len()];
    let mut add = |shares: Vec<Shares>| {
        shares.into_iter().flatten().for_each(|(index, share)| sums[index] += share);
    };

    let mut model = Streamed::original(checkpoint)?;
    let mut states = vec![model.embed(windows)?];
    for layer in 0..config.n_layers() {
        let mut hidden = states.last().expect("the first was put in").clone();
        model.run(layer..layer + 1, &mut hidden)?;
        states.push(hidden);
        progress.advance(1);
    }

    let finals = states.pop().expect("one per layer and the first");
    let behind = model.with(model.decoder().config().head(), |model| {
        let each = finals.par_iter().enumerate().with_max_len(1);
        each.map(|(i, hidden)| head(model.decoder(), hidden, seed.wrapping_add(i as u64), &is_stacked))
            .collect::<Result<Vec<_>, _>>()
    })?;
    let (mut grads, shares): (Vec<Array2<f32>>, Vec<_>) = behind.into_iter().unzip();
    add(shares);
    progress.advance(1);

    for layer in (0..config.n_layers()).rev() {
        let front = states.pop().expect("one per layer");
        let shares = model.with(model.layer_weights(layer), |model| {
            let decoder = model.decoder();
            let each = front.par_iter().zip(&mut grads).with_max_len(1).map(|(hidden, grad)| {
                let mut shares = Shares::new();
                decoder.layer_backward(layer, hidden.view(), grad, &mut |index, x, g| {
                    if is_stacked[index] {
                        let fisher = |m: f32| f64::from(m * m);
                        shares.push((index, worth(&decoder.weights()[index], g, x, fisher)));
                    }
                })?;
                Ok::<_, EngineError>(shares)
            });
            each.collect::<Result<Vec<_>, _>>()
        })?;
        add(shares);
        progress.advance(1);
    }

    let embedding = model.decoder().config().embedding();
    let shares = model.with(embedding, |model| {
        let each = windows.par_iter().zip(&grads).with_max_len(1);
        Ok(each.map(|(window, grad)| looked_up(model, window, grad, &is_stacked)).collect())
    })?;
    add(shares);
    count_unmet(config, n_tokens, &mut sums);

    Ok(stacked.iter().map(|index| sums[*index] / n_tokens as f64).collect())
}

/// Lets each expert count as though one more of the `n_tokens` tokens had gone through it than did, one for which its weights are worth what they are
/// for others on average: those that no token met are worth little, but not nothing.
fn count_unmet(config: &ModelConfig, n_tokens: usize, sums: &mut [f64]) {
    for layer in &config.layers {
        let Mlp::Experts(Experts { experts, n_active, .. }) = &layer.mlp else { continue };
        let weights = experts.iter().map(|expert| {
            let input = match expert.input {
                FeedForwardInput::Gated { gate, up } => vec![gate, up],
                FeedForwardInput::FusedGated(linear) | FeedForwardInput::Plain(linear) => vec![linear],
            };
            input.into_iter().chain([expert.down]).map(|linear| config.index(linear.weight)).collect::<Vec<_>>()
        });
        let weights: Vec<Vec<usize>> = weights.collect();
        for part in 0..weights[0].len() {
            let sum: f64 = weights.iter().map(|expert| sums[expert[part]]).sum();
            weights.iter().for_each(|expert| sums[expert[part]] += sum / (n_tokens * n_active) as f64);
        }
    }
}

/// The gradient by the final hidden states of a window of −log p of tokens that are drawn, and what the parts of the head are worth.
fn head(
    decoder: &Decoder<Slot>,
    hidden: &Array2<f32>,
    seed: u64,
    is_stacked: &[bool],
) -> Result<(Array2<f32>, Shares), EngineError> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut grad = Array2::zeros(hidden.dim());
    let mut shares = Shares::new();
    let part_rows = decoder.config().vocab_part_rows;
    for (hidden, mut grad) in
        hidden.axis_chunks_iter(Axis(0), HEAD_TOKENS).zip(grad.axis_chunks_iter_mut(Axis(0), HEAD_TOKENS))
    {
        let found = decoder.head_backward(hidden, |x, slopes, logits| {
            for mut row in logits.rows_mut() {
                math::softmax(row.as_slice_mut().expect("logits are in row order"));
            }
            let squares = x.mapv(|x| x * x);
            for (part, index) in decoder.config().head().enumerate() {
                if is_stacked[index] {
                    let columns = Slice::from(part * part_rows..logits.ncols().min((part + 1) * part_rows));
                    let mut spread = logits.slice_axis(Axis(1), columns).mapv(|p| p * (1.0 - p));
                    if let Some(slopes) = slopes {
                        let slopes = slopes.slice_axis(Axis(1), columns);
                        Zip::from(&mut spread).and(slopes).for_each(|spread, slope| *spread *= slope * slope);
                    }
                    shares.push((index, worth(&decoder.weights()[index], spread.view(), squares.view(), f64::from)));
                }
            }
            for mut row in logits.rows_mut() {
                let drawn = draw(row.view(), rng.random());
                row[drawn] -= 1.0;
            }
        })?;
        grad.assign(&found);
    }
    Ok((grad, shares))
}

/// The place where a share `point` of the sum of `p` is reached.
fn draw(p: ArrayView1<'_, f32>, point: f64) -> usize {
    let mut left = point * p.iter().map(|p| f64::from(*p)).sum::<f64>();
    let reached = p.iter().position(|p| {
        left -= f64::from(*p);
        left < 0.0
    });
    reached.unwrap_or(p.len() - 1)
}

/// What the parts of the embedding are worth to a window in which they are looked up: the gradients of equal tokens add up.
fn looked_up(model: &Streamed<'_>, window: &[u32], grad: &Array2<f32>, is_stacked: &[bool]) -> Shares {
    let mut sums: BTreeMap<u32, ndarray::Array1<f32>> = BTreeMap::new();
    for (token, g) in window.iter().zip(grad.rows()) {
        sums.entry(*token).and_modify(|sum| *sum += &g).or_insert_with(|| g.to_owned());
    }
    let (decoder, first) = (model.decoder(), model.decoder().config().embedding().start);
    let part_rows = decoder.config().vocab_part_rows;
    let scale = decoder.config().embedding_scale.unwrap_or(1.0);
    let mut row = vec![0.0; grad.ncols()];
    let worth = |(token, sum): (u32, ndarray::Array1<f32>)| {
        let part = first + token as usize / part_rows;
        is_stacked[part].then_some(())?;
        decoder.weights()[part].row_into(token as usize % part_rows, &mut row);
        let round = rounding(ArrayView1::from(&row));
        let squares = row.iter().zip(&sum).map(|(w, g)| f64::from((round(*w) - w) * g * scale).powi(2));
        Some((part, 0.5 * squares.sum::<f64>()))
    };
    sums.into_iter().filter_map(worth).collect()
}

/// ½ Σ fisher(gᵀ x) ⊙ Δ² with what rounding changes of the weight: `g` is tokens x rows, `x` tokens x cols.
fn worth(weight: &Slot, g: ArrayView2<'_, f32>, x: ArrayView2<'_, f32>, fisher: impl Fn(f32) -> f64) -> f64 {
    let (g, x) = (g.as_standard_layout(), x.as_standard_layout());
    let (tokens, rows, cols) = (x.nrows(), g.ncols(), x.ncols());
    let g = MatRef::from_row_major_slice(g.as_slice().expect("made standard above"), tokens, rows);
    let x = MatRef::from_row_major_slice(x.as_slice().expect("made standard above"), tokens, cols);
    let (mut gradient, mut row) = (vec![0.0; PANEL_ROWS * cols], vec![0.0; cols]);
    let mut sum = 0.0;
    for start in (0..rows).step_by(PANEL_ROWS) {
        let n = PANEL_ROWS.min(rows - start);
        let gradient = &mut gradient[..n * cols];
        let panel = MatMut::from_row_major_slice_mut(gradient, n, cols);
        math::product(panel, g.subcols(start, n).transpose(), x, 1.0);
        for (r, gradient) in gradient.chunks_exact(cols).enumerate() {
            weight.row_into(start + r, &mut row);
            let round = rounding(ArrayView1::from(&row));
            let squares = row.iter().zip(gradient).map(|(w, m)| f64::from(round(*w) - w).powi(2) * fisher(*m));
            sum += squares.sum::<f64>();
        }
    }
    0.5 * sum
}

/// The rounding of a row.
fn rounding(row: ArrayView1<'_, f32>) -> impl Fn(f32) -> f32 + use<> {
    let square = row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / row.len() as f64;
    let step = (ROUNDING_STEP * square.sqrt()) as f32;
    move |w| if step > 0.0 { (w / step).round() * step } else { w }
}

/// The squared error of the outputs of a weight when it is rounded, per token, from an even sample of its rows; without a Gram matrix that
/// of the weight.
pub(crate) fn rounding_error(weight: ArrayView2<'_, f32>, gram: Option<ArrayView2<'_, f64>>) -> f64 {
    let (rows, cols) = weight.dim();
    let n = rows.min(ROUNDING_ROWS);
    let mut errors = Array2::<f64>::zeros((n, cols));
    for (i, mut error) in errors.rows_mut().into_iter().enumerate() {
        let row = weight.row(i * rows / n);
        let round = rounding(row);
        error.iter_mut().zip(row).for_each(|(e, w)| *e = f64::from(round(*w)) - f64::from(*w));
    }
    let under = gram.map_or_else(|| errors.clone(), |gram| errors.dot(&gram));
    ((under * errors).sum() * rows as f64 / n as f64).max(0.0)
}

/// By how many levels each weight will be ahead of the others in the order by gain (behind, if negative), from its divergence when it
/// is rounded and its size. Rounding makes the same relative error everywhere. Where bytes are well spent, one more gains the same on every
/// weight, and errors fall by 4 with each level: f times the divergence per byte is ½ log₂ f levels.
pub(crate) fn leads(divergences: &[f64], sizes: &[f64]) -> Vec<f64> {
    /// Below it, in nats per token, a divergence is rounding in the last bits.
    const LEAST: f64 = 1e-12;
    let levels = divergences.iter().zip(sizes).map(|(nats, n)| 0.5 * (nats.max(LEAST) / n).log2());
    let levels: Vec<f64> = levels.collect();
    let mean = levels.iter().zip(sizes).map(|(level, n)| level * n).sum::<f64>() / sizes.iter().sum::<f64>();
    levels.into_iter().map(|level| level - mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{self, with_large_vocabulary};
    use bitstack_engine::Pass;
    use bitstack_model::{Dense, Elements, WeightRole};

    /// The indices of all weights of a model.
    fn all(checkpoint: &Checkpoint) -> Vec<usize> {
        (0..checkpoint.config().weights().len()).collect()
    }

    /// The mean divergence in f64 of the logits of one model from those of another.
    fn divergence(original: &Decoder<Dense>, other: &Decoder<Dense>, windows: &[&[u32]]) -> f64 {
        let log_softmax = |row: ArrayView1<'_, f32>| {
            let norm = row.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
            row.mapv(|v| f64::from(v) - norm)
        };
        let of_window = |window: &&[u32]| -> f64 {
            let [p, q] = [original, other].map(|m| m.forward(window, &mut Pass::new()).unwrap());
            let rows = p.rows().into_iter().zip(q.rows());
            rows.map(|(p, q)| {
                let (p, q) = (log_softmax(p), log_softmax(q));
                p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
            })
            .sum()
        };
        let tokens: usize = windows.iter().map(|w| w.len()).sum();
        windows.iter().map(of_window).sum::<f64>() / tokens as f64
    }

    /// The signs of what rounding changes are not quite random, tokens are drawn once for each position, and the divergence is not quite a
    /// square: each costs some percent (half of the weights are within 4 % here, the farthest is 31 % off). A factor of 2 would be half a level.
    #[test]
    fn importance_is_the_divergence_of_the_model_with_a_weight_rounded() {
        for name in fixtures::MODELS {
            let checkpoint = fixtures::checkpoint(name);
            let windows: Vec<Vec<u32>> =
                (0..24).map(|w| (0..60).map(|i: u32| (w * 31 + i * i * (w + 3) + 5 * i) % 96).collect()).collect();
            let windows: Vec<&[u32]> = windows.iter().map(|w| &w[..]).collect();
            let found = roundings(&checkpoint, &all(&checkpoint), &windows, 1, &()).unwrap();
            let mut model = Decoder::load(&checkpoint).unwrap();
            let original = model.clone();
            let mut ratios = Vec::new();
            for (index, spec) in checkpoint.config().weights().iter().enumerate() {
                let mut values = checkpoint.matrix(spec).unwrap();
                for mut row in values.rows_mut() {
                    let round = rounding(row.view());
                    row.mapv_inplace(round);
                }
                let rounded = Elements::F32(values.into_raw_vec_and_offset().0);
                let own = model.replace(index, Dense::new(spec.rows, spec.cols, rounded).unwrap()).unwrap();
                let measured = divergence(&original, &model, &windows);
                model.replace(index, own).unwrap();
                ratios.push(found[index] / measured);
            }
            assert!(ratios.iter().all(|r| (0.5..2.0).contains(r)), "{name}: {ratios:?}");
            ratios.sort_unstable_by(f64::total_cmp);
            let median = ratios[ratios.len() / 2];
            assert!((median - 1.0).abs() < 0.15, "{name}: {median}");
        }
    }

    #[test]
    fn parts_of_a_vocabulary_are_worth_what_the_whole_is() {
        for name in ["llama", "llama31"] {
            let (_dir, whole) = with_large_vocabulary(name);
            let cut = whole.with_cut_vocabulary();
            let windows: Vec<Vec<u32>> =
                (0..3).map(|w| (0..20).map(|i: u32| (w * 977 + i * 431) % 5000).collect()).collect();
            let windows: Vec<&[u32]> = windows.iter().map(|w| &w[..]).collect();
            let [of_whole, of_parts] = [&whole, &cut].map(|checkpoint| {
                let found = roundings(checkpoint, &all(checkpoint), &windows, 1, &()).unwrap();
                let specs = checkpoint.config().weights();
                [WeightRole::Embedding, WeightRole::Head, WeightRole::Query].map(|role| {
                    let weights = (0..specs.len()).filter(|w| specs[*w].role == role);
                    weights.map(|w| found[w]).sum::<f64>()
                })
            });
            // Sums in another order, of f32 products.
            for (whole, parts) in of_whole.into_iter().zip(of_parts) {
                assert!((whole - parts).abs() <= 1e-5 * whole, "{name}: {of_whole:?} {of_parts:?}");
            }
        }
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        let p = ndarray::arr1(&[0.1f32, 0.0, 0.6, 0.3]);
        let drawn = |i: usize| draw(p.view(), (i as f64 + 0.5) / 1000.0);
        let mut counts = [0; 4];
        (0..1000).for_each(|i| counts[drawn(i)] += 1);
        assert_eq!(counts, [100, 0, 600, 300]);
        assert_eq!(draw(p.view(), 1.0), 3);
    }

    #[test]
    fn leads_are_half_the_logarithm_of_the_divergence_per_element_about_a_mean_of_0() {
        let leads = leads(&[4e-3, 1e-3, 16e-3], &[100.0, 100.0, 200.0]);
        assert!((leads[0] - leads[1] - 1.0).abs() < 1e-12 && (leads[2] - leads[0] - 0.5).abs() < 1e-12, "{leads:?}");
        assert!((leads[0] + leads[1] + 2.0 * leads[2]).abs() < 1e-12, "{leads:?}");
    }

    #[test]
    fn the_error_of_rounding_is_that_of_the_rounded_weight() {
        // Fewer rows than the sample has: exact. A rounding to steps of δ leaves about δ²/12 in each value.
        let weight =
            Array2::from_shape_fn((40, 64), |(r, c)| (((r * 37 + c * 101) % 97) as f32 / 48.0 - 1.0) * (1 + r) as f32);
        let gram = Array2::from_shape_fn((64, 64), |(i, j)| 0.5f64.powi(i.abs_diff(j) as i32));
        let mut plain = 0.0;
        let mut under = 0.0;
        for row in weight.rows() {
            let round = rounding(row);
            let e: Vec<f64> = row.iter().map(|w| f64::from(round(*w)) - f64::from(*w)).collect();
            plain += e.iter().map(|e| e * e).sum::<f64>();
            under += (0..64).map(|i| (0..64).map(|j| e[i] * gram[[i, j]] * e[j]).sum::<f64>()).sum::<f64>();
        }
        assert!((rounding_error(weight.view(), None) / plain - 1.0).abs() < 1e-12);
        assert!((rounding_error(weight.view(), Some(gram.view())) / under - 1.0).abs() < 1e-12);
        let share = plain / weight.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
        assert!((share / (ROUNDING_STEP.powi(2) / 12.0) - 1.0).abs() < 0.1, "{share}");
        assert_eq!(rounding_error(Array2::zeros((3, 4)).view(), None), 0.0);
    }
}
