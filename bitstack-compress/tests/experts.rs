//! Experts that no token of the calibration meets.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use bitstack_compress::{BlockMethod, CompressOptions, compress};
use bitstack_engine::Decoder;
use bitstack_engine::eval::compare;
use bitstack_engine::stack::StackModel;
use bitstack_format::{BlockSource, StackFile};
use bitstack_model::Checkpoint;
use fixtures::{checkpoint, tensors, write_tensors};
use safetensors::Dtype;
use tempfile::TempDir;

/// Qwen3-MoE whose last two experts, of six, no token ever goes through: scores are ±a, ±b and twice 0, and the two largest count.
fn with_unmet_experts() -> (TempDir, Checkpoint) {
    let original = checkpoint("qwen3_moe");
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("config.json"), original.config_text()).unwrap();
    let changed = tensors(&original).into_iter().map(|(name, (shape, mut values))| {
        if name == "model.layers.1.mlp.gate.weight" {
            let cols = shape[1];
            for (to, from, factor) in [(1, 0, -1.0), (3, 2, -1.0), (4, 0, 0.0), (5, 0, 0.0)] {
                for c in 0..cols {
                    values[to * cols + c] = factor * values[from * cols + c];
                }
            }
        }
        (name, (shape, values))
    });
    write_tensors(directory.path(), Dtype::F32, changed);
    let changed = Checkpoint::open(directory.path()).unwrap();
    (directory, changed)
}

#[test]
fn experts_that_no_token_meets_come_last_and_break_nothing() {
    let (_directory, checkpoint) = with_unmet_experts();
    // With all blocks: ten bits for each weight, and sixteen blocks of rank 1, each of which leaves a third or so of what was left.
    for (method, most) in [(BlockMethod::Nested, 1e-3), (BlockMethod::Avd, 2e-2)] {
        let options = CompressOptions { method, samples: 8, seq_len: Some(32), ..Default::default() };
        let made = compress(&checkpoint, None, &options, &std::env::temp_dir(), &()).unwrap();
        let mut bytes = Vec::new();
        made.draft.finish(made.order.weights(), &mut bytes, &mut |_, _| {}).unwrap();
        let file = StackFile::open(bytes).unwrap();

        // Where in the order the blocks 2 to 4 of experts are, on average.
        let names: Vec<&str> = file.weights().iter().map(|weight| &weight.name[..]).collect();
        let mean_place = |is_of: &dyn Fn(&str) -> bool| {
            let mut places = Vec::new();
            let mut levels = vec![0; names.len()];
            for (place, weight) in file.order().iter().enumerate() {
                levels[*weight as usize] += 1;
                if (2..=4).contains(&levels[*weight as usize]) && is_of(names[*weight as usize]) {
                    places.push(place as f64);
                }
            }
            places.iter().sum::<f64>() / places.len() as f64
        };
        let is_unmet = |name: &str| name.contains("experts.4.") || name.contains("experts.5.");
        let (met, unmet) = (mean_place(&|name| name.contains(".experts.") && !is_unmet(name)), mean_place(&is_unmet));
        assert!(unmet > met + names.len() as f64 / 2.0, "{method:?}: {unmet} and {met}");

        // The rest of the model is none the worse.
        let levels: Vec<u32> = file.weights().iter().map(|weight| weight.n_blocks() as u32).collect();
        let model = StackModel::open(&file, &levels, &()).unwrap();
        let tokens: Vec<u32> = (0..40).map(|i| (i * i * 5 + 3) % 96).collect();
        let original = Decoder::load(&checkpoint).unwrap();
        let kl = compare(model.decoder(), &original, &[&tokens], &()).unwrap().kl.unwrap().mean;
        assert!(kl < most, "{method:?}: {kl}");
    }
}
