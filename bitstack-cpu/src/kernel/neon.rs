//! NEON: sums of four columns looked up in tables, sixteen rows in the bytes of a register.
//!
//! A line of signs is four bytes of each of sixteen rows (see `SignLayout::Strips`). `ld4` loads byte q of all rows into register q; its nibbles
//! are indices into a table of 16 bytes, a register. What is found is added up as AVX2 does it: as words, which counts the bytes of odd
//! rows 256 times and wraps around, and those of odd rows once more by themselves, by `usra`. 56 instructions take 512 signs.
//!
//! The signs are not prefetched: they are read in the order of memory, which the CPU foresees.

use std::arch::aarch64::*;

use super::Line;
use super::tables::{LINE_ROWS, Part, Vector, build_biased, pass_biased};

/// Lines whose sums of bytes fit in 16 bits: eight bytes of a row are looked up in each, 32 · 8 · 255 < 2^16.
const LINES: usize = 32;

/// See [`super::tables::build`].
#[target_feature(enable = "neon")]
pub(super) fn build(z: &[f32], tables: &mut [Line], vector: usize, vectors: usize) -> Option<f32> {
    build_biased(z, tables, vector, vectors)
}

/// See [`super::tables::pass`].
#[target_feature(enable = "neon")]
pub(super) fn pass<const V: usize>(part: &Part<'_>, tables: &[Line], vectors: &[Vector<'_>; V], y: &mut [f32]) {
    pass_biased::<V, LINES>(part, tables, vectors, y, |lines, tables, _, _| sums(lines, tables));
}

/// Σ (256 · high + low) of each row, for each vector, over at most `LINES` lines.
#[target_feature(enable = "neon")]
#[inline]
fn sums<const V: usize>(lines: &[[u8; 64]], tables: &[Line]) -> [[i32; LINE_ROWS]; V] {
    // Of high and of low bytes: those of all rows as words, and those of odd rows.
    let mut bytes = [[[vdupq_n_u16(0); 2]; 2]; V];
    for (line, tables) in lines.iter().zip(tables.chunks_exact(4 * V)) {
        // SAFETY: the pointer must be valid for reading 64 bytes, at any alignment; it comes from a reference to them.
        let columns = unsafe { vld4q_u8(line.as_ptr()) };
        let columns = [columns.0, columns.1, columns.2, columns.3];
        for n in 0..2 {
            for v in 0..V {
                for byte in 0..2 {
                    let [all, odd] = &mut bytes[v][byte];
                    let tables = tables[(n * V + v) * 2 + byte].0.as_chunks::<16>().0;
                    for (column, table) in columns.iter().zip(tables) {
                        let group = if n == 0 { vandq_u8(*column, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(*column) };
                        // SAFETY: the pointer must be valid for reading 16 bytes, at any alignment; it comes from a reference to them.
                        let table = unsafe { vld1q_u8(table.as_ptr()) };
                        let found = vreinterpretq_u16_u8(vqtbl1q_u8(table, group));
                        *all = vaddq_u16(*all, found);
                        *odd = vsraq_n_u16::<8>(*odd, found);
                    }
                }
            }
        }
    }
    let mut sums = [[0; LINE_ROWS]; V];
    for (sums, bytes) in sums.iter_mut().zip(bytes) {
        // Of even and of odd rows, the first eight and the last.
        let mut rows = [[vdupq_n_u32(0); 2]; 2];
        for [all, odd] in bytes {
            let even = vsubq_u16(all, vshlq_n_u16::<8>(odd));
            for (rows, words) in rows.iter_mut().zip([even, odd]) {
                let [first, last] = rows.map(|rows| vshlq_n_u32::<8>(rows));
                *rows = [vaddw_u16(first, vget_low_u16(words)), vaddw_high_u16(last, words)];
            }
        }
        let [even, odd] = rows;
        let in_order = [0, 1].map(|i| [vzip1q_u32(even[i], odd[i]), vzip2q_u32(even[i], odd[i])]);
        for (sums, rows) in sums.as_chunks_mut::<4>().0.iter_mut().zip(in_order.as_flattened()) {
            let rows = vreinterpretq_s32_u32(*rows);
            // SAFETY: the pointer must be valid for writing 16 bytes, at any alignment; it comes from an exclusive reference to them.
            unsafe { vst1q_s32(sums.as_mut_ptr(), rows) }
        }
    }
    sums
}
