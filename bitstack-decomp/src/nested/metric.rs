//! The quadratic form in which errors are measured, in normalised coordinates: H̃ = diag(v) H diag(v), columns reordered.

use super::signed::Square;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::{Mat, Par};
use ndarray::ArrayView2;

/// H̃, scaled to a mean diagonal of 1.
pub(crate) struct Metric {
    /// Columns.
    pub(crate) n: usize,
    /// The diagonal of H̃ with regularisation.
    pub(crate) diagonal: Vec<f32>,
    /// What regularisation added to the diagonal.
    pub(crate) added: Vec<f32>,
    /// The factor that was divided out.
    pub(crate) unit: f64,
    /// D of H̃ = Ũ D Ũᵀ, what an error costs that feedback has made the best of; the diagonal when H is not known.
    pub(crate) pivots: Vec<f64>,
    /// Off-diagonal parts, when H is known.
    pub(crate) full: Option<Full>,
}

/// A Gram matrix and its factor.
pub(crate) struct Full {
    /// H̃ with regularisation.
    pub(crate) h: Square,
    /// Ũ, unit upper triangular, of H̃ = Ũ D Ũᵀ (zero below the diagonal).
    pub(crate) u: Square,
    /// The mean of the diagonal of H̃ over the geometric mean of D: what error feedback divides the error by, at best.
    pub(crate) gain: f64,
}

/// What is added to H before use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Regularisation {
    /// Share of the diagonal added to it, for everything.
    pub(crate) diagonal: f64,
    /// Share of the mean diagonal added to it, for everything.
    pub(crate) floor: f64,
    /// Further share of the diagonal added to it for the factor behind error feedback.
    pub(crate) damping: f64,
}

impl Metric {
    /// Errors weighted per column, none of it shared between columns.
    pub(crate) fn diagonal(weights: &[f64], order: &[usize]) -> Self {
        let n = weights.len();
        let unit = mean_or_one(weights.iter().copied(), n);
        let pivots = order.iter().map(|&c| weights[c] / unit).collect();
        let diagonal = order.iter().map(|&c| (weights[c] / unit) as f32).collect();
        Self { n, diagonal, added: vec![0.0; n], unit, pivots, full: None }
    }

    /// `gram` is `n x n`, symmetric and finite; `basis` the column magnitudes v; column `j` here is column `order[j]` there.
    pub(crate) fn full(gram: ArrayView2<'_, f64>, basis: &[f64], order: &[usize], regularise: Regularisation) -> Self {
        let n = basis.len();
        // H and v² may both be near the ends of f64's range.
        let largest = gram.diag().iter().fold(0.0f64, |m, h| m.max(h.abs()));
        let largest = if largest > 0.0 { largest } else { 1.0 };
        let scaled = |r: usize, c: usize| gram[[r, c]] / largest * (basis[r] * basis[c]);
        // A Gram matrix has no negative diagonal, and no product is larger than the lengths allow. What is not one is read as something
        // that at least looks like one: sums stay within f32's range.
        let lengths: Vec<f64> = (0..n).map(|c| scaled(c, c).max(0.0).sqrt()).collect();
        let mean = mean_or_one(lengths.iter().map(|x| x * x), n);
        let mut h = Square::zeros(n);
        let mut added = vec![0.0f32; n];
        for i in 0..n {
            for j in 0..i {
                let most = lengths[order[i]] * lengths[order[j]];
                let x = (scaled(order[i], order[j]).clamp(-most, most) / mean) as f32;
                h.set(i, j, x);
                h.set(j, i, x);
            }
            let x = lengths[order[i]].powi(2) / mean;
            added[i] = (regularise.diagonal * x + regularise.floor) as f32;
            h.set(i, i, x as f32 + added[i]);
        }
        let diagonal: Vec<f32> = (0..n).map(|i| h.get(i, i)).collect();
        let (u, pivots) = factor(&h, regularise.damping);
        let log_pivots = pivots.iter().map(|d| d.ln()).sum::<f64>() / n as f64;
        let gain = mean_or_one(diagonal.iter().map(|d| f64::from(*d)), n) / log_pivots.exp();
        Self { n, diagonal, added, unit: mean * largest, pivots, full: Some(Full { h, u, gain }) }
    }
}

fn mean_or_one(values: impl Iterator<Item = f64>, n: usize) -> f64 {
    let mean = values.sum::<f64>() / n as f64;
    if mean > 0.0 && mean.is_finite() { mean } else { 1.0 }
}

/// Ũ of H + damping·diag(H) = Ũ D Ũᵀ, and D. The Cholesky factor of H with rows and columns reversed, reversed
/// again, is upper triangular. A matrix that is not positive definite gets ten times the damping until it is; at last only its diagonal
/// counts (no feedback). In f32: the factor decides what is fed forward, errors are measured without it.
fn factor(h: &Square, damping: f64) -> (Square, Vec<f64>) {
    /// Added to the diagonal, whose mean is 1: keeps columns without any input regular.
    const SLIVER: f32 = 1e-5;
    let n = h.n;
    let mut out = Square::zeros(n);
    let mut stack = MemBuffer::new(cholesky_in_place_scratch::<f32>(n, Par::Seq, Default::default()));
    let mut damping = damping;
    for _ in 0..6 {
        let mut flipped = Mat::<f32>::from_fn(n, n, |i, j| {
            let x = h.get(n - 1 - i, n - 1 - j);
            if i == j { x * (1.0 + damping as f32) + SLIVER } else { x }
        });
        let done = cholesky_in_place(
            flipped.as_mut(),
            LltRegularization::default(),
            Par::Seq,
            MemStack::new(&mut stack),
            Default::default(),
        );
        if done.is_ok() {
            let (mut pivots, mut finite) = (vec![0.0; n], true);
            for j in 0..n {
                // Ũ_ij = U_ij / U_jj; a column of U is a column of the factor, from the end.
                let pivot = flipped[(n - 1 - j, n - 1 - j)];
                pivots[j] = f64::from(pivot).powi(2);
                for i in 0..=j {
                    let u = flipped[(n - 1 - i, n - 1 - j)] / pivot;
                    out.set(i, j, u);
                    finite &= u.is_finite();
                }
            }
            if finite {
                return (out, pivots);
            }
            out = Square::zeros(n);
        }
        damping = (damping * 10.0).max(1e-3);
    }
    (0..n).for_each(|i| out.set(i, i, 1.0));
    (out, vec![1.0; n])
}
