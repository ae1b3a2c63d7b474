//! The loops over one run of values and their bits, per instruction set, behind one dispatch point.
//!
//! A run of `n` values is `n.div_ceil(8)` bytes; value `i` is bit `i % 8` of byte `i / 8`. The callers in `matrix` check
//! all lengths; the kernels restate them with `debug_assert!` and take slices apart only with safe, bounded iterators,
//! so a wrong length would be a wrong result and never an access out of bounds.

use crate::{Isa, LINE_BYTES};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

/// Writes one function per kernel that calls its version for an instruction set.
macro_rules! dispatch {
    ($($(#[$doc:meta])* fn $kernel:ident($bytes:ident: $bytes_ty:ty, $values:ident: $values_ty:ty);)*) => {$(
        $(#[$doc])*
        ///
        /// # Panics
        /// If this CPU does not have `isa`.
        pub(crate) fn $kernel(isa: Isa, $bytes: $bytes_ty, $values: $values_ty) {
            debug_assert_eq!($bytes.len(), crate::row_bytes($values.len()));
            assert!(isa.is_available(), "this CPU has no {isa} instructions");
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the only obligation is `#[target_feature(enable = "avx2")]`; the assertion above holds only if
                // `Isa::detect` has found AVX2 on this CPU.
                Isa::Avx2 => unsafe { avx2::$kernel($bytes, $values) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the only obligation is `#[target_feature(enable = "avx512f")]`; the assertion above holds only
                // if `Isa::detect` has found AVX-512F on this CPU.
                Isa::Avx512 => unsafe { avx512::$kernel($bytes, $values) },
                _ => scalar::$kernel($bytes, $values),
            }
        }
    )*};
}

dispatch! {
    /// Overwrites `bytes` with the signs of `values`: a bit is 1 where `value >= 0.0`. The unused bits are 0.
    fn pack(bytes: &mut [u8], values: &[f32]);

    /// Overwrites `values` with +1.0 where the bit is 1 and -1.0 where it is 0.
    fn unpack(bytes: &[u8], values: &mut [f32]);

    /// Flips the sign bit of each value whose bit is 0.
    fn apply(bytes: &[u8], values: &mut [f32]);
}

/// Gathers lines from 16 rows, each `row_bytes` after the one before: line `i` is bytes `4i..4i + 4` of every row, which are there.
///
/// # Panics
/// If this CPU does not have `isa`.
pub(crate) fn lines(isa: Isa, rows: &[u8], row_bytes: usize, lines: &mut [[u8; LINE_BYTES]]) {
    assert!(isa.is_available(), "this CPU has no {isa} instructions");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is `#[target_feature(enable = "avx512f")]`; the assertion above holds only if `Isa::detect` has
        // found AVX-512F on this CPU.
        Isa::Avx512 => unsafe { avx512::lines(rows, row_bytes, lines) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is `#[target_feature(enable = "avx2")]`; the assertion above holds only if `Isa::detect` has
        // found AVX2 on this CPU.
        Isa::Avx2 => unsafe { avx2::lines(rows, row_bytes, lines) },
        _ => scalar::lines(rows, row_bytes, lines),
    }
}
