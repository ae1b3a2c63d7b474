//! AVX2: sums of four columns looked up in tables, sixteen rows in the bytes of half a register.
//!
//! A line of signs is four bytes of each of sixteen rows (see `SignLayout::Strips`). Transposed, byte q of all rows is half a register, and its
//! nibbles are indices into tables of 16 bytes: `vpshufb` looks up those of two bytes at once.
//!
//! Bytes are added as they lie, as words, which counts those of odd rows 256 times and wraps around, and those of odd rows once more by
//! themselves: both sums follow from that. 32 bytes take three instructions then, where to widen them would take four.
//!
//! What bounds it: a line takes 8 lookups, 8 products that single out odd rows, 16 additions, 6 instructions that transpose and 6 that make
//! indices: eleven cycles at four a cycle. As the loop runs on Zen 4 it takes eighteen for one vector, fourteen each for four.

use std::arch::x86_64::*;

use super::Line;
use super::tables::{Ahead, LINE_ROWS, Part, Vector, build_biased, pass_biased};

/// Lines whose sums of bytes fit in 16 bits: four bytes of a row are looked up in each half of a register, 64 · 4 · 255 < 2^16.
const LINES: usize = 64;

/// See [`super::tables::build`].
#[target_feature(enable = "avx2,fma")]
pub(super) fn build(z: &[f32], tables: &mut [Line], vector: usize, vectors: usize) -> Option<f32> {
    build_biased(z, tables, vector, vectors)
}

/// See [`super::tables::pass`].
#[target_feature(enable = "avx2,fma")]
pub(super) fn pass<const V: usize>(
    part: &Part<'_>,
    tables: &[Line],
    vectors: &[Vector<'_>; V],
    y: &mut [f32],
    ahead: Ahead,
) {
    pass_biased::<V, LINES>(part, tables, vectors, y, |lines, tables, strip, first| {
        sums(lines, tables, |i| ahead.line(strip, first + i))
    });
}

/// Σ (256 · high + low) of each row, for each vector, over at most `LINES` lines. `ahead(i)` is prefetched with line `i`.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn sums<const V: usize>(
    lines: &[[u8; 64]],
    tables: &[Line],
    ahead: impl Fn(usize) -> *const u8,
) -> [[i32; LINE_ROWS]; V] {
    let nibble = _mm256_set1_epi8(15);
    let odd = _mm256_set1_epi16(0x0100);
    // Of high and of low bytes: those of all rows as words, and those of odd rows.
    let mut bytes = [[[_mm256_setzero_si256(); 2]; 2]; V];
    for (i, (line, tables)) in lines.iter().zip(tables.chunks_exact(4 * V)).enumerate() {
        prefetch(ahead(i));
        let columns = transposed(line);
        for n in 0..2 {
            let mut groups = columns;
            for group in &mut groups {
                let shifted = if n == 0 { *group } else { _mm256_srli_epi16::<4>(*group) };
                *group = _mm256_and_si256(shifted, nibble);
            }
            for v in 0..V {
                for byte in 0..2 {
                    let tables = tables[(n * V + v) * 2 + byte].0.as_chunks::<32>().0;
                    let [all, odds] = &mut bytes[v][byte];
                    for pair in 0..2 {
                        let found = _mm256_shuffle_epi8(load(&tables[pair]), groups[pair]);
                        *all = _mm256_add_epi16(*all, found);
                        *odds = _mm256_add_epi16(*odds, _mm256_maddubs_epi16(found, odd));
                    }
                }
            }
        }
    }
    let mut sums = [[0; LINE_ROWS]; V];
    for (sums, bytes) in sums.iter_mut().zip(&bytes) {
        for (sums, rows) in sums.as_chunks_mut().0.iter_mut().zip(rows(bytes)) {
            store(sums, rows);
        }
    }
    sums
}

/// Bytes 0 and 1 of sixteen rows, and bytes 2 and 3, each in half a register, the rows in the order 0 to 3, 8 to 11, 4 to 7, 12 to 15.
#[target_feature(enable = "avx2")]
#[inline]
fn transposed(line: &[u8; 64]) -> [__m256i; 2] {
    let dwords = _mm256_setr_epi8(
        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
    );
    let [first, last] = line.as_chunks::<32>().0 else { unreachable!("64 bytes are twice 32") };
    let (first, last) = (_mm256_shuffle_epi8(load(first), dwords), _mm256_shuffle_epi8(load(last), dwords));
    [in_order(_mm256_unpacklo_epi32(first, last)), in_order(_mm256_unpackhi_epi32(first, last))]
}

/// Quarters 0, 2, 1 and 3.
#[target_feature(enable = "avx2")]
#[inline]
fn in_order(packed: __m256i) -> __m256i {
    _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
}

/// 256 times the high bytes and the low bytes of rows 0 to 7 and 8 to 15, from what was added up in the order of [`transposed`].
#[target_feature(enable = "avx2")]
#[inline]
fn rows(bytes: &[[__m256i; 2]; 2]) -> [__m256i; 2] {
    let mut rows = [_mm256_setzero_si256(); 2];
    for &[all, odd] in bytes {
        let even = _mm256_sub_epi16(all, _mm256_slli_epi16::<8>(odd));
        for (rows, words) in rows.iter_mut().zip([even, odd]) {
            // One half of the columns, and the other.
            let first = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(words));
            let last = _mm256_cvtepu16_epi32(_mm256_extracti128_si256::<1>(words));
            *rows = _mm256_add_epi32(_mm256_slli_epi32::<8>(*rows), _mm256_add_epi32(first, last));
        }
    }
    let [even, odd] = rows;
    [_mm256_unpacklo_epi32(even, odd), _mm256_unpackhi_epi32(even, odd)]
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the pointer must be valid for reading 32 bytes, at any alignment; it comes from a reference to them.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store(lanes: &mut [i32; 8], register: __m256i) {
    // SAFETY: the pointer must be valid for writing 32 bytes, at any alignment; it comes from an exclusive reference to 8 i32.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), register) }
}

#[target_feature(enable = "avx2")]
#[inline]
#[allow(unused_unsafe, reason = "the intrinsic is unsafe up to some Rust version")]
fn prefetch(at: *const u8) {
    // SAFETY: a prefetch of any address is allowed; it never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
}
