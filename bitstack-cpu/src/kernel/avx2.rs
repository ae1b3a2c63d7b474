//! AVX2: bits spread to bytes 0 and 1, multiplied with 16-bit codes of z in two halves.
//!
//! 32 bytes of a row are 256 columns; shifted by j and masked, byte i is the bit of column 8i + j, so the codes are kept in that order and the
//! signs stay as they are. `vpmaddubsw` multiplies by the codes' high and low bytes (256 · high + low, both signed) and adds pairs in 16 bits,
//! which hold the sums of fifteen such runs. Six instructions for 32 columns bound it, at a quarter of the speed of the tables that
//! AVX-512 has.
//!
//! Lane L of a register always meets columns 32L..32L + 32 of a run, so each lane has a scale of its own, at no cost: one large value
//! coarsens an eighth of the columns only.

use std::arch::x86_64::*;

use super::codes::{ROWS, Run};

/// Runs whose sums fit in 16 bits: 15 · 8 · 2 · 128 < 2^15.
const RUNS: usize = 15;

/// Σ bit · code in each lane, of rows of `n` bytes each, for all of them together.
#[target_feature(enable = "avx2")]
pub(super) fn sums(rows: [&[u8]; ROWS], runs: &[Run], ahead: *const u8) -> [[i32; 8]; ROWS] {
    let ones = _mm256_set1_epi16(1);
    let mut totals = [_mm256_setzero_si256(); ROWS];
    for (block, runs) in runs.chunks(RUNS).enumerate() {
        let mut high = [_mm256_setzero_si256(); ROWS];
        let mut low = [_mm256_setzero_si256(); ROWS];
        for (i, run) in runs.iter().enumerate() {
            let first = 32 * (block * RUNS + i);
            let mut bits = [_mm256_setzero_si256(); ROWS];
            for r in 0..ROWS {
                bits[r] = load_bits(&rows[r][first..]);
            }
            for r in 0..ROWS * 32 / 64 {
                prefetch(ahead.wrapping_add(ROWS * first + 64 * r));
            }
            spread_and_multiply(bits, run, &mut high, &mut low);
        }
        for r in 0..ROWS {
            let high = _mm256_slli_epi32::<8>(_mm256_madd_epi16(high[r], ones));
            let low = _mm256_madd_epi16(low[r], ones);
            totals[r] = _mm256_add_epi32(totals[r], _mm256_add_epi32(high, low));
        }
    }
    let mut sums = [[0; 8]; ROWS];
    for r in 0..ROWS {
        sums[r] = lanes(totals[r]);
    }
    sums
}

#[target_feature(enable = "avx2")]
#[inline]
fn spread_and_multiply(mut bits: [__m256i; ROWS], run: &Run, high: &mut [__m256i; ROWS], low: &mut [__m256i; ROWS]) {
    let one = _mm256_set1_epi8(1);
    for j in 0..8 {
        let (high_codes, low_codes) = (load(&run.high[j]), load(&run.low[j]));
        for r in 0..ROWS {
            let bit = _mm256_and_si256(bits[r], one);
            bits[r] = _mm256_srli_epi16::<1>(bits[r]);
            high[r] = _mm256_add_epi16(high[r], _mm256_maddubs_epi16(bit, high_codes));
            low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(bit, low_codes));
        }
    }
}

/// The first 32 bytes, or as many as there are and zeros.
#[target_feature(enable = "avx2")]
#[inline]
fn load_bits(bytes: &[u8]) -> __m256i {
    let mut padded = [0; 32];
    let bytes = bytes.first_chunk().unwrap_or_else(|| {
        padded[..bytes.len()].copy_from_slice(bytes);
        &padded
    });
    // SAFETY: the pointer must be valid for reading 32 bytes, at any alignment; it comes from a reference to them.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(codes: &[i8; 32]) -> __m256i {
    // SAFETY: the pointer must be valid for reading 32 bytes, at any alignment; it comes from a reference to them.
    unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn lanes(register: __m256i) -> [i32; 8] {
    let mut lanes = [0; 8];
    // SAFETY: the pointer must be valid for writing 32 bytes, at any alignment; it comes from an exclusive reference to them.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), register) }
    lanes
}

#[target_feature(enable = "avx2")]
#[inline]
#[allow(unused_unsafe, reason = "the intrinsic is unsafe up to some Rust version")]
fn prefetch(at: *const u8) {
    // SAFETY: a prefetch of any address is allowed; it never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
}
