use bitstack_core::CoreError;
use bitstack_io::FileError;
use std::fmt;
use std::io;
use std::path::PathBuf;

/// What can be wrong with a file, with what a caller wants to write, or with the storage below.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    // ---- the file is bad
    /// The bytes are not those of a stack.
    #[error("not a .bitstack file: it begins with {found}")]
    NotBitstack {
        /// The first bytes, printable.
        found: String,
    },
    /// A version this reader does not know.
    #[error("format version {found:?}; this program reads version {supported:?}", supported = crate::VERSION)]
    Version {
        /// The version of the file.
        found: String,
    },
    /// The file ends before its header does.
    #[error("the header is incomplete: it needs {needed} bytes, the file has {have}; fetch more of the file")]
    HeaderCut {
        /// Bytes up to the end of the header, or of its length field when that is incomplete too.
        needed: u64,
        /// Bytes of the file.
        have: u64,
    },
    /// The file ends before the smallest model (the unstacked part and block 1 of every weight) is complete.
    #[error(
        "the smallest model needs {needed} bytes, the file has {have}: {first_missing} is missing; fetch more of the file"
    )]
    CutTooShort {
        /// Bytes up to the end of the smallest model.
        needed: u64,
        /// Bytes of the file.
        have: u64,
        /// The first tensor that is not whole.
        first_missing: String,
    },
    /// There are bytes after the last tensor.
    #[error("the file has {actual} bytes, its header describes {expected}")]
    TrailingBytes {
        /// Bytes the header describes.
        expected: u64,
        /// Bytes of the file.
        actual: u64,
    },
    /// A number is above what [`crate::Limits`] or the format allows.
    #[error("{what} is {value} bytes; the limit is {limit}")]
    LimitExceeded {
        /// What is too large.
        what: String,
        /// Its bytes.
        value: u64,
        /// The bytes allowed.
        limit: u64,
    },
    /// The header's length does not put the data on an aligned offset.
    #[error("a header of {header_bytes} bytes: with the 8 before it that must be a multiple of {alignment}", alignment = crate::ALIGNMENT)]
    HeaderLength {
        /// The length claimed.
        header_bytes: u64,
    },
    /// The header's bytes are not those that were written.
    #[error("the header is damaged: its bytes do not have the BLAKE3 hash that it states")]
    HeaderDamaged,
    /// The header is not JSON of the right form.
    #[error("the header is malformed: {reason}")]
    HeaderJson {
        /// What the parser says.
        reason: String,
    },
    /// A field of the metadata is missing or wrong.
    #[error("metadata field {field:?}: {reason}")]
    Metadata {
        /// The field.
        field: &'static str,
        /// What is wrong, with the values.
        reason: String,
    },
    /// A kind of block that this reader does not know.
    #[error("weight {weight} is stored in blocks of kind {kind:?}; this program knows \"sign\"")]
    UnknownKind {
        /// The name of the weight.
        weight: String,
        /// The kind.
        kind: String,
    },
    /// A property of a tensor is not what its place demands.
    #[error("tensor {name}: {what} is {actual}, expected {expected}")]
    Tensor {
        /// The name of the tensor.
        name: String,
        /// The property.
        what: &'static str,
        /// Its value.
        actual: String,
        /// The value demanded.
        expected: String,
    },
    /// Another tensor stands in a tensor's place, or none.
    #[error("expected tensor {expected}, found {found}")]
    UnexpectedTensor {
        /// The name demanded.
        expected: String,
        /// The name there.
        found: String,
    },
    /// The bytes of a tensor are not those that were written.
    #[error("tensor {name} is damaged: its bytes do not have the BLAKE3 hash that the header states")]
    Damaged {
        /// The name of the tensor.
        name: String,
    },
    /// The tensor is in the part of the file that is not there.
    #[error("tensor {name} is missing: the file is cut before its end")]
    Missing {
        /// The name of the tensor.
        name: String,
    },
    /// The parts of a block are whole but are not a valid block.
    #[error("block {block} of weight {weight}")]
    Block {
        /// The name of the weight.
        weight: String,
        /// The number of the block, from 1.
        block: usize,
        /// What is wrong.
        source: CoreError,
    },

    // ---- the caller asks for something wrong
    /// No tensor or companion file has this name.
    #[error("there is no {what} named {name}")]
    NoSuch {
        /// `tensor` or `file`.
        what: &'static str,
        /// The name asked for.
        name: String,
    },
    /// There is no such weight.
    #[error("weight {weight} of {n_weights}")]
    NoSuchWeight {
        /// The index asked for, from 0.
        weight: usize,
        /// The weights there are.
        n_weights: usize,
    },
    /// There is no such block.
    #[error("block {block} of weight {weight}, which has {n_blocks}")]
    NoSuchBlock {
        /// The name of the weight.
        weight: String,
        /// The number asked for, from 1.
        block: usize,
        /// The blocks there are.
        n_blocks: usize,
    },
    /// A name that the format does not allow.
    #[error("{name:?} cannot be the name of a {what}: {reason}")]
    Name {
        /// `tensor`, `weight`, `file`, ...
        what: &'static str,
        /// The name.
        name: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// Two things have the same name.
    #[error("the name {name} is taken twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A load order that is none.
    #[error("load order, position {position}: {reason}")]
    Order {
        /// The first position that is wrong, from 0.
        position: usize,
        /// The rule it breaks, with the values.
        reason: String,
    },
    /// The output exists and was not to be replaced.
    #[error("{} exists already", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },

    // ---- the storage fails
    /// A positioned read failed.
    #[error("cannot read {what}")]
    Read {
        /// What was read: a tensor, the header, ...
        what: String,
        /// What the system says.
        source: io::Error,
    },
    /// A write failed. Within [`bitstack_io::write_atomically`] this becomes [`FormatError::File`], which names the path.
    #[error("cannot write")]
    Write {
        /// What the system says.
        #[from]
        source: io::Error,
    },
    /// An operation on a file failed.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// `open`, `create`, `write`, `sync`, `rename`, ...
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// An error about the contents of a file, with its path.
    #[error("{}", path.display())]
    At {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<FormatError>,
    },
    /// Memory for a tensor could not be had.
    #[error("no memory for the {bytes} bytes of {what}")]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// The bytes asked for.
        bytes: u64,
    },
}

impl From<FileError> for FormatError {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Exists { path } => Self::Exists { path },
            FileError::Failed { operation, path, source } => Self::File { operation, path, source },
            FileError::Write { source } => Self::Write { source },
            other => Self::Write { source: io::Error::other(other) },
        }
    }
}

impl FormatError {
    /// A failed read, with the place of the thing that was read; other errors as they are.
    pub(crate) fn of(self, place: fmt::Arguments<'_>) -> Self {
        match self {
            Self::Read { what, source } => Self::Read { what: format!("{what} of {place}"), source },
            other => other,
        }
    }
}
