//! The header of a safetensors file, read within bounds.
//!
//! The `safetensors` crate reads a header in memory tens of times its size and takes the last of two tensors of one name; this takes a
//! small multiple, and refuses them. Otherwise the rules are the same.

use crate::hostile::{Dims, printable, read_once};
use crate::{Dtype, ReadAt};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;

/// The key of the metadata in a header, and so never a tensor's name.
pub const METADATA_KEY: &str = "__metadata__";

/// The largest header that safetensors readers accept, in bytes.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the header's length, which a file begins with.
pub const LENGTH_BYTES: u64 = 8;

/// The header of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// What the maker says of the file; empty where there is nothing.
    pub metadata: BTreeMap<String, String>,
    /// The tensors, in the order of the text.
    pub tensors: Vec<HeaderTensor>,
}

/// A tensor of a header. Its bytes are as many as shape and type say; where they lie is checked by [`Header::data_bytes`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeaderTensor {
    /// The name: any text.
    pub name: String,
    /// The type of the elements.
    pub dtype: Dtype,
    /// The dimensions, slowest first; at most [`MAX_DIMS`](crate::hostile::MAX_DIMS).
    pub shape: Vec<usize>,
    /// The first byte, from the start of the data.
    pub begin: u64,
    /// The byte after the last, from the start of the data.
    pub end: u64,
}

/// Which rule a header breaks. Names are cut and printable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file could not be read.
    #[error("cannot read the header")]
    Read {
        /// What the system says.
        source: io::Error,
    },
    /// The file ends before the length of its header does.
    #[error("{file_bytes} bytes are too few for a header")]
    NoLength {
        /// Bytes of the file.
        file_bytes: u64,
    },
    /// The file ends before its header does.
    #[error("a header of {header_bytes} bytes in a file of {file_bytes}")]
    Cut {
        /// Bytes that the header should have.
        header_bytes: u64,
        /// Bytes of the file.
        file_bytes: u64,
    },
    /// The header is longer than the reader allows.
    #[error("a header of {header_bytes} bytes; the limit is {limit}")]
    TooLong {
        /// Bytes that the header should have.
        header_bytes: u64,
        /// The bytes allowed.
        limit: u64,
    },
    /// The header is not JSON of the right form.
    #[error("{reason}")]
    Json {
        /// What the parser says.
        reason: String,
    },
    /// Two tensors have one name.
    #[error("tensor {name} stands twice in the header")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// The type of a tensor is none of [`Dtype::ALL`].
    #[error("tensor {name}: there is no type {found}")]
    Dtype {
        /// The name of the tensor.
        name: String,
        /// The type.
        found: String,
    },
    /// A shape is too large for this machine.
    #[error("tensor {name}: shape {shape:?} is not addressable")]
    Shape {
        /// The name of the tensor.
        name: String,
        /// The dimensions.
        shape: Vec<u64>,
    },
    /// The bytes of a tensor are not as many as its shape and its type say.
    #[error("tensor {name}: data_offsets are [{begin}, {end}], but shape {shape:?} of {dtype} is not that long")]
    Length {
        /// The name of the tensor.
        name: String,
        /// The type of the elements.
        dtype: Dtype,
        /// The dimensions.
        shape: Vec<usize>,
        /// The first data offset.
        begin: u64,
        /// The second data offset.
        end: u64,
    },
    /// A tensor does not begin where the one before it ends.
    #[error("tensor {name}: data_offsets are [{begin}, {end}]; the tensor before it ends at {expected}")]
    Place {
        /// The name of the tensor.
        name: String,
        /// The first data offset.
        begin: u64,
        /// The second data offset.
        end: u64,
        /// Where it should begin.
        expected: u64,
    },
    /// There are other bytes of tensors than the header describes.
    #[error("{actual} bytes of tensors, the header says {described}")]
    DataBytes {
        /// Bytes after the header.
        actual: u64,
        /// Bytes that the header describes.
        described: u64,
    },
}

