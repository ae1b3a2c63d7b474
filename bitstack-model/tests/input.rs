//! Configs and checkpoints: what is accepted, and that everything else is one error naming the thing.

#[path = "fixtures/mod.rs"]
mod fixtures;

use std::fs;

use bitstack_model::config::{DynamicScaling, FeedForwardInput, Mlp, Projections, RopeScaling, YarnScaling};
use bitstack_model::{Checkpoint, ModelConfig, ModelError, RopeConfig, WeightRole};
use fixtures::{checkpoint, data, told, with_large_vocabulary};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The config of a test model with some fields set, `null` meaning removed.
fn config(name: &str, changes: Value) -> Result<ModelConfig, ModelError> {
    let mut config: Value = serde_json::from_slice(&fs::read(data(name).join("config.json")).unwrap()).unwrap();
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    ModelConfig::from_json(&config.to_string())
}

fn config_error(name: &str, changes: Value) -> String {
    config(name, changes).unwrap_err().to_string()
}

#[test]
fn configs_of_all_families_are_read() {
    let llama = config("llama31", json!({})).unwrap();
    let RopeConfig { theta, scaling: Some(RopeScaling::Llama3(scaling)) } = llama.ropes[0] else { unreachable!() };
    assert!(llama.tied && theta == 500_000.0 && scaling.original_positions == 64.0);
    assert_eq!(llama.eos_tokens, [1]);
    assert_eq!(windows(&config("mistral_window", json!({})).unwrap()), [Some(16); 2]);
    assert_eq!(config("mistral", json!({})).unwrap().layers[0].attention.query_size(), 128);
    let qwen2 = config("qwen2", json!({})).unwrap();
    let Projections::Separate { query, key, value } = qwen2.layers[1].attention.projections else { unreachable!() };
    assert!([query, key, value].iter().all(|projection| projection.bias.is_some()));
    assert!(qwen2.layers[1].attention.output.bias.is_none() && windows(&qwen2) == [None; 2]);
    let attention = &config("qwen3", json!({})).unwrap().layers[0].attention;
    assert!(attention.query_norm.is_some() && attention.key_norm.is_some());
}

#[test]
fn biases_of_llama_are_those_that_the_config_names() {
    for (attention, mlp) in [(false, true), (true, false)] {
        let layer = config("llama", json!({"attention_bias": attention, "mlp_bias": mlp})).unwrap().layers.remove(0);
        assert_eq!(layer.attention.output.bias.is_some(), attention);
        let Mlp::Dense(feed_forward) = layer.mlp else { unreachable!() };
        let FeedForwardInput::Gated { gate, up } = feed_forward.input else { unreachable!() };
        assert!([gate, up, feed_forward.down].iter().all(|projection| projection.bias.is_some() == mlp));
    }
}

fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    config.layers.iter().map(|layer| layer.attention.window).collect()
}

