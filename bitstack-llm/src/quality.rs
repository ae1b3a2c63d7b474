//! How good a stack is at its sizes: measured when its order is made, and kept in its file.

use crate::eval::{Metrics, WithReference};
use crate::order::{CHECKS, Curve, Reference, at_levels, check_budgets};
use crate::units::Runs;
use crate::{Checkpoint, LlmError, Part, Progress};
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
    mut runs: Runs<'_>,
    progress: &dyn Progress,
) -> Result<Quality, LlmError> {
    let plans = plans(order, &Sizes::new(source.base_bytes(), source.block_sizes())?)?;
    // Of each size, divergence and agreement.
    let mut found = runs.finished(2 * plans.len())?;
    progress.part(Part::Quality, 0);
    progress.stage("quality (sizes)", plans.len() as u64);
    let open: Vec<usize> = (0..plans.len()).filter(|i| found[2 * i].is_nan()).collect();
    progress.advance((plans.len() - open.len()) as u64);
    if !open.is_empty() {
        let reference = Reference::new(checkpoint, windows)?;
        for i in open {
            progress.part(Part::Quality, windows.iter().map(|w| w.len() as u64).sum());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stack::StackModel;
    use crate::{CompressOptions, Compressed, Decoder, OrderBy, compress, eval};
    use bitstack_core::Shape;
    use bitstack_format::Draft;

    fn curve(sizes: &[(u64, f64, f64)]) -> Quality {
        let size = |&(resident_bytes, kl, top1): &(u64, f64, f64)| SizeQuality { resident_bytes, kl, top1 };
        Quality { tokens: 100, sizes: sizes.iter().map(size).collect(), costliest: Vec::new() }
    }

    #[test]
    fn between_two_sizes_a_divergence_falls_as_errors_do_with_each_bit() {
        // 1000 bytes are a bit of each weight: a quarter of the divergence, half of the disagreement.
        let kl = |bytes: u64| 8.0 * 0.25f64.powf(bytes as f64 / 1000.0);
        let top1 = |bytes: u64| 1.0 - 0.5f64.powf(bytes as f64 / 1000.0);
        let measured = [1000, 1700, 2900, 8000].map(|bytes| (bytes, kl(bytes), top1(bytes)));
        let quality = curve(&measured);
        for bytes in (1000..=8000).step_by(100) {
            let e = quality.at(bytes).unwrap();
            assert!((e.kl / kl(bytes) - 1.0).abs() < 1e-12 && (e.top1 - top1(bytes)).abs() < 1e-12, "{bytes}: {e:?}");
            assert_eq!(e.is_interpolated, !measured.iter().any(|m| m.0 == bytes));
            assert_eq!(e.is_noise(), bytes < 1500, "8 / 4^1.5 is 1");
        }
        assert_eq!((quality.at(999), quality.at(8001)), (None, None));
    }

    #[test]
    fn sizes_without_a_logarithm_are_no_obstacle() {
        let quality = curve(&[(10, f64::INFINITY, 0.0), (20, 0.5, 0.9), (30, 0.0, 1.0), (40, f64::INFINITY, 1.0)]);
        let at = |bytes| quality.at(bytes).unwrap();
        assert_eq!((at(15).kl, at(25).kl, at(35).kl), (f64::INFINITY, 0.25, f64::INFINITY));
        assert!(at(15).is_noise() && (0.0..=1.0).contains(&at(15).top1) && (at(25).top1 - 0.95).abs() < 1e-12);
    }

    /// A stack of one weight that says this of itself.
    fn saying(text: &str) -> Draft {
        let mut draft = Draft::create_on(Vec::new(), "memory");
        draft.push_base("norm", bitstack_format::Dtype::F32, &[4], &[0; 16]).unwrap();
        draft.add_weight("w", Shape::new(3, 9).unwrap(), 1, "avd").unwrap();
        draft.set_provenance(PROVENANCE_KEY, text).unwrap();
        draft
    }

    #[test]
    fn a_curve_is_read_as_it_was_written() {
        let mut quality =
            curve(&[(16, f64::INFINITY, 0.0), (17, digits(1.0 / 3.0), digits(2.0 / 3.0)), (99, 0.0, 1.0)]);
        quality.costliest = vec![Costly { weight: 0, share: digits(1.0 / 7.0) }];
        let text = quality.to_json();
        assert!(text.contains(r#"{"resident_bytes":17,"kl":0.333333,"top1":0.666667}"#), "{text}");
        assert_eq!(Quality::of(&saying(&text)), Some(quality.clone()));
        // Fields that a later version may add.
        let more = text.replace("{\"tokens\"", "{\"text\":[{}],\"tokens\"");
        assert_eq!(Quality::of(&saying(&more)), Some(quality));
    }

    #[test]
    fn a_curve_that_breaks_a_rule_is_as_good_as_none() {
        assert_eq!(Quality::of(&Draft::create_on(Vec::new(), "memory")), None);
        let good = r#"{"tokens":9,"sizes":[{"resident_bytes":20,"kl":0.5,"top1":0.9},{"resident_bytes":30,"kl":null,"top1":1}],"costliest":[{"weight":0,"share":1}]}"#;
        assert!(Quality::of(&saying(good)).is_some());
        for end in 0..good.len() {
            assert_eq!(Quality::of(&saying(&good[..end])), None, "{}", &good[..end]);
        }
        let size = r#"{"resident_bytes":20,"kl":0.5,"top1":0.9}"#;
        let many = |n: usize| (20..20 + n).map(|i| size.replace("20", &i.to_string())).collect::<Vec<_>>().join(",");
        let claim = |sizes: String| format!(r#"{{"tokens":9,"sizes":[{sizes}],"costliest":[]}}"#);
        assert!(Quality::of(&saying(&claim(many(MOST)))).is_some());
        assert_eq!(Quality::of(&saying(&claim(many(MOST + 1)))), None);
        assert_eq!(Quality::of(&saying(&claim(String::new()))), None);
        for (from, to) in [
            ("\"tokens\":9", "\"tokens\":0"),
            ("\"tokens\":9", "\"tokens\":-1"),
            ("\"tokens\":9,", ""),
            ("\"tokens\":9", "\"tokens\":9,\"tokens\":9"),
            (":20", ":15"), // less than what is always resident
            (":20", ":30"),
            (":20", ":20.5"),
            (":30", ":18446744073709551616"),
            ("0.5", "-0.5"),
            ("0.5", "1e999"),
            ("0.5", "NaN"),
            ("0.5", "\"0.5\""),
            ("\"kl\":0.5,", ""),
            ("0.9", "1.1"),
            ("0.9", "-0.1"),
            ("0.9", "null"),
            ("\"weight\":0", "\"weight\":1"),
            ("\"weight\":0", "\"weight\":99999999999999999999"),
            ("\"share\":1", "\"share\":2"),
            ("\"sizes\":[", "\"sizes\":[["),
            ("{\"tokens\"", "[{\"tokens\""),
        ] {
            assert!(good.contains(from));
            assert_eq!(Quality::of(&saying(&good.replacen(from, to, 1))), None, "{from} as {to}");
        }
        assert_eq!(Quality::of(&saying(&"[".repeat(1 << 20))), None);
        assert_eq!(Quality::of(&saying("\u{1b}[2J")), None);
    }

    #[test]
    fn measuring_reads_a_share_of_the_tokens_of_calibration_on_windows_of_its_own() {
        let text: Vec<u32> = (0..16 * 512).collect();
        let validation: Vec<&[u32]> = text.chunks(512).collect();
        let found = windows(&validation, 2, 64 * 512);
        assert_eq!(found.iter().map(|w| w[0] / 512).collect::<Vec<_>>(), [2, 5, 9, 12]);
        let n_predicted: usize = found.iter().map(|w| w.len() - 1).sum();
        // Ten sizes and the original.
        let most = 64 * 512 / SHARE;
        assert!(11 * n_predicted <= most && 11 * (n_predicted + 4) > most, "{n_predicted}");
        // Short texts: what there is.
        assert!(windows(&validation, 2, 100).iter().all(|w| w.len() == LEAST_TOKENS + 1));
        assert_eq!(windows(&validation[..3], 2, 64 * 512).len(), 1);
        assert_eq!(windows(&validation[..2], 2, 64 * 512).len(), 2);
        assert_eq!(windows(&[&text[..2]], 2, 64 * 512), [&text[..2]]);
    }

    #[test]
    fn the_costliest_weights_are_those_with_most_divergence_per_error_times_error() {
        // Errors at levels 1 and 2, and of the rounded weight.
        let errors = [vec![9.0, 1.0, 2.0], vec![9.0, 4.0, 2.0], vec![9.0, 3.0, 1.0], vec![0.0, 0.0, 0.0]];
        assert_eq!(costs(&errors, &[]), [0.5, 2.0, 3.0, 0.0]);
        let known = costs(&errors, &[8.0, 2.0, -1e-9, 1.0]);
        assert_eq!(known, [4.0, 4.0, 0.0, 0.0]);
        let named = costliest(&[1.0, 4.0, 2.0, 4.0, 5.0]);
        let named: Vec<(usize, f64)> = named.iter().map(|c| (c.weight, c.share)).collect();
        assert_eq!(named, [(4, 0.3125), (1, 0.25), (3, 0.25)]);
        assert!(costliest(&[0.0, 0.0]).is_empty() && costliest(&[f64::INFINITY]).is_empty());
    }

    fn checkpoint() -> Checkpoint {
        Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/llama")).unwrap()
    }

    fn small(ordering: OrderBy) -> Compressed {
        let options =
            CompressOptions { n_blocks: Some(6), samples: 8, seq_len: Some(32), ordering, ..Default::default() };
        compress(&checkpoint(), None, &options, &std::env::temp_dir(), &()).unwrap()
    }

    #[test]
    fn what_is_measured_is_what_an_evaluation_finds() {
        let (checkpoint, Compressed { draft, order }) = (checkpoint(), small(OrderBy::Random));
        let tokens: Vec<Vec<u32>> = (0..3).map(|w| (0..30).map(|i| (w * 17 + i * i * 5 + 3) % 96).collect()).collect();
        let windows: Vec<&[u32]> = tokens.iter().map(|w| &w[..]).collect();
        let costs = vec![1.0; order.n_weights()];
        let quality =
            measure(&checkpoint, &draft, &order, &windows, &costs, Runs::new("runs.quality", None), &()).unwrap();
        assert_eq!(quality.tokens, 3 * 29);
        assert_eq!(quality.sizes[0].resident_bytes, order.minimum_bytes());
        assert_eq!(quality.whole().resident_bytes, order.total_bytes());
        assert_eq!(quality.sizes.len(), CHECKS + 2);

        let original = Decoder::load(&checkpoint).unwrap();
        let evaluate = |bytes: u64| {
            let model = StackModel::open(&draft, &order.plan(bytes).unwrap().levels, &()).unwrap();
            let metrics = eval::compare(model.decoder(), &original, &windows, &()).unwrap();
            (metrics.kl.unwrap().mean, metrics.top1.unwrap().mean)
        };
        for size in &quality.sizes {
            let (kl, top1) = evaluate(size.resident_bytes);
            // Six digits, and the numerics of the logits.
            assert!(
                (size.kl - kl).abs() < 1e-5 * kl + 1e-6 && (size.top1 - top1).abs() < 1e-5,
                "{size:?}: {kl} {top1}"
            );
        }
        // Between two sizes, what is expected is what is found but for what single blocks do: within a factor of 1.5 here.
        for pair in quality.sizes.windows(2) {
            let middle = order.plan((pair[0].resident_bytes + pair[1].resident_bytes) / 2).unwrap().resident_bytes;
            let (expected, (kl, _)) = (quality.at(middle).unwrap().kl, evaluate(middle));
            assert!((expected / kl).ln().abs() < 1.5f64.ln(), "{middle}: {expected} for {kl}");
        }
    }

    #[test]
    fn every_order_comes_with_its_curve_and_a_truncated_file_keeps_it() {
        for ordering in [OrderBy::Gain, OrderBy::Perplexity, OrderBy::Random] {
            let Compressed { draft, order } = small(ordering);
            let quality = Quality::of(&draft).unwrap();
            assert_eq!(quality.whole().resident_bytes, order.total_bytes());
            assert_eq!(quality.costliest.len(), NAMED);
            // Random weights: six blocks leave far less than one.
            assert!(quality.whole().kl < quality.sizes[0].kl / 10.0, "{ordering:?}: {quality:?}");

            let mut bytes = Vec::new();
            draft.finish(order.weights(), &mut bytes, &mut |_, _| {}).unwrap();
            let file = bitstack_format::StackFile::open(bytes).unwrap();
            let mut bytes = Vec::new();
            file.write_prefix(order.n_blocks() / 2, &mut bytes, &mut |_, _| {}).unwrap();
            let half = bitstack_format::StackFile::open(bytes).unwrap();
            assert_eq!(Quality::of(&half), Some(quality.clone()));
            let e = quality.at(order.cumulative_bytes()[order.n_blocks() / 2]).unwrap();
            assert!(e.kl > quality.whole().kl && e.kl < quality.sizes[0].kl);
        }
    }

    #[test]
    fn a_model_of_one_size_has_a_curve_of_one_point() {
        let options = CompressOptions {
            n_blocks: Some(1),
            samples: 1,
            seq_len: Some(16),
            ordering: OrderBy::Random,
            ..Default::default()
        };
        let Compressed { draft, order } = compress(&checkpoint(), None, &options, &std::env::temp_dir(), &()).unwrap();
        let quality = Quality::of(&draft).unwrap();
        assert_eq!(quality.sizes.len(), 1);
        assert!(!quality.at(order.total_bytes()).unwrap().is_interpolated);
        assert_eq!((quality.at(order.total_bytes() - 1), quality.at(order.total_bytes() + 1)), (None, None));
        assert!(quality.is_far());
    }
}
