//! AVX2: 32 values are four registers of eight and one `u32` of bits.
//!
//! - pack: compare each register with zero, gather its eight sign bits with `movmskps`;
//! - unpack, apply: broadcast the 32 inverted bits to all lanes, shift lane `j` of register `g` left by `31 - 8 g - j`, so
//!   that its own bit becomes the sign bit, mask the rest off, and combine with 1.0 or with the value;
//! - lines: 32 bytes of eight rows at a time, transposed in registers.
//!
//! What is left is done eight at a time, and the last seven values at most by the scalar kernel.

use std::arch::x86_64::*;

use super::scalar;
use crate::layout::{LINE_BYTES, UNIT_BYTES};

#[target_feature(enable = "avx2")]
pub(super) fn pack(bytes: &mut [u8], values: &[f32]) {
    let (runs, values) = values.as_chunks::<32>();
    let (words, bytes) = bytes.split_at_mut(4 * runs.len());
    for (run, word) in runs.iter().zip(words.as_chunks_mut::<4>().0) {
        for (eight, byte) in run.as_chunks::<8>().0.iter().zip(word) {
            *byte = pack_eight(eight);
        }
    }
    let (eights, rest) = values.as_chunks::<8>();
    let (whole, tail) = bytes.split_at_mut(eights.len());
    for (eight, byte) in eights.iter().zip(whole) {
        *byte = pack_eight(eight);
    }
    scalar::pack(tail, rest);
}

#[target_feature(enable = "avx2")]
fn pack_eight(values: &[f32; 8]) -> u8 {
    // Ordered: false for NaN, as `>=` in Rust.
    let at_least_zero = _mm256_cmp_ps::<_CMP_GE_OQ>(load(values), _mm256_setzero_ps());
    _mm256_movemask_ps(at_least_zero) as u8
}

#[target_feature(enable = "avx2")]
pub(super) fn unpack(bytes: &[u8], values: &mut [f32]) {
    let one = _mm256_set1_ps(1.0);
    let (runs, values) = values.as_chunks_mut::<32>();
    let (words, bytes) = bytes.split_at(4 * runs.len());
    for (run, word) in runs.iter_mut().zip(words.as_chunks::<4>().0) {
        let word = u32::from_le_bytes(*word);
        for (g, eight) in run.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            store(eight, _mm256_or_ps(one, flips(word >> (8 * g))));
        }
    }
    let (eights, rest) = values.as_chunks_mut::<8>();
    let (whole, tail) = bytes.split_at(eights.len());
    for (eight, &byte) in eights.iter_mut().zip(whole) {
        store(eight, _mm256_or_ps(one, flips(byte.into())));
    }
    scalar::unpack(tail, rest);
}

#[target_feature(enable = "avx2")]
pub(super) fn apply(bytes: &[u8], values: &mut [f32]) {
    let (runs, values) = values.as_chunks_mut::<32>();
    let (words, bytes) = bytes.split_at(4 * runs.len());
    for (run, word) in runs.iter_mut().zip(words.as_chunks::<4>().0) {
        let word = u32::from_le_bytes(*word);
        for (g, eight) in run.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            store(eight, _mm256_xor_ps(load(eight), flips(word >> (8 * g))));
        }
    }
    let (eights, rest) = values.as_chunks_mut::<8>();
    let (whole, tail) = bytes.split_at(eights.len());
    for (eight, &byte) in eights.iter_mut().zip(whole) {
        store(eight, _mm256_xor_ps(load(eight), flips(byte.into())));
    }
    scalar::apply(tail, rest);
}

#[target_feature(enable = "avx2")]
pub(super) fn lines(rows: &[u8], row_bytes: usize, lines: &mut [[u8; LINE_BYTES]]) {
    let (blocks, rest) = lines.as_chunks_mut::<8>();
    for (i, block) in blocks.iter_mut().enumerate() {
        for half in 0..2 {
            let mut words = [_mm256_setzero_si256(); 8];
            for (row, words) in (8 * half..).zip(&mut words) {
                *words = load_bytes(
                    rows[row * row_bytes + 32 * i..].first_chunk().expect("rows have the bytes of their lines"),
                );
            }
            for (line, words) in block.iter_mut().zip(transposed(words)) {
                store_bytes(&mut line.as_chunks_mut().0[half], words);
            }
        }
    }
    scalar::lines(&rows[UNIT_BYTES * 8 * blocks.len()..], row_bytes, rest);
}

/// The transpose of 8 x 8 words of 4 bytes.
#[target_feature(enable = "avx2")]
#[inline]
fn transposed(rows: [__m256i; 8]) -> [__m256i; 8] {
    // Loops over arrays, not `from_fn`: its closure is not always inlined, and each call then goes through memory.
    let (mut fours, mut columns) = ([_mm256_setzero_si256(); 8], [_mm256_setzero_si256(); 8]);
    // `fours[4i + j]` has, in its 128-bit lane q, column 4q + j of rows 4i..4i + 4.
    for i in 0..2 {
        let [a, b, c, d] = [rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]];
        let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        fours[4 * i] = _mm256_unpacklo_epi64(ab_low, cd_low);
        fours[4 * i + 1] = _mm256_unpackhi_epi64(ab_low, cd_low);
        fours[4 * i + 2] = _mm256_unpacklo_epi64(ab_high, cd_high);
        fours[4 * i + 3] = _mm256_unpackhi_epi64(ab_high, cd_high);
    }
    for j in 0..4 {
        columns[j] = _mm256_permute2x128_si256::<0x20>(fours[j], fours[4 + j]);
        columns[4 + j] = _mm256_permute2x128_si256::<0x31>(fours[j], fours[4 + j]);
    }
    columns
}

/// -0.0 in the lanes whose bit of the low byte of `bits` is 0, +0.0 in the others.
#[target_feature(enable = "avx2")]
fn flips(bits: u32) -> __m256 {
    let shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    let at_sign = _mm256_sllv_epi32(_mm256_set1_epi32(!bits as i32), shifts);
    _mm256_and_ps(_mm256_castsi256_ps(at_sign), _mm256_set1_ps(-0.0))
}

#[target_feature(enable = "avx2")]
fn load(values: &[f32; 8]) -> __m256 {
    // SAFETY: the pointer must be valid for reading 32 bytes, at any alignment; it comes from a reference to 8 f32.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[target_feature(enable = "avx2")]
fn store(values: &mut [f32; 8], vector: __m256) {
    // SAFETY: the pointer must be valid for writing 32 bytes, at any alignment; it comes from an exclusive reference to 8
    // f32, for which every bit pattern is a value.
    unsafe { _mm256_storeu_ps(values.as_mut_ptr(), vector) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_bytes(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the pointer must be valid for reading 32 bytes, at any alignment; it comes from a reference to them.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_bytes(bytes: &mut [u8; 32], register: __m256i) {
    // SAFETY: the pointer must be valid for writing 32 bytes, at any alignment; it comes from an exclusive reference to them.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), register) }
}
