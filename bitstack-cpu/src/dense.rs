//! Products with ordinary matrices: how a model runs that is not compressed.

use rayon::prelude::*;

use crate::kernel::dense::{self, DenseValues};
use crate::{CpuError, Kernel, Threads};

/// Elements of a task at most. They take as long to read as a thread to wake several times over.
const TASK: usize = 1 << 16;

impl Kernel {
    /// y = x Wᵀ for a dense W of `cols` columns, with sums in f32. W is read once for every two tokens, as fast as memory gives it; for
    /// many tokens [`Kernel::apply_dense_to_many`] is faster.
    ///
    /// # Shapes
    /// `w`: rows x cols; `x`: tokens x cols; `y`: tokens x rows, overwritten; all row-major. Rows and tokens are what the lengths say.
    ///
    /// # Errors
    /// [`CpuError::PartialRow`], [`CpuError::PartialToken`] and [`CpuError::OutputLength`] when the lengths do not fit; `y` is untouched then.
    pub fn apply_dense(
        &self,
        w: DenseValues<'_>,
        cols: usize,
        x: &[f32],
        y: &mut [f32],
        threads: Threads,
    ) -> Result<(), CpuError> {
        let rows = rows(w, cols, x, y)?;
        if rows == 0 {
            return Ok(());
        }
        for (x, y) in x.chunks(2 * cols).zip(y.chunks_mut(2 * rows)) {
            if x.len() == cols {
                self.rows(w, [x], [y], threads);
            } else {
                let ((x, second_x), (y, second_y)) = (x.split_at(cols), y.split_at_mut(rows));
                self.rows(w, [x, second_x], [y, second_y], threads);
            }
        }
        Ok(())
    }

    /// As [`Kernel::apply_dense`], for many tokens: W is read once, and widened to f32 a tile at a time in the cache. Takes memory for a copy
    /// of `x`.
    ///
    /// # Errors
    /// As [`Kernel::apply_dense`].
    pub fn apply_dense_to_many(
        &self,
        w: DenseValues<'_>,
        cols: usize,
        x: &[f32],
        y: &mut [f32],
        threads: Threads,
    ) -> Result<(), CpuError> {
        let rows = rows(w, cols, x, y)?;
        if y.is_empty() {
            return Ok(());
        }
        let panels = dense::panels(x, cols);
        // Tasks of rows: their part of y, a piece for each token.
        let mut tasks: Vec<Vec<&mut [f32]>> = (0..rows.div_ceil(dense::TASK_ROWS)).map(|_| Vec::new()).collect();
        for y in y.chunks_exact_mut(rows) {
            tasks.iter_mut().zip(y.chunks_mut(dense::TASK_ROWS)).for_each(|(task, y)| task.push(y));
        }
        let run = |(i, y): (usize, &mut Vec<&mut [f32]>)| {
            let (w, _) = w.split_at(i * dense::TASK_ROWS * cols).1.split_at(y[0].len() * cols);
            dense::tiles(self.isa(), w, cols, &panels, y);
        };
        match threads {
            Threads::One => tasks.iter_mut().enumerate().for_each(run),
            Threads::Pool => tasks.par_iter_mut().enumerate().for_each(run),
        }
        Ok(())
    }

    fn rows<const V: usize>(self, w: DenseValues<'_>, x: [&[f32]; V], y: [&mut [f32]; V], threads: Threads) {
        let (rows, cols) = (y[0].len(), x[0].len());
        if threads == Threads::One || rows == 1 || w.len() <= TASK {
            return dense::rows(self.isa(), w, x, y);
        }
        let half = rows / 2;
        let (w_top, w_bottom) = w.split_at(half * cols);
        let mut halves = y.map(|y| y.split_at_mut(half));
        let top = halves.each_mut().map(|(top, _)| std::mem::take(top));
        let bottom = halves.map(|(_, bottom)| bottom);
        rayon::join(|| self.rows(w_top, x, top, threads), || self.rows(w_bottom, x, bottom, threads));
    }
}

/// Rows of W, where the lengths fit.
fn rows(w: DenseValues<'_>, cols: usize, x: &[f32], y: &[f32]) -> Result<usize, CpuError> {
    if cols == 0 || !w.len().is_multiple_of(cols) {
        return Err(CpuError::PartialRow { cols, len: w.len() });
    }
    if !x.len().is_multiple_of(cols) {
        return Err(CpuError::PartialToken { cols, len: x.len() });
    }
    let (rows, tokens) = (w.len() / cols, x.len() / cols);
    // Saturating: a product that overflows is longer than any slice.
    let expected = tokens.saturating_mul(rows);
    if y.len() != expected {
        return Err(CpuError::OutputLength { tokens, rows, expected, actual: y.len() });
    }
    Ok(rows)
}
