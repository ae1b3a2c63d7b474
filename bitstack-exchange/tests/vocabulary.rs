//! Vocabularies that are cut into parts: compressed in parts, exported whole.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use bitstack_compress::{CompressOptions, Compressed, compress};
use bitstack_core::Shape;
use bitstack_engine::stack::StackModel;
use bitstack_engine::{Decoder, Pass};
use bitstack_exchange::{ExportOptions, FloatType, export_dense};
use bitstack_format::{BlockSource, Draft, Dtype, StackFile};
use bitstack_model::Checkpoint;
use fixtures::with_large_vocabulary;

#[test]
fn a_large_vocabulary_is_compressed_in_parts_and_exported_whole() {
    for (name, n_parts) in [("llama", 6), ("llama31", 3)] {
        let (_dir, checkpoint) = with_large_vocabulary(name);
        let options =
            CompressOptions { n_blocks: Some(4), samples: 2, seq_len: Some(24), ..CompressOptions::default() };
        let Compressed { draft, order } = compress(&checkpoint, None, &options, &std::env::temp_dir(), &()).unwrap();
        let mut bytes = Vec::new();
        draft.finish(order.weights(), &mut bytes, &mut |_, _| {}).unwrap();
        let file = StackFile::open(bytes).unwrap();
        let parts = file.weights().iter().filter(|w| w.name.contains(".rows."));
        assert_eq!(parts.count(), n_parts);
        // Sizes between which parts differ.
        let levels = order.plan((order.minimum_bytes() + order.total_bytes()) / 2).unwrap().levels;
        let tokens: Vec<u32> = (0..20).map(|i| i * 263 % 5000).collect();
        let model = StackModel::open(&file, &levels, &()).unwrap().into_decoder();
        let logits = model.forward(&tokens, &mut Pass::new()).unwrap();

        let out = tempfile::tempdir().unwrap();
        let dir = out.path().join("dense");
        export_dense(&file, &levels, Some(FloatType::F32), &dir, &ExportOptions::default(), &()).unwrap();
        let dense = Checkpoint::open(&dir).unwrap();
        assert_eq!(dense.config().vocab_parts(), 1);
        let exported = Decoder::load(&dense).unwrap().forward(&tokens, &mut Pass::new()).unwrap();
        assert_eq!(exported, logits, "{name}");

        // A kept embedding stays whole.
        let kept = CompressOptions { keep_embeddings: true, n_blocks: Some(1), ..options };
        let Compressed { draft, .. } = compress(&checkpoint, None, &kept, &std::env::temp_dir(), &()).unwrap();
        assert!(draft.weights().iter().all(|w| w.name.starts_with("model.layers.")));
    }
}

#[test]
fn a_part_that_is_missing_is_named() {
    let (_dir, checkpoint) = with_large_vocabulary("llama31");
    let specs = checkpoint.with_cut_vocabulary().config().weights();
    let mut draft = Draft::create_on(Vec::new(), "memory");
    for (name, contents) in checkpoint.companions().unwrap() {
        draft.push_file(&name, &contents).unwrap();
    }
    for spec in checkpoint.config().other_tensors() {
        draft.push_base(&spec.name, Dtype::F32, &[spec.len], &vec![0; 4 * spec.len]).unwrap();
    }
    // The whole tensor is no stand-in for the first part.
    let bytes = vec![0; 4 * specs[0].tensor_rows * specs[0].cols];
    draft.push_base(&specs[0].tensor_name(), Dtype::F32, &specs[0].tensor_shape(), &bytes).unwrap();
    draft.add_weight(&specs[1].name, Shape::new(specs[1].rows, specs[1].cols).unwrap(), 1, "nested").unwrap();
    let out = tempfile::tempdir().unwrap();
    let options = ExportOptions::default();
    let opened = StackModel::open(&draft, &[1], &()).unwrap_err().to_string();
    let exported = export_dense(&draft, &[1], None, &out.path().join("x"), &options, &()).unwrap_err().to_string();
    for error in [opened, exported] {
        assert!(error.contains("model.embed_tokens.rows.0"), "{error}");
    }
}
