//! Products by tables of the sums of four columns, behind a safe interface: AVX-512 with VBMI and VNNI only.

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::{Line, Signs};
use crate::Isa;

/// Columns are padded to a multiple of this: a register of signs of one row.
pub(crate) const CHUNK_COLS: usize = 512;

/// Columns of a pass over one vector; 1/V of it over V vectors. Its tables take 16 KiB, half of a small first-level cache.
const PASS_COLS: usize = 2048;

/// Columns of a pass over `vectors` vectors.
pub(crate) fn pass_cols(vectors: usize) -> usize {
    PASS_COLS / vectors
}

/// Table registers of `cols` columns of `vectors` vectors: per 32 columns two nibbles, and per vector high and low bytes.
pub(crate) fn table_lines(cols: usize, vectors: usize) -> usize {
    cols / 32 * 4 * vectors
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
    assert!(z.len().is_multiple_of(32) && tables.len() == table_lines(z.len(), vectors) && vector < vectors);
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

/// One pass over a plane: `y[v][r] += u[v][r] · scale[v] · Σ ± z[v]` over the columns of the pass and the rows of `signs`. From
/// `next` on, as many bytes as it reads are brought into the second-level cache.
pub(crate) fn pass(signs: Signs<'_>, tables: &[Line], vectors: &[Vector<'_>], y: &mut [f32], next: *const u8) {
    assert!(has(Isa::Avx512Vnni));
    assert!(vectors.iter().all(|v| v.u.len() == signs.rows && v.y <= y.len() && signs.rows <= y.len() - v.y));
    let cols = (8 * signs.run_bytes).next_multiple_of(CHUNK_COLS);
    assert!(cols <= pass_cols(vectors.len()) && tables.len() == table_lines(cols, vectors.len()));
    #[cfg(target_arch = "x86_64")]
    macro_rules! of {
        ($($n:literal)*) => {
            match vectors.len() {
                // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
                $($n => unsafe { avx512::pass::<$n>(signs, tables, vectors.first_chunk().expect("of this length"), y, next) },)*
                n => unreachable!("a pass over {n} vectors"),
            }
        };
    }
    #[cfg(target_arch = "x86_64")]
    of!(1 2 4);
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no CPU of this architecture has AVX-512: {next:?}");
}