#[test]
fn rope_parameters_stand_for_theta_and_scaling() {
    let scaling = json!({"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 64});
    let new = config("llama31", json!({"rope_theta": null, "rope_scaling": null, "rope_parameters": scaling})).unwrap();
    assert_eq!(new, config("llama31", json!({})).unwrap());
    let plain =
        config("llama", json!({"rope_theta": null, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}));
    assert_eq!(plain.unwrap().ropes[0].theta, 7.0);
}

#[test]
fn qwen_windows_apply_from_the_layer_the_config_names() {
    let sliding = |first: u64| json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": first, "layer_types": null});
    assert_eq!(windows(&config("qwen2", sliding(1)).unwrap()), [None, Some(8)]);
    assert_eq!(windows(&config("qwen2", sliding(28)).unwrap()), [None, None]);
    let types = json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(windows(&config("qwen3", types).unwrap()), [Some(8), None]);
    assert!(config_error("qwen3", json!({"layer_types": ["full_attention"]})).contains("layer_types"));
    assert!(config_error("qwen3", json!({"layer_types": ["full_attention", "chunked"]})).contains("chunked"));
}

/// The end tokens of a config with these files beside it.
fn end_tokens(in_config: Value, files: &[(&str, Value)]) -> Result<Vec<u32>, ModelError> {
    let mut config = config("llama", json!({"eos_token_id": in_config})).unwrap();
    config.find_end_tokens(|name| {
        let file = files.iter().find(|(file, _)| *file == name);
        Ok::<_, ModelError>(file.map(|(_, value)| value.to_string().into_bytes()))
    })?;
    Ok(config.eos_tokens)
}

#[test]
fn end_tokens_are_those_of_the_generation_config_or_else_of_the_config() {
    let generation = |tokens: Value| [("generation_config.json", json!({"eos_token_id": tokens}))];
    assert_eq!(end_tokens(json!([3, 4]), &[]).unwrap(), [3, 4]);
    assert_eq!(end_tokens(json!([3, 4]), &generation(json!([4, 5]))).unwrap(), [4, 5]);
    assert_eq!(end_tokens(json!(3), &generation(json!(6))).unwrap(), [6]);
    for nothing in [json!(null), json!([])] {
        assert_eq!(end_tokens(json!(3), &generation(nothing)).unwrap(), [3]);
    }
    let error = end_tokens(json!(3), &generation(json!("x"))).unwrap_err().to_string();
    assert!(error.contains("eos_token_id"), "{error}");
}

#[test]
fn the_last_resort_is_the_end_token_of_the_tokenizer() {
    let model = json!({"type": "BPE", "vocab": {"a": 0, "</s>": 1, "<|end|>": 2}, "merges": []});
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "model": model, "normalizer": null, "decoder": null,
        "pre_tokenizer": null, "post_processor": null, "truncation": null, "padding": null});
    let tokenizer = ("tokenizer.json", tokenizer);
    let named = |file, token: Value| (file, json!({"eos_token": token}));
    let (first, second) = ("tokenizer_config.json", "special_tokens_map.json");
    for (token, id) in [(json!("</s>"), vec![1]), (json!({"content": "<|end|>"}), vec![2]), (json!("b"), vec![])] {
        for file in [first, second] {
            let files = [named(file, token.clone()), tokenizer.clone()];
            assert_eq!(end_tokens(json!(null), &files).unwrap(), id, "{file}: {token}");
            assert_eq!(end_tokens(json!(7), &files).unwrap(), [7]);
        }
    }
    let files = [named(first, json!(null)), named(second, json!("</s>")), tokenizer];
    assert_eq!(end_tokens(json!(null), &files).unwrap(), [1]);
    assert_eq!(end_tokens(json!(null), &files[..2]).unwrap(), [0; 0]);
}

