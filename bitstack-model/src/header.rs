//! The header of a safetensors file, read within bounds.
//!
//! The format's own crate reads a header in memory tens of times its size and takes the last of two tensors of one name; this takes a small multiple,
//! and refuses them. Otherwise the rules are the same: tensors one after another without a gap, as long as shape and type say.

use bitstack_format::hostile::{Dims, printable};
use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::HashSet;
use std::fmt;

/// A tensor of a header.
#[derive(Debug)]
pub(crate) struct HeaderTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// From the start of the data.
    pub(crate) begin: u64,
}

/// Reads the text of a header that `data_bytes` bytes of tensors follow. An error says which rule it breaks.
pub(crate) fn parse(text: &[u8], data_bytes: u64) -> Result<Vec<HeaderTensor>, String> {
    let mut raw = serde_json::from_slice::<Raw>(text).map_err(|e| printable(&e.to_string()))?.0;
    let mut names = HashSet::with_capacity(raw.len());
    if let Some((twice, _)) = raw.iter().find(|(name, _)| !names.insert(name.as_str())) {
        return Err(format!("tensor {} stands twice in the header", printable(twice)));
    }
    drop(names);
    raw.sort_by_key(|(_, tensor)| tensor.data_offsets);
    let mut tensors = Vec::with_capacity(raw.len());
    let mut expected = 0;
    for (name, RawTensor { dtype, shape, data_offsets: (begin, end) }) in raw {
        let dims = shape.as_slice();
        let wrong = |what: &str| Err(format!("tensor {}: {what}", printable(&name)));
        if begin != expected || end < begin {
            return wrong(&format!("data_offsets are [{begin}, {end}]; the tensor before it ends at {expected}"));
        }
        let bits = dims.iter().try_fold(dtype.bitsize() as u64, |n, &dim| n.checked_mul(dim));
        let len = bits.filter(|bits| bits % 8 == 0).map(|bits| bits / 8);
        if len != Some(end - begin) {
            return wrong(&format!(
                "data_offsets are [{begin}, {end}], but shape {dims:?} of {dtype} is not that long"
            ));
        }
        let Ok(shape) = dims.iter().map(|&dim| usize::try_from(dim)).collect() else {
            return wrong(&format!("shape {dims:?} is not addressable"));
        };
        expected = end;
        tensors.push(HeaderTensor { name, dtype, shape, begin });
    }
    if expected != data_bytes {
        return Err(format!("{data_bytes} bytes of tensors, the header says {expected}"));
    }
    Ok(tensors)
}

/// Names and tensors in the order of the text.
struct Raw(Vec<(String, RawTensor)>);

#[derive(serde::Deserialize)]
struct RawTensor {
    dtype: Dtype,
    shape: Dims,
    data_offsets: (u64, u64),
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
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(Raw(tensors))
            }
        }
        deserializer.deserialize_map(RawVisitor)
    }
}