impl Header {
    /// Reads the header of a whole file whose tensors lie one after another without a gap, in any order of the text. They are returned in
    /// the order of the data, with the offset at which the data begins.
    ///
    /// Takes memory for the text, once it is sure that the file has so much and that it is at most `limit_bytes`, and a small multiple of it.
    ///
    /// ```
    /// use bitstack_io::safetensors::Header;
    /// let text = br#"{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
    /// let file = [&(text.len() as u64).to_le_bytes()[..], text, b"hi"].concat();
    /// let (header, data_start) = Header::read(&file, 1000)?;
    /// assert_eq!(&file[data_start as usize..][..header.tensors[0].end as usize], b"hi");
    /// assert!(Header::read(&file[..30], 1000).is_err());
    /// # Ok::<(), bitstack_io::safetensors::HeaderError>(())
    /// ```
    ///
    /// # Errors
    /// [`HeaderError`]: the rule that is broken.
    pub fn read(source: &(impl ReadAt + ?Sized), limit_bytes: u64) -> Result<(Self, u64), HeaderError> {
        let read = |source| HeaderError::Read { source };
        let file_bytes = source.size_bytes().map_err(read)?;
        if file_bytes < LENGTH_BYTES {
            return Err(HeaderError::NoLength { file_bytes });
        }
        let mut length = [0; LENGTH_BYTES as usize];
        source.read_exact_at(&mut length, 0).map_err(read)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > file_bytes - LENGTH_BYTES {
            return Err(HeaderError::Cut { header_bytes, file_bytes });
        }
        if header_bytes > limit_bytes {
            return Err(HeaderError::TooLong { header_bytes, limit: limit_bytes });
        }
        let mut text = vec![0; header_bytes as usize];
        source.read_exact_at(&mut text, LENGTH_BYTES).map_err(read)?;
        let mut header = Self::parse(&text)?;
        drop(text);
        let data_start = LENGTH_BYTES + header_bytes;
        header.tensors.sort_by_key(|tensor| (tensor.begin, tensor.end));
        let (actual, described) = (file_bytes - data_start, header.data_bytes()?);
        if actual != described {
            return Err(HeaderError::DataBytes { actual, described });
        }
        Ok((header, data_start))
    }

    /// Reads the text of a header. Nothing stands twice in it: no tensor, no field, no key of the metadata.
    ///
    /// # Errors
    /// [`HeaderError::Json`], [`HeaderError::Duplicate`], [`HeaderError::Dtype`], [`HeaderError::Shape`], [`HeaderError::Length`].
    pub fn parse(text: &[u8]) -> Result<Self, HeaderError> {
        let raw: Raw =
            serde_json::from_slice(text).map_err(|e| HeaderError::Json { reason: printable(&e.to_string()) })?;
        let mut names = HashSet::with_capacity(raw.tensors.len());
        if let Some((twice, _)) = raw.tensors.iter().find(|(name, _)| !names.insert(name.as_str())) {
            return Err(HeaderError::Duplicate { name: printable(twice) });
        }
        drop(names);
        let mut tensors = Vec::with_capacity(raw.tensors.len());
        for (name, RawTensor { dtype, shape, data_offsets: (begin, end) }) in raw.tensors {
            let dtype = dtype.0.map_err(|found| HeaderError::Dtype { name: printable(&name), found })?;
            let dims = shape.as_slice();
            let Ok(shape) = dims.iter().map(|&dim| usize::try_from(dim)).collect::<Result<Vec<_>, _>>() else {
                return Err(HeaderError::Shape { name: printable(&name), shape: dims.to_vec() });
            };
            let bytes = dtype.bytes_of(&shape);
            if bytes.is_none() || end.checked_sub(begin) != bytes {
                return Err(HeaderError::Length { name: printable(&name), dtype, shape, begin, end });
            }
            tensors.push(HeaderTensor { name, dtype, shape, begin, end });
        }
        Ok(Self { metadata: raw.metadata, tensors })
    }

    /// Where the data ends, once it is sure that the tensors lie one after another in this order, from 0 on and without a gap.
    ///
    /// # Errors
    /// [`HeaderError::Place`].
    pub fn data_bytes(&self) -> Result<u64, HeaderError> {
        self.tensors.iter().try_fold(0, |expected, tensor| {
            let &HeaderTensor { begin, end, .. } = tensor;
            if begin == expected {
                return Ok(end);
            }
            Err(HeaderError::Place { name: printable(&tensor.name), begin, end, expected })
        })
    }
}

/// The JSON of a header, in its own order.
struct Raw {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

struct RawTensor {
    dtype: KnownDtype,
    shape: Dims,
    data_offsets: (u64, u64),
}

/// A type, or the printable name of one that there is not.
struct KnownDtype(Result<Dtype, String>);

impl<'de> Deserialize<'de> for KnownDtype {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameVisitor;
        impl Visitor<'_> for NameVisitor {
            type Value = KnownDtype;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a type")
            }

