//! Text from tokens that come one at a time.

use crate::{ModelError, Tokenizer};

/// Turns tokens into text piece by piece, so that the pieces together are the text of all tokens at once.
///
/// A character's bytes may be spread over several tokens, and a token's text may depend on the ones before. So the text of the last few tokens is
/// compared with and without the new ones. Held back are a last character that may be half of one, and tokens that stand for single bytes (`<0x0A>`)
/// until one comes that does not: how such a run reads is known when it ends.
///
/// With a prompt, the pieces are what the text of prompt and tokens has behind the beginning that it shares with the text of the prompt alone.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    has_byte_tokens: bool,
    /// Visible tokens: some whose text is known, then those whose text has not all been given out.
    tokens: Vec<u32>,
    /// What has been given out of their text.
    shown: String,
}

impl<'a> TextStream<'a> {
    /// Tokens in front of the new ones that decide about their text, such as the space between.
    const CONTEXT: usize = 8;

    pub(crate) fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        let mut stream =
            Self { tokenizer, has_byte_tokens: tokenizer.has_byte_tokens(), tokens: Vec::new(), shown: String::new() };
        let visible = |token: &u32| Some((*token, tokenizer.visible(*token)?));
        let prompt: Vec<(u32, String)> = prompt.iter().filter_map(visible).collect();
        // What the next tokens may change: a run of bytes at the end, or a character of at most four.
        let run = prompt.iter().rev().take_while(|(_, text)| stream.is_byte(text)).count();
        let known = prompt.len() - run.max(3).min(prompt.len());
        stream.tokens = prompt.into_iter().map(|(token, _)| token).collect();
        stream.forget(known);
        stream.shown = tokenizer.decode(&stream.tokens).unwrap_or_default();
        stream
    }

    /// The text that `token` completes; may be empty.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer fails.
    pub fn push(&mut self, token: u32) -> Result<String, ModelError> {
        let Some(name) = self.tokenizer.visible(token) else { return Ok(String::new()) };
        self.tokens.push(token);
        if self.is_byte(&name) {
            return Ok(String::new());
        }
        let text = self.tokenizer.decode(&self.tokens)?;
        // A last character that is not one may be the beginning of one. All before it stays.
        let whole = text.strip_suffix(char::REPLACEMENT_CHARACTER);
        let piece = self.show(&text, whole.unwrap_or(&text).len());
        if whole.is_none() {
            self.forget(self.tokens.len());
            self.shown = self.tokenizer.decode(&self.tokens)?;
        }
        Ok(piece)
    }

    /// The text of tokens that are still held back, now that no more will come.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer fails.
    pub fn finish(&mut self) -> Result<String, ModelError> {
        let text = self.tokenizer.decode(&self.tokens)?;
        Ok(self.show(&text, text.len()))
    }

    /// Gives out what `text`, up to `end`, has behind what was given out.
    fn show(&mut self, text: &str, end: usize) -> String {
        let differs = self.shown.char_indices().zip(text.chars()).find(|((_, a), b)| a != b);
        let shared = differs.map_or(self.shown.len().min(text.len()), |((at, _), _)| at);
        if shared >= end {
            return String::new();
        }
        text[..end].clone_into(&mut self.shown);
        text[shared..end].to_owned()
    }

    /// Forgets tokens in front of the first `known`, but for a context that has some text: a tokenizer may drop the space in front of the first.
    fn forget(&mut self, known: usize) {
        let mut first = known;
        while first > 0 && (known - first < Self::CONTEXT || self.has_no_text(first..known)) {
            first -= Self::CONTEXT.min(first);
        }
        self.tokens.drain(..first);
    }

    fn has_no_text(&self, range: std::ops::Range<usize>) -> bool {
        self.tokenizer.decode(&self.tokens[range]).is_ok_and(|text| text.is_empty())
    }

    /// Whether a token stands for a single byte.
    fn is_byte(&self, token: &str) -> bool {
        let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        self.has_byte_tokens && digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
    }
}
