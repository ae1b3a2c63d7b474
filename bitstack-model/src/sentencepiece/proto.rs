//! `tokenizer.model`: a message of protocol buffers, of which the fields that matter are read and all others stepped over.

use super::{Added, Kind, Piece, Prefix, Settings, template, to_json};
use serde_json::{Map, Value};

/// What a text is made of, by the model's own description.
#[derive(Default)]
struct Model<'b> {
    pieces: Vec<Piece<'b>>,
    trainer: Trainer<'b>,
    normalizer: Normalizer<'b>,
}

struct Trainer<'b> {
    kind: u64,
    byte_fallback: bool,
    unknown: i64,
    begin: i64,
    end: i64,
    begin_piece: &'b str,
    end_piece: &'b str,
}

impl Default for Trainer<'_> {
    fn default() -> Self {
        Self { kind: 1, byte_fallback: false, unknown: 0, begin: 1, end: 2, begin_piece: "<s>", end_piece: "</s>" }
    }
}

struct Normalizer<'b> {
    charsmap: &'b [u8],
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Default for Normalizer<'_> {
    fn default() -> Self {
        Self { charsmap: b"", add_dummy_prefix: true, remove_extra_whitespaces: true, escape_whitespaces: true }
    }
}

/// The value of a field.
#[derive(Clone, Copy)]
enum Field<'b> {
    Varint(u64),
    Fixed32(u32),
    Bytes(&'b [u8]),
    Other,
}

impl<'b> Field<'b> {
    fn bytes(self) -> Result<&'b [u8], String> {
        if let Self::Bytes(bytes) = self { Ok(bytes) } else { Err("a field is of another type".into()) }
    }

    fn text(self) -> Result<&'b str, String> {
        std::str::from_utf8(self.bytes()?).map_err(|_| "a text is not UTF-8".into())
    }

    fn number(self) -> Result<u64, String> {
        if let Self::Varint(number) = self { Ok(number) } else { Err("a field is of another type".into()) }
    }

    fn flag(self) -> Result<bool, String> {
        Ok(self.number()? != 0)
    }
}

