//! Products by tables of the sums of four columns, behind a safe interface.

use std::ops::Range;

use bitstack_core::{SignLayout, SignView};

use super::Line;
#[cfg(target_arch = "aarch64")]
use super::neon;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::Isa;

/// Columns of a line of signs; tables are padded to a multiple of this.
pub(crate) const LINE_COLS: usize = 32;

/// Rows of a line of signs.
pub(crate) const LINE_ROWS: usize = 16;

/// Rows that are done together at most: work on fewer costs as much.
pub(crate) const GROUP_ROWS: usize = 4 * LINE_ROWS;

/// Lines of a pass over one vector at most; 1/V of it over V vectors. Its tables take 64 KiB.
const PASS_LINES: usize = 256;

/// Lines of a pass over `vectors` vectors, where there are `lines` in all: passes are as long as one another, but for the last.
pub(crate) fn pass_lines(lines: usize, vectors: usize) -> usize {
    lines.div_ceil(lines.div_ceil(PASS_LINES / vectors))
}

/// Table registers of `lines` lines for `vectors` vectors: for each line two nibbles, and for each vector high and low bytes.
pub(crate) fn table_lines(lines: usize, vectors: usize) -> usize {
    lines * 4 * vectors
}

/// The largest sum in a table, 127 · 256 + 127.
pub(super) const LARGEST: f32 = 32639.0;

/// The smallest largest sum whose inverse is safely finite.
pub(super) const SMALLEST_MAX: f32 = 1e-30;

/// Whether there are kernels for `isa` here.
pub(crate) fn has(isa: Isa) -> bool {
    isa != Isa::Scalar && isa.is_available()
}

