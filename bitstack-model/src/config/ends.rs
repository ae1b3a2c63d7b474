//! Which tokens end a text.

use super::ModelConfig;
use super::fields::{Fields, parse_object};
use crate::{ModelError, Tokenizer};
use serde_json::Value;

impl ModelConfig {
    /// Finds the tokens that end a text, as the Hugging Face library does: those of `generation_config.json` alone where it names any, else those of
    /// `config.json`. Where neither names one, the tokenizer's own: `eos_token` of `tokenizer_config.json` or `special_tokens_map.json`.
    ///
    /// `read` gives the contents of a file that travels with the model, or `None` where there is none of this name.
    ///
    /// # Errors
    /// Those of `read`; malformed JSON, end tokens that are not token ids; a malformed tokenizer, where it is asked.
    pub fn find_end_tokens<E: From<ModelError>>(
        &mut self,
        mut read: impl FnMut(&str) -> Result<Option<Vec<u8>>, E>,
    ) -> Result<(), E> {
        let generation = "generation_config.json";
        if let Some(text) = read(generation)? {
            let named = Fields::new(&parse_object(&text, generation)?).eos_tokens()?;
            if !named.is_empty() {
                self.eos_tokens = named;
            }
        }
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            if !self.eos_tokens.is_empty() {
                break;
            }
            let Some(text) = read(file)? else { continue };
            let json = parse_object(&text, file)?;
            let token = json.get("eos_token").map(|token| token.get("content").unwrap_or(token));
            let Some(token) = token.and_then(Value::as_str) else { continue };
            if let Some(tokenizer) = read("tokenizer.json")? {
                self.eos_tokens.extend(Tokenizer::from_bytes(&tokenizer)?.token_id(token));
            }
        }
        Ok(())
    }
}
