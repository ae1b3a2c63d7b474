//! AVX2: 32 values are four registers of eight and one `u32` of bits.
//!
//! - pack: compare each register with zero, gather its eight sign bits with `movmskps`;
//! - unpack, apply: broadcast the 32 inverted bits to all lanes, shift lane `j` of register `g` left by `31 - 8 g - j`, so
//!   that its own bit becomes the sign bit, mask the rest off, and combine with 1.0 or with the value.
//!
//! What is left is done eight at a time, and the last seven values at most by the scalar kernel.

use std::arch::x86_64::*;

use super::scalar;

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
