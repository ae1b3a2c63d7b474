//! AVX-512: 16 values are one register, and their bits one mask register.
//!
//! - pack: compare with zero, the result is the bits;
//! - unpack: blend -1.0 and +1.0 by the bits;
//! - apply: exclusive-or with the sign bit in the lanes whose bit is 0;
//! - lines: 64 bytes of each of 16 rows are transposed as 16 x 16 words of 4 bytes.
//!
//! The main loops take 64 values and one `u64` of bits, so that the bits are loaded and stored eight bytes at a time. What
//! is left is done 16 at a time, the last of them with masked loads and stores.

use std::arch::x86_64::*;

use super::scalar;
use crate::layout::{LINE_BYTES, UNIT_BYTES};

#[target_feature(enable = "avx512f")]
pub(super) fn pack(bytes: &mut [u8], values: &[f32]) {
    let (runs, rest) = values.as_chunks::<64>();
    let (words, tail) = bytes.split_at_mut(8 * runs.len());
    for (run, word) in runs.iter().zip(words.as_chunks_mut::<8>().0) {
        let mut bits = 0;
        for (g, sixteen) in run.as_chunks::<16>().0.iter().enumerate() {
            bits |= u64::from(at_least_zero(load(sixteen))) << (16 * g);
        }
        *word = bits.to_le_bytes();
    }
    for (some, pair) in rest.chunks(16).zip(tail.chunks_mut(2)) {
        let bits = at_least_zero(load_some(some)) & lanes(some.len());
        pair.copy_from_slice(&bits.to_le_bytes()[..pair.len()]);
    }
}

#[target_feature(enable = "avx512f")]
fn at_least_zero(values: __m512) -> __mmask16 {
    // Ordered: false for NaN, as `>=` in Rust.
    _mm512_cmp_ps_mask::<_CMP_GE_OQ>(values, _mm512_setzero_ps())
}

#[target_feature(enable = "avx512f")]
pub(super) fn unpack(bytes: &[u8], values: &mut [f32]) {
    let (runs, rest) = values.as_chunks_mut::<64>();
    let (words, tail) = bytes.split_at(8 * runs.len());
    for (run, word) in runs.iter_mut().zip(words.as_chunks::<8>().0) {
        let bits = u64::from_le_bytes(*word);
        for (g, sixteen) in run.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            store(sixteen, signs((bits >> (16 * g)) as __mmask16));
        }
    }
    for (some, pair) in rest.chunks_mut(16).zip(tail.chunks(2)) {
        store_some(some, signs(mask(pair)));
    }
}

#[target_feature(enable = "avx512f")]
fn signs(bits: __mmask16) -> __m512 {
    _mm512_mask_blend_ps(bits, _mm512_set1_ps(-1.0), _mm512_set1_ps(1.0))
}

#[target_feature(enable = "avx512f")]
pub(super) fn apply(bytes: &[u8], values: &mut [f32]) {
    let (runs, rest) = values.as_chunks_mut::<64>();
    let (words, tail) = bytes.split_at(8 * runs.len());
    for (run, word) in runs.iter_mut().zip(words.as_chunks::<8>().0) {
        let bits = u64::from_le_bytes(*word);
        for (g, sixteen) in run.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            store(sixteen, flipped(load(sixteen), (bits >> (16 * g)) as __mmask16));
        }
    }
    for (some, pair) in rest.chunks_mut(16).zip(tail.chunks(2)) {
        store_some(some, flipped(load_some(some), mask(pair)));
    }
}

#[target_feature(enable = "avx512f")]
fn flipped(values: __m512, bits: __mmask16) -> __m512 {
    let values = _mm512_castps_si512(values);
    _mm512_castsi512_ps(_mm512_mask_xor_epi32(values, !bits, values, _mm512_set1_epi32(i32::MIN)))
}

