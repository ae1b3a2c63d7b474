//! The metadata as the fields of a `config.json`. Every key of the architecture is read here or refused: none is left out in silence.

use super::Differs;
use crate::ModelError;
use bitstack_gguf::{Gguf, Value};
use bitstack_io::hostile::printable;
use serde_json::{Map, json};
use std::f64::consts::TAU;
use std::path::Path;

/// An architecture, the class of models that it is in a directory, and that class's `model_type`.
const ARCHITECTURES: [(&str, &str, &str); 4] = [
    ("llama", "LlamaForCausalLM", "llama"),
    ("qwen2", "Qwen2ForCausalLM", "qwen2"),
    ("qwen3", "Qwen3ForCausalLM", "qwen3"),
    ("gemma3", "Gemma3ForCausalLM", "gemma3_text"),
];

/// Keys of an architecture that say nothing about the arithmetic, or nothing that other keys and the tensors do not say.
const WITHOUT_MEANING: [&str; 4] =
    ["vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.value_length"];

/// The metadata of a model.
pub(super) struct Keys<'g> {
    path: &'g Path,
    gguf: &'g Gguf,
    architecture: &'g str,
    class: &'static str,
    model_type: &'static str,
}

impl<'g> Keys<'g> {
    pub(super) fn new(path: &'g Path, gguf: &'g Gguf) -> Result<Self, ModelError> {
        let architecture = gguf.get("general.architecture").and_then(Value::as_str).unwrap_or_default();
        let known = ARCHITECTURES.iter().find(|(name, _, _)| *name == architecture);
        let (_, class, model_type) = known.ok_or_else(|| ModelError::UnknownArchitecture {
            found: format!("{:?} of {}", printable(architecture), path.display()),
            supported: format!("{} in GGUF files", ARCHITECTURES.map(|(name, _, _)| name).join(", ")),
        })?;
        Ok(Self { path, gguf, architecture, class, model_type })
    }

    pub(super) fn architecture(&self) -> &str {
        self.architecture
    }

    fn bad(&self, key: &str, found: impl ToString, expected: impl Into<String>) -> ModelError {
        let (path, found) = (self.path.to_owned(), printable(&found.to_string()));
        ModelError::GgufKey { path, key: printable(key), found, expected: expected.into() }
    }