#[test]
fn fields_that_are_left_out_are_those_of_the_class() {
    let without = |name: &str, changes: Value, absent: &[&str]| {
        let mut config: Value = serde_json::from_slice(&fs::read(data(name).join("config.json")).unwrap()).unwrap();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        absent.iter().for_each(|field| drop(config.as_object_mut().unwrap().shift_remove(*field)));
        ModelConfig::from_json(&config.to_string())
    };
    let window = |name: &str, changes: Value| windows(&without(name, changes, &["sliding_window"]).unwrap());
    assert_eq!(window("mistral", json!({})), [Some(4096); 2]);
    assert_eq!(windows(&config("mistral", json!({"sliding_window": null})).unwrap()), [None; 2]);
    let used = json!({"use_sliding_window": true, "max_window_layers": 1, "layer_types": null});
    assert_eq!(window("qwen2", used.clone()), [None, Some(4096)]);
    let all_below = without("qwen3", used, &["sliding_window", "max_window_layers"]).unwrap();
    assert_eq!(windows(&all_below), [None; 2]);
    assert_eq!(window("qwen2", json!({})), [None; 2]);

    let absent = ["max_position_embeddings", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"];
    let llama = without("llama", json!({}), &absent).unwrap();
    let attention = &llama.layers[0].attention;
    assert_eq!((llama.max_positions, attention.n_kv_heads, attention.head_dim), (2048, 4, 16));
    assert_eq!((llama.ropes[0].theta, llama.norm.eps), (1e4, 1e-6));
    let mistral = without("mistral", json!({"num_attention_heads": 16}), &absent).unwrap();
    assert_eq!((mistral.max_positions, mistral.layers[0].attention.n_kv_heads), (131_072, 8));
    let qwen3 = without("qwen3", json!({"num_attention_heads": 32}), &absent).unwrap();
    let attention = &qwen3.layers[0].attention;
    assert_eq!((qwen3.max_positions, attention.n_kv_heads, attention.head_dim), (32_768, 32, 128));
    // Four query heads cannot share the thirty-two of the class.
    assert!(without("qwen2", json!({}), &absent).unwrap_err().to_string().contains("num_key_value_heads is 32"));
}

#[test]
fn the_type_says_what_a_model_is_and_the_class_only_without_one() {
    let qwen = config("llama", json!({"model_type": "qwen3"})).unwrap();
    assert!(qwen.layers[0].attention.query_norm.is_some());
    let remark = &qwen.remarks()[0];
    assert!(remark.contains("LlamaForCausalLM") && remark.contains("qwen3"), "{remark}");
    let llama = config("llama", json!({})).unwrap();
    for class in ["LLaMAForCausalLM", "LlamaModel"] {
        assert_eq!(config("llama", json!({"architectures": [class]})).unwrap(), llama);
    }
    assert!(
        config("llama", json!({"architectures": ["GPT2LMHeadModel"]})).unwrap().remarks()[0]
            .contains("GPT2LMHeadModel")
    );
    assert_eq!(config("llama", json!({"model_type": null})).unwrap(), llama);
    let neither = config_error("llama", json!({"model_type": null, "architectures": null}));
    assert_eq!(neither, "config.json has no model_type");
}

#[test]
fn what_nobody_knows_is_refused_unless_it_is_off_or_harmless() {
    for (field, value) in [
        ("attn_logit_softcapping", json!(50.0)),
        ("residual_multiplier", json!(0.5)),
        ("sliding_window", json!(64)),
        ("attention_chunk_size", json!(8)),
        ("quantization", json!({"bits": 4})),
        ("kept_layers", json!([0])),
    ] {
        let error = config_error("llama", json!({ field: value.clone() }));
        assert!(error.contains(&format!("{field} is {value}")), "{error}");
        assert!(config("llama", json!({ field: null })).is_ok());
    }
    assert!(config_error("mistral", json!({"attention_bias": true})).contains("attention_bias is true"));
    let many = config_error("llama", json!({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}));
    assert!(many.contains("a is 1, b is 2, c is 3 and 2 more"), "{many}");
    for harmless in [
        json!({"use_mrope": false, "pruned_heads": {}, "torch_dtype": "float16", "hidden_dropout": 0.1}),
        json!({"pad_token_id": 3, "_name_or_path": "x", "temperature": 0.6, "unsloth_version": "2025.1"}),
        json!({"transformers_version": "5.24.0", "pretraining_tp": 2, "rope_interleaved": false}),
    ] {
        assert_eq!(config("llama", harmless).unwrap(), config("llama", json!({})).unwrap());
    }
    // As in the class, where it counts for nothing.
    assert!(config("qwen2", json!({"sliding_window": 131_072, "max_window_layers": 21})).is_ok());
}

#[test]
fn numbers_that_only_python_writes_are_read() {
    let text = fs::read_to_string(data("llama").join("config.json")).unwrap();
    let with = |text: &str, field: &str| text.replacen('{', &format!("{{\"{field}\": "), 1);
    let harmless = with(&text, "temperature").replacen(": ", ": Infinity, \"top_p\": NaN, ", 1);
    assert_eq!(ModelConfig::from_json(&harmless).unwrap(), ModelConfig::from_json(&text).unwrap());
    let used = with(&text, "rope_theta")
        .replacen(": ", ": Infinity, \"x\": null, ", 1)
        .replace("\"rope_theta\": 10000.0,", "");
    assert!(ModelConfig::from_json(&used).unwrap_err().to_string().contains("rope_theta"));
}

/// The rotary table of a Llama of 4 heads of 16 elements and 256 positions.
fn rope(changes: Value) -> RopeConfig {
    config("llama", changes).unwrap().ropes.remove(0)
}

#[test]
fn rope_scaling_goes_before_rope_parameters() {
    let plain = json!({"rope_type": "default", "rope_theta": 10000.0});
    let linear = json!({"type": "linear", "factor": 4.0});
    let both = rope(json!({"rope_parameters": plain, "rope_scaling": linear}));
    assert_eq!(both.scaling, Some(RopeScaling::Linear { factor: 4.0 }));
    assert_eq!(rope(json!({"rope_parameters": linear, "rope_scaling": {}})), both);
    // The base that the scaling does not repeat would be lost.
    let lost = json!({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": linear});
    let error = config_error("llama", lost);
    assert!(error.contains("rope_theta") && error.contains("1000000") && error.contains("rope_scaling"), "{error}");
    let untyped = config_error("llama", json!({"rope_scaling": {"factor": 4.0}}));
    assert!(untyped.contains("rope_scaling") && untyped.contains("rope_type"), "{untyped}");
    let error = config_error("llama", json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "warp": 2}}));
    assert!(error.contains("rope_scaling: warp is 2"), "{error}");
}

