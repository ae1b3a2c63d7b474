//! In which order blocks are loaded: what one block more, or one weight less well kept, does to the whole model.

use crate::CompressError;
use crate::stream::{Slot, Streamed, run_layer};
use crate::units::{Runs, Units};
use bitstack_engine::eval::{self, score_against, score_hidden};
use bitstack_engine::stack::{self, rebuild};
use bitstack_engine::{Decoder, EngineError, Pass};
use bitstack_format::BlockSource;
use bitstack_model::{Checkpoint, Dense, Part, Progress, WeightSpec};
use bitstack_sort::{GainPerByte, LoadOrder, Scores, Sizes, Sorter};
use ndarray::Array2;
use rayon::prelude::*;

/// How far differences between weights are believed in the orders that are tried, the first first: see [`GainPerByte::trust`].
const TRUSTS: [f64; 2] = [1.0, 0.75];

/// Sizes of the model at which they are tried, evenly spaced on a scale of logarithms.
pub(crate) const CHECKS: usize = 8;

/// A later trust has to leave less than this share of the divergence of an earlier one: differences below it are noise, and an order that is
/// as good at one size may be worse between two.
const BETTER: f64 = 0.98;

/// What the original model says on some windows, which every other is compared with.
pub(crate) struct Reference<'a> {
    checkpoint: &'a Checkpoint,
    windows: &'a [&'a [u32]],
    /// Per window, tokens x vocabulary: as much memory as a layer, and the head is not run anew for every model.
    logits: Vec<Array2<f32>>,
}

impl<'a> Reference<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, windows: &'a [&'a [u32]]) -> Result<Self, EngineError> {
        let mut model = Streamed::original(checkpoint)?;
        let finals = finals(&mut model, windows)?;
        let logits = model.with(model.decoder().config().head(), |model| {
            let each = finals.par_iter().with_max_len(1);
            each.map(|hidden| model.decoder().logits(hidden.view(), &mut Pass::new())).collect()
        })?;
        Ok(Self { checkpoint, windows, logits })
    }

    /// The scores of what the model says from these final hidden states of window `window`.
    fn score(&self, window: usize, decoder: &Decoder<Slot>, hidden: &Array2<f32>) -> Result<eval::Tally, EngineError> {
        score_against(decoder, hidden.view(), self.logits[window].view(), &self.windows[window][1..])
    }

    /// Its mean divergence, in nats per token.
    fn divergence(&self, window: usize, decoder: &Decoder<Slot>, hidden: &Array2<f32>) -> Result<f64, EngineError> {
        self.score(window, decoder, hidden).map(|scores| scores.kl / scores.tokens as f64)
    }

    /// The scores of a model on each window.
    pub(crate) fn scores_of(&self, model: &mut Streamed<'_>) -> Result<Vec<eval::Tally>, EngineError> {
        let hidden = finals(model, self.windows)?;
        model.with(model.decoder().config().head(), |model| {
            let each = (0..hidden.len()).into_par_iter().with_max_len(1);
            each.map(|i| self.score(i, model.decoder(), &hidden[i])).collect()
        })
    }

    /// Mean divergence of a model over all windows.
    fn divergence_of(&self, model: &mut Streamed<'_>) -> Result<f64, EngineError> {
        let scores = self.scores_of(model)?;
        Ok(scores.iter().map(|s| s.kl / s.tokens as f64).sum::<f64>() / scores.len() as f64)
    }
}

/// What is known of a weight when the order is made.
pub(crate) struct Curve<'a> {
    /// The squared error of its outputs at every level, per token.
    pub(crate) errors: &'a [f64],
    /// The same when it is rounded.
    pub(crate) rounded_error: f64,
    /// The divergence of the model when it alone is rounded.
    pub(crate) rounded_divergence: f64,
}

impl<'a> Curve<'a> {
    /// `errors` ends with that of the rounded weight.
    pub(crate) fn new(errors: &'a [f64], rounded_divergence: f64) -> Self {
        let (rounded_error, errors) = errors.split_last().expect("the error of the rounded weight");
        Self { errors, rounded_error: *rounded_error, rounded_divergence }
    }
}

