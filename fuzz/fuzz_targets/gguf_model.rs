//! Any bytes, opened as a model in a GGUF file: a model or an error. What opens has a config, weights that can be read, finite, or an error, and
//! a tokenizer that can be used, or an error.
#![no_main]

use bitstack_model::{Checkpoint, Tokenizer};
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::LazyLock;
use tempfile::TempDir;

static DIR: LazyLock<TempDir> = LazyLock::new(bitstack_fuzz::directory);

// Some tokenizers make the library behind them panic, which is caught and an error; the fuzzer's own hook would end the process before.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |input: &[u8]| {
    let path = DIR.path().join("model.gguf");
    fs::write(&path, input).expect("room for a small file");
    let Ok(checkpoint) = Checkpoint::open(&path) else { return };
    let config = checkpoint.config();
    for weight in config.weights() {
        if let Ok(matrix) = checkpoint.matrix(&weight) {
            assert!(matrix.dim() == (weight.rows, weight.cols) && matrix.iter().all(|x| x.is_finite()));
        }
    }
    for vector in config.other_tensors() {
        if let Ok(values) = checkpoint.vector(vector) {
            assert!(values.len() == vector.len && values.iter().all(|x| x.is_finite()));
        }
    }
    if let Ok(companions) = checkpoint.companions() {
        assert!(companions.iter().all(|(name, _)| checkpoint.has_companion(name).expect("it is there")));
    }
    let Ok(tokenizer) = checkpoint.companion("tokenizer.json") else { return };
    let Ok(tokenizer) = Tokenizer::from_bytes(&tokenizer) else { return };
    let tokens = tokenizer.encode("the <s>caf\u{e9} 12\u{1f600}").unwrap_or_default();
    let _ = tokenizer.decode(&tokens);
});