#[test]
fn the_parameters_of_scalings_have_the_defaults_of_the_reference_library() {
    let yarn = |changes: Value| {
        let mut parameters = json!({"rope_type": "yarn", "factor": 4.0});
        parameters.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        match rope(json!({"rope_scaling": parameters})).scaling {
            Some(RopeScaling::Yarn(yarn)) => yarn,
            other => panic!("{other:?}"),
        }
    };
    let amplitude = 0.1 * 4f64.ln() + 1.0;
    let (factor, original_positions, beta_fast, beta_slow) = (4.0, 256.0, 32.0, 1.0);
    let plain = YarnScaling { factor, original_positions, beta_fast, beta_slow, truncate: true, amplitude };
    assert_eq!(yarn(json!({})), plain);
    assert_eq!(yarn(json!({"beta_fast": 0, "beta_slow": null, "finetuned": true})), plain);
    assert_eq!(yarn(json!({"attention_factor": 1.5})), YarnScaling { amplitude: 1.5, ..plain });
    let ratio = (0.1 * 2.0 * 4f64.ln() + 1.0) / (0.1 * 0.5 * 4f64.ln() + 1.0);
    assert_eq!(yarn(json!({"mscale": 2.0, "mscale_all_dim": 0.5})), YarnScaling { amplitude: ratio, ..plain });
    let given = yarn(json!({"original_max_position_embeddings": 64, "truncate": false}));
    assert_eq!(given, YarnScaling { original_positions: 64.0, truncate: false, ..plain });
    let ratio = yarn(json!({"original_max_position_embeddings": 64, "factor": null}));
    assert_eq!(ratio, YarnScaling { original_positions: 64.0, ..plain });

    let dynamic = rope(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}));
    assert_eq!(dynamic.scaling, Some(RopeScaling::Dynamic(DynamicScaling { factor: 2.0, original_positions: 256 })));
    assert_eq!(dynamic.changes_above(), Some(256));
    let factors = json!(vec![1.5; 8]);
    let long = |changes: Value| {
        let mut parameters = json!({"rope_type": "longrope", "short_factor": factors, "long_factor": factors});
        parameters.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        json!({"rope_scaling": parameters, "original_max_position_embeddings": 64})
    };
    let amplitude = (1.0 + 4f64.ln() / 64f64.ln()).sqrt();
    assert_eq!((rope(long(json!({}))).amplitude(), rope(long(json!({}))).changes_above()), (amplitude, Some(64)));
    assert_eq!(rope(long(json!({"factor": 1.0}))).amplitude(), 1.0);
    assert!(config_error("llama", long(json!({"short_factor": [1.0]}))).contains("a list of 8 numbers"));
}

