//! Checkpoints of the published implementation, in and out, and dense checkpoints out.
#![expect(clippy::print_stdout, reason = "a test that is skipped says so")]

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use bitstack_compress::{BlockMethod, CompressOptions, OrderBy, compress};
use bitstack_core::{Basis, Block, Coefficients, Shape, SignMatrix, Spike, Spikes, Values};
use bitstack_engine::device::Cpu;
use bitstack_engine::stack::StackModel;
use bitstack_engine::{Decoder, Pass, Weight};
use bitstack_exchange::{ExchangeError, ExportOptions, FloatType, Imported, export_dense, export_reference, import};
use bitstack_format::{BlockSource, Draft, FormatError, StackFile};
use bitstack_io::Existing;
use bitstack_model::Checkpoint;
use bitstack_sort::LoadOrder;
use fixtures::{checkpoint, data, told};
use ndarray::Array2;
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A small model original by the published method, in the layout of the published implementation; see the README of the test models.
fn reference() -> PathBuf {
    data("reference")
}

#[derive(Deserialize)]
struct Expected {
    input_ids: Vec<u32>,
    positions: Vec<usize>,
    /// By bytes: logits at the positions.
    sizes: BTreeMap<u64, Vec<Vec<f32>>>,
}

fn expected() -> Expected {
    serde_json::from_slice(&fs::read(reference().join("expected_logits.json")).unwrap()).unwrap()
}

fn imported(dir: &Path) -> Result<Imported, ExchangeError> {
    import(dir, &[], &std::env::temp_dir(), &())
}

fn logits<L: Weight<Cpu>>(decoder: &Decoder<L>, tokens: &[u32]) -> Array2<f32> {
    decoder.forward(tokens, &mut Pass::new()).unwrap()
}

fn logits_at(draft: &Draft, order: &LoadOrder, budget_bytes: u64, tokens: &[u32]) -> Array2<f32> {
    let plan = order.plan(budget_bytes).unwrap();
    logits(StackModel::open(draft, &plan.levels, &()).unwrap().decoder(), tokens)
}

fn largest_difference<'a>(a: impl IntoIterator<Item = &'a f32>, b: impl IntoIterator<Item = &'a f32>) -> f32 {
    a.into_iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Every tensor of a directory's safetensors files: type and bytes.
fn tensors(dir: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let aligned = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
                assert_eq!(aligned % (view.dtype().bitsize() / 8), 0, "{name} can be viewed in place");
                found.insert(name, (view.dtype().to_string(), view.shape().to_vec(), view.data().to_vec()));
            }
        }
    }
    found
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn an_imported_checkpoint_gives_the_logits_of_its_maker_at_every_size() {
    let Expected { input_ids, positions, sizes } = expected();
    let original = imported(&reference()).unwrap();
    assert!(sizes.len() >= 3);
    assert_eq!(sizes.first_key_value().unwrap().0, &original.order.minimum_bytes());
    assert_eq!(sizes.last_key_value().unwrap().0, &original.order.total_bytes());
    for (bytes, rows) in sizes {
        assert_eq!(original.order.plan(bytes).unwrap().resident_bytes, bytes, "bytes are counted alike");
        let found = logits_at(&original.draft, &original.order, bytes, &input_ids);
        for (&position, row) in positions.iter().zip(&rows) {
            let difference = largest_difference(found.row(position), row);
            // Beyond the first position the expected logits carry rotary frequencies that their maker rounded to bf16.
            let tolerance = if position == 0 { 1e-4 } else { 1e-2 };
            assert!(difference < tolerance, "{bytes} bytes, position {position}: {difference}");
        }
    }
}

