//! Llama 2, 3, 3.1 and later text models, and what calls itself Llama.

use super::{Family, Gated, Slots};

pub(super) const FAMILY: Family = Family {
    class: "LlamaForCausalLM",
    model_type: "llama",
    describe: |fields| {
        let bias = fields.flag("attention_bias")?;
        let family = Gated {
            default_kv_heads: Some(fields.dimension("num_attention_heads", super::limit::HEADS)?),
            default_head_dim: None,
            qkv_bias: bias,
            output_bias: bias,
            mlp_bias: fields.flag("mlp_bias")?,
            qk_norm: false,
            windows: fields.windows(None, 0)?,
            slots: Slots::default(),
        };
        family.describe(fields)
    },
};
