//! Products with ordinary matrices.
//!
//! 16-bit elements of a [`Dense`] are widened a panel of rows at a time, on the way to the product; the results are those of the widened
//! matrix, bit for bit.

use std::ops::Range;

use bitstack_core::Threads;
use bitstack_cpu::{DenseValues, Kernel};
use bitstack_model::{Dense, Elements};
use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

use crate::math;

/// Tokens up to which a product is made on the way, as its weight comes from memory; for more, from panels of the weight widened in the cache.
const FEW: usize = 2;

/// A weight that can also be multiplied from the other side, on the CPU.
pub trait Transposed {
    /// `x += g W`: `g` is tokens x rows, `x` tokens x cols, both row-major; on the calling thread.
    fn add_transposed(&self, g: ArrayView2<'_, f32>, x: ArrayViewMut2<'_, f32>);
}

/// The elements as the kernels take them.
fn values(elements: &Elements) -> DenseValues<'_> {
    match elements {
        Elements::F32(v) => DenseValues::F32(v),
        Elements::F16(v) => DenseValues::F16(v),
        Elements::Bf16(v) => DenseValues::Bf16(v),
    }
}

/// `y = x Wᵀ`: `x` is tokens x cols; `y` tokens x rows and is overwritten. The result does not depend on `threads`.
///
/// # Panics
/// When a shape does not fit.
pub(crate) fn dense_product(weight: &Dense, x: &[f32], y: &mut [f32], threads: Threads) {
    let [rows, cols] = weight.shape();
    if x.len() <= FEW * cols && cols > 0 {
        let done = Kernel::detect().apply_dense(values(weight.elements()), cols, x, y, threads);
        return done.expect("a matrix of its shape, and shapes that fit");
    }
    match weight.elements() {
        Elements::F32(w) => for_each_panel(rows, cols, x, y, threads, |range, x, y| {
            product(y, x, &w[range.start * cols..range.end * cols]);
        }),
        narrow => for_each_panel(rows, cols, x, y, threads, |range, x, y| {
            let mut panel = vec![0.0; range.len() * cols];
            narrow.widen(range.start * cols..range.end * cols, &mut panel);
            product(y, x, &panel);
        }),
    }
}

impl Transposed for Dense {
    fn add_transposed(&self, g: ArrayView2<'_, f32>, mut x: ArrayViewMut2<'_, f32>) {
        let ([rows, cols], tokens) = (self.shape(), g.nrows());
        assert_eq!((g.ncols(), x.dim()), (rows, (tokens, cols)), "g is tokens x rows, x tokens x cols");
        let g = MatRef::from_row_major_slice(g.as_slice().expect("g is in row order"), tokens, rows);
        let x = x.as_slice_mut().expect("x is in row order");
        let mut x = MatMut::from_row_major_slice_mut(x, tokens, cols);
        if let Elements::F32(w) = self.elements() {
            let w = MatRef::from_row_major_slice(w, rows, cols);
            return math::add_product(x, g, w, 1.0);
        }
        let step = panel_rows(tokens, cols);
        let mut panel = vec![0.0; step * cols];
        for start in (0..rows).step_by(step) {
            let n = step.min(rows - start);
            let panel = &mut panel[..n * cols];
            self.elements().widen(start * cols..(start + n) * cols, panel);
            let panel = MatRef::from_row_major_slice(panel, n, cols);
            math::add_product(x.rb_mut(), g.subcols(start, n), panel, 1.0);
        }
    }
}

/// `y = x panelᵀ`, with `panel` as many rows as `y` has columns.
fn product(y: MatMut<'_, f32>, x: MatRef<'_, f32>, panel: &[f32]) {
    let panel = MatRef::from_row_major_slice(panel, y.ncols(), x.ncols());
    math::product(y, x, panel.transpose(), 1.0);
}

/// Rows of a panel: enough that packing `x` for each of them does not count, and for a few tokens, where nothing but the
/// reading of `W` counts, few enough that a widened panel stays in the second-level cache.
fn panel_rows(tokens: usize, cols: usize) -> usize {
    if tokens >= 16 { 256 } else { ((1 << 16) / cols.max(1)).clamp(16, 256) }
}

/// Calls `work(rows, x, columns `rows` of y)` for all panels of `W`. Panels are as large as the cache likes; their size depends on the shapes
/// only, so the result does not depend on the number of threads.
fn for_each_panel(
    rows: usize,
    cols: usize,
    x: &[f32],
    y: &mut [f32],
    threads: Threads,
    work: impl Fn(Range<usize>, MatRef<'_, f32>, MatMut<'_, f32>) + Sync,
) {
    if y.is_empty() {
        return;
    }
    let tokens = y.len() / rows;
    let x = MatRef::from_row_major_slice(x, tokens, cols);
    let mut y = MatMut::from_row_major_slice_mut(y, tokens, rows);
    let step = panel_rows(tokens, cols);
    // Below this the cost of waking other threads is not earned back.
    let small = tokens.saturating_mul(rows * cols) < 1 << 18;
    if threads == Threads::One || small {
        for start in (0..rows).step_by(step) {
            let end = rows.min(start + step);
            work(start..end, x, y.rb_mut().subcols_mut(start, end - start));
        }
    } else {
        y.par_col_chunks_mut(step).enumerate().for_each(|(i, y)| {
            let start = i * step;
            work(start..start + y.ncols(), x, y);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use ndarray::Array2;

    fn pattern(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(r, c)| ((r * 31 + c * 17 + seed) % 23) as f32 / 8.0 - 1.25)
    }

    /// Against one sum per element in f64; the values are multiples of 1/8 below 2, so f32 sums are exact too.
    fn check(rows: usize, cols: usize, tokens: usize) {
        let w = pattern(rows, cols, 3);
        let x = pattern(tokens, cols, 5);
        let expected = Array2::from_shape_fn((tokens, rows), |(t, r)| {
            (0..cols).map(|c| f64::from(x[[t, c]]) * f64::from(w[[r, c]])).sum::<f64>() as f32
        });
        let values = w.iter().copied();
        for elements in [
            Elements::F32(values.clone().collect()),
            Elements::F16(values.clone().map(f16::from_f32).collect()),
            Elements::Bf16(values.clone().map(bf16::from_f32).collect()),
        ] {
            let dense = Dense::new(rows, cols, elements).unwrap();
            for threads in [Threads::One, Threads::Pool] {
                let mut y = vec![f32::NAN; tokens * rows];
                dense_product(&dense, x.as_slice().unwrap(), &mut y, threads);
                assert_eq!(y, expected.as_slice().unwrap(), "{rows} x {cols}, {tokens} tokens, {threads:?}");
            }
            let mut row = vec![0.0; cols];
            dense.row_into(rows - 1, &mut row);
            assert_eq!(row, w.row(rows - 1).to_vec());
        }
    }

    #[test]
    fn products_equal_the_sums_they_stand_for() {
        for (rows, cols) in [(1, 1), (3, 5), (255, 17), (256, 64), (257, 64), (600, 129)] {
            for tokens in [1, 2, 15, 16, 33] {
                check(rows, cols, tokens);
            }
        }
    }
}
