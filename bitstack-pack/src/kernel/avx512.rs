//! AVX-512: 16 values are one register, and their bits one mask register.
//!
//! - pack: compare with zero, the result is the bits;
//! - unpack: blend -1.0 and +1.0 by the bits;
//! - apply: exclusive-or with the sign bit in the lanes whose bit is 0.
//!
//! The main loops take 64 values and one `u64` of bits, so that the bits are loaded and stored eight bytes at a time. What
//! is left is done 16 at a time, the last of them with masked loads and stores.

use std::arch::x86_64::*;

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