            fn visit_str<E>(self, name: &str) -> Result<KnownDtype, E> {
                Ok(KnownDtype(Dtype::from_name(name).ok_or_else(|| printable(name))))
            }
        }
        deserializer.deserialize_str(NameVisitor)
    }
}

// By hand, as are all others here: deriving them takes as long to compile as the rest of what this crate depends on.
impl<'de> Deserialize<'de> for RawTensor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const FIELDS: [&str; 3] = ["dtype", "shape", "data_offsets"];
        struct TensorVisitor;
        impl<'de> Visitor<'de> for TensorVisitor {
            type Value = RawTensor;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawTensor, A::Error> {
                let (mut dtype, mut shape, mut data_offsets) = (None, None, None);
                while let Some(field) = map.next_key::<String>()? {
                    match field.as_str() {
                        "dtype" => read_once(&mut dtype, "dtype", &mut map)?,
                        "shape" => read_once(&mut shape, "shape", &mut map)?,
                        "data_offsets" => read_once(&mut data_offsets, "data_offsets", &mut map)?,
                        other => return Err(A::Error::unknown_field(other, &FIELDS)),
                    }
                }
                let missing = A::Error::missing_field;
                Ok(RawTensor {
                    dtype: dtype.ok_or_else(|| missing("dtype"))?,
                    shape: shape.ok_or_else(|| missing("shape"))?,
                    data_offsets: data_offsets.ok_or_else(|| missing("data_offsets"))?,
                })
            }
        }
        deserializer.deserialize_struct("RawTensor", &FIELDS, TensorVisitor)
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RawVisitor;
        impl<'de> Visitor<'de> for RawVisitor {
            type Value = Raw;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a safetensors header")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
                let mut metadata = None;
                let mut tensors: Vec<(String, RawTensor)> = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name != METADATA_KEY {
                        tensors.push((name, map.next_value()?));
                    } else if metadata.is_none() {
                        metadata = Some(map.next_value::<UniqueStrings>()?.0);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                        return Err(A::Error::custom(format_args!("{METADATA_KEY} stands twice")));
                    }
                }
                Ok(Raw { metadata: metadata.unwrap_or_default(), tensors })
            }
        }
        deserializer.deserialize_map(RawVisitor)
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

    #[track_caller]
    fn refused(text: &str, expected: &str) {
        let error = Header::parse(text.as_bytes()).and_then(|header| header.data_bytes()).unwrap_err();
        assert!(error.to_string().contains(expected), "got: {error}\nexpected: {expected}");
    }

    #[test]
    fn what_stands_twice_is_refused() {
        let x = r#""x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
        refused(&format!("{{{x},{x}}}"), "tensor x stands twice");
        refused(r#"{"__metadata__":{},"__metadata__":{}}"#, "__metadata__ stands twice");
        refused(r#"{"__metadata__":{"a":"","a":""}}"#, "\"a\" stands twice");
        refused(r#"{"x":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#, "duplicate field `dtype`");
    }

    #[test]
    fn tensors_are_as_long_as_shape_and_type_say_and_leave_no_gap() {
        let tensor = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        refused(&tensor("F16", "[2]", "[0,2]"), "shape [2] of F16 is not that long");
        refused(&tensor("F4", "[3]", "[0,1]"), "shape [3] of F4 is not that long");
        refused(&tensor("F32", "[4294967296,4294967296]", "[0,0]"), "is not that long");
        refused(&tensor("U8", "[2]", "[3,1]"), "is not that long");
        refused(&tensor("U8", "[2]", "[1,3]"), "the tensor before it ends at 0");
        refused(&tensor("Q4\u{7f}", "[2]", "[0,2]"), "there is no type Q4\u{fffd}");
        refused(&tensor("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]"), "at most 8 dimensions");
    }

    #[test]
    fn tensors_may_stand_in_another_order_than_their_data() {
        let text = r#"{"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
        let file = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &[7; 3]].concat();
        let (header, _) = Header::read(&file, MAX_HEADER_BYTES).unwrap();
        assert_eq!(header.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        let long = [&file[..], b"!"].concat();
        assert!(matches!(
            Header::read(&long, MAX_HEADER_BYTES),
            Err(HeaderError::DataBytes { actual: 4, described: 3 })
        ));
    }
}
