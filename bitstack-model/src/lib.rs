#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod checkpoint;
pub mod config;
mod elements;
mod error;
mod files;
mod gguf;
mod progress;
mod recognize;
mod sentencepiece;
pub mod text;
mod tokenizer;

pub use checkpoint::{Checkpoint, CheckpointLimits};
pub use config::{Llama3Scaling, ModelConfig, RopeConfig, VectorSpec, WeightRole, WeightSpec};
pub use elements::{Dense, Elements};
pub use error::ModelError;
pub use progress::{Part, Progress};
pub use recognize::recognize;
pub use tokenizer::{TextStream, Tokenizer};