/// Per stacked weight and level, the divergence that is predicted to be left: `curves[w][b - 1]` for level `b`.
///
/// A step from level b to b + 1 is worth a · (error at b − error at b + 1), with the sensitivity `a` (nats per unit of error) of the weight when
/// it alone is rounded ([`roundings`](crate::importance::roundings)). The step from level 1 is measured too, by layers, with the rest of the
/// model at level 1, and worth the larger of the two: errors do not add up down there, and to the first that leave level 1 a step is worth more
/// than to the last. That is a run per layer, whatever the number of blocks.
///
/// Measured on a model of 14.7 million parameters, nested codes, everything stacked: divergence at 1.99, 2.15 and 2.84 bits per weight with
/// the larger of the two .048 .044 .0093, with the first alone .056 .037 .0097, with the second alone .064 .058 .021; weight by weight, not by
/// layers. By layers it is 1 % more at 2.06 and 2.38 bits, and takes a third of the time or, with many layers, a seventh.
pub(crate) fn divergence_curves<S: BlockSource + Sync + ?Sized>(
    reference: &Reference<'_>,
    source: &S,
    curves: &[Curve<'_>],
    units: Option<&Units>,
    progress: &dyn Progress,
) -> Result<Vec<Vec<f64>>, EngineError> {
    let specs = reference.checkpoint.config().weights();
    // 0 for a weight whose error does not change.
    let per_error =
        |c: &Curve<'_>| if c.rounded_error > 0.0 { c.rounded_divergence.max(0.0) / c.rounded_error } else { 0.0 };
    let alone: Vec<f64> = curves.iter().map(per_error).collect();
    let steps = |(c, a): (&Curve<'_>, &f64)| c.errors.windows(2).map(|e| a * (e[0] - e[1])).collect();
    let mut worth: Vec<Vec<f64>> = curves.iter().zip(&alone).map(steps).collect();

    let trials = layer_by_layer(&specs, source, |w| !worth[w].is_empty());
    progress.part(Part::Sensitivity, (1 + trials.len() as u64) * tokens(reference.windows));
    progress.stage("sensitivity (runs)", trials.len() as u64);
    let mut model = at_levels(source, &vec![1; curves.len()])?;
    let base = reference.divergence_of(&mut model)?;
    let next = |place: Place| rebuild(source, place.weight, 2);
    let measure =
        |window: usize, decoder: &Decoder<Slot>, hidden: &Array2<f32>| reference.divergence(window, decoder, hidden);
    let runs = Runs::new("runs.level.001", units);
    let found = try_each(&mut model, &trials, next, reference.windows, measure, runs, progress)?;
    // What is taken from them is the shares of the layers, not their sum: a step must stay comparable with the steps above it.
    let measured: Vec<f64> = found.iter().map(|nats| (base - nats).max(0.0)).collect();
    let of_trial = |trial: &[Place]| trial.iter().map(|place| worth[place.weight][0]).sum::<f64>();
    let predicted: Vec<f64> = trials.iter().map(|trial| of_trial(trial)).collect();
    let share = predicted.iter().sum::<f64>() / measured.iter().sum::<f64>();
    for ((trial, measured), predicted) in trials.iter().zip(measured).zip(predicted) {
        let more = share * measured / predicted;
        if more.is_finite() {
            trial.iter().for_each(|place| worth[place.weight][0] *= more.max(1.0));
        }
    }
    // What is left at a level is the worth of all steps above it, and of the step to the weight itself.
    let all = worth.iter().zip(curves).zip(&alone);
    Ok(all.map(|((steps, c), a)| left(steps, a * c.errors[c.errors.len() - 1])).collect())
}

/// The load order by these curves ([`divergence_curves`]), checked and corrected: at each of [`CHECKS`] sizes, the orders that go on from
/// there by one of [`TRUSTS`] are held against each other by the divergence of the model that they lead to at the next size.
pub(crate) fn checked<S: BlockSource + Sync + ?Sized>(
    reference: &Reference<'_>,
    source: &S,
    curves: &[Vec<f64>],
    units: Option<&Units>,
    progress: &dyn Progress,
) -> Result<LoadOrder, CompressError> {
    let sizes = Sizes::new(source.base_bytes(), source.block_sizes())?;
    let by_gain = |trust| GainPerByte::new(Scores::new(curves)).trust(trust).order(&sizes);
    let orders = TRUSTS.map(by_gain).into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut runs = Runs::new("runs.checks", units);
    let mut found = runs.finished(CHECKS * TRUSTS.len())?;
    progress.stage("check (runs)", found.len() as u64);
    progress.part(Part::Check, 0);
    let (mut order, mut n_blocks) = (orders[0].clone(), orders[0].n_weights());
    for (check, budget) in check_budgets(&sizes).into_iter().enumerate() {
        let at = |trial: usize| check * TRUSTS.len() + trial;
        let tried = orders.iter().map(|rest| order.continued(n_blocks, rest, &sizes)).collect::<Result<Vec<_>, _>>()?;
        let plans = tried.iter().map(|order| order.plan(budget)).collect::<Result<Vec<_>, _>>()?;
        let mut best = 0;
        for trial in 1..tried.len() {
            for i in [best, trial] {
                if plans[best] != plans[trial] && found[at(i)].is_nan() {
                    progress.part(Part::Check, tokens(reference.windows));
                    found[at(i)] = reference.divergence_of(&mut at_levels(source, &plans[i].levels)?)?;
                    runs.keep(&found, false)?;
                }
            }
            if found[at(trial)] < BETTER * found[at(best)] {
                best = trial;
            }
        }
        (order, n_blocks) = (tried[best].clone(), plans[best].n_blocks);
        progress.advance(TRUSTS.len() as u64);
    }
    runs.keep(&found, true)?;
    Ok(order.continued(n_blocks, &orders[0], &sizes)?)
}

/// The sizes of the model at which its order is checked, in bytes: the bytes of blocks, from the smallest model to the largest, fall into as
/// many parts of equal ratio, and the sizes are in the middle of each.
pub(crate) fn check_budgets(sizes: &Sizes) -> [u64; CHECKS] {
    let blocks = |bytes: u64| (bytes - sizes.base_bytes()) as f64;
    let (least, most) = (blocks(sizes.minimum_bytes()), blocks(sizes.total_bytes()));
    std::array::from_fn(|check| {
        let ratio = (most / least).powf((check as f64 + 0.5) / CHECKS as f64);
        (sizes.base_bytes() + (least * ratio) as u64).max(sizes.minimum_bytes())
    })
}

/// A model of stacks, at these levels.
pub(crate) fn at_levels<'a, S: BlockSource + Sync + ?Sized>(
    source: &'a S,
    levels: &[u32],
) -> Result<Streamed<'a>, EngineError> {
    let levels = levels.to_vec();
    Streamed::new(stack::frame(source)?, move |_, spec| stack::weight_at(source, spec, &levels))
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
) -> Result<Vec<Vec<f64>>, CompressError> {
    Ok(perplexities(source, windows, None, progress)?)
}