#[test]
fn a_scaled_model_has_the_positions_it_is_scaled_for() {
    let positions = |scaling: Value| config("llama", json!({"rope_scaling": scaling})).unwrap().max_positions;
    assert_eq!(positions(json!({"type": "linear", "factor": 4.0})), 1024);
    assert_eq!(positions(json!({"type": "dynamic", "factor": 2.0})), 512);
    assert_eq!(positions(json!({"type": "yarn", "factor": 4.0})), 1024);
    assert_eq!(positions(json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})), 256);
    assert_eq!(positions(json!({"type": "linear", "factor": 1e6})), 1 << 24);
}

#[test]
fn layers_with_a_window_may_have_a_rotary_table_of_their_own() {
    let kinds = json!({"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}});
    let types = json!(["sliding_attention", "full_attention"]);
    let nested =
        json!({"rope_parameters": kinds, "layer_types": types, "use_sliding_window": true, "sliding_window": 8});
    let model = config("qwen3", nested).unwrap();
    let theta = |layer: usize| model.ropes[model.layers[layer].attention.rope.unwrap()].theta;
    assert_eq!((theta(0), theta(1), model.max_positions), (1e6, 1e6, 512));
    assert_eq!(model.layers.iter().map(|layer| layer.attention.rope).collect::<Vec<_>>(), [Some(1), Some(0)]);
    assert!(model.ropes[1].scaling.is_none() && model.ropes[0].scaling.is_some());
    assert!(config_error("llama", json!({"rope_parameters": kinds})).contains("layer_types"));
}

#[test]
fn unusable_configs_name_the_field_and_its_value() {
    let error = config_error("llama", json!({"model_type": "gpt2"}));
    assert!(error.contains("gpt2") && error.contains("LlamaForCausalLM") && error.contains("Qwen3ForCausalLM"));
    for (field, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-3)),
        ("hidden_size", json!(1_u64 << 62)),
        ("intermediate_size", json!("160")),
        ("num_hidden_layers", json!(1_000_000)),
        ("num_attention_heads", json!(2.5)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(15)),
        ("vocab_size", json!(0)),
        ("max_position_embeddings", json!(0)),
        ("rms_norm_eps", json!(-1e-5)),
        ("rope_theta", json!(0)),
        ("rope_scaling", json!("yes")),
        ("hidden_act", json!("gelu")),
        ("hidden_act", json!(1)),
        ("tie_word_embeddings", json!("no")),
        ("partial_rotary_factor", json!(0.5)),
        ("eos_token_id", json!(-1)),
    ] {
        let error = config_error("llama", json!({ field: value.clone() }));
        assert!(error.contains(field) && error.contains(&value.to_string()), "{field} = {value}: {error}");
    }
    for field in ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"] {
        assert_eq!(config_error("llama", json!({ field: null })), format!("config.json has no {field}"));
    }
    assert!(config_error("mistral", json!({"num_key_value_heads": null})).contains("num_key_value_heads"));
    assert!(config_error("llama", json!({"rope_scaling": {"rope_type": "su", "factor": 2.0}})).contains("\"su\""));
    assert!(
        config_error("llama", json!({"rope_scaling": {"type": "llama3", "factor": 2.0}})).contains("low_freq_factor")
    );
    assert!(
        config_error("mistral", json!({"layer_types": ["full_attention", "full_attention"], "sliding_window": 9}))
            .contains("layer_types")
    );
    assert!(
        config_error("qwen2", json!({"layer_types": ["sliding_attention", "full_attention"]}))
            .contains("no sliding_window")
    );
    assert!(
        config_error("llama", json!({"quantization_config": {"quant_method": "gptq"}})).contains("quantization_config")
    );
    assert!(ModelConfig::from_json("{").unwrap_err().to_string().contains("config.json"));
    assert!(ModelConfig::from_json("[]").is_err());
}

