//! A model with the statistics of trained ones, super weights and massive activations, made from one that has neither.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use bitstack_compress::{BlockMethod, CompressOptions, Journal};
use bitstack_engine::quality::Quality;
use bitstack_format::{BlockSource, StackFile};
use bitstack_model::Checkpoint;
use fixtures::{data, demo};
use half::bf16;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors by name: shape and values.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A copy of a model with other tensors, in bf16.
fn with_tensors(source: &Path, directory: &Path, change: impl FnOnce(&mut Tensors)) {
    let checkpoint = Checkpoint::open(source).unwrap();
    for (name, contents) in checkpoint.companions().unwrap() {
        std::fs::write(directory.join(name), contents).unwrap();
    }
    let mut tensors = Tensors::from_iter(fixtures::tensors(&checkpoint));
    change(&mut tensors);
    fixtures::write_tensors(directory, Dtype::BF16, tensors);
}

fn rms(values: &[f32]) -> f32 {
    (values.iter().map(|w| w * w).sum::<f32>() / values.len() as f32).sqrt()
}

/// Spikes for the built-in model: in each layer, four channels of the MLP become copies of four others, and `down_proj` gets ±`size` root
/// mean squares at one place of either. What the two say cancels, so the model is one whose channels happen to agree, and quite ordinary;
/// but an error in either place is multiplied by what passes there. The channels are made ten times larger, and their columns of `down_proj`
/// as much smaller, which changes nothing either.
fn add_spikes(tensors: &mut Tensors, size: f32) {
    for layer in 0..2 {
        let part = |part: &str| format!("model.layers.{layer}.mlp.{part}_proj.weight");
        for i in 0..4 {
            let (one, other) = (17 + 40 * i, 230 + 31 * i);
            for name in ["gate", "up"] {
                let (shape, w) = tensors.get_mut(&part(name)).unwrap();
                let cols = shape[1];
                if name == "up" {
                    w[one * cols..][..cols].iter_mut().for_each(|w| *w *= 10.0);
                }
                w.copy_within(one * cols..(one + 1) * cols, other * cols);
            }
            let (shape, w) = tensors.get_mut(&part("down")).unwrap();
            let (rows, cols) = (shape[0], shape[1]);
            let rms = rms(w);
            for r in 0..rows {
                let half = w[r * cols + one] / 20.0;
                (w[r * cols + one], w[r * cols + other]) = (half, half);
            }
            let spike = bf16::from_f32(size * rms).to_f32();
            w[29 * cols + one] += spike;
            w[29 * cols + other] -= spike;
        }
    }
}

/// The quality that a compression by default measures.
fn compressed(model: &Path, text: Option<&str>, directory: &Path) -> (Quality, usize) {
    compressed_with(CompressOptions::default(), model, text, directory)
}

/// The quality that a compression measures, and how many weights have a list.
fn compressed_with(options: CompressOptions, model: &Path, text: Option<&str>, directory: &Path) -> (Quality, usize) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let options = CompressOptions { samples: 16, seq_len: Some(128), ..options };
    let journal = Journal::open(directory, &checkpoint, text, &options, &()).unwrap();
    let compressed = journal.compress(&()).unwrap();
    let mut bytes = Vec::new();
    compressed.draft.finish(compressed.order.weights(), &mut bytes, &mut |_, _| {}).unwrap();
    let file = StackFile::open(bytes).unwrap();
    let lists = file.weights().iter().filter(|w| w.blocks[0].spike_words > 0).count();
    (Quality::of(&file).unwrap(), lists)
}

#[test]
fn a_model_with_super_weights_and_massive_activations_is_as_good_as_one_without() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let source = demo().join("tiny-llama");
    with_tensors(&source, &model, |tensors| add_spikes(tensors, 40.0));
    let text = std::fs::read_to_string(demo().join("text.txt")).unwrap();
    let (plain, _) = compressed(&source, Some(&text), &directory.path().join("plain.partial"));
    let (spiked, lists) = compressed(&model, Some(&text), &directory.path().join("spiked.partial"));
    assert!(lists >= 2, "the lists of {lists} weights");
    // A factor of two for the noise of a few hundred tokens; .001 is what a good format of 8 bits leaves.
    assert!(spiked.whole().kl < 2.0 * plain.whole().kl.max(0.001), "{} and {}", spiked.whole().kl, plain.whole().kl);
    for (plain, spiked) in plain.sizes.iter().zip(&spiked.sizes).skip(2) {
        // Sizes differ by what the lists take.
        assert!(spiked.kl < 2.0 * plain.kl + 0.001, "{spiked:?} where the plain one has {plain:?}");
    }
}

#[test]
fn the_published_method_keeps_super_weights_where_it_is_told_to() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("model");
    std::fs::create_dir(&model).unwrap();
    with_tensors(&demo().join("tiny-llama"), &model, |tensors| add_spikes(tensors, 40.0));
    let text = std::fs::read_to_string(demo().join("text.txt")).unwrap();
    let [(without, none), (with, lists)] = [false, true].map(|spikes| {
        let options = CompressOptions { method: BlockMethod::Avd, n_blocks: Some(6), spikes, ..Default::default() };
        compressed_with(options, &model, Some(&text), &directory.path().join(format!("{spikes}.partial")))
    });
    assert!(none == 0 && lists >= 2, "the lists of {lists} weights, and of {none} where there should be none");
    // By .6 to .9: singular vectors can be few weights too, so the published method is not lost without a list.
    for (with, without) in with.sizes.iter().zip(&without.sizes) {
        assert!(with.kl < without.kl, "{with:?} with, {without:?} without");
    }
}

/// As in Qwen2.5: keys whose biases are a hundred times what the projection adds, a projection with a few weights far outside its envelope,
/// and tokens whose rows of the embedding have some.
#[test]
fn spikes_under_large_biases_and_in_the_embedding_cost_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let source = data("qwen2");
    with_tensors(&source, &model, |tensors| {
        for layer in 0..2 {
            let part = |part: &str| format!("model.layers.{layer}.self_attn.k_proj.{part}");
            let (_, bias) = tensors.get_mut(&part("bias")).unwrap();
            bias.iter_mut().enumerate().for_each(|(i, b)| *b = if i % 3 == 0 { 40.0 } else { -7.0 } * (1.0 + *b));
            let (shape, w) = tensors.get_mut(&part("weight")).unwrap();
            let (cols, spike) = (shape[1], 30.0 * rms(w));
            (w[3 * cols + 5], w[7 * cols + 11], w[7 * cols + 12]) = (spike, -spike, spike / 2.0);
        }
        let (shape, w) = tensors.get_mut("model.embed_tokens.weight").unwrap();
        let (cols, spike) = (shape[1], 12.0 * rms(w));
        for token in (0..shape[0]).step_by(9) {
            w[token * cols + token % 7] += spike;
        }
    });
    let (plain, _) = compressed(&source, None, &directory.path().join("plain.partial"));
    let (spiked, lists) = compressed(&model, None, &directory.path().join("spiked.partial"));
    assert!(lists >= 3, "the lists of {lists} weights");
    assert!(spiked.whole().kl < 2.0 * plain.whole().kl.max(0.001), "{} and {}", spiked.whole().kl, plain.whole().kl);
}
