//! Every tensor of a checkpoint is accounted for: used, known to follow from the config, or refused by name.

#[path = "fixtures/mod.rs"]
mod fixtures;

use bitstack_model::{Checkpoint, CheckpointLimits, ModelError};
use fixtures::{Named, checkpoint, data, tensors, write_tensors};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A test model with some fields of its config set and other tensors.
fn model(name: &str, fields: Value, change: impl FnOnce(&mut Vec<Named>)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let original = checkpoint(name);
    let mut config: Value = serde_json::from_str(original.config_text()).unwrap();
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut all = tensors(&original);
    change(&mut all);
    write_tensors(dir.path(), Dtype::F32, all);
    dir
}

fn with(name: &str, extra: &[&str]) -> TempDir {
    model(name, json!({}), |all| all.extend(extra.iter().map(|name| ((*name).to_owned(), (vec![2], vec![0.5, 1.0])))))
}

fn open_ignoring(dir: &Path, patterns: &[&str]) -> Result<Checkpoint, ModelError> {
    let patterns: Vec<String> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
    Checkpoint::open_ignoring(dir, &patterns, &CheckpointLimits::default())
}

#[test]
fn tensors_that_are_left_over_are_named_with_what_they_are() {
    for (extra, what) in [
        (&["model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.bias"][..], "a bias that config.json"),
        (&["model.layers.0.self_attn.q_proj.lora_A.weight", "base_model.model.lora_B.weight"], "an adapter"),
        (
            &["model.layers.2.input_layernorm.weight", "model.layers.11.mlp.up_proj.weight"],
            "num_hidden_layers, which is 2",
        ),
        (&["model.layers.0.self_attn.q_norm.weight"], "a norm that the architecture"),
        (&["model.layers.0.mlp.up_proj.weight_scale_inv"], "quantised"),
        (&["model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.scales"], "quantised"),
        (&["something", "score.weight", "visual.1", "visual.2", "visual.3"], "and 2 more"),
    ] {
        let dir = with("llama", extra);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert!(matches!(error, ModelError::UnusedTensors { count, .. } if count == extra.len()), "{error}");
        let error = error.to_string();
        assert!(error.contains(what) && !error.contains('\n'), "{error}");
        assert!(extra.iter().any(|name| error.contains(name)), "{error}");
        let opened = open_ignoring(dir.path(), &["*"]).unwrap();
        assert_eq!(tensors(&opened).len(), tensors(&checkpoint("llama")).len());
    }
}

#[test]
fn patterns_let_be_what_they_match_and_nothing_else() {
    let dir = with("llama", &["visual.1", "visual.2", "audio"]);
    for (patterns, left) in [(&["visual.*"][..], 1), (&["visual.1", "a*"], 1), (&["visual"], 3), (&["v*", "audio"], 0)]
    {
        match open_ignoring(dir.path(), patterns) {
            Ok(_) => assert_eq!(left, 0, "{patterns:?}"),
            Err(ModelError::UnusedTensors { count, .. }) => assert_eq!(count, left, "{patterns:?}"),
            Err(other) => panic!("{other}"),
        }
    }
    // What is used cannot be ignored.
    assert!(open_ignoring(&data("llama"), &["*"]).is_ok());
}

#[test]
fn tensors_that_follow_from_the_config_are_let_be() {
    let derived =
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "model.layers.1.attn.masked_bias"];
    assert!(Checkpoint::open(with("qwen3", &derived).path()).is_ok());
}

/// Adds a head to the embedding, the same but for the factor.
fn with_head(factor: f32) -> TempDir {
    model("llama31", json!({}), |all| {
        let (_, (shape, values)) = all[0].clone();
        all.push(("lm_head.weight".to_owned(), (shape, values.into_iter().map(|v| v * factor).collect())));
    })
}

#[test]
fn a_head_equal_to_tied_embeddings_is_dropped_and_another_one_is_used() {
    let dir = with_head(1.0);
    let same = Checkpoint::open(dir.path()).unwrap();
    assert!(same.config().tied && same.remarks().is_empty());

    let dir = with_head(1.5);
    let other = Checkpoint::open(dir.path()).unwrap();
    assert!(!other.config().tied);
    let [remark] = other.remarks() else { panic!("{:?}", other.remarks()) };
    assert!(remark.contains("tie_word_embeddings") && remark.contains("lm_head.weight"), "{remark}");
    let all = tensors(&other);
    let values = |name: &str| all.iter().find(|(n, _)| n == name).unwrap().1.1.clone();
    assert!(values("lm_head.weight").iter().zip(values("model.embed_tokens.weight")).all(|(h, e)| *h == e * 1.5));
    // The config that travels with the model says what it is.
    let (name, text) = &other.companions().unwrap()[0];
    let config: Value = serde_json::from_slice(text).unwrap();
    assert_eq!((&name[..], &config["tie_word_embeddings"]), ("config.json", &json!(false)));
    assert_eq!(other.config_text().as_bytes(), text);

    let short = model("llama31", json!({}), |all| all.push(("lm_head.weight".to_owned(), (vec![2], vec![0.5, 1.0]))));
    let error = Checkpoint::open(short.path()).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight") && error.contains("[2]"), "{error}");
}

#[test]
fn an_index_may_be_wrong_about_tensors_that_are_not_used() {
    let index = |change: &dyn Fn(&mut Value)| {
        let dir = tempfile::tempdir().unwrap();
        for file in fs::read_dir(data("qwen2")).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
        }
        let path = dir.path().join("model.safetensors.index.json");
        let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut index["weight_map"]);
        fs::write(path, index.to_string()).unwrap();
        Checkpoint::open(dir.path())
    };
    let first = "model-00001-of-00002.safetensors";
    assert!(index(&|map| map["model.rotary_emb.inv_freq"] = json!(first)).is_ok());
    assert!(index(&|map| map["lm_head.weight"] = json!(first)).is_ok());
    let error = index(&|map| map["model.norm.weight"] = json!(first)).unwrap_err().to_string();
    assert!(error.contains("model.norm.weight is not in") && error.contains(first), "{error}");
    assert!(index(&|map| map["x"] = json!("gone.safetensors")).is_err());
}

#[test]
fn a_checkpoint_finds_its_end_tokens_in_the_files_beside_it() {
    let dir = model("llama", json!({"eos_token_id": 2}), |_| {});
    let ends = |name: &str, contents: Value| {
        fs::write(dir.path().join(name), contents.to_string()).unwrap();
        Checkpoint::open(dir.path()).unwrap().config().eos_tokens.clone()
    };
    assert_eq!(ends("tokenizer_config.json", json!({"eos_token": "</s>"})), [2]);
    assert_eq!(ends("generation_config.json", json!({"eos_token_id": [0]})), [0]);
}
