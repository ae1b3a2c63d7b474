#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod account;
pub mod chat;
mod checkpoint;
pub mod config;
mod elements;
mod error;
mod files;
mod gguf;
mod progress;
mod recognize;
mod sentencepiece;
mod stream;
pub mod text;
mod tokenizer;

pub use checkpoint::{Checkpoint, CheckpointLimits};
pub use config::{ModelConfig, RopeConfig, VectorSpec, WeightRole, WeightSpec};
pub use elements::{Dense, Elements};
pub use error::ModelError;
pub use progress::{Part, Progress};
pub use recognize::recognize;
pub use stream::TextStream;
pub use tokenizer::Tokenizer;
