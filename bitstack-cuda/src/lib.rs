#![doc = include_str!("../README.md")]
// Unsafe code lives in `driver` only.
#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "launches, foreign libraries, and device memory without types")]
mod driver;
mod error;
mod layout;
mod module;
mod plan;
#[cfg(test)]
mod shim;
mod stack;

pub use cudarc;
#[cfg(feature = "cublas")]
pub use driver::CublasProduct;
pub use driver::{Element, Half, Workspace, download, upload, zeros};
pub use error::CudaError;
pub use module::{Kernels, Origin, context};
pub use stack::{Bases, DeviceStack};
