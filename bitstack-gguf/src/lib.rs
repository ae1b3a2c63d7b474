#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod blocks;
mod error;
mod header;
mod reader;
mod value;

pub use blocks::BlockType;
pub use error::GgufError;
pub use header::{Gguf, Limits, MAGIC, TensorInfo};
pub use value::{Number, Numbers, Strings, Value};
