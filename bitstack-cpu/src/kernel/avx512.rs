//! AVX-512 with VBMI and VNNI: sums of four columns looked up in tables, sixteen rows in the lanes of a register.
//!
//! A *line* is a register of sixteen rows x 32 columns: row i's four bytes are in dword i. Sixteen lines come from sixteen 64-byte loads, one
//! per row, by a transposition in registers, so the signs stay as they are in the file. In a line, byte q of every dword stands for the
//! same eight columns; its nibble, with q above it, is an index into a register of 4 x 16 bytes: the sums ± z over the four columns of the nibble
//! for every pattern of signs. `vpermb` looks up all 64, `vpdpbusd` with ones adds the four groups of a row. Sums are kept to 16 bits, as high and
//! low bytes in tables of their own (256 · high + low, both signed), so a line takes four lookups for each vector.
//!
//! What bounds it: the tables of a pass (16 KiB) must stay in the first-level cache. Its misses wait in the same few buffers as the signs on
//! their way from memory; with tables twice as large, signs arrive at less than half the speed. The signs are prefetched into the
//! second-level cache, spread evenly over the loop: sixteen in a row cost a third of the speed.

use std::arch::x86_64::*;

use super::tables::Vector;
use super::{Line, Signs};

/// Sixteen lines.
const LINES: usize = 16;

/// The largest sum in a table, 127 · 256 + 127.
const LARGEST: f32 = 32639.0;

/// The smallest largest sum whose inverse is safely finite.
const SMALLEST_MAX: f32 = 1e-30;

/// See [`super::tables::build`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) fn build(z: &[f32], tables: &mut [Line], vector: usize, vectors: usize) -> Option<f32> {
    let mut largest = _mm512_setzero_ps();
    let mut total = _mm512_setzero_ps();
    for z in z.as_chunks::<16>().0 {
        let z = _mm512_abs_ps(load(z));
        let pairs = _mm512_add_ps(z, _mm512_permute_ps::<0b10_11_00_01>(z));
        let fours = _mm512_add_ps(pairs, _mm512_permute_ps::<0b01_00_11_10>(pairs));
        largest = _mm512_max_ps(largest, fours);
        // Carries on what is not finite; a maximum may lose a NaN.
        total = _mm512_add_ps(total, fours);
    }
    let largest = _mm512_reduce_max_ps(largest);
    if !_mm512_reduce_add_ps(total).is_finite() || (largest < SMALLEST_MAX && largest > 0.0) {
        return None;
    }
    let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    // Lane e, column i: ± by bit i of e.
    let signs: [__m512; 4] = std::array::from_fn(|i| {
        let lanes: [f32; 16] = std::array::from_fn(|e| if e >> i & 1 == 1 { inverse } else { -inverse });
        load(&lanes)
    });
    for (z, tables) in z.as_chunks::<32>().0.iter().zip(tables.chunks_exact_mut(4 * vectors)) {
        for (group, z) in z.as_chunks::<4>().0.iter().enumerate() {
            let mut sums = _mm512_mul_ps(signs[0], _mm512_set1_ps(z[0]));
            for i in 1..4 {
                sums = _mm512_fmadd_ps(signs[i], _mm512_set1_ps(z[i]), sums);
            }
            let sums = _mm512_cvtps_epi32(sums);
            let high = _mm512_srli_epi32::<8>(_mm512_add_epi32(sums, _mm512_set1_epi32(128)));
            let (nibble, byte) = (group % 2, group / 2);
            let line = (nibble * vectors + vector) * 2;
            store_bytes(&mut tables[line].0.as_chunks_mut::<16>().0[byte], high);
            store_bytes(&mut tables[line + 1].0.as_chunks_mut::<16>().0[byte], sums);
        }
    }
    Some(largest / LARGEST)
}

/// See [`super::tables::pass`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) fn pass<const V: usize>(
    signs: Signs<'_>,
    tables: &[Line],
    vectors: &[Vector<'_>; V],
    y: &mut [f32],
    next: *const u8,
) {
    let tile_bytes = 16 * signs.run_bytes.next_multiple_of(64);
    for (tile, first_row) in (0..signs.rows).step_by(16).enumerate() {
        let rows = (signs.rows - first_row).min(16);
        let prefetched = next.wrapping_add(tile * tile_bytes);
        let sums = tile_sums::<V>(signs, first_row, rows, tables, prefetched);
        let lanes = lanes(rows);
        for (vector, sums) in vectors.iter().zip(sums) {
            let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(vector.scale));
            let u = load_some(&vector.u[first_row..], lanes, rows);
            let y = &mut y[vector.y + first_row..];
            let sum = _mm512_fmadd_ps(u, scaled, load_some(y, lanes, rows));
            store_some(y, sum, lanes, rows);
        }
    }
}

