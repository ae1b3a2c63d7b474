//! The tokenizer of a GGUF file as a `tokenizer.json`.

use crate::ModelError;
use crate::sentencepiece::{Added, Kind, Piece, Prefix, Settings, to_json};
use bitstack_gguf::{Gguf, Strings, Value};
use bitstack_io::hostile::printable;
use serde_json::{Map, Value as Json, json};
use std::path::Path;

/// How a text is cut before it is merged: `tokenizer.ggml.pre`, and expressions applied one after another, each to what the one before left.
struct Cut {
    names: &'static [&'static str],
    expressions: &'static [&'static str],
    /// Whether the text is composed (NFC) first.
    nfc: bool,
    /// Whether a word that is a token is not merged.
    whole_words: bool,
    /// Whether a begin token is added where the file does not say.
    begin: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const CUTS: [Cut; 6] = [
    Cut {
        names: &["default"],
        expressions: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        nfc: false,
        whole_words: false,
        begin: false,
    },
    Cut {
        names: &["gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jina-en", "jina-de", "jina-es"],
        expressions: &[GPT2],
        nfc: false,
        whole_words: false,
        begin: false,
    },
    Cut {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"],
        expressions: &[r"\p{N}", GPT2],
        nfc: false,
        whole_words: false,
        begin: false,
    },
    Cut {
        names: &["llama3", "llama-v3", "llama-bpe", "dbrx", "smaug-bpe", "falcon3"],
        expressions: &[LLAMA3],
        nfc: false,
        whole_words: true,
        begin: true,
    },
    Cut {
        names: &["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"],
        expressions: &[QWEN2],
        nfc: true,
        whole_words: false,
        begin: false,
    },
    Cut { names: &["tekken"], expressions: &[TEKKEN], nfc: false, whole_words: true, begin: true },
];

fn get<'g>(gguf: &'g Gguf, key: &str) -> Option<&'g Value> {
    gguf.get(&format!("tokenizer.ggml.{key}"))
}

/// Whether there is a tokenizer at all.
pub(super) fn is_there(gguf: &Gguf) -> bool {
    !matches!(get(gguf, "model").and_then(Value::as_str), None | Some("no_vocab" | "none"))
}

/// The bytes of a `tokenizer.json`, where there is a tokenizer.
pub(super) fn json(path: &Path, gguf: &Gguf) -> Result<Option<Vec<u8>>, ModelError> {
    if !is_there(gguf) {
        return Ok(None);
    }
    let bad = |key: &str, found: &str, expected: &str| ModelError::GgufKey {
        path: path.to_owned(),
        key: format!("tokenizer.ggml.{key}"),
        found: printable(found),
        expected: expected.to_owned(),
    };
    let tokens = get(gguf, "tokens").and_then(Value::as_texts).filter(|tokens| !tokens.is_empty());
    let tokens = tokens.ok_or_else(|| bad("tokens", "no list of texts", "one"))?;
    let kinds =
        kinds(gguf, tokens.len()).ok_or_else(|| bad("token_type", "of another length", "one number per token"))?;
    let model = get(gguf, "model").and_then(Value::as_str).unwrap_or_default();
    let json = match model {
        "gpt2" => {
            let pre = get(gguf, "pre").and_then(Value::as_str).unwrap_or("default");
            let known = || CUTS.iter().flat_map(|cut| cut.names).copied().collect::<Vec<_>>().join(", ");
            let cut = CUTS.iter().find(|cut| cut.names.contains(&pre));
            let cut = cut.ok_or_else(|| bad("pre", &format!("{pre:?}"), &format!("one of {}", known())))?;
            let merges = get(gguf, "merges").and_then(Value::as_texts);
            let merges = merges.ok_or_else(|| bad("merges", "no list of texts", "one"))?;
            let merges = merges.iter().map(|merge| merge.split_once(' '));
            let merges = merges
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| bad("merges", "there", "pairs with a space between"))?;
            byte_level(cut, gguf, tokens, &kinds, &merges)
        }
        "llama" => {
            let scores = get(gguf, "scores").and_then(Value::as_numbers).filter(|scores| scores.len() == tokens.len());
            let scores = scores.ok_or_else(|| bad("scores", "of another length", "one number per token"))?;
            let pieces = tokens.iter().zip(scores.iter()).zip(&kinds);
            let pieces: Vec<Piece<'_>> =
                pieces.map(|((text, score), &kind)| Piece { text, score: score.as_f64(), kind }).collect();
            let flag = |key: &str, default| get(gguf, key).and_then(Value::as_bool).unwrap_or(default);
            let settings = Settings {
                is_unigram: false,
                byte_fallback: kinds.contains(&Kind::Byte),
                prefix: if flag("add_space_prefix", true) { Prefix::Always } else { Prefix::Never },
                trim: flag("remove_extra_whitespaces", false),
                escape: true,
                charsmap: b"",
                unknown: kinds.iter().position(|kind| *kind == Kind::Unknown),
                post_processor: post_processor(gguf, tokens, true),
            };
            let added = pieces.iter().enumerate().filter_map(|(id, piece)| {
                let special = matches!(piece.kind, Kind::Control | Kind::Unknown);
                (special || piece.kind == Kind::UserDefined).then(|| Added::new(id, piece.text, special))
            });
            to_json(&pieces, &added.collect::<Vec<_>>(), &settings)
                .map_err(|found| bad("tokens", &found, "shorter pieces"))?
        }
        other => return Err(bad("model", &format!("{other:?}"), "\"gpt2\" or \"llama\"")),
    };
    Ok(Some(json.to_string().into_bytes()))
}

