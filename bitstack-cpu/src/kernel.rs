//! The loops, per instruction set, behind one dispatch point.

use std::marker::PhantomData;

use bitstack_core::SignView;

pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod codes;
pub(crate) mod dense;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod scalar;
pub(crate) mod tables;
pub(crate) mod tile;

/// A register of a table, aligned for it.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

impl Default for Line {
    fn default() -> Self {
        Self([0; 64])
    }
}

/// A rectangle of a sign matrix: a run of bytes in each of some rows. It is within the matrix, always.
#[derive(Clone, Copy)]
pub(crate) struct Signs<'a> {
    start: *const u8,
    row_bytes: usize,
    rows: usize,
    run_bytes: usize,
    matrix: PhantomData<&'a [u8]>,
}

impl<'a> Signs<'a> {
    /// Bytes `first_byte..first_byte + run_bytes` of rows `first_row..first_row + rows`. Panics when they are not all there.
    pub(crate) fn new(
        matrix: SignView<'a>,
        first_row: usize,
        rows: usize,
        first_byte: usize,
        run_bytes: usize,
    ) -> Self {
        let row_bytes = matrix.cols().div_ceil(8);
        assert!(rows <= matrix.rows() && first_row <= matrix.rows() - rows, "rows of a sign matrix");
        assert!(run_bytes <= row_bytes && first_byte <= row_bytes - run_bytes, "columns of a sign matrix");
        let start = matrix.as_bytes().as_ptr().wrapping_add(first_row * row_bytes + first_byte);
        Self { start, row_bytes, rows, run_bytes, matrix: PhantomData }
    }

    /// The run of row `row`.
    fn run(self, row: usize) -> &'a [u8] {
        assert!(row < self.rows);
        // SAFETY: the run must be valid for reading for `'a`: it is in the matrix, which is borrowed for `'a`, as the row exists.
        unsafe { std::slice::from_raw_parts(self.pointer(row), self.run_bytes) }
    }

    /// Where the run of row `row` begins; within the matrix if there is such a row.
    fn pointer(self, row: usize) -> *const u8 {
        self.start.wrapping_add(row * self.row_bytes)
    }
}
