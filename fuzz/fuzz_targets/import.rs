//! Any directory, imported as a checkpoint of the published implementation: a stack or an error. A stack can be written, is whole, and
//! opens as a model or says why not.
//!
//! The input is `config.json`, a zero byte, `compression_config.json` (may be empty), a zero byte, and `model.safetensors`, which is taken as it is
//! and with the length of its header and that of its data set right. An order that begins with `{` is `reduced_ppl_average.json`.
#![no_main]

use bitstack_engine::Pass;
use bitstack_engine::stack::StackModel;
use bitstack_exchange::import;
use bitstack_format::{BlockSource, StackFile};
use bitstack_fuzz::repaired;
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::LazyLock;
use tempfile::TempDir;

static DIR: LazyLock<TempDir> = LazyLock::new(bitstack_fuzz::directory);

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(3, |&b| b == 0);
    let mut part = || parts.next().unwrap_or_default();
    let (config, order, tensors) = (part(), part(), part());
    let dir = DIR.path();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).expect("room for a small file");
    let (listed, measured) = ("compression_config.json", "reduced_ppl_average.json");
    for name in [listed, measured] {
        let _ = fs::remove_file(dir.join(name));
    }
    write("config.json", config);
    if !order.is_empty() {
        write(if order.starts_with(b"{") { measured } else { listed }, order);
    }
    for tensors in [Some(tensors.to_vec()), repaired(tensors)].into_iter().flatten() {
        write("model.safetensors", &tensors);
        let imported = match import(dir, &[], dir, &()) {
            Ok(imported) => imported,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                continue;
            }
        };
        let mut bytes = Vec::new();
        let order = imported.order.weights();
        imported.draft.finish(order, &mut bytes, &mut |_, _| {}).expect("what was imported can be written");
        let file = StackFile::open(bytes).expect("what was written opens");
        assert!(file.verify(&mut |_, _| {}).expect("it is small").is_whole());
        let levels: Vec<u32> = file.weights().iter().map(|w| w.n_blocks() as u32).collect();
        if let Ok(model) = StackModel::open(&file, &levels, &()) {
            let _ = model.decoder().forward(&[0, 0], &mut Pass::new());
        }
    }
});
