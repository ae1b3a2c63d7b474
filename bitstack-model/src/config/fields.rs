//! Typed access to the fields of a `config.json`.

use super::limit;
use crate::ModelError;
use bitstack_io::hostile::{plain_json, printable};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::HashSet;

/// The object that a text is, as Python reads it: with `NaN` and `Infinity`.
pub(super) fn parse_object(text: &[u8], file: &str) -> Result<Map<String, Value>, ModelError> {
    serde_json::from_slice(&plain_json(text)).map_err(|source| ModelError::Json { file: file.to_owned(), source })
}

pub(super) fn bad(field: &'static str, found: impl ToString, expected: impl Into<String>) -> ModelError {
    ModelError::BadField { field, found: printable(&found.to_string()), expected: expected.into() }
}

/// Typed access to the fields of a JSON object; `null` counts as absent, but for [`is_null`](Self::is_null). It remembers which fields were asked for:
/// nobody knows the others ([`check_known`](Self::check_known)).
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    known: RefCell<HashSet<&'a str>>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, known: RefCell::default() }
    }

    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        let (name, value) = self.map.get_key_value(field)?;
        self.known.borrow_mut().insert(name);
        Some(value).filter(|v| !v.is_null())
    }

    /// Says that a field is known, whatever it holds.
    pub(super) fn know(&self, fields: &[&str]) {
        for field in fields {
            self.get(field);
        }
    }

    /// Whether a field is there and `null`.
    pub(super) fn is_null(&self, field: &str) -> bool {
        self.get(field).is_none() && self.map.contains_key(field)
    }

    /// Refuses fields that nobody has asked for, unless they are `null`, `false` or empty, or `is_harmless` says so.
    pub(super) fn check_known(
        &self,
        place: &str,
        is_harmless: impl Fn(&str, &Value) -> bool,
    ) -> Result<(), ModelError> {
        const MOST_SHOWN: usize = 3;
        let is_empty = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::String(text) => text.is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::Object(object) => object.is_empty(),
            _ => false,
        };
        let known = self.known.borrow();
        let is_unknown = |(name, value): &(&String, &Value)| {
            !known.contains(&name[..]) && !is_empty(value) && !is_harmless(name, value)
        };
        let unknown: Vec<_> = self.map.iter().filter(is_unknown).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let shown = unknown.iter().take(MOST_SHOWN).map(|(name, value)| printable(&format!("{name} is {value}")));
        let mut found = shown.collect::<Vec<_>>().join(", ");
        if unknown.len() > MOST_SHOWN {
            found.push_str(&format!(" and {} more", unknown.len() - MOST_SHOWN));
        }
        Err(ModelError::UnknownFields { place: place.to_owned(), found })
    }

    /// A field that is an object itself.
    pub(super) fn object(&self, field: &'static str) -> Result<Fields<'a>, ModelError> {
        let value = self.get(field).ok_or(ModelError::MissingField { field })?;
        Ok(Fields::new(value.as_object().ok_or_else(|| self.bad(field, "an object"))?))
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

    /// `len` numbers above 0 and at most `max`.
    pub(super) fn numbers(&self, field: &'static str, len: usize, max: f64) -> Result<Vec<f64>, ModelError> {
        let value = self.get(field).ok_or(ModelError::MissingField { field })?;
        let number = |value: &Value| value.as_f64().filter(|x| *x > 0.0 && *x <= max);
        let list = value.as_array().filter(|list| list.len() == len);
        let numbers = list.and_then(|list| list.iter().map(number).collect());
        numbers.ok_or_else(|| self.bad(field, format!("a list of {len} numbers above 0 and at most {max}")))
    }

    pub(super) fn flag(&self, field: &'static str) -> Result<bool, ModelError> {
        match self.get(field) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(field, "true or false")),
        }
    }

    pub(super) fn n_layers(&self) -> Result<usize, ModelError> {
        self.dimension("num_hidden_layers", limit::LAYERS)
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
            Some("sliding_attention") if window.is_some() => Ok(window),
            Some("sliding_attention") => {
                Err(bad("layer_types", kind, "\"full_attention\": there is no sliding_window"))
            }
            _ => Err(bad("layer_types", kind, expected.clone())),
        };
        types.iter().map(window_of).collect()
    }

    /// The windows of Qwen: only where `use_sliding_window` is set, from layer `max_window_layers` on.
    pub(super) fn windows_if_used(&self) -> Result<Vec<Option<usize>>, ModelError> {
        self.know(&["sliding_window", "max_window_layers"]);
        let window = if self.flag("use_sliding_window")? { self.window()? } else { None };
        let first = self.get("max_window_layers").and_then(Value::as_u64);
        self.windows(window, first.ok_or_else(|| self.bad("max_window_layers", "a whole number"))?)
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
