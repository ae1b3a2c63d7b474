#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod chat;
mod checkpoint;
pub mod config;
mod elements;
mod error;
mod progress;
pub mod text;
mod tokenizer;

pub use checkpoint::{Checkpoint, CheckpointLimits};
pub use config::{Llama3Scaling, ModelConfig, RopeConfig, VectorSpec, WeightRole, WeightSpec};
pub use elements::{Dense, Elements};
pub use error::ModelError;
pub use progress::{Part, Progress};
pub use tokenizer::{TextStream, Tokenizer};
