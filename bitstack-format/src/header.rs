//! The header as text: fetching it, reading it from JSON, writing it. What the tensors mean is checked in `arrange.rs`.

use crate::catalog::check_name;
use crate::constants::{AFTER_VERSION, ALIGNMENT, HASH_DIGITS, HASH_OFFSET, MAGIC, PROVENANCE_PREFIX, VERSION};
use crate::tensor::{DTYPES, wrong};
use crate::{BlockKind, FormatError, Limits, ReadAt, TensorInfo, WeightInfo};
use bitstack_io::hostile::{printable, read_once};
use bitstack_io::safetensors::{self, LENGTH_BYTES, MAX_HEADER_BYTES};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeStruct as _, Serializer};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

/// A weight in the metadata.
#[derive(Debug)]
pub(crate) struct WeightRecord<'a> {
    pub(crate) name: Cow<'a, str>,
    pub(crate) kind: Cow<'a, str>,
    // Other kinds may have other fields, and an unknown kind is to be reported as such.
    pub(crate) rows: Option<u64>,
    pub(crate) cols: Option<u64>,
    pub(crate) rank: Option<u64>,
    pub(crate) method: Option<Cow<'a, str>>,
    pub(crate) n_blocks: Option<u64>,
}

impl<'a> WeightRecord<'a> {
    pub(crate) fn new(weight: &'a WeightInfo, n_blocks: usize) -> Self {
        Self {
            name: Cow::Borrowed(&weight.name),
            kind: Cow::Borrowed(weight.kind.name()),
            rows: Some(weight.shape.rows() as u64),
            cols: Some(weight.shape.cols() as u64),
            rank: Some(weight.rank as u64),
            method: Some(Cow::Borrowed(&weight.method)),
            n_blocks: Some(n_blocks as u64),
        }
    }
}

const RECORD: &str = "WeightRecord";
const RECORD_FIELDS: [&str; 7] = ["name", "kind", "rows", "cols", "rank", "method", "n_blocks"];

// By hand: deriving them takes as long to compile as the rest of what this crate depends on.
impl Serialize for WeightRecord<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { name, kind, rows, cols, rank, method, n_blocks } = self;
        let [name_key, kind_key, rows_key, cols_key, rank_key, method_key, n_blocks_key] = RECORD_FIELDS;
        let mut record = serializer.serialize_struct(RECORD, RECORD_FIELDS.len())?;
        record.serialize_field(name_key, name)?;
        record.serialize_field(kind_key, kind)?;
        record.serialize_field(rows_key, rows)?;
        record.serialize_field(cols_key, cols)?;
        record.serialize_field(rank_key, rank)?;
        record.serialize_field(method_key, method)?;
        record.serialize_field(n_blocks_key, n_blocks)?;
        record.end()
    }
}

impl<'de> Deserialize<'de> for WeightRecord<'static> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RecordVisitor;
        impl<'de> Visitor<'de> for RecordVisitor {
            type Value = WeightRecord<'static>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a weight")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut name, mut kind, mut method) = (None, None, None);
                let (mut rows, mut cols, mut rank, mut n_blocks) = (None, None, None, None);
                while let Some(field) = map.next_key::<String>()? {
                    match field.as_str() {
                        "name" => read_once(&mut name, "name", &mut map)?,
                        "kind" => read_once(&mut kind, "kind", &mut map)?,
                        "rows" => read_once(&mut rows, "rows", &mut map)?,
                        "cols" => read_once(&mut cols, "cols", &mut map)?,
                        "rank" => read_once(&mut rank, "rank", &mut map)?,
                        "method" => read_once::<Option<String>, A>(&mut method, "method", &mut map)?,
                        "n_blocks" => read_once(&mut n_blocks, "n_blocks", &mut map)?,
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                let missing = A::Error::missing_field;
                Ok(WeightRecord {
                    name: Cow::Owned(name.ok_or_else(|| missing("name"))?),
                    kind: Cow::Owned(kind.ok_or_else(|| missing("kind"))?),
                    rows: rows.flatten(),
                    cols: cols.flatten(),
                    rank: rank.flatten(),
                    method: method.flatten().map(Cow::Owned),
                    n_blocks: n_blocks.flatten(),
                })
            }
        }
        deserializer.deserialize_struct(RECORD, &RECORD_FIELDS, RecordVisitor)
    }
}

/// A tensor as the header has it: contiguous, with a length that its shape and type demand, but not yet in its right place.
#[derive(Debug)]
pub(crate) struct HeaderTensor {
    pub(crate) info: TensorInfo,
    /// From the start of the data.
    pub(crate) offset_bytes: u64,
    pub(crate) hash: [u8; 32],
}

/// The header, read.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) tensors: Vec<HeaderTensor>,
    /// The JSON of the weights.
    pub(crate) weights: String,
    pub(crate) order: Vec<u32>,
    pub(crate) provenance: BTreeMap<String, String>,
}

