//! OLMo 2: norms behind attention and feed-forward part and none in front, and one over all heads of queries and of keys.

use super::slots::Slots;
use super::{Family, Gated};
use crate::config::limit;

pub(super) const FAMILY: Family = Family {
    class: "Olmo2ForCausalLM",
    model_type: "olmo2",
    defaults: r#"{"max_position_embeddings": 2048, "num_key_value_heads": null, "rms_norm_eps": 1e-5}"#,
    describe: |fields| {
        let bias = fields.flag("attention_bias")?;
        let family = Gated {
            kv_heads_of_null: Some(fields.dimension("num_attention_heads", limit::HEADS)?),
            qkv_bias: bias,
            output_bias: bias,
            mlp_bias: false,
            qk_norm: true,
            windows: fields.windows(None, 0)?,
            slots: Slots {
                norms: [None, Some("post_attention_layernorm"), None, Some("post_feedforward_layernorm")],
                heads_together: true,
                ..Slots::default()
            },
        };
        family.describe(fields)
    },
};
