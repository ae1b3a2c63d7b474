//! Storage that fails while a model grows: it keeps the size it had, says which block it was, and tries again when asked.

mod stacks;

use bitstack_format::{BlockSource, FormatError, StackFile};
use bitstack_io::in_one_line;
use bitstack_runtime::{Elastic, Options, RuntimeError, Start, Verify};
use stacks::{Beyond, Gate, ReadableMemory, open, over_both_memories, products, products_of};
use std::sync::Arc;

over_both_memories! {
    read_error_stops_the_growth_and_the_next_budget_tries_again,
    panic_of_the_source_is_reported_like_a_read_error,
    file_truncated_under_our_feet_is_an_error_at_the_first_block_that_is_gone,
    file_changed_under_our_feet_is_an_error_at_the_block_with_the_wrong_hash,
    values_that_no_block_may_have_are_noticed_without_hashes_too,
    smaller_budget_after_an_error_is_no_error,
}

/// A model at its smallest size, ready to grow.
fn smallest<M: ReadableMemory>(memory: &M, bytes: &[u8], verify: Verify) -> (Arc<Gate>, Elastic<Arc<Gate>, M>) {
    let source = Arc::new(Gate::new(bytes.to_vec()));
    let model = open(memory, source.clone(), u64::MAX, Options { verify, ..Options::default() });
    model.set_budget(model.order().minimum_bytes()).unwrap();
    (source, model)
}

/// What must hold when loading all of the model has failed at position `position` of its load order.
fn check(model: &Elastic<Arc<Gate>, impl ReadableMemory>, bytes: &[u8], position: usize) -> RuntimeError {
    let error = model.wait().unwrap_err();
    let (weight, block) =
        model.order().iter().nth(position).map(|id| (format!("layers.{}.weight", id.weight), id.block)).unwrap();
    let named = match &error {
        RuntimeError::Block { weight, block, .. } | RuntimeError::Panicked { weight, block, .. } => {
            (weight.clone(), *block)
        }
        other => panic!("{other}"),
    };
    assert_eq!(named, (weight.clone(), block));
    let message = in_one_line(&error);
    assert!(message.contains(&format!("block {block} of weight {weight}")), "{message}");
    assert!(message.contains("stays in use") && message.contains("budget"), "{message}");

    let (status, snapshot) = (model.status(), model.snapshot());
    assert!(!status.loading);
    assert_eq!(in_one_line(&status.error.unwrap()), message);
    assert_eq!((status.budget_bytes, status.target_bytes), (u64::MAX, model.order().total_bytes()));
    assert_eq!(snapshot.n_blocks(), position, "what comes before it is loaded");
    assert_eq!(products_of(&snapshot), products(bytes, snapshot.levels()));
    drop(snapshot);
    let base_bytes = model.file().base_bytes();
    model.memory().check_used_bytes(model.status().allocated_bytes - base_bytes);
    error
}

/// What must hold when the source is well again.
fn check_recovery(model: &Elastic<Arc<Gate>, impl ReadableMemory>, bytes: &[u8]) {
    model.set_budget(u64::MAX).unwrap();
    model.wait().unwrap();
    assert!(model.status().error.is_none());
    assert_eq!(products_of(&model.snapshot()), products(bytes, &[5; 4]));
}

fn read_error_stops_the_growth_and_the_next_budget_tries_again(memory: impl ReadableMemory) {
    let both = [(stacks::small(), 4), (stacks::uneven(), 12)];
    for (bytes, n) in both.iter().flat_map(|(bytes, most)| (0..*most).map(move |n| (bytes, n))) {
        let (source, model) = smallest(&memory, bytes, Verify::Never);
        source.permit(n, Beyond::Fail);
        model.set_budget(u64::MAX).unwrap();
        let reached = match model.wait() {
            // Of two readers the one with the earliest block may be the one that fails, and what the other read is in vain.
            Err(RuntimeError::Block { .. }) => model.snapshot().n_blocks(),
            other => panic!("{other:?}"),
        };
        assert!((4..=4 + n).contains(&reached), "{n} reads passed, {reached} blocks");
        let error = check(&model, bytes, reached);
        assert!(in_one_line(&error).contains("the disk is on fire"), "{error}");
        source.permit(usize::MAX, Beyond::Fail);
        check_recovery(&model, bytes);
    }
}

fn panic_of_the_source_is_reported_like_a_read_error(memory: impl ReadableMemory) {
    let bytes = stacks::small();
    let (source, model) = smallest(&memory, &bytes, Verify::Never);
    source.permit(0, Beyond::Panic);
    model.set_budget(u64::MAX).unwrap();
    let error = check(&model, &bytes, 4);
    assert!(matches!(&error, RuntimeError::Panicked { message, .. } if message.contains("the source has a bug")));
    source.permit(usize::MAX, Beyond::Panic);
    check_recovery(&model, &bytes);
}