/// [`block_perplexities`], going on from the runs that are finished.
pub(crate) fn perplexities<S: BlockSource + Sync + ?Sized>(
    source: &S,
    windows: &[&[u32]],
    units: Option<&Units>,
    progress: &dyn Progress,
) -> Result<Vec<Vec<f64>>, EngineError> {
    let n_blocks: Vec<u32> = source.weights().iter().map(|w| w.n_blocks() as u32).collect();
    let most = n_blocks.iter().copied().max().unwrap_or(0);
    let mut scores: Vec<Vec<f64>> = n_blocks.iter().map(|_| vec![f64::NAN]).collect();
    progress.stage("perplexity (runs)", n_blocks.iter().map(|n| u64::from(n - 1)).sum());
    for level in 1..most {
        let levels: Vec<u32> = n_blocks.iter().map(|n| level.min(*n)).collect();
        let mut model = at_levels(source, &levels)?;
        let trials = one_by_one(&model.decoder().config().weights(), source, |w| level < n_blocks[w]);
        let next = |place: Place| rebuild(source, place.weight, level + 1);
        let loss = |window: usize, decoder: &Decoder<Slot>, hidden: &Array2<f32>| {
            let scores = score_hidden(decoder, hidden.view(), None::<(&Decoder<Slot>, _)>, &windows[window][1..])?;
            Ok(scores.loss / scores.tokens as f64)
        };
        let runs = Runs::new(&format!("runs.block.{level:03}"), units);
        let found = try_each(&mut model, &trials, next, windows, loss, runs, progress)?;
        for (w, loss) in found.into_iter().enumerate().filter(|(w, _)| level < n_blocks[*w]) {
            scores[w].push(loss.exp());
        }
    }
    Ok(scores)
}

/// A stacked weight, and its index in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    index: usize,
    weight: usize,
}

/// A trial for each stacked weight, none of those that do not pass `which`.
fn one_by_one<S: BlockSource + ?Sized>(
    specs: &[WeightSpec],
    source: &S,
    which: impl Fn(usize) -> bool,
) -> Vec<Vec<Place>> {
    let mut trials = vec![Vec::new(); source.weights().len()];
    for (index, spec) in specs.iter().enumerate() {
        if let Some(weight) = source.weight_index(&spec.name).filter(|weight| which(*weight)) {
            trials[weight].push(Place { index, weight });
        }
    }
    trials
}

