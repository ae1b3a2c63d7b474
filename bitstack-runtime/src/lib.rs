#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod elastic;
mod error;
mod host;
mod load;
mod memory;
mod policy;
mod resident;
mod snapshot;
mod swap;
mod sync;
mod system;
mod table;
mod watch;

pub use bitstack_format::Verify;
pub use elastic::{Elastic, Options, Start, Status};
pub use error::RuntimeError;
pub use host::{HostMemory, HostRun};
pub use memory::{FillError, Memory};
pub use policy::Policy;
pub use snapshot::{ResidentBlock, Snapshot};
pub use system::{Reading, Sensors, process_peak_bytes, process_resident_bytes};
pub use watch::Watcher;
