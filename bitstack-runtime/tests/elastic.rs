//! Models that change their size: always a plan of the load order, with the products of its levels and the bytes it says.

mod stacks;

use bitstack_core::SignLayout;
use bitstack_format::{BlockSource, StackFile};
use bitstack_runtime::{Elastic, HostMemory, Options, Policy, RuntimeError, Start, Verify, Watcher};
use stacks::{Beyond, Gate, ReadableMemory, open, over_both_memories, products, products_of};
use std::sync::Arc;
use std::time::Duration;

const TRUSTED: Options = Options { verify: Verify::Never, start: Start::Whole, signs: SignLayout::Rows };

over_both_memories! {
    every_budget_gives_its_plan_and_the_products_of_its_levels_in_every_layout,
    allocated_bytes_are_those_of_the_blocks_as_the_memory_counts_them,
    blocks_that_share_a_run_go_with_the_last_of_them_and_come_back_unread_before,
    budget_below_the_smallest_model_is_an_error_and_changes_nothing,
    shrinking_is_in_place_on_return_and_a_snapshot_held_stays_whole,
    blocks_that_an_old_snapshot_holds_are_not_read_again,
    smallest_start_returns_with_the_first_blocks_and_grows_in_the_background,
    every_snapshot_on_the_way_is_a_prefix_of_the_load_order,
    later_budget_supersedes_an_earlier_one_that_is_being_loaded,
    model_can_be_dropped_while_it_grows,
}

fn every_budget_gives_its_plan_and_the_products_of_its_levels_in_every_layout(memory: impl ReadableMemory) {
    for (bytes, signs) in [
        (stacks::small(), SignLayout::Rows),
        (stacks::small(), SignLayout::Strips),
        (stacks::uneven(), SignLayout::Rows),
        (stacks::uneven(), SignLayout::Strips),
    ] {
        let model = open(&memory, bytes.clone(), u64::MAX, Options { signs, ..Options::default() });
        let order = model.order().clone();
        let sizes: Vec<u64> = order.cumulative_bytes()[order.n_weights()..].to_vec();
        // Up and down in steps of every size.
        let n = sizes.len();
        let walk = (0..n).chain((0..n).rev()).chain([n - 1, 0, n - 1, n / 2, 0, n / 3]);
        for i in walk {
            let plan = model.set_budget(sizes[i]).unwrap();
            model.wait().unwrap();
            let snapshot = model.snapshot();
            assert_eq!(plan, order.plan(sizes[i]).unwrap());
            assert_eq!((snapshot.levels(), snapshot.resident_bytes()), (&plan.levels[..], sizes[i]));
            assert_eq!(products_of(&snapshot), products(&bytes, &plan.levels));
            assert_eq!(snapshot.signs(), memory.signs(signs));
            let status = model.status();
            let bytes = (status.budget_bytes, status.target_bytes, status.resident_bytes);
            assert_eq!(bytes, (sizes[i], sizes[i], sizes[i]));
            assert!(!status.loading && status.error.is_none());
        }
    }
}

#[test]
fn spikes_are_resident_bytes_of_block_1_and_part_of_every_size() {
    let bytes = stacks::small();
    let file = StackFile::open(bytes.clone()).unwrap();
    for signs in [SignLayout::Rows, SignLayout::Strips] {
        let model = open(&HostMemory, bytes.clone(), u64::MAX, Options { signs, ..Options::default() });
        for budget in [model.order().total_bytes(), model.order().minimum_bytes()] {
            model.set_budget(budget).unwrap();
            let snapshot = model.snapshot();
            for (w, info) in file.weights().iter().enumerate() {
                let block = file.read_block(w, 1).unwrap();
                assert_eq!(block.spikes.is_some(), w != 1);
                let level = snapshot.level(w).unwrap();
                assert_eq!(level.spikes().map(|s| s.list), block.view().spikes);
                // Signs, basis and coefficients in halves, spikes.
                let (rows, cols) = (info.shape.rows(), info.shape.cols());
                let words = block.view().spikes.map_or(0, |s| s.words().len());
                let expected = rows * cols.div_ceil(8) + 2 * cols + 2 * rows + 2 * words;
                assert_eq!(info.block_bytes(1), Some(expected as u64));
            }
        }
        let first: u64 = file.block_sizes().iter().map(|blocks| blocks[0]).sum();
        assert_eq!(model.status().resident_bytes, file.base_bytes() + first);
    }
}

