use crate::FormatError;
use std::fmt;

/// The element types of the tensors of a stack, by their safetensors names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// Unsigned bytes: packed signs, companion files, pads.
    U8,
    /// Signed bytes: the codes of a factor.
    I8,
    /// Unsigned 16-bit words: a list of spikes.
    U16,
    /// IEEE half precision.
    F16,
    /// Brain float: the upper half of an `F32`.
    BF16,
    /// IEEE single precision.
    F32,
}

impl Dtype {
    /// Every type, for lookups.
    pub const ALL: [Self; 6] = [Self::U8, Self::I8, Self::U16, Self::F16, Self::BF16, Self::F32];

    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F32 => "F32",
        }
    }

    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

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
        let product = shape.iter().try_fold(dtype.bytes(), |n, &dim| n.checked_mul(dim as u64));
        match product {
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
