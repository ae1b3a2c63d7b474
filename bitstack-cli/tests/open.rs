//! Model directories that hold more than their config describes, as a user of the command meets them.

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::str;
use tempfile::TempDir;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo")
}

/// A copy of the built-in model, with other fields in its config, and one tensor of one number more where it has a name.
fn model(fields: Value, extra: Option<&str>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(demo().join("tiny-llama")).unwrap() {
        let file = file.unwrap();
        fs::write(dir.path().join(file.file_name()), fs::read(file.path()).unwrap()).unwrap();
    }
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    fs::write(path, config.to_string()).unwrap();
    if let Some(name) = extra {
        let path = dir.path().join("model.safetensors");
        let file = fs::read(&path).unwrap();
        let (len, rest) = file.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
        let mut header: Value = serde_json::from_slice(header).unwrap();
        header[name] = json!({"dtype": "F32", "shape": [1], "data_offsets": [data.len(), data.len() + 4]});
        let header = header.to_string();
        let parts = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data, &1f32.to_le_bytes()];
        fs::write(path, parts.concat()).unwrap();
    }
    dir
}

fn bitstack(command: &str, dir: &TempDir, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bitstack")).arg(command).arg(dir.path()).args(arguments).output().unwrap()
}

fn eval(dir: &TempDir, arguments: &[&str]) -> Output {
    let text = demo().join("text.txt");
    let usual = ["--text", text.to_str().unwrap(), "--samples", "1", "--seq-len", "64"];
    bitstack("eval", dir, &[&usual, arguments].concat())
}

#[test]
fn tensors_left_over_are_refused_with_what_to_do_and_ignored_on_demand() {
    let dir = model(json!({}), Some("model.layers.0.mlp.up_proj.bias"));
    let out = dir.path().join("out.bitstack");
    let out = out.to_str().unwrap();
    for refused in [
        eval(&dir, &[]),
        eval(&dir, &["--ignore-tensors", "*.scales"]),
        bitstack("generate", &dir, &["--prompt", "A", "-n", "1"]),
        bitstack("compress", &dir, &["-o", out]),
    ] {
        let message = str::from_utf8(&refused.stderr).unwrap();
        assert_eq!((refused.status.code(), message.lines().count()), (Some(1), 1), "{message}");
        for word in ["model.layers.0.mlp.up_proj.bias", "a bias", "--ignore-tensors"] {
            assert!(message.contains(word), "no '{word}' in: {message}");
        }
    }
    let ignored = eval(&dir, &["--ignore-tensors", "*.bias"]);
    assert!(ignored.status.success());
    assert_eq!(ignored.stdout, eval(&model(json!({}), None), &[]).stdout);
}

#[test]
fn a_head_that_is_not_tied_although_the_config_says_so_is_used_with_a_warning() {
    let (tied, plain) =
        (eval(&model(json!({"tie_word_embeddings": true}), None), &[]), eval(&model(json!({}), None), &[]));
    let message = str::from_utf8(&tied.stderr).unwrap();
    assert!(message.contains("warning: ") && message.contains("lm_head.weight is stored"), "{message}");
    assert!(tied.status.success() && plain.status.success());
    assert_eq!(tied.stdout, plain.stdout);
}

#[test]
fn a_model_without_a_tokenizer_is_compressed_with_a_warning_and_cannot_write() {
    let dir = model(json!({}), None);
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let file = dir.path().join("out.bitstack");
    let out = file.to_str().unwrap();
    let made = bitstack("compress", &dir, &["-o", out, "--blocks", "1", "--samples", "1", "--seq-len", "32"]);
    let said = str::from_utf8(&made.stderr).unwrap();
    assert!(said.contains("warning: ") && said.contains("there is no tokenizer"), "{said}");
    let written = Command::new(env!("CARGO_BIN_EXE_bitstack")).args(["generate", out, "-p", "The"]).output().unwrap();
    let said = str::from_utf8(&written.stderr).unwrap();
    assert!(
        !written.status.success() && said.contains("no tokenizer in this file: compress the model again"),
        "{said}"
    );
}
