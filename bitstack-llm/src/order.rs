//! In which order blocks are loaded: what one block more, or one weight less well kept, does to the whole model.

use crate::eval::Scores;
use crate::stack::{StackModel, rebuild};
use crate::{Checkpoint, Decoder, Dense, LlmError, Pass, Progress};
use bitstack_format::BlockSource;
use ndarray::Array2;
use rayon::prelude::*;
use std::sync::Arc;

/// The level at which a weight's sensitivity is measured: at level 1 the errors are so large that they do not add up, and far up the
/// stack the divergences drown in rounding.
const PROBE_LEVEL: u32 = 2;

/// Per stacked weight, the model's KL divergence per unit of the weight's squared error: one run per weight, with that weight at
/// level 2 and all others as they were. `errors[w][b - 1]` is the squared error of weight `w` at level `b`.
pub(crate) fn sensitivities<S: BlockSource + Sync + ?Sized>(
    checkpoint: &Checkpoint,
    source: &S,
    errors: &[Vec<f64>],
    windows: &[&[u32]],
    progress: &dyn Progress,
) -> Result<Vec<f64>, LlmError> {
    let load = |_, spec: &crate::WeightSpec| Ok::<_, LlmError>(Arc::new(checkpoint.weight(spec)?));
    let original = Decoder::new(checkpoint.config().clone(), load, |spec| checkpoint.vector(spec))?;
    let mut decoder = original.clone();
    let finals = windows
        .par_iter()
        .with_max_len(1)
        .map(|w| original.hidden(&w[..w.len() - 1], &mut Pass::new()))
        .collect::<Result<Vec<_>, _>>()?;
    let probes: Vec<u32> = errors.iter().map(|e| PROBE_LEVEL.min(e.len() as u32)).collect();
    progress.stage("sensitivity (weights)", probes.len() as u64);
    let divergences = try_each(
        &mut decoder,
        source,
        windows,
        |w| rebuild(source, w, probes[w]).map(Some),
        |window, decoder, hidden| {
            let scores = score(decoder, hidden, windows[window], Some((&original, &finals[window])))?;
            Ok(scores.kl / scores.tokens as f64)
        },
        progress,
    )?;
    let per_error = |(w, kl): (usize, f64)| {
        let error = errors[w][probes[w] as usize - 1];
        // A weight that is exact at the probe needs no further block; rounding may make a divergence slightly negative.
        if error > 0.0 { kl.max(0.0) / error } else { 0.0 }
    };
    Ok(divergences.into_iter().enumerate().map(per_error).collect())
}

/// Per stacked weight and block, the perplexity when that block is loaded and every other weight is a level below: the paper's score
/// (arXiv 2410.23918, section 3.3). `scores[w][b]`, block `b` from 0; for the first blocks, which are always loaded, NaN.
pub(crate) fn perplexities<S: BlockSource + Sync + ?Sized>(
    source: &S,
    windows: &[&[u32]],
    progress: &dyn Progress,
) -> Result<Vec<Vec<f64>>, LlmError> {
    let n_blocks: Vec<u32> = source.weights().iter().map(|w| w.n_blocks() as u32).collect();
    let most = n_blocks.iter().copied().max().unwrap_or(0);
    let mut scores: Vec<Vec<f64>> = n_blocks.iter().map(|_| vec![f64::NAN]).collect();
    progress.stage("perplexity (runs)", n_blocks.iter().map(|n| u64::from(n - 1)).sum());
    for level in 1..most {
        let levels: Vec<u32> = n_blocks.iter().map(|n| level.min(*n)).collect();
        let mut decoder = StackModel::open(source, &levels)?.into_decoder();
        let found = try_each(
            &mut decoder,
            source,
            windows,
            |w| if level < n_blocks[w] { rebuild(source, w, level + 1).map(Some) } else { Ok(None) },
            |window, decoder, hidden| {
                let scores = score(decoder, hidden, windows[window], None)?;
                Ok(scores.loss / scores.tokens as f64)
            },
            progress,
        )?;
        for (w, loss) in found.into_iter().enumerate().filter(|(w, _)| level < n_blocks[*w]) {
            scores[w].push(loss.exp());
        }
    }
    Ok(scores)
}

