//! Qwen3 (dense): an RMS norm for every query and key head.

use super::{Family, Gated, Slots};

pub(super) const FAMILY: Family = Family {
    class: "Qwen3ForCausalLM",
    model_type: "qwen3",
    describe: |fields| {
        let bias = fields.flag("attention_bias")?;
        let family = Gated {
            default_kv_heads: None,
            default_head_dim: Some(128),
            qkv_bias: bias,
            output_bias: bias,
            mlp_bias: false,
            qk_norm: true,
            windows: fields.windows_if_used()?,
            slots: Slots::default(),
        };
        family.describe(fields)
    },
};
