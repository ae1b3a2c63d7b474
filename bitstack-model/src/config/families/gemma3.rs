//! Gemma 3, the text model: norms in front and behind, factors stored as differences from 1, scaled embeddings, a rotary base for layers with
//! a window and another for those without.

use super::Fields;
use super::slots::{Slots, refuse};
use super::{Activation, Family, Gated};
use crate::ModelError;
use crate::config::limit;
use crate::config::rope::{RopeConfig, Ropes};

pub(super) const FAMILY: Family = Family {
    class: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    defaults: r#"{"max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": true, "sliding_window": 4096, "rope_theta": 1000000.0}"#,
    describe: |fields| {
        fields.know(&["sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"]);
        for field in ["attn_logit_softcapping", "use_bidirectional_attention"] {
            refuse(fields, field)?;
        }
        match fields.get("hidden_activation").map(|v| v.as_str()) {
            None | Some(Some("gelu_pytorch_tanh")) => {}
            Some(_) => return Err(fields.bad("hidden_activation", "\"gelu_pytorch_tanh\"")),
        }
        let windows = windows(fields)?;
        let bias = fields.flag("attention_bias")?;
        let width = fields.dimension("hidden_size", limit::HIDDEN)? as f64;
        let scalar = fields.number("query_pre_attn_scalar", 256.0, 0.0, 1e9)?;
        let cap = fields.get("final_logit_softcapping");
        let cap = cap.map(|_| fields.number("final_logit_softcapping", 1.0, 0.0, 1e9)).transpose()?;
        let family = Gated {
            kv_heads_of_null: None,
            qkv_bias: bias,
            output_bias: bias,
            mlp_bias: false,
            qk_norm: true,
            slots: Slots {
                norms: [
                    Some("input_layernorm"),
                    Some("post_attention_layernorm"),
                    Some("pre_feedforward_layernorm"),
                    Some("post_feedforward_layernorm"),
                ],
                norm_offset: 1.0,
                activation: Some(Activation::GeluTanh),
                score_scale: Some(scalar.powf(-0.5) as f32),
                ropes: Some(ropes(fields)?),
                embedding_scale: Some(width.sqrt() as f32),
                logit_cap: cap.map(|cap| cap as f32),
                ..Slots::default()
            },
            windows,
        };
        family.describe(fields)
    },
};

/// The window of each layer: by its type, or in all but every sixth layer where the config names no other number.
fn windows(fields: &Fields<'_>) -> Result<Vec<Option<usize>>, ModelError> {
    let window = Some(fields.window()?.unwrap_or(4096));
    if fields.get("layer_types").is_some() {
        return fields.windows(window, 0);
    }
    let named =
        ["sliding_window_pattern", "_sliding_window_pattern"].into_iter().find(|name| fields.get(name).is_some());
    let every = named.map_or(Ok(6), |name| fields.dimension(name, limit::LAYERS))?;
    Ok((1..=fields.n_layers()?).map(|layer| window.filter(|_| layer % every != 0)).collect())
}

/// The table of layers without a window, and that of layers with one: `rope_parameters` by type of layer, or the older `rope_theta`, `rope_scaling`
/// and `rope_local_base_freq`.
fn ropes(fields: &Fields<'_>) -> Result<Ropes, ModelError> {
    let theta = fields.number("rope_local_base_freq", 1e4, 0.0, 1e12)?;
    let base = |kind| fields.get("rope_parameters").and_then(|v| v.get(kind)?.get("rope_theta"));
    let mut ropes = fields.ropes(fields.dimension("head_dim", limit::HEAD_DIM)?)?;
    if fields.get("rope_parameters").is_none() {
        ropes.sliding = ropes.tables.len();
        ropes.tables.push(RopeConfig { theta, scaling: None });
    } else if ropes.tables.len() != 2 || base("sliding_attention").is_none() {
        // A base that is left out has another value for each type of layer.
        let expected = "an object with full_attention and sliding_attention, each with a rope_theta";
        return Err(fields.bad("rope_parameters", expected));
    }
    Ok(ropes)
}
