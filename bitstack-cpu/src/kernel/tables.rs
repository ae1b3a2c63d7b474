//! Products by tables of the sums of four columns, behind a safe interface: AVX-512 with VBMI and VNNI only.

use std::ops::Range;

use bitstack_core::{SignLayout, SignView};

use super::Line;
#[cfg(target_arch = "x86_64")]
use super::avx512;
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

/// Whether there are kernels for `isa` here.
pub(crate) fn has(isa: Isa) -> bool {
    matches!(isa, Isa::Avx512Vnni | Isa::Amx) && isa.is_available()
}

/// Makes the tables of one pass for vector `vector` of `vectors`, and returns the value of one step. `None` when the sums cannot be
/// represented: some are not finite, or all are tiny and not zero.
///
/// `tables` is `units of 32 columns x 2 nibbles x vectors x (high, low)`.
pub(crate) fn build(z: &[f32], tables: &mut [Line], vector: usize, vectors: usize) -> Option<f32> {
    assert!(has(Isa::Avx512Vnni));
    assert!(z.len().is_multiple_of(LINE_COLS) && vector < vectors);
    assert!(tables.len() == table_lines(z.len() / LINE_COLS, vectors));
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
    return unsafe { avx512::build(z, tables, vector, vectors) };
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no CPU of this architecture has AVX-512");
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
pub(crate) fn pass(part: &Part<'_>, tables: &[Line], vectors: &[Vector<'_>], y: &mut [f32], ahead: Ahead) {
    assert!(has(Isa::Avx512Vnni));
    let rows = part.rows.len();
    assert!(part.rows.start.is_multiple_of(LINE_ROWS) && part.rows.end <= part.signs.rows());
    assert!(vectors.iter().all(|v| v.u.len() == rows && v.y <= y.len() && rows <= y.len() - v.y));
    let lines = part.lines.len();
    assert!(lines <= PASS_LINES / vectors.len() && tables.len() == table_lines(lines, vectors.len()));
    #[cfg(target_arch = "x86_64")]
    macro_rules! of {
        ($($n:literal => $strips:literal,)*) => {
            match vectors.len() {
                $($n => {
                    let vectors = vectors.first_chunk().expect("of this length");
                    // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
                    unsafe { avx512::pass::<$n, $strips>(part, tables, vectors, y, ahead) }
                },)*
                n => unreachable!("a pass over {n} vectors"),
            }
        };
    }
    #[cfg(target_arch = "x86_64")]
    of!(1 => 4, 2 => 4, 4 => 2,);
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no CPU of this architecture has AVX-512: {:?}", ahead.strip(0));
}
