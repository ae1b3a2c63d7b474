//! A model with the statistics of trained ones, super weights and massive activations, made from one that has neither.

use bitstack_format::{BlockSource, StackFile};
use bitstack_llm::quality::Quality;
use bitstack_llm::{Checkpoint, CompressOptions, Journal};
use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn demo() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../bitstack/demo")
}

/// The built-in model with spikes: in each layer, four channels of the MLP become copies of four others, and `down_proj` gets ±`size` root
/// mean squares at one place of either. What the two say cancels, so the model is one whose channels happen to agree, and quite ordinary;
/// but an error in either place is multiplied by what passes there. The channels are made ten times larger, and their columns of `down_proj`
/// as much smaller, which changes nothing either.
fn with_spikes(directory: &Path, size: f32) {
    let source = demo().join("tiny-llama");
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(source.join(name), directory.join(name)).unwrap();
    }
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut changed: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for (name, view) in tensors.iter() {
        assert_eq!(view.dtype(), Dtype::BF16);
        let values = view.data().chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        changed.insert(name.to_owned(), (view.shape().to_vec(), values));
    }
    for layer in 0..2 {
        let part = |part: &str| format!("model.layers.{layer}.mlp.{part}_proj.weight");
        for i in 0..4 {
            let (one, other) = (17 + 40 * i, 230 + 31 * i);
            for name in ["gate", "up"] {
                let (shape, w) = changed.get_mut(&part(name)).unwrap();
                let cols = shape[1];
                if name == "up" {
                    w[one * cols..][..cols].iter_mut().for_each(|w| *w *= 10.0);
                }
                w.copy_within(one * cols..(one + 1) * cols, other * cols);
            }
            let (shape, w) = changed.get_mut(&part("down")).unwrap();
            let (rows, cols) = (shape[0], shape[1]);
            let rms = (w.iter().map(|w| w * w).sum::<f32>() / w.len() as f32).sqrt();
            for r in 0..rows {
                let half = w[r * cols + one] / 20.0;
                (w[r * cols + one], w[r * cols + other]) = (half, half);
            }
            let spike = bf16::from_f32(size * rms).to_f32();
            w[29 * cols + one] += spike;
            w[29 * cols + other] -= spike;
        }
    }
    let bytes: BTreeMap<&String, Vec<u8>> = changed
        .iter()
        .map(|(name, (_, w))| (name, w.iter().flat_map(|w| bf16::from_f32(*w).to_le_bytes()).collect()))
        .collect();
    let views = changed
        .iter()
        .map(|(name, (shape, _))| (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), &bytes[name]).unwrap()));
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).unwrap();
}

/// The quality that a compression by default measures.
fn compressed(model: &Path, directory: &Path) -> (Quality, usize) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let text = std::fs::read_to_string(demo().join("text.txt")).unwrap();
    let options = CompressOptions { samples: 16, seq_len: Some(128), ..Default::default() };
    let journal = Journal::open(directory, &checkpoint, Some(&text), &options, &()).unwrap();
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
    with_spikes(&model, 40.0);
    let (plain, _) = compressed(&demo().join("tiny-llama"), &directory.path().join("plain.partial"));
    let (spiked, lists) = compressed(&model, &directory.path().join("spiked.partial"));
    assert!(lists >= 2, "the lists of {lists} weights");
    // A factor of two for the noise of a few hundred tokens; .001 is what a good format of 8 bits leaves.
    assert!(spiked.whole().kl < 2.0 * plain.whole().kl.max(0.001), "{} and {}", spiked.whole().kl, plain.whole().kl);
    for (plain, spiked) in plain.sizes.iter().zip(&spiked.sizes).skip(2) {
        // Sizes differ by what the lists take.
        assert!(spiked.kl < 2.0 * plain.kl + 0.001, "{spiked:?} where the plain one has {plain:?}");
    }
}