/// Makes the tables of one pass for vector `vector` of `vectors`, and returns the value of one step. `None` when the sums cannot be
/// represented: some are not finite, or all are tiny and not zero.
///
/// `tables` is `lines x 2 nibbles x vectors x (high, low)`, and each of these 4 groups of columns x 16 patterns of signs.
pub(crate) fn build(isa: Isa, z: &[f32], tables: &mut [Line], vector: usize, vectors: usize) -> Option<f32> {
    assert!(has(isa) && z.len().is_multiple_of(LINE_COLS) && vector < vectors);
    assert!(tables.len() == table_lines(z.len() / LINE_COLS, vectors));
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
        Isa::Avx512Vnni | Isa::Amx => unsafe { avx512::build(z, tables, vector, vectors) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
        Isa::Avx2 | Isa::Avx512 => unsafe { avx2::build(z, tables, vector, vectors) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
        Isa::Neon => unsafe { neon::build(z, tables, vector, vectors) },
        _ => unreachable!("{isa} has no kernels here"),
    }
}

/// As [`build`], in portable code, with 128 added to every byte.
#[inline(always)]
pub(super) fn build_biased(z: &[f32], tables: &mut [Line], vector: usize, vectors: usize) -> Option<f32> {
    let (mut largest, mut total) = ([0.0f32; 8], [0.0f32; 8]);
    for z in z.as_chunks::<32>().0 {
        for i in 0..8 {
            let sum = (z[4 * i].abs() + z[4 * i + 1].abs()) + (z[4 * i + 2].abs() + z[4 * i + 3].abs());
            largest[i] = largest[i].max(sum);
            // Carries on what is not finite; a maximum loses a NaN.
            total[i] += sum;
        }
    }
    let largest = largest.into_iter().fold(0.0, f32::max);
    if !total.into_iter().sum::<f32>().is_finite() || (largest < SMALLEST_MAX && largest > 0.0) {
        return None;
    }
    let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    for (z, tables) in z.as_chunks::<32>().0.iter().zip(tables.chunks_exact_mut(4 * vectors)) {
        for (group, z) in z.as_chunks::<4>().0.iter().enumerate() {
            let z = z.map(|z| z * inverse);
            let (mut high, mut low) = ([0; 16], [0; 16]);
            for e in 0..16 {
                let mut sum = 0.0;
                for i in 0..4 {
                    sum += if e >> i & 1 == 1 { z[i] } else { -z[i] };
                }
                // Rounded to the nearest integer by adding 1.5 · 2^23, whose last bit is worth 1.
                let code = (sum + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
                (high[e], low[e]) = (((code + 128) >> 8) as u8 ^ 128, code as u8 ^ 128);
            }
            let (nibble, byte) = (group % 2, group / 2);
            let line = (nibble * vectors + vector) * 2;
            tables[line].0.as_chunks_mut().0[byte] = high;
            tables[line + 1].0.as_chunks_mut().0[byte] = low;
        }
    }
    Some(largest / LARGEST)
}

/// As [`pass`], from tables of [`build_biased`]. `sums` adds up what is found for at most `N` lines: the lines, their tables, and which
/// strip and which first line of the part they are.
#[inline(always)]
pub(super) fn pass_biased<const V: usize, const N: usize>(
    part: &Part<'_>,
    tables: &[Line],
    vectors: &[Vector<'_>; V],
    y: &mut [f32],
    sums: impl Fn(&[[u8; 64]], &[Line], usize, usize) -> [[i32; LINE_ROWS]; V],
) {
    let mut buffer = Lines::<N>::new();
    for (strip, first_row) in (0..part.rows.len()).step_by(LINE_ROWS).enumerate() {
        // Eight groups of a line, of which each has 128 too much in either byte.
        let bias = part.lines.len() as i32 * 8 * (128 * 256 + 128);
        let mut totals = [[-bias; LINE_ROWS]; V];
        for (tables, first) in tables.chunks(4 * V * N).zip((0..).step_by(N)) {
            let lines = part.lines.start + first..part.lines.start + first + tables.len() / (4 * V);
            let lines = buffer.of(part.signs, part.rows.start / LINE_ROWS + strip, lines);
            for (totals, sums) in totals.iter_mut().zip(sums(lines, tables, strip, first)) {
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total += sum;
                }
            }
        }
        for (vector, totals) in vectors.iter().zip(totals) {
            let y = y[vector.y + first_row..vector.y + part.rows.len()].iter_mut();
            for ((y, u), total) in y.zip(&vector.u[first_row..]).zip(totals) {
                *y += u * (total as f32 * vector.scale);
            }
        }
    }
}

/// Room for lines that are not as they are needed; aligned, as otherwise every store would go to two lines of the cache.
#[repr(align(64))]
pub(super) struct Lines<const N: usize>([[u8; 64]; N]);

impl<const N: usize> Lines<N> {
    pub(super) const fn new() -> Self {
        Self([[0; 64]; N])
    }

    /// Lines of a strip, at most `N`: where they lie, or put together here.
    pub(super) fn of<'a>(&'a mut self, signs: SignView<'a>, strip: usize, lines: Range<usize>) -> &'a [[u8; 64]] {
        match signs.strip_lines(strip).and_then(|whole| whole.get(lines.clone())) {
            Some(direct) => direct,
            None => {
                let buffer = &mut self.0[..lines.len()];
                signs.copy_lines(strip, lines.start, buffer);
                buffer
            }
        }
    }
}

/// A vector of a pass: the value of one step of its tables, its coefficients, one a row, and where in y its rows begin.
#[derive(Clone, Copy)]
pub(crate) struct Vector<'a> {
    pub(crate) scale: f32,
    pub(crate) u: &'a [f32],
    pub(crate) y: usize,
}

/// Where the signs of a pass over some rows of a plane are, for prefetching only.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    start: *const u8,
    pub(super) strip_bytes: usize,
    /// From line to line, and from sixteen lines to sixteen lines.
    pub(super) line_bytes: usize,
    pub(super) chunk_bytes: usize,
}

impl Ahead {
    /// Of `rows..` and the columns from `32 * first_line` on. Rows need not exist.
    pub(crate) fn new(signs: SignView<'_>, first_row: usize, first_line: usize) -> Self {
        let row_bytes = signs.cols().div_ceil(8);
        let start = signs.as_bytes().as_ptr().wrapping_add(first_row * row_bytes);
        let strip_bytes = LINE_ROWS * row_bytes;
        match signs.layout() {
            SignLayout::Rows => {
                let start = start.wrapping_add(LINE_COLS / 8 * first_line);
                Self { start, strip_bytes, line_bytes: row_bytes, chunk_bytes: 64 }
            }
            SignLayout::Strips => {
                Self { start: start.wrapping_add(64 * first_line), strip_bytes, line_bytes: 64, chunk_bytes: 16 * 64 }
            }
        }
    }

    /// What to prefetch with a line of a strip of the pass.
    #[inline]
    pub(super) fn line(self, strip: usize, line: usize) -> *const u8 {
        self.strip(strip).wrapping_add(line / 16 * self.chunk_bytes + line % 16 * self.line_bytes)
    }

    /// Where strip `strip` of the pass begins.
    #[inline]
    pub(super) fn strip(self, strip: usize) -> *const u8 {
        self.start.wrapping_add(strip * self.strip_bytes)
    }
}

/// The rows and columns of one pass over a plane: all of `rows`, which begin with a strip, and lines `lines` of 32 columns.
pub(crate) struct Part<'a> {
    pub(crate) signs: SignView<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) lines: Range<usize>,
}

