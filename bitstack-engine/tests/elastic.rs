//! A model over packed blocks says what the model of rebuilt weights says, at every size, while its size changes.
#![expect(clippy::print_stdout, reason = "a test that is skipped says so")]

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;
mod stacks;

use bitstack_engine::device::{Columns, Cpu, Device, PackedDevice, Plain};
use bitstack_engine::sample::{GenerateOptions, StopReason};
use bitstack_engine::stack::{self, StackModel};
use bitstack_engine::{ElasticModel, KvCache, Pass, SamplingOptions, Threads, Weight};
use bitstack_format::StackFile;
use bitstack_model::Checkpoint;
use fixtures::{checkpoint, demo};
use ndarray::{Array2, Axis, concatenate};
use stacks::{avd, file, nested};
use std::ops::ControlFlow;

/// ‖a - b‖ / ‖b‖.
fn distance(a: &Array2<f32>, b: &Array2<f32>) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

#[test]
fn packed_blocks_say_what_rebuilt_weights_say_at_every_size() {
    check_sizes(Cpu);
    check_sizes(Plain);
}

fn check_sizes<D: PackedDevice>(device: D) {
    let tokens: Vec<u32> = (0..40).map(|i| (i * i * 5 + 3) % 96).collect();
    for (name, options, keep) in [("llama", nested(), false), ("qwen2", avd(), false), ("qwen3", nested(), true)] {
        let bytes = file(&checkpoint(name), &options, keep);
        let source = StackFile::open(bytes.clone()).unwrap();
        let file = StackFile::open(bytes).unwrap();
        let model = ElasticModel::open_on(device.clone(), file, u64::MAX, Default::default(), &()).unwrap();
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
fn a_row_of_a_weight_is_what_multiplying_by_it_gives() {
    let bytes = file(&checkpoint("llama"), &nested(), false);
    let model = ElasticModel::open(StackFile::open(bytes).unwrap(), u64::MAX, Default::default(), &()).unwrap();
    let snapshot = model.elastic().snapshot();
    let decoder = model.at(&snapshot).unwrap();
    let operator = &decoder.weights()[1];
    let [rows, cols] = operator.shape();
    let x: Vec<f32> = (0..20 * cols).map(|i| ((i / cols * 31 + i % cols * 17) % 23) as f32 / 8.0 - 1.25).collect();
    let products = [Threads::One, Threads::Pool].map(|threads| {
        // Beside other columns, which stay as they are.
        let (mut queue, mut y) = (Cpu.queue(threads).unwrap(), vec![7.0; 20 * (rows + 2)]);
        Weight::<Cpu>::multiply(operator, &mut queue, &x, 20, &mut y, Columns { first: 1, stride: rows + 2 }).unwrap();
        assert!(y.chunks(rows + 2).all(|row| row[0] == 7.0 && row[rows + 1] == 7.0));
        y
    });
    assert_eq!(products[0], products[1]);
    let mut row = vec![0.0; cols];
    operator.row_into(3, &mut Vec::new(), &mut row);
    let product: f64 = row.iter().zip(&x[5 * cols..]).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
    let found = products[0][5 * (rows + 2) + 1 + 3];
    assert!((product - f64::from(found)).abs() < 1e-3 * product.abs().max(1.0), "{product}, {found}");
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
    let (prompt, options) = (tokenizer.encode("The").unwrap(), GenerateOptions::new(30, SamplingOptions::greedy()));
    let result = model
        .generate(&tokenizer, &prompt, &options, &mut |_, snapshot| {
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
    let stopped = model.generate(&tokenizer, &prompt, &options, &mut |_, _| ControlFlow::Break(())).unwrap();
    assert_eq!((stopped.tokens.len(), stopped.stop), (1, StopReason::Stopped));
}