/// Calls `each` with number and value of every field of a message.
fn fields<'b>(mut bytes: &'b [u8], mut each: impl FnMut(u64, Field<'b>) -> Result<(), String>) -> Result<(), String> {
    let cut = || "it ends inside a field".to_owned();
    while !bytes.is_empty() {
        let key = varint(&mut bytes).ok_or_else(cut)?;
        let n_bytes = match key & 7 {
            0 => {
                each(key >> 3, Field::Varint(varint(&mut bytes).ok_or_else(cut)?))?;
                continue;
            }
            1 => 8,
            2 => varint(&mut bytes).ok_or_else(cut)?,
            5 => 4,
            other => return Err(format!("a field of wire type {other}")),
        };
        let taken = usize::try_from(n_bytes).ok().and_then(|n| bytes.split_at_checked(n));
        let (taken, rest) = taken.ok_or_else(cut)?;
        bytes = rest;
        let field = match (key & 7, taken) {
            (2, _) => Field::Bytes(taken),
            (_, &[a, b, c, d]) => Field::Fixed32(u32::from_le_bytes([a, b, c, d])),
            _ => Field::Other,
        };
        each(key >> 3, field)?;
    }
    Ok(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..70).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn read(bytes: &[u8]) -> Result<Model<'_>, String> {
    let mut model = Model::default();
    fields(bytes, |number, field| {
        match number {
            1 => {
                let mut piece = Piece { text: "", score: 0.0, kind: Kind::Normal };
                fields(field.bytes()?, |number, field| {
                    match (number, field) {
                        (1, field) => piece.text = field.text()?,
                        (2, Field::Fixed32(bits)) => piece.score = f64::from(f32::from_bits(bits)),
                        (3, field) => piece.kind = Kind::from_number(field.number()?),
                        _ => {}
                    }
                    Ok(())
                })?;
                if !piece.score.is_finite() {
                    return Err(format!("piece {} has score {}", model.pieces.len(), piece.score));
                }
                model.pieces.push(piece);
            }
            2 => fields(field.bytes()?, |number, field| {
                let trainer = &mut model.trainer;
                match number {
                    3 => trainer.kind = field.number()?,
                    35 => trainer.byte_fallback = field.flag()?,
                    40 => trainer.unknown = field.number()? as i64,
                    41 => trainer.begin = field.number()? as i64,
                    42 => trainer.end = field.number()? as i64,
                    46 => trainer.begin_piece = field.text()?,
                    47 => trainer.end_piece = field.text()?,
                    _ => {}
                }
                Ok(())
            })?,
            3 => fields(field.bytes()?, |number, field| {
                let normalizer = &mut model.normalizer;
                match number {
                    2 => normalizer.charsmap = field.bytes()?,
                    3 => normalizer.add_dummy_prefix = field.flag()?,
                    4 => normalizer.remove_extra_whitespaces = field.flag()?,
                    5 => normalizer.escape_whitespaces = field.flag()?,
                    _ => {}
                }
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })?;
    if model.pieces.is_empty() {
        return Err("it has no pieces".into());
    }
    Ok(model)
}

/// A `tokenizer.json` from a `tokenizer.model` and the fields of the `tokenizer_config.json` beside it: added tokens, and which of begin and end
/// a text is given (the begin token, where nothing is said, as Llama's tokenizer does).
///
/// # Errors
/// Which rule of the format is broken, or what it has that is not known here.
pub(crate) fn convert(bytes: &[u8], config: &Map<String, Value>) -> Result<Value, String> {
    const UNIGRAM: u64 = 1;
    const BYTE_PAIRS: u64 = 2;
    let Model { pieces, trainer, normalizer } = read(bytes)?;
    if ![UNIGRAM, BYTE_PAIRS].contains(&trainer.kind) {
        return Err(format!(
            "a model of words or characters (type {}); unigrams and byte pairs are known here",
            trainer.kind
        ));
    }
    let flag = |key: &str, default| config.get(key).and_then(Value::as_bool).unwrap_or(default);
    let prefix = match (flag("add_prefix_space", normalizer.add_dummy_prefix), flag("legacy", false)) {
        (false, _) => Prefix::Never,
        (true, false) => Prefix::First,
        (true, true) => Prefix::Always,
    };
    let added = added(&pieces, config)?;
    let text = |role: &str, piece: &'_ str| {
        let token = config.get(role).map(|token| token.get("content").unwrap_or(token));
        token.and_then(Value::as_str).unwrap_or(piece).to_owned()
    };
    let outer = |role: &str, piece: &str, id: i64, default| {
        let token = text(&format!("{role}_token"), piece);
        let there = pieces.iter().position(|piece| piece.text == token);
        let there = there.or_else(|| added.iter().find(|added| added.content == token).map(|added| added.id));
        let wanted = flag(&format!("add_{role}_token"), default && id >= 0);
        there.filter(|_| wanted).map(|id| (id as u64, token))
    };
    let begin = outer("bos", trainer.begin_piece, trainer.begin, true);
    let end = outer("eos", trainer.end_piece, trainer.end, false);
    let settings = Settings {
        is_unigram: trainer.kind == UNIGRAM,
        byte_fallback: trainer.byte_fallback,
        prefix,
        trim: normalizer.remove_extra_whitespaces,
        escape: normalizer.escape_whitespaces,
        charsmap: normalizer.charsmap,
        unknown: usize::try_from(trainer.unknown).ok().filter(|id| *id < pieces.len()),
        post_processor: template(
            begin.as_ref().map(|(id, token)| (*id, &token[..])),
            end.as_ref().map(|(id, token)| (*id, &token[..])),
        ),
    };
    to_json(&pieces, &added, &settings)
}

/// The control pieces, and the tokens that were added to the model later: those must follow the pieces without a gap.
fn added(pieces: &[Piece<'_>], config: &Map<String, Value>) -> Result<Vec<Added>, String> {
    let control = pieces.iter().enumerate().filter(|(_, piece)| matches!(piece.kind, Kind::Control | Kind::Unknown));
    let mut added: Vec<Added> = control.map(|(id, piece)| Added::new(id, piece.text, true)).collect();
    let listed = config.get("added_tokens_decoder").and_then(Value::as_object);
    let mut listed: Vec<(usize, &Value)> =
        listed.into_iter().flatten().filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
    listed.sort_by_key(|(id, _)| *id);
    let mut next = pieces.len();
    for (id, token) in listed {
        let Some(content) = token.get("content").and_then(Value::as_str) else { continue };
        let flag = |key: &str| token.get(key).and_then(Value::as_bool).unwrap_or(false);
        if id > next || pieces.get(id).is_some_and(|piece| piece.text != content) {
            return Err(format!(
                "tokenizer_config.json adds {content:?} as token {id}, which is not the next one, {next}"
            ));
        }
        next = next.max(id + 1);
        added.retain(|added| added.id != id);
        let strips = [flag("lstrip"), flag("rstrip")];
        added.push(Added { id, content: content.to_owned(), special: flag("special"), strips });
    }
    added.sort_by_key(|added| added.id);
    Ok(added)
}
