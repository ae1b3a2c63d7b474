#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod elastic;
mod error;
mod load;
mod policy;
mod resident;
mod snapshot;
mod swap;
mod sync;
mod system;
mod watch;

pub use bitstack_format::Verify;
pub use elastic::{Elastic, Options, Start, Status, load_order};
pub use error::RuntimeError;
pub use policy::Policy;
pub use snapshot::Snapshot;
pub use system::{Reading, Sensors, process_peak_bytes, process_resident_bytes};
pub use watch::Watcher;
