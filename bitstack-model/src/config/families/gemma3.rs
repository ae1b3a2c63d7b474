//! Gemma 3, the text model: norms in front and behind, factors stored as differences from 1, scaled embeddings, a rotary base for layers with
//! a window and another for those without.

use super::Fields;
use super::slots::{Slots, refuse, rope_with_default};
use super::{Activation, Family, Gated, bad};
use crate::ModelError;
use crate::config::{RopeConfig, limit};
use serde_json::{Map, Value};

pub(super) const FAMILY: Family = Family {
    class: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    describe: |fields| {
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
            default_kv_heads: None,
            default_head_dim: Some(256),
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
                activation: Activation::GeluTanh,
                score_scale: Some(scalar.powf(-0.5) as f32),
                ropes: ropes(fields)?,
                rope_of: windows.iter().map(|window| Some(usize::from(window.is_some()))).collect(),
                embedding_scale: Some(width.sqrt() as f32),
                logit_cap: cap.map(|cap| cap as f32),
                tied: true,
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
fn ropes(fields: &Fields<'_>) -> Result<Vec<RopeConfig>, ModelError> {
    const GLOBAL_THETA: f64 = 1e6;
    const LOCAL_THETA: f64 = 1e4;
    let Some(parameters) = fields.get("rope_parameters") else {
        let theta = fields.number("rope_local_base_freq", LOCAL_THETA, 0.0, 1e12)?;
        let local = RopeConfig { theta, ..Fields(&Map::new()).rope()? };
        return Ok(vec![rope_with_default(fields, GLOBAL_THETA)?, local]);
    };
    let of_type = |kind: &str, theta: f64| {
        let expected = "an object with full_attention and sliding_attention";
        let own = parameters.get(kind).filter(|own| own.is_object());
        let own = own.ok_or_else(|| bad("rope_parameters", parameters, expected))?;
        let alone: Map<String, Value> = [("rope_parameters".to_owned(), own.clone())].into_iter().collect();
        rope_with_default(&Fields(&alone), theta)
    };
    Ok(vec![of_type("full_attention", GLOBAL_THETA)?, of_type("sliding_attention", LOCAL_THETA)?])
}
