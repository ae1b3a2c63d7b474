//! The files that travel with the weights: as they are in the directory, or made of what is there.

use super::Checkpoint;
use crate::files::{exists, read_whole};
use crate::{ModelError, sentencepiece};
use std::io::ErrorKind;

/// What describes the model.
pub(super) const CONFIG: &str = "config.json";

/// Settings of generation.
const GENERATION: &str = "generation_config.json";

/// What reads text into tokens.
const TOKENIZER: &str = "tokenizer.json";

/// What it is made of where it is not there.
const PIECES: &str = "tokenizer.model";

/// The files that make a checkpoint usable and travel with it, in this order.
const COMPANIONS: [&str; 6] =
    [CONFIG, GENERATION, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

impl Checkpoint {
    /// Name and bytes of every file that should travel with the weights and is there, or can be made: configs, tokenizer, chat template.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn companions(&self) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
        let found =
            COMPANIONS.into_iter().map(|name| Ok(self.find_companion(name)?.map(|bytes| (name.to_owned(), bytes))));
        found.filter_map(Result::transpose).collect()
    }

    /// One companion file, such as `tokenizer.json`. That is made of `tokenizer.model` where only this is there, and of the metadata of a GGUF file.
    ///
    /// # Errors
    /// A file that is missing or cannot be read.
    pub fn companion(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        self.find_companion(name)?.ok_or_else(|| match name {
            TOKENIZER => ModelError::NoTokenizer { place: self.dir.clone() },
            _ => ModelError::Io { path: self.dir.join(name), source: ErrorKind::NotFound.into() },
        })
    }

    /// Whether there is a companion file of this name, or what it can be made of.
    ///
    /// # Errors
    /// A directory that cannot be looked into.
    pub fn has_companion(&self, name: &str) -> Result<bool, ModelError> {
        match &self.gguf {
            Some(gguf) => Ok(gguf.has_companion(name)),
            None => Ok(exists(&self.dir.join(name))? || name == TOKENIZER && exists(&self.dir.join(PIECES))?),
        }
    }

    pub(super) fn find_companion(&self, name: &str) -> Result<Option<Vec<u8>>, ModelError> {
        if name == CONFIG {
            return Ok(Some(self.config_text.clone().into_bytes()));
        }
        if let Some(gguf) = &self.gguf {
            return gguf.companion(name);
        }
        let read = |name: &str| {
            let path = self.dir.join(name);
            let limit = if name == GENERATION { self.limits.config_bytes } else { self.limits.companion_bytes };
            exists(&path)?.then(|| read_whole(&path, limit)).transpose()
        };
        match read(name)? {
            None if name == TOKENIZER => {
                let Some(pieces) = read(PIECES)? else { return Ok(None) };
                let bad = |reason| ModelError::BadPieces { path: self.dir.join(PIECES), reason };
                let config = read("tokenizer_config.json")?.map(|bytes| serde_json::from_slice(&bytes));
                let config =
                    config.transpose().map_err(|e| bad(format!("tokenizer_config.json: {e}")))?.unwrap_or_default();
                let tokenizer = sentencepiece::convert(&pieces, &config).map_err(bad)?;
                Ok(Some(tokenizer.to_string().into_bytes()))
            }
            found => Ok(found),
        }
    }
}
