#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod elastic;
mod error;
mod load;
mod resident;
mod snapshot;
mod swap;
mod sync;

pub use bitstack_format::Verify;
pub use elastic::{Elastic, Options, Start, Status};
pub use error::RuntimeError;
pub use snapshot::Snapshot;
