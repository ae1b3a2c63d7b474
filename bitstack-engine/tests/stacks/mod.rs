//! Stacks of the test models, made without calibration.
#![allow(dead_code, reason = "each test uses some of it")]

use bitstack_decomp::{DecomposeOptions, Nested, decompose};
use bitstack_engine::stack;
use bitstack_format::Draft;
use bitstack_model::{Checkpoint, WeightRole};

const N_BLOCKS: usize = 4;

/// Four blocks of rank 2 by the published method.
pub(crate) fn avd() -> DecomposeOptions<'static> {
    DecomposeOptions::new(2, N_BLOCKS)
}

/// Four blocks of nested codes.
pub(crate) fn nested() -> DecomposeOptions<'static> {
    DecomposeOptions::nested(N_BLOCKS, Nested::default())
}

/// The stack of a model, in an order that goes level by level, as the bytes of a file.
pub(crate) fn file(checkpoint: &Checkpoint, options: &DecomposeOptions<'_>, keep_embeddings: bool) -> Vec<u8> {
    let mut draft = Draft::create_on(Vec::new(), "memory");
    for (name, contents) in checkpoint.companions().unwrap() {
        draft.push_file(&name, &contents).unwrap();
    }
    for spec in checkpoint.config().other_tensors() {
        let (dtype, data) = stack::stored(&checkpoint.elements(&spec.name, &[spec.len]).unwrap());
        draft.push_base(&spec.name, dtype, &[spec.len], &data).unwrap();
    }
    let mut n_weights = 0;
    for spec in checkpoint.config().weights() {
        if keep_embeddings && matches!(spec.role, WeightRole::Embedding | WeightRole::Head) {
            let elements = checkpoint.elements(&spec.tensor_name(), &spec.tensor_shape()).unwrap();
            let (dtype, data) = stack::stored(&elements);
            draft.push_base(&spec.tensor_name(), dtype, &spec.tensor_shape(), &data).unwrap();
            continue;
        }
        let made = decompose(checkpoint.matrix(&spec).unwrap().view(), options).unwrap().stack;
        let rank = made.rank().unwrap();
        let weight = draft.add_weight(&spec.name, made.shape(), rank, "test").unwrap();
        made.blocks().iter().for_each(|block| draft.push_block(weight, block.view()).unwrap());
        n_weights += 1;
    }
    let order: Vec<u32> = (0..N_BLOCKS).flat_map(|_| 0..n_weights).collect();
    let mut bytes = Vec::new();
    draft.finish(&order, &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}
