//! Mistral, with or without a sliding window.

use super::{Family, Gated, Slots};

pub(super) const FAMILY: Family = Family {
    class: "MistralForCausalLM",
    model_type: "mistral",
    defaults: r#"{"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}"#,
    describe: |fields| {
        let window = fields.window()?;
        let windows = fields.windows(window, 0)?;
        if windows.iter().any(|of_layer| *of_layer != window) {
            return Err(fields.bad("layer_types", "the same for all layers"));
        }
        let family = Gated {
            kv_heads_of_null: None,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows,
            slots: Slots::default(),
        };
        family.describe(fields)
    },
};
