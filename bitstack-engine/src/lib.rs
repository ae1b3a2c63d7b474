#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod decoder;
mod elastic;
mod error;
pub mod eval;
mod linear;
pub mod math;
pub mod measure;
pub mod quality;
pub mod sample;
pub mod stack;
pub mod synthetic;

pub use decoder::{Decoder, Frame, KvCache, Observer, Pass, Transposed, Visit, check_operator};
pub use elastic::{ElasticModel, Operator};
pub use error::EngineError;
pub use linear::{LinearOp, Threads, apply_by_panels};
pub use sample::SamplingOptions;
