//! A tile of W rebuilt in the cache, and its product with many tokens: portable loops, compiled for each instruction set.
//!
//! The product keeps `R` rows of W times `L` tokens in registers, and takes from memory one row of `L` tokens and `R` weights for each
//! column.

use super::scalar;
use crate::Isa;

/// Rows of a tile, a multiple of the rows kept in registers at every instruction set.
pub(crate) const ROWS: usize = 24;

/// Columns of a tile: it takes 24 KiB.
pub(crate) const COLS: usize = 256;

/// Columns rebuilt at once; bases are padded to a multiple of it.
pub(crate) const STRIP: usize = 64;

/// Tokens lie side by side in panels of this many.
pub(crate) const PANEL: usize = 32;

/// Rows of W, `ROWS x COLS`.
pub(crate) type Tile = [[f32; COLS]; ROWS];

/// One plane for some columns of a row: packed signs, `rank` coefficients, and the bases for these columns, `rank` rows `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct PlaneRow<'a> {
    pub(crate) bits: &'a [u8],
    pub(crate) u: &'a [f32],
    pub(crate) u_stride: usize,
    pub(crate) v: &'a [f32],
    pub(crate) v_stride: usize,
    pub(crate) rank: usize,
}

/// `w[c] += ± Σ_k u[k] v[k][c]` for the columns that `plane.bits` has, eight a byte.
pub(crate) fn add_plane(isa: Isa, plane: PlaneRow<'_>, w: &mut [f32; COLS]) {
    assert!(isa.is_available());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => unsafe { add_plane_avx512(plane, w) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Avx2 => unsafe { add_plane_avx2(plane, w) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Neon => unsafe { add_plane_neon(plane, w) },
        _ => add_plane_portable(plane, w),
    }
}

/// 64 columns at a time, in four registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn add_plane_avx512(plane: PlaneRow<'_>, w: &mut [f32; COLS]) {
    use std::arch::x86_64::*;
    for ((i, bytes), w) in plane.bits.chunks(STRIP / 8).enumerate().zip(w.as_chunks_mut::<STRIP>().0) {
        let mut m = [_mm512_setzero_ps(); 4];
        for k in 0..plane.rank {
            let u = _mm512_set1_ps(plane.u[k * plane.u_stride]);
            let v: &[f32; STRIP] = plane.v[k * plane.v_stride + STRIP * i..].first_chunk().expect("padded to strips");
            for (m, v) in m.iter_mut().zip(v.as_chunks::<16>().0) {
                // SAFETY: the pointer must be valid for reading 64 bytes, at any alignment; it comes from a reference to 16 f32.
                *m = _mm512_fmadd_ps(u, unsafe { _mm512_loadu_ps(v.as_ptr()) }, *m);
            }
        }
        let bits = word(bytes);
        for (q, (m, w)) in m.into_iter().zip(w.as_chunks_mut::<16>().0).enumerate() {
            // SAFETY: the pointer must be valid for reading 64 bytes, at any alignment; it comes from a reference to 16 f32.
            let sum = unsafe { _mm512_loadu_ps(w.as_ptr()) };
            let sum = _mm512_mask_add_ps(_mm512_sub_ps(sum, m), (bits >> (16 * q)) as __mmask16, sum, m);
            // SAFETY: the pointer must be valid for writing 64 bytes, at any alignment; it comes from an exclusive reference to 16 f32.
            unsafe { _mm512_storeu_ps(w.as_mut_ptr(), sum) }
        }
    }
}

/// 64 columns at a time, in eight registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn add_plane_avx2(plane: PlaneRow<'_>, w: &mut [f32; COLS]) {
    use std::arch::x86_64::*;
    let bit_of_lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for ((i, bytes), w) in plane.bits.chunks(STRIP / 8).enumerate().zip(w.as_chunks_mut::<STRIP>().0) {
        let mut m = [_mm256_setzero_ps(); 8];
        for k in 0..plane.rank {
            let u = _mm256_set1_ps(plane.u[k * plane.u_stride]);
            let v: &[f32; STRIP] = plane.v[k * plane.v_stride + STRIP * i..].first_chunk().expect("padded to strips");
            for (m, v) in m.iter_mut().zip(v.as_chunks::<8>().0) {
                // SAFETY: the pointer must be valid for reading 32 bytes, at any alignment; it comes from a reference to 8 f32.
                *m = _mm256_fmadd_ps(u, unsafe { _mm256_loadu_ps(v.as_ptr()) }, *m);
            }
        }
        let bytes = word(bytes).to_le_bytes();
        for ((m, w), byte) in m.into_iter().zip(w.as_chunks_mut::<8>().0).zip(bytes) {
            let bits = _mm256_and_si256(_mm256_set1_epi32(i32::from(byte)), bit_of_lane);
            let is_zero = _mm256_cmpeq_epi32(bits, _mm256_setzero_si256());
            let flip = _mm256_castsi256_ps(_mm256_slli_epi32::<31>(is_zero));
            // SAFETY: the pointer must be valid for reading 32 bytes, at any alignment; it comes from a reference to 8 f32.
            let sum = unsafe { _mm256_loadu_ps(w.as_ptr()) };
            let sum = _mm256_add_ps(sum, _mm256_xor_ps(m, flip));
            // SAFETY: the pointer must be valid for writing 32 bytes, at any alignment; it comes from an exclusive reference to 8 f32.
            unsafe { _mm256_storeu_ps(w.as_mut_ptr(), sum) }
        }
    }
}

