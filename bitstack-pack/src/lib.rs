#![doc = include_str!("../README.md")]
// Unsafe code lives in `kernel` only: the instructions a CPU may lack, and the loads and stores made with them.
#![deny(unsafe_code)]

mod error;
mod isa;
#[cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "vector loads and stores, and calls that need instructions found at run time")
)]
mod kernel;
mod layout;
mod matrix;
mod reference;

pub use error::PackError;
pub use isa::Isa;
pub use layout::{BIT_ORDER, BitOrder, LINE_BYTES, STRIP_ROWS, SignLayout, packed_len, row_bytes};
pub use matrix::{SignMatrix, SignView, pack_into, to_strips};

#[doc(hidden)]
pub use matrix::{pack_into_at, to_strips_at};
