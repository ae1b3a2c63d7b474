//! SentencePiece models as a `tokenizer.json`: those of a `tokenizer.model`, and those that GGUF files hold. The result encodes as SentencePiece itself
//! does, but for special tokens, which it finds in a text.

mod proto;

pub(crate) use proto::convert;

use serde_json::{Map, Value, json};
use std::collections::{HashMap, HashSet};

/// The most bytes of a piece: each way to cut one is looked up. SentencePiece's own default is 16 characters.
const MOST_PIECE_BYTES: usize = 512;

/// SentencePiece's sign for a space.
const SPACE: &str = "\u{2581}";

/// What a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A piece of text.
    Normal,
    /// Stands for what no piece is.
    Unknown,
    /// A sign that no text has, such as the begin of one.
    Control,
    /// A text that is always one piece.
    UserDefined,
    /// Nothing.
    Unused,
    /// A byte, where no piece is.
    Byte,
}

impl Kind {
    /// The kind of this number, in both kinds of files.
    pub(crate) fn from_number(number: u64) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// A piece; its id is its place in the list.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece<'t> {
    pub(crate) text: &'t str,
    pub(crate) score: f64,
    pub(crate) kind: Kind,
}

/// Whether a space is put before a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prefix {
    Never,
    /// At its beginning.
    First,
    /// There, and behind each added token.
    Always,
}

/// What is to be done with a text before it is cut into pieces, and after.
pub(crate) struct Settings<'t> {
    /// Whether the best pieces by the sum of scores are taken, or pairs are merged by score.
    pub(crate) is_unigram: bool,
    pub(crate) byte_fallback: bool,
    pub(crate) prefix: Prefix,
    /// Whether spaces at the ends and beside others are dropped.
    pub(crate) trim: bool,
    /// Whether spaces become SentencePiece's sign.
    pub(crate) escape: bool,
    /// Its table of characters, compiled; may be empty.
    pub(crate) charsmap: &'t [u8],
    /// The id of the unknown piece.
    pub(crate) unknown: Option<usize>,
    pub(crate) post_processor: Value,
}

/// A token that is found in a text before anything else.
pub(crate) struct Added {
    pub(crate) id: usize,
    pub(crate) content: String,
    pub(crate) special: bool,
    /// Whether spaces beside it belong to it.
    pub(crate) strips: [bool; 2],
}

impl Added {
    pub(crate) fn new(id: usize, content: &str, special: bool) -> Self {
        Self { id, content: content.to_owned(), special, strips: [false; 2] }
    }

    pub(crate) fn json(&self) -> Value {
        json!({"id": self.id, "content": self.content, "single_word": false, "lstrip": self.strips[0], "rstrip": self.strips[1],
            "normalized": false, "special": self.special})
    }
}

/// What adds a begin token, an end token, or both, by id and text.
pub(crate) fn template(begin: Option<(u64, &str)>, end: Option<(u64, &str)>) -> Value {
    if begin.is_none() && end.is_none() {
        return Value::Null;
    }
    let special = |(_, token): (u64, &str), kind: u8| json!({"SpecialToken": {"id": token, "type_id": kind}});
    let sequence = |id: &str, kind: u8| {
        let text = json!({"Sequence": {"id": id, "type_id": kind}});
        let all = [begin.map(|token| special(token, kind)), Some(text), end.map(|token| special(token, kind))];
        all.into_iter().flatten().collect::<Vec<_>>()
    };
    let tokens: Map<String, Value> = [begin, end]
        .into_iter()
        .flatten()
        .map(|(id, token)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})))
        .collect();
    let (single, pair) = (sequence("A", 0), [sequence("A", 0), sequence("B", 1)].concat());
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}

