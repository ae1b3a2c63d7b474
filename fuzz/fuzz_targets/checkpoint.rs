//! Any directory, opened as a Hugging Face checkpoint: a model or an error. What opens can be read, every weight and vector, with finite values of
//! the shape its config implies or an error; a small model runs.
//!
//! The input is `config.json`, a zero byte, the index (may be empty), a zero byte, and a safetensors file, which is the shard `a.safetensors`
//! where there is an index and `model.safetensors` where there is none. It is opened as it is, and with the length of its header and that of
//! its data set right.
#![no_main]

use bitstack_engine::{Decoder, Pass};
use bitstack_fuzz::repaired;
use bitstack_model::Checkpoint;
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use tempfile::TempDir;

static DIR: LazyLock<TempDir> = LazyLock::new(bitstack_fuzz::directory);

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(3, |&b| b == 0);
    let config = parts.next().unwrap_or_default();
    let index = parts.next().unwrap_or_default();
    let tensors = parts.next().unwrap_or_default();
    let dir = DIR.path();
    let at = |name: &str| dir.join(name);
    let write = |name: &str, bytes: &[u8]| fs::write(at(name), bytes).expect("room for a small file");
    write("config.json", config);
    write("generation_config.json", config);
    let (single, shard, list) = ("model.safetensors", "a.safetensors", "model.safetensors.index.json");
    for name in [single, shard, list] {
        let _ = fs::remove_file(at(name));
    }
    let name = if index.is_empty() {
        single
    } else {
        write(list, index);
        shard
    };
    for tensors in [Some(tensors.to_vec()), repaired(tensors)].into_iter().flatten() {
        write(name, &tensors);
        exercise(dir, tensors.len());
    }
});

fn exercise(dir: &Path, file_bytes: usize) {
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    assert!(checkpoint.stored_bytes() <= file_bytes as u64, "every tensor lies in the file");
    let config = checkpoint.config();
    let mut finite = true;
    for weight in config.weights() {
        match checkpoint.matrix(&weight) {
            Ok(matrix) => assert!(matrix.dim() == (weight.rows, weight.cols) && matrix.iter().all(|x| x.is_finite())),
            Err(_) => finite = false,
        }
        assert_eq!(checkpoint.weight(&weight).is_ok(), checkpoint.matrix(&weight).is_ok());
    }
    for vector in config.other_tensors() {
        match checkpoint.vector(&vector) {
            Ok(values) => assert!(values.len() == vector.len && values.iter().all(|x| x.is_finite())),
            Err(_) => finite = false,
        }
    }
    let n_companions = checkpoint.companions().expect("they are there").len();
    assert_eq!(n_companions, 2);
    let decoder = Decoder::load(&checkpoint);
    assert_eq!(decoder.is_ok(), finite);
    if let Ok(decoder) = decoder {
        let logits = decoder.forward(&[0, 0], &mut Pass::new());
        assert!(logits.is_err() || logits.is_ok_and(|l| l.dim().1 == config.vocab_size));
    }
}
