//! The loops, per instruction set, behind one dispatch point.
//!
//! `tables` belongs together with those of the instruction sets: it chooses among them, and they are written in its types.

pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod dense;
pub(crate) mod factors;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod scalar;
pub(crate) mod spikes;
pub(crate) mod tables;
pub(crate) mod tile;

/// A register of a table, aligned for it.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

impl Default for Line {
    fn default() -> Self {
        Self([0; 64])
    }
}
