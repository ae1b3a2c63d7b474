//! AVX-512 with VBMI and VNNI: sums of four columns looked up in tables, sixteen rows in the lanes of a register.
//!
//! A *line* is a register of sixteen rows x 32 columns: row i's four bytes are in dword i. Signs in strips are lines as they lie in memory; of
//! signs in rows lines are made, sixteen at a time. In a line, byte q of every dword stands for the same eight columns; its nibble, with q
//! above it, is an index into a register of 4 x 16 bytes: the sums ± z over the four columns of the nibble for every pattern of signs. `vpermb`
//! looks up all 64, `vpdpbusd` with ones adds the four groups of a row. Sums are kept to 16 bits, as high and low bytes in tables of their
//! own (256 · high + low, both signed), so a line takes four lookups for each vector.
//!
//! What bounds it: lookups and sums, four of each in a line for each vector, which on Zen 4 share three pipes. Up to four strips share a
//! load of a table and keep as many sums apart. The signs of the next part are prefetched into the second-level cache, spread evenly over
//! the loop and in the order in which they lie in memory: sixteen lines in a row cost a third of the speed, a line of each strip in turn a tenth.
//! To add the high bytes of two nibbles before `vpdpbusd` saves one sum in four, gains 3 % and breaks the bound on errors of short rows: not done.

use std::arch::x86_64::*;

use bitstack_core::SignView;

use super::Line;
use super::tables::{Ahead, LARGEST, LINE_ROWS, Lines, Part, SMALLEST_MAX, Vector};

/// Lines that are put together at once: 64 bytes of each row.
const CHUNK: usize = 16;

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
    // Byte 16q + e of a table is the low byte of sum e of group q, in the order that they are packed in; the high one follows it.
    let low_bytes: [u8; 64] = std::array::from_fn(|i| {
        let (q, e) = (i / 16, i % 16);
        (64 * (q / 2) + 2 * (8 * (e / 4) + 4 * (q % 2) + e % 4)) as u8
    });
    let low_bytes = load_bytes(&low_bytes);
    let high_bytes = _mm512_add_epi8(low_bytes, _mm512_set1_epi8(1));
    for (z, tables) in z.as_chunks::<32>().0.iter().zip(tables.chunks_exact_mut(4 * vectors)) {
        for nibble in 0..2 {
            let mut sums = [_mm512_setzero_si512(); 4];
            for q in 0..4 {
                let z = &z[8 * q + 4 * nibble..][..4];
                let mut sum = _mm512_mul_ps(signs[0], _mm512_set1_ps(z[0]));
                for i in 1..4 {
                    sum = _mm512_fmadd_ps(signs[i], _mm512_set1_ps(z[i]), sum);
                }
                sums[q] = _mm512_cvtps_epi32(sum);
            }
            let (first, last) = (_mm512_packs_epi32(sums[0], sums[1]), _mm512_packs_epi32(sums[2], sums[3]));
            let low = _mm512_permutex2var_epi8(first, low_bytes, last);
            // 256 · high + low, with low signed: half of its range is added before the rest is cut off.
            let half = _mm512_set1_epi16(128);
            let (first, last) = (_mm512_add_epi16(first, half), _mm512_add_epi16(last, half));
            let high = _mm512_permutex2var_epi8(first, high_bytes, last);
            let line = (nibble * vectors + vector) * 2;
            store_line(&mut tables[line], high);
            store_line(&mut tables[line + 1], low);
        }
    }
    Some(largest / LARGEST)
}

/// See [`super::tables::pass`]. `R` strips are done together.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) fn pass<const V: usize, const R: usize>(
    part: &Part<'_>,
    tables: &[Line],
    vectors: &[Vector<'_>; V],
    y: &mut [f32],
    ahead: Ahead,
) {
    let Part { signs, rows, lines } = part;
    let (first_strip, n_strips) = (rows.start / LINE_ROWS, rows.len().div_ceil(LINE_ROWS));
    for first in (0..n_strips).step_by(R) {
        // Loops over arrays, not `map`: its closure is not inlined.
        let (mut strips, mut direct) = ([0; R], [&[][..]; R]);
        let mut n_direct = lines.len();
        for r in 0..R {
            // Beyond the last strip, the last again: of no use, and not stored.
            strips[r] = first_strip + (first + r).min(n_strips - 1);
            let whole = signs.strip_lines(strips[r]).unwrap_or(&[]);
            direct[r] = &whole[lines.start.min(whole.len())..];
            n_direct = n_direct.min(direct[r].len());
        }
        for r in 0..R {
            direct[r] = &direct[r][..n_direct];
        }
        let (direct_tables, other_tables) = tables.split_at(4 * V * n_direct);
        let at = ahead.strip(first);
        let mut sums = [[[_mm512_setzero_si512(); 2]; V]; R];
        sums =
            add_lines(direct, direct_tables, Next { at, step: 64, lines: n_direct, stride: ahead.strip_bytes }, sums);
        if n_direct < lines.len() {
            sums = add_other_lines(*signs, strips, lines.start + n_direct, other_tables, (ahead, first), sums);
        }
        for (sums, first_row) in sums.iter().zip((LINE_ROWS * first..rows.len()).step_by(LINE_ROWS)) {
            let n = LINE_ROWS.min(rows.len() - first_row);
            let lanes = lanes(n);
            for (vector, &[high, low]) in vectors.iter().zip(sums) {
                // At most 2048 groups of four columns of at most 32639 steps each: within 2^26, and in f32 within two steps of that.
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
                let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(vector.scale));
                let u = load_some(&vector.u[first_row..], lanes, n);
                let y = &mut y[vector.y + first_row..];
                let sum = _mm512_fmadd_ps(u, scaled, load_some(y, lanes, n));
                store_some(y, sum, lanes, n);
            }
        }
    }
}