#[test]
fn the_load_order_is_that_of_the_checkpoint() {
    let original = imported(&reference()).unwrap();
    let names: Vec<String> =
        original.draft.weights().iter().map(|w| w.name.replace("model.layers.", "layer.")).collect();
    let sizes = json_file(&reference().join("compression_config.json"));
    assert_eq!(sizes.as_array().unwrap().len(), original.order.n_blocks() - names.len() + 1);
    for size in sizes.as_array().unwrap() {
        let plan = original.order.plan(size["memory"].as_u64().unwrap()).unwrap();
        let levels: serde_json::Map<String, Value> =
            names.iter().cloned().zip(plan.levels.iter().map(|&l| l.into())).collect();
        assert_eq!(Value::Object(levels), size["layers"]);
    }
}

#[test]
fn export_and_import_again_is_lossless() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let original = imported(&reference()).unwrap();
    let (draft, order) = (&original.draft, original.order.weights());
    // Many small files: the largest tensor has 131,072 bytes.
    for shard_bytes in [5_000_000_000, 140_000] {
        let options = ExportOptions { existing: Existing::Replace, shard_bytes };
        export_reference(draft, order, &out, &options, &()).unwrap();
        assert_eq!(tensors(&out), tensors(&reference()), "bit for bit");
        for file in ["compression_config.json", "config.json"] {
            assert_eq!(json_file(&out.join(file)), json_file(&reference().join(file)), "{file}");
        }
        assert_eq!(out.join("model.safetensors.index.json").exists(), shard_bytes == 140_000);
        let again = imported(&out).unwrap();
        assert_eq!(again.order, original.order);
        for (weight, info) in draft.weights().iter().enumerate() {
            assert_eq!(&again.draft.weights()[weight], info);
            for block in 1..=info.n_blocks() {
                assert_eq!(again.draft.read_block(weight, block).unwrap(), draft.read_block(weight, block).unwrap());
            }
        }
    }
    // A smaller size is a prefix.
    let small = home.path().join("small");
    let plan = original.order.plan(500_000).unwrap();
    export_reference(draft, &order[..plan.n_blocks], &small, &ExportOptions::default(), &()).unwrap();
    let again = imported(&small).unwrap();
    assert_eq!(again.order.weights(), &order[..plan.n_blocks]);
    assert_eq!(again.order.total_bytes(), plan.resident_bytes);
}

/// Rows whose bits do not end with a byte, and ranks that differ from weight to weight.
#[test]
fn what_this_project_makes_goes_out_and_comes_back() {
    let home = tempfile::tempdir().unwrap();
    for name in ["llama", "qwen2", "qwen3"] {
        let options = CompressOptions {
            method: BlockMethod::Avd,
            n_blocks: Some(3),
            samples: 2,
            seq_len: Some(16),
            ordering: OrderBy::Random,
            keep_embeddings: true,
            ..Default::default()
        };
        let made = compress(&checkpoint(name), None, &options, home.path(), &()).unwrap();
        let out = home.path().join(name);
        export_reference(&made.draft, made.order.weights(), &out, &ExportOptions::default(), &()).unwrap();
        let again = imported(&out).unwrap();
        assert_eq!(again.order, made.order, "{name}");
        let tokens: Vec<u32> = (0..20).map(|i| i * i % 96).collect();
        for budget in [made.order.minimum_bytes(), made.order.total_bytes()] {
            let [a, b] = [&made.draft, &again.draft].map(|draft| logits_at(draft, &made.order, budget, &tokens));
            assert_eq!(a, b, "{name} at {budget}");
        }
    }
}

