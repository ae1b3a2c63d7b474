//! Memory while compressing is that of a layer, not of the model.
#![expect(clippy::print_stdout, reason = "the measurement is worth seeing")]

use bitstack_bench::synthetic::{self, ModelShape};
use bitstack_compress::{BlockMethod, CompressOptions, OrderBy, compress};
use bitstack_exchange::{ExportOptions, export_dense};
use bitstack_model::Checkpoint;
use peak_alloc::PeakAlloc;
use std::path::Path;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// The most memory that compressing a model of `n_layers` layers takes in each order, and the bytes of its checkpoint.
fn peaks(n_layers: usize, orderings: [OrderBy; 2]) -> ([u64; 2], u64) {
    let dir = tempfile::tempdir().unwrap();
    let shape = ModelShape {
        hidden_size: 128,
        intermediate_size: 352,
        n_layers,
        n_heads: 4,
        n_kv_heads: 2,
        vocab_size: 512,
        tied: false,
    };
    let mut draft = synthetic::draft(&shape, 2, 3, dir.path(), &()).unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bitstack-cli/demo/tiny-llama/tokenizer.json");
    draft.push_file("tokenizer.json", &std::fs::read(data).unwrap()).unwrap();
    let model = dir.path().join("model");
    let levels = vec![2; 2 + 7 * n_layers];
    let bytes = export_dense(&draft, &levels, None, &model, &ExportOptions::default(), &()).unwrap();
    drop(draft);

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
    let orderings = [OrderBy::Gain, OrderBy::Perplexity];
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
