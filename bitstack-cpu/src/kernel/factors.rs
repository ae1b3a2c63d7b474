//! Factors in f32: portable loops, compiled for each instruction set.

use bitstack_core::{BasisRef, CoefficientsRef, Plane, ValuesRef, f16};

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

/// The coefficients of rows `first_row..`: `out` is `planes x rank x rows`.
pub(crate) fn coefficients(isa: Isa, planes: &[Plane<'_>], first_row: usize, rows: usize, out: &mut [f32]) {
    assert!(isa.is_available());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => unsafe { coefficients_avx512(planes, first_row, rows, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Avx2 => unsafe { coefficients_avx2(planes, first_row, rows, out) },
        _ => coefficients_portable(planes, first_row, rows, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn coefficients_avx512(planes: &[Plane<'_>], first_row: usize, rows: usize, out: &mut [f32]) {
    coefficients_portable(planes, first_row, rows, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn coefficients_avx2(planes: &[Plane<'_>], first_row: usize, rows: usize, out: &mut [f32]) {
    coefficients_portable(planes, first_row, rows, out);
}

#[inline(always)]
fn coefficients_portable(planes: &[Plane<'_>], first_row: usize, rows: usize, out: &mut [f32]) {
    let rank = planes[0].coefficients.rank();
    for (p, out) in planes.iter().zip(out.chunks_exact_mut(rank * rows)) {
        plane_coefficients(p.coefficients, p.plane, first_row, rows, out);
    }
}

/// The first coefficient of each row from `first_row` on, as many as `out` has.
pub(crate) fn first_coefficients(coefficients: CoefficientsRef<'_>, first_row: usize, out: &mut [f32]) {
    plane_coefficients(coefficients, 0, first_row, out.len(), out);
}

/// The coefficients of a plane: `out` is `n x rows`, for the first n of its rank.
#[inline(always)]
fn plane_coefficients(coefficients: CoefficientsRef<'_>, plane: usize, first_row: usize, rows: usize, out: &mut [f32]) {
    let rank = coefficients.rank();
    let stride = coefficients.planes() * rank;
    let first = first_row * stride + plane * rank;
    let scales = match coefficients.values() {
        ValuesRef::F16(values) => return transpose(&values[first..], stride, rows, widened, out),
        ValuesRef::I8 { codes, scales } => {
            transpose(&codes[first..], stride, rows, f32::from, out);
            scales
        }
        ValuesRef::Scales(scales) => {
            let codes = coefficients.first_codes();
            transpose(&codes[first_row * rank..], rank, rows, f32::from, out);
            scales
        }
    };
    for (out, scale) in out.chunks_exact_mut(rows).zip(&scales[plane * rank..]) {
        let scale = scale.to_f32();
        out.iter_mut().for_each(|u| *u *= scale);
    }
}

/// Item `k * rows + r` of `out` is that of item `r * stride + k` of `values`.
#[inline(always)]
fn transpose<T: Copy>(values: &[T], stride: usize, rows: usize, value: impl Fn(T) -> f32, out: &mut [f32]) {
    if out.len() == rows {
        /// With a distance that the compiler knows, it makes vectors of what is so far apart.
        #[inline(always)]
        fn every<const N: usize, T: Copy>(values: &[T], value: impl Fn(T) -> f32, out: &mut [f32]) {
            let Some((last, out)) = out.split_last_mut() else { return };
            for (out, v) in out.iter_mut().zip(values.as_chunks::<N>().0) {
                *out = value(v[0]);
            }
            *last = value(values[N * out.len()]);
        }
        return match stride {
            1 => every::<1, T>(values, value, out),
            2 => every::<2, T>(values, value, out),
            3 => every::<3, T>(values, value, out),
            4 => every::<4, T>(values, value, out),
            6 => every::<6, T>(values, value, out),
            8 => every::<8, T>(values, value, out),
            _ => out.iter_mut().zip(values.iter().step_by(stride)).for_each(|(out, &v)| *out = value(v)),
        };
    }
    // Written one by one so far apart, they would take three times as long.
    const SIDE: usize = 16;
    let mut tile = [[0.0; SIDE]; SIDE];
    for first_r in (0..rows).step_by(SIDE) {
        for (first_k, out) in (0..).step_by(SIDE).zip(out.chunks_mut(SIDE * rows)) {
            let (n_r, n_k) = (SIDE.min(rows - first_r), out.len() / rows);
            for (r, tile) in (first_r..).zip(&mut tile[..n_r]) {
                for (tile, &v) in tile.iter_mut().zip(&values[r * stride + first_k..][..n_k]) {
                    *tile = value(v);
                }
            }
            for (k, out) in out.chunks_exact_mut(rows).enumerate() {
                for (out, tile) in out[first_r..][..n_r].iter_mut().zip(&tile) {
                    *out = tile[k];
                }
            }
        }
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