#[test]
fn without_listed_sizes_the_measurements_give_the_order() {
    let dir = changed(|_| {});
    let original = imported(dir.path()).unwrap();
    let config = dir.path().join("compression_config.json");
    let sizes = json_file(&config);
    let names: Vec<String> = sizes[0]["layers"].as_object().unwrap().keys().cloned().collect();
    // The positions in the order are as good as perplexities: lower comes earlier.
    let mut levels = vec![0; names.len()];
    let mut measured: Vec<Vec<Value>> = vec![Vec::new(); 5];
    for (position, &weight) in original.order.weights().iter().enumerate() {
        if levels[weight as usize] > 0 {
            measured[levels[weight as usize] - 1].push(json!({"layer": names[weight as usize], "ppl": position}));
        }
        levels[weight as usize] += 1;
    }
    let levels: Vec<Value> =
        measured.into_iter().enumerate().map(|(i, ppls)| json!({"bit": i + 1, "ppls": ppls})).collect();
    let text = json!({"original_ppl": "original", "reduced_ppl": levels}).to_string();
    fs::remove_file(&config).unwrap();
    assert!(matches!(imported(dir.path()), Err(ExchangeError::NoOrder { .. })));
    let path = dir.path().join("reduced_ppl_average.json");
    fs::write(&path, text.replace("\"original\"", "NaN")).unwrap();
    let by_measurement = imported(dir.path()).unwrap();
    assert_eq!(by_measurement.order, original.order);

    // The measurements travel with the blocks, and back.
    let out = dir.path().join("out");
    let order = by_measurement.order.weights();
    export_reference(&by_measurement.draft, order, &out, &ExportOptions::default(), &()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), fs::read(out.join("reduced_ppl_average.json")).unwrap());
    assert_eq!(json_file(&out.join("compression_config.json")), sizes);

    fs::write(&path, text.replacen("\"bit\":1", "\"bit\":6", 1).replace("\"original\"", "1")).unwrap();
    assert!(matches!(imported(dir.path()), Err(ExchangeError::BadOrder { .. })));
}

/// A copy of the reference checkpoint, to be changed.
fn changed(change: impl FnOnce(&Path)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(reference()).unwrap() {
        let path = entry.unwrap().path();
        fs::write(dir.path().join(path.file_name().unwrap()), fs::read(path).unwrap()).unwrap();
    }
    change(dir.path());
    dir
}

/// A tensor of the test's own, row-major and little-endian.
type Loose = (safetensors::Dtype, Vec<usize>, Vec<u8>);