/// A trial for the weights of each layer, for the embedding, and for the head.
fn layer_by_layer<S: BlockSource + ?Sized>(
    specs: &[WeightSpec],
    source: &S,
    which: impl Fn(usize) -> bool,
) -> Vec<Vec<Place>> {
    let mut places = one_by_one(specs, source, which).concat();
    places.sort_unstable();
    let group = |place: &Place| {
        let spec = &specs[place.index];
        (spec.layer, spec.layer.is_none().then_some(spec.role))
    };
    places.chunk_by(|a, b| group(a) == group(b)).map(<[Place]>::to_vec).collect()
}

/// Puts in the places of each trial, which are in the same layer, or all of the embedding, or of the head, what `other` makes for them, and
/// measures the model: the mean over windows
/// of `measure(window, decoder, final hidden states)`, NaN for a trial without a place.
///
/// Only what comes after the weight is run again: the weights are gone through in forward order, and the hidden states in front of the
/// present layer kept. That saves half of the work, and changes no result. The models that differ in the same layer go through
/// the layers behind it together, so that each of those is loaded once for all of them: in memory there are the weights of one layer, or
/// the head, and for each of these models the hidden states of the windows.
fn try_each(
    model: &mut Streamed<'_>,
    trials: &[Vec<Place>],
    other: impl Fn(Place) -> Result<Dense, EngineError>,
    windows: &[&[u32]],
    measure: impl Fn(usize, &Decoder<Slot>, &Array2<f32>) -> Result<f64, EngineError> + Sync,
    mut runs: Runs<'_>,
    progress: &dyn Progress,
) -> Result<Vec<f64>, EngineError> {
    let config = model.decoder().config();
    let (specs, n_layers, head) = (config.weights(), config.n_layers(), model.decoder().config().head());
    let mut found = runs.finished(trials.len())?;
    progress.advance(found.iter().filter(|f| !f.is_nan()).count() as u64);
    // What is to be measured, in forward order.
    let open = trials.iter().enumerate().filter(|(trial, places)| found[*trial].is_nan() && !places.is_empty());
    let mut trials: Vec<(&[Place], usize)> = open.map(|(trial, places)| (&places[..], trial)).collect();
    trials.sort_unstable();
    if trials.is_empty() {
        return Ok(found);
    }
    let inputs = inputs(windows);
    let (mut front, mut at) = (model.embed(&inputs)?, 0);
    // Embedding, each layer, head.
    let embedding = model.decoder().config().embedding();
    let at_of = |places: &[Place]| (!embedding.contains(&places[0].index), specs[places[0].index].layer);
    for group in trials.chunk_by(|a, b| at_of(a.0) == at_of(b.0)) {
        // Of every trial, the windows.
        let mut hidden: Vec<Array2<f32>> = Vec::with_capacity(group.len() * windows.len());
        match at_of(group[0].0) {
            (false, _) => {
                model.with(embedding.clone(), |model| {
                    for &(places, _) in group {
                        let own = exchange(model, places, &other)?;
                        let embedded = inputs.iter().map(|w| model.decoder().embed(w));
                        hidden.extend(embedded.collect::<Result<Vec<_>, _>>()?);
                        put_back(model, places, own)?;
                    }
                    Ok(())
                })?;
                model.run(0..n_layers, &mut hidden)?;
            }
            (true, Some(layer)) => {
                model.run(at..layer, &mut front)?;
                model.with(model.layer_weights(layer), |model| {
                    for &(places, _) in group {
                        let own = exchange(model, places, &other)?;
                        let first = hidden.len();
                        hidden.extend_from_slice(&front);
                        run_layer(model.decoder(), layer, &mut hidden[first..])?;
                        put_back(model, places, own)?;
                    }
                    run_layer(model.decoder(), layer, &mut front)
                })?;
                at = layer + 1;
                model.run(at..n_layers, &mut hidden)?;
            }
            (true, None) => {
                model.run(at..n_layers, &mut front)?;
                at = n_layers;
                group.iter().for_each(|_| hidden.extend_from_slice(&front));
            }
        }
        model.with(head.clone(), |model| {
            for (&(places, trial), hidden) in group.iter().zip(hidden.chunks(windows.len())) {
                let in_head = if head.contains(&places[0].index) { places } else { &[] };
                let own = exchange(model, in_head, &other)?;
                let decoder = model.decoder();
                let values =
                    hidden.par_iter().enumerate().with_max_len(1).map(|(i, hidden)| measure(i, decoder, hidden));
                let values = values.collect::<Result<Vec<f64>, EngineError>>()?;
                found[trial] = values.iter().sum::<f64>() / values.len() as f64;
                put_back(model, in_head, own)?;
                progress.advance(1);
            }
            Ok(())
        })?;
        runs.keep(&found, false)?;
    }
    runs.keep(&found, true)?;
    Ok(found)
}

