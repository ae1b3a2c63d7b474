//! Text to tokens and back.

use crate::ModelError;
use crate::stream::TextStream;
use bitstack_io::hostile::printable;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::DecoderWrapper;

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

/// A token and its bytes in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    token: u32,
    start: usize,
    end: usize,
}

/// The last boundary of a character at or before byte `at`, or the end of the text.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

/// How a long text is cut.
#[derive(Debug, Clone, Copy)]
struct Pieces {
    bytes: usize,
    overlap: usize,
}

impl Pieces {
    const USUAL: Self = Self { bytes: 256 << 10, overlap: 4 << 10 };
    /// So many tokens in a row are the same in two pieces where they meet.
    const AGREED: usize = 16;

    /// Indices in the one and the other where both go on with the same tokens, between bytes `from` and `to` of the text.
    fn meeting(self, one: &[Place], other: &[Place], from: usize, to: usize) -> Option<(usize, usize)> {
        let mut i = one.partition_point(|place| place.start < from);
        let mut j = 0;
        while i + Self::AGREED <= one.len() && one[i + Self::AGREED - 1].end <= to {
            j += other[j..].iter().take_while(|place| place.start < one[i].start).count();
            // Tokens that share a character begin at the same byte: each of them may be the one.
            let same_start = other[j..].iter().take_while(|place| place.start == one[i].start).count();
            let agreed = &one[i..i + Self::AGREED];
            if let Some(more) = (0..same_start).find(|more| other[j + more..].starts_with(agreed)) {
                return Some((i, j + more));
            }
            i += 1;
        }
        None
    }
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
    /// A text above a megabyte is encoded in pieces that overlap and agree where they meet, so that memory beyond four bytes per token does
    /// not grow with the text.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        if text.len() > 4 * Pieces::USUAL.bytes {
            self.encode_in(Pieces::USUAL, text)
        } else {
            self.encode_at_once(text, true)
        }
    }

    fn encode_at_once(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ModelError> {
        guarded(|| Ok(self.inner.encode_fast(text, add_special_tokens)?.get_ids().to_vec()))
    }

    /// The tokens of a text, encoded piece by piece. Where two pieces overlap, the first ends and the second begins where both have had the same
    /// tokens at the same places for a while: a tokenizer looks no further back than that. Where there is no such place, at once.
    fn encode_in(&self, pieces: Pieces, text: &str) -> Result<Vec<u32>, ModelError> {
        let Some([mut tokens, behind]) = self.frame()? else { return self.encode_at_once(text, true) };
        let mut end = boundary(text, pieces.bytes);
        let mut piece = self.places(text, 0..end)?;
        while end < text.len() {
            let start = boundary(text, end - pieces.overlap);
            let next_end = boundary(text, start + pieces.bytes);
            let next = self.places(text, start..next_end)?;
            let margin = pieces.overlap / 4;
            let Some((ours, theirs)) = pieces.meeting(&piece, &next, start + margin, end - margin) else {
                return self.encode_at_once(text, true);
            };
            tokens.extend(piece[..ours].iter().map(|place| place.token));
            piece = next;
            piece.drain(..theirs);
            end = next_end;
        }
        tokens.extend(piece.iter().map(|place| place.token));
        tokens.extend(behind);
        Ok(tokens)
    }

    /// The tokens that the tokenizer itself adds in front of a text and behind it; `None` where it does not leave a text's own as they are.
    fn frame(&self) -> Result<Option<[Vec<u32>; 2]>, ModelError> {
        let (own, mut all) = (self.encode_at_once("a", false)?, self.encode_at_once("a", true)?);
        let found = all.windows(own.len().max(1)).position(|part| part == own);
        Ok(found.map(|at| {
            let behind = all.split_off(at + own.len());
            all.truncate(at);
            [all, behind]
        }))
    }

    /// The tokens of a part of a text, with their places in the text.
    fn places(&self, text: &str, range: Range<usize>) -> Result<Vec<Place>, ModelError> {
        guarded(|| {
            let encoding = self.inner.encode(&text[range.clone()], false)?;
            let places = encoding.get_ids().iter().zip(encoding.get_offsets());
            Ok(places
                .map(|(token, (a, b))| Place { token: *token, start: range.start + a, end: range.start + b })
                .collect())
        })
    }

    /// Tokens of a text that has all special tokens in it, as a chat template writes it: the tokenizer adds none.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer fails.
    pub fn encode_as_is(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.encode_at_once(text, false)
    }

    /// Text of some tokens, special ones left out. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        // Some of the library's decoders panic on no tokens at all.
        if !tokens.iter().any(|token| self.visible(*token).is_some()) {
            return Ok(String::new());
        }
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
        TextStream::new(self, prompt)
    }

    /// Whether tokens such as `<0x0A>` stand for bytes, whose characters appear once all of them are there.
    pub(crate) fn has_byte_tokens(&self) -> bool {
        fn is_fallback(decoder: &DecoderWrapper) -> bool {
            match decoder {
                DecoderWrapper::ByteFallback(_) => true,
                DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(is_fallback),
                _ => false,
            }
        }
        self.inner.get_decoder().is_some_and(is_fallback)
    }

    /// The token as the vocabulary has it; `None` where it has no text: a special token, or one beyond the vocabulary.
    pub(crate) fn visible(&self, token: u32) -> Option<String> {
        let added = self.inner.get_added_vocabulary();
        self.inner.id_to_token(token).filter(|token| !added.is_special_token(token))
    }
}
