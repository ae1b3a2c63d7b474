//! Text that the model writes itself.

use crate::CompressError;
use crate::units::Units;
use bitstack_engine::{Decoder, SamplingOptions, sample};
use bitstack_model::{Checkpoint, ModelConfig, Part, Progress};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Windows of its own text that a model writes side by side: every weight is read once for all of them, and their keys and values are in memory
/// beside it.
const OWN_WINDOWS: usize = 48;

/// A model of more weights than this does not add to a user's text: all of it would be in memory (4 GB in 16 bits).
const MOST_WRITING: u64 = 2_000_000_000;

/// A model of no more weights than this is widened to f32 (2 GB) before it writes.
const WIDENED: u64 = 500_000_000;

/// Whether a model is small enough that it can be in memory to write a third of the calibration.
pub(crate) fn can_write(config: &ModelConfig) -> bool {
    n_elements(config) <= MOST_WRITING
}

fn n_elements(config: &ModelConfig) -> u64 {
    config.weights().iter().map(|w| w.rows as u64 * w.cols as u64).sum()
}

/// Text of the model's own: windows sampled at temperature 1, one after the other in one list.
///
/// They are sampled in groups, and a group is there whole or not at all: what a window's neighbours are may show in its tokens.
pub(crate) fn own_text(
    checkpoint: &Checkpoint,
    n_windows: usize,
    seq_len: usize,
    seed: u64,
    units: &Units,
    progress: &dyn Progress,
) -> Result<Vec<u32>, CompressError> {
    let name = |group: usize| format!("text.{group:05}");
    let firsts = (0..n_windows).step_by(OWN_WINDOWS);
    let mut groups = (0..firsts.len()).map(|group| units.load(&name(group))).collect::<Result<Vec<_>, _>>()?;
    if groups.iter().any(Option::is_none) {
        let decoder = Decoder::load_with(checkpoint, progress)?;
        let decoder = if n_elements(checkpoint.config()) <= WIDENED { decoder.widened() } else { decoder };
        let steps = seq_len.saturating_sub(1);
        progress.stage("text from the model (steps)", groups.len().saturating_mul(steps) as u64);
        for ((group, windows), first) in groups.iter_mut().enumerate().zip(firsts) {
            if windows.is_some() {
                progress.advance(steps as u64);
                continue;
            }
            let starts: Vec<u32> = (first..n_windows.min(first + OWN_WINDOWS))
                .map(|window| start_token(checkpoint.config().vocab_size, seed, window))
                .collect();
            let sampling = SamplingOptions::with_temperature(1.0, seed.wrapping_add(first as u64));
            let sampled = sample::windows(&decoder, &starts, seq_len, sampling, progress)?.concat();
            units.store(&name(group), &[bytemuck::cast_slice(&sampled)])?;
            *windows = Some(sampled);
        }
    }
    progress.part(Part::Text, (n_windows * seq_len) as u64);
    Ok(groups.into_iter().flatten().flatten().collect())
}

/// The token that window `window` of the model's own text begins with: any of the vocabulary.
///
/// Models see an end token between texts. But what those that were taught to chat write after it is hardly ever anything but a system prompt.
fn start_token(vocab_size: usize, seed: u64, window: usize) -> u32 {
    // The samples that follow come from the seed itself; the start must not be one of their numbers.
    let seed = !seed.wrapping_add(window as u64);
    StdRng::seed_from_u64(seed).random_range(0..vocab_size as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_that_need_much_memory_do_not_write_for_a_text() {
        let checkpoint = crate::fixtures::checkpoint("llama");
        assert!(can_write(checkpoint.config()));
        // The shape of Llama 3.2 1B: 1.24 billion; and with four times the layers.
        let shaped = |n_layers: usize| {
            let mut json: serde_json::Value = serde_json::from_str(checkpoint.config_text()).unwrap();
            json["hidden_size"] = 2048.into();
            json["intermediate_size"] = 8192.into();
            json["num_hidden_layers"] = n_layers.into();
            json["vocab_size"] = 128_256.into();
            ModelConfig::from_json(&json.to_string()).unwrap()
        };
        assert!(can_write(&shaped(16)));
        assert!(!can_write(&shaped(64)));
    }
}
