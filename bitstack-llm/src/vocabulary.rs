//! What the parts of an embedding, or of a head, count for.

use crate::{WeightRole, WeightSpec};

/// Tokens for every token of the text that are taken to be spread evenly over the vocabulary: texts of other kinds use what this one does not.
const UNSEEN: f64 = 0.02;

/// Shares what was measured of the parts of an embedding, and of those of a head, by how frequent their tokens are in a text: to each part the
/// mean of its share of what was measured and its share of the tokens. A run on a hundred tokens meets few of the rare ones, or none.
///
/// Errors count as often as their rows are used: looked up, or predicted (own derivation: with logits off by δ the divergence is
/// ½ Var_p(δ), which weighs each token by its probability).
pub(crate) fn share_by_frequency(divergences: &mut [f64], specs: &[WeightSpec], tokens: &[u32]) {
    for role in [WeightRole::Embedding, WeightRole::Head] {
        let parts: Vec<usize> = (0..specs.len()).filter(|&weight| specs[weight].role == role).collect();
        if parts.len() < 2 || tokens.is_empty() {
            continue;
        }
        let sum: f64 = parts.iter().map(|&part| divergences[part].max(0.0)).sum();
        for part in parts {
            let spec = &specs[part];
            let rows = spec.first_row..spec.first_row + spec.rows;
            let seen = tokens.iter().filter(|token| rows.contains(&(**token as usize))).count();
            let evenly = spec.rows as f64 / spec.tensor_rows as f64;
            let frequency = (seen as f64 / tokens.len() as f64 + UNSEEN * evenly) / (1.0 + UNSEEN);
            divergences[part] = 0.5 * (divergences[part].max(0.0) + sum * frequency);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::stack::StackModel;
    use crate::{
        Checkpoint, CompressOptions, Compressed, Decoder, ExportOptions, FloatType, Pass, compress, export_dense,
    };
    use bitstack_core::Shape;
    use bitstack_format::{BlockSource, Draft, Dtype, StackFile};
    use safetensors::tensor::TensorView;

    /// A model of the tests with 5000 tokens in place of its 96: those again, each time a little larger.
    pub(crate) fn with_large_vocabulary(name: &str) -> (tempfile::TempDir, Checkpoint) {
        const TOKENS: usize = 5000;
        let small = Checkpoint::open(format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut config: serde_json::Value = serde_json::from_str(small.config_text()).unwrap();
        config["vocab_size"] = TOKENS.into();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let bytes = |values: Vec<f32>| values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
        let mut tensors = Vec::new();
        for spec in small.config().weights() {
            let values = small.weight(&spec).unwrap().into_elements().into_f32();
            let mut shape = spec.tensor_shape();
            let values = if spec.layer.is_none() {
                shape[0] = TOKENS;
                let row = |token: usize| &values[token % spec.rows * spec.cols..][..spec.cols];
                let grown = |token: usize| row(token).iter().map(move |w| w * (1.0 + token as f32 / 9000.0));
                (0..TOKENS).flat_map(grown).collect()
            } else {
                values
            };
            tensors.push((spec.tensor_name(), shape.to_vec(), bytes(values)));
        }
        for spec in small.config().other_tensors() {
            tensors.push((spec.name.clone(), vec![spec.len], bytes(small.vector(&spec).unwrap())));
        }
        let views = tensors
            .iter()
            .map(|(name, shape, data)| (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap()));
        std::fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        (dir, checkpoint)
    }

    #[test]
    fn a_vocabulary_is_cut_into_16_parts_at_most_and_a_small_one_not() {
        let config =
            Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/llama")).unwrap().config().clone();
        for (tokens, rows, parts) in
            [(96, 96, 1), (2048, 2048, 1), (2049, 2048, 2), (49152, 3072, 16), (151_936, 9536, 16), (128_256, 8064, 16)]
        {
            let mut config = config.clone();
            (config.vocab_size, config.vocab_part_rows) = (tokens, tokens);
            let cut = config.clone().cut_vocabulary();
            assert_eq!((cut.vocab_part_rows, cut.vocab_parts()), (rows, parts), "{tokens}");
            let names: Vec<String> = cut.weights().into_iter().map(|spec| spec.name).collect();
            assert_eq!(config.clone().cut_as(names.iter().map(|name| &name[..])), cut);
            let of_role = |role| {
                let weights = cut.weights().into_iter().filter(move |spec| spec.role == role);
                weights.map(|spec| (spec.tensor_rows, spec.rows)).reduce(|a, b| (a.0, a.1 + b.1))
            };
            assert_eq!([WeightRole::Embedding, WeightRole::Head].map(of_role), [Some((tokens, tokens)); 2]);
        }
        // Names that lie about the parts are names of nothing.
        for name in
            ["model.embed_tokens.rows.1", "model.embed_tokens.rows.96", "model.embed_tokens.rows.x", "lm_head.rows.9"]
        {
            assert_eq!(config.clone().cut_as([name].into_iter()), config, "{name}");
        }
    }

    #[test]
    fn a_model_in_parts_is_the_model() {
        for name in ["llama", "llama31"] {
            let (_dir, checkpoint) = with_large_vocabulary(name);
            let cut = checkpoint.with_cut_vocabulary();
            assert_eq!(cut.config().vocab_parts(), 3);
            let [whole, parts] = [&checkpoint, &cut].map(|c| Decoder::load(c).unwrap());
            for tokens in [&[4999u32][..], &[0, 2047, 2048, 4095, 4096, 4999, 17, 3000]] {
                let [whole, parts] = [&whole, &parts].map(|model| model.forward(tokens, &mut Pass::new()).unwrap());
                assert_eq!(whole, parts, "{name}");
            }
            let specs = cut.config().weights();
            let rows: Vec<f32> = specs[..3].iter().flat_map(|s| cut.matrix(s).unwrap().into_iter()).collect();
            let whole = checkpoint.matrix(&checkpoint.config().weights()[0]).unwrap();
            assert_eq!(rows, whole.into_raw_vec_and_offset().0);
        }
    }

    #[test]
    fn a_large_vocabulary_is_compressed_in_parts_and_exported_whole() {
        for (name, n_parts) in [("llama", 6), ("llama31", 3)] {
            let (_dir, checkpoint) = with_large_vocabulary(name);
            let options =
                CompressOptions { n_blocks: Some(4), samples: 2, seq_len: Some(24), ..CompressOptions::default() };
            let Compressed { draft, order } =
                compress(&checkpoint, None, &options, &std::env::temp_dir(), &()).unwrap();
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
    fn parts_share_what_was_measured_of_them_all_half_of_it_by_their_tokens() {
        let part = |role, first_row| WeightSpec {
            name: String::new(),
            first_row,
            rows: 10,
            tensor_rows: 20,
            cols: 1,
            role,
            layer: None,
        };
        let specs = [
            part(WeightRole::Embedding, 0),
            part(WeightRole::Embedding, 10),
            part(WeightRole::Query, 0),
            part(WeightRole::Head, 0),
        ];
        let mut found = [3.0, 1.0, 7.0, 5.0];
        share_by_frequency(&mut found, &specs, &[1, 2, 3, 4, 5, 9, 9, 19]);
        // Seven tokens of eight, and half of those that might come.
        let frequency = (7.0 / 8.0 + UNSEEN / 2.0) / (1.0 + UNSEEN);
        assert!((found[0] - 0.5 * (3.0 + 4.0 * frequency)).abs() < 1e-12, "{found:?}");
        assert!((found[0] + found[1] - 4.0).abs() < 1e-12 && found[2..] == [7.0, 5.0], "{found:?}");
        let mut rare = [0.0, 4.0, 7.0, 5.0];
        share_by_frequency(&mut rare, &specs, &[11]);
        assert!(rare[0] > 0.0, "no part is worth nothing: {rare:?}");
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
}