fn file_truncated_under_our_feet_is_an_error_at_the_first_block_that_is_gone(memory: impl ReadableMemory) {
    let bytes = stacks::small();
    for verify in [Verify::Always, Verify::Never] {
        let (source, model) = smallest(&memory, &bytes, verify);
        source.change(|bytes| bytes.truncate(bytes.len() - 1));
        model.set_budget(u64::MAX).unwrap();
        let error = check(&model, &bytes, model.order().n_blocks() - 1);
        assert!(matches!(&error, RuntimeError::Block { source, .. } if matches!(**source, FormatError::Read { .. })));
        source.change(|b| *b = bytes.clone());
        check_recovery(&model, &bytes);
    }
}

fn file_changed_under_our_feet_is_an_error_at_the_block_with_the_wrong_hash(memory: impl ReadableMemory) {
    let bytes = stacks::small();
    let (source, model) = smallest(&memory, &bytes, Verify::Always);
    source.change(|bytes| *bytes.last_mut().unwrap() ^= 1);
    model.set_budget(u64::MAX).unwrap();
    let error = check(&model, &bytes, model.order().n_blocks() - 1);
    assert!(matches!(&error, RuntimeError::Block { source, .. } if matches!(**source, FormatError::Damaged { .. })));
    source.change(|b| *b = bytes.clone());
    check_recovery(&model, &bytes);
}

fn values_that_no_block_may_have_are_noticed_without_hashes_too(memory: impl ReadableMemory) {
    let bytes = stacks::small();
    let (source, model) = smallest(&memory, &bytes, Verify::Never);
    source.change(|bytes| *bytes.last_mut().unwrap() = 0x7c); // the upper half of an infinity or NaN, in the last coefficient
    model.set_budget(u64::MAX).unwrap();
    let error = check(&model, &bytes, model.order().n_blocks() - 1);
    assert!(matches!(&error, RuntimeError::Block { source, .. } if matches!(**source, FormatError::Block { .. })));
}

fn smaller_budget_after_an_error_is_no_error(memory: impl ReadableMemory) {
    let bytes = stacks::small();
    let (source, model) = smallest(&memory, &bytes, Verify::Never);
    source.permit(3, Beyond::Fail);
    model.set_budget(u64::MAX).unwrap();
    model.wait().unwrap_err();
    model.set_budget(model.order().minimum_bytes()).unwrap();
    model.wait().unwrap();
    assert!(model.status().error.is_none() && !model.status().loading);
    assert_eq!(model.snapshot().levels(), [1; 4]);
}

#[test]
fn spikes_outside_their_weight_are_an_error_that_names_block_and_weight_in_storage_that_is_trusted() {
    let bytes = stacks::small();
    let file = StackFile::open(bytes.clone()).unwrap();
    // The last entry of weight 2, of 8 rows: moved to row 63 of its tile.
    let name = "layers.2.weight.block.1.spikes";
    let words = file.read_tensor(name).unwrap().data;
    let at = bytes.windows(words.len()).position(|w| w == words).unwrap() + words.len() - 2;
    let mut bad = bytes;
    bad[at] |= 63;
    for verify in [Verify::Never, Verify::Always] {
        let file = StackFile::open(bad.clone()).unwrap();
        let error = Elastic::open(file, u64::MAX, Options { verify, ..Options::default() }).unwrap_err();
        assert!(
            matches!(&error, RuntimeError::Block { block: 1, weight, .. } if weight == "layers.2.weight"),
            "{error}"
        );
        let expected = if verify == Verify::Never { "entry 8 of a list of spikes has no place" } else { name };
        assert!(in_one_line(&error).contains(expected), "{error}");
    }
}

#[test]
fn opening_fails_with_the_block_that_it_needs_and_starts_with_those_that_it_has() {
    let mut bytes = stacks::small();
    *bytes.last_mut().unwrap() ^= 1;
    let open = |start, budget_bytes| {
        Elastic::open(
            StackFile::open(bytes.clone()).unwrap(),
            budget_bytes,
            Options { verify: Verify::Always, start, ..Options::default() },
        )
    };
    let error = open(Start::Whole, u64::MAX).unwrap_err();
    assert!(matches!(&error, RuntimeError::Block { block: 5, weight, .. } if weight == "layers.3.weight"), "{error}");
    let model = open(Start::Smallest, u64::MAX).unwrap();
    assert!(matches!(model.wait(), Err(RuntimeError::Block { block: 5, .. })));
    assert_eq!(model.snapshot().levels(), [5, 5, 5, 4]);
    let without = open(Start::Whole, model.order().total_bytes() - 1).unwrap();
    assert_eq!(without.snapshot().levels(), [5, 5, 5, 4]);
}
