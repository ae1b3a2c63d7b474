//! SmolLM3: heads are not turned in every fourth layer.

use super::slots::Slots;
use super::{Family, Gated, bad};
use crate::ModelError;
use crate::config::fields::Fields;
use crate::config::limit;
use serde_json::Value;

pub(super) const FAMILY: Family = Family {
    class: "SmolLM3ForCausalLM",
    model_type: "smollm3",
    defaults: r#"{"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2000000.0, "tie_word_embeddings": true, "no_rope_layer_interval": 4}"#,
    describe: |fields| {
        fields.know(&["sliding_window", "max_window_layers", "no_rope_layer_interval"]);
        let bias = fields.flag("attention_bias")?;
        let turned = turned(fields)?;
        let window = if fields.flag("use_sliding_window")? { fields.window()? } else { None };
        let windows = match fields.get("layer_types") {
            Some(_) => fields.windows(window, 0)?,
            None => turned.iter().map(|turned| window.filter(|_| !turned)).collect(),
        };
        let family = Gated {
            kv_heads_of_null: None,
            qkv_bias: bias,
            output_bias: bias,
            mlp_bias: fields.flag("mlp_bias")?,
            qk_norm: false,
            windows,
            slots: Slots { turned, ..Slots::default() },
        };
        family.describe(fields)
    },
};

/// Whether heads are turned, for each layer: `no_rope_layers` has a 1 where they are.
fn turned(fields: &Fields<'_>) -> Result<Vec<bool>, ModelError> {
    let n_layers = fields.n_layers()?;
    let Some(list) = fields.get("no_rope_layers") else {
        let every = fields.get("no_rope_layer_interval");
        let every = every.map_or(Ok(4), |_| fields.dimension("no_rope_layer_interval", limit::LAYERS))?;
        return Ok((1..=n_layers).map(|layer| layer % every != 0).collect());
    };
    let flag = |value: &Value| value.as_u64().filter(|flag| *flag <= 1).map(|flag| flag == 1);
    let flags = list.as_array().and_then(|list| list.iter().take(n_layers).map(flag).collect::<Option<Vec<_>>>());
    let flags = flags.filter(|flags| flags.len() == n_layers);
    flags.ok_or_else(|| bad("no_rope_layers", list, format!("a list of {n_layers} times 0 or 1")))
}
