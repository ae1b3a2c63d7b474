//! Phi-3 and Phi-4: projections in one weight, and in some only a part of each head is turned.

use super::slots::Slots;
use super::{Family, Gated};
use crate::config::fields::Fields;
use crate::config::limit;
use serde_json::Value;

pub(super) const FAMILY: Family = Family {
    class: "Phi3ForCausalLM",
    model_type: "phi3",
    describe: |fields| {
        let inner = ["rope_scaling", "rope_parameters"].into_iter().find_map(|field| fields.get(field));
        let inner = inner.and_then(Value::as_object).filter(|inner| inner.contains_key("partial_rotary_factor"));
        let rotary_share = inner.map_or(Fields(fields.0), Fields).number("partial_rotary_factor", 1.0, 0.0, 1.0)?;
        let family = Gated {
            default_kv_heads: Some(fields.dimension("num_attention_heads", limit::HEADS)?),
            default_head_dim: None,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: fields.windows(fields.window()?, 0)?,
            slots: Slots { default_eps: 1e-5, fused: true, rotary_share, ..Slots::default() },
        };
        family.describe(fields)
    },
};
