//! Qwen2 and Qwen2.5: biases on queries, keys and values.

use super::{Family, Gated, Slots};

pub(super) const FAMILY: Family = Family {
    class: "Qwen2ForCausalLM",
    model_type: "qwen2",
    describe: |fields| {
        let family = Gated {
            default_kv_heads: None,
            default_head_dim: None,
            qkv_bias: true,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: fields.windows_if_used()?,
            slots: Slots::default(),
        };
        family.describe(fields)
    },
};
