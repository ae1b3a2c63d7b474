use crate::{Dtype, FormatError};
use std::fmt;

/// The element types of the tensors of a stack.
pub(crate) const DTYPES: &[Dtype] = &[Dtype::U8, Dtype::I8, Dtype::U16, Dtype::F16, Dtype::BF16, Dtype::F32];

/// A tensor: its elements row-major and little-endian, whatever the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The dimensions, slowest first.
    pub shape: Vec<usize>,
    /// The elements' bytes.
    pub data: Vec<u8>,
}

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// The name.
    pub name: String,
    /// The type of the elements.
    pub dtype: Dtype,
    /// The dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Bytes of all elements.
    pub len_bytes: u64,
}

impl TensorInfo {
    /// Checks that the bytes can be counted, and that there are some: the format has no empty tensors.
    pub(crate) fn new(name: String, dtype: Dtype, shape: Vec<usize>) -> Result<Self, FormatError> {
        match dtype.bytes_of(&shape) {
            Some(len_bytes) if len_bytes > 0 => Ok(Self { name, dtype, shape, len_bytes }),
            Some(_) => Err(wrong(&name, "the number of elements", 0, "at least 1")),
            None => Err(wrong(&name, "the number of bytes", format!("{shape:?} x {dtype}"), "a 64-bit number")),
        }
    }
}

/// The error for a property of a tensor that is not what its place demands.
pub(crate) fn wrong(
    name: &str,
    what: &'static str,
    actual: impl fmt::Display,
    expected: impl fmt::Display,
) -> FormatError {
    FormatError::Tensor { name: name.to_owned(), what, actual: actual.to_string(), expected: expected.to_string() }
}
