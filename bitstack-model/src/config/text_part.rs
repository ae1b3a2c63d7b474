//! Models of text and images: the text model in them is one of the families, and nothing else of them is used.

use super::fields::parse_object;
use crate::ModelError;
use serde_json::{Map, Value};

/// Gemma 3 with a vision tower, by its class and its type.
const GEMMA3: [&str; 2] = ["Gemma3ForConditionalGeneration", "gemma3"];

/// What the class of the text model takes where `text_config` leaves it out (transformers 5.24).
const DEFAULTS: [(&str, u64); 5] = [
    ("head_dim", 256),
    ("max_position_embeddings", 131_072),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("vocab_size", 262_208),
];

/// Fields beside `text_config` that hold for the text model where it does not say otherwise.
const SHARED: [&str; 4] = ["dtype", "eos_token_id", "torch_dtype", "transformers_version"];

/// The config of the text model, where `text` is the config of a model of text and images.
///
/// # Errors
/// Malformed JSON.
pub(crate) fn text_part(text: &str) -> Result<Option<String>, ModelError> {
    let whole = parse_object(text.as_bytes(), "config.json")?;
    let class = whole.get("architectures").and_then(|v| v.get(0)).or_else(|| whole.get("model_type"));
    let is_known = class.and_then(Value::as_str).is_some_and(|class| GEMMA3.contains(&class));
    let (true, Some(Value::Object(inner))) = (is_known, whole.get("text_config")) else { return Ok(None) };
    let mut part: Map<String, Value> = inner.clone();
    let mut default = |name: &str, value: Value| {
        if part.get(name).is_none_or(Value::is_null) {
            part.insert(name.to_owned(), value);
        }
    };
    for name in SHARED {
        if let Some(value) = whole.get(name) {
            default(name, value.clone());
        }
    }
    DEFAULTS.into_iter().for_each(|(name, value)| default(name, value.into()));
    // The whole model ties its head by its own field, and caps no logits, whatever its text model would do alone.
    let tied = whole.get("tie_word_embeddings").cloned().unwrap_or(Value::Bool(true));
    part.insert("tie_word_embeddings".to_owned(), tied);
    part.remove("final_logit_softcapping");
    part.insert("architectures".to_owned(), ["Gemma3ForCausalLM"].into_iter().collect());
    part.insert("model_type".to_owned(), "gemma3_text".into());
    Ok(Some(format!("{:#}\n", Value::Object(part))))
}

/// The name that a tensor of the text model has in a checkpoint of that model alone; other tensors, which are those of images, keep theirs.
pub(crate) fn name_in_text_part(name: String) -> String {
    // Written by older versions of the library, and by newer ones.
    if let Some(rest) = name.strip_prefix("language_model.") {
        return rest.to_owned();
    }
    match name.strip_prefix("model.language_model.") {
        Some(rest) => format!("model.{rest}"),
        None => name,
    }
}

/// Whether a tensor is of the parts for images.
pub(crate) fn is_of_images(name: &str) -> bool {
    let name = name.strip_prefix("model.").unwrap_or(name);
    ["vision_tower.", "multi_modal_projector."].iter().any(|start| name.starts_with(start))
}
