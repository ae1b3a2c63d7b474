//! A token allocates nothing.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;
mod stacks;

use allocation_counter::measure;
use bitstack_engine::device::Cpu;
use bitstack_engine::sample::{Continuation, GenerateOptions, PIECE};
use bitstack_engine::{Decoder, ElasticModel, KvCache, Pass, SamplingOptions, Workspace, stack};
use bitstack_format::StackFile;
use bitstack_model::Checkpoint;
use fixtures::{checkpoint, demo};

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

#[test]
fn a_long_prompt_takes_no_more_memory_than_is_said_before() {
    let checkpoint = Checkpoint::open(demo().join("tiny-llama")).unwrap();
    let config = checkpoint.config().clone();
    let bytes = stacks::file(&checkpoint, &stacks::nested(), false);
    let model = ElasticModel::open(StackFile::open(bytes).unwrap(), u64::MAX, Default::default(), &()).unwrap();
    let snapshot = model.elastic().snapshot();
    let decoder = model.at(&snapshot).unwrap();
    let text = std::fs::read_to_string(demo().join("text.txt")).unwrap();
    let tokenizer = stack::tokenizer(model.elastic().file()).unwrap();
    let n = 2 * PIECE - 12;
    let mut prompt = text;
    while tokenizer.encode(&prompt).unwrap().len() > n {
        prompt.truncate(prompt.floor_char_boundary(prompt.len() * 9 / 10));
    }
    let n = tokenizer.encode(&prompt).unwrap().len();
    assert!(n > 5 * PIECE / 4, "more than one piece: {n}");
    // One thread, on which everything is counted.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().unwrap();
    pool.install(|| {
        let said = KvCache::full_bytes(&config, n + 4) + Workspace::most_bytes(&config, PIECE, n + 4);
        let tokens = tokenizer.encode(&prompt).unwrap();
        let options = GenerateOptions::new(4, SamplingOptions::greedy());
        let new = || Continuation::<Cpu>::new(&config, &tokenizer, &tokens, &options).unwrap();
        let run = || {
            let mut text = new();
            while text.step(&decoder).unwrap().is_some() {}
            text
        };
        // The matrix library puts aside room for its packed panels, once: twice the last cache, of which it touches what it uses.
        run();
        let mut text = None;
        let found = measure(|| text = Some(run()));
        let text = text.unwrap();
        assert!(text.cache_bytes() <= KvCache::full_bytes(&config, n + 4), "{} of {n} + 4", text.cache_bytes());
        assert!(found.bytes_max <= said, "{} bytes, said {said}", found.bytes_max);
        assert!(3 * found.bytes_max > said, "{} bytes, said {said}: not three times as much", found.bytes_max);
    });
}
