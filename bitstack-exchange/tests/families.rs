//! Every family goes the whole way: compressed, measured, run from packed blocks, written as a checkpoint again.
#![expect(clippy::print_stdout, reason = "a test that is skipped says so")]

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use bitstack_compress::{CompressOptions, OrderBy, compress};
use bitstack_engine::device::Cpu;
use bitstack_engine::eval::compare;
use bitstack_engine::sample::GenerateOptions;
use bitstack_engine::stack::StackModel;
use bitstack_engine::{Decoder, ElasticModel, Pass, SamplingOptions};
use bitstack_exchange::{ExportOptions, FloatType, export_dense, export_reference};
use bitstack_format::{BlockSource, StackFile};
use bitstack_model::Checkpoint;
use bitstack_sort::{LoadOrder, Sizes};
use fixtures::{MODELS, byte_tokenizer, checkpoint, told};
use ndarray::Array2;
use std::ops::ControlFlow;
use std::process::Command;

/// Calibrated on a few windows that the model writes itself.
fn options() -> CompressOptions {
    CompressOptions { samples: 8, seq_len: Some(32), ..Default::default() }
}

fn tokens(seed: u32) -> Vec<u32> {
    (0..40).map(|i| (i * i * 5 + 3 + 17 * seed) % 96).collect()
}

fn largest(a: &Array2<f32>, b: &Array2<f32>) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn every_family_is_compressed_measured_run_and_exported() {
    for name in MODELS {
        let home = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(name);
        let original = Decoder::load(&checkpoint).unwrap();
        let made = compress(&checkpoint, None, &options(), home.path(), &()).unwrap();
        let mut bytes = Vec::new();
        made.draft.finish(made.order.weights(), &mut bytes, &mut |_, _| {}).unwrap();
        let file = StackFile::open(bytes.clone()).unwrap();
        let sizes = Sizes::new(file.base_bytes(), file.block_sizes()).unwrap();
        let order = LoadOrder::from_weights(file.order(), &sizes).unwrap();
        let (least, most) = (order.minimum_bytes(), order.total_bytes());

        // A larger size is nearer to the model: by a block or so for each weight, to a third at least.
        let windows: Vec<Vec<u32>> = (0..4).map(tokens).collect();
        let windows: Vec<&[u32]> = windows.iter().map(|window| &window[..]).collect();
        let mut last = f64::INFINITY;
        for quarter in 1..=4 {
            let plan = order.plan(least + (most - least) * quarter / 4).unwrap();
            let rebuilt = StackModel::open(&file, &plan.levels, &()).unwrap();
            let kl = compare(rebuilt.decoder(), &original, &windows, &()).unwrap().kl.unwrap().mean;
            assert!(kl < last / 3.0, "{name}, quarter {quarter}: {kl} after {last}");
            last = kl;
        }
        // Ten bits for each weight are half as exact as the bf16 of the checkpoint.
        assert!(last < 1e-3, "{name}: {last}");

        // Packed blocks say what rebuilt weights say, but for the 16 bits of sums of activations in each product.
        let plan = order.plan(least + (most - least) / 2).unwrap();
        let rebuilt = StackModel::open(&file, &plan.levels, &()).unwrap();
        let expected = rebuilt.decoder().forward(&tokens(0), &mut Pass::new()).unwrap();
        let model =
            ElasticModel::open_on(Cpu, StackFile::open(bytes).unwrap(), plan.resident_bytes, Default::default(), &())
                .unwrap();
        model.elastic().wait().unwrap();
        let found = model.at(&model.elastic().snapshot()).unwrap().forward(&tokens(0), &mut Pass::new()).unwrap();
        assert!(largest(&found, &expected) < 2e-2, "{name}: {}", largest(&found, &expected));

        // Token by token, from a cache: greedy tokens are those of the largest logits of a pass over all of them.
        let tokenizer = byte_tokenizer(32..128);
        let mut go_on = |_: &str, _: &_| ControlFlow::Continue(());
        let mut all = tokenizer.encode("Once").unwrap();
        let options = GenerateOptions::new(8, SamplingOptions::greedy());
        let text = model.generate(&tokenizer, &all, &options, &mut go_on).unwrap();
        let n_prompt = all.len();
        all.extend(&text.tokens);
        let logits = rebuilt.decoder().forward(&all, &mut Pass::new()).unwrap();
        for (i, token) in text.tokens.iter().enumerate() {
            let row = logits.row(n_prompt + i - 1);
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!(row[*token as usize] > top - 4e-2, "{name}, token {i}: {} of {top}", row[*token as usize]);
        }

        let out = home.path().join("out");
        export_dense(&file, &plan.levels, Some(FloatType::F32), &out, &ExportOptions::default(), &()).unwrap();
        let exported = Checkpoint::open(&out).unwrap();
        assert_eq!(exported.config(), checkpoint.config(), "{name}");
        let found = Decoder::load(&exported).unwrap().forward(&tokens(0), &mut Pass::new()).unwrap();
        assert_eq!(found, expected, "{name}");
    }
}

