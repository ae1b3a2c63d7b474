#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod decode;
pub mod decompose;
pub mod kernels;
pub mod load;
mod machine;
mod random;
mod statistics;
pub mod synthetic;

pub use machine::machine;
