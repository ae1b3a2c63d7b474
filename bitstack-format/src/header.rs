//! The header as text: constants, reading it from JSON, writing it. What the tensors mean is checked in `read.rs`.

use crate::catalog::check_name;
use crate::tensor::{DTYPES, wrong};
use crate::{BlockKind, FormatError, TensorInfo, WeightInfo};
use bitstack_io::hostile::{printable, read_once};
use bitstack_io::safetensors::{self, LENGTH_BYTES, MAX_HEADER_BYTES};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeStruct as _, Serializer};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

/// The format version this crate writes, and the only one it reads.
pub const VERSION: &str = "1";

/// Data and blocks begin at multiples of this many bytes from the start of the file.
pub const ALIGNMENT: u64 = 64;

/// What every header begins with, up to the version.
pub(crate) const MAGIC: &str = r#"{"__metadata__":{"format":"bitstack","version":""#;

/// What stands between the version and the hash of the header.
pub(crate) const AFTER_VERSION: &str = r#"","header_blake3":""#;

/// Hexadecimal digits of a hash.
pub(crate) const HASH_DIGITS: usize = 64;

/// Where the hash of the header stands, in bytes from the start of the file.
pub(crate) const HASH_OFFSET: usize = LENGTH_BYTES as usize + MAGIC.len() + VERSION.len() + AFTER_VERSION.len();

/// Keys of the metadata that begin with this are the maker's own.
pub(crate) const PROVENANCE_PREFIX: &str = "provenance.";

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
pub(crate) fn header_hash(length: [u8; 8], text: &[u8]) -> blake3::Hash {
    let at = HASH_OFFSET - LENGTH_BYTES as usize;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&length).update(&text[..at]).update(&[b'0'; HASH_DIGITS]).update(&text[at + HASH_DIGITS..]);
    hasher.finalize()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{
        BASE_DTYPES, BASIS, COEFFICIENTS, FACTOR_DTYPES, FILE_PREFIX, MAX_FILE_NAME_BYTES, MAX_NAME_BYTES, PAD_PREFIX,
        SCALE_SUFFIX, SIGNS,
    };
    use bitstack_io::Dtype;
    use bitstack_io::hostile::MAX_DIMS;

    /// The second column of a table of FORMAT.md, found by the first.
    fn documented(row: &str) -> &'static str {
        let document = include_str!("../FORMAT.md");
        let cells = |line: &'static str| line.split('|').map(str::trim).collect::<Vec<_>>();
        let found = document.lines().map(cells).find(|cells| cells.len() > 3 && cells[1] == row);
        found.unwrap_or_else(|| panic!("FORMAT.md has no row {row:?}"))[2].trim_matches('`')
    }

    #[test]
    fn the_constants_of_the_document_are_those_of_the_code() {
        let names = |dtypes: &[Dtype]| dtypes.iter().map(|d| d.name()).collect::<Vec<_>>().join(", ");
        for (row, value) in [
            ("format version", VERSION.to_owned()),
            ("alignment", ALIGNMENT.to_string()),
            ("largest header", MAX_HEADER_BYTES.to_string()),
            ("length of the header's length", LENGTH_BYTES.to_string()),
            ("start of every header", format!("{MAGIC}{VERSION}{AFTER_VERSION}")),
            ("offset of the header's hash", HASH_OFFSET.to_string()),
            ("digits of a hash", HASH_DIGITS.to_string()),
            ("prefix of provenance keys", PROVENANCE_PREFIX.to_owned()),
            ("prefix of companion files", FILE_PREFIX.to_owned()),
            ("prefix of pads", PAD_PREFIX.to_owned()),
            ("longest name", MAX_NAME_BYTES.to_string()),
            ("longest name of a companion file", MAX_FILE_NAME_BYTES.to_string()),
            ("most dimensions", MAX_DIMS.to_string()),
            ("types of unstacked tensors", names(BASE_DTYPES)),
            ("types of factors", names(FACTOR_DTYPES)),
            ("name of the signs", format!("<weight>.block.<i>.{SIGNS}")),
            ("name of the basis", format!("<weight>.block.<i>.{BASIS}")),
            ("name of the coefficients", format!("<weight>.block.<i>.{COEFFICIENTS}")),
            ("suffix of scales", SCALE_SUFFIX.to_owned()),
            ("block kind", BlockKind::Sign.name().to_owned()),
            ("bit order", format!("{:?}", bitstack_pack::BIT_ORDER)),
        ] {
            assert_eq!(documented(row), value, "{row}");
        }
    }
}