/// Puts, one after another, a replacement in the place of each stacked weight and measures the model: the mean over windows of
/// `measure(window, decoder, final hidden states)`, NaN where there is no replacement.
///
/// Only what comes after the replaced weight is run again: the weights are gone through in forward order, and the hidden states in front
/// of the present layer kept. That saves half of the work, and changes no result.
fn try_each<S: BlockSource + ?Sized>(
    decoder: &mut Decoder<Arc<Dense>>,
    source: &S,
    windows: &[&[u32]],
    replacement: impl Fn(usize) -> Result<Option<Dense>, LlmError>,
    measure: impl Fn(usize, &Decoder<Arc<Dense>>, &Array2<f32>) -> Result<f64, LlmError> + Sync,
    progress: &dyn Progress,
) -> Result<Vec<f64>, LlmError> {
    let specs = decoder.config().weights();
    let n_layers = decoder.config().n_layers;
    let mut found = vec![f64::NAN; source.weights().len()];
    let mut states: Option<Vec<Array2<f32>>> = None;
    let mut at_layer = 0;
    for (index, spec) in specs.iter().enumerate() {
        // States in front of the layer of this weight, of the embedding's (none), or of the head.
        let from = match (index, spec.layer) {
            (0, _) => None,
            (_, Some(layer)) => Some(layer),
            (_, None) => Some(n_layers),
        };
        if let Some(from) = from {
            let mut here = match states.take() {
                Some(states) => states,
                None => in_windows(windows, |w| decoder.embed(&w[..w.len() - 1]))?,
            };
            here.par_iter_mut().with_max_len(1).try_for_each(|h| advance(decoder, h, at_layer..from))?;
            at_layer = from;
            states = Some(here);
        }
        let Some(weight) = source.weight_index(&spec.name) else { continue };
        let Some(other) = replacement(weight)? else { continue };
        let kept = decoder.replace(index, Arc::new(other))?;
        let run = &*decoder;
        let values = (0..windows.len())
            .into_par_iter()
            .with_max_len(1)
            .map(|i| {
                let mut hidden = match &states {
                    Some(states) => states[i].clone(),
                    None => run.embed(&windows[i][..windows[i].len() - 1])?,
                };
                advance(run, &mut hidden, from.unwrap_or(0)..n_layers)?;
                measure(i, run, &hidden)
            })
            .collect::<Result<Vec<f64>, LlmError>>()?;
        found[weight] = values.iter().sum::<f64>() / values.len() as f64;
        decoder.replace(index, kept)?;
        progress.advance(1);
    }
    Ok(found)
}

fn advance(
    decoder: &Decoder<Arc<Dense>>,
    hidden: &mut Array2<f32>,
    layers: std::ops::Range<usize>,
) -> Result<(), LlmError> {
    let mut pass = Pass::new();
    layers.into_iter().try_for_each(|layer| decoder.layer(layer, hidden, &mut pass))
}

fn in_windows<T: Send>(
    windows: &[&[u32]],
    f: impl Fn(&[u32]) -> Result<T, LlmError> + Sync,
) -> Result<Vec<T>, LlmError> {
    windows.par_iter().with_max_len(1).map(|w| f(w)).collect()
}

/// Scores of one window from its final hidden states, against a reference's where there is one.
fn score(
    decoder: &Decoder<Arc<Dense>>,
    hidden: &Array2<f32>,
    window: &[u32],
    reference: Option<(&Decoder<Arc<Dense>>, &Array2<f32>)>,
) -> Result<Scores, LlmError> {
    crate::eval::score_hidden(decoder, hidden.view(), reference.map(|(d, h)| (d, h.view())), &window[1..])
}
