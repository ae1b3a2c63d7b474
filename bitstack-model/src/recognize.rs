//! What a file is that is not what its name says, or what a directory holds that is no model: in one line that says what to do.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes by which a file is recognised.
const HEAD_BYTES: usize = 512;

/// What a file is by its first bytes, and what is to be done, where it is something that people take for a model's file: a Git LFS pointer, a web
/// page, a GGUF file, a pickle, an archive. `None` for everything else, and for what cannot be read. Goes behind `FILE is `.
pub fn recognize(path: &Path) -> Option<String> {
    // To open a pipe would be to wait for it.
    if !std::fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut head = Vec::with_capacity(HEAD_BYTES);
    File::open(path).ok()?.take(HEAD_BYTES as u64).read_to_end(&mut head).ok()?;
    recognize_head(&head).map(str::to_owned)
}

/// The same, from the first bytes.
pub(crate) fn recognize_head(head: &[u8]) -> Option<&'static str> {
    let head = &head[..head.len().min(HEAD_BYTES)];
    let start = head.trim_ascii_start();
    let is_page = |tag: &[u8]| start.len() >= tag.len() && start[..tag.len()].eq_ignore_ascii_case(tag);
    if head.starts_with(b"version https://git-lfs") {
        Some(
            "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`, or download the model with hf:OWNER/NAME",
        )
    } else if is_page(b"<!doctype html") || is_page(b"<html") {
        Some("a web page, not the file: download it again, from .../resolve/main/... in place of .../blob/main/...")
    } else if crate::gguf::is_gguf(head) {
        Some("a GGUF file: give its own path in place of the directory's")
    } else if head.starts_with(b"PK\x03\x04") || matches!(head, [0x80, 2..=5, ..]) {
        Some(
            "a pickle or an archive of one (PyTorch): save the model as safetensors, with save_pretrained of transformers",
        )
    } else {
        None
    }
}

/// What a directory without a model's files holds instead, and what is to be done.
pub(crate) fn advice(dir: &Path) -> String {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    let ending = |endings: &[&str]| names.iter().find(|name| endings.iter().any(|ending| name.ends_with(ending)));
    let shown = |name: &str| bitstack_io::hostile::printable(name);
    if names.iter().any(|name| name == "adapter_config.json") {
        "it holds an adapter (adapter_config.json): merge it into its model, with merge_and_unload of peft, and give that".to_owned()
    } else if let Some(name) = ending(&[".gguf"]) {
        format!("it holds GGUF files: give one of them, such as {}", shown(&dir.join(name).display().to_string()))
    } else if let Some(name) = ending(&[".bin", ".pt", ".pth", ".ckpt"]) {
        format!(
            "it holds pickles ({}), which are not opened: save the model as safetensors, with save_pretrained of transformers",
            shown(name)
        )
    } else if let Some(name) = ending(&[".safetensors"]) {
        format!("it holds {}: a model directory has config.json, and model.safetensors or its index", shown(name))
    } else {
        "a model directory has config.json, and model.safetensors or model.safetensors.index.json".to_owned()
    }
}
