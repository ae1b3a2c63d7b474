#![doc = include_str!("../README.md")]
// Unsafe code lives in `kernel` only: the instructions a CPU may lack, and the loads and stores made with them.
#![deny(unsafe_code)]

mod apply;
mod error;
mod isa;
mod kernel;

pub use apply::{Kernel, Scratch, Threads};
pub use error::CpuError;
pub use isa::Isa;
