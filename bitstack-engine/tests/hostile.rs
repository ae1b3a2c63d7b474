//! Configs and stacks made to do harm: a model, or an error that says what is wrong; never a panic, never other weights.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;
#[path = "../../bitstack-model/tests/fixtures/hostile.rs"]
mod hostile;

use bitstack_core::{Basis, Block, Coefficients, Shape, SignMatrix, Values};
use bitstack_engine::stack::StackModel;
use bitstack_engine::{Decoder, EngineError, Pass};
use bitstack_format::{BlockSource, Draft, Dtype as StackDtype, StackFile};
use bitstack_model::Checkpoint;
use fixtures::told;
use half::f16;
use hostile::{MODEL, config, directory, every_change, model_config, safetensors_file, tensors};
use std::fs;

#[test]
fn no_config_that_opens_makes_a_panic_when_its_model_runs() {
    let dir = directory(&[(MODEL, &safetensors_file())]);
    let mut n_run = 0;
    for (_, changed) in every_change(&config()) {
        fs::write(dir.path().join("config.json"), changed.to_string()).unwrap();
        let Ok(checkpoint) = Checkpoint::open(dir.path()) else { continue };
        if let Ok(decoder) = Decoder::load(&checkpoint) {
            let _ = decoder.forward(&[0, 1], &mut Pass::new());
            n_run += 1;
        }
    }
    assert!(n_run > 20, "{n_run}");
}

/// The model as a stack of two blocks per weight.
fn stack_file() -> Vec<u8> {
    let mut draft = Draft::create_on(Vec::new(), "memory");
    draft.push_file("config.json", config().to_string().as_bytes()).unwrap();
    let config = model_config();
    let all = tensors();
    let data = |name: &str| &all.iter().find(|(n, _, _)| n == name).unwrap().2;
    for vector in config.other_tensors() {
        draft.push_base(&vector.name, StackDtype::F16, &[vector.len], data(&vector.name)).unwrap();
    }
    let mut order = Vec::new();
    for weight in config.weights() {
        let halves: Vec<f16> =
            data(&weight.tensor_name()).chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
        let w = draft.add_weight(&weight.name, Shape::new(weight.rows, weight.cols).unwrap(), 1, "test").unwrap();
        order.push(w as u32);
        for part in [1.0, 0.25] {
            let signs: Vec<f32> = halves.iter().map(|h| h.to_f32() - 0.3 * (1.0 - part)).collect();
            let values = |n: usize| Values::F16((0..n).map(|i| f16::from_f32(part * (1.0 + i as f32 / 8.0))).collect());
            let block = Block {
                signs: SignMatrix::from_f32(weight.rows, weight.cols, &signs).unwrap(),
                basis: Some(Basis::new(1, weight.cols, values(weight.cols)).unwrap()),
                coefficients: Coefficients::new(weight.rows, 1, 1, values(weight.rows)).unwrap(),
                spikes: None,
            };
            draft.push_block(w, block.view()).unwrap();
        }
    }
    let order: Vec<u32> = order.iter().chain(&order).copied().collect();
    let mut bytes = Vec::new();
    draft.finish(&order, &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

#[test]
fn no_flipped_bit_of_a_stack_gives_another_model() {
    let logits = |bytes: &[u8]| -> Result<_, EngineError> {
        let file = StackFile::open(bytes)?;
        let levels = vec![2; file.weights().len()];
        let model = StackModel::open(&file, &levels, &())?;
        model.decoder().forward(&[0, 3, 1], &mut Pass::new())
    };
    let mut bytes = stack_file();
    let good = logits(&bytes).unwrap();
    let mut n_errors = 0;
    // One bit of every third byte: the tests of the format flip them all.
    for at in (0..bytes.len()).step_by(3) {
        bytes[at] ^= 1 << (at % 8);
        match logits(&bytes) {
            Ok(found) => assert_eq!(found, good, "byte {at}"),
            Err(_) => n_errors += 1,
        }
        bytes[at] ^= 1 << (at % 8);
    }
    // The rest are pads.
    assert!(n_errors > bytes.len() / 6, "{n_errors} of {}", bytes.len());
}

#[test]
fn no_value_of_the_config_in_a_stack_makes_a_panic() {
    let good = StackFile::open(stack_file()).unwrap();
    for (what, changed) in every_change(&config()) {
        let mut draft = Draft::create_on(Vec::new(), "memory");
        draft.push_file("config.json", changed.to_string().as_bytes()).unwrap();
        for info in good.base_tensors() {
            let tensor = good.read_tensor(&info.name).unwrap();
            draft.push_base(&info.name, tensor.dtype, &tensor.shape, &tensor.data).unwrap();
        }
        for (w, weight) in good.weights().iter().enumerate() {
            draft.add_weight(&weight.name, weight.shape, weight.rank, &weight.method).unwrap();
            draft.push_block(w, good.read_block(w, 1).unwrap().view()).unwrap();
        }
        match StackModel::open(&draft, &vec![1; good.weights().len()], &()) {
            Ok(model) => drop(model.decoder().forward(&[0, 1], &mut Pass::new())),
            Err(error) => assert!(!told(&error).chars().any(char::is_control), "{what}: {error}"),
        }
    }
}
