#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod blocks;
mod calibrate;
mod compress;
mod error;
mod importance;
mod job;
mod journal;
mod options;
mod order;
mod own_text;
mod plan;
mod quality;
mod stream;
mod units;
mod vocabulary;
mod windows;

#[cfg(test)]
#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

pub use compress::{Compressed, Making, compress};
pub use error::CompressError;
pub use job::{Executor, Job, Pool};
pub use journal::Journal;
pub use options::{BlockMethod, CompressOptions, OrderBy, Scaling, default_rank};
pub use order::block_perplexities;
pub use units::{StoredUnit, UnitDirectory, UnitStore};