/// A `tokenizer.json`. Added tokens that are not among the pieces have the ids behind them.
///
/// # Errors
/// The piece that is too long.
pub(crate) fn to_json(pieces: &[Piece<'_>], added: &[Added], settings: &Settings<'_>) -> Result<Value, String> {
    let regex =
        |pattern: &str, content: &str| json!({"type": "Replace", "pattern": {"Regex": pattern}, "content": content});
    let plain = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = Vec::new();
    if !settings.charsmap.is_empty() {
        normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": base64(settings.charsmap)}));
    }
    if settings.trim {
        // Only spaces: other whitespace is left alone.
        normalizers.extend([regex(r"\A +| +\z", ""), regex(" {2,}", " ")]);
    }
    if settings.escape {
        normalizers.push(plain(" ", SPACE));
        if settings.trim {
            // At the end, signs in the text itself are dropped too.
            normalizers.push(regex(r"▁+\z", ""));
        }
    }
    if settings.prefix == Prefix::Always {
        // What prepends the sign leaves out texts that begin with it; SentencePiece does not.
        normalizers.push(regex(r"\A▁", "▁▁"));
    }
    let mut cuts = Vec::new();
    if settings.prefix != Prefix::Never {
        let scheme = if settings.prefix == Prefix::Always { "always" } else { "first" };
        cuts.push(json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": false}));
    }
    let found: HashSet<&str> = added.iter().map(|added| &added.content[..]).collect();
    let whole = pieces.iter().filter(|piece| piece.kind == Kind::UserDefined && !piece.text.is_empty());
    let mut whole: Vec<&str> = whole.map(|piece| piece.text).filter(|text| !found.contains(text)).collect();
    if !whole.is_empty() {
        // The longest first, as SentencePiece takes them.
        whole.sort_by_key(|text| std::cmp::Reverse(text.len()));
        let pattern: Vec<String> = whole.iter().map(|text| escaped(text)).collect();
        cuts.push(
            json!({"type": "Split", "pattern": {"Regex": pattern.join("|")}, "behavior": "Isolated", "invert": false}),
        );
    }
    let mut decoders = vec![plain(SPACE, " ")];
    if settings.byte_fallback {
        decoders.push(json!({"type": "ByteFallback"}));
    }
    decoders.push(json!({"type": "Fuse"}));
    if settings.prefix != Prefix::Never {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.iter().map(Added::json).collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": if cuts.is_empty() { Value::Null } else { json!({"type": "Sequence", "pretokenizers": cuts}) },
        "post_processor": settings.post_processor,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": if settings.is_unigram { unigram(pieces, settings) } else { pairs(pieces, added, settings, !whole.is_empty())? },
    }))
}

fn unigram(pieces: &[Piece<'_>], settings: &Settings<'_>) -> Value {
    let vocab: Vec<Value> = pieces.iter().map(|piece| json!([piece.text, piece.score])).collect();
    json!({"type": "Unigram", "unk_id": settings.unknown, "vocab": vocab, "byte_fallback": settings.byte_fallback})
}

/// Byte pairs: SentencePiece merges the neighbours whose union has the highest score, so a merge ranks as its union does.
fn pairs(pieces: &[Piece<'_>], added: &[Added], settings: &Settings<'_>, whole_words: bool) -> Result<Value, String> {
    let normal: HashMap<&str, usize> = pieces
        .iter()
        .enumerate()
        .filter(|(_, piece)| piece.kind == Kind::Normal)
        .map(|(id, piece)| (piece.text, id))
        .collect();
    let mut ranked: Vec<(usize, &str, &str)> = Vec::new();
    for (&text, &id) in &normal {
        if text.len() > MOST_PIECE_BYTES {
            return Err(format!("piece {id} of {} bytes", text.len()));
        }
        let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        let both = cuts.filter(|(left, right)| normal.contains_key(left) && normal.contains_key(right));
        ranked.extend(both.map(|(left, right)| (id, left, right)));
    }
    ranked.sort_unstable_by(|a, b| {
        let score = |id: usize| pieces[id].score;
        score(b.0).total_cmp(&score(a.0)).then(a.cmp(b))
    });
    let merges: Vec<[&str; 2]> = ranked.iter().map(|(_, left, right)| [*left, *right]).collect();
    let mut vocab: Map<String, Value> = Map::new();
    for (id, piece) in pieces.iter().enumerate() {
        vocab.entry(piece.text).or_insert(json!(id));
    }
    for added in added.iter().filter(|added| added.id >= pieces.len()) {
        vocab.entry(added.content.as_str()).or_insert(json!(added.id));
    }
    Ok(json!({
        "type": "BPE", "dropout": null, "unk_token": settings.unknown.map(|id| pieces[id].text), "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": settings.byte_fallback, "ignore_merges": whole_words,
        "vocab": vocab, "merges": merges,
    }))
}

/// A text as an expression that matches it. Other signs are not escaped: some of them mean something if they are, as \< does.
fn escaped(text: &str) -> String {
    text.chars().flat_map(|c| r"\.+*?()|[]{}^$".contains(c).then_some('\\').into_iter().chain([c])).collect()
}

/// Base 64, with padding (RFC 4648).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().fold(0, |word, &byte| word << 8 | u32::from(byte)) << (8 * (3 - three.len()));
        for i in 0..4 {
            let digit = char::from(DIGITS[(word >> (18 - 6 * i) & 63) as usize]);
            out.push(if i <= three.len() { digit } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_64_is_that_of_the_standard() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