/// A copy of a test model whose files may be changed.
fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(data(name)).unwrap() {
        let file = file.unwrap();
        fs::write(dir.path().join(file.file_name()), fs::read(file.path()).unwrap()).unwrap();
    }
    dir
}

fn edit(dir: &TempDir, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let path = dir.path().join(file);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Replaces the first occurrence of a text in a file by one of the same length.
fn replace(dir: &TempDir, file: &str, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    edit(dir, file, |bytes| {
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    });
}

fn open_error(dir: &TempDir) -> String {
    told(&Checkpoint::open(dir.path()).unwrap_err())
}

const MODEL: &str = "model.safetensors";

#[test]
fn missing_files_are_named() {
    let dir = copy("llama");
    fs::remove_file(dir.path().join(MODEL)).unwrap();
    assert!(open_error(&dir).contains("neither model.safetensors nor model.safetensors.index.json"));
    fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(open_error(&dir).contains("config.json"));
    let dir = copy("qwen2");
    fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(open_error(&dir).contains("model-00002-of-00002.safetensors"));
}

#[test]
fn damaged_headers_are_rejected() {
    for (damage, says) in [
        (&(|b: &mut Vec<u8>| b.truncate(5)) as &dyn Fn(&mut Vec<u8>), "5 bytes are too few"),
        (&|b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes()), "18446744073709551615"),
        (&|b| b[8] = b'!', "damaged"),
        (&|b| b.truncate(b.len() - 1), "the header says"),
        (&|b| b.push(0), "the header says"),
    ] {
        let dir = copy("llama");
        edit(&dir, MODEL, damage);
        let error = open_error(&dir);
        assert!(error.contains(says) && error.contains(MODEL), "{error}");
    }
}

#[test]
fn tensors_that_do_not_fit_the_config_are_named() {
    let dir = copy("llama");
    replace(&dir, MODEL, "layers.1.mlp.up_proj", "layers.1.mlp.xx_proj");
    let error = open_error(&dir);
    assert!(error.contains("model.layers.1.mlp.up_proj.weight is missing"), "{error}");

    let dir = copy("llama");
    replace(&dir, "config.json", "\"vocab_size\": 96", "\"vocab_size\": 97");
    let error = open_error(&dir);
    assert!(error.contains("embed_tokens") && error.contains("[96, 64]") && error.contains("[97, 64]"), "{error}");

    let dir = copy("llama");
    replace(&dir, MODEL, "\"BF16\"", "\"I16\" ");
    let error = open_error(&dir);
    assert!(error.contains("dtype I16") && error.contains(".weight"), "{error}");
}

#[test]
fn weights_that_are_not_finite_are_named() {
    for (bits, value) in [(0x7fc0_u16, "NaN"), (0x7f80, "inf"), (0xff80, "-inf")] {
        let dir = copy("llama");
        edit(&dir, MODEL, |bytes| {
            let len = bytes.len();
            bytes[len - 2..].copy_from_slice(&bits.to_le_bytes());
        });
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let weights = checkpoint.config().weights().into_iter().map(|weight| checkpoint.weight(&weight).err());
        let vectors = checkpoint.config().other_tensors().iter().map(|vector| checkpoint.vector(vector).err());
        let error = weights.chain(vectors).flatten().next().unwrap().to_string();
        assert!(error.contains("tensor model.") && error.contains(&format!("holds {value} at element")), "{error}");
    }
}

