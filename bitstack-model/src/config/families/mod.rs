//! The families of models. To add one: write a file here that makes a [`ModelConfig`] from the fields of its `config.json`, list it in
//! [`FAMILIES`], and add a small checkpoint with expected logits to the test data (its README says how).

mod gemma3;
mod granite;
mod llama;
mod mistral;
mod mixtral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod slots;
mod smollm3;

use super::builder::{Builder, LayerBuilder};
use super::fields::{Fields, bad};
use super::harmless::is_harmless;
use super::layer::{Activation, Attention, FeedForward, FeedForwardInput, Layer, Mlp, Projections};
use super::{ModelConfig, WeightRole, limit};
use crate::ModelError;
use bitstack_io::hostile::printable;
use serde_json::{Map, Value};
use slots::Slots;

/// A family of decoders with the same arithmetic.
pub(super) struct Family {
    /// `architectures[0]` in its configs.
    class: &'static str,
    /// `model_type` in its configs, which says what the others mean; the class counts only where it is missing.
    model_type: &'static str,
    /// The values of fields that a config leaves out, as JSON: those of the class in the Hugging Face library. The sizes without which there is no
    /// model are not among them.
    defaults: &'static str,
    /// Makes the model. Every field that changes its arithmetic is asked for; one that is not asked for, and neither harmless nor as in `defaults`, is
    /// refused.
    describe: fn(&Fields<'_>) -> Result<ModelConfig, ModelError>,
}

const FAMILIES: [Family; 11] = [
    llama::FAMILY,
    mistral::FAMILY,
    mixtral::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    qwen3_moe::FAMILY,
    gemma3::FAMILY,
    phi3::FAMILY,
    smollm3::FAMILY,
    olmo2::FAMILY,
    granite::FAMILY,
];

/// The model that a config describes.
pub(super) fn describe(config: &Map<String, Value>) -> Result<ModelConfig, ModelError> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let class = text(config.get("architectures").and_then(|list| list.get(0)));
    let model_type = text(config.get("model_type"));
    let found = model_type.as_ref().or(class.as_ref()).ok_or(ModelError::MissingField { field: "model_type" })?;
    let is_named = |family: &&Family| match model_type {
        Some(_) => family.model_type == found,
        None => family.class == found,
    };
    let family = FAMILIES.iter().find(is_named).ok_or_else(|| ModelError::UnknownArchitecture {
        found: printable(found),
        supported: FAMILIES.map(|family| family.class).join(", "),
    })?;
    let defaults: Map<String, Value> = serde_json::from_str(family.defaults).expect("an object, as the tests see");
    let mut whole = defaults.clone();
    whole.extend(config.iter().map(|(name, value)| (name.clone(), value.clone())));
    let fields = Fields::new(&whole);
    if fields.get("quantization_config").is_some() {
        return Err(bad("quantization_config", "present", "a checkpoint of f32, f16 or bf16 weights"));
    }
    let mut model = (family.describe)(&fields)?;
    fields.check_known("config.json", |name, value| is_harmless(name) || defaults.get(name) == Some(value))?;
    // Another spelling of the same family is nothing to remark on.
    let own = family.class.to_lowercase().replace("forcausallm", "");
    let is_other = |class: &String| {
        let is_of_another = FAMILIES.iter().any(|other| other.class == class && other.class != family.class);
        is_of_another || !class.to_lowercase().starts_with(&own)
    };
    if let Some(class) = class.filter(is_other) {
        let (class, model_type) = (printable(&class), family.model_type);
        let remark = format!("config.json: architectures is {class}, but model_type {model_type}; read as the latter");
        model.remarks.push(remark);
    }
    Ok(model)
}

/// By what families of decoders with a gated feed-forward part differ.
struct Gated {
    /// Key and value heads where the config says `null`: `None` where it may not.
    kv_heads_of_null: Option<usize>,
    /// Biases of query, key and value projections.
    qkv_bias: bool,
    /// Bias of the attention's output projection.
    output_bias: bool,
    /// Biases of gate, up and down projections.
    mlp_bias: bool,
    /// Whether every query and key head goes through an RMS norm.
    qk_norm: bool,
    /// The attention window of each layer.
    windows: Vec<Option<usize>>,
    /// What stands in the slots that Llama leaves empty.
    slots: Slots,
}

