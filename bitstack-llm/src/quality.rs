//! How good a stack is at its sizes: measured when its order is made, and kept in its file.

use crate::eval::{Metrics, WithReference};
use crate::journal::Units;
use crate::order::{CHECKS, Curve, Reference, Runs, at_levels, check_budgets};
use crate::{Checkpoint, LlmError, Progress};
use bitstack_format::BlockSource;
use bitstack_sort::{LoadOrder, Plan, Sizes, SortError};
use serde::{Deserialize, Deserializer, Serialize};

/// The provenance key under which a file keeps its [`Quality`], in the form that FORMAT.md describes.
pub const PROVENANCE_KEY: &str = "quality";

/// A whole file that diverges more than this from its original has lost something, in nats per token. Good formats of 8 bits leave .001 to
/// .002, and of 5 bits .01 to .03: a file with all its blocks that is no better has bytes that do nothing.
pub const FAR_KL: f64 = 0.02;

/// From this divergence on, in nats per token, what a model says is noise: on average it gives what the original says next less than 1/e of the
/// likelihood.
pub const NOISE_KL: f64 = 1.0;

/// Windows of text on which stacks are measured.
const WINDOWS: usize = 4;

/// All sizes together, and the original, are measured on the tokens of calibration over this: about a twentieth of the time of a
/// compression, since calibration also makes Gram matrices, and the runs for the order read as many tokens again.
const SHARE: usize = 4;

/// The fewest tokens of a window, where it has so many.
const LEAST_TOKENS: usize = 64;

/// Weights that are named for what they cost.
const NAMED: usize = 3;

/// The most that a file may claim: of sizes, and of weights that are named.
const MOST: usize = 1024;

/// How good a stack is, from its smallest size to the largest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Quality {
    /// Predicted tokens that each size was measured on.
    pub tokens: u64,
    /// The sizes, rising; at least one. Those of a file that was truncated may go beyond its end.
    pub sizes: Vec<SizeQuality>,
    /// The weights that cost most when all blocks are loaded, the costliest first.
    pub costliest: Vec<Costly>,
}

/// What was measured at a size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SizeQuality {
    /// Bytes of the tensors loaded.
    pub resident_bytes: u64,
    /// KL(original ‖ stack), nats per token, to 6 digits; infinite where what came out was no number.
    #[serde(deserialize_with = "null_is_infinite")]
    pub kl: f64,
    /// Fraction of tokens for which both find the same token most likely.
    pub top1: f64,
}

/// A weight and what its last error costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Costly {
    /// Its index among the stacked weights.
    pub weight: usize,
    /// Its share of what all weights are predicted to cost, at most 1: in divergence where single weights were measured for it, else in error of their
    /// outputs relative to that of a rounded weight.
    pub share: f64,
}

/// What is to be expected at a size.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Expected {
    /// As [`SizeQuality::kl`].
    pub kl: f64,
    /// As [`SizeQuality::top1`].
    pub top1: f64,
    /// Whether this size was not measured, but one below and one above.
    pub is_interpolated: bool,
}

impl Expected {
    /// Whether the model is noise at this size: see [`NOISE_KL`].
    pub fn is_noise(&self) -> bool {
        self.kl > NOISE_KL
    }
}

impl Quality {
    /// What a stack says of itself. `None` where it says nothing, or breaks a rule of FORMAT.md: a stack is as usable without.
    pub fn of<S: BlockSource + ?Sized>(source: &S) -> Option<Self> {
        let quality: Self = serde_json::from_str(source.provenance().get(PROVENANCE_KEY)?).ok()?;
        let Self { tokens, sizes, costliest } = &quality;
        let is_share = |x: f64| (0.0..=1.0).contains(&x);
        let is_sound = *tokens > 0
            && (1..=MOST).contains(&sizes.len())
            && costliest.len() <= MOST
            && sizes[0].resident_bytes >= source.base_bytes()
            && sizes.is_sorted_by(|a, b| a.resident_bytes < b.resident_bytes)
            && sizes.iter().all(|s| s.kl >= 0.0 && is_share(s.top1))
            && costliest.iter().all(|c| c.weight < source.weights().len() && is_share(c.share));
        is_sound.then_some(quality)
    }

    /// The largest size that was measured.
    pub fn whole(&self) -> &SizeQuality {
        self.sizes.last().expect("there is at least one size")
    }

    /// Whether the stack is far from its original with all blocks loaded: see [`FAR_KL`].
    pub fn is_far(&self) -> bool {
        self.whole().kl > FAR_KL
    }

    /// What is to be expected of a plan of so many bytes; `None` below the smallest size that was measured and above the largest.
    ///
    /// Between two sizes the logarithms of the divergence and of the disagreement are taken to be linear in bytes: each further bit
    /// of the weights quarters their squared errors.
    pub fn at(&self, resident_bytes: u64) -> Option<Expected> {
        let above = self.sizes.partition_point(|s| s.resident_bytes < resident_bytes);
        let high = self.sizes.get(above)?;
        if high.resident_bytes == resident_bytes {
            return Some(Expected { kl: high.kl, top1: high.top1, is_interpolated: false });
        }
        let low = &self.sizes[above.checked_sub(1)?];
        let share = (resident_bytes - low.resident_bytes) as f64 / (high.resident_bytes - low.resident_bytes) as f64;
        Some(Expected {
            kl: between(low.kl, high.kl, share),
            top1: 1.0 - between(1.0 - low.top1, 1.0 - high.top1, share),
            is_interpolated: true,
        })
    }

