//! Qwen2 and Qwen2.5: biases on queries, keys and values.

use super::{Family, Gated, Slots};

pub(super) const FAMILY: Family = Family {
    class: "Qwen2ForCausalLM",
    model_type: "qwen2",
    defaults: r#"{"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}"#,
    describe: |fields| {
        let family = Gated {
            kv_heads_of_null: Some(fields.dimension("num_attention_heads", super::limit::HEADS)?),
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
