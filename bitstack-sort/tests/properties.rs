//! What every order and every plan promises, on random sizes and scores, and gain per byte against brute force.

use bitstack_sort::{Balanced, BlockId, GainPerByte, Greedy, LoadOrder, Plan, Random, Scores, Sizes, Sorter};
use proptest::collection::vec;
use proptest::prelude::*;

/// Base bytes, and per weight its blocks as (bytes, score); no more than 7 weights of 6 blocks.
type Model = (u64, Vec<Vec<(u64, f64)>>);

fn model(score: impl Strategy<Value = f64> + Clone) -> impl Strategy<Value = Model> {
    (0..50_u64, vec(vec((1..100_u64, score), 1..=6), 0..=7))
}

/// Few distinct values, so that ties and NaN are common.
fn rough_score() -> impl Strategy<Value = f64> + Clone {
    prop_oneof![4 => (0..6_i32).prop_map(f64::from), 1 => Just(f64::NAN), 1 => any::<f64>()]
}

fn finite() -> impl Strategy<Value = f64> + Clone {
    prop_oneof![(0..20_i32).prop_map(f64::from), proptest::num::f64::NORMAL | proptest::num::f64::ZERO]
}

fn split((base_bytes, weights): &Model) -> (Sizes, Scores) {
    let sizes = Sizes::new(*base_bytes, weights.iter().map(|row| row.iter().map(|block| block.0).collect::<Vec<_>>()));
    let scores = Scores::new(weights.iter().map(|row| row.iter().map(|block| block.1).collect::<Vec<_>>()));
    (sizes.unwrap(), scores)
}

/// Every block once, blocks of a weight in order, all first blocks first.
fn check_order(order: &LoadOrder, sizes: &Sizes) -> Result<(), TestCaseError> {
    let mut seen = vec![0; sizes.n_weights()];
    for (position, BlockId { weight, block }) in order.iter().enumerate() {
        seen[weight] += 1;
        prop_assert_eq!(block, seen[weight]);
        prop_assert_eq!(block == 1, position < sizes.n_weights());
    }
    let n_blocks: Vec<usize> = sizes.weights().map(<[u64]>::len).collect();
    prop_assert_eq!(seen, n_blocks);
    prop_assert_eq!(&LoadOrder::from_weights(order.weights(), sizes).unwrap(), order);
    Ok(())
}

/// Every budget from nothing to more than everything.
fn check_plans(order: &LoadOrder, sizes: &Sizes) -> Result<(), TestCaseError> {
    let mut smaller: Option<Plan> = None;
    for budget in 0..=sizes.total_bytes() + 1 {
        let Ok(plan) = order.plan(budget) else {
            prop_assert!(budget < sizes.minimum_bytes());
            continue;
        };
        prop_assert!(budget >= sizes.minimum_bytes());
        prop_assert!(plan.resident_bytes <= budget);
        let blocks = sizes.weights().zip(&plan.levels).map(|(row, &level)| row[..level as usize].iter().sum::<u64>());
        prop_assert_eq!(plan.resident_bytes, sizes.base_bytes() + blocks.sum::<u64>());
        prop_assert_eq!(plan.n_blocks, plan.levels.iter().sum::<u32>() as usize);
        prop_assert!(plan.levels.iter().all(|&level| level >= 1));
        // Longest: the next block would not fit.
        if let Some(&next) = order.cumulative_bytes().get(plan.n_blocks + 1) {
            prop_assert!(next > budget);
        }
        if let Some(smaller) = smaller {
            prop_assert!(smaller.levels.iter().zip(&plan.levels).all(|(less, more)| less <= more));
        }
        smaller = Some(plan);
    }
    prop_assert_eq!(smaller.unwrap().n_blocks, sizes.n_blocks());
    Ok(())
}

fn check_method(method: &impl Sorter, sizes: &Sizes) -> Result<LoadOrder, TestCaseError> {
    let order = method.order(sizes).unwrap();
    prop_assert_eq!(&method.order(sizes).unwrap(), &order);
    check_order(&order, sizes)?;
    check_plans(&order, sizes)?;
    Ok(order)
}

/// All choices of a level from 1 up for each weight.
fn all_levels(sizes: &Sizes) -> Vec<Vec<u32>> {
    sizes.weights().fold(vec![vec![]], |choices, row| {
        let extend =
            |choice: &Vec<u32>| (1..=row.len() as u32).map(|l| [&choice[..], &[l]].concat()).collect::<Vec<_>>();
        choices.iter().flat_map(extend).collect()
    })
}