    /// The form that files keep.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers have a JSON form")
    }
}

/// Infinity has no JSON form of its own.
fn null_is_infinite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// On a straight line from `a` to `b`, both at least 0: of logarithms, where there are any.
fn between(a: f64, b: f64, share: f64) -> f64 {
    if a > 0.0 && b > 0.0 { a.powf(1.0 - share) * b.powf(share) } else { a * (1.0 - share) + b * share }
}

/// The beginnings of the windows that stacks are measured on: of a text, where it is long enough, other windows than the first `n_used`.
pub(crate) fn windows<'w>(validation: &[&'w [u32]], n_used: usize, calibration: usize) -> Vec<&'w [u32]> {
    let rest = validation.get(n_used..).filter(|rest| !rest.is_empty()).unwrap_or(validation);
    let n = WINDOWS.min(rest.len());
    // The smallest size, those at which orders are checked, the largest, and the original.
    let n_runs = CHECKS + 3;
    let most = (calibration / SHARE / (n_runs * WINDOWS)).max(LEAST_TOKENS) + 1;
    (0..n).map(|i| rest[i * rest.len() / n]).map(|w| &w[..w.len().min(most)]).collect()
}

/// What the error that is left of each weight with all its blocks is predicted to cost. Where no divergences of rounded weights were measured all
/// are taken for equal.
pub(crate) fn costs(errors: &[Vec<f64>], roundings: &[f64]) -> Vec<f64> {
    let cost = |(weight, errors): (usize, &Vec<f64>)| {
        let curve = Curve::new(errors, roundings.get(weight).copied().unwrap_or(1.0));
        let last = curve.errors.last().copied().unwrap_or(0.0);
        // 0 for a weight of zeros.
        if curve.rounded_error > 0.0 { curve.rounded_divergence.max(0.0) * last / curve.rounded_error } else { 0.0 }
    };
    errors.iter().enumerate().map(cost).collect()
}

/// The largest of these.
fn costliest(costs: &[f64]) -> Vec<Costly> {
    let sum: f64 = costs.iter().sum();
    if !(sum > 0.0 && sum.is_finite()) {
        return Vec::new();
    }
    let mut all: Vec<Costly> =
        costs.iter().enumerate().map(|(weight, cost)| Costly { weight, share: digits(cost / sum) }).collect();
    all.sort_by(|a, b| b.share.total_cmp(&a.share));
    all.truncate(NAMED);
    all
}

/// The plans at which a stack is measured, each once: smallest, as at its order's checks, largest.
fn plans(order: &LoadOrder, sizes: &Sizes) -> Result<Vec<Plan>, SortError> {
    let budgets = [order.minimum_bytes()].into_iter().chain(check_budgets(sizes)).chain([order.total_bytes()]);
    let mut plans = budgets.map(|budget| order.plan(budget)).collect::<Result<Vec<_>, _>>()?;
    plans.dedup();
    Ok(plans)
}

/// Measures a stack in its order against the original, on these windows, all of one length. In memory are the weights of one layer, or two heads.
pub(crate) fn measure<S: BlockSource + Sync + ?Sized>(
    checkpoint: &Checkpoint,
    source: &S,
    order: &LoadOrder,
    windows: &[&[u32]],
    costs: &[f64],
    units: &Units,
    progress: &dyn Progress,
) -> Result<Quality, LlmError> {
    let plans = plans(order, &Sizes::new(source.base_bytes(), source.block_sizes())?)?;
    let mut runs = Runs::new("runs.quality", units);
    // Of each size, divergence and agreement.
    let mut found = runs.finished(2 * plans.len())?;
    progress.stage("quality (sizes)", plans.len() as u64);
    let open: Vec<usize> = (0..plans.len()).filter(|i| found[2 * i].is_nan()).collect();
    progress.advance((plans.len() - open.len()) as u64);
    if !open.is_empty() {
        let reference = Reference::new(checkpoint, windows)?;
        for i in open {
            let scores = reference.scores_of(&mut at_levels(source, &plans[i].levels)?)?;
            let metrics = Metrics::of(&scores, WithReference::Yes)?;
            let (kl, top1) = metrics.kl.zip(metrics.top1).expect("there is a reference");
            // Rounding may leave a little less than nothing.
            found[2 * i] = if kl.mean.is_finite() { digits(kl.mean.max(0.0)) } else { f64::INFINITY };
            found[2 * i + 1] = digits(top1.mean);
            runs.keep(&found, false)?;
            progress.advance(1);
        }
        runs.keep(&found, true)?;
    }
    let sizes = plans.iter().zip(found.as_chunks::<2>().0);
    let sizes = sizes.map(|(plan, &[kl, top1])| SizeQuality { resident_bytes: plan.resident_bytes, kl, top1 });
    let tokens = windows.iter().map(|w| w.len() as u64 - 1).sum();
    Ok(Quality { tokens, sizes: sizes.collect(), costliest: costliest(costs) })
}

/// To 6 digits, which is more than a sample of text tells, and is read back as it was written.
fn digits(x: f64) -> f64 {
    format!("{x:.5e}").parse().expect("a number that was just written")
}