/// The BLAKE3 hash of a header: over its length field and its text, the digits of the hash itself taken as zeros.
fn header_hash(length: [u8; 8], text: &[u8]) -> blake3::Hash {
    let at = HASH_OFFSET - LENGTH_BYTES as usize;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&length).update(&text[..at]).update(&[b'0'; HASH_DIGITS]).update(&text[at + HASH_DIGITS..]);
    hasher.finalize()
}

/// Reads the text of the header, once it is sure that it is one of ours, of a length within bounds, and undamaged.
pub(crate) fn read_text(source: &impl ReadAt, size_bytes: u64, limits: &Limits) -> Result<Vec<u8>, FormatError> {
    let read = |bytes: &mut [u8], offset| {
        let error = |source| FormatError::Read { what: "the header".to_owned(), source };
        source.read_exact_at(bytes, offset).map_err(error)
    };
    let cut = |needed| FormatError::HeaderCut { needed, have: size_bytes };
    if size_bytes < LENGTH_BYTES {
        return Err(cut(LENGTH_BYTES));
    }
    // Up to the hash and its closing quote; a file may be cut in there.
    let mut start = [0; HASH_OFFSET + HASH_DIGITS + 1];
    let n = start.len().min(usize::try_from(size_bytes).unwrap_or(usize::MAX));
    let start = &mut start[..n];
    read(start, 0)?;
    let (length, start) = start.split_at(LENGTH_BYTES as usize);
    let length: [u8; 8] = length.try_into().expect("the first part of a split has its length");
    let header_bytes = u64::from_le_bytes(length);
    check_start(start)?;

    let limit = limits.header_bytes.min(MAX_HEADER_BYTES);
    if header_bytes > limit {
        return Err(FormatError::LimitExceeded { what: "the header".to_owned(), value: header_bytes, limit });
    }
    // No overflow: the header's length is at most MAX_HEADER_BYTES.
    let data_bytes = LENGTH_BYTES + header_bytes;
    if !data_bytes.is_multiple_of(ALIGNMENT) || data_bytes <= (HASH_OFFSET + HASH_DIGITS) as u64 {
        return Err(FormatError::HeaderLength { header_bytes });
    }
    if size_bytes < data_bytes {
        return Err(cut(data_bytes));
    }
    let mut text = vec![0; header_bytes as usize];
    read(&mut text, LENGTH_BYTES)?;
    let hash_at = HASH_OFFSET - LENGTH_BYTES as usize;
    if header_hash(length, &text).to_hex().as_bytes() != &text[hash_at..][..HASH_DIGITS] {
        return Err(FormatError::HeaderDamaged);
    }
    Ok(text)
}

/// Compares the start of a header's text, as far as it is there, with what it must be.
fn check_start(start: &[u8]) -> Result<(), FormatError> {
    let n = start.len().min(MAGIC.len());
    if start[..n] != MAGIC.as_bytes()[..n] {
        let found = printable(&String::from_utf8_lossy(&start[..n]));
        return Err(FormatError::NotBitstack { found: format!("{found:?} (after 8 bytes of length)") });
    }
    let after_magic = &start[n..];
    let expected = format!("{VERSION}{AFTER_VERSION}");
    let n = after_magic.len().min(expected.len());
    if after_magic[..n] == expected.as_bytes()[..n] {
        return Ok(());
    }
    let version = after_magic.split(|&c| c == b'"').next().unwrap_or_default();
    if version == VERSION.as_bytes() {
        return Err(FormatError::HeaderJson { reason: "header_blake3 does not follow the version".to_owned() });
    }
    Err(FormatError::Version { found: printable(&String::from_utf8_lossy(version)) })
}

impl Header {
    /// Reads the text of a header whose hash was found right.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, FormatError> {
        let raw = safetensors::Header::parse(text).map_err(header_error)?;
        raw.data_bytes().map_err(header_error)?;
        let mut metadata = raw.metadata;
        let mut field = |field: &'static str| {
            metadata.remove(field).ok_or(FormatError::Metadata { field, reason: "it is missing".to_owned() })
        };
        let (weights, order, hashes) = (field("weights")?, field("order")?, field("blake3")?);
        let order = serde_json::from_str(&order)
            .map_err(|e| FormatError::Metadata { field: "order", reason: printable(&e.to_string()) })?;
        let mut hashes = parse_hashes(&hashes, raw.tensors.len())?;

        let mut tensors = Vec::with_capacity(raw.tensors.len());
        for safetensors::HeaderTensor { name, dtype, shape, begin, .. } in raw.tensors {
            check_name("tensor", &name)?;
            if !DTYPES.contains(&dtype) {
                return Err(unknown_dtype(&name, dtype));
            }
            let info = TensorInfo::new(name, dtype, shape)?;
            tensors.push(HeaderTensor { info, offset_bytes: begin, hash: hashes.next().unwrap_or_default() });
        }
        let provenance = metadata.into_iter().filter_map(|(key, value)| {
            let key = key.strip_prefix(PROVENANCE_PREFIX)?;
            Some((key.to_owned(), value))
        });
        Ok(Self { tensors, weights, order, provenance: provenance.collect() })
    }

    /// The weights, of a kind that is known.
    pub(crate) fn weights(&self) -> Result<Vec<WeightRecord<'static>>, FormatError> {
        let records: Vec<WeightRecord<'static>> = serde_json::from_str(&self.weights)
            .map_err(|e| FormatError::Metadata { field: "weights", reason: printable(&e.to_string()) })?;
        for w in &records {
            check_name("weight", &w.name)?;
            if w.kind != BlockKind::Sign.name() {
                return Err(FormatError::UnknownKind { weight: w.name.to_string(), kind: printable(&w.kind) });
            }
        }
        Ok(records)
    }
}

