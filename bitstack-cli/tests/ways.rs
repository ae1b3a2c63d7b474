//! The ways in to an uncompressed model: a directory, a GGUF file, a name at the Hub. All give the same numbers.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;
#[path = "../../bitstack-model/tests/fixtures/gguf.rs"]
mod gguf;
#[path = "../../bitstack-gguf/tests/fixtures/mod.rs"]
mod gguf_file;
#[path = "../../bitstack-hub/tests/server/mod.rs"]
mod server;

use bitstack_gguf::BlockType;
use bitstack_model::Checkpoint;
use ring::digest::{SHA256, digest};
use server::{Server, State};
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// Measures models on the first of the demonstration's windows.
fn eval(models: &[&OsStr], others: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitstack"));
    command.arg("eval").args(models).args(["--samples", "2", "--seq-len", "32", "--json", "--text"]);
    command.arg(fixtures::demo().join("text.txt")).args(others).envs(variables.iter().copied()).output().unwrap()
}

#[track_caller]
fn perplexities(output: &Output) -> Vec<f64> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    rows.as_array().unwrap().iter().map(|row| row["perplexity"].as_f64().unwrap()).collect()
}

#[test]
fn a_gguf_file_measures_as_its_directory_does() {
    let (_dir, file, directory) = gguf::model(BlockType::F32);
    let tokenizer = Checkpoint::open(&file).unwrap().companion("tokenizer.json").unwrap();
    fs::write(directory.join("tokenizer.json"), tokenizer).unwrap();
    let reference = ["--reference", file.to_str().unwrap()];
    let measured = eval(&[file.as_os_str(), directory.as_os_str()], &reference, &[]);
    let [from_file, from_directory] = perplexities(&measured)[..] else { panic!("two rows") };
    assert_eq!(from_file, from_directory);
    assert!(measured.stderr.is_empty(), "{}", String::from_utf8_lossy(&measured.stderr));
}

#[test]
fn a_quantised_source_is_remarked_upon_in_one_line() {
    let (_dir, file, _) = gguf::model(BlockType::Q8_0);
    // Under another name it is a GGUF file still.
    let renamed = file.with_file_name("weights");
    fs::rename(&file, &renamed).unwrap();
    let measured = eval(&[renamed.as_os_str()], &[], &[]);
    perplexities(&measured);
    let told = String::from_utf8(measured.stderr).unwrap();
    assert!(told.lines().count() == 1 && told.contains("quantised already (Q8_0)"), "{told}");
    assert!(eval(&[renamed.as_os_str()], &["--quiet"], &[]).stderr.is_empty());
}

#[test]
fn a_name_of_the_hub_is_downloaded_once_and_found_offline() {
    let model = fixtures::demo().join("tiny-llama");
    let files = ["config.json", "tokenizer.json", "model.safetensors"].map(|name| {
        let contents = fs::read(model.join(name)).unwrap();
        let hash = digest(&SHA256, &contents).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        (name.to_owned(), (contents, hash, name == "model.safetensors"))
    });
    let server = Server::start(State {
        files: files.into_iter().collect(),
        breaks: vec![usize::MAX, usize::MAX, 1000],
        ..State::default()
    });
    let home = tempfile::tempdir().unwrap();
    let name = OsStr::new("hf:owner/name");
    let variables = [
        ("HF_HOME", home.path().to_str().unwrap()),
        ("HF_ENDPOINT", &server.endpoint),
        ("HF_HUB_CACHE", ""),
        ("HF_TOKEN", ""),
    ];
    let with = |offline| [&variables[..], &[("HF_HUB_OFFLINE", offline)]].concat();
    let expected = perplexities(&eval(&[model.as_os_str()], &[], &[]));
    assert_eq!(perplexities(&eval(&[name], &[], &with("0"))), expected);
    assert!(home.path().join("hub/models--owner--name/refs/main").is_file());
    let asked = server.asked("GET").len();
    assert_eq!(perplexities(&eval(&[name], &[], &with("1"))), expected);
    assert_eq!(server.asked("GET").len(), asked);
}

#[test]
fn a_name_that_is_none_is_wrong_usage_and_one_that_is_not_there_a_failure() {
    let server = Server::start(State::default());
    let home = tempfile::tempdir().unwrap();
    let variables = [("HF_HOME", home.path().to_str().unwrap()), ("HF_ENDPOINT", &server.endpoint), ("HF_TOKEN", "")];
    for (name, status, says) in [("hf:name", 2, "OWNER/NAME"), ("hf:owner/other", 1, "is not there: look at")] {
        let output = eval(&[OsStr::new(name)], &[], &variables);
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(status) && told.contains(says) && told.lines().count() == 1, "{told}");
    }
}

#[test]
fn what_is_no_model_is_told_for_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let pointer = dir.path().join("model.bitstack");
    fs::write(&pointer, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n").unwrap();
    let output = eval(&[pointer.as_os_str()], &[], &[]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("model.bitstack is a Git LFS pointer"), "{told}");
    let output = Command::new(env!("CARGO_BIN_EXE_bitstack"))
        .args(["compress", "-o", "x.bitstack"])
        .arg(Path::new(&pointer))
        .output()
        .unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("is a Git LFS pointer"));
}
