//! Phi-3 and Phi-4: projections in one weight, and in some only a part of each head is turned.

use super::slots::Slots;
use super::{Family, Gated};
use crate::config::limit;

pub(super) const FAMILY: Family = Family {
    class: "Phi3ForCausalLM",
    model_type: "phi3",
    defaults: r#"{"max_position_embeddings": 4096, "num_key_value_heads": null, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}"#,
    describe: |fields| {
        fields.know(&["original_max_position_embeddings"]);
        let family = Gated {
            kv_heads_of_null: Some(fields.dimension("num_attention_heads", limit::HEADS)?),
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: fields.windows(fields.window()?, 0)?,
            slots: Slots { fused: true, rotary_share: fields.partial_rotary_factor()?, ..Slots::default() },
        };
        family.describe(fields)
    },
};
