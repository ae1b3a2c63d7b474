//! Ordinary matrices in f32, f16 or bf16.

use std::ops::Range;

use bitstack_core::Threads;
use bitstack_cpu::{DenseValues, Kernel};
use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

use crate::decoder::Transposed;
use crate::math;

/// Tokens up to which a product is made on the way, as its weight comes from memory; for more, from panels of the weight widened in the cache.
const FEW: usize = 2;

/// Elements of a matrix, kept in the type they were stored in. All three widen to f32 exactly.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Elements {
    /// 32-bit.
    F32(Vec<f32>),
    /// IEEE half precision.
    F16(Vec<f16>),
    /// The upper half of an f32.
    Bf16(Vec<bf16>),
}

impl Elements {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in memory.
    pub fn len_bytes(&self) -> usize {
        self.len() * if matches!(self, Self::F32(_)) { 4 } else { 2 }
    }

    /// All elements as f32, without a copy where they are f32 already.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(v) => v,
            wide => {
                let mut out = vec![0.0; wide.len()];
                wide.widen(0..wide.len(), &mut out);
                out
            }
        }
    }

    fn values(&self) -> DenseValues<'_> {
        match self {
            Self::F32(v) => DenseValues::F32(v),
            Self::F16(v) => DenseValues::F16(v),
            Self::Bf16(v) => DenseValues::Bf16(v),
        }
    }

    fn widen(&self, range: Range<usize>, out: &mut [f32]) {
        match self {
            Self::F32(v) => out.copy_from_slice(&v[range]),
            Self::F16(v) => v[range].convert_to_f32_slice(out),
            Self::Bf16(v) => {
                for (wide, narrow) in out.iter_mut().zip(&v[range]) {
                    *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
                }
            }
        }
    }
}

/// An ordinary matrix, row-major.
///
/// 16-bit elements are widened a panel of rows at a time, on the way to the product, so that a large model takes no more
/// memory than its file; the results are those of the widened matrix, bit for bit.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    rows: usize,
    cols: usize,
    elements: Elements,
}

impl Dense {
    /// A matrix from its elements in row-major order; `None` when their number is not `rows * cols`.
    pub fn new(rows: usize, cols: usize, elements: Elements) -> Option<Self> {
        (rows.checked_mul(cols) == Some(elements.len())).then_some(Self { rows, cols, elements })
    }

    /// The elements, row-major.
    pub fn elements(&self) -> &Elements {
        &self.elements
    }

    /// The elements, taken out.
    pub fn into_elements(self) -> Elements {
        self.elements
    }

    /// The same matrix stored as f32: twice the memory of a 16-bit one, and nothing left to widen on every use.
    pub fn widened(self) -> Self {
        Self { elements: Elements::F32(self.elements.into_f32()), ..self }
    }
}

impl Dense {
    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Copies row `row` into `out`, which has as many elements as there are columns.
    ///
    /// # Panics
    /// When there is no such row, or `out` is not as long.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        self.elements.widen(row * self.cols..(row + 1) * self.cols, out);
    }

    /// `y = x Wᵀ`: `x` is tokens x cols; `y` tokens x rows and is overwritten. The result does not depend on `threads`.
    ///
    /// # Panics
    /// When a shape does not fit.
    pub fn product(&self, x: &[f32], y: &mut [f32], threads: Threads) {
        if x.len() <= FEW * self.cols && self.cols > 0 {
            let done = Kernel::detect().apply_dense(self.elements.values(), self.cols, x, y, threads);
            return done.expect("a matrix of its shape, and shapes that fit");
        }
        match &self.elements {
            Elements::F32(w) => {
                for_each_panel(self.rows, self.cols, x, y, threads, |rows, x, y| {
                    product(y, x, &w[rows.start * self.cols..rows.end * self.cols]);
                });
            }
            narrow => for_each_panel(self.rows, self.cols, x, y, threads, |rows, x, y| {
                let mut panel = vec![0.0; rows.len() * self.cols];
                narrow.widen(rows.start * self.cols..rows.end * self.cols, &mut panel);
                product(y, x, &panel);
            }),
        }
    }
}

impl Transposed for Dense {
    fn add_transposed(&self, g: ArrayView2<'_, f32>, mut x: ArrayViewMut2<'_, f32>) {
        let tokens = g.nrows();
        assert_eq!((g.ncols(), x.dim()), (self.rows, (tokens, self.cols)), "g is tokens x rows, x tokens x cols");
        let g = MatRef::from_row_major_slice(g.as_slice().expect("g is in row order"), tokens, self.rows);
        let x = x.as_slice_mut().expect("x is in row order");
        let mut x = MatMut::from_row_major_slice_mut(x, tokens, self.cols);
        if let Elements::F32(w) = &self.elements {
            let w = MatRef::from_row_major_slice(w, self.rows, self.cols);
            return math::add_product(x, g, w, 1.0);
        }
        let step = panel_rows(tokens, self.cols);
        let mut panel = vec![0.0; step * self.cols];
        for start in (0..self.rows).step_by(step) {
            let n = step.min(self.rows - start);
            let panel = &mut panel[..n * self.cols];
            self.elements.widen(start * self.cols..(start + n) * self.cols, panel);
            let panel = MatRef::from_row_major_slice(panel, n, self.cols);
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
                dense.product(x.as_slice().unwrap(), &mut y, threads);
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

    #[test]
    fn a_matrix_of_the_wrong_number_of_elements_is_rejected() {
        assert!(Dense::new(2, 3, Elements::F32(vec![0.0; 5])).is_none());
        assert!(Dense::new(usize::MAX, 2, Elements::F32(Vec::new())).is_none());
    }
}
