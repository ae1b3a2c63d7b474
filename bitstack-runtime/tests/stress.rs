//! Everything at once: budgets set at random by two threads while four multiply; and what the system has of it.

mod stacks;

use bitstack_core::SignLayout;
use bitstack_runtime::{Options, Verify, process_resident_bytes};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use stacks::{ReadableMemory, open, over_both_memories, products, products_of};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

over_both_memories! {
    results_are_those_of_some_level_whatever_two_threads_do_to_the_budget,
}

fn results_are_those_of_some_level_whatever_two_threads_do_to_the_budget(memory: impl ReadableMemory) {
    const CHANGES: usize = 10_000;
    let bytes = stacks::small();
    let model = open(
        &memory,
        bytes.clone(),
        u64::MAX,
        Options { verify: Verify::Always, signs: SignLayout::Strips, ..Options::default() },
    );
    let order = model.order().clone();
    let expected: Vec<_> = (order.n_weights()..=order.n_blocks())
        .map(|n| order.plan_of_len(n).unwrap())
        .map(|plan| (products(&bytes, &plan.levels), plan))
        .collect();
    let whole = model.status().allocated_bytes;
    model.set_budget(order.minimum_bytes()).unwrap();
    let smallest = model.status().allocated_bytes;

    let done = AtomicBool::new(false);
    let n_products = AtomicUsize::new(0);
    let sizes_seen: Vec<AtomicUsize> = expected.iter().map(|_| AtomicUsize::new(0)).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let snapshot = model.snapshot();
                    let i = snapshot.n_blocks() - order.n_weights();
                    let (products, plan) = &expected[i];
                    assert_eq!((snapshot.levels(), snapshot.resident_bytes()), (&plan.levels[..], plan.resident_bytes));
                    assert_eq!(&products_of(&snapshot), products);
                    n_products.fetch_add(1, Ordering::Relaxed);
                    sizes_seen[i].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let setters: Vec<_> = (0..2)
            .map(|seed| {
                let (model, order) = (&model, &order);
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(seed);
                    for _ in 0..CHANGES / 2 {
                        let budget = rng.random_range(order.minimum_bytes()..=order.total_bytes());
                        let plan = model.set_budget(budget).unwrap();
                        assert!(plan.resident_bytes <= budget);
                        // Now and then let it get there, or part of the way.
                        match rng.random_range(0..50) {
                            0 => model.wait().unwrap(),
                            1 => std::thread::sleep(std::time::Duration::from_micros(500)),
                            _ => {}
                        }
                    }
                })
            })
            .collect();
        // A setter that panics must not leave the others running for ever.
        let results: Vec<_> = setters.into_iter().map(|setter| setter.join()).collect();
        done.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
    });
    let n_seen = sizes_seen.iter().filter(|n| n.load(Ordering::Relaxed) > 0).count();
    assert!(n_products.into_inner() >= 100 && n_seen > 4, "{n_seen} sizes were seen");

    // Nothing is left behind, and nothing is missing.
    for (budget, allocated) in [(order.minimum_bytes(), smallest), (u64::MAX, whole), (order.minimum_bytes(), smallest)]
    {
        model.set_budget(budget).unwrap();
        model.wait().unwrap();
        // The loader may hold on for a moment to what it read in vain.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while model.status().allocated_bytes != allocated {
            assert!(std::time::Instant::now() < deadline, "{allocated} bytes expected, {:?}", model.status());
            std::thread::yield_now();
        }
    }
    drop(model);
    memory.check_used_bytes(0);
}

#[test]
#[expect(clippy::print_stdout, reason = "a test says what it skips")]
fn memory_of_dropped_blocks_goes_back_to_the_system() {
    let bytes = stacks::stack(&[(2048, 4096); 4], 8);
    let options = Options { signs: SignLayout::Strips, ..Options::default() };
    let model = open(&bitstack_runtime::HostMemory, bytes, u64::MAX, options);
    let minimum_bytes = model.order().minimum_bytes();
    let bytes = model.order().total_bytes() - minimum_bytes;
    assert!(bytes > 28 << 20);
    let allocated_bytes = model.status().allocated_bytes;
    for _ in 0..2 {
        let before = process_resident_bytes();
        model.set_budget(minimum_bytes).unwrap();
        // The loader may still hold the last snapshot for a moment.
        while model.status().allocated_bytes + bytes > allocated_bytes {
            std::thread::yield_now();
        }
        let small = process_resident_bytes();
        model.set_budget(u64::MAX).unwrap();
        model.wait().unwrap();
        let after = process_resident_bytes();
        let (Some(before), Some(small), Some(after)) = (before, small, after) else {
            return println!("skipped: this system does not say what is resident");
        };
        // Another test may be running beside this one, with far less memory; the system counts in batches.
        assert!(before > small + bytes * 9 / 10, "{before} bytes were resident, {small} after dropping {bytes}");
        assert!(after > small + bytes * 9 / 10, "{small} bytes were resident, {after} after loading {bytes}");
    }
}