#[target_feature(enable = "avx512f")]
pub(super) fn lines(rows: &[u8], row_bytes: usize, lines: &mut [[u8; LINE_BYTES]]) {
    let (blocks, rest) = lines.as_chunks_mut::<16>();
    // One check for all loads: sixteen for each block take as long as the loads.
    let n = 64 * blocks.len();
    assert!(row_bytes.checked_mul(15).and_then(|last| last.checked_add(n)).is_some_and(|len| len <= rows.len()));
    for (i, block) in blocks.iter_mut().enumerate() {
        let mut loaded = [_mm512_setzero_si512(); 16];
        for (row, loaded) in loaded.iter_mut().enumerate() {
            let at = rows.as_ptr().wrapping_add(row * row_bytes + 64 * i);
            // SAFETY: the pointer must be valid for reading 64 bytes, at any alignment; they are among the first `n` from byte
            // `row * row_bytes` of `rows` on, which exist by the assertion above, as `row` is at most 15.
            *loaded = unsafe { _mm512_loadu_si512(at.cast()) };
        }
        for (line, words) in block.iter_mut().zip(transposed(loaded)) {
            store_bytes(line, words);
        }
    }
    if !rest.is_empty() {
        scalar::lines(&rows[UNIT_BYTES * 16 * blocks.len()..], row_bytes, rest);
    }
}

/// The transpose of 16 x 16 words of 4 bytes.
#[target_feature(enable = "avx512f")]
#[inline]
fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    // Loops over arrays, not `from_fn`: its closure is not always inlined, and each call then goes through memory.
    let zero = _mm512_setzero_si512();
    let (mut pairs, mut fours, mut columns) = ([zero; 16], [zero; 16], [zero; 16]);
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // `fours[4i + j]` has, in its 128-bit lane q, column 4q + j of rows 4i..4i + 4.
    for i in 0..4 {
        let [a, b, c, d] = [pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]];
        fours[4 * i] = _mm512_unpacklo_epi64(a, c);
        fours[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
        fours[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
        fours[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for j in 0..4 {
        let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        columns[j] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        columns[4 + j] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        columns[8 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        columns[12 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
    columns
}

/// The bits of one or two bytes, the first lowest.
fn mask(pair: &[u8]) -> __mmask16 {
    pair.iter().rev().fold(0, |bits, &byte| bits << 8 | __mmask16::from(byte))
}

/// The lowest `n` bits of 16.
fn lanes(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n) - 1) as __mmask16
}

#[target_feature(enable = "avx512f")]
fn load(values: &[f32; 16]) -> __m512 {
    // SAFETY: the pointer must be valid for reading 64 bytes, at any alignment; it comes from a reference to 16 f32.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
fn store(values: &mut [f32; 16], vector: __m512) {
    // SAFETY: the pointer must be valid for writing 64 bytes, at any alignment; it comes from an exclusive reference to
    // 16 f32, for which every bit pattern is a value.
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), vector) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store_bytes(bytes: &mut [u8; 64], register: __m512i) {
    // SAFETY: the pointer must be valid for writing 64 bytes, at any alignment; it comes from an exclusive reference to them.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), register) }
}

/// Loads up to 16 values; the lanes beyond them are zero.
#[target_feature(enable = "avx512f")]
fn load_some(values: &[f32]) -> __m512 {
    let mask = lanes(values.len().min(16));
    // SAFETY: the pointer must be valid for reading the lanes in the mask, at any alignment; they are the first
    // `values.len()` at most, and lanes outside the mask are not accessed.
    unsafe { _mm512_maskz_loadu_ps(mask, values.as_ptr()) }
}

/// Stores the first `values.len()` lanes, 16 at most.
#[target_feature(enable = "avx512f")]
fn store_some(values: &mut [f32], vector: __m512) {
    let mask = lanes(values.len().min(16));
    // SAFETY: the pointer must be valid for writing the lanes in the mask, at any alignment; they are the first
    // `values.len()` at most, and lanes outside the mask are not accessed.
    unsafe { _mm512_mask_storeu_ps(values.as_mut_ptr(), mask, vector) }
}