impl Gated {
    /// The model. Its tensors have the names that Llama's have.
    fn describe(self, fields: &Fields<'_>) -> Result<ModelConfig, ModelError> {
        let hidden_size = fields.dimension("hidden_size", limit::HIDDEN)?;
        let size = fields.dimension("intermediate_size", limit::INTERMEDIATE)?;
        let n_heads = fields.dimension("num_attention_heads", limit::HEADS)?;
        let n_kv_heads = match (fields.get("num_key_value_heads"), self.kv_heads_of_null) {
            (None, Some(n)) => n,
            _ => fields.dimension("num_key_value_heads", limit::HEADS)?,
        };
        if n_heads % n_kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads ({n_heads})");
            return Err(bad("num_key_value_heads", n_kv_heads, expected));
        }
        let head_dim = match fields.get("head_dim") {
            Some(_) => fields.dimension("head_dim", limit::HEAD_DIM)?,
            None if hidden_size % n_heads == 0 => hidden_size / n_heads,
            None => {
                let expected = format!("a divisor of hidden_size ({hidden_size}) where head_dim is not given");
                return Err(bad("num_attention_heads", n_heads, expected));
            }
        };
        let slots = &self.slots;
        let rotary_dim = (head_dim as f64 * slots.rotary_share) as usize;
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            let field = if rotary_dim == head_dim { "head_dim" } else { "partial_rotary_factor" };
            let expected = format!("an even number of elements of {head_dim} to turn by rotary positions");
            return Err(bad(field, rotary_dim, expected));
        }
        let activation = match (slots.activation, fields.get("hidden_act").map(|v| v.as_str())) {
            (Some(activation), _) => activation,
            (None, None | Some(Some("silu" | "swish"))) => Activation::Silu,
            (None, Some(Some("gelu_pytorch_tanh" | "gelu_new"))) => Activation::GeluTanh,
            (None, Some(_)) => return Err(fields.bad("hidden_act", "\"silu\" or \"gelu_pytorch_tanh\"")),
        };
        let rotary_part = fields.partial_rotary_factor()?;
        if rotary_part != slots.rotary_share {
            return Err(bad("partial_rotary_factor", rotary_part, "1"));
        }
        let ropes = match &slots.ropes {
            Some(ropes) => ropes.clone(),
            None => fields.ropes(rotary_dim)?,
        };
        let eps = fields.number("rms_norm_eps", 1e-6, 0.0, 1.0)? as f32;

        let (query_size, kv_size) = (n_heads * head_dim, n_kv_heads * head_dim);
        let mut model = Builder::default();
        for (index, window) in self.windows.iter().copied().enumerate() {
            let mut layer = model.layer();
            let is_turned = slots.turned.get(index).is_none_or(|turned| *turned);
            let norm = |layer: &mut LayerBuilder<'_>, name: Option<&str>| {
                name.map(|name| layer.norm(name, hidden_size, eps, slots.norm_offset))
            };
            let attention_norm = norm(&mut layer, slots.norms[0]);
            let mut attended = |part: &str, role, rows| layer.linear(part, role, [rows, hidden_size], self.qkv_bias);
            let projections = if slots.fused {
                let rows = query_size + 2 * kv_size;
                Projections::Fused(attended("self_attn.qkv_proj", WeightRole::QueryKeyValue, rows))
            } else {
                Projections::Separate {
                    query: attended("self_attn.q_proj", WeightRole::Query, query_size),
                    key: attended("self_attn.k_proj", WeightRole::Key, kv_size),
                    value: attended("self_attn.v_proj", WeightRole::Value, kv_size),
                }
            };
            let mut head_norm = |part, all| {
                let len = if slots.heads_together { all } else { head_dim };
                self.qk_norm.then(|| layer.norm(part, len, eps, slots.norm_offset))
            };
            let query_norm = head_norm("self_attn.q_norm", query_size);
            let key_norm = head_norm("self_attn.k_norm", kv_size);
            let shape = [hidden_size, query_size];
            let output = layer.linear("self_attn.o_proj", WeightRole::AttentionOutput, shape, self.output_bias);
            let attention_post_norm = norm(&mut layer, slots.norms[1]);
            let mlp_norm = norm(&mut layer, slots.norms[2]);
            let mlp = match &slots.mixture {
                Some(mixture) if mixture.layers[index] => mixture.build(&mut layer, hidden_size, activation),
                _ => Mlp::Dense(self.feed_forward(&mut layer, [size, hidden_size], activation)),
            };
            let mlp_post_norm = norm(&mut layer, slots.norms[3]);
            layer.finish(|weights| Layer {
                attention_norm,
                attention: Attention {
                    n_heads,
                    n_kv_heads,
                    head_dim,
                    projections,
                    query_norm,
                    key_norm,
                    rope: is_turned.then_some(if window.is_some() { ropes.sliding } else { ropes.full }),
                    rotary_dim,
                    scale: slots.score_scale.unwrap_or(1.0 / (head_dim as f32).sqrt()),
                    window,
                    score_cap: None,
                    output,
                },
                attention_post_norm,
                mlp_norm,
                mlp,
                mlp_post_norm,
                residual_scale: slots.residual_scale,
                weights,
            });
        }
        let norm = model.norm("model.norm.weight", hidden_size, eps, slots.norm_offset);
        let vocab_size = fields.dimension("vocab_size", limit::VOCAB)?;
        let max_positions = fields.dimension("max_position_embeddings", limit::POSITIONS)?;
        let max_positions = ropes.tables[ropes.full].positions(max_positions);
        let mut model = model.finish(hidden_size, vocab_size, max_positions, ropes.tables, norm);
        model.embedding_scale = slots.embedding_scale;
        (model.logit_scale, model.logit_cap) = (slots.logit_scale, slots.logit_cap);
        model.tied = fields.flag("tie_word_embeddings")?;
        model.eos_tokens = fields.eos_tokens()?;
        Ok(model)
    }

    fn feed_forward(
        &self,
        layer: &mut LayerBuilder<'_>,
        [size, hidden_size]: [usize; 2],
        activation: Activation,
    ) -> FeedForward {
        let mut inner = |part: &str, role, shape| layer.linear(part, role, shape, self.mlp_bias);
        let input = if self.slots.fused {
            FeedForwardInput::FusedGated(inner("mlp.gate_up_proj", WeightRole::GateUp, [2 * size, hidden_size]))
        } else {
            FeedForwardInput::Gated {
                gate: inner("mlp.gate_proj", WeightRole::Gate, [size, hidden_size]),
                up: inner("mlp.up_proj", WeightRole::Up, [size, hidden_size]),
            }
        };
        let down = inner("mlp.down_proj", WeightRole::Down, [hidden_size, size]);
        FeedForward { size, input, activation, down }
    }
}
