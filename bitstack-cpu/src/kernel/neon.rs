//! NEON: bits spread to bytes 0 and -1, multiplied with 16-bit codes of z in two halves.
//!
//! The codes are those of AVX2: a run is 32 bytes of a row, 256 columns, here in two registers, and the bit of column 8i + j is compared out of byte
//! i by `cmtst`, which gives -1 where it is set. Then
//!
//! - with dotprod, `sdot` multiplies by the codes' high and low bytes (256 · high + low, both signed) and adds fours in 32 bits: three
//!   instructions for 16 columns of a row;
//! - without, the bytes are masked and `sadalp` adds pairs in 16 bits, which hold the sums of fifteen runs: five instructions.
//!
//! Four bytes next to each other end in one lane either way, the lane that has a scale of its own. The signs are not prefetched: they are read
//! in the order of memory, which the CPU foresees.

use std::arch::{aarch64::*, asm};

use super::codes::{ROWS, Run};

/// Runs whose sums fit in 16 bits: 15 · 8 · 2 · 128 < 2^15.
const RUNS: usize = 15;

/// Σ bit · code in each lane, of rows of `n` bytes each, for all of them together.
#[target_feature(enable = "neon")]
pub(super) fn sums(rows: [&[u8]; ROWS], runs: &[Run]) -> [[i32; 8]; ROWS] {
    let mut totals = [[vdupq_n_s32(0); 2]; ROWS];
    for (block, runs) in runs.chunks(RUNS).enumerate() {
        let mut high = [[vdupq_n_s16(0); 2]; ROWS];
        let mut low = [[vdupq_n_s16(0); 2]; ROWS];
        for (i, run) in runs.iter().enumerate() {
            let bits = load_bits(rows, 32 * (block * RUNS + i));
            for j in 0..8 {
                let bit = vdupq_n_u8(1 << j);
                let (high_codes, low_codes) = (load(&run.high[j]), load(&run.low[j]));
                for r in 0..ROWS {
                    for half in 0..2 {
                        let set = vreinterpretq_s8_u8(vtstq_u8(bits[r][half], bit));
                        high[r][half] = vpadalq_s8(high[r][half], vandq_s8(set, high_codes[half]));
                        low[r][half] = vpadalq_s8(low[r][half], vandq_s8(set, low_codes[half]));
                    }
                }
            }
        }
        for r in 0..ROWS {
            for half in 0..2 {
                let high = vshlq_n_s32::<8>(vpaddlq_s16(high[r][half]));
                let sums = vpadalq_s16(high, low[r][half]);
                totals[r][half] = vaddq_s32(totals[r][half], sums);
            }
        }
    }
    let mut sums = [[0; 8]; ROWS];
    for r in 0..ROWS {
        sums[r] = lanes(totals[r]);
    }
    sums
}

/// As [`sums`].
#[target_feature(enable = "neon,dotprod")]
pub(super) fn sums_dotprod(rows: [&[u8]; ROWS], runs: &[Run]) -> [[i32; 8]; ROWS] {
    let mut high = [[vdupq_n_s32(0); 2]; ROWS];
    let mut low = [[vdupq_n_s32(0); 2]; ROWS];
    for (i, run) in runs.iter().enumerate() {
        let bits = load_bits(rows, 32 * i);
        for j in 0..8 {
            let bit = vdupq_n_u8(1 << j);
            let (high_codes, low_codes) = (load(&run.high[j]), load(&run.low[j]));
            for r in 0..ROWS {
                for half in 0..2 {
                    let set = vreinterpretq_s8_u8(vtstq_u8(bits[r][half], bit));
                    high[r][half] = dot(high[r][half], set, high_codes[half]);
                    low[r][half] = dot(low[r][half], set, low_codes[half]);
                }
            }
        }
    }
    let mut sums = [[0; 8]; ROWS];
    for r in 0..ROWS {
        let mut totals = [vdupq_n_s32(0); 2];
        for half in 0..2 {
            // Bits counted -1.
            totals[half] = vnegq_s32(vaddq_s32(vshlq_n_s32::<8>(high[r][half]), low[r][half]));
        }
        sums[r] = lanes(totals);
    }
    sums
}

/// `sums` plus, in each lane, the products of its four bytes. The intrinsic is not yet stable.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction must be one the CPU has, as the target features say; it reads and writes these registers and nothing else.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inlateout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// 32 bytes of each row from byte `first` on, or as many as there are and zeros.
#[target_feature(enable = "neon")]
#[inline]
fn load_bits(rows: [&[u8]; ROWS], first: usize) -> [[uint8x16_t; 2]; ROWS] {
    let mut bits = [[vdupq_n_u8(0); 2]; ROWS];
    for r in 0..ROWS {
        let bytes = &rows[r][first..];
        let mut padded = [0; 32];
        let bytes: &[u8; 32] = bytes.first_chunk().unwrap_or_else(|| {
            padded[..bytes.len()].copy_from_slice(bytes);
            &padded
        });
        for (bits, bytes) in bits[r].iter_mut().zip(bytes.as_chunks::<16>().0) {
            // SAFETY: the pointer must be valid for reading 16 bytes, at any alignment; it comes from a reference to them.
            *bits = unsafe { vld1q_u8(bytes.as_ptr()) };
        }
    }
    bits
}

#[target_feature(enable = "neon")]
#[inline]
fn load(codes: &[i8; 32]) -> [int8x16_t; 2] {
    let mut loaded = [vdupq_n_s8(0); 2];
    for (loaded, codes) in loaded.iter_mut().zip(codes.as_chunks::<16>().0) {
        // SAFETY: the pointer must be valid for reading 16 bytes, at any alignment; it comes from a reference to them.
        *loaded = unsafe { vld1q_s8(codes.as_ptr()) };
    }
    loaded
}

#[target_feature(enable = "neon")]
#[inline]
fn lanes(registers: [int32x4_t; 2]) -> [i32; 8] {
    let mut lanes = [0; 8];
    for (lanes, register) in lanes.as_chunks_mut::<4>().0.iter_mut().zip(registers) {
        // SAFETY: the pointer must be valid for writing 16 bytes, at any alignment; it comes from an exclusive reference to them.
        unsafe { vst1q_s32(lanes.as_mut_ptr(), register) }
    }
    lanes
}
