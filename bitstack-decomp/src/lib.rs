#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod avd;
mod error;
mod nested;
mod options;
mod report;
mod svd;

pub use avd::{Blocks, blocks, decompose};
pub use error::DecompError;
pub use options::{DecomposeOptions, Parallelism, Svd};
pub use report::{Decomposition, LevelError, OutputError, Step};
#[doc(hidden)]
pub use nested::{Nested, NestedError, NestedStep, nested_blocks};
