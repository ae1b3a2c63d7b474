//! Sizes, scores and orders of any kind give a load order or an error. An order holds every block of every weight once, first blocks first;
//! a plan is the longest prefix that fits its budget, and a larger budget never gives less.
#![no_main]

use arbitrary::Arbitrary;
use bitstack_sort::{Balanced, BlockId, GainPerByte, Greedy, LoadOrder, Random, Scores, Sizes, Sorter};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Input {
    base_bytes: u64,
    sizes: Vec<Vec<u64>>,
    /// Of the same shape as the sizes, as far as they go; then 0.
    scores: Vec<f64>,
    /// Taken as they are, of whatever shape.
    free_scores: Option<Vec<Vec<f64>>>,
    seed: u64,
    trust: u8,
    order: Vec<u32>,
    budgets: Vec<u64>,
}

fn check(order: &LoadOrder, sizes: &Sizes, budgets: &[u64]) {
    let mut seen: Vec<usize> = vec![0; sizes.n_weights()];
    for (position, BlockId { weight, block }) in order.iter().enumerate() {
        seen[weight] += 1;
        assert_eq!(block, seen[weight], "blocks of a weight come in their order");
        assert!(position >= sizes.n_weights() || block == 1, "first blocks come first");
    }
    for (weight, n) in seen.iter().enumerate() {
        assert_eq!(Some(*n), sizes.blocks(weight).map(<[u64]>::len));
    }
    assert_eq!((order.minimum_bytes(), order.total_bytes()), (sizes.minimum_bytes(), sizes.total_bytes()));
    assert_eq!(LoadOrder::from_weights(order.weights(), sizes).as_ref(), Ok(order));

    let near = order.cumulative_bytes().iter().flat_map(|&b| [b.wrapping_sub(1), b, b.wrapping_add(1)]);
    let mut budgets: Vec<u64> = budgets.iter().copied().chain(near.take(300)).chain([0, u64::MAX]).collect();
    budgets.sort_unstable();
    let mut before: Option<Vec<u32>> = None;
    for budget in budgets {
        let Ok(plan) = order.plan(budget) else {
            assert!(budget < order.minimum_bytes() && before.is_none());
            continue;
        };
        assert!(plan.resident_bytes <= budget);
        assert_eq!(plan.resident_bytes, order.cumulative_bytes()[plan.n_blocks]);
        assert!(order.cumulative_bytes().get(plan.n_blocks + 1).is_none_or(|&next| next > budget), "it is the longest");
        assert_eq!(plan.levels.iter().map(|&l| l as usize).sum::<usize>(), plan.n_blocks);
        assert_eq!(order.plan_of_len(plan.n_blocks).as_ref(), Ok(&plan));
        if let Some(before) = before {
            assert!(before.iter().zip(&plan.levels).all(|(a, b)| a <= b), "a larger budget gives no less");
        }
        before = Some(plan.levels);
    }
}

fuzz_target!(|input: Input| {
    let Ok(sizes) = Sizes::new(input.base_bytes, &input.sizes) else { return };
    let mut next = input.scores.iter().copied().chain(std::iter::repeat(0.0));
    let shaped: Vec<Vec<f64>> = input.sizes.iter().map(|row| next.by_ref().take(row.len()).collect()).collect();
    let finite: Vec<Vec<f64>> =
        shaped.iter().map(|row| row.iter().map(|x| if x.is_finite() { *x } else { 1.0 }).collect()).collect();
    let methods: [(&str, Box<dyn Sorter>); 4] = [
        ("balanced", Box::new(Balanced { scores: Scores::new(&shaped) })),
        ("greedy", Box::new(Greedy { scores: Scores::new(&shaped) })),
        ("random", Box::new(Random { seed: input.seed })),
        ("gain", Box::new(GainPerByte::new(Scores::new(&finite)).trust(f64::from(input.trust) / 255.0))),
    ];
    for (name, method) in &methods {
        let order = method.order(&sizes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(method.order(&sizes).as_ref(), Ok(&order), "{name}: the same input gives the same order");
        check(&order, &sizes, &input.budgets);
    }
    let [balanced, .., gain] = methods.map(|(_, method)| method.order(&sizes).expect("it did above"));
    let at = sizes.n_weights() + usize::from(input.trust).min(sizes.n_blocks() - sizes.n_weights());
    let both = balanced.continued(at, &gain, &sizes).expect("both are orders of these sizes");
    assert_eq!(both.weights()[..at], balanced.weights()[..at]);
    check(&both, &sizes, &input.budgets);
    // Of any shape, with any numbers.
    let free = Scores::new(input.free_scores.as_deref().unwrap_or(&shaped));
    for method in
        [&Balanced { scores: free.clone() } as &dyn Sorter, &Greedy { scores: free.clone() }, &GainPerByte::new(free)]
    {
        if let Ok(order) = method.order(&sizes) {
            check(&order, &sizes, &input.budgets);
        }
    }
    if let Ok(order) = LoadOrder::from_weights(&input.order, &sizes) {
        check(&order, &sizes, &input.budgets);
    }
});