/// Writes a header: length, text, and the spaces that align what follows.
pub(crate) fn build<'a>(
    provenance: &BTreeMap<String, String>,
    weights: &[WeightRecord<'_>],
    order: &[u32],
    tensors: impl Iterator<Item = (&'a TensorInfo, [u8; 32])>,
) -> Result<Vec<u8>, FormatError> {
    let mut hashes = String::new();
    let mut list = String::new();
    let mut offset_bytes = 0;
    for (info, hash) in tensors {
        hashes.push_str(&blake3::Hash::from_bytes(hash).to_hex());
        let end = offset_bytes + info.len_bytes;
        let shape = json(&info.shape);
        let (name, dtype) = (json(&info.name), info.dtype);
        list += &format!(r#",{name}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{offset_bytes},{end}]}}"#);
        offset_bytes = end;
    }
    let zeros = "0".repeat(HASH_DIGITS);
    let mut text = format!(
        r#"{MAGIC}{VERSION}{AFTER_VERSION}{zeros}","weights":{},"order":{},"blake3":"{hashes}""#,
        json(&json(weights)),
        json(&json(order)),
    );
    for (key, value) in provenance {
        text += &format!(",{}:{}", json(&format!("{PROVENANCE_PREFIX}{key}")), json(value));
    }
    text += &format!("}}{list}}}");

    let unpadded = LENGTH_BYTES + text.len() as u64;
    let padding = unpadded.next_multiple_of(ALIGNMENT) - unpadded;
    let header_bytes = text.len() as u64 + padding;
    if header_bytes > MAX_HEADER_BYTES {
        let what = "the header".to_owned();
        return Err(FormatError::LimitExceeded { what, value: header_bytes, limit: MAX_HEADER_BYTES });
    }
    text += &" ".repeat(padding as usize);
    let hash = header_hash(header_bytes.to_le_bytes(), text.as_bytes());
    let mut bytes = header_bytes.to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes[HASH_OFFSET..][..HASH_DIGITS].copy_from_slice(hash.to_hex().as_bytes());
    Ok(bytes)
}

fn json<T: Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("strings and numbers have a JSON form")
}

/// Parses the hashes of `n` tensors, one after another in lower-case hexadecimal.
fn parse_hashes(digits: &str, n: usize) -> Result<impl Iterator<Item = [u8; 32]>, FormatError> {
    let bad = |reason| FormatError::Metadata { field: "blake3", reason };
    if Some(digits.len()) != n.checked_mul(HASH_DIGITS) {
        return Err(bad(format!("{} digits for {n} tensors, expected 64 each", digits.len())));
    }
    if let Some(at) = digits.bytes().position(|c| !matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(bad(format!("character {at} is not a lower-case hexadecimal digit")));
    }
    let nibble = |c: u8| if c.is_ascii_digit() { c - b'0' } else { c - b'a' + 10 };
    Ok(digits.as_bytes().chunks_exact(HASH_DIGITS).map(move |d| {
        let mut hash = [0; 32];
        for (h, pair) in hash.iter_mut().zip(d.chunks_exact(2)) {
            *h = nibble(pair[0]) << 4 | nibble(pair[1]);
        }
        hash
    }))
}

fn unknown_dtype(name: &str, found: impl fmt::Display) -> FormatError {
    wrong(name, "dtype", found, "U8, I8, U16, F16, BF16 or F32")
}

/// The same error in the words of this format.
fn header_error(error: safetensors::HeaderError) -> FormatError {
    use safetensors::HeaderError as E;
    match error {
        E::Duplicate { name } => FormatError::Duplicate { name },
        E::Dtype { name, found } => unknown_dtype(&name, found),
        E::Shape { name, shape } => wrong(&name, "shape", format!("{shape:?}"), "addressable"),
        E::Place { name, begin, expected, .. } => wrong(&name, "the first data offset", begin, expected),
        E::Length { name, dtype, .. } if !DTYPES.contains(&dtype) => unknown_dtype(&name, dtype),
        E::Length { name, dtype, shape, begin, end } => match TensorInfo::new(name, dtype, shape) {
            Ok(info) => wrong(&info.name, "the second data offset", end, format!("{begin} + {}", info.len_bytes)),
            Err(error) => error,
        },
        other => FormatError::HeaderJson { reason: other.to_string() },
    }
}
