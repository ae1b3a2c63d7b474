//! How good a stack is at its sizes: measured at last, against the model.

use crate::CompressError;
use crate::order::{CHECKS, Curve, Reference, at_levels, check_budgets};
use crate::units::Runs;
use bitstack_engine::eval::{Metrics, WithReference};
use bitstack_engine::quality::{Costly, Quality, SizeQuality};
use bitstack_format::BlockSource;
use bitstack_model::{Checkpoint, Part, Progress};
use bitstack_sort::{LoadOrder, Plan, Sizes, SortError};

/// Windows of text on which stacks are measured.
const WINDOWS: usize = 4;

/// All sizes together, and the original, are measured on the tokens of calibration over this: about a twentieth of the time of a
/// compression, since calibration also makes Gram matrices, and the runs for the order read as many tokens again.
const SHARE: usize = 4;

/// The fewest tokens of a window, where it has so many.
const LEAST_TOKENS: usize = 64;

/// Weights that are named for what they cost.
const NAMED: usize = 3;

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
) -> Result<Quality, CompressError> {
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
    use crate::fixtures;
    use crate::{CompressOptions, Compressed, OrderBy, compress};
    use bitstack_engine::stack::StackModel;
    use bitstack_engine::{Decoder, eval};

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

    fn small(ordering: OrderBy) -> Compressed {
        let options =
            CompressOptions { n_blocks: Some(6), samples: 8, seq_len: Some(32), ordering, ..Default::default() };
        compress(&fixtures::checkpoint("llama"), None, &options, &std::env::temp_dir(), &()).unwrap()
    }

    #[test]
    fn what_is_measured_is_what_an_evaluation_finds() {
        let (checkpoint, Compressed { draft, order }) = (fixtures::checkpoint("llama"), small(OrderBy::Random));
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
        let Compressed { draft, order } =
            compress(&fixtures::checkpoint("llama"), None, &options, &std::env::temp_dir(), &()).unwrap();
        let quality = Quality::of(&draft).unwrap();
        assert_eq!(quality.sizes.len(), 1);
        assert!(!quality.at(order.total_bytes()).unwrap().is_interpolated);
        assert_eq!((quality.at(order.total_bytes() - 1), quality.at(order.total_bytes() + 1)), (None, None));
        assert!(quality.is_far());
    }
}
