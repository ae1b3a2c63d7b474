//! What people have in place of a model: each is named for what it is, in one line that says what to do.

#[path = "fixtures/mod.rs"]
mod fixtures;
#[path = "fixtures/hostile.rs"]
mod hostile;

use bitstack_model::Checkpoint;
use fixtures::told;
use hostile::{MODEL, config, directory, safetensors_file};
use std::fs;
use std::path::Path;

const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n";
const PAGE: &[u8] = b"\n  <!DOCTYPE html>\n<html class=\"\">\n<head>";

fn whole() -> [(&'static str, Vec<u8>); 2] {
    [("config.json", config().to_string().into_bytes()), (MODEL, safetensors_file())]
}

/// The error of opening a model's directory, and taking its tokenizer, with some files in place of its own.
fn error(files: &[(&str, &[u8])]) -> String {
    let whole = whole();
    let mut all: Vec<(&str, &[u8])> = whole.iter().map(|(name, bytes)| (*name, &bytes[..])).collect();
    all.retain(|(name, _)| files.iter().all(|(other, _)| other != name));
    all.extend(files);
    told_of(directory(&all).path())
}

fn told_of(path: &Path) -> String {
    let result = Checkpoint::open(path).and_then(|checkpoint| checkpoint.companion("tokenizer.json"));
    let error = told(&result.unwrap_err());
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn files_that_only_have_the_name_are_named_for_what_they_are() {
    for name in [MODEL, "config.json", "tokenizer.json", "generation_config.json"] {
        let error = error(&[(name, POINTER)]);
        assert!(error.contains(&format!("{name} is a Git LFS pointer")) && error.contains("git lfs pull"), "{error}");
    }
    for name in [MODEL, "config.json", "tokenizer.json"] {
        let error = error(&[(name, PAGE)]);
        assert!(error.contains(&format!("{name} is a web page")) && error.contains("resolve"), "{error}");
    }
    assert!(
        error(&[(MODEL, b"GGUF\x03\0\0\0\0\0\0\0")]).contains("model.safetensors is a GGUF file: give its own path")
    );
    assert!(error(&[(MODEL, b"PK\x03\x04\0\0\0\0\0\0\0\0")]).contains("model.safetensors is a pickle"));
    assert!(error(&[(MODEL, &[0x80, 2, b'}', b'q', 0, 0, 0, 0, 0, 0])]).contains("model.safetensors is a pickle"));
}

#[test]
fn directories_that_hold_something_else_say_what() {
    let holding = |files: &[(&str, &[u8])]| told_of(directory(files).path());
    let config = config().to_string();
    let config = ("config.json", config.as_bytes());
    assert!(holding(&[config, ("pytorch_model.bin", b"x")]).contains("it holds pickles (pytorch_model.bin)"));
    assert!(holding(&[config, ("a.pt", b"x")]).contains("save the model as safetensors"));
    assert!(holding(&[("x.gguf", b"x")]).contains("it holds GGUF files: give one of them, such as"));
    let adapter = [("adapter_config.json", &b"{}"[..]), ("adapter_model.safetensors", b"")];
    assert!(holding(&adapter).contains("it holds an adapter (adapter_config.json): merge it"));
    assert!(holding(&[]).contains("config.json is not there; a model directory has config.json"));
    assert!(holding(&[("weights.safetensors", b"")]).contains("it holds weights.safetensors"));
}

#[test]
#[cfg(unix)]
fn links_to_nothing_are_not_taken_for_nothing() {
    for name in ["config.json", MODEL, "model.safetensors.index.json", "generation_config.json", "tokenizer.json"] {
        let whole = whole();
        let files =
            whole.iter().filter(|(other, _)| *other != name && !(*other == MODEL && name.ends_with("index.json")));
        let dir = directory(&files.map(|(name, bytes)| (*name, &bytes[..])).collect::<Vec<_>>());
        std::os::unix::fs::symlink("../../blobs/gone", dir.path().join(name)).unwrap();
        let error = told_of(dir.path());
        assert!(error.contains(&format!("{name} is a link to ../../blobs/gone, which is not there")), "{error}");
    }
}

#[test]
fn a_model_without_a_tokenizer_says_so() {
    let error = error(&[]);
    assert!(error.contains("no tokenizer.json in") && error.contains("no tokenizer.model"), "{error}");
    let error = self::error(&[("tokenizer.model", b"\xff\xff")]);
    assert!(error.contains("tokenizer.model: it ends inside a field"), "{error}");
}

#[test]
fn files_that_are_no_model_are_refused() {
    let dir = directory(&[("a.safetensors", &safetensors_file()), ("b.bin", b"PK\x03\x04"), ("c", b"")]);
    assert!(told_of(&dir.path().join("a.safetensors")).contains("a.safetensors is no model: give a directory"));
    assert!(told_of(&dir.path().join("b.bin")).contains("b.bin is a pickle"));
    assert!(told_of(&dir.path().join("c")).contains("is no model"));
    assert!(Checkpoint::is_at(dir.path()) && !Checkpoint::is_at(&dir.path().join("b.bin")));
    fs::write(dir.path().join("d"), b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0").unwrap();
    assert!(Checkpoint::is_at(&dir.path().join("d")));
    assert!(told_of(&dir.path().join("d")).contains("unsupported architecture"));
}