/// One pass over a plane: `y[v][r] += u[v][r] · scale[v] · Σ ± z[v]` over the rows and columns of `part`. As many bytes from `ahead` are
/// brought into the second-level cache.
pub(crate) fn pass(isa: Isa, part: &Part<'_>, tables: &[Line], vectors: &[Vector<'_>], y: &mut [f32], ahead: Ahead) {
    assert!(has(isa));
    let rows = part.rows.len();
    assert!(part.rows.start.is_multiple_of(LINE_ROWS) && part.rows.end <= part.signs.rows());
    assert!(vectors.iter().all(|v| v.u.len() == rows && v.y <= y.len() && rows <= y.len() - v.y));
    let lines = part.lines.len();
    assert!(lines <= PASS_LINES / vectors.len() && tables.len() == table_lines(lines, vectors.len()));
    macro_rules! of {
        ($($n:literal => $strips:literal,)*) => {
            match (vectors.len(), isa) {
                $(
                    #[cfg(target_arch = "x86_64")]
                    ($n, Isa::Avx512Vnni | Isa::Amx) => {
                        let vectors = vectors.first_chunk().expect("of this length");
                        // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
                        unsafe { avx512::pass::<$n, $strips>(part, tables, vectors, y, ahead) }
                    }
                    #[cfg(target_arch = "x86_64")]
                    ($n, Isa::Avx2 | Isa::Avx512) => {
                        let vectors = vectors.first_chunk().expect("of this length");
                        // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
                        unsafe { avx2::pass::<$n>(part, tables, vectors, y, ahead) }
                    }
                    #[cfg(target_arch = "aarch64")]
                    ($n, Isa::Neon) => {
                        let vectors = vectors.first_chunk().expect("of this length");
                        // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
                        unsafe { neon::pass::<$n>(part, tables, vectors, y) }
                    }
                )*
                (n, _) => unreachable!("{isa} has no kernels here for {n} vectors: {:?}", ahead.strip(0)),
            }
        };
    }
    of!(1 => 4, 2 => 4, 4 => 2,);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_sums_there_are_come_out_whole() {
        const ROWS: usize = 3 * LINE_ROWS + 5;
        for n_lines in [1, 31, 32, 33, 64, 65, 256] {
            for vectors in [1, 2, 4] {
                let n_lines = n_lines.min(PASS_LINES / vectors);
                let cols = n_lines * LINE_COLS;
                // Every magnitude the same, so that every table has the largest code there is, at the pattern of z's own signs and its opposite.
                let z: Vec<f32> = (0..cols).map(|c| if c % 3 == 0 { -1.0 } else { 1.0 }).collect();
                let own: Vec<u8> = z.chunks(8).map(|z| (0..8).map(|i| u8::from(z[i] > 0.0) << i).sum()).collect();
                // Rows in turn: all agree with z, none does, half of them do.
                let expected = |r: usize| [cols as f32, -(cols as f32), 0.0][r % 3];
                let signs: Vec<u8> =
                    (0..ROWS).flat_map(|r| own.iter().map(move |&own| [own, !own, own ^ 0x0f][r % 3])).collect();
                let mut strips = signs.clone();
                bitstack_core::to_strips(ROWS, cols, &mut strips).unwrap();
                for isa in Isa::available().filter(|&isa| has(isa)) {
                    let mut tables = vec![Line::default(); table_lines(n_lines, vectors)];
                    let scales: Vec<f32> =
                        (0..vectors).map(|v| build(isa, &z, &mut tables, v, vectors).unwrap()).collect();
                    for (layout, signs) in [(SignLayout::Rows, &signs), (SignLayout::Strips, &strips)] {
                        let signs = SignView::with_layout(ROWS, cols, layout, signs).unwrap();
                        let u = [2.0; ROWS];
                        let of = |v: usize| Vector { scale: scales[v], u: &u, y: v * ROWS };
                        let all: Vec<Vector<'_>> = (0..vectors).map(of).collect();
                        let mut y = vec![1.0; vectors * ROWS];
                        let part = Part { signs, rows: 0..ROWS, lines: 0..n_lines };
                        pass(isa, &part, &tables, &all, &mut y, Ahead::new(signs, 0, 0));
                        for (i, y) in y.iter().enumerate() {
                            // Sums are exact; then two roundings of f32, and that of the step.
                            let expected = 2.0 * expected(i % ROWS) + 1.0;
                            let what = format!("{isa}, {n_lines} lines, {vectors} vectors, {layout:?}, {i}");
                            assert!(
                                (y - expected).abs() <= 4.0 * f32::EPSILON * expected.abs(),
                                "{what}: {y}, not {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
}
