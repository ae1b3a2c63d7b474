//! A model over packed blocks says what the model of rebuilt weights says, at every size, while its size changes.
#![expect(clippy::print_stdout, reason = "a test that is skipped says so")]

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use bitstack_decomp::{DecomposeOptions, Nested, decompose};
use bitstack_engine::sample::StopReason;
use bitstack_engine::stack::{self, StackModel};
use bitstack_engine::{ElasticModel, KvCache, LinearOp, Pass, SamplingOptions, Threads};
use bitstack_format::{Draft, StackFile};
use bitstack_model::{Checkpoint, WeightRole};
use fixtures::{checkpoint, demo};
use ndarray::{Array2, Axis, concatenate};
use std::ops::ControlFlow;

const N_BLOCKS: usize = 4;

/// Four blocks of rank 2 by the published method.
fn avd() -> DecomposeOptions<'static> {
    DecomposeOptions::new(2, N_BLOCKS)
}

/// Four blocks of nested codes.
fn nested() -> DecomposeOptions<'static> {
    DecomposeOptions::nested(N_BLOCKS, Nested::default())
}

/// The stack of a model, in an order that goes level by level, as the bytes of a file.
fn file(checkpoint: &Checkpoint, options: &DecomposeOptions<'_>, keep_embeddings: bool) -> Vec<u8> {
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

/// ‖a - b‖ / ‖b‖.
fn distance(a: &Array2<f32>, b: &Array2<f32>) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

#[test]
fn packed_blocks_say_what_rebuilt_weights_say_at_every_size() {
    let tokens: Vec<u32> = (0..40).map(|i| (i * i * 5 + 3) % 96).collect();
    for (name, options, keep) in [("llama", nested(), false), ("qwen2", avd(), false), ("qwen3", nested(), true)] {
        let bytes = file(&checkpoint(name), &options, keep);
        let source = StackFile::open(bytes.clone()).unwrap();
        let model = ElasticModel::open(StackFile::open(bytes).unwrap(), u64::MAX, Default::default(), &()).unwrap();
        let order = model.elastic().order().clone();
        let (least, most) = (order.minimum_bytes(), order.total_bytes());
        for budget in [most, least, least + (most - least) / 2] {
            let plan = model.elastic().set_budget(budget).unwrap();
            model.elastic().wait().unwrap();
            let snapshot = model.elastic().snapshot();
            assert_eq!((snapshot.levels(), snapshot.resident_bytes()), (&plan.levels[..], plan.resident_bytes));
            let decoder = model.at(&snapshot).unwrap();
            let rebuilt = StackModel::open(&source, &plan.levels, &()).unwrap();
            let expected = rebuilt.decoder().forward(&tokens, &mut Pass::new()).unwrap();

            // All at once and one by one. Sums of activations have 16 bits where that is faster than f32: at most 1e-4 in every product,
            // a dozen of which follow each other.
            let found = decoder.forward(&tokens, &mut Pass::new()).unwrap();
            assert!(distance(&found, &expected) < 2e-3, "{name}: {}", distance(&found, &expected));
            let mut cache = KvCache::new(model.config(), tokens.len()).unwrap();
            let rows: Vec<Array2<f32>> = tokens
                .iter()
                .map(|t| {
                    let mut pass = Pass::new().with_cache(&mut cache).with_threads(Threads::Pool);
                    decoder.forward(&[*t], &mut pass).unwrap()
                })
                .collect();
            let views: Vec<_> = rows.iter().map(|r| r.view()).collect();
            let found = concatenate(Axis(0), &views).unwrap();
            assert!(distance(&found, &expected) < 2e-3, "{name}: {}", distance(&found, &expected));
        }
    }
}

#[test]
fn operators_take_any_memory_layout() {
    let bytes = file(&checkpoint("llama"), &nested(), false);
    let model = ElasticModel::open(StackFile::open(bytes).unwrap(), u64::MAX, Default::default(), &()).unwrap();
    let snapshot = model.elastic().snapshot();
    let decoder = model.at(&snapshot).unwrap();
    let operator = &decoder.linears()[1];
    let x = Array2::from_shape_fn((20, operator.cols()), |(t, c)| ((t * 31 + c * 17) % 23) as f32 / 8.0 - 1.25);
    let mut y = Array2::zeros((20, operator.rows()));
    operator.apply(x.view(), y.view_mut(), Threads::One);
    let mut turned = Array2::zeros((operator.rows(), 20));
    let x_turned = x.t().as_standard_layout().into_owned();
    operator.apply(x_turned.t(), turned.view_mut().reversed_axes(), Threads::Pool);
    assert_eq!(turned.t(), y);
    // A row of the weight is what multiplying by it gives.
    let mut row = vec![0.0; operator.cols()];
    operator.row_into(3, &mut row);
    let product: f64 = row.iter().zip(x.row(5)).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
    assert!((product - f64::from(y[[5, 3]])).abs() < 1e-3 * product.abs().max(1.0), "{product}, {}", y[[5, 3]]);
}

#[test]
fn a_text_goes_on_while_the_model_changes_its_size() {
    let model_dir = demo().join("tiny-llama");
    if !model_dir.join("tokenizer.json").exists() {
        println!("skipped: the demonstration model of the command is not beside this crate");
        return;
    }
    let checkpoint = Checkpoint::open(&model_dir).unwrap();
    let file = StackFile::open(file(&checkpoint, &nested(), false)).unwrap();
    let tokenizer = stack::tokenizer(&file).unwrap();
    let model = ElasticModel::open(file, u64::MAX, Default::default(), &()).unwrap();
    let (least, most) = (model.elastic().order().minimum_bytes(), model.elastic().order().total_bytes());
    let mut sizes = Vec::new();
    let result = model
        .generate(&tokenizer, "The", 30, SamplingOptions::greedy(), &mut |_, snapshot| {
            sizes.push(snapshot.resident_bytes());
            if sizes.len() % 10 == 0 {
                let budget = if sizes.len() == 10 { least } else { most };
                model.elastic().set_budget(budget).unwrap();
                model.elastic().wait().unwrap();
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(result.tokens.len(), 30);
    assert_eq!(sizes, [[most; 10], [least; 10], [most; 10]].concat());
    let stopped =
        model.generate(&tokenizer, "The", 30, SamplingOptions::greedy(), &mut |_, _| ControlFlow::Break(())).unwrap();
    assert_eq!((stopped.tokens.len(), stopped.stop), (1, StopReason::Stopped));
}
