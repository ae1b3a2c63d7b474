//! In which order blocks are loaded: what one block more, or one weight less well kept, does to the whole model.

use crate::eval::Scores;
use crate::journal::Units;
use crate::stack::{StackModel, rebuild};
use crate::{Checkpoint, Decoder, Dense, LlmError, Pass, Progress};
use bitstack_format::BlockSource;
use ndarray::Array2;
use rayon::prelude::*;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The level up to which all weights go together in the order by gain. Below it errors are so large that they do not add up: what a
/// weight is worth depends on how bad the others are, so steps there are measured with the whole model at their level. Measured on a
/// model of 14.7 million parameters, nested codes, everything stacked, divergence at 2.4, 2.8, 3.2 and 4.5 bits per weight: up to
/// level 2 .0204 .0096 .0053 .0012, up to level 3 .0210 .0161 .0083 .0012.
pub(crate) const LOCKSTEP: usize = 2;

/// The level at which a weight is measured with all others as they were, which tells what the steps above are worth.
const PROBE_LEVEL: u32 = 3;

/// A measured worth below this share of what the original model says is noise.
const LEAST_SHARE: f64 = 0.1;

/// Per stacked weight and level, the divergence that is predicted to be left: `curves[w][b - 1]` for level `b`.
///
/// `errors[w][b - 1]` is the squared error of weight `w` at level `b`, in closed form. A step from level b to b + 1 is worth
/// a · (error at b − error at b + 1), with a sensitivity `a` (nats per unit of error) that is measured twice per weight: with the whole
/// model at level 1, the weight going to 2; and with the model as it was, the weight alone at level 3, which serves all further
/// steps. That is two runs per weight, whatever the number of blocks.
pub(crate) fn divergence_curves<S: BlockSource + Sync + ?Sized>(
    checkpoint: &Checkpoint,
    source: &S,
    errors: &[Vec<f64>],
    windows: &[&[u32]],
    units: &Units,
    progress: &dyn Progress,
) -> Result<Vec<Vec<f64>>, LlmError> {
    progress.stage("load (weights)", checkpoint.config().weights().len() as u64);
    let load = |_, spec: &crate::WeightSpec| {
        progress.advance(1);
        Ok::<_, LlmError>(Arc::new(checkpoint.weight(spec)?))
    };
    let original = Decoder::new(checkpoint.config().clone(), load, |spec| checkpoint.vector(spec))?;
    let finals = in_windows(windows, |w| original.hidden(&w[..w.len() - 1], &mut Pass::new()))?;
    progress.stage("sensitivity (runs)", (LOCKSTEP * errors.len()) as u64);
    let divergence = |window: usize, decoder: &_, hidden: &_| {
        let scores = score(decoder, hidden, windows[window], Some((&original, &finals[window])))?;
        Ok(scores.kl / scores.tokens as f64)
    };
    // nats per unit of error; 0 for a weight whose error does not change.
    let per_error = |nats: f64, error: f64| if error > 0.0 { (nats / error).max(0.0) } else { 0.0 };

    let probes: Vec<u32> = errors.iter().map(|e| PROBE_LEVEL.min(e.len() as u32)).collect();
    let mut decoder = original.clone();
    let alone = |w: usize| rebuild(source, w, probes[w]).map(Some);
    let runs = Runs::new("runs.alone", units);
    let found = try_each(&mut decoder, source, windows, alone, divergence, runs, progress)?;
    let alone: Vec<f64> =
        found.iter().zip(&probes).zip(errors).map(|((nats, p), e)| per_error(*nats, e[*p as usize - 1])).collect();

    let mut worth: Vec<Vec<f64>> =
        errors.iter().zip(&alone).map(|(e, a)| e.windows(2).map(|step| a * (step[0] - step[1])).collect()).collect();
    for level in 1..LOCKSTEP as u32 {
        let levels: Vec<u32> = errors.iter().map(|e| level.min(e.len() as u32)).collect();
        let mut decoder = StackModel::open(source, &levels, &())?.into_decoder();
        let base = in_windows(windows, |w| decoder.hidden(&w[..w.len() - 1], &mut Pass::new()))?;
        let base = (0..windows.len()).map(|i| divergence(i, &decoder, &base[i])).sum::<Result<f64, LlmError>>()?;
        let base = base / windows.len() as f64;
        let step = level as usize;
        let next = |w: usize| (step < errors[w].len()).then(|| rebuild(source, w, level + 1)).transpose();
        let runs = Runs::new(&format!("runs.level.{level:03}"), units);
        let found = try_each(&mut decoder, source, windows, next, divergence, runs, progress)?;
        let measured: Vec<(usize, f64)> = found
            .into_iter()
            .enumerate()
            .filter(|(w, _)| step < errors[*w].len())
            .map(|(w, nats)| (w, (base - nats).max(LEAST_SHARE * worth[w][step - 1])))
            .collect();
        // Divergences do not add up down there, so what is taken from them is the shares of the weights, not their sum: a step must
        // stay comparable with the steps above it.
        let predicted: f64 = measured.iter().map(|(w, _)| worth[*w][step - 1]).sum();
        let share = predicted / measured.iter().map(|(_, nats)| nats).sum::<f64>();
        if share.is_finite() {
            measured.into_iter().for_each(|(w, m)| worth[w][step - 1] = m * share);
        }
    }
    // What is left at a level is the worth of all steps above it, and of the step to the weight itself.
    Ok(worth.iter().zip(errors).zip(&alone).map(|((steps, e), a)| left(steps, a * e[e.len() - 1])).collect())
}

