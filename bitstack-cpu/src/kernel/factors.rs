//! Factors in f32: portable loops, compiled for each instruction set.

use bitstack_core::{BasisRef, ValuesRef, f16};

use crate::Isa;

/// Row `k` of a basis times a token: `z[c] = V[k, c] x[c]`. The three have the same number of columns.
pub(crate) fn products(isa: Isa, basis: BasisRef<'_>, k: usize, x: &[f32], z: &mut [f32]) {
    assert!(isa.is_available() && x.len() == basis.cols() && z.len() == basis.cols());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => unsafe { products_avx512(basis, k, x, z) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Avx2 => unsafe { products_avx2(basis, k, x, z) },
        // NEON is there wherever the portable code is compiled for 64-bit ARM.
        _ => products_portable(basis, k, x, z),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn products_avx512(basis: BasisRef<'_>, k: usize, x: &[f32], z: &mut [f32]) {
    products_portable(basis, k, x, z);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn products_avx2(basis: BasisRef<'_>, k: usize, x: &[f32], z: &mut [f32]) {
    products_portable(basis, k, x, z);
}

#[inline(always)]
fn products_portable(basis: BasisRef<'_>, k: usize, x: &[f32], z: &mut [f32]) {
    let row = k * basis.cols()..(k + 1) * basis.cols();
    match basis.values() {
        ValuesRef::F16(values) => {
            for ((z, v), x) in z.iter_mut().zip(&values[row]).zip(x) {
                *z = widened(*v) * x;
            }
        }
        ValuesRef::I8 { codes, scales } => {
            let scale = scales[k].to_f32();
            for ((z, &v), x) in z.iter_mut().zip(&codes[row]).zip(x) {
                *z = f32::from(v) * scale * x;
            }
        }
        ValuesRef::Scales(_) => unreachable!("a basis has values of its own"),
    }
}

/// The value of a finite f16. Plain arithmetic, which compilers turn into vectors.
#[inline(always)]
pub(crate) fn widened(half: f16) -> f32 {
    let half = half.to_bits();
    // The exponent's bias is 112 less; subnormals come out right too, as the product is exact.
    let magnitude = f32::from_bits(u32::from(half & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | u32::from(half & 0x8000) << 16)
}
