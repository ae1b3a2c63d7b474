//! Logits of small models over the cross product of what a config can say, against those of the `transformers` library, frozen in `oracle/expected.json`.
//!
//! `oracle/make.py` says how they are made. A model's elements depend on the names and places of its tensors alone, so only configs and logits are stored;
//! here each is written as a directory, whole or in shards, and opened as a user's directory is.
#![expect(clippy::print_stdout, reason = "the largest difference is worth seeing")]

use bitstack_engine::{Decoder, KvCache, Pass};
use bitstack_model::{Checkpoint, Dense, ModelConfig};
use half::{bf16, f16};
use ndarray::ArrayView1;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;

#[derive(Deserialize)]
struct Expected {
    tokens: Vec<u32>,
    positions: Vec<usize>,
    /// Fields of all configs, then those of each family.
    base: Map<String, Value>,
    families: HashMap<String, Map<String, Value>>,
    cases: Vec<Case>,
    /// With `n_long` tokens, and the logits of the last.
    long: Vec<Case>,
    n_long: usize,
    /// With a cache: `n_first` tokens at first, then one after another.
    stepped: Vec<Case>,
    n_first: usize,
    refused: Vec<Refusal>,
}

#[derive(Deserialize)]
struct Case {
    family: String,
    changes: Map<String, Value>,
    dtype: String,
    shards: usize,
    /// At each of the positions.
    logits: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Refusal {
    family: String,
    changes: Map<String, Value>,
    words: String,
}

impl Expected {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/expected.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn config(&self, family: &str, changes: &Map<String, Value>) -> String {
        let mut config = self.base.clone();
        config.insert("model_type".to_owned(), family.into());
        config.extend(self.families[family].clone());
        config.extend(changes.clone());
        Value::Object(config).to_string()
    }
}

/// The element `i` of a tensor: seven bits of splitmix64 over a counter that begins at the FNV-1a hash of the name.
fn element(name: &str, i: usize) -> f32 {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    let byte = ((z ^ z >> 31) >> 56) as i32;
    if name.ends_with("norm.weight") {
        return 1.0 + (byte / 4 - 32) as f32 / 64.0;
    }
    let scale = match name {
        _ if name.contains("embed_tokens") => 1.0,
        _ if name.contains("q_proj") || name.contains("k_proj") || name.ends_with("bias") => 0.5,
        _ => 0.25,
    };
    (2 * (byte / 2) - 127) as f32 / 128.0 * scale
}

/// Writes the tensors of a config, in as many files as asked for.
fn write_tensors(dir: &Path, config: &ModelConfig, dtype: &str, shards: usize) {
    let matrices = config.weights().into_iter().map(|w| (w.tensor_name(), w.tensor_shape().to_vec()));
    let vectors = config.other_tensors().iter().map(|v| (v.name.clone(), vec![v.len]));
    let (dtype, bytes): (_, fn(f32) -> Vec<u8>) = match dtype {
        "F32" => (Dtype::F32, |v| v.to_le_bytes().to_vec()),
        "BF16" => (Dtype::BF16, |v| bf16::from_f32(v).to_le_bytes().to_vec()),
        "F16" => (Dtype::F16, |v| f16::from_f32(v).to_le_bytes().to_vec()),
        other => unreachable!("no model is stored in {other}"),
    };
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let data: Vec<u8> = (0..shape.iter().product()).flat_map(|i| bytes(element(&name, i))).collect();
        (name, shape, data)
    };
    let tensors: Vec<_> = matrices.chain(vectors).map(tensor).collect();
    let mut places = Map::new();
    for shard in 0..shards {
        let own = tensors.iter().skip(shard).step_by(shards);
        let file = if shards == 1 { "model.safetensors".to_owned() } else { format!("model-{shard}.safetensors") };
        places.extend(own.clone().map(|(name, ..)| (name.clone(), file.clone().into())));
        let views = own.map(|(name, shape, data)| (name, TensorView::new(dtype, shape.clone(), data).unwrap()));
        safetensors::serialize_to_file(views, None, &dir.join(file)).unwrap();
    }
    if shards > 1 {
        let index = json!({"metadata": {}, "weight_map": places});
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// Sums of at most 48 products in f32, in three layers: 1e-4 of the largest logit is some hundred roundings.
const TOLERANCE: f32 = 1e-4;

/// The model of a case, opened with this config.
fn decoder(expected: &Expected, case: &Case, config: &str) -> Decoder<Dense> {
    let what = format!("{} {}", case.family, Value::Object(case.changes.clone()));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let described = ModelConfig::from_json(&expected.config(&case.family, &case.changes));
    let described = described.unwrap_or_else(|error| panic!("{what}: {error}"));
    write_tensors(dir.path(), &described, &case.dtype, case.shards);
    let checkpoint = Checkpoint::open(dir.path()).unwrap_or_else(|error| panic!("{what}: {error}"));
    Decoder::load(&checkpoint).unwrap()
}

/// The largest difference of rows of logits from those expected, as a part of the largest of these.
fn difference<'l>(case: &Case, rows: impl Iterator<Item = ArrayView1<'l, f32>>) -> f32 {
    let scale = case.logits.iter().flatten().fold(0.0_f32, |most, v| most.max(v.abs()));
    let mut largest = 0.0_f32;
    for (i, (found, wanted)) in rows.zip(&case.logits).enumerate() {
        assert_eq!(found.len(), wanted.len());
        for (found, wanted) in found.iter().zip(wanted) {
            let difference = (found - wanted).abs() / scale;
            let Case { family, changes, .. } = case;
            assert!(difference < TOLERANCE, "{family} {changes:?}, row {i}: {found}, expected {wanted}");
            largest = largest.max(difference);
        }
    }
    largest
}

/// [`difference`] of one pass over the tokens, at the positions.
fn difference_of_pass(expected: &Expected, case: &Case, config: &str) -> f32 {
    let logits = decoder(expected, case, config).forward(&expected.tokens, &mut Pass::new()).unwrap();
    difference(case, expected.positions.iter().map(|position| logits.row(*position)))
}

#[test]
fn logits_of_all_configurations_are_those_of_the_reference_library() {
    let expected = Expected::read();
    assert!(expected.cases.len() >= 200);
    let of = |case: &Case| difference_of_pass(&expected, case, &expected.config(&case.family, &case.changes));
    let largest = expected.cases.iter().map(of).fold(0.0, f32::max);
    println!("{} models; the largest difference is {largest:e} of the logits", expected.cases.len());
}

#[test]
fn windows_that_a_config_leaves_out_are_those_of_its_class() {
    let expected = Expected::read();
    let tokens: Vec<u32> = (0..expected.n_long as u32).map(|i| (7 * i * i + 3 * i + 1) % 40).collect();
    for case in &expected.long {
        let model = decoder(&expected, case, &expected.config(&case.family, &case.changes));
        let logits = model.forward(&tokens, &mut Pass::new()).unwrap();
        difference(case, std::iter::once(logits.row(tokens.len() - 1)));
    }
}

#[test]
fn frequencies_that_change_with_the_length_do_so_token_by_token() {
    let expected = Expected::read();
    for case in &expected.stepped {
        let model = decoder(&expected, case, &expected.config(&case.family, &case.changes));
        let mut cache = KvCache::new(model.config(), expected.tokens.len()).unwrap();
        let (first, rest) = expected.tokens.split_at(expected.n_first);
        let pieces = std::iter::once(first).chain(rest.chunks(1));
        let logits: Vec<_> =
            pieces.map(|piece| model.forward(piece, &mut Pass::new().with_cache(&mut cache)).unwrap()).collect();
        let rows: Vec<_> = logits.iter().flat_map(|logits| logits.rows()).collect();
        difference(case, expected.positions.iter().map(|position| rows[*position]));
    }
}

/// The library warns, and keeps the head that is stored.
#[test]
fn a_head_that_differs_from_tied_embeddings_is_the_head() {
    let expected = Expected::read();
    let untied = |case: &&Case| case.family == "llama" && !case.changes.contains_key("tie_word_embeddings");
    let case = expected.cases.iter().find(untied).unwrap();
    let mut changes = case.changes.clone();
    changes.insert("tie_word_embeddings".to_owned(), true.into());
    let tied = expected.config("llama", &changes);
    difference_of_pass(&expected, case, &tied);
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let expected = Expected::read();
    for Refusal { family, changes, words } in &expected.refused {
        let what = format!("{family} {}", Value::Object(changes.clone()));
        let error = ModelConfig::from_json(&expected.config(family, changes)).expect_err(&what).to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{what}: {error}");
    }
}
