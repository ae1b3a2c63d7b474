#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod elastic;
mod error;
mod load;
pub mod measure;
mod policy;
mod resident;
mod snapshot;
mod swap;
mod sync;
mod system;
mod watch;

pub use bitstack_format::Verify;
pub use elastic::{Elastic, Options, Start, Status};
pub use error::RuntimeError;
pub use policy::Policy;
pub use snapshot::Snapshot;
pub use system::{Reading, Sensors, process_resident_bytes};
pub use watch::Watcher;
