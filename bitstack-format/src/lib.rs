#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod atomic;
mod catalog;
mod directory;
mod draft;
mod error;
mod extent;
mod header;
pub mod hostile;
mod order;
mod read;
mod source;
mod tensor;
mod write;

pub use atomic::{Existing, write_atomically, write_atomically_through};
pub use catalog::{BlockKind, BlockSource, WeightInfo};
pub use directory::write_directory_atomically;
pub use draft::Draft;
pub use error::FormatError;
pub use extent::{BlockExtent, Verify};
pub use header::{ALIGNMENT, MAX_HEADER_BYTES, VERSION};
pub use read::{Damage, Limits, Missing, Report, StackFile};
pub use source::{FileAt, ReadAt, WriteAt};
pub use tensor::{Dtype, Tensor, TensorInfo};