fn allocated_bytes_are_those_of_the_blocks_as_the_memory_counts_them(memory: impl ReadableMemory) {
    let bytes = stacks::small();
    let model = open(&memory, bytes.clone(), u64::MAX, TRUSTED);
    let file = StackFile::open(bytes).unwrap();
    for budget in [model.order().total_bytes(), model.order().minimum_bytes(), model.order().total_bytes() / 2] {
        let plan = model.set_budget(budget).unwrap();
        model.wait().unwrap();
        let blocks = plan.levels.iter().enumerate().flat_map(|(w, &level)| (1..=level as usize).map(move |b| (w, b)));
        let bytes: u64 = blocks.map(|(w, b)| memory.block_bytes(&file.block_extent(w, b).unwrap())).sum();
        assert_eq!(model.status().allocated_bytes, file.base_bytes() + bytes);
        memory.check_used_bytes(bytes);
    }
}

fn blocks_that_share_a_run_go_with_the_last_of_them_and_come_back_unread_before(memory: impl ReadableMemory) {
    let bytes = stacks::uneven();
    let source = Arc::new(Gate::new(bytes.clone()));
    let model = open(&memory, source.clone(), u64::MAX, TRUSTED);
    let order = model.order().clone();
    let file = StackFile::open(bytes).unwrap();
    let blocks: Vec<u64> =
        order.iter().map(|id| memory.block_bytes(&file.block_extent(id.weight, id.block).unwrap())).collect();
    let bytes_of = |n: usize| file.base_bytes() + blocks[..n].iter().sum::<u64>();
    let most_beyond = blocks.iter().sum::<u64>() / 64;

    let whole = (model.status().allocated_bytes, source.reads());
    assert_eq!(whole.0, bytes_of(order.n_blocks()));
    let (mut n_shared, mut n_alone) = (0, 0);
    for n in (order.n_weights()..order.n_blocks()).rev() {
        model.set_budget(order.cumulative_bytes()[n]).unwrap();
        let beyond = model.status().allocated_bytes - bytes_of(n);
        memory.check_used_bytes(model.status().allocated_bytes - file.base_bytes());
        assert!(beyond <= most_beyond, "{beyond} bytes beyond those of {n} blocks");
        // One more is there already, or is read.
        let reads = source.reads();
        model.set_budget(order.cumulative_bytes()[n + 1]).unwrap();
        model.wait().unwrap();
        assert_eq!(source.reads() - reads, usize::from(beyond == 0), "{n} blocks");
        *if beyond > 0 { &mut n_shared } else { &mut n_alone } += 1;
        model.set_budget(order.cumulative_bytes()[n]).unwrap();
    }
    assert!(n_shared > 2 && n_alone > 2, "{n_shared}, {n_alone}");
    assert_eq!(model.status().allocated_bytes, bytes_of(order.n_weights()), "nothing is beyond the smallest model");
}

fn budget_below_the_smallest_model_is_an_error_and_changes_nothing(memory: impl ReadableMemory) {
    let model = open(&memory, stacks::small(), u64::MAX, TRUSTED);
    let minimum = model.order().minimum_bytes();
    let before = model.snapshot();
    for budget in [0, minimum - 1] {
        let error = model.set_budget(budget).unwrap_err();
        assert!(
            matches!(error, RuntimeError::Budget(_)) && error.to_string().contains(&minimum.to_string()),
            "{error}"
        );
        let file = StackFile::open(stacks::small()).unwrap();
        assert!(matches!(Elastic::open_in(memory.clone(), file, budget, TRUSTED), Err(RuntimeError::Budget(_))));
    }
    assert!(Arc::ptr_eq(&before, &model.snapshot()));
    assert_eq!(model.status().budget_bytes, u64::MAX);
}

