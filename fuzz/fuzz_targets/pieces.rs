//! Any bytes, read as a `tokenizer.model` with a `tokenizer_config.json` beside it: a tokenizer that can be used, or an error.
//!
//! The input is the config up to the first zero byte, then the model.
#![no_main]

use bitstack_model::{Checkpoint, Tokenizer};
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::LazyLock;
use tempfile::TempDir;

/// A directory with a model in it, of one tiny layer, that is opened once.
static MODEL: LazyLock<(TempDir, Checkpoint)> = LazyLock::new(|| {
    let dir = bitstack_fuzz::directory();
    let seed = include_bytes!("../seeds/checkpoint/single");
    let mut parts = seed.splitn(3, |&b| b == 0);
    let mut next = || parts.next().expect("the seed has a config, no index, and tensors");
    fs::write(dir.path().join("config.json"), next()).expect("room for a small file");
    next();
    fs::write(dir.path().join("model.safetensors"), next()).expect("room for a small file");
    let checkpoint = Checkpoint::open(dir.path()).expect("the seed is a model");
    (dir, checkpoint)
});

fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |input: &[u8]| {
    let (dir, checkpoint) = &*MODEL;
    let mut parts = input.splitn(2, |&b| b == 0);
    for name in ["tokenizer_config.json", "tokenizer.model"] {
        fs::write(dir.path().join(name), parts.next().unwrap_or_default()).expect("room for a small file");
    }
    let Ok(tokenizer) = checkpoint.companion("tokenizer.json") else { return };
    let Ok(tokenizer) = Tokenizer::from_bytes(&tokenizer) else { return };
    let tokens = tokenizer.encode("the <s>caf\u{e9} 12\u{1f600}").unwrap_or_default();
    let _ = tokenizer.decode(&tokens);
});