/// Prints the logits of the model of each argument but the last, which lists tokens.
const TRANSFORMERS: &str = "
import json, sys, torch, transformers
*models, tokens = sys.argv[1:]
for name in models:
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation='eager')
    with torch.no_grad():
        print(json.dumps(model(torch.tensor([json.loads(tokens)])).logits[0].tolist()))
";

#[test]
fn the_python_library_loads_the_export_of_every_family_and_gives_our_logits() {
    let python = std::env::var("BITSTACK_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has = Command::new(&python).args(["-c", "import torch, transformers"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        println!("skipped: {python} has no torch and transformers; BITSTACK_PYTHON can name another");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let options = CompressOptions { ordering: OrderBy::Random, n_blocks: Some(4), ..options() };
    let export = |name: &str| {
        let made = compress(&checkpoint(name), None, &options, home.path(), &()).unwrap();
        let levels = vec![3; made.draft.weights().len()];
        let out = home.path().join(name);
        export_dense(&made.draft, &levels, Some(FloatType::F32), &out, &ExportOptions::default(), &()).unwrap();
        let ours = Decoder::load(&Checkpoint::open(&out).unwrap()).unwrap();
        (out, ours.forward(&tokens(0), &mut Pass::new()).unwrap())
    };
    let exports: Vec<_> = MODELS.into_iter().map(export).collect();
    let mut command = Command::new(&python);
    command.args(["-c", TRANSFORMERS]).args(exports.iter().map(|(out, _)| out));
    let output = command.arg(serde_json::to_string(&tokens(0)).unwrap()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = std::str::from_utf8(&output.stdout).unwrap().lines();
    for ((name, (_, ours)), line) in MODELS.into_iter().zip(&exports).zip(lines) {
        let theirs: Vec<Vec<f32>> = serde_json::from_str(line).unwrap();
        let theirs = Array2::from_shape_fn(ours.dim(), |(token, logit)| theirs[token][logit]);
        // Both multiply the same weights in f32, adding in another order.
        assert!(largest(ours, &theirs) < 1e-4, "{name}: {}", largest(ours, &theirs));
        println!("{name}: logits differ by {}", largest(ours, &theirs));
    }
}

#[test]
fn a_router_has_no_place_in_the_published_layout() {
    for (name, router) in [("qwen3_moe", "model.layers.1.mlp.gate"), ("mixtral", "layers.0.block_sparse_moe.gate")] {
        let home = tempfile::tempdir().unwrap();
        let options = CompressOptions {
            method: bitstack_compress::BlockMethod::Avd,
            keep_embeddings: true,
            n_blocks: Some(2),
            ordering: OrderBy::Random,
            ..options()
        };
        let made = compress(&checkpoint(name), None, &options, home.path(), &()).unwrap();
        let out = home.path().join("out");
        let error = export_reference(&made.draft, made.order.weights(), &out, &ExportOptions::default(), &());
        let message = told(&error.unwrap_err());
        assert!(message.contains(router) && message.contains("stacked"), "{message}");
    }
}
