use std::io;

/// Which rule a file breaks. Names are cut and printable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The file could not be read.
    #[error("cannot read the file")]
    Read {
        /// What the system says.
        #[from]
        source: io::Error,
    },
    /// The file does not begin with the letters GGUF.
    #[error("this is no GGUF file: it begins with {found:?}")]
    Magic {
        /// Its first bytes.
        found: Vec<u8>,
    },
    /// A version that is not read here.
    #[error("GGUF version {found}; versions 2 and 3 are read: convert the file with a newer program")]
    Version {
        /// The version.
        found: u32,
    },
    /// The numbers of the file are big-endian.
    #[error("a big-endian GGUF file; only little-endian ones are read")]
    BigEndian,
    /// The file ends inside its header, or claims to have more than it has.
    #[error("{what} needs {needed} bytes, and the file has {left} left: it is cut or damaged")]
    Cut {
        /// What does not fit.
        what: String,
        /// The bytes that it should have at least.
        needed: u64,
        /// The bytes that there are.
        left: u64,
    },
    /// The header is longer than the reader allows.
    #[error("a header of more than {limit} bytes, the limit")]
    TooLong {
        /// The bytes allowed.
        limit: u64,
    },
    /// A text is not UTF-8, or longer than such a text may be.
    #[error("{what} is not a text of at most {limit} bytes in UTF-8")]
    Text {
        /// What should be one.
        what: String,
        /// The most bytes that it may have.
        limit: u64,
    },
    /// A value of the metadata is of a type that there is not.
    #[error("{key} is of type {found}, which is none, or an array of arrays")]
    ValueType {
        /// The key.
        key: String,
        /// The number of the type.
        found: u32,
    },
    /// A key or a tensor is there twice.
    #[error("{name} stands twice in the header")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// The alignment is not one.
    #[error("general.alignment is {found}, expected a power of two from 8 to 65536")]
    Alignment {
        /// What it is.
        found: String,
    },
    /// A tensor is of a type that is not read here.
    #[error("tensor {tensor} is of type {found}; the types that are read are {supported}")]
    TensorType {
        /// The tensor.
        tensor: String,
        /// The name of the type, or its number.
        found: String,
        /// The names of those that are.
        supported: String,
    },
    /// A tensor's shape is not one.
    #[error("tensor {tensor} has shape {shape:?} of {kind}: {rule}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its dimensions, slowest first.
        shape: Vec<u64>,
        /// The name of its type.
        kind: &'static str,
        /// The rule.
        rule: &'static str,
    },
    /// A tensor does not lie where one may.
    #[error("tensor {tensor}: {len} bytes at offset {offset} of the data, of which there are {data}: {rule}")]
    Place {
        /// The tensor.
        tensor: String,
        /// Its bytes.
        len: u64,
        /// Where it begins, from the start of the data.
        offset: u64,
        /// The bytes of all data.
        data: u64,
        /// The rule.
        rule: &'static str,
    },
    /// Bytes and numbers that do not belong together.
    #[error("{bytes} bytes of {kind} are not {elements} elements")]
    Length {
        /// The name of the type.
        kind: &'static str,
        /// The bytes.
        bytes: usize,
        /// The room for elements.
        elements: usize,
    },
}