    fn get(&self, key: &str) -> Option<&'g Value> {
        self.gguf.get(&format!("{}.{key}", self.architecture))
    }

    /// A whole number; of an array of equal ones, one of them.
    fn whole(&self, key: &str) -> Result<Option<u64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let whole = value.as_u64().or_else(|| {
            let mut numbers = value.as_numbers()?.iter();
            let first = numbers.next()?.as_u64()?;
            numbers.all(|number| number.as_u64() == Some(first)).then_some(first)
        });
        let bad = || {
            self.bad(&format!("{}.{key}", self.architecture), shown(value), "a whole number, the same in all layers")
        };
        whole.map(Some).ok_or_else(bad)
    }

    fn required(&self, key: &str) -> Result<u64, ModelError> {
        self.whole(key)?.ok_or_else(|| self.bad(&format!("{}.{key}", self.architecture), "not there", "a whole number"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let bad = || self.bad(&format!("{}.{key}", self.architecture), shown(value), "a number");
        value.as_f64().filter(|x| x.is_finite()).map(Some).ok_or_else(bad)
    }

    fn has(&self, tensor: &str) -> bool {
        self.gguf.tensors().iter().any(|t| t.name == tensor)
    }

    fn is_gemma(&self) -> bool {
        self.architecture == "gemma3"
    }

    /// Whether attention and feed-forward part have norms behind them.
    pub(super) fn has_post_norms(&self) -> bool {
        self.is_gemma()
    }

    /// By what a tensor of this name in a directory differs from that one.
    pub(super) fn differs(&self, name: &str) -> Differs {
        match self.interleaved_heads(name) {
            Some(heads) => Differs::Interleaved(heads),
            None if self.is_gemma() && name.ends_with("norm.weight") => Differs::PlusOne,
            None => Differs::Not,
        }
    }

    /// Heads whose rows are interleaved in a tensor of this name in a directory.
    fn interleaved_heads(&self, name: &str) -> Option<usize> {
        let key = match name.strip_prefix("model.layers.")?.split_once('.')?.1 {
            "self_attn.q_proj.weight" | "self_attn.q_proj.bias" => "attention.head_count",
            "self_attn.k_proj.weight" | "self_attn.k_proj.bias" => "attention.head_count_kv",
            _ => return None,
        };
        let heads = [key, "attention.head_count"].iter().find_map(|key| self.whole(key).ok().flatten());
        heads.filter(|_| self.architecture == "llama").and_then(|heads| usize::try_from(heads).ok())
    }

    /// The fields of a `config.json`, in its order. `rope_factors` is the tensor of that name.
    pub(super) fn config(
        &self,
        tied: bool,
        rope_factors: Option<&[f32]>,
    ) -> Result<Map<String, serde_json::Value>, ModelError> {
        let mut config = Map::new();
        let mut set = |field: &str, value: serde_json::Value| drop(config.insert(field.to_owned(), value));
        let window = self.whole("attention.sliding_window")?.filter(|window| *window > 0);
        let (class, model_type) = match window {
            Some(_) if self.architecture == "llama" => ("MistralForCausalLM", "mistral"),
            _ => (self.class, self.model_type),
        };
        set("architectures", json!([class]));
        set("model_type", json!(model_type));
        let (hidden, heads) = (self.required("embedding_length")?, self.required("attention.head_count")?);
        let head_dim = match self.whole("attention.key_length")? {
            Some(size) => size,
            None if heads > 0 && hidden % heads == 0 => hidden / heads,
            None => {
                return Err(self.bad(
                    "attention.head_count",
                    heads,
                    format!("a divisor of embedding_length ({hidden})"),
                ));
            }
        };
        if self.whole("attention.value_length")?.is_some_and(|size| size != head_dim) {
            return Err(self.bad("attention.value_length", "another", format!("that of keys, {head_dim}")));
        }
        set("hidden_size", json!(hidden));
        set("intermediate_size", json!(self.required("feed_forward_length")?));
        set("num_hidden_layers", json!(self.required("block_count")?));
        set("num_attention_heads", json!(heads));
        set("num_key_value_heads", json!(self.whole("attention.head_count_kv")?.unwrap_or(heads)));
        set("head_dim", json!(head_dim));
        if self.is_gemma() {
            self.gemma(&mut set, hidden, heads, head_dim)?;
        } else {
            set("hidden_act", json!("silu"));
        }
        let embedding = self.gguf.tensors().iter().find(|tensor| tensor.name == super::EMBEDDING);
        let vocab = embedding.and_then(|tensor| tensor.shape.first().copied());
        let missing = || ModelError::MissingTensor { tensor: super::EMBEDDING.to_owned(), place: self.path.to_owned() };
        set("vocab_size", json!(vocab.ok_or_else(missing)?));
        let positions = self.required("context_length")?;
        set("max_position_embeddings", json!(positions));
        let eps = self.number("attention.layer_norm_rms_epsilon")?;
        let eps = eps.ok_or_else(|| self.bad("attention.layer_norm_rms_epsilon", "not there", "a number"))?;
        set("rms_norm_eps", json!(eps));
        let theta = self.number("rope.freq_base")?.unwrap_or(if self.is_gemma() { 1e6 } else { 10_000.0 });
        set("rope_theta", json!(theta));
        if let Some(scaling) = self.rope_scaling(theta, head_dim, positions, rope_factors)? {
            set("rope_scaling", scaling);
        }
        if self.whole("rope.dimension_count")?.is_some_and(|n| n != head_dim) {
            return Err(self.bad("rope.dimension_count", "another", format!("the size of a head, {head_dim}")));
        }
        match (self.architecture, window) {
            ("qwen2" | "qwen3", None) => set("use_sliding_window", json!(false)),
            ("llama" | "gemma3", Some(window)) => set("sliding_window", json!(window)),
            (_, None) => {}
            (_, Some(window)) => {
                return Err(self.bad("attention.sliding_window", window, "0: which layers it is for is not said"));
            }
        }
        let bias = self.has("blk.0.attn_q.bias") || self.has("blk.0.attn_output.bias");
        match model_type {
            "llama" => {
                set("attention_bias", json!(bias));
                set("mlp_bias", json!(self.has("blk.0.ffn_down.bias")));
            }
            "qwen3" => set("attention_bias", json!(bias)),
            _ => {}
        }
        set("tie_word_embeddings", json!(tied));
        let is_bf16 = embedding.is_some_and(|tensor| tensor.kind == bitstack_gguf::BlockType::BF16);
        set("torch_dtype", json!(if is_bf16 { "bfloat16" } else { "float16" }));
        let token = |key: &str| self.gguf.get(&format!("tokenizer.ggml.{key}_token_id")).and_then(Value::as_u64);
        if let Some(begin) = token("bos") {
            set("bos_token_id", json!(begin));
        }
        let mut ends: Vec<u64> = ["eos", "eot", "eom"].into_iter().filter_map(token).collect();
        ends.dedup();
        if !ends.is_empty() {
            set("eos_token_id", json!(ends));
        }
        self.refuse_others()?;
        Ok(config)
    }

    /// Fields that only Gemma 3 has. The metadata do not say how scores are scaled: by the size of a head, but in the model of 62 layers, where it is an
    /// equal share of the width.
    fn gemma(
        &self,
        set: &mut impl FnMut(&str, serde_json::Value),
        hidden: u64,
        heads: u64,
        head_dim: u64,
    ) -> Result<(), ModelError> {
        const LARGEST_LAYERS: u64 = 62;
        set("hidden_activation", json!("gelu_pytorch_tanh"));
        let is_largest = self.required("block_count")? == LARGEST_LAYERS;
        set("query_pre_attn_scalar", json!(if is_largest { hidden / heads.max(1) } else { head_dim }));
        set("rope_local_base_freq", json!(self.number("rope.freq_base_swa")?.unwrap_or(10_000.0)));
        set("sliding_window_pattern", json!(self.whole("attention.sliding_window_pattern")?.unwrap_or(6)));
        if let Some(cap) = self.number("final_logit_softcapping")?.filter(|cap| *cap > 0.0) {
            set("final_logit_softcapping", json!(cap));
        }
        Ok(())
    }

    /// Scaling of rotary wavelengths: by the metadata, or by Llama 3.1's rule, whose factors stand in a tensor.
    fn rope_scaling(
        &self,
        theta: f64,
        head_dim: u64,
        positions: u64,
        factors: Option<&[f32]>,
    ) -> Result<Option<serde_json::Value>, ModelError> {
        let kind = self.get("rope.scaling.type").map(|value| value.as_str().unwrap_or("no text"));
        let old = self.number("rope.scale_linear")?.filter(|factor| *factor != 1.0);
        let factor = self.number("rope.scaling.factor")?.or(old);
        let original = self.whole("rope.scaling.original_context_length")?;
        if let Some(factors) = factors {
            if !matches!(kind, None | Some("none")) {
                return Err(self.bad(super::ROPE_FACTORS, "there", "no rope.scaling.type beside it"));
            }
            let found = llama3(theta, head_dim, original.unwrap_or(8192), factors);
            let unlike = || {
                self.bad(super::ROPE_FACTORS, format!("{:?}", &factors[..factors.len().min(4)]), "Llama 3.1's factors")
            };
            return found.map(Some).ok_or_else(unlike);
        }
        let kind = kind.or(factor.map(|_| "linear")).filter(|kind| *kind != "none");
        Ok(kind.map(|kind| {
            let mut scaling = json!({"rope_type": kind, "factor": factor});
            if kind != "linear" {
                scaling["original_max_position_embeddings"] = json!(original.unwrap_or(positions));
            }
            scaling
        }))
    }

    /// Refuses keys of the architecture that nothing above has read.
    fn refuse_others(&self) -> Result<(), ModelError> {
        const READ: [&str; 16] = [
            "block_count",
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            "attention.layer_norm_rms_epsilon",
            "attention.sliding_window",
            "rope.dimension_count",
            "rope.freq_base",
            "rope.scale_linear",
            "rope.scaling.type",
            "rope.scaling.factor",
            "rope.scaling.original_context_length",
            "attention.causal",
        ];
        const OF_GEMMA: [&str; 3] =
            ["rope.freq_base_swa", "attention.sliding_window_pattern", "final_logit_softcapping"];
        for (key, value) in self.gguf.metadata() {
            let Some(rest) = key.strip_prefix(self.architecture).and_then(|rest| rest.strip_prefix('.')) else {
                continue;
            };
            let zero = value.as_f64() == Some(0.0) && rest.starts_with("expert_");
            let causal = rest != "attention.causal" || value.as_bool() == Some(true);
            let gemma = self.is_gemma() && OF_GEMMA.contains(&rest);
            if !causal || !(zero || gemma || READ.contains(&rest) || WITHOUT_MEANING.contains(&rest)) {
                return Err(self.bad(
                    key,
                    shown(value),
                    "a key that is known here: this one may change the arithmetic",
                ));
            }
        }
        Ok(())
    }
}

/// Llama 3.1's scaling, where these are its factors of the wavelengths: 1 for short ones, `factor` for long ones, between in between.
fn llama3(theta: f64, head_dim: u64, original: u64, found: &[f32]) -> Option<serde_json::Value> {
    const TOLERANCE: f64 = 1e-3;
    let (low, high) = (1.0, 4.0);
    let factor = f64::from(found.iter().copied().fold(1.0, f32::max));
    let expected = |i: usize| {
        let wavelength = TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
        let turns = original as f64 / wavelength;
        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    let is_it = found.len() as u64 == head_dim / 2
        && found.iter().enumerate().all(|(i, f)| (f64::from(*f) / expected(i) - 1.0).abs() < TOLERANCE);
    is_it.then(|| {
        json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original})
    })
}

/// A value in a message.
fn shown(value: &Value) -> String {
    match value {
        Value::Number(number) => number.as_u64().map_or_else(|| number.as_f64().to_string(), |n| n.to_string()),
        Value::Bool(value) => value.to_string(),
        Value::Text(text) => format!("{text:?}"),
        Value::Numbers(numbers) => format!("a list of {} numbers", numbers.len()),
        _ => "a list of texts".to_owned(),
    }
}
