#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod elastic;
mod error;
mod load;
pub mod measure;
mod resident;
mod snapshot;
mod swap;
mod sync;
mod system;

pub use bitstack_format::Verify;
pub use elastic::{Elastic, Options, Start, Status, load_order};
pub use error::RuntimeError;
pub use snapshot::Snapshot;
pub use system::process_resident_bytes;
