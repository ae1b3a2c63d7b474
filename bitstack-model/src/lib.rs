#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod checkpoint;
mod config;
mod elements;
mod error;
mod header;
mod progress;
pub mod text;
mod tokenizer;

pub use checkpoint::{Checkpoint, CheckpointLimits};
pub use config::{
    Architecture, Biases, Llama3Scaling, ModelConfig, RopeConfig, VectorSpec, WEIGHTS_PER_LAYER, WeightRole, WeightSpec,
};
pub use elements::{Dense, Elements};
pub use error::ModelError;
pub use progress::{Part, Progress};
pub use tokenizer::{TextStream, Tokenizer};
