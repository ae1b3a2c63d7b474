#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod decoder;
pub mod device;
mod elastic;
mod error;
pub mod eval;
mod linear;
pub mod math;
pub mod quality;
pub mod sample;
pub mod stack;

pub use bitstack_core::Threads;
pub use decoder::{Decoder, Frame, KvCache, Observer, Pass, Transposed, Visit, Workspace, check_weight};
pub use device::Weight;
pub use elastic::{ElasticModel, Operator};
pub use error::EngineError;
pub use sample::SamplingOptions;