/// Σ ± over the columns of a pass, in steps, for up to 16 rows; lanes beyond them repeat the last row.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
fn tile_sums<const V: usize>(
    signs: Signs<'_>,
    first_row: usize,
    rows: usize,
    tables: &[Line],
    prefetched: *const u8,
) -> [__m512i; V] {
    let ones = _mm512_set1_epi8(1);
    let nibble = _mm512_set1_epi8(15);
    let byte_of_dword = _mm512_set1_epi32(0x3020_1000);
    let mut high = [[_mm512_setzero_si512(); V]; 2];
    let mut low = [[_mm512_setzero_si512(); V]; 2];
    for (chunk, tables) in tables.chunks_exact(4 * V * LINES).enumerate() {
        let lines = transposed(load_rows(signs, first_row, rows, 64 * chunk));
        let prefetched = prefetched.wrapping_add(64 * LINES * chunk);
        // A loop that is not unrolled, over lines on the stack: unrolled, the compiler mixes the lines, which spills registers and
        // bunches the prefetches.
        for i in 0..LINES {
            prefetch(prefetched.wrapping_add(64 * i));
            let tables = &tables[4 * V * i..][..4 * V];
            let mut index = lines[i];
            for n in 0..2 {
                // (index & nibble) | byte_of_dword
                let groups = _mm512_ternarylogic_epi32::<0b1110_1010>(index, nibble, byte_of_dword);
                for v in 0..V {
                    let sums = _mm512_permutexvar_epi8(groups, load_line(&tables[(n * V + v) * 2]));
                    high[n][v] = _mm512_dpbusd_epi32(high[n][v], ones, sums);
                    let sums = _mm512_permutexvar_epi8(groups, load_line(&tables[(n * V + v) * 2 + 1]));
                    low[n][v] = _mm512_dpbusd_epi32(low[n][v], ones, sums);
                }
                index = _mm512_srli_epi16::<4>(index);
            }
        }
    }
    // At most 512 groups of four columns of at most 32639 steps each: within 2^24.
    let mut sums = [_mm512_setzero_si512(); V];
    for v in 0..V {
        let high = _mm512_add_epi32(high[0][v], high[1][v]);
        let low = _mm512_add_epi32(low[0][v], low[1][v]);
        sums[v] = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
    }
    sums
}

/// 64 bytes of each of 16 rows from byte `first_byte` of the pass; zero beyond its end, the last row repeated beyond `rows`.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn load_rows(signs: Signs<'_>, first_row: usize, rows: usize, first_byte: usize) -> [__m512i; 16] {
    let n = signs.run_bytes.saturating_sub(first_byte).min(64);
    assert!(rows > 0 && first_row + rows <= signs.rows);
    let mut loaded = [_mm512_setzero_si512(); 16];
    if n == 64 && rows == 16 {
        let start = signs.pointer(first_row).wrapping_add(first_byte);
        for (i, loaded) in loaded.iter_mut().enumerate() {
            // SAFETY: the pointer must be valid for reading 64 bytes, at any alignment: they are bytes `first_byte..first_byte + 64` of the
            // run of row `first_row + i`; it exists by the assertion above, and `Signs` keeps it within the matrix.
            *loaded = unsafe { _mm512_loadu_si512(start.wrapping_add(i * signs.row_bytes).cast()) };
        }
        return loaded;
    }
    let mask = if n == 64 { !0 } else { (1 << n) - 1 };
    for (i, loaded) in loaded.iter_mut().enumerate() {
        let start = signs.pointer(first_row + i.min(rows - 1)).wrapping_add(first_byte);
        // SAFETY: the pointer must be valid for reading the bytes in the mask, at any alignment: they are bytes `first_byte..first_byte + n` of
        // the run of a row that exists by the assertion above, and `Signs` keeps it within the matrix.
        *loaded = unsafe { _mm512_maskz_loadu_epi8(mask, start.cast()) };
    }
    loaded
}

/// The transpose of 16 x 16 dwords.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    // Loops over arrays, not `from_fn`: its closure is not always inlined, and each call then goes through memory.
    let zero = _mm512_setzero_si512();
    let (mut pairs, mut fours, mut lines) = ([zero; 16], [zero; 16], [zero; 16]);
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
        lines[j] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        lines[4 + j] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        lines[8 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        lines[12 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
    lines
}

#[target_feature(enable = "avx512f")]
#[inline]
#[allow(unused_unsafe, reason = "the intrinsic is unsafe up to some Rust version")]
pub(super) fn prefetch(at: *const u8) {
    // SAFETY: a prefetch of any address is allowed; it never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
}

/// The lowest `n` bits of 16.
fn lanes(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n) - 1) as __mmask16
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(values: &[f32; 16]) -> __m512 {
    // SAFETY: the pointer must be valid for reading 64 bytes, at any alignment; it comes from a reference to 16 f32.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_line(line: &Line) -> __m512i {
    // SAFETY: the pointer must be valid for reading 64 bytes and aligned to 64; it comes from a reference to a `Line`, which is both.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

/// The lowest byte of each of 16 lanes.
#[target_feature(enable = "avx512f")]
#[inline]
fn store_bytes(out: &mut [u8; 16], lanes: __m512i) {
    let bytes = _mm512_cvtepi32_epi8(lanes);
    // SAFETY: the pointer must be valid for writing 16 bytes, at any alignment; it comes from an exclusive reference to them.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), bytes) }
}

/// The first `n` values, those in `lanes`.
#[target_feature(enable = "avx512f")]
#[inline]
fn load_some(values: &[f32], lanes: __mmask16, n: usize) -> __m512 {
    assert!(values.len() >= n && lanes >> (n - 1) == 1);
    // SAFETY: the pointer must be valid for reading the lanes in the mask, at any alignment; they are the first `n`, which exist.
    unsafe { _mm512_maskz_loadu_ps(lanes, values.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store_some(values: &mut [f32], vector: __m512, lanes: __mmask16, n: usize) {
    assert!(values.len() >= n && lanes >> (n - 1) == 1);
    // SAFETY: the pointer must be valid for writing the lanes in the mask, at any alignment; they are the first `n`, which exist.
    unsafe { _mm512_mask_storeu_ps(values.as_mut_ptr(), lanes, vector) }
}
