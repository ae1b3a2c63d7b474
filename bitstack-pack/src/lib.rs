//! Matrices of signs as packed bits.

mod error;
mod matrix;

pub use error::PackError;
pub use matrix::{BIT_ORDER, BitOrder, SignMatrix, SignView, packed_len, row_bytes};