/// The kind of each token: normal where nothing is said.
fn kinds(gguf: &Gguf, n: usize) -> Option<Vec<Kind>> {
    match get(gguf, "token_type") {
        None => Some(vec![Kind::Normal; n]),
        Some(value) => {
            let kinds = value.as_numbers().filter(|numbers| numbers.len() == n)?;
            Some(kinds.iter().map(|kind| Kind::from_number(kind.as_u64().unwrap_or(1))).collect())
        }
    }
}

/// A byte-level tokenizer of byte pairs.
fn byte_level(cut: &Cut, gguf: &Gguf, tokens: &Strings, kinds: &[Kind], merges: &[(&str, &str)]) -> Json {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let split = |expression: &&str| json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    let steps: Vec<Json> = cut.expressions.iter().map(split).chain([byte_level.clone()]).collect();
    let used = tokens.iter().enumerate().zip(kinds).filter(|(_, kind)| **kind != Kind::Unused);
    let vocab: Map<String, Json> = used.map(|((id, token), _)| (token.to_owned(), json!(id))).collect();
    let added = tokens.iter().enumerate().zip(kinds).filter_map(|((id, token), kind)| {
        let special = *kind == Kind::Control;
        (special || *kind == Kind::UserDefined).then(|| Added::new(id, token, special).json())
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": if cut.nfc { json!({"type": "NFC"}) } else { Json::Null },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": post_processor(gguf, tokens, cut.begin),
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": cut.whole_words, "vocab": vocab, "merges": merges},
    })
}

/// The id and the text of the token that a key names.
fn named<'g>(gguf: &Gguf, tokens: &'g Strings, key: &str) -> Option<(u64, &'g str)> {
    let id = get(gguf, &format!("{key}_token_id"))?.as_u64()?;
    Some((id, tokens.get(usize::try_from(id).ok()?)?))
}

/// Begin and end tokens that a text is given.
fn post_processor(gguf: &Gguf, tokens: &Strings, begin: bool) -> Json {
    let adds = |key: &str, default| get(gguf, key).and_then(Value::as_bool).unwrap_or(default);
    let begin = named(gguf, tokens, "bos").filter(|_| adds("add_bos_token", begin));
    let end = named(gguf, tokens, "eos").filter(|_| adds("add_eos_token", false));
    crate::sentencepiece::template(begin, end)
}

/// The bytes of a `tokenizer_config.json`: the special tokens by their roles.
pub(super) fn config(gguf: &Gguf) -> Option<Vec<u8>> {
    let tokens = get(gguf, "tokens").filter(|_| is_there(gguf))?.as_texts()?;
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    for (role, key) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
        if let Some((_, token)) = named(gguf, tokens, key) {
            config.insert(format!("{role}_token"), json!(token));
        }
    }
    for key in ["add_bos_token", "add_eos_token"] {
        if let Some(adds) = get(gguf, key).and_then(Value::as_bool) {
            config.insert(key.into(), json!(adds));
        }
    }
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    Some(format!("{:#}\n", Json::Object(config)).into_bytes())
}
