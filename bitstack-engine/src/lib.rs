#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod decoder;
pub mod device;
mod elastic;
mod error;
pub mod eval;
mod linear;
pub mod math;
mod operator;
pub mod quality;
pub mod sample;
mod sampler;
pub mod stack;
mod stop;

#[cfg(test)]
#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

pub use bitstack_core::Threads;
pub use decoder::{Decoder, Frame, Observer, Pass, Visit, Workspace, check_weight};
pub use device::{KvCache, Weight};
pub use elastic::{ElasticModel, OnToken};
pub use error::EngineError;
pub use linear::Transposed;
pub use operator::Operator;
pub use sampler::SamplingOptions;
