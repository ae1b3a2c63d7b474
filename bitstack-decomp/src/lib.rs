#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod avd;
mod blocks;
mod envelope;
mod error;
mod nested;
mod options;
mod report;
mod scaled;
mod spikes;
mod svd;

pub use bitstack_core::Threads;
pub use blocks::{Blocks, blocks, decompose};
pub use error::DecompError;
pub use nested::feedback_gain;
pub use options::{DecomposeOptions, Method, Nested, Svd};
pub use report::{Decomposition, LevelReport, OutputReport, Step};
