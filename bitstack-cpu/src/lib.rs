#![doc = include_str!("../README.md")]
// Unsafe code lives in `kernel` only: the instructions a CPU may lack, and the loads and stores made with them.
#![deny(unsafe_code)]

mod apply;
mod dense;
mod error;
mod isa;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "the portable loops need less"))]
#[allow(unsafe_code, reason = "vector loads and stores, and calls that need instructions found at run time")]
mod kernel;

pub use apply::{Kernel, Scratch};
pub use bitstack_core::Threads;
pub use error::CpuError;
pub use isa::Isa;
pub use kernel::dense::DenseValues;
