//! Tensors of a checkpoint that its model does not use, and what their names tell.

use crate::ModelError;
use bitstack_io::hostile::printable;
use std::collections::HashSet;
use std::path::Path;

/// Ends of the names of tensors that follow from the config, and are stored by some programs all the same.
const DERIVED: [&str; 6] = [
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    ".masked_bias",
    ".attn.bias",
    ".position_ids",
];

/// Checks that every one of `names` is used, follows from the config, or matches one of the patterns `ignored`.
///
/// # Errors
/// [`ModelError::UnusedTensors`].
pub(crate) fn check<'n>(
    dir: &Path,
    names: impl Iterator<Item = &'n str>,
    used: &HashSet<String>,
    n_layers: usize,
    ignored: &[String],
) -> Result<(), ModelError> {
    const MOST_SHOWN: usize = 3;
    let is_derived = |name: &str| DERIVED.iter().any(|end| name.ends_with(end));
    let is_ignored = |name: &str| ignored.iter().any(|pattern| matches(pattern.as_bytes(), name.as_bytes()));
    let mut unused: Vec<&str> =
        names.filter(|name| !used.contains(*name) && !is_derived(name) && !is_ignored(name)).collect();
    unused.sort_unstable();
    let Some(first) = unused.first() else { return Ok(()) };
    let count = unused.len();
    let mut names = unused.iter().take(MOST_SHOWN).map(|name| printable(name)).collect::<Vec<_>>().join(", ");
    if count > MOST_SHOWN {
        names.push_str(&format!(" and {} more", count - MOST_SHOWN));
    }
    let reason = reason(first, n_layers).map(|reason| format!(" ({reason})")).unwrap_or_default();
    Err(ModelError::UnusedTensors { dir: dir.to_owned(), count, names, reason })
}

/// What a tensor that is not used may be.
fn reason(name: &str, n_layers: usize) -> Option<String> {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let has = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    let ends = |parts: &[&str]| parts.iter().any(|part| name.ends_with(part));
    let known = if has(&["lora_", ".base_layer.", ".modules_to_save.", "ia3_", "adapter"]) {
        "an adapter that is not merged"
    } else if has(&["weight_scale", "input_scale", ".weight_packed", ".quant_map", ".absmax", ".quant_state"])
        || ends(&[".scales", ".qweight", ".qzeros", ".g_idx", ".SCB", ".biases", "_scale_inv"])
        || has(&[".qweight_"])
    {
        "part of a quantised checkpoint; one of f32, f16 or bf16 weights is needed"
    } else if layer.is_some_and(|layer| layer >= n_layers) {
        return Some(format!("a layer beyond num_hidden_layers, which is {n_layers}"));
    } else if ends(&[".bias"]) {
        "a bias that config.json does not announce"
    } else if has(&["norm"]) {
        "a norm that the architecture does not have"
    } else {
        return None;
    };
    Some(known.to_owned())
}

/// Whether a pattern, in which `*` stands for any bytes and `?` for one, is a name.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    // Where the last `*` was, and where in the name what follows it was tried: it takes one byte more when that fails.
    let (mut p, mut n, mut retry) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                p += 1;
                retry = Some((p, n));
            }
            Some(c) if *c == b'?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((after, tried)) = retry else { return false };
                (p, n) = (after, tried + 1);
                retry = Some((after, n));
            }
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, is_match) in [
            ("*", "", true),
            ("*.bias", "a.b.bias", true),
            ("*.bias", "a.bias.b", false),
            ("a.?.b", "a.1.b", true),
            ("a.?.b", "a.12.b", false),
            ("a*b*c", "aXbYbZc", true),
            ("a*b*c", "aXbYbZ", false),
            ("a", "ab", false),
            ("", "a", false),
            ("**", "a", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), is_match, "{pattern} {name}");
        }
    }
}