/// As [`add_lines`], for lines from `first_line` on that are not as they are needed: they are put together in buffers, a chunk at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline(never)]
fn add_other_lines<const V: usize, const R: usize>(
    signs: SignView<'_>,
    strips: [usize; R],
    first_line: usize,
    tables: &[Line],
    (ahead, first): (Ahead, usize),
    mut sums: [[[__m512i; 2]; V]; R],
) -> [[[__m512i; 2]; V]; R] {
    let mut buffers = [const { Lines::<CHUNK>::new() }; R];
    let mut at = ahead.strip(first);
    for (tables, first_line) in tables.chunks(4 * V * CHUNK).zip((first_line..).step_by(CHUNK)) {
        let mut lines = [&[][..]; R];
        for ((lines, buffer), &strip) in lines.iter_mut().zip(&mut buffers).zip(&strips) {
            *lines = buffer.of(signs, strip, first_line..first_line + tables.len() / (4 * V));
        }
        sums = add_lines(
            lines,
            tables,
            Next { at, step: ahead.line_bytes, lines: CHUNK, stride: ahead.strip_bytes },
            sums,
        );
        at = at.wrapping_add(ahead.chunk_bytes);
    }
    sums
}

/// What is prefetched: from `at` on one byte every `step`, `lines` times, then again `stride` further on.
#[derive(Clone, Copy)]
struct Next {
    at: *const u8,
    step: usize,
    lines: usize,
    stride: usize,
}

/// Adds the high and the low bytes of Σ ±, in steps, over as many lines of `R` strips as there are tables for. As many are prefetched from `next`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
fn add_lines<const V: usize, const R: usize>(
    lines: [&[[u8; 64]]; R],
    tables: &[Line],
    next: Next,
    mut sums: [[[__m512i; 2]; V]; R],
) -> [[[__m512i; 2]; V]; R] {
    let ones = _mm512_set1_epi8(1);
    let nibble = _mm512_set1_epi8(15);
    let byte_of_dword = _mm512_set1_epi32(0x3020_1000);
    let n = lines[0].len();
    assert!(lines.iter().all(|lines| lines.len() == n));
    let (mut first_of_strip, mut at, mut left) = (next.at, next.at, next.lines);
    for (i, tables) in tables.chunks_exact(4 * V).enumerate().take(n) {
        for r in 0..R {
            prefetch(at.wrapping_add(next.step * r));
        }
        at = at.wrapping_add(next.step * R);
        left = left.saturating_sub(R);
        if left == 0 {
            first_of_strip = first_of_strip.wrapping_add(next.stride);
            (at, left) = (first_of_strip, next.lines);
        }
        let mut groups = [[_mm512_setzero_si512(); R]; 2];
        for r in 0..R {
            let line = load_bytes(&lines[r][i]);
            // (line & nibble) | byte_of_dword
            groups[0][r] = _mm512_ternarylogic_epi32::<0b1110_1010>(line, nibble, byte_of_dword);
            let line = _mm512_srli_epi16::<4>(line);
            groups[1][r] = _mm512_ternarylogic_epi32::<0b1110_1010>(line, nibble, byte_of_dword);
        }
        for v in 0..V {
            for n in 0..2 {
                for byte in 0..2 {
                    let table = load_line(&tables[(n * V + v) * 2 + byte]);
                    for r in 0..R {
                        let found = _mm512_permutexvar_epi8(groups[n][r], table);
                        sums[r][v][byte] = _mm512_dpbusd_epi32(sums[r][v][byte], ones, found);
                    }
                }
            }
        }
    }
    sums
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
pub(super) fn load_bytes(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the pointer must be valid for reading 64 bytes, at any alignment; it comes from a reference to them.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_line(line: &Line) -> __m512i {
    // SAFETY: the pointer must be valid for reading 64 bytes and aligned to 64; it comes from a reference to a `Line`, which is both.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store_line(line: &mut Line, bytes: __m512i) {
    // SAFETY: the pointer must be valid for writing 64 bytes and aligned to 64; it comes from an exclusive reference to a `Line`, which is both.
    unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), bytes) }
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