fn shrinking_is_in_place_on_return_and_a_snapshot_held_stays_whole(memory: impl ReadableMemory) {
    let bytes = stacks::small();
    let model = open(&memory, bytes.clone(), u64::MAX, TRUSTED);
    let large = model.snapshot();
    let expected = products(&bytes, large.levels());
    let allocated = model.status().allocated_bytes;

    let plan = model.set_budget(model.order().minimum_bytes()).unwrap();
    assert_eq!(model.snapshot().levels(), plan.levels);
    assert_eq!(model.status().resident_bytes, plan.resident_bytes);
    assert_eq!(products_of(&large), expected);
    assert_eq!(model.status().allocated_bytes, allocated); // somebody still works on it
    drop(large);
    assert!(model.status().allocated_bytes < allocated);
}

fn blocks_that_an_old_snapshot_holds_are_not_read_again(memory: impl ReadableMemory) {
    let source = Arc::new(Gate::new(stacks::small()));
    let model = open(&memory, source.clone(), u64::MAX, TRUSTED);
    let (total, minimum) = (model.order().total_bytes(), model.order().minimum_bytes());
    let (large, allocated, reads) = (model.snapshot(), model.status().allocated_bytes, source.reads());
    model.set_budget(minimum).unwrap();
    model.set_budget(total).unwrap();
    model.wait().unwrap();
    assert_eq!((model.status().allocated_bytes, source.reads()), (allocated, reads));

    drop(large);
    model.set_budget(minimum).unwrap();
    model.set_budget(total).unwrap();
    model.wait().unwrap();
    assert_eq!(source.reads() - reads, model.order().n_blocks() - model.order().n_weights());
}

fn smallest_start_returns_with_the_first_blocks_and_grows_in_the_background(memory: impl ReadableMemory) {
    let bytes = stacks::small();
    let source = Arc::new(Gate::new(bytes.clone()));
    let file = StackFile::open(source.clone()).unwrap();
    source.permit(file.weights().len(), Beyond::Wait); // one read for each block
    let options = Options { start: Start::Smallest, ..TRUSTED };
    let model = Elastic::open_in(memory, file, u64::MAX, options).unwrap();
    assert_eq!(model.snapshot().levels(), [1; 4]);
    assert_eq!(products_of(&model.snapshot()), products(&bytes, &[1; 4]));
    let status = model.status();
    assert!(status.loading && status.target_bytes == model.order().total_bytes());

    source.permit(usize::MAX, Beyond::Wait);
    model.wait().unwrap();
    assert_eq!(model.snapshot().levels(), [5; 4]);
}

fn every_snapshot_on_the_way_is_a_prefix_of_the_load_order(memory: impl ReadableMemory) {
    let bytes = stacks::small();
    let source = Arc::new(Gate::new(bytes.clone()));
    let model = open(&memory, source.clone(), u64::MAX, TRUSTED);
    let order = model.order().clone();
    model.set_budget(order.minimum_bytes()).unwrap();
    source.permit(0, Beyond::Wait);
    model.set_budget(order.total_bytes()).unwrap();
    let mut status = model.status();
    let mut lengths = Vec::new();
    while status.loading {
        // Longer apart than snapshots are published, so that more than the last one can be seen.
        std::thread::sleep(Duration::from_millis(25));
        source.permit(2, Beyond::Wait);
        status = model.wait_change(status.change, Duration::from_millis(100));
        let snapshot = model.snapshot();
        assert_eq!(snapshot.levels(), order.plan_of_len(snapshot.n_blocks()).unwrap().levels);
        assert_eq!(products_of(&snapshot), products(&bytes, snapshot.levels()));
        lengths.push(snapshot.n_blocks());
    }
    lengths.dedup();
    assert!(lengths.is_sorted() && lengths.len() > 2, "{lengths:?}");
    assert_eq!(lengths.last(), Some(&order.n_blocks()));
}

