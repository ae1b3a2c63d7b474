//! Typed access to the fields of a `config.json`.

use super::limit;
use super::rope::{Llama3Scaling, RopeConfig};
use crate::ModelError;
use bitstack_io::hostile::printable;
use serde_json::{Map, Value};

pub(super) fn parse_object(text: &str, file: &str) -> Result<Map<String, Value>, ModelError> {
    serde_json::from_str(text).map_err(|source| ModelError::Json { file: file.to_owned(), source })
}

pub(super) fn bad(field: &'static str, found: impl ToString, expected: impl Into<String>) -> ModelError {
    ModelError::BadField { field, found: printable(&found.to_string()), expected: expected.into() }
}

/// Typed access to the fields of a JSON object; `null` counts as absent, as in the Python library.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl Fields<'_> {
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|v| !v.is_null())
    }

    pub(super) fn bad(&self, field: &'static str, expected: impl Into<String>) -> ModelError {
        bad(field, self.get(field).unwrap_or(&Value::Null), expected)
    }

    pub(super) fn dimension(&self, field: &'static str, max: usize) -> Result<usize, ModelError> {
        let value = self.get(field).ok_or(ModelError::MissingField { field })?;
        match value.as_u64() {
            Some(n) if n >= 1 && n <= max as u64 => Ok(n as usize),
            _ => Err(self.bad(field, format!("a whole number from 1 to {max}"))),
        }
    }

    /// A number above `min` and at most `max`; `default` where the field is absent.
    pub(super) fn number(&self, field: &'static str, default: f64, min: f64, max: f64) -> Result<f64, ModelError> {
        let Some(value) = self.get(field) else { return Ok(default) };
        match value.as_f64() {
            Some(x) if x > min && x <= max => Ok(x),
            _ => Err(self.bad(field, format!("a number above {min} and at most {max}"))),
        }
    }

    pub(super) fn required_number(&self, field: &'static str, max: f64) -> Result<f64, ModelError> {
        self.get(field).ok_or(ModelError::MissingField { field })?;
        self.number(field, 0.0, 0.0, max)
    }

    pub(super) fn flag(&self, field: &'static str) -> Result<bool, ModelError> {
        match self.get(field) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(field, "true or false")),
        }
    }

    /// The class of the model, or failing that its type.
    pub(super) fn architecture(&self) -> Result<&str, ModelError> {
        let class = self.get("architectures").and_then(|v| v.get(0)).and_then(Value::as_str);
        let found = class.or_else(|| self.get("model_type").and_then(Value::as_str));
        found.ok_or(ModelError::MissingField { field: "architectures" })
    }

    pub(super) fn n_layers(&self) -> Result<usize, ModelError> {
        self.dimension("num_hidden_layers", limit::LAYERS)
    }

    /// `rope_theta` and `rope_scaling`, or the newer `rope_parameters` which holds both.
    pub(super) fn rope(&self) -> Result<RopeConfig, ModelError> {
        const MAX_THETA: f64 = 1e12;
        let outer_theta = self.number("rope_theta", 10_000.0, 0.0, MAX_THETA)?;
        let field = if self.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        let Some(value) = self.get(field) else { return Ok(RopeConfig { theta: outer_theta, scaling: None }) };
        let inner = Fields(value.as_object().ok_or_else(|| self.bad(field, "an object"))?);
        let theta = inner.number("rope_theta", outer_theta, 0.0, MAX_THETA)?;
        let kind = inner.get("rope_type").or_else(|| inner.get("type"));
        let scaling = match kind.map(|v| v.as_str()) {
            None | Some(Some("default")) => None,
            Some(Some("llama3")) => {
                let scaling = Llama3Scaling {
                    factor: inner.required_number("factor", 1e6)?,
                    low_freq_factor: inner.required_number("low_freq_factor", 1e6)?,
                    high_freq_factor: inner.required_number("high_freq_factor", 1e6)?,
                    original_positions: inner
                        .required_number("original_max_position_embeddings", limit::POSITIONS as f64)?,
                };
                if scaling.high_freq_factor <= scaling.low_freq_factor {
                    let expected = format!("more than low_freq_factor ({})", scaling.low_freq_factor);
                    return Err(inner.bad("high_freq_factor", expected));
                }
                Some(scaling)
            }
            Some(_) => return Err(bad("rope_type", kind.unwrap_or(&Value::Null), "\"default\" or \"llama3\"")),
        };
        Ok(RopeConfig { theta, scaling })
    }

    /// `sliding_window`, where there is one.
    pub(super) fn window(&self) -> Result<Option<usize>, ModelError> {
        self.get("sliding_window").map(|_| self.dimension("sliding_window", limit::POSITIONS)).transpose()
    }

    /// The attention window of each layer: `window` from layer `first` on, or where `layer_types` says so.
    pub(super) fn windows(&self, window: Option<usize>, first: u64) -> Result<Vec<Option<usize>>, ModelError> {
        let n_layers = self.n_layers()?;
        let Some(types) = self.get("layer_types") else {
            return Ok((0..n_layers).map(|layer| window.filter(|_| layer as u64 >= first)).collect());
        };
        let expected = format!("a list of {n_layers} times \"full_attention\" or \"sliding_attention\"");
        let types = types.as_array().filter(|t| t.len() == n_layers);
        let types = types.ok_or_else(|| self.bad("layer_types", expected.clone()))?;
        let window_of = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(window),
            _ => Err(bad("layer_types", kind, expected.clone())),
        };
        types.iter().map(window_of).collect()
    }

    /// The windows of Qwen: only where `use_sliding_window` is set, from layer `max_window_layers` on.
    pub(super) fn windows_if_used(&self) -> Result<Vec<Option<usize>>, ModelError> {
        let window = if self.flag("use_sliding_window")? { self.window()? } else { None };
        let first = match self.get("max_window_layers").filter(|_| window.is_some()) {
            None => 28,
            Some(value) => value.as_u64().ok_or_else(|| self.bad("max_window_layers", "a whole number"))?,
        };
        self.windows(window, first)
    }

    /// `eos_token_id`: one id, a list, or nothing.
    pub(super) fn eos_tokens(&self) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|n| u32::try_from(n).ok());
            id.ok_or_else(|| self.bad("eos_token_id", "a token id or a list of them"))
        };
        match self.get("eos_token_id") {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }
}