#[test]
fn an_index_must_be_true_and_stay_in_its_directory() {
    let index = "model.safetensors.index.json";
    let dir = copy("qwen2");
    replace(&dir, index, "\"model-00001-of-00002.safetensors\"", "\"../../../../../../../etc/passwdx\"");
    assert!(open_error(&dir).contains("not a plain file name"));

    let dir = copy("qwen2");
    edit(&dir, index, |bytes| {
        let mut index: Value = serde_json::from_slice(bytes).unwrap();
        index["weight_map"]["model.norm.weight"] = json!("model-00001-of-00002.safetensors");
        *bytes = index.to_string().into_bytes();
    });
    assert!(open_error(&dir).contains("tensor model.norm.weight is not in model-00001-of-00002.safetensors"));
}

#[test]
fn companions_are_the_files_that_are_there() {
    let dir = copy("llama");
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let companions = checkpoint.companions().unwrap();
    let names: Vec<&str> = companions.iter().map(|(name, _)| &name[..]).collect();
    assert_eq!(names, ["config.json", "generation_config.json", "tokenizer.json"]);
    assert_eq!(companions[0].1, checkpoint.config_text().as_bytes());
    let parameters: usize = checkpoint.config().weights().iter().map(|w| w.rows * w.cols).sum::<usize>()
        + checkpoint.config().other_tensors().iter().map(|v| v.len).sum::<usize>();
    assert_eq!(checkpoint.stored_bytes(), 2 * parameters as u64);
}

#[test]
fn a_vocabulary_is_cut_into_16_parts_at_most_and_a_small_one_not() {
    let config = checkpoint("llama").config().clone();
    for (tokens, rows, parts) in
        [(96, 96, 1), (2048, 2048, 1), (2049, 2048, 2), (49152, 3072, 16), (151_936, 9536, 16), (128_256, 8064, 16)]
    {
        let mut config = config.clone();
        (config.vocab_size, config.vocab_part_rows) = (tokens, tokens);
        let cut = config.clone().cut_vocabulary();
        assert_eq!((cut.vocab_part_rows, cut.vocab_parts()), (rows, parts), "{tokens}");
        let names: Vec<String> = cut.weights().into_iter().map(|spec| spec.name).collect();
        assert_eq!(config.clone().cut_as(names.iter().map(|name| &name[..])), cut);
        let of_role = |role| {
            let weights = cut.weights().into_iter().filter(move |spec| spec.role == role);
            weights.map(|spec| (spec.tensor_rows, spec.rows)).reduce(|a, b| (a.0, a.1 + b.1))
        };
        assert_eq!([WeightRole::Embedding, WeightRole::Head].map(of_role), [Some((tokens, tokens)); 2]);
    }
    // Names that lie about the parts are names of nothing.
    for name in
        ["model.embed_tokens.rows.1", "model.embed_tokens.rows.96", "model.embed_tokens.rows.x", "lm_head.rows.9"]
    {
        assert_eq!(config.clone().cut_as([name].into_iter()), config, "{name}");
    }
}

