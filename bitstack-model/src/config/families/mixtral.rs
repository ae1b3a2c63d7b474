//! Mixtral: Mistral with a mixture of experts in every layer.

use super::slots::{Mixture, Slots, rope_with_default};
use super::{Family, Gated};
use crate::config::limit;

pub(super) const FAMILY: Family = Family {
    class: "MixtralForCausalLM",
    model_type: "mixtral",
    describe: |fields| {
        let [n_experts, n_active] = Mixture::counts(fields, "num_local_experts")?;
        let family = Gated {
            default_kv_heads: None,
            default_head_dim: None,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: fields.windows(fields.window()?, 0)?,
            slots: Slots {
                default_eps: 1e-5,
                ropes: vec![rope_with_default(fields, 1e6)?],
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
