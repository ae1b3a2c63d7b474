//! Mistral, with or without a sliding window.

use super::{Family, Gated, Slots};

pub(super) const FAMILY: Family = Family {
    class: "MistralForCausalLM",
    model_type: "mistral",
    describe: |fields| {
        let family = Gated {
            // The library's default is the number of one particular model.
            default_kv_heads: None,
            default_head_dim: None,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: fields.windows(fields.window()?, 0)?,
            slots: Slots::default(),
        };
        family.describe(fields)
    },
};
