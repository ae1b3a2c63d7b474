//! A token allocates nothing.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;
mod stacks;

use allocation_counter::measure;
use bitstack_engine::{Decoder, ElasticModel, KvCache, Pass};
use bitstack_format::StackFile;
use fixtures::checkpoint;

/// What a token behind `n` others of its pass allocates.
fn allocations(n: usize, mut step: impl FnMut(u32)) -> u64 {
    (0..n as u32).for_each(&mut step);
    measure(|| step(5)).count_total
}

/// Caches grow at powers of two.
const CACHED: usize = 17;

#[test]
fn a_token_of_one_sequence_or_of_several_allocates_nothing() {
    let checkpoint = checkpoint("qwen3");
    let bytes = stacks::file(&checkpoint, &stacks::nested(), false);
    let model = ElasticModel::open(StackFile::open(bytes).unwrap(), u64::MAX, Default::default(), &()).unwrap();
    let snapshot = model.elastic().snapshot();
    let packed = model.at(&snapshot).unwrap();
    let dense = Decoder::load(&checkpoint).unwrap();
    for n_sequences in [1, 2] {
        let cache = || KvCache::new(model.config(), 64).unwrap();
        let mut caches: Vec<KvCache> = (0..2 * n_sequences).map(|_| cache()).collect();
        let (of_packed, of_dense) = caches.split_at_mut(n_sequences);
        let mut pass = Pass::new().with_caches(of_packed);
        let found = allocations(CACHED, |token| {
            packed.last_logits(&[token; 2][..n_sequences], &mut pass).unwrap();
        });
        assert_eq!(found, 0, "packed, {n_sequences} sequences");
        let mut pass = Pass::new().with_caches(of_dense);
        let found = allocations(CACHED, |token| {
            dense.last_logits(&[token; 2][..n_sequences], &mut pass).unwrap();
        });
        assert_eq!(found, 0, "dense, {n_sequences} sequences");
    }
}
