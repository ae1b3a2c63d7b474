//! Granite: Llama with factors of embeddings, scores, residuals and logits.

use super::slots::{Slots, factor};
use super::{Family, Gated};
use crate::config::limit;

pub(super) const FAMILY: Family = Family {
    class: "GraniteForCausalLM",
    model_type: "granite",
    defaults: r#"{"max_position_embeddings": 2048, "num_key_value_heads": null}"#,
    describe: |fields| {
        let bias = fields.flag("attention_bias")?;
        let family = Gated {
            kv_heads_of_null: Some(fields.dimension("num_attention_heads", limit::HEADS)?),
            qkv_bias: bias,
            output_bias: bias,
            mlp_bias: fields.flag("mlp_bias")?,
            qk_norm: false,
            windows: fields.windows(None, 0)?,
            slots: Slots {
                score_scale: Some(factor(fields, "attention_multiplier")? as f32),
                residual_scale: Some(factor(fields, "residual_multiplier")? as f32),
                embedding_scale: Some(factor(fields, "embedding_multiplier")? as f32),
                logit_scale: Some(1.0 / factor(fields, "logits_scaling")? as f32),
                ..Slots::default()
            },
        };
        family.describe(fields)
    },
};