/// Resident bytes and total error of the weights at these levels. Exact for small integer errors.
fn cost(levels: &[u32], sizes: &Sizes, errors: &Scores) -> (u64, f64) {
    let bytes = sizes.weights().zip(levels).map(|(row, &level)| row[..level as usize].iter().sum::<u64>());
    let error = errors.weights().zip(levels).map(|(row, &level)| row[level as usize - 1]);
    (sizes.base_bytes() + bytes.sum::<u64>(), error.sum())
}

proptest! {
    #[test]
    fn balanced_moves_levels_in_lockstep(model in model(rough_score())) {
        let (sizes, scores) = split(&model);
        let order = check_method(&Balanced { scores }, &sizes)?;
        let n_blocks: Vec<u32> = sizes.weights().map(|row| row.len() as u32).collect();
        for length in sizes.n_weights()..=sizes.n_blocks() {
            let levels = order.plan_of_len(length).unwrap().levels;
            let highest = levels.iter().copied().max().unwrap_or(0);
            for (level, n_blocks) in levels.iter().zip(&n_blocks) {
                prop_assert!(level == n_blocks || level + 1 >= highest, "{levels:?} of {n_blocks:?}");
            }
        }
    }

    #[test]
    fn balanced_scores_rise_inside_a_level(model in model((0..6_i32).prop_map(f64::from))) {
        let (sizes, scores) = split(&model);
        let order = Balanced { scores: scores.clone() }.order(&sizes).unwrap();
        let keys: Vec<_> = order.iter().skip(sizes.n_weights())
            .map(|BlockId { weight, block }| (block, scores.blocks(weight).unwrap()[block - 1], weight)).collect();
        prop_assert!(keys.is_sorted(), "{keys:?}");
    }

    #[test]
    fn greedy_takes_the_best_of_the_next_blocks(model in model((0..6_i32).prop_map(f64::from))) {
        let (sizes, scores) = split(&model);
        let order = check_method(&Greedy { scores: scores.clone() }, &sizes)?;
        let mut levels = vec![1; sizes.n_weights()];
        for BlockId { weight, block } in order.iter().skip(sizes.n_weights()) {
            let best = scores.weights().zip(&levels).enumerate()
                .filter_map(|(weight, (row, &level))| row.get(level).map(|&score| (score, weight)))
                .min_by(|a, b| a.partial_cmp(b).unwrap());
            prop_assert_eq!(best, Some((scores.blocks(weight).unwrap()[block - 1], weight)));
            levels[weight] += 1;
        }
    }

    #[test]
    fn greedy_accepts_any_score(model in model(rough_score())) {
        let (sizes, scores) = split(&model);
        check_method(&Greedy { scores }, &sizes)?;
    }

    #[test]
    fn random_keeps_the_promises_of_an_order(model in model(Just(0.0)), seed: u64) {
        let (sizes, _) = split(&model);
        check_method(&Random { seed }, &sizes)?;
    }

    #[test]
    fn gain_per_byte_accepts_any_finite_error(model in model(finite()), trust in 0.0..=1.0) {
        let (sizes, errors) = split(&model);
        check_method(&GainPerByte::new(errors.clone()), &sizes)?;
        check_method(&GainPerByte::new(errors).trust(trust), &sizes)?;
    }

    /// A choice of levels that alone has the least error + λ·bytes, for some price λ > 0 of a byte, is a vertex of the
    /// curve of least error against bytes: it must be a prefix, and nothing of no more bytes may have less error.
    #[test]
    fn gain_per_byte_is_optimal_at_every_breakpoint(
        model in (0..50_u64, vec(vec((1..9_u64, (0..40_i32).prop_map(f64::from)), 1..=5), 1..=4))
    ) {
        let (sizes, errors) = split(&model);
        let order = GainPerByte::new(errors.clone()).order(&sizes).unwrap();
        let choices: Vec<_> = all_levels(&sizes).into_iter().map(|levels| {
            let cost = cost(&levels, &sizes, &errors);
            (levels, cost)
        }).collect();
        // Slopes are fractions of integers between 0 and 39 (down to about 1/32): the prices cover that range, and being
        // irrational meet none of them, so that each weight's best level, and with it the best choice, is unique.
        let step = std::f64::consts::SQRT_2 / 64.0;
        for price in (0..2000).map(|i| (f64::from(i) + 0.5) * step) {
            let priced = |&(bytes, error): &(u64, f64)| error + price * bytes as f64;
            let (levels, (bytes, error)) =
                choices.iter().min_by(|a, b| priced(&a.1).total_cmp(&priced(&b.1))).unwrap();
            let plan = order.plan(*bytes).unwrap();
            prop_assert_eq!(&plan.levels, levels, "price {}", price);
            for (other, (other_bytes, other_error)) in &choices {
                prop_assert!(other_bytes > bytes || other_error >= error, "{other:?} is better than {levels:?}");
            }
        }
    }
}
