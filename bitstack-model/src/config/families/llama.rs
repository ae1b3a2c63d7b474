//! Llama 2, 3, 3.1 and later text models, and what calls itself Llama.

use super::{Family, Gated, Slots};

pub(super) const FAMILY: Family = Family {
    class: "LlamaForCausalLM",
    model_type: "llama",
    defaults: r#"{"max_position_embeddings": 2048, "num_key_value_heads": null}"#,
    describe: |fields| {
        let bias = fields.flag("attention_bias")?;
        let family = Gated {
            kv_heads_of_null: Some(fields.dimension("num_attention_heads", super::limit::HEADS)?),
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
