//! Qwen3 (dense): an RMS norm for every query and key head.

use super::{Family, Gated, Slots};

pub(super) const FAMILY: Family = Family {
    class: "Qwen3ForCausalLM",
    model_type: "qwen3",
    defaults: r#"{"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}"#,
    describe: |fields| {
        let bias = fields.flag("attention_bias")?;
        let family = Gated {
            kv_heads_of_null: Some(fields.dimension("num_attention_heads", super::limit::HEADS)?),
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
