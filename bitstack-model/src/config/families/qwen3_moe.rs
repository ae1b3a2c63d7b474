//! Qwen3 with a mixture of experts.

use super::slots::{Mixture, Slots};
use super::{Family, Gated, bad};
use crate::ModelError;
use crate::config::fields::Fields;
use crate::config::limit;
use serde_json::Value;

pub(super) const FAMILY: Family = Family {
    class: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    defaults: r#"{"max_position_embeddings": 32768, "num_key_value_heads": 4, "num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1, "sliding_window": 4096}"#,
    describe: |fields| {
        let bias = fields.flag("attention_bias")?;
        fields.know(&["sliding_window", "max_window_layers", "num_experts", "num_local_experts"]);
        let window = if fields.flag("use_sliding_window")? { fields.window()? } else { None };
        // The library writes the second name since its version 5.
        let count = if fields.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
        let [n_experts, n_active] = Mixture::counts(fields, count)?;
        let family = Gated {
            kv_heads_of_null: None,
            qkv_bias: bias,
            output_bias: bias,
            mlp_bias: false,
            qk_norm: true,
            windows: fields.windows(window, 0)?,
            slots: Slots {
                mixture: Some(Mixture {
                    router: "mlp.gate",
                    experts: "mlp.experts",
                    projections: ["gate_proj", "up_proj", "down_proj"],
                    n_experts,
                    n_active,
                    size: fields.dimension("moe_intermediate_size", limit::INTERMEDIATE)?,
                    normalised: fields.flag("norm_topk_prob")?,
                    layers: sparse(fields)?,
                }),
                ..Slots::default()
            },
        };
        family.describe(fields)
    },
};

/// Whether each layer has experts: every `decoder_sparse_step`th, but for those that `mlp_only_layers` lists.
fn sparse(fields: &Fields<'_>) -> Result<Vec<bool>, ModelError> {
    let step = fields.get("decoder_sparse_step");
    let step = step.map_or(Ok(1), |_| fields.dimension("decoder_sparse_step", limit::LAYERS))?;
    let mut layers: Vec<bool> = (1..=fields.n_layers()?).map(|layer| layer % step == 0).collect();
    if let Some(list) = fields.get("mlp_only_layers") {
        let dense = list.as_array().and_then(|list| list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>());
        for layer in dense.ok_or_else(|| bad("mlp_only_layers", list, "a list of numbers of layers"))? {
            if let Some(layer) = layers.get_mut(layer as usize) {
                *layer = false;
            }
        }
    }
    Ok(layers)
}