#[test]
fn parts_of_a_vocabulary_hold_its_rows() {
    for name in ["llama", "llama31"] {
        let (_dir, checkpoint) = with_large_vocabulary(name);
        let cut = checkpoint.with_cut_vocabulary();
        assert_eq!(cut.config().vocab_parts(), 3);
        let specs = cut.config().weights();
        let rows: Vec<f32> = specs[..3].iter().flat_map(|s| cut.matrix(s).unwrap().into_iter()).collect();
        let whole = checkpoint.matrix(&checkpoint.config().weights()[0]).unwrap();
        assert_eq!(rows, whole.into_raw_vec_and_offset().0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is written over the header, opening gives a result and not a panic.
    #[test]
    fn overwritten_headers_do_not_panic(at in 0_usize..2000, junk in proptest::collection::vec(any::<u8>(), 1..12)) {
        let dir = copy("llama");
        edit(&dir, MODEL, |bytes| bytes[at..at + junk.len()].copy_from_slice(&junk));
        if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
            let _ = checkpoint.config().weights().iter().try_for_each(|weight| checkpoint.weight(weight).map(drop));
        }
    }
}

#[test]
fn newer_families_have_the_parts_that_their_configs_name() {
    let phi3 = config("phi3", json!({})).unwrap();
    assert_eq!((phi3.layers[0].attention.head_dim, phi3.layers[0].attention.rotary_dim), (8, 6));
    // Older configs name the share, and Granite its factors, at the top.
    let share = json!({"rope_parameters": null, "rope_theta": 1e4, "partial_rotary_factor": 0.75});
    assert_eq!(config("phi3", share).unwrap(), phi3);
    let error = config_error("phi3", json!({"rope_parameters": null, "partial_rotary_factor": 0.4}));
    assert!(error.contains("partial_rotary_factor is 3"), "{error}");

    let ropes = |model: &ModelConfig| model.layers.iter().map(|layer| layer.attention.rope).collect::<Vec<_>>();
    assert_eq!(ropes(&config("smollm3", json!({})).unwrap()), [Some(0), None, Some(0)]);
    let second =
        config("smollm3", json!({"no_rope_layers": null, "no_rope_layer_interval": 3, "rope_parameters": null}));
    let second = second.unwrap();
    assert_eq!((ropes(&second), second.ropes[0].theta), (vec![Some(0), Some(0), None], 2e6));
    for list in [json!([1, 0]), json!([1, 0, 2]), json!("all")] {
        assert!(config_error("smollm3", json!({"no_rope_layers": list})).contains("no_rope_layers"));
    }

    let gemma3 = config("gemma3", json!({})).unwrap();
    assert_eq!(windows(&gemma3), [Some(16), None, Some(16)]);
    assert!(gemma3.tied && gemma3.norms().all(|norm| norm.offset == 1.0));
    let old = json!({"rope_parameters": null, "rope_theta": 1e4, "rope_local_base_freq": 100, "layer_types": null,
        "sliding_window_pattern": 2});
    assert_eq!(config("gemma3", old).unwrap(), gemma3);
    for (field, value) in [
        ("attn_logit_softcapping", json!(50.0)),
        ("use_bidirectional_attention", json!(true)),
        ("hidden_activation", json!("gelu")),
        ("rope_parameters", json!({"rope_theta": 1e4})),
    ] {
        let error = config_error("gemma3", json!({ field: value }));
        assert!(error.contains(field), "{error}");
    }

    let experts = |model: &ModelConfig| {
        let experts = model.layers.iter().map(|layer| match &layer.mlp {
            Mlp::Dense(_) => 0,
            Mlp::Experts(experts) => experts.experts.len(),
        });
        experts.collect::<Vec<_>>()
    };
    let qwen3_moe = config("qwen3_moe", json!({})).unwrap();
    assert_eq!(experts(&qwen3_moe), [0, 6]);
    assert_eq!(config("qwen3_moe", json!({"num_local_experts": null, "num_experts": 6})).unwrap(), qwen3_moe);
    assert_eq!(experts(&config("qwen3_moe", json!({"decoder_sparse_step": 3})).unwrap()), [0, 0]);
    assert_eq!(experts(&config("mixtral", json!({})).unwrap()), [4, 4]);
    for (field, value) in [
        ("num_experts_per_tok", json!(7)),
        ("num_local_experts", json!(1 << 15)),
        ("mlp_only_layers", json!([-1])),
        ("moe_intermediate_size", json!(null)),
    ] {
        let error = config_error("qwen3_moe", json!({ field: value }));
        assert!(error.contains(field), "{error}");
    }
    assert!(config_error("granite", json!({"logits_scaling": 0})).contains("logits_scaling"));
}
