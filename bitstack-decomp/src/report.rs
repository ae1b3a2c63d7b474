//! What a decomposition hands out, and the error of a weight's outputs.

use crate::DecompError;
use crate::scaled::{exp2, scaled, sum_of_squares};
use bitstack_core::{Block, SignMatrix, SignView, WeightStack};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use ndarray::ArrayView2;

/// The error of a weight W at a level: W_b is the sum of its first b blocks, with the factors as stored.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct LevelReport {
    /// ‖(W−W_b)·diag(s)‖²_F, s = 1 without scales.
    pub squared_error: f64,
    /// ‖(W−W_b)·diag(s)‖_F / ‖W·diag(s)‖_F; 0 for a weight of zeros.
    pub relative_error: f64,
    /// The error of the outputs, when a Gram matrix was given.
    pub output: Option<OutputReport>,
}

/// The error of the outputs of a weight, per token, under its input Gram matrix H.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct OutputReport {
    /// tr((W−W_b) H (W−W_b)ᵀ).
    pub squared_error: f64,
    /// √(tr((W−W_b) H (W−W_b)ᵀ) / tr(W H Wᵀ)): a ratio of norms; 0 when the divisor is.
    pub relative_error: f64,
}

/// One block and the error of the weight with it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Step {
    /// The block.
    pub block: Block,
    /// The error at the level that ends with this block.
    pub error: LevelReport,
}

/// All blocks of a weight.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Decomposition {
    /// The blocks.
    pub stack: WeightStack,
    /// The error at level `b` is `errors[b - 1]`.
    pub errors: Vec<LevelReport>,
}

/// Columns of H handled at a time; a panel of T then fits the caches.
const PANEL_COLS: usize = 256;
const PANEL_ROWS: usize = 256;

/// tr(R diag(1/s) H diag(1/s) Rᵀ) for residuals R of W·diag(s).
pub(crate) struct OutputMetric {
    /// G = diag(1/s) H diag(1/s) / `unit`, lower triangle by panels of columns: inside a diagonal panel all of it, below that twice
    /// the values, so that each pair of columns is multiplied once.
    gram: Mat<f32>,
    unit: f64,
    /// Some rows of R, and their product with a panel of G.
    residual: Vec<f32>,
    product: Vec<f32>,
}

impl OutputMetric {
    pub(crate) fn new(gram: ArrayView2<'_, f64>, inverse_scales: &[f64]) -> Result<Self, DecompError> {
        let cols = inverse_scales.len();
        if gram.dim() != (cols, cols) {
            return Err(DecompError::GramShape { rows: gram.nrows(), cols: gram.ncols(), expected: cols });
        }
        // The trace needs the symmetric part of H only. Halves first: the sum of two large values stays finite.
        let scaled =
            |i: usize, j: usize| (0.5 * gram[(i, j)] + 0.5 * gram[(j, i)]) * (inverse_scales[i] * inverse_scales[j]);
        let mut unit = 0.0f64;
        for ((row, col), &value) in gram.indexed_iter() {
            let scaled = scaled(row, col);
            if !value.is_finite() || !scaled.is_finite() {
                return Err(DecompError::GramNotFinite { row, col, value });
            }
            unit = unit.max(scaled.abs());
        }
        let factor = if unit.is_normal() { 1.0 / unit } else { 0.0 };
        let gram = Mat::from_fn(cols, cols, |i, j| {
            let (panel_i, panel_j) = (i / PANEL_COLS, j / PANEL_COLS);
            let weight = if panel_i == panel_j {
                1.0
            } else if panel_i > panel_j {
                2.0
            } else {
                0.0
            };
            (weight * factor * scaled(i, j)) as f32
        });
        Ok(Self { gram, unit, residual: vec![0.0; PANEL_ROWS * cols], product: vec![0.0; PANEL_ROWS * PANEL_COLS] })
    }

    /// The trace for R = signs ⊙ magnitude. Products in f32, their sum in f64.
    pub(crate) fn squared(&mut self, signs: SignView<'_>, magnitude: &[f32], par: Par) -> f64 {
        let (rows, cols) = (signs.rows(), signs.cols());
        let mut sum = 0.0f64;
        for first in (0..rows).step_by(PANEL_ROWS) {
            let height = PANEL_ROWS.min(rows - first);
            let residual = &mut self.residual[..height * cols];
            residual.copy_from_slice(&magnitude[first * cols..][..height * cols]);
            for (row, r) in (first..).zip(residual.chunks_exact_mut(cols)) {
                signs.apply_row(row, r);
            }
            let matrix = MatRef::from_row_major_slice(residual, height, cols);
            for j in (0..cols).step_by(PANEL_COLS) {
                let width = PANEL_COLS.min(cols - j);
                let gram = self.gram.as_ref().get(j.., j..j + width);
                let product = &mut self.product[..height * width];
                let t = MatMut::from_row_major_slice_mut(product, height, width);
                matmul(t, Accum::Replace, matrix.get(.., j..), gram, 1.0, par);
                for (r, t) in residual.chunks_exact(cols).zip(product.chunks_exact(width)) {
                    sum += r[j..].iter().zip(t).map(|(&r, &t)| f64::from(r) * f64::from(t)).sum::<f64>();
                }
            }
        }
        // H is positive semidefinite; the rounding of its products is not.
        (sum * self.unit).max(0.0)
    }
}

/// The errors of all levels of a stack, measured on the weights that they rebuild: a product with H per level, when there is one.
pub(crate) fn measured(
    weight: ArrayView2<'_, f32>,
    scales: &[f32],
    gram: Option<ArrayView2<'_, f64>>,
    stack: &WeightStack,
    par: Par,
) -> Result<Vec<LevelReport>, DecompError> {
    let (rows, cols) = weight.dim();
    let inverse: Vec<f64> = scales.iter().map(|&s| 1.0 / f64::from(s)).collect();
    let mut metric = gram.map(|gram| OutputMetric::new(gram, &inverse)).transpose()?;
    // Squared errors of what is left at a level; of the weight itself at level 0.
    let mut squares = |level: u32| -> Result<(f64, Option<f64>), DecompError> {
        let mut left = weight.to_owned();
        if level > 0 {
            let rebuilt = stack.level(level)?.reconstruct();
            left.iter_mut().zip(rebuilt).for_each(|(w, r)| *w -= r);
        }
        let (mut left, exponent) = scaled(left.view(), scales)?;
        let signs = SignMatrix::from_f32(rows, cols, &left)?;
        left.iter_mut().for_each(|r| *r = r.abs());
        let unit = exp2(2 * exponent);
        let squared = left.chunks_exact(cols).map(sum_of_squares).sum::<f64>() * unit;
        Ok((squared, metric.as_mut().map(|metric| metric.squared(signs.view(), &left, par) * unit)))
    };
    let (whole, whole_output) = squares(0)?;
    let ratio = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
    (1..=stack.top_level())
        .map(|level| {
            let (squared_error, output) = squares(level)?;
            let output = output.zip(whole_output).map(|(squared_error, whole)| OutputReport {
                squared_error,
                relative_error: ratio(squared_error, whole).sqrt(),
            });
            Ok(LevelReport { squared_error, relative_error: ratio(squared_error, whole).sqrt(), output })
        })
        .collect()
}
