#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod calibrate;
mod checkpoint;
mod compress;
mod config;
mod decoder;
mod elastic;
mod error;
pub mod eval;
mod export;
mod header;
mod importance;
mod journal;
mod linear;
mod math;
pub mod measure;
mod order;
mod progress;
pub mod quality;
mod reference;
pub mod sample;
pub mod stack;
mod stream;
pub mod synthetic;
pub mod text;
mod tokenizer;
mod vocabulary;

pub use checkpoint::{Checkpoint, CheckpointLimits};
pub use compress::{BlockMethod, CompressOptions, Compressed, Ordering, Scaling, compress, default_rank};
pub use config::{Architecture, Biases, Llama3Scaling, ModelConfig, RopeConfig, VectorSpec, WeightRole, WeightSpec};
pub use decoder::{Decoder, Frame, KvCache, Observer, Pass};
pub use elastic::{ElasticModel, Operator};
pub use error::LlmError;
pub use export::{ExportOptions, FloatType, export_dense, export_reference};
pub use journal::Journal;
pub use linear::{Dense, Elements, LinearOp, Threads, apply_by_panels};
pub use order::block_perplexities;
pub use progress::{Part, Progress};
pub use reference::import;
pub use sample::SamplingOptions;
pub use tokenizer::{TextStream, Tokenizer};
