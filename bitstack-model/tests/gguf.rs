//! GGUF files as checkpoints: they are the directories that they were made of.

#[path = "fixtures/mod.rs"]
mod fixtures;
#[path = "fixtures/gguf.rs"]
mod gguf;
#[path = "../../bitstack-gguf/tests/fixtures/mod.rs"]
mod gguf_file;

use bitstack_gguf::BlockType;
use bitstack_model::{Checkpoint, Tokenizer};
use fixtures::{tensors, told};
use gguf::{HEAD_DIM, companion, metadata, model, open, tokens, with_tensors, with_tokenizer};
use gguf_file::File;
use serde_json::json;
use std::f32::consts::TAU;

#[track_caller]
fn refused(file: &File, expected: &str) {
    let dir = tempfile::tempdir().unwrap();
    let error = told(&open(dir.path(), file).unwrap_err());
    assert!(error.contains(expected) && error.contains("x.gguf"), "{error}\nexpected: {expected}");
}

fn whole() -> File {
    with_tensors(with_tokenizer(metadata("llama")), BlockType::F32)
}

#[test]
fn tensors_are_those_of_the_directory_in_its_names_and_order_of_rows() {
    let (_dir, path, directory) = model(BlockType::F32);
    let (file, directory) = (Checkpoint::open(&path).unwrap(), Checkpoint::open(directory).unwrap());
    assert_eq!(file.config(), &{
        let mut config = directory.config().clone();
        config.eos_tokens = vec![tokens().len() as u32 - 1];
        config
    });
    assert_eq!(tensors(&file), tensors(&directory));
    assert!(file.remarks().is_empty());
    assert_eq!(file.stored_bytes(), directory.stored_bytes());
}

#[test]
fn a_quantised_file_is_read_in_half_precision_and_says_so() {
    let (_dir, path, directory) = model(BlockType::Q8_0);
    let (file, directory) = (Checkpoint::open(&path).unwrap(), Checkpoint::open(directory).unwrap());
    for ((name, (shape, values)), (_, (_, expected))) in tensors(&file).into_iter().zip(tensors(&directory)) {
        // f16 has 11 bits.
        let close = values.iter().zip(&expected).all(|(x, y)| (x - y).abs() <= y.abs() / 2048.0 + 1e-7);
        assert!(close && shape.len() == 2 || values == expected, "{name}");
    }
    let [remark] = file.remarks() else { panic!("{:?}", file.remarks()) };
    assert!(remark.contains("quantised already (Q8_0)"), "{remark}");
}

#[test]
fn a_head_that_is_the_embedding_at_another_precision_is_not_another_matrix() {
    let dir = tempfile::tempdir().unwrap();
    let quantised = with_tensors(metadata("llama"), BlockType::Q8_0);
    let (_, shape, _, _) = quantised.tensors[0].clone();
    let embedding = gguf_file::values(BlockType::Q8_0, &quantised.tensors[0].3);
    let shape: Vec<usize> = shape.iter().map(|&n| n as usize).collect();
    let twin = open(dir.path(), &quantised.clone().f32_tensor("output.weight", &shape, &embedding)).unwrap();
    assert!(twin.config().tied && twin.remarks()[1].contains("output.weight serves as both"), "{:?}", twin.remarks());
    let mut other = embedding;
    other.reverse();
    let untied = open(dir.path(), &quantised.f32_tensor("output.weight", &shape, &other)).unwrap();
    assert!(!untied.config().tied && untied.remarks().len() == 1);
    assert_eq!(untied.shape("lm_head.weight").unwrap(), shape);
}

#[test]
fn the_tokenizer_and_the_template_are_made_of_the_metadata() {
    let (_dir, path, _) = model(BlockType::F32);
    let file = Checkpoint::open(&path).unwrap();
    let tokenizer = Tokenizer::from_bytes(&file.companion("tokenizer.json").unwrap()).unwrap();
    let id = |token: &str| tokens().iter().position(|t| t == token).unwrap() as u32;
    let end = id("<|end|>");
    // The begin token is Llama 3's default; special tokens are found in a text.
    let expected = [end, id("x"), id("Ġthe"), id("in"), id("1"), end];
    assert_eq!(tokenizer.encode("x thein1<|end|>").unwrap(), expected);
    assert_eq!(tokenizer.decode(&expected).unwrap(), "x thein1");
    assert_eq!(companion(&file, "tokenizer_config.json")["eos_token"], "<|end|>");
    assert_eq!(file.companion("chat_template.jinja").unwrap(), b"{{ messages }}");
    assert!(
        file.has_companion("chat_template.jinja").unwrap() && !file.has_companion("generation_config.json").unwrap()
    );
    let names: Vec<String> = file.companions().unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]);
    assert_eq!(file.companion("config.json").unwrap(), file.config_text().as_bytes());
}