/// 64 columns at a time, in sixteen registers.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
fn add_plane_neon(plane: PlaneRow<'_>, w: &mut [f32; COLS]) {
    use std::arch::aarch64::*;
    let bit_of_lane: [[u32; 4]; 2] = [[1, 2, 4, 8], [16, 32, 64, 128]];
    for ((i, bytes), w) in plane.bits.chunks(STRIP / 8).enumerate().zip(w.as_chunks_mut::<STRIP>().0) {
        let mut m = [vdupq_n_f32(0.0); 16];
        for k in 0..plane.rank {
            let u = vdupq_n_f32(plane.u[k * plane.u_stride]);
            let v: &[f32; STRIP] = plane.v[k * plane.v_stride + STRIP * i..].first_chunk().expect("padded to strips");
            for (m, v) in m.iter_mut().zip(v.as_chunks::<4>().0) {
                // SAFETY: the pointer must be valid for reading 16 bytes, at any alignment; it comes from a reference to 4 f32.
                *m = vfmaq_f32(*m, u, unsafe { vld1q_f32(v.as_ptr()) });
            }
        }
        let bytes = word(bytes).to_le_bytes();
        for (q, (m, w)) in m.into_iter().zip(w.as_chunks_mut::<4>().0).enumerate() {
            // SAFETY: the pointer must be valid for reading 16 bytes, at any alignment; it comes from a reference to 4 u32.
            let bit_of_lane = unsafe { vld1q_u32(bit_of_lane[q % 2].as_ptr()) };
            let is_one = vtstq_u32(vdupq_n_u32(u32::from(bytes[q / 2])), bit_of_lane);
            // SAFETY: the pointer must be valid for reading 16 bytes, at any alignment; it comes from a reference to 4 f32.
            let sum = unsafe { vld1q_f32(w.as_ptr()) };
            let sum = vaddq_f32(sum, vbslq_f32(is_one, m, vnegq_f32(m)));
            // SAFETY: the pointer must be valid for writing 16 bytes, at any alignment; it comes from an exclusive reference to 4 f32.
            unsafe { vst1q_f32(w.as_mut_ptr(), sum) }
        }
    }
}

fn add_plane_portable(plane: PlaneRow<'_>, w: &mut [f32; COLS]) {
    let mut m = [0.0; COLS];
    let n = 8 * plane.bits.len();
    for k in 0..plane.rank {
        let u = plane.u[k * plane.u_stride];
        for (m, v) in m[..n].iter_mut().zip(&plane.v[k * plane.v_stride..]) {
            *m += u * v;
        }
    }
    for ((&bits, m), w) in plane.bits.iter().zip(m.as_chunks::<8>().0).zip(w.as_chunks_mut::<8>().0) {
        for i in 0..8 {
            w[i] += scalar::flipped(bits, i, m[i]);
        }
    }
}

/// Up to eight bytes, the first lowest.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn word(bytes: &[u8]) -> u64 {
    let mut padded = [0; 8];
    u64::from_le_bytes(*bytes.first_chunk().unwrap_or_else(|| {
        padded[..bytes.len()].copy_from_slice(bytes);
        &padded
    }))
}

/// `y[r][t] += Σ_c w[r][c] x[c][t]` for all rows of a tile, the first `x.len()` columns and one panel of tokens.
pub(crate) fn multiply(isa: Isa, w: &Tile, x: &[[f32; PANEL]], y: &mut [[f32; PANEL]; ROWS]) {
    assert!(isa.is_available() && x.len() <= COLS);
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => unsafe { multiply_avx512(w, x, y) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Avx2 => unsafe { multiply_avx2(w, x, y) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Neon => unsafe { multiply_neon(w, x, y) },
        _ => multiply_portable::<2, 8, false>(w, x, y),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn multiply_avx512(w: &Tile, x: &[[f32; PANEL]], y: &mut [[f32; PANEL]; ROWS]) {
    multiply_portable::<12, 32, true>(w, x, y);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_avx2(w: &Tile, x: &[[f32; PANEL]], y: &mut [[f32; PANEL]; ROWS]) {
    multiply_portable::<6, 16, true>(w, x, y);
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
fn multiply_neon(w: &Tile, x: &[[f32; PANEL]], y: &mut [[f32; PANEL]; ROWS]) {
    multiply_portable::<6, 16, true>(w, x, y);
}

#[inline(always)]
fn multiply_portable<const R: usize, const L: usize, const FMA: bool>(
    w: &Tile,
    x: &[[f32; PANEL]],
    y: &mut [[f32; PANEL]; ROWS],
) {
    for first_t in (0..PANEL).step_by(L) {
        for (w, y) in w.as_chunks::<R>().0.iter().zip(y.as_chunks_mut::<R>().0) {
            let mut sums = [[0.0f32; L]; R];
            for (c, x) in x.iter().enumerate() {
                let x: &[f32; L] = x[first_t..].first_chunk().expect("a panel is whole");
                for r in 0..R {
                    for t in 0..L {
                        let sum = sums[r][t];
                        sums[r][t] = if FMA { w[r][c].mul_add(x[t], sum) } else { w[r][c] * x[t] + sum };
                    }
                }
            }
            for r in 0..R {
                for t in 0..L {
                    y[r][first_t + t] += sums[r][t];
                }
            }
        }
    }
}
