#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod gain;
mod method;
mod order;
mod ragged;
mod random;
mod score;
mod sizes;

pub use error::SortError;
pub use gain::GainPerByte;
pub use method::{Balanced, Greedy, Sorter};
pub use order::{BlockId, LoadOrder, Plan};
pub use random::Random;
pub use score::Scores;
pub use sizes::Sizes;