fn later_budget_supersedes_an_earlier_one_that_is_being_loaded(memory: impl ReadableMemory) {
    let bytes = stacks::small();
    let source = Arc::new(Gate::new(bytes.clone()));
    let model = open(&memory, source.clone(), u64::MAX, TRUSTED);
    let order = model.order().clone();
    let plan = model.set_budget(order.minimum_bytes()).unwrap();
    let allocated = model.status().allocated_bytes;

    source.permit(3, Beyond::Wait);
    model.set_budget(order.total_bytes()).unwrap();
    model.set_budget(order.minimum_bytes()).unwrap(); // returns although reads hang
    assert_eq!(model.snapshot().levels(), plan.levels);
    source.permit(usize::MAX, Beyond::Wait);
    model.wait().unwrap();
    assert_eq!(model.snapshot().levels(), plan.levels);

    // In the middle of one growth, another one to less.
    source.permit(1, Beyond::Wait);
    model.set_budget(order.total_bytes()).unwrap();
    let plan = model.set_budget(order.cumulative_bytes()[order.n_weights() + 3]).unwrap();
    source.permit(usize::MAX, Beyond::Wait);
    model.wait().unwrap();
    assert_eq!(model.snapshot().levels(), plan.levels);
    model.set_budget(order.minimum_bytes()).unwrap();
    // The loader lets go of what it read in vain.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while model.status().allocated_bytes != allocated {
        assert!(std::time::Instant::now() < deadline, "{:?}", model.status());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn model_can_be_dropped_while_it_grows(memory: impl ReadableMemory) {
    let source = Arc::new(Gate::new(stacks::small()));
    let model = open(&memory, source.clone(), u64::MAX, TRUSTED);
    let snapshot = model.snapshot();
    model.set_budget(model.order().minimum_bytes()).unwrap();
    drop(snapshot);
    source.permit(1, Beyond::Wait);
    model.set_budget(u64::MAX).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            source.permit(usize::MAX, Beyond::Wait);
        });
        drop(model);
    });
    assert_eq!(Arc::strong_count(&source), 1, "the loader is gone");
    memory.check_used_bytes(0);
}

#[test]
#[cfg(target_os = "linux")]
fn watcher_sets_the_budget_until_it_or_the_model_is_dropped() {
    let source = Arc::new(Gate::new(stacks::small()));
    let model = open(&HostMemory, source.clone(), u64::MAX, TRUSTED);
    let reached = |bytes: u64| {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        let mut status = model.status();
        while status.resident_bytes != bytes {
            assert!(std::time::Instant::now() < deadline, "{bytes} bytes expected, {status:?}");
            status = model.wait_change(status.change, Duration::from_secs(1));
        }
    };
    // More is to be kept free than any machine has; then nothing, and at once.
    let all = Policy { reserve_bytes: 1 << 60, ..Policy::new(0) };
    let none = Policy { reserve_bytes: 0, hold: Duration::ZERO, pause: Duration::ZERO, stall_share: 1.0 };
    let watcher = Watcher::start(&model, all).unwrap();
    reached(model.order().minimum_bytes());
    drop(watcher);
    let watcher = Watcher::start(&model, none).unwrap();
    reached(model.order().total_bytes());

    let holders = Arc::strong_count(&source);
    drop(model);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while Arc::strong_count(&source) > 1 {
        assert!(std::time::Instant::now() < deadline, "of {holders} holders {} are left", Arc::strong_count(&source));
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(watcher);
}
