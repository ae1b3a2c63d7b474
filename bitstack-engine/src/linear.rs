//! Linear operators: what a decoder multiplies by, and the dense one.
//!
//! A decoder never sees a weight, only something that can multiply by it ([`LinearOp`]). [`Dense`] is an ordinary matrix
//! in f32, f16 or bf16; others rebuild their weight, or never do.
//!
//! 16-bit elements of a [`Dense`] are widened a panel of rows at a time, on the way to the product; the results are those of the widened
//! matrix, bit for bit.

use std::ops::Range;
use std::sync::Arc;

use bitstack_cpu::{DenseValues, Kernel};
use bitstack_model::{Dense, Elements};
use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, CowArray};
use rayon::prelude::*;

use crate::decoder::Transposed;
use crate::math;

/// Whether one call may spread over the threads of the current rayon pool. The results are the same bits either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Threads {
    /// Stay on the calling thread: right when many calls (windows of text) already run side by side.
    #[default]
    One,
    /// Use the pool: right for a single sequence.
    Pool,
}

impl From<Threads> for bitstack_cpu::Threads {
    fn from(threads: Threads) -> Self {
        match threads {
            Threads::One => Self::One,
            Threads::Pool => Self::Pool,
        }
    }
}

/// Tokens up to which a product is made on the way, as its weight comes from memory; for more, from panels of the weight widened in the cache.
const FEW: usize = 2;

/// A weight `W`, rows x cols (output x input features), known by what it does to vectors.
pub trait LinearOp: Send + Sync {
    /// Output features.
    fn rows(&self) -> usize;

    /// Input features.
    fn cols(&self) -> usize;

    /// `y = x Wᵀ`: `x` is tokens x cols, `y` tokens x rows and is overwritten.
    ///
    /// The result must not depend on `threads`.
    ///
    /// # Panics
    /// May panic when a shape does not fit; the decoder checks shapes once, when it is built.
    fn apply(&self, x: ArrayView2<'_, f32>, y: ArrayViewMut2<'_, f32>, threads: Threads);

    /// Copies row `row` of `W` (a token's embedding) into `out`, which has `cols` elements.
    ///
    /// # Panics
    /// May panic when `row` or the length of `out` does not fit.
    fn row_into(&self, row: usize, out: &mut [f32]);
}

macro_rules! forward_linear_op {
    ($($pointer:ty),*) => {$(
        impl<L: LinearOp + ?Sized> LinearOp for $pointer {
            fn rows(&self) -> usize {
                (**self).rows()
            }
            fn cols(&self) -> usize {
                (**self).cols()
            }
            fn apply(&self, x: ArrayView2<'_, f32>, y: ArrayViewMut2<'_, f32>, threads: Threads) {
                (**self).apply(x, y, threads);
            }
            fn row_into(&self, row: usize, out: &mut [f32]) {
                (**self).row_into(row, out);
            }
        }
    )*};
}

forward_linear_op!(&L, Box<L>, Arc<L>);

/// The elements as the kernels take them.
fn values(elements: &Elements) -> DenseValues<'_> {
    match elements {
        Elements::F32(v) => DenseValues::F32(v),
        Elements::F16(v) => DenseValues::F16(v),
        Elements::Bf16(v) => DenseValues::Bf16(v),
    }
}

impl LinearOp for Dense {
    fn rows(&self) -> usize {
        self.rows()
    }

    fn cols(&self) -> usize {
        self.cols()
    }

    fn apply(&self, x: ArrayView2<'_, f32>, mut y: ArrayViewMut2<'_, f32>, threads: Threads) {
        if x.nrows() <= FEW
            && self.cols() > 0
            && let (Some(x), Some(y)) = (x.as_slice(), y.as_slice_mut())
        {
            let done = Kernel::detect().apply_dense(values(self.elements()), self.cols(), x, y, threads.into());
            return done.expect("a matrix of its shape, and shapes that fit");
        }
        match self.elements() {
            Elements::F32(w) => {
                for_each_panel(self.rows(), self.cols(), x, y, threads, |rows, x, y| {
                    product(y, x, &w[rows.start * self.cols()..rows.end * self.cols()]);
                });
            }
            narrow => apply_by_panels(self.rows(), self.cols(), x, y, threads, |rows, panel| {
                narrow.widen(rows.start * self.cols()..rows.end * self.cols(), panel);
            }),
        }
    }