#[test]
fn sentencepiece_tokens_are_merged_by_score_and_fall_back_to_bytes() {
    let bytes: Vec<String> = (0..256).map(|b| format!("<0x{b:02X}>")).collect();
    let words = ["▁", "a", "b", "ab", "▁a", "▁ab"];
    let all: Vec<&str> =
        ["<unk>", "<s>", "</s>"].into_iter().chain(bytes.iter().map(String::as_str)).chain(words).collect();
    let kinds: Vec<i32> = (0..all.len() as i32)
        .map(|i| [2, 3, 3].get(i as usize).copied().unwrap_or(if i < 259 { 6 } else { 1 }))
        .collect();
    let scores: Vec<f32> = (0..all.len()).map(|i| if i < 262 { 0.0 } else { -(i as f32) }).collect();
    let file = with_tensors(metadata("llama"), BlockType::F32)
        .text("tokenizer.ggml.model", "llama")
        .texts("tokenizer.ggml.tokens", all.iter().copied())
        .i32s("tokenizer.ggml.token_type", &kinds)
        .f32s("tokenizer.ggml.scores", &scores)
        .u32("tokenizer.ggml.bos_token_id", 1);
    let dir = tempfile::tempdir().unwrap();
    let file = open(dir.path(), &file).unwrap();
    let tokenizer = Tokenizer::from_bytes(&file.companion("tokenizer.json").unwrap()).unwrap();
    let id = |token: &str| all.iter().position(|t| *t == token).unwrap() as u32;
    // "ab" has a higher score than "▁a", so it is merged first.
    let expected = [1, id("▁ab"), id("ab"), id("▁"), id("<0xC3>"), id("<0xA9>")];
    assert_eq!(tokenizer.encode("abab é").unwrap(), expected);
    assert_eq!(tokenizer.decode(&expected).unwrap(), "abab é");
}

#[test]
fn llama_3_1_scaling_is_known_by_its_factors() {
    let (factor, original) = (8.0, 8192.0);
    let factors: Vec<f32> = (0..HEAD_DIM / 2)
        .map(|i| {
            let turns = original / (TAU * 5e5_f32.powf(2.0 * i as f32 / HEAD_DIM as f32));
            let smooth = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
            1.0 / ((1.0 - smooth) / factor + smooth)
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let file = open(dir.path(), &whole().f32_tensor("rope_freqs.weight", &[HEAD_DIM / 2], &factors)).unwrap();
    let scaling = companion(&file, "config.json")["rope_scaling"].clone();
    assert_eq!(
        scaling,
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})
    );
    let mut others = factors.clone();
    others[HEAD_DIM / 2 - 1] *= 1.5;
    others[1] *= 1.1;
    refused(&whole().f32_tensor("rope_freqs.weight", &[HEAD_DIM / 2], &others), "expected Llama 3.1's factors");
    refused(&whole().f32_tensor("rope_freqs.weight", &[1], &[8.0]), "rope_freqs.weight is [8.0]");
}

#[test]
fn whatever_may_change_the_arithmetic_is_refused_by_its_name() {
    refused(&whole().f32("llama.logit_scale", 0.5), "llama.logit_scale is 0.5");
    refused(&whole().u32("llama.expert_count", 8), "llama.expert_count is 8");
    refused(&whole().bool("llama.attention.causal", false), "llama.attention.causal is false");
    refused(&whole().u32("llama.attention.key_length", 16), "rope.dimension_count is another");
    refused(&whole().f32_tensor("blk.0.attn_sinks.weight", &[4], &[0.0; 4]), "tensor blk.0.attn_sinks.weight is there");
    refused(&whole().f32_tensor("blk.00.attn_q.weight", &[1], &[0.0]), "tensor blk.00.attn_q.weight");
    refused(&metadata("grok"), "unsupported architecture \"grok\"");
    refused(&metadata("llama"), "token_embd.weight is missing");
    refused(
        &with_tensors(File::default().text("general.architecture", "llama"), BlockType::F32),
        "llama.embedding_length is not there",
    );
    // Its factors are in tensors of their own there.
    refused(&whole().text("llama.rope.scaling.type", "longrope"), "short_factor");
    let experts =
        [[&4u32.to_le_bytes()[..], &2u64.to_le_bytes()].concat(), [2u32.to_le_bytes(), 3u32.to_le_bytes()].concat()]
            .concat();
    let mixed =
        with_tensors(metadata("qwen2").raw("qwen2.rope.scaling.original_context_length", 9, &experts), BlockType::F32);
    refused(&mixed, "the same in all layers");
}

#[test]
fn tokenizers_that_are_not_known_are_refused_by_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let error = |file: &File| open(dir.path(), file).unwrap().companion("tokenizer.json").unwrap_err().to_string();
    let base = || with_tensors(metadata("llama"), BlockType::F32);
    let pre = base()
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-9")
        .texts("tokenizer.ggml.tokens", ["a"]);
    assert!(
        error(&pre.texts("tokenizer.ggml.merges", []))
            .contains("tokenizer.ggml.pre is \"gpt-9\", expected one of default, gpt-2")
    );
    let model = base().text("tokenizer.ggml.model", "t5").texts("tokenizer.ggml.tokens", ["a"]);
    assert!(error(&model).contains("tokenizer.ggml.model is \"t5\""));
    assert!(error(&base().text("tokenizer.ggml.model", "gpt2")).contains("tokenizer.ggml.tokens is no list of texts"));
    assert!(error(&base()).contains("no tokenizer.json in"));
    let short = base()
        .text("tokenizer.ggml.model", "llama")
        .texts("tokenizer.ggml.tokens", ["a"])
        .f32s("tokenizer.ggml.scores", &[]);
    assert!(error(&short).contains("tokenizer.ggml.scores is of another length"));
}
