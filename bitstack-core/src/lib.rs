#![doc = include_str!("../README.md")]
//!
//! # The vocabulary
//!
//! A weight W is a `rows x cols` matrix (output x input features), stored as a stack of blocks 1..B. Block `i` holds
//! - a **sign plane** Sᵢ, `rows x cols`, one bit per weight ([`SignMatrix`]);
//! - optionally a **basis** Vᵢ, `rank x cols` ([`Basis`]); absent means the basis of the last block that has one;
//! - **coefficients** U, `rows x planes x rank` ([`Coefficients`]).
//!
//! Block 1 may also bring **spikes**, a sparse P of the few weights far outside the others' magnitudes ([`Spikes`]).
//!
//! With `b` blocks resident the weight is at **level** `b`:
//!
//! ```text
//! W_b = P + Σ_{i<=b} S_i ⊙ ( U_i^(b) · V_i )        U_i^(b): rows x rank
//! ```
//!
//! - *additive* blocks (arXiv 2410.23918, section 3.1) bring the coefficients of their own plane only, `planes = 1`, once and for all;
//! - *refitted* blocks bring new coefficients for all planes up to their own, `planes = i`, which replace the earlier ones.
//!
//! Coefficients may also be only *scales* ([`FactorType::Scales`]), one for each plane and rank: then they are multiples of the codes of
//! block 1, which say how large each row is.
//!
//! A stack may mix both: at level `b` plane `i` takes its coefficients from the last block `j` in `i..=b` that brings some for it.
//! Any prefix of a stack is a complete, usable weight, and going up or down one level touches only one block.
//!
//! # What is not here
//! No file access (`bitstack-format`), no decomposition (`bitstack-decomp`), no fast kernels: [`Level`] is the plain arithmetic that those
//! are checked against.
#![forbid(unsafe_code)]

mod block;
mod error;
mod layout;
mod level;
#[cfg(feature = "ndarray")]
mod scale;
mod shape;
mod spikes;
mod stack;
#[cfg(feature = "ndarray")]
mod stats;
mod threads;

pub use bitstack_pack::{SignLayout, SignMatrix, SignView, to_strips};
pub use block::{Basis, BasisRef, Block, BlockRef, Coefficients, CoefficientsRef, Values, ValuesRef};
pub use error::CoreError;
pub use half::f16;
pub use layout::{BlockLayout, FactorType};
pub use level::{Level, LevelSpikes, Plane};
#[cfg(feature = "ndarray")]
pub use scale::Scales;
pub use shape::Shape;
pub use spikes::{SPIKE_ROWS, SPIKE_SIZES, Spike, Spikes, SpikesRef};
pub use stack::WeightStack;
#[cfg(feature = "ndarray")]
pub use stats::{ActivationStats, Collect};
pub use threads::Threads;
