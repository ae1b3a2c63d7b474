#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod catalog;
mod draft;
mod error;
mod extent;
mod header;
mod order;
mod read;
mod tensor;
mod write;

pub use bitstack_io::{Dtype, ReadAt, WriteAt};
pub use catalog::{BlockKind, BlockSource, WeightInfo};
pub use draft::Draft;
pub use error::FormatError;
pub use extent::{BlockExtent, Verify};
pub use header::{ALIGNMENT, VERSION};
pub use read::{Damage, Limits, Missing, Report, StackFile};
pub use tensor::{Tensor, TensorInfo};