/// Puts in the places of a trial what `other` makes for them; what was there.
fn exchange(
    model: &mut Streamed<'_>,
    places: &[Place],
    other: impl Fn(Place) -> Result<Dense, EngineError>,
) -> Result<Vec<Option<Dense>>, EngineError> {
    places.iter().map(|place| model.put(place.index, Some(other(*place)?))).collect()
}

fn put_back(model: &mut Streamed<'_>, places: &[Place], own: Vec<Option<Dense>>) -> Result<(), EngineError> {
    places.iter().zip(own).try_for_each(|(place, own)| model.put(place.index, own).map(drop))
}

/// The tokens of windows that are run.
fn tokens(windows: &[&[u32]]) -> u64 {
    inputs(windows).iter().map(|w| w.len() as u64).sum()
}

/// The windows without their last tokens, which predict nothing.
fn inputs<'w>(windows: &[&'w [u32]]) -> Vec<&'w [u32]> {
    windows.iter().map(|w| &w[..w.len() - 1]).collect()
}

/// The final hidden states of the windows.
fn finals(model: &mut Streamed<'_>, windows: &[&[u32]]) -> Result<Vec<Array2<f32>>, EngineError> {
    let mut hidden = model.embed(&inputs(windows))?;
    model.run(0..model.decoder().config().n_layers(), &mut hidden)?;
    Ok(hidden)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{checkpoint, with_large_vocabulary};
    use crate::{BlockMethod, CompressOptions, OrderBy, compress};
    use bitstack_engine::stack::StackModel;
    use bitstack_format::Draft;

    /// A model of the tests, three blocks of each of its weights, and windows of text for it.
    fn small(name: &str) -> (Checkpoint, Draft, Vec<Vec<u32>>) {
        let checkpoint = checkpoint(name);
        let options = CompressOptions {
            method: BlockMethod::Avd,
            rank: Some(1),
            n_blocks: Some(3),
            samples: 2,
            seq_len: Some(16),
            ordering: OrderBy::Random,
            ..Default::default()
        };
        let draft = compress(&checkpoint, None, &options, &std::env::temp_dir(), &()).unwrap().draft;
        (checkpoint, draft, (0..3).map(|w| (0..20).map(|i| (w * 7 + i * i) % 96).collect()).collect())
    }

    #[test]
    fn an_order_is_checked_by_what_the_model_says() {
        let (checkpoint, draft, windows) = small("llama");
        let windows: Vec<&[u32]> = windows[..2].iter().map(|w| &w[..]).collect();
        let reference = Reference::new(&checkpoint, &windows).unwrap();
        let sizes = Sizes::new(draft.base_bytes(), draft.block_sizes()).unwrap();
        let nats = |levels: &[u32]| reference.divergence_of(&mut at_levels(&draft, levels).unwrap()).unwrap();
        let mut picked = [0; TRUSTS.len()];
        for seed in 0..3 {
            // Predictions that have nothing to do with the model: each of the trusts is the better one at times.
            let gain = |w: usize| 1.5f64.powi((w as i32 * 7 + seed * 5) % 11);
            let curve = |w: usize| [1.0, 0.5, 0.3].map(|x| x * gain(w)).to_vec();
            let curves: Vec<Vec<f64>> = (0..sizes.n_weights()).map(curve).collect();
            let order = checked(&reference, &draft, &curves, None, &()).unwrap();
            let mut n_blocks = sizes.n_weights();
            for budget in check_budgets(&sizes) {
                // What either trust would have led to from the check before.
                let levels = TRUSTS.map(|trust| {
                    let rest = GainPerByte::new(Scores::new(&curves)).trust(trust).order(&sizes).unwrap();
                    order.continued(n_blocks, &rest, &sizes).unwrap().plan(budget).unwrap().levels
                });
                let mut best = 0;
                if levels[0] != levels[1] {
                    best = usize::from(nats(&levels[1]) < BETTER * nats(&levels[0]));
                    picked[best] += 1;
                }
                n_blocks = levels[best].iter().sum::<u32>() as usize;
                assert_eq!(order.plan_of_len(n_blocks).unwrap().levels, levels[best]);
            }
        }
        assert!(picked.iter().all(|n| *n > 0), "{picked:?}");
    }

    #[test]
    fn weights_of_a_layer_are_tried_together_and_all_others_alone() {
        for name in ["llama", "qwen2"] {
            let (checkpoint, draft, windows) = small(name);
            let windows: Vec<&[u32]> = windows.iter().map(|w| &w[..]).collect();
            let reference = Reference::new(&checkpoint, &windows).unwrap();
            let specs = checkpoint.config().weights();
            let trials = layer_by_layer(&specs, &draft, |_| true);
            assert_eq!(trials.len(), checkpoint.config().n_layers() + 2 - usize::from(checkpoint.config().tied));
            assert_eq!(trials.concat().len(), draft.weights().len());

            let n = draft.weights().len();
            let next = |place: Place| rebuild(&draft, place.weight, 2);
            let measure = |window: usize, decoder: &Decoder<Slot>, hidden: &Array2<f32>| {
                reference.divergence(window, decoder, hidden)
            };
            let mut model = at_levels(&draft, &vec![1; n]).unwrap();
            let found = try_each(&mut model, &trials, next, &windows, measure, Runs::new("runs", None), &()).unwrap();
            for (trial, found) in trials.iter().zip(found) {
                let mut levels = vec![1; n];
                trial.iter().for_each(|place| levels[place.weight] = 2);
                let whole = reference.divergence_of(&mut at_levels(&draft, &levels).unwrap()).unwrap();
                assert!((found / whole - 1.0).abs() < 1e-9, "{name} {trial:?}: {found} and {whole}");
            }
        }
    }

    #[test]
    fn parts_of_a_vocabulary_are_tried_alone_and_together() {
        for name in ["llama", "llama31"] {
            let (_dir, checkpoint) = with_large_vocabulary(name);
            let checkpoint = checkpoint.with_cut_vocabulary();
            let options = CompressOptions {
                n_blocks: Some(2),
                samples: 1,
                seq_len: Some(16),
                ordering: OrderBy::Random,
                ..Default::default()
            };
            let draft = compress(&checkpoint, None, &options, &std::env::temp_dir(), &()).unwrap().draft;
            let tokens: Vec<Vec<u32>> = (0..2).map(|w| (0..12).map(|i| (w * 7 + i * 431) % 5000).collect()).collect();
            let windows: Vec<&[u32]> = tokens.iter().map(|w| &w[..]).collect();
            let reference = Reference::new(&checkpoint, &windows).unwrap();
            let specs = checkpoint.config().weights();
            let is_part = |w: usize| draft.weights()[w].name.contains(".rows.");
            for trials in [one_by_one(&specs, &draft, is_part), layer_by_layer(&specs, &draft, is_part)] {
                let n = draft.weights().len();
                let next = |place: Place| rebuild(&draft, place.weight, 2);
                let measure = |window: usize, decoder: &Decoder<Slot>, hidden: &Array2<f32>| {
                    reference.divergence(window, decoder, hidden)
                };
                let mut model = at_levels(&draft, &vec![1; n]).unwrap();
                let runs = Runs::new("runs", None);
                let found = try_each(&mut model, &trials, next, &windows, measure, runs, &()).unwrap();
                let tried: Vec<_> = trials.iter().zip(found).filter(|(trial, _)| !trial.is_empty()).collect();
                assert!(
                    tried.iter().map(|(trial, _)| trial.len()).sum::<usize>() == if name == "llama" { 6 } else { 3 }
                );
                for (trial, found) in tried {
                    let mut levels = vec![1; n];
                    trial.iter().for_each(|place| levels[place.weight] = 2);
                    let whole = reference.divergence_of(&mut at_levels(&draft, &levels).unwrap()).unwrap();
                    assert!((found / whole - 1.0).abs() < 1e-9, "{name} {trial:?}: {found} and {whole}");
                }
            }
        }
    }

    #[test]
    fn measurements_from_kept_states_equal_those_of_whole_runs() {
        for name in ["llama", "qwen2"] {
            let (_, draft, windows) = small(name);
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