/// A copy with other tensors.
fn with_tensors(change: impl FnOnce(&mut HashMap<String, Loose>)) -> TempDir {
    changed(|dir| {
        let path = dir.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let mut loose: HashMap<String, Loose> = SafeTensors::deserialize(&bytes)
            .unwrap()
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
            .collect();
        change(&mut loose);
        let views = loose.iter().map(|(name, (dtype, shape, data))| {
            (name.clone(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    })
}

/// The words that the message of a failed import has.
#[track_caller]
fn fails(dir: &TempDir, words: &[&str]) {
    let message = told(&imported(dir.path()).expect_err("the checkpoint is wrong"));
    for word in words {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
}

#[test]
fn tensors_that_are_missing_or_wrong_are_named() {
    const UP: &str = "model.layers.1.mlp.up_proj";
    let part = |part: &str| format!("{UP}.{part}");
    for missing in ["qweight_0", "u_3", "vt_0", "vt_5", "qweight_5"] {
        let dir = with_tensors(|t| drop(t.remove(&part(missing)).unwrap()));
        fails(&dir, &[&part(missing), "missing"]);
    }
    fails(&with_tensors(|t| drop(t.remove("model.norm.weight"))), &["model.norm.weight", "missing"]);
    fails(&with_tensors(|t| drop(t.remove("lm_head.weight"))), &["lm_head.weight", "missing"]);
    let far = with_tensors(|t| {
        let one = t[&part("qweight_5")].clone();
        t.insert(part("qweight_4294967295"), one);
    });
    fails(&far, &["_6", "missing"]);
    let stray = with_tensors(|t| {
        let one = t[&part("qweight_5")].clone();
        t.insert("model.layers.2.mlp.up_proj.qweight_0".to_owned(), one);
    });
    fails(&stray, &["model.layers.2.mlp.up_proj", "does not know"]);
    let left_over = with_tensors(|t| {
        let one = t["model.norm.weight"].clone();
        t.insert("model.layers.0.self_attn.q_norm.weight".to_owned(), one);
    });
    fails(&left_over, &["no place for 1 tensor", "model.layers.0.self_attn.q_norm.weight"]);

    // up_proj is 384 x 128 at rank 4.
    let reshape = |name: &str, shape: Vec<usize>| {
        with_tensors(|t| {
            let tensor = t.get_mut(&part(name)).unwrap();
            let n = shape.iter().product::<usize>() * tensor.0.bitsize() / 8;
            tensor.2.resize(n, 0);
            tensor.1 = shape;
        })
    };
    fails(&reshape("u_2", vec![4, 384]), &[&part("u_2"), "[4, 384]", "[384, 4]"]);
    fails(&reshape("vt_2", vec![3, 128]), &[&part("vt_2"), "[3, 128]", "[4, 128]"]);
    fails(&reshape("vt_0", vec![4, 127]), &[&part("vt_0"), "[4, 127]", "[4, 128]"]);
    fails(&reshape("vt_0", vec![]), &[&part("vt_0"), "[]"]);
    fails(&reshape("qweight_2", vec![6143]), &[&part("qweight_2"), "[6143]", "[6144]"]);
    let retype = |name: &str, dtype: safetensors::Dtype, bytes: usize| {
        with_tensors(|t| {
            let tensor = t.get_mut(&part(name)).unwrap();
            let n = tensor.1.iter().product::<usize>() * bytes;
            (tensor.0, tensor.2) = (dtype, vec![0; n]);
        })
    };
    fails(&retype("u_2", safetensors::Dtype::F32, 4), &[&part("u_2"), "F32", "expected F16"]);
    fails(&retype("vt_2", safetensors::Dtype::BF16, 2), &[&part("vt_2"), "BF16", "expected F16"]);
    fails(&retype("qweight_2", safetensors::Dtype::I8, 1), &[&part("qweight_2"), "I8", "expected U8"]);
    let infinite = with_tensors(|t| {
        t.get_mut(&part("u_1")).unwrap().2[..2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    });
    fails(&infinite, &[&part("u_1"), "inf", "finite"]);
    let cut = changed(|dir| {
        let path = dir.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    });
    fails(&cut, &["model.safetensors", "bytes of tensors"]);
}

#[test]
fn orders_that_do_not_fit_are_refused_with_what_is_wrong() {
    const UP: &str = "layer.1.mlp.up_proj";
    let sizes = |change: &dyn Fn(&mut Vec<Value>)| {
        changed(|dir| {
            let path = dir.join("compression_config.json");
            let mut value = json_file(&path);
            change(value.as_array_mut().unwrap());
            fs::write(path, value.to_string()).unwrap();
        })
    };
    fails(&sizes(&|s| s.clear()), &["compression_config.json", "no size"]);
    fails(&sizes(&|s| s.reverse()), &["791808", "789248", "rise"]);
    fails(&sizes(&|s| s[0]["layers"][UP] = 0.into()), &["0 blocks", UP, "1 to 6"]);
    fails(&sizes(&|s| s[70]["layers"][UP] = 7.into()), &["7 blocks", UP]);
    fails(&sizes(&|s| s[70]["layers"][UP] = 5.into()), &["5 blocks", UP, "expected 6"]);
    fails(&sizes(&|s| s[3]["layers"]["layer.9.mlp.up_proj"] = 1.into()), &["layer.9.mlp.up_proj"]);
    fails(&sizes(&|s| drop(s[3]["layers"].as_object_mut().unwrap().remove(UP))), &["382208", UP]);
    fails(&sizes(&|s| s[3] = json!([1, 2])), &["compression_config.json", "JSON"]);
    fails(&sizes(&|s| s[3]["memory"] = (-1).into()), &["compression_config.json", "JSON"]);
    fails(
        &changed(|dir| fs::write(dir.join("compression_config.json"), "[".repeat(100_000)).unwrap()),
        &["compression_config.json", "JSON"],
    );

    // Sizes that are left out are gone through level by level; what is beyond the last comes last.
    let first_and_fifth = sizes(&|s| *s = vec![s[0].clone(), s[5].clone()]);
    let (all, few) = (imported(&reference()).unwrap(), imported(first_and_fifth.path()).unwrap());
    assert_eq!(few.order.n_blocks(), all.order.n_blocks());
    let at_fifth = 14 + 5;
    assert_eq!(few.order.plan_of_len(at_fifth).unwrap().levels, all.order.plan_of_len(at_fifth).unwrap().levels);
}

#[test]
fn a_shard_index_cannot_lead_out_of_its_directory() {
    let home = tempfile::tempdir().unwrap();
    fs::copy(reference().join("model.safetensors"), home.path().join("outside.safetensors")).unwrap();
    for name in ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..", ""] {
        let dir = changed(|dir| {
            fs::remove_file(dir.join("model.safetensors")).unwrap();
            let index = json!({"weight_map": {"lm_head.weight": name}});
            fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
        });
        fails(&dir, &["model.safetensors.index.json", "plain file name"]);
    }
}

#[test]
fn weights_that_the_published_layout_has_no_place_for_are_named() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    for (method, keep_embeddings, words) in [
        (BlockMethod::Nested, true, ["model.layers.0.self_attn.q_proj", "8 bits", "--method avd"]),
        (BlockMethod::Avd, false, ["model.embed_tokens", "layers", "--keep-embeddings"]),
    ] {
        let options = CompressOptions {
            method,
            keep_embeddings,
            n_blocks: Some(2),
            samples: 2,
            seq_len: Some(16),
            ordering: OrderBy::Random,
            ..Default::default()
        };
        let made = compress(&checkpoint("llama"), None, &options, home.path(), &()).unwrap();
        let error = export_reference(&made.draft, made.order.weights(), &out, &ExportOptions::default(), &());
        let message = told(&error.unwrap_err());
        assert!(words.iter().all(|w| message.contains(w)), "{message}");
        assert!(!out.exists());
    }
}

#[test]
fn a_dense_export_gives_the_logits_of_the_stack() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let original = imported(&reference()).unwrap();
    let tokens = expected().input_ids;
    for budget in [original.order.minimum_bytes(), 500_000, original.order.total_bytes()] {
        let levels = original.order.plan(budget).unwrap().levels;
        let stack = logits_at(&original.draft, &original.order, budget, &tokens);
        // Weights are rounded once, by at most half of 2^-10 (f16) or 2^-7 (bf16) of themselves. Logits are of order 10 and go through
        // about ten products, whose errors add up like noise.
        for (float, name, tolerance) in
            [(Some(FloatType::F32), "float32", 0.0), (None, "float16", 0.02), (Some(FloatType::Bf16), "bfloat16", 0.16)]
        {
            let options = ExportOptions { existing: Existing::Replace, shard_bytes: 300_000 };
            export_dense(&original.draft, &levels, float, &out, &options, &()).unwrap();
            assert_eq!(json_file(&out.join("config.json"))["torch_dtype"], name);
            let checkpoint = Checkpoint::open(&out).unwrap();
            let found = logits(&Decoder::load(&checkpoint).unwrap(), &tokens);
            let difference = largest_difference(&found, &stack);
            assert!(difference <= tolerance, "{name} at {budget}: {difference}");
            // What is not stacked is written as it was.
            let (written, before) = (tensors(&out), tensors(&reference()));
            assert_eq!(written["model.norm.weight"], before["model.norm.weight"]);
            assert_eq!(written["lm_head.weight"], before["lm_head.weight"]);
        }
    }
    assert!(home.path().join("out/tokenizer.json").exists());
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1, "nothing is left behind");
}

#[test]
fn a_weight_too_large_for_its_type_is_named() {
    let dir = with_tensors(|t| {
        for part in ["u_0", "vt_0"] {
            let (_, _, data) = t.get_mut(&format!("model.layers.0.mlp.up_proj.{part}")).unwrap();
            data.chunks_exact_mut(2).for_each(|x| x.copy_from_slice(&half::f16::from_f32(1000.0).to_le_bytes()));
        }
    });
    let original = imported(dir.path()).unwrap();
    let levels = original.order.plan(original.order.minimum_bytes()).unwrap().levels;
    let export = |float| {
        let out = dir.path().join("out");
        export_dense(&original.draft, &levels, Some(float), &out, &ExportOptions::default(), &())
    };
    let error = export(FloatType::F16).unwrap_err();
    assert!(
        matches!(&error, ExchangeError::TooLargeFor { name, value, dtype: "F16" }
            if name == "model.layers.0.mlp.up_proj" && value.abs() == 4e6),
        "{error}"
    );
    assert!(!dir.path().join("out").exists());
    export(FloatType::Bf16).unwrap();
}

#[test]
fn only_checkpoints_are_replaced() {
    let home = tempfile::tempdir().unwrap();
    let original = imported(&reference()).unwrap();
    let order = original.order.weights();
    let export = |dir: &Path, existing| {
        let options = ExportOptions { existing, ..Default::default() };
        export_reference(&original.draft, order, dir, &options, &())
    };
    let out = home.path().join("out");
    export(&out, Existing::Refuse).unwrap();
    assert!(export(&out, Existing::Refuse).unwrap_err().to_string().contains("exists"));
    export(&out, Existing::Replace).unwrap();

    let error = export(home.path(), Existing::Replace).unwrap_err();
    assert!(matches!(error, ExchangeError::NotACheckpoint { .. }) && error.to_string().contains("out"), "{error}");
    let diary = home.path().join("diary");
    fs::create_dir(&diary).unwrap();
    fs::write(diary.join("monday.txt"), "rain").unwrap();
    let error = export(&diary, Existing::Replace).unwrap_err();
    assert!(error.to_string().contains("monday.txt"), "{error}");
    assert_eq!(fs::read_to_string(diary.join("monday.txt")).unwrap(), "rain");
}

#[test]
fn blocks_that_share_a_basis_are_not_in_the_published_layout() {
    let home = tempfile::tempdir().unwrap();
    let halves = |n| Values::F16(vec![half::f16::ONE; n]);
    let block = |basis| Block {
        signs: SignMatrix::from_f32(2, 3, &[1.0, -1.0, 1.0, -1.0, -1.0, 1.0]).unwrap(),
        basis,
        coefficients: Coefficients::new(2, 1, 1, halves(2)).unwrap(),
        spikes: None,
    };
    let mut draft = Draft::create_in(&home).unwrap();
    let weight = draft.add_weight("model.layers.0.mlp.up_proj", Shape::new(2, 3).unwrap(), 1, "mine").unwrap();
    draft.push_block(weight, block(Some(Basis::new(1, 3, halves(3)).unwrap())).view()).unwrap();
    draft.push_block(weight, block(None).view()).unwrap();
    let export =
        |order: &[u32]| export_reference(&draft, order, &home.path().join("out"), &ExportOptions::default(), &());
    let error = told(&export(&[0, 0]).unwrap_err());
    assert!(error.contains("model.layers.0.mlp.up_proj") && error.contains("block 2 is not additive"), "{error}");
    assert!(export(&[0]).is_ok());
    assert!(matches!(
        export(&[0, 1]),
        Err(ExchangeError::Format(FormatError::NoSuchWeight { weight: 1, n_weights: 1 }))
    ));
    assert!(matches!(export(&[]), Err(ExchangeError::Format(FormatError::Order { position: 0, .. }))));
}

#[test]
fn spikes_are_not_in_the_published_layout_and_are_in_a_dense_export() {
    let source = &imported(&reference()).unwrap().draft;
    let mut draft = Draft::create_on(Vec::new(), "memory");
    for file in source.files() {
        draft.push_file(&file.name, &source.read_file(&file.name).unwrap()).unwrap();
    }
    for info in source.base_tensors() {
        let tensor = source.read_tensor(&info.name).unwrap();
        draft.push_base(&info.name, tensor.dtype, &tensor.shape, &tensor.data).unwrap();
    }
    // One spike, in one weight, of two units of its envelope.
    let spiked = source.weights().iter().position(|w| w.name.ends_with("down_proj")).unwrap();
    for (w, info) in source.weights().iter().enumerate() {
        draft.add_weight(&info.name, info.shape, info.rank, &info.method).unwrap();
        let mut block = source.read_block(w, 1).unwrap();
        if w == spiked {
            let sizes = [half::f16::from_f32(2.0); 15];
            let entries = [Spike { row: 1, col: 2, size: -1 }];
            block.spikes = Some(Spikes::encode(info.shape, sizes, &entries).unwrap());
        }
        draft.push_block(w, block.view()).unwrap();
    }
    let info = &source.weights()[spiked];
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let order: Vec<u32> = (0..source.weights().len() as u32).collect();
    let error = export_reference(&draft, &order, &out, &ExportOptions::default(), &()).unwrap_err();
    assert!(matches!(&error, ExchangeError::NotInReferenceLayout { name, .. } if *name == info.name), "{error}");
    let error = error.to_string();
    assert!(error.contains("spikes") && error.contains("export --as hf"), "{error}");
    assert!(!out.exists());

    let dense = |source: &Draft, dir: &Path| {
        let levels = vec![1; source.weights().len()];
        export_dense(source, &levels, Some(FloatType::F32), dir, &ExportOptions::default(), &()).unwrap();
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor(&format!("{}.weight", info.name)).unwrap().data().to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
    };
    let (with, without) = (dense(&draft, &out), dense(source, &home.path().join("without")));
    let first = source.read_block(spiked, 1).unwrap();
    let unit = first.coefficients.view().get(1, 0, 0) * first.basis.as_ref().unwrap().view().get(0, 2);
    let at = info.shape.cols() + 2;
    for (i, (with, without)) in with.iter().zip(&without).enumerate() {
        // The spike is added last, in f32, exactly as here.
        assert_eq!(*with, if i == at { without - 2.0 * unit } else { *without }, "value {i}");
    }
}

/// A companion file may have any plain name, and so that of a file which export writes itself.
#[test]
fn files_of_a_stack_cannot_take_the_place_of_what_is_written() {
    let mut original = imported(&reference()).unwrap();
    original.draft.push_file("model.safetensors", b"not tensors").unwrap();
    let mut bytes = Vec::new();
    original.draft.finish(original.order.weights(), &mut bytes, &mut |_, _| {}).unwrap();
    let file = StackFile::open(bytes).unwrap();
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let error = export_reference(&file, file.order(), &out, &ExportOptions::default(), &()).unwrap_err();
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    assert!(!out.exists());
}

/// Logits of a directory by the Python library, the tokens on the command line, f32 arithmetic.
const TRANSFORMERS: &str = "
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(json.dumps(model(torch.tensor([json.loads(sys.argv[2])])).logits[0].tolist()))
";

#[test]
fn the_python_library_loads_a_dense_export_and_gives_our_logits() {
    let python = std::env::var("BITSTACK_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has = Command::new(&python).args(["-c", "import torch, transformers"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        println!("skipped: {python} has no torch and transformers; BITSTACK_PYTHON can name another");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let original = imported(&reference()).unwrap();
    let tokens = expected().input_ids;
    for (budget, float) in [(500_000, FloatType::F32), (original.order.total_bytes(), FloatType::F16)] {
        let levels = original.order.plan(budget).unwrap().levels;
        let options = ExportOptions { existing: Existing::Replace, shard_bytes: 300_000 };
        export_dense(&original.draft, &levels, Some(float), &out, &options, &()).unwrap();
        let ours = logits(&Decoder::load(&Checkpoint::open(&out).unwrap()).unwrap(), &tokens);
        let output = Command::new(&python)
            .args(["-c", TRANSFORMERS, out.to_str().unwrap(), &serde_json::to_string(&tokens).unwrap()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let theirs: Vec<Vec<f32>> = serde_json::from_slice(&output.stdout).unwrap();
        let difference = largest_difference(&ours, theirs.iter().flatten());
        // Both multiply the same weights in f32, adding in another order.
        assert!(difference < 1e-4, "{float:?}: {difference}");
        println!("{float:?} at {budget} bytes: logits differ by {difference}");
    }
}
