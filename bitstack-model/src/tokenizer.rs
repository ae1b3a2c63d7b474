//! Text to tokens and back.

use crate::ModelError;
use bitstack_io::hostile::printable;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A Hugging Face fast tokenizer (`tokenizer.json`).
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

/// The library's answer. It panics on some malformed tokenizers (one that replaces the empty string, for instance), which are a file's fault and
/// not the program's: here that is an error too. Nothing that it could leave half done is used afterwards but for reading.
fn guarded<T>(f: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T, ModelError> {
    let result = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| Err("the tokenizer library gave up".into()));
    result.map_err(|error| ModelError::Tokenizer { reason: printable(&error.to_string()) })
}

impl Tokenizer {
    /// Reads the bytes of a `tokenizer.json`. Its truncation and padding settings, which belong to training batches, are
    /// dropped.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when they are malformed.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ModelError> {
        guarded(|| {
            let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
            inner.with_truncation(None)?;
            inner.with_padding(None);
            Ok(Self { inner })
        })
    }

    /// Tokens of a text; with those (such as a begin token) that the tokenizer itself adds, and no others.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        guarded(|| Ok(self.inner.encode_fast(text, true)?.get_ids().to_vec()))
    }

    /// Tokens of a text that has all special tokens in it, as a chat template writes it: the tokenizer adds none.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer fails.
    pub fn encode_as_is(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        guarded(|| Ok(self.inner.encode_fast(text, false)?.get_ids().to_vec()))
    }

    /// Text of some tokens, special ones left out. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        guarded(|| self.inner.decode(tokens, true))
    }

    /// The id of a token given as text, such as `</s>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The id of a special token given as text; none of an ordinary one.
    pub fn special_token_id(&self, token: &str) -> Option<u32> {
        self.token_id(token).filter(|_| self.inner.get_added_vocabulary().is_special_token(token))
    }

    /// The texts of all special tokens, the longest first.
    pub fn special_tokens(&self) -> Vec<String> {
        let tokens = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let mut texts: Vec<String> = tokens.values().filter(|t| t.special).map(|t| t.content.clone()).collect();
        texts.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        texts
    }

    /// A decoder for tokens that come one at a time, after `prompt`.
    pub fn stream<'a>(&'a self, prompt: &[u32]) -> TextStream<'a> {
        // A few tokens before the first new one decide about the space in front of it.
        let context = &prompt[prompt.len().saturating_sub(TextStream::CONTEXT)..];
        TextStream { tokenizer: self, tokens: context.to_vec(), shown: context.len() }
    }
}

/// Turns tokens into text piece by piece, so that the pieces together are the text of the whole.
///
/// A character's bytes may be spread over several tokens, and a token's text may depend on the one before. So the text of a
/// few tokens of context is compared with and without the new ones, and held back while it ends in half a character.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Context whose text has been given out, then tokens whose text has not.
    tokens: Vec<u32>,
    shown: usize,
}

impl TextStream<'_> {
    const CONTEXT: usize = 8;
    /// A character has at most four bytes; a text that is still incomplete after so many tokens is not UTF-8 at all.
    const MAX_PENDING: usize = 16;

    /// The text that `token` completes; may be empty.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer fails.
    pub fn push(&mut self, token: u32) -> Result<String, ModelError> {
        self.tokens.push(token);
        let text = self.pending()?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.tokens.len() - self.shown < Self::MAX_PENDING {
            return Ok(String::new());
        }
        self.show();
        Ok(text)
    }

    /// The text of tokens that are still held back, now that no more will come.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer fails.
    pub fn finish(&mut self) -> Result<String, ModelError> {
        let text = self.pending()?;
        self.show();
        Ok(text)
    }

    fn pending(&self) -> Result<String, ModelError> {
        let before = self.tokenizer.decode(&self.tokens[..self.shown])?;
        let mut all = self.tokenizer.decode(&self.tokens)?;
        // Where the context itself begins or ends inside a character the texts differ earlier, at the same byte length
        // or not at all; the common prefix is what was given out.
        let common = before.char_indices().zip(all.chars()).find(|((_, a), b)| a != b);
        let cut = common.map_or(before.len().min(all.len()), |((at, _), _)| at);
        Ok(all.split_off(cut))
    }

    fn show(&mut self) {
        let excess = self.tokens.len().saturating_sub(Self::CONTEXT);
        self.tokens.drain(..excess);
        self.shown = self.tokens.len();
    }
}
