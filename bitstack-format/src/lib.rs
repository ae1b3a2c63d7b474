#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod arrange;
mod catalog;
mod constants;
mod draft;
mod error;
mod extent;
mod header;
mod limits;
mod order;
mod read;
mod tensor;
mod verify;
mod write;

pub use bitstack_io::{Dtype, ReadAt, WriteAt};
pub use catalog::{BlockKind, BlockSource, WeightInfo};
pub use constants::{ALIGNMENT, VERSION};
pub use draft::Draft;
pub use error::FormatError;
pub use extent::{BlockExtent, Verify};
pub use limits::Limits;
pub use read::{Missing, StackFile};
pub use tensor::{Tensor, TensorInfo};
pub use verify::{Damage, Report};