    fn row_into(&self, row: usize, out: &mut [f32]) {
        self.elements().widen(row * self.cols()..(row + 1) * self.cols(), out);
    }
}

impl Transposed for Dense {
    fn add_transposed(&self, g: ArrayView2<'_, f32>, mut x: ArrayViewMut2<'_, f32>) {
        let tokens = g.nrows();
        assert_eq!((g.ncols(), x.dim()), (self.rows(), (tokens, self.cols())), "g is tokens x rows, x tokens x cols");
        let g = MatRef::from_row_major_slice(g.as_slice().expect("g is in row order"), tokens, self.rows());
        let x = x.as_slice_mut().expect("x is in row order");
        let mut x = MatMut::from_row_major_slice_mut(x, tokens, self.cols());
        if let Elements::F32(w) = self.elements() {
            let w = MatRef::from_row_major_slice(w, self.rows(), self.cols());
            return math::add_product(x, g, w, 1.0);
        }
        let step = panel_rows(tokens, self.cols());
        let mut panel = vec![0.0; step * self.cols()];
        for start in (0..self.rows()).step_by(step) {
            let n = step.min(self.rows() - start);
            let panel = &mut panel[..n * self.cols()];
            self.elements().widen(start * self.cols()..(start + n) * self.cols(), panel);
            let panel = MatRef::from_row_major_slice(panel, n, self.cols());
            math::add_product(x.rb_mut(), g.subcols(start, n), panel, 1.0);
        }
    }
}

/// `y = x Wᵀ` for a weight that is produced a panel of rows at a time and never exists as a whole.
///
/// `fill(rows, panel)` writes the rows in the range `rows` of `W` (rows x cols) into `panel`, row-major, as f32; it may be
/// called from several threads. Panels are as large as the cache likes; their size depends on the shapes only, so the
/// result does not depend on the number of threads.
///
/// # Panics
/// When `x` is not tokens x cols or `y` not tokens x rows.
pub fn apply_by_panels(
    rows: usize,
    cols: usize,
    x: ArrayView2<'_, f32>,
    y: ArrayViewMut2<'_, f32>,
    threads: Threads,
    fill: impl Fn(Range<usize>, &mut [f32]) + Sync,
) {
    for_each_panel(rows, cols, x, y, threads, |range, x, y| {
        let mut panel = vec![0.0; range.len() * cols];
        fill(range, &mut panel);
        product(y, x, &panel);
    });
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

/// Calls `work(rows, x, columns `rows` of y)` for all panels of `W`.
fn for_each_panel(
    rows: usize,
    cols: usize,
    x: ArrayView2<'_, f32>,
    mut y: ArrayViewMut2<'_, f32>,
    threads: Threads,
    work: impl Fn(Range<usize>, MatRef<'_, f32>, MatMut<'_, f32>) + Sync,
) {
    let tokens = x.nrows();
    assert_eq!(x.ncols(), cols, "x has as many columns as the weight");
    assert_eq!(y.dim(), (tokens, rows), "y is tokens x rows");
    if tokens == 0 || rows == 0 {
        return;
    }
    if !y.is_standard_layout() {
        let mut copy = Array2::zeros(y.raw_dim());
        for_each_panel(rows, cols, x, copy.view_mut(), threads, work);
        y.assign(&copy);
        return;
    }
    let x: CowArray<'_, f32, _> = x.as_standard_layout();
    let x = MatRef::from_row_major_slice(x.as_slice().expect("made standard above"), tokens, cols);
    let y = y.as_slice_mut().expect("checked above");
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
                let mut y = Array2::from_elem((tokens, rows), f32::NAN);
                dense.apply(x.view(), y.view_mut(), threads);
                assert_eq!(y, expected, "{rows} x {cols}, {tokens} tokens, {threads:?}");
                let mut turned = Array2::from_elem((rows, tokens), f32::NAN);
                let x_turned = x.t().as_standard_layout().into_owned();
                dense.apply(x_turned.t(), turned.view_mut().reversed_axes(), threads);
                assert_eq!(turned.t(), expected, "column-major views");
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
