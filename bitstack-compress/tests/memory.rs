//! Memory while compressing is that of a layer, not of the model.
#![expect(clippy::print_stdout, reason = "the measurement is worth seeing")]

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use bitstack_compress::{BlockMethod, CompressOptions, Ordering, compress};
use bitstack_model::{Checkpoint, ModelConfig};
use fixtures::{data, write_tensors};
use peak_alloc::PeakAlloc;
use safetensors::Dtype;
use serde_json::json;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// The most memory that compressing a model of `n_layers` layers takes in each order, and the bytes of its checkpoint.
fn peaks(n_layers: usize, orderings: [Ordering; 2]) -> ([u64; 2], u64) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": n_layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
    });
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    std::fs::copy(data("reference/tokenizer.json"), model.join("tokenizer.json")).unwrap();
    let config = ModelConfig::from_json(&config.to_string()).unwrap();
    let weights = config.weights().into_iter().map(|spec| {
        let value = |i: usize| ((i * 7919 % 1009) as f32 / 504.0 - 1.0) / (spec.cols as f32).sqrt();
        (spec.tensor_name(), (spec.tensor_shape().to_vec(), (0..spec.rows * spec.cols).map(value).collect()))
    });
    let vectors = config.other_tensors().into_iter().map(|spec| (spec.name, (vec![spec.len], vec![1.0; spec.len])));
    write_tensors(&model, Dtype::BF16, weights.chain(vectors));
    let bytes = Checkpoint::open(&model).unwrap().stored_bytes();

    let text = "All happy families are alike; each unhappy family is unhappy in its own way. ".repeat(20);
    let peaks = orderings.map(|ordering| {
        let checkpoint = Checkpoint::open(&model).unwrap();
        let options = CompressOptions {
            method: BlockMethod::Avd,
            rank: Some(1),
            n_blocks: Some(3),
            ordering,
            samples: 4,
            seq_len: Some(16),
            ..Default::default()
        };
        let before = MEMORY.current_usage();
        MEMORY.reset_peak_usage();
        compress(&checkpoint, Some(&text), &options, dir.path(), &()).unwrap();
        (MEMORY.peak_usage() - before) as u64
    });
    (peaks, bytes)
}

/// The orders run the whole model, over and over; that too needs no more than one layer of it at a time.
#[test]
fn memory_does_not_grow_with_the_number_of_layers() {
    let orderings = [Ordering::Gain, Ordering::Perplexity];
    // Buffers that threads make once, 200 MB of them, are there after a first run.
    peaks(4, orderings);
    let (few, few_bytes) = peaks(4, orderings);
    let (many, many_bytes) = peaks(16, orderings);
    let added = many_bytes - few_bytes;
    for ((ordering, few), many) in orderings.iter().zip(few).zip(many) {
        println!("{ordering:?}: {few} bytes at 4 layers, {many} at 16, whose further weights take {added} on disk");
        // Names, norms and lists of blocks grow: some 35 kilobytes per layer, of 369 on disk, which are 739 as f32. What the threads happen to
        // hold at the same time makes another tenth of a layer.
        assert!(many < few + added / 4, "{ordering:?}: {few}, {many}, {added}");
    }
}
