//! Mixtral: Mistral with a mixture of experts in every layer.

use super::slots::{Mixture, Slots};
use super::{Family, Gated};
use crate::config::limit;

pub(super) const FAMILY: Family = Family {
    class: "MixtralForCausalLM",
    model_type: "mixtral",
    defaults: r#"{"max_position_embeddings": 131072, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0}"#,
    describe: |fields| {
        let [n_experts, n_active] = Mixture::counts(fields, "num_local_experts")?;
        let family = Gated {
            kv_heads_of_null: None,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: fields.windows(fields.window()?, 0)?,
            slots: Slots {
                mixture: Some(Mixture {
                    router: "block_sparse_moe.gate",
                    experts: "block_sparse_moe.experts",
                    projections: ["w1", "w3", "w2"],
                    n_experts,
                    n_active,
                    size: fields.dimension("intermediate_size", limit::INTERMEDIATE)?,
                    normalised: true,
                    layers: vec![true; fields.n_layers()?],
                }),
                ..Slots::default()
            },
        };
        family.describe(fields)
    },
};
