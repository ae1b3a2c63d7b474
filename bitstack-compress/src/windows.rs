//! Which windows of a text each job reads.

use bitstack_model::ModelConfig;
use bitstack_model::text::Windows;

/// Windows of text that measurements choose from; and those on which the orders by perplexity are measured, if not told otherwise.
pub(crate) const VALIDATION_WINDOWS: usize = 16;

/// Windows for the order by gain: divergences are far less noisy than perplexities.
const GAIN_WINDOWS: usize = 2;

/// Tokens on which the importance of weights is found. It scatters by .08 levels about that on twice as many.
const PROBE_TOKENS: usize = 2048;

/// The hidden states in front of all layers that this keeps in memory, at most; those of one window at least.
const PROBE_BYTES: u64 = 2 << 30;

/// The fewest tokens that a layer is measured on. On 64 and 128 instead of 512, the divergence of a model of 14.7 million parameters is 10 and
/// 6 % larger, averaged over formats from 1.6 to 5.7 bits per weight.
const LEAST_RUN: usize = 64;

/// The most tokens of a window on which orders are checked. Orders are compared on the same ones: on 256 of 512 the same orders win, for a
/// model of 14.7 million parameters.
pub(crate) const CHECK_RUN: usize = 256;

pub(crate) fn n_tokens(windows: &[&[u32]]) -> usize {
    windows.iter().map(|w| w.len()).sum()
}

/// The windows of a user's text to calibrate on.
pub(crate) fn calibration<'t>(windows: Windows<'t>, samples: usize) -> Vec<&'t [u32]> {
    let (first, _) = windows.halves();
    // A text of one window has to do for both.
    if first.is_empty() { windows } else { first }.evenly_spaced(samples)
}

/// The windows on which the importance of weights is found: [`PROBE_TOKENS`] in all, fewer where their states are larger than [`PROBE_BYTES`].
pub(crate) fn probe<'w>(validation: &[&'w [u32]], config: &ModelConfig) -> Vec<&'w [u32]> {
    let len = validation.iter().map(|w| w.len()).max().unwrap_or(1).max(1);
    let states = 4 * (len * config.hidden_size) as u64 * (config.n_layers() as u64 + 1);
    let most = (PROBE_BYTES / states).min((PROBE_TOKENS / len) as u64).max(1) as usize;
    let n = most.min(validation.len());
    (0..n).map(|i| validation[i * validation.len() / n]).collect()
}

/// The beginnings of the windows on which layers are measured: short enough that all these runs together, of half of the model each, read an
/// eighth as many tokens as calibration does.
pub(crate) fn runs<'w>(validation: &[&'w [u32]], calibration: usize, n_layers: usize) -> Vec<&'w [u32]> {
    beginnings(validation, (calibration / (8 * n_layers.max(1))).max(LEAST_RUN))
}

/// The first tokens of the windows for the order by gain.
pub(crate) fn beginnings<'w>(validation: &[&'w [u32]], tokens: usize) -> Vec<&'w [u32]> {
    validation.iter().take(GAIN_WINDOWS).map(|w| &w[..w.len().min(tokens)]).collect()
}

/// How many of so many windows [`with_thirds`] replaces.
pub(crate) fn thirds(windows: usize) -> usize {
    windows / 3
}

/// The windows, every third of them replaced by the next one of `own`, of which there are [`thirds`].
pub(crate) fn with_thirds<'a>(windows: &[&'a [u32]], own: impl IntoIterator<Item = &'a [u32]>) -> Vec<&'a [u32]> {
    let mut mixed = windows.to_vec();
    mixed.iter_mut().skip(2).step_by(3).zip(own).for_each(|(window, own)| *window = own);
    mixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_all_layers_read_an_eighth_of_the_tokens_of_calibration() {
        let window: Vec<u32> = (0..512).collect();
        let validation = [&window[..]; 3];
        for (calibration, n_layers) in [(64 * 512, 30), (64 * 512, 4), (128 * 512, 80), (512, 30)] {
            let runs = runs(&validation, calibration, n_layers);
            let len = runs[0].len();
            assert!(runs.len() == GAIN_WINDOWS && runs.iter().all(|run| run[..] == window[..len]));
            // Two windows through half of the model are one.
            assert!(len == LEAST_RUN || 8 * n_layers * len <= calibration, "{len}");
            assert!(len == window.len() || 8 * n_layers * (len + 1) > calibration, "{len}");
        }
        assert_eq!(runs(&validation[..1], 1 << 20, 10).len(), 1);
    }

    #[test]
    fn importance_is_found_on_few_enough_windows_that_their_states_fit() {
        let windows: Vec<Vec<u32>> = (0..16).map(|w| vec![w; 512]).collect();
        let windows: Vec<&[u32]> = windows.iter().map(|w| &w[..]).collect();
        let checkpoint = crate::fixtures::checkpoint("llama");
        let firsts = |config: &ModelConfig| probe(&windows, config).iter().map(|w| w[0]).collect::<Vec<_>>();
        assert_eq!(firsts(checkpoint.config()), [0, 4, 8, 12]);
        let mut json: serde_json::Value = serde_json::from_str(checkpoint.config_text()).unwrap();
        json["hidden_size"] = 16384.into();
        json["num_hidden_layers"] = 126.into();
        assert_eq!(firsts(&ModelConfig::from_json(&json.to_string()).unwrap()), [0]);
        assert_eq!(probe(&[&[1, 2]], checkpoint.config()), [[1, 2]]);
    }

    #[test]
    fn two_windows_of_three_are_the_text_and_each_third_is_the_next_of_the_others() {
        let (text, own) = (Vec::from_iter(0..110), Vec::from_iter(200..300));
        for n in 0..=11 {
            let windows: Vec<&[u32]> = text.chunks(10).take(n).collect();
            let own: Vec<&[u32]> = own.chunks(10).take(thirds(n)).collect();
            let mixed = with_thirds(&windows, own.iter().copied());
            assert_eq!(mixed.len(), n);
            for (i, window) in mixed.iter().enumerate() {
                assert_eq!(*window, if i % 3 == 2 { own[i / 3] } else { windows[i] });
            }
            assert_eq!(mixed.iter().filter(|window| window[0] >= 200).count(), own.len());
        }
    }
}