/// Running sums from the end: what is left before each step, and after the last.
fn left(steps: &[f64], last: f64) -> Vec<f64> {
    let mut left = vec![last; steps.len() + 1];
    for i in (0..steps.len()).rev() {
        left[i] = left[i + 1] + steps[i];
    }
    left
}

/// Per stacked weight and block, the perplexity when that block is loaded and every other weight is a level below: the paper's score
/// (arXiv 2410.23918, section 3.3). `scores[w][b]`, block `b` from 0; for the first blocks, which are always loaded, NaN.
pub fn block_perplexities<S: BlockSource + Sync + ?Sized>(
    source: &S,
    windows: &[&[u32]],
    progress: &dyn Progress,
) -> Result<Vec<Vec<f64>>, LlmError> {
    perplexities(source, windows, &Units::none("".as_ref()), progress)
}

/// [`block_perplexities`], going on from the runs that are finished.
pub(crate) fn perplexities<S: BlockSource + Sync + ?Sized>(
    source: &S,
    windows: &[&[u32]],
    units: &Units,
    progress: &dyn Progress,
) -> Result<Vec<Vec<f64>>, LlmError> {
    let n_blocks: Vec<u32> = source.weights().iter().map(|w| w.n_blocks() as u32).collect();
    let most = n_blocks.iter().copied().max().unwrap_or(0);
    let mut scores: Vec<Vec<f64>> = n_blocks.iter().map(|_| vec![f64::NAN]).collect();
    progress.stage("perplexity (runs)", n_blocks.iter().map(|n| u64::from(n - 1)).sum());
    for level in 1..most {
        let levels: Vec<u32> = n_blocks.iter().map(|n| level.min(*n)).collect();
        let mut decoder = StackModel::open(source, &levels, &())?.into_decoder();
        let runs = Runs::new(&format!("runs.block.{level:03}"), units);
        let found = try_each(
            &mut decoder,
            source,
            windows,
            |w| if level < n_blocks[w] { rebuild(source, w, level + 1).map(Some) } else { Ok(None) },
            |window, decoder, hidden| {
                let scores = score(decoder, hidden, windows[window], None)?;
                Ok(scores.loss / scores.tokens as f64)
            },
            runs,
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
    mut runs: Runs<'_>,
    progress: &dyn Progress,
) -> Result<Vec<f64>, LlmError> {
    let specs = decoder.config().weights();
    let n_layers = decoder.config().n_layers;
    let mut found = runs.finished(source.weights().len())?;
    progress.advance(found.iter().filter(|f| !f.is_nan()).count() as u64);
    let mut states: Option<Vec<Array2<f32>>> = None;
    let mut at_layer = 0;
    for (index, spec) in specs.iter().enumerate() {
        let Some(weight) = source.weight_index(&spec.name) else { continue };
        if !found[weight].is_nan() {
            continue;
        }
        let Some(other) = replacement(weight)? else { continue };
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
        runs.keep(&found, false)?;
        progress.advance(1);
    }
    runs.keep(&found, true)?;
    Ok(found)
}

/// The runs that are finished of those of one kind: a unit that grows.
struct Runs<'a> {
    name: String,
    units: &'a Units,
    kept: Instant,
    /// What keeping them took the last time.
    cost: Duration,
}

impl<'a> Runs<'a> {
    /// Keeping takes at most this share of the time: runs of a large model are kept one by one, those of a tiny one by the handful.
    const SHARE: u32 = 20;

    fn new(name: &str, units: &'a Units) -> Self {
        Self { name: name.to_owned(), units, kept: Instant::now(), cost: Duration::ZERO }
    }

    /// What was measured, NaN where nothing was yet.
    fn finished(&self, n: usize) -> Result<Vec<f64>, LlmError> {
        let mut found = vec![f64::NAN; n];
        if !self.units.load_into(&self.name, &mut [bytemuck::cast_slice_mut(&mut found)])? {
            found.fill(f64::NAN);
        }
        Ok(found)
    }

    fn keep(&mut self, found: &[f64], last: bool) -> Result<(), LlmError> {
        if last || self.kept.elapsed() >= self.cost * Self::SHARE {
            let started = Instant::now();
            self.units.store(&self.name, &[bytemuck::cast_slice(found)])?;
            self.kept = Instant::now();
            self.cost = self.kept - started;
        }
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CompressOptions, Ordering, compress, eval};

    #[test]
    fn measurements_from_kept_states_equal_those_of_whole_runs() {
        let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/");
        for name in ["llama", "qwen2"] {
            let checkpoint = Checkpoint::open(format!("{data}{name}")).unwrap();
            let options = CompressOptions {
                method: crate::BlockMethod::Avd,
                rank: Some(1),
                n_blocks: Some(3),
                samples: 2,
                seq_len: Some(16),
                ordering: Ordering::Random,
                ..Default::default()
            };
            let draft = compress(&checkpoint, None, &options, &std::env::temp_dir(), &()).unwrap().draft;
            let windows: Vec<Vec<u32>> = (0..3).map(|w| (0..20).map(|i| (w * 7 + i * i) % 96).collect()).collect();
            let windows: Vec<&[u32]> = windows.iter().map(|w| &w[..]).collect();

            let scores = block_perplexities(&draft, &windows, &()).unwrap();
            for w in 0..draft.weights().len() {
                let mut levels = vec![1; draft.weights().len()];
                levels[w] = 2;
                let model = StackModel::open(&draft, &levels, &()).unwrap().into_decoder();
                let whole = eval::perplexity(&model, &windows, &()).unwrap().perplexity;
                assert!((scores[w][1] / whole - 1.0).abs() < 1e-9, "{name} {w}: {} and {whole}", scores[w][1]);
            }
        }
    }
}
