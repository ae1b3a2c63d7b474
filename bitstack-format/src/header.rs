//! The header as text: constants, reading it from JSON, writing it. What the tensors mean is checked in `read.rs`.

use crate::catalog::{METADATA_KEY, check_name};
use crate::hostile::{Dims, printable};
use crate::tensor::wrong;
use crate::{BlockKind, Dtype, FormatError, TensorInfo, WeightInfo};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize as DeriveDeserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

/// The format version this crate writes, and the only one it reads.
pub const VERSION: &str = "1";

/// Data and blocks begin at multiples of this many bytes from the start of the file.
pub const ALIGNMENT: u64 = 64;

/// The largest header that safetensors readers accept, in bytes.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the header's length, which the file begins with.
pub(crate) const LENGTH_BYTES: u64 = 8;

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
#[derive(Debug, DeriveDeserialize, Serialize)]
pub(crate) struct WeightRecord<'a> {
    #[serde(borrow)]
    pub(crate) name: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) kind: Cow<'a, str>,
    // Other kinds may have other fields, and an unknown kind is to be reported as such.
    pub(crate) rows: Option<u64>,
    pub(crate) cols: Option<u64>,
    pub(crate) rank: Option<u64>,
    #[serde(borrow)]
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
        let raw: RawHeader<'_> =
            serde_json::from_slice(text).map_err(|e| FormatError::HeaderJson { reason: printable(&e.to_string()) })?;
        let mut metadata = raw.metadata;
        let mut field = |field: &'static str| {
            metadata.remove(field).ok_or(FormatError::Metadata { field, reason: "it is missing".to_owned() })
        };
        let (weights, order, hashes) = (field("weights")?, field("order")?, field("blake3")?);
        let order = serde_json::from_str(&order)
            .map_err(|e| FormatError::Metadata { field: "order", reason: printable(&e.to_string()) })?;
        let mut hashes = parse_hashes(&hashes, raw.tensors.len())?;

        let mut offset_bytes = 0;
        let mut tensors = Vec::with_capacity(raw.tensors.len());
        for (name, raw) in raw.tensors {
            check_name("tensor", &name)?;
            let info = raw.info(name)?;
            let RawTensor { data_offsets: (begin, end), .. } = raw;
            if begin != offset_bytes {
                return Err(wrong(&info.name, "the first data offset", begin, offset_bytes));
            }
            if end.checked_sub(begin) != Some(info.len_bytes) {
                let expected = format!("{begin} + {}", info.len_bytes);
                return Err(wrong(&info.name, "the second data offset", end, expected));
            }
            offset_bytes = end;
            let hash = hashes.next().unwrap_or_default();
            tensors.push(HeaderTensor { info, offset_bytes: begin, hash });
        }
        let provenance = metadata.into_iter().filter_map(|(key, value)| {
            let key = key.strip_prefix(PROVENANCE_PREFIX)?;
            Some((key.to_owned(), value))
        });
        Ok(Self { tensors, weights, order, provenance: provenance.collect() })
    }

    /// The weights, of a kind that is known.
    pub(crate) fn weights(&self) -> Result<Vec<WeightRecord<'_>>, FormatError> {
        let records: Vec<WeightRecord<'_>> = serde_json::from_str(&self.weights)
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

/// The JSON of a header, in its own order, without anything twice.
struct RawHeader<'a> {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor<'a>)>,
}

#[derive(DeriveDeserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Dims,
    data_offsets: (u64, u64),
}

impl RawTensor<'_> {
    fn info(&self, name: String) -> Result<TensorInfo, FormatError> {
        let Some(dtype) = Dtype::from_name(&self.dtype) else {
            return Err(wrong(&name, "dtype", printable(&self.dtype), "U8, I8, U16, F16, BF16 or F32"));
        };
        let Ok(shape) = self.shape.as_slice().iter().map(|&dim| usize::try_from(dim)).collect::<Result<Vec<_>, _>>()
        else {
            return Err(wrong(&name, "shape", format!("{:?}", self.shape.as_slice()), "addressable"));
        };
        TensorInfo::new(name, dtype, shape)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for RawHeader<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a safetensors header")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                if map.next_key::<String>()?.as_deref() != Some(METADATA_KEY) {
                    return Err(A::Error::custom("the first key is not __metadata__"));
                }
                let metadata = map.next_value::<UniqueStrings>()?.0;
                let mut tensors: Vec<(String, RawTensor<'de>)> = Vec::new();
                // Whether a name stands twice is checked where all names are entered in one table.
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        map.next_value::<IgnoredAny>()?;
                        return Err(A::Error::custom("__metadata__ stands twice"));
                    }
                    tensors.push((name, map.next_value()?));
                }
                Ok(RawHeader { metadata, tensors })
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// A map of strings in which no key stands twice.
struct UniqueStrings(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueStrings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringsVisitor;
        impl<'de> Visitor<'de> for StringsVisitor {
            type Value = UniqueStrings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from strings to strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueStrings, A::Error> {
                let mut strings = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if strings.insert(key.clone(), value).is_some() {
                        return Err(A::Error::custom(format_args!("metadata field {key:?} stands twice")));
                    }
                }
                Ok(UniqueStrings(strings))
            }
        }
        deserializer.deserialize_map(StringsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{
        BASE_DTYPES, BASIS, COEFFICIENTS, FACTOR_DTYPES, FILE_PREFIX, MAX_FILE_NAME_BYTES, MAX_NAME_BYTES, PAD_PREFIX,
        SCALE_SUFFIX, SIGNS,
    };
    use crate::hostile::MAX_DIMS;

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
