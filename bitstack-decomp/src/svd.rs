//! The best rank-k fit of a matrix: exactly, and by block Krylov iteration with a warm start.
//!
//! The iteration (l columns, q rounds; A is `rows x cols`), from V_0 = the l best right vectors of the block before, or noise:
//!
//! ```text
//! for i in 0..=q:   Y_i = A V_i,  made orthogonal to Q_0..Q_{i-1} and orthonormalised: Q_i
//!                   Z_i = Aᵀ Q_i,  orthonormalised: V_{i+1}
//! Q = [Q_0 .. Q_q],  Z = Aᵀ Q = [Z_0 .. Z_q],  P = the eigenvectors of ZᵀZ
//! U = Q P_k,  V = Z P_k,  A ≈ U Vᵀ;  the next warm start is Z P_l
//! ```
//!
//! U Vᵀ is the best rank-k fit of A with columns in the span of Q (Musco and Musco, arXiv 1504.05477), and no pass over A is needed to
//! get it from there. A is read 2 (q + 1) times.

use crate::Svd;
use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{self, ComputeEigenvectors, EvdError};
use faer::linalg::matmul::matmul;
use faer::linalg::svd::{self, ComputeSvdVectors};
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Columns l of the iteration. As many as the rank are enough with a warm start; below 16 (or 8) columns the products cost no less.
fn width(rank: usize) -> usize {
    match rank {
        0..=4 => 8,
        5..=16 => 16,
        _ => rank,
    }
}

/// Rounds q of the iteration: the fewest with which ‖R‖ stays within 0.2 % of the exact chain after 1, 4 and 8 blocks, for random
/// matrices of 1024 x 1024 and 2048 x 2048 with columns (and rows) of very different and of nearly equal size. The first singular
/// vector of |R| stands out and is found at once; the next ones are in a crowd.
fn rounds(rank: usize) -> usize {
    if rank == 1 { 2 } else { 5 }
}

/// A column whose part outside the span of those before it has a squared share below this is rounding noise.
const DEPENDENT: f64 = 1e-10;

/// Finds rank-k fits of matrices of one shape, one after another. Buffers are made once.
pub(crate) struct TruncatedSvd {
    /// `rows x rank`.
    u: Mat<f32>,
    /// `cols x rank`.
    v: Mat<f32>,
    par: Par,
    solver: Solver,
}

enum Solver {
    Exact(Exact),
    Krylov(Box<Krylov>),
}

impl TruncatedSvd {
    /// `rank` must be from 1 to min(rows, cols).
    pub(crate) fn new(rows: usize, cols: usize, rank: usize, svd: Svd, seed: u64, par: Par) -> Self {
        let krylov = width(rank) * (rounds(rank) + 1);
        let solver = match svd {
            Svd::Fast if krylov < rows.min(cols) => Solver::Krylov(Box::new(Krylov::new(rows, cols, rank, seed, par))),
            Svd::Fast | Svd::Exact => Solver::Exact(Exact::new(rows, cols, par)),
        };
        Self { u: Mat::zeros(rows, rank), v: Mat::zeros(cols, rank), par, solver }
    }

    /// U `rows x rank` and V `cols x rank` such that U Vᵀ fits `a` (`rows x cols`, row-major): column k of either is a multiple of
    /// the k-th singular vector, their lengths multiply to the singular value, largest first.
    pub(crate) fn fit(&mut self, a: &[f32]) -> Result<(MatRef<'_, f32>, MatRef<'_, f32>), EvdError> {
        let a = MatRef::from_row_major_slice(a, self.u.nrows(), self.v.nrows());
        let (u, v) = (self.u.as_mut(), self.v.as_mut());
        let fast = match &mut self.solver {
            Solver::Exact(exact) => exact.fit(a, u, v, self.par),
            Solver::Krylov(krylov) => krylov.fit(a, u, v, self.par).is_ok(),
        };
        if !fast {
            gram_fit(a, self.u.as_mut(), self.v.as_mut(), self.par)?;
        }
        Ok((self.u.as_ref(), self.v.as_ref()))
    }
}

/// A full thin SVD, cut.
struct Exact {
    /// Left and right vectors of the transpose of A, which is column-major where A is row-major.
    left: Mat<f32>,
    right: Mat<f32>,
    values: Diag<f32>,
    scratch: MemBuffer,
}

impl Exact {
    fn new(rows: usize, cols: usize, par: Par) -> Self {
        let n = rows.min(cols);
        let thin = ComputeSvdVectors::Thin;
        Self {
            left: Mat::zeros(cols, n),
            right: Mat::zeros(rows, n),
            values: Diag::zeros(n),
            scratch: MemBuffer::new(svd::svd_scratch::<f32>(cols, rows, thin, thin, par, Default::default())),
        }
    }

    /// Whether it converged.
    fn fit(&mut self, a: MatRef<'_, f32>, mut u: MatMut<'_, f32>, mut v: MatMut<'_, f32>, par: Par) -> bool {
        let (left, right) = (self.left.as_mut(), self.right.as_mut());
        let stack = MemStack::new(&mut self.scratch);
        let converged =
            svd::svd(a.transpose(), self.values.as_mut(), Some(left), Some(right), par, stack, Default::default());
        let rank = u.ncols();
        u.copy_from(self.right.as_ref().subcols(0, rank));
        for k in 0..rank {
            let sigma = self.values.column_vector()[k];
            v.as_mut().col_mut(k).copy_from(faer::Scale(sigma) * self.left.col(k));
        }
        // A result that is not finite counts as not converged: there is another way to try.
        converged.is_ok() && u.is_all_finite() && v.is_all_finite()
    }
}

/// The same fit from the eigenvectors of the smaller of AAᵀ and AᵀA, in f64: slower to set up, and for when the SVD does not converge.
/// Squaring costs half of the digits, which f64 has to spare.
fn gram_fit(a: MatRef<'_, f32>, mut u: MatMut<'_, f32>, mut v: MatMut<'_, f32>, par: Par) -> Result<(), EvdError> {
    if a.nrows() > a.ncols() {
        return gram_fit(a.transpose(), v, u, par);
    }
    let (rows, rank) = (a.nrows(), u.ncols());
    let a = Mat::from_fn(rows, a.ncols(), |i, j| f64::from(a[(i, j)]));
    let mut gram = Mat::<f64>::zeros(rows, rows);
    matmul(gram.as_mut(), Accum::Replace, a.as_ref(), a.transpose(), 1.0, par);
    let vectors = Eigen::new(rows, par).vectors(gram.as_ref(), par)?.to_owned();
    let mut right = Mat::<f64>::zeros(a.ncols(), rank);
    matmul(right.as_mut(), Accum::Replace, a.transpose(), vectors.as_ref().subcols(0, rank), 1.0, par);
    u.copy_from(Mat::from_fn(rows, rank, |i, k| vectors[(i, k)] as f32));
    v.copy_from(Mat::from_fn(a.ncols(), rank, |j, k| right[(j, k)] as f32));
    Ok(())
}

/// Eigenvectors of symmetric f64 matrices of one size.
struct Eigen {
    vectors: Mat<f64>,
    values: Diag<f64>,
    scratch: MemBuffer,
}

impl Eigen {
    fn new(n: usize, par: Par) -> Self {
        let scratch = evd::self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par, Default::default());
        Self { vectors: Mat::zeros(n, n), values: Diag::zeros(n), scratch: MemBuffer::new(scratch) }
    }

    /// The eigenvectors as columns, of the largest eigenvalue first.
    fn vectors(&mut self, a: MatRef<'_, f64>, par: Par) -> Result<MatRef<'_, f64>, EvdError> {
        let stack = MemStack::new(&mut self.scratch);
        let vectors = self.vectors.as_mut();
        evd::self_adjoint_evd(a, self.values.as_mut(), Some(vectors), par, stack, Default::default())?;
        Ok(self.vectors.as_ref().reverse_cols())
    }
}

struct Krylov {
    width: usize,
    rounds: usize,
    /// V_i, at the end of a fit the warm start of the next: `cols x l`. Columns of zeros are filled with noise.
    start: Mat<f32>,
    /// Qᵀ, `l(q+1) x rows`: A is row-major, and so should be its product with V.
    q: Mat<f32>,
    /// `cols x l(q+1)`.
    z: Mat<f32>,
    /// Coefficients of projections, `l(q+1) x l`, and eigenvectors.
    small: Mat<f32>,
    gram: Mat<f32>,
    gram64: Mat<f64>,
    eigen: Eigen,
    orthonormaliser: Orthonormaliser,
    rng: StdRng,
}

impl Krylov {
    fn new(rows: usize, cols: usize, rank: usize, seed: u64, par: Par) -> Self {
        let width = width(rank);
        let rounds = rounds(rank);
        let all = width * (rounds + 1);
        let mut start = Mat::zeros(cols, width);
        // The first singular vector of a matrix without negative values is nearly its mean.
        start.col_mut(0).fill(1.0);
        Self {
            width,
            rounds,
            start,
            q: Mat::zeros(all, rows),
            z: Mat::zeros(cols, all),
            small: Mat::zeros(all, width),
            gram: Mat::zeros(all, all),
            gram64: Mat::zeros(all, all),
            eigen: Eigen::new(all, par),
            orthonormaliser: Orthonormaliser::new(rows.max(cols), width),
            rng: StdRng::seed_from_u64(seed),
        }
    }

    fn fit(
        &mut self,
        a: MatRef<'_, f32>,
        u: MatMut<'_, f32>,
        mut v: MatMut<'_, f32>,
        par: Par,
    ) -> Result<(), EvdError> {
        let (l, all, rank) = (self.width, self.q.nrows(), u.ncols());
        for j in 0..l {
            let column = self.start.col_as_slice_mut(j);
            if column.iter().all(|&x| x == 0.0) {
                column.fill_with(|| self.rng.random_range(-1.0..1.0));
            }
        }
        for i in 0..=self.rounds {
            let (done, rest) = self.q.as_mut().transpose_mut().split_at_col_mut(i * l);
            let (done, mut y) = (done.as_ref(), rest.subcols_mut(0, l));
            matmul(y.as_mut(), Accum::Replace, a, self.start.as_ref(), 1.0, par);
            // Twice each, in turns: what either leaves of the size of its rounding, the second round removes. A column of length 1 that
            // gets short there was nothing but rounding.
            for least in [f64::from(f32::MIN_POSITIVE), 0.25] {
                if i > 0 {
                    let mut c = self.small.as_mut().subrows_mut(0, i * l);
                    matmul(c.as_mut(), Accum::Replace, done.transpose(), y.as_ref(), 1.0, par);
                    matmul(y.as_mut(), Accum::Add, done, c.as_ref(), -1.0, par);
                }
                self.orthonormaliser.apply(y.as_mut(), least, par);
            }
            let mut z = self.z.as_mut().subcols_mut(i * l, l);
            matmul(z.as_mut(), Accum::Replace, a.transpose(), y.as_ref(), 1.0, par);
            if i < self.rounds {
                // Only its span matters, so once is enough.
                self.start.copy_from(z.as_ref());
                self.orthonormaliser.apply(self.start.as_mut(), f64::from(f32::MIN_POSITIVE), par);
            }
        }
        matmul(self.gram.as_mut(), Accum::Replace, self.z.transpose(), self.z.as_ref(), 1.0, par);
        for j in 0..all {
            for i in 0..all {
                self.gram64[(i, j)] = 0.5 * (f64::from(self.gram[(i, j)]) + f64::from(self.gram[(j, i)]));
            }
        }
        let vectors = self.eigen.vectors(self.gram64.as_ref(), par)?;
        let mut p = self.small.as_mut();
        for j in 0..l {
            for i in 0..all {
                p[(i, j)] = vectors[(i, j)] as f32;
            }
        }
        let p = p.as_ref();
        matmul(u, Accum::Replace, self.q.transpose(), p.subcols(0, rank), 1.0, par);
        matmul(self.start.as_mut(), Accum::Replace, self.z.as_ref(), p, 1.0, par);
        v.copy_from(self.start.as_ref().subcols(0, rank));
        Ok(())
    }
}

/// Makes the columns of tall matrices orthonormal by Cholesky QR with an f64 Gram matrix. A column that depends on those before it
/// becomes zero, so that it counts for nothing instead of twice.
struct Orthonormaliser {
    /// The matrix in f64.
    wide: Mat<f64>,
    gram: Mat<f64>,
    /// L⁻ᵀ of the Cholesky factor.
    transform: Mat<f32>,
    result: Mat<f32>,
}

impl Orthonormaliser {
    fn new(max_rows: usize, width: usize) -> Self {
        Self {
            wide: Mat::zeros(max_rows, width),
            gram: Mat::zeros(width, width),
            transform: Mat::zeros(width, width),
            result: Mat::zeros(max_rows, width),
        }
    }

    /// Columns of a squared length below `least` become zero too. Once leaves an error of about f32's epsilon times the condition of
    /// the columns, twice of the epsilon.
    fn apply(&mut self, mut y: MatMut<'_, f32>, least: f64, par: Par) {
        let (rows, width) = (y.nrows(), y.ncols());
        let mut wide = self.wide.as_mut().subrows_mut(0, rows);
        for j in 0..width {
            for i in 0..rows {
                wide[(i, j)] = f64::from(y[(i, j)]);
            }
        }
        let wide = wide.as_ref();
        matmul(self.gram.as_mut(), Accum::Replace, wide.transpose(), wide, 1.0, par);
        self.invert_cholesky(least);
        let mut result = self.result.as_mut().subrows_mut(0, rows);
        matmul(result.as_mut(), Accum::Replace, y.as_ref(), self.transform.as_ref(), 1.0, par);
        y.copy_from(result);
    }

    /// G = L Lᵀ and then T = L⁻ᵀ, upper triangular, column by column in place of G's lower triangle; dependent columns are zero in T.
    fn invert_cholesky(&mut self, least: f64) {
        let n = self.gram.ncols();
        let g = &mut self.gram;
        let mut live = vec![true; n];
        for j in 0..n {
            let length = g[(j, j)];
            let pivot = (0..j).fold(length, |p, k| p - g[(j, k)] * g[(j, k)]);
            live[j] = length >= least && pivot > DEPENDENT * length;
            let root = pivot.max(0.0).sqrt();
            g[(j, j)] = root;
            for i in j + 1..n {
                g[(i, j)] = if live[j] { (0..j).fold(g[(i, j)], |x, k| x - g[(i, k)] * g[(j, k)]) / root } else { 0.0 };
            }
        }
        // Column j of T = row j of L⁻¹, from rows before: L⁻¹[j, c] = -Σ_{k in c..j} L[j, k] L⁻¹[k, c] / L[j, j].
        let mut inverse = Mat::<f64>::zeros(n, n);
        for j in (0..n).filter(|&j| live[j]) {
            for c in 0..j {
                let sum = (c..j).fold(0.0, |s, k| s + g[(j, k)] * inverse[(k, c)]);
                inverse[(j, c)] = -sum / g[(j, j)];
            }
            inverse[(j, j)] = 1.0 / g[(j, j)];
        }
        for j in 0..n {
            for c in 0..n {
                self.transform[(c, j)] = inverse[(j, c)] as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use faer::linalg::solvers::Svd as FullSvd;

    /// Uniform in 0..1, some columns larger than others: what |R| looks like.
    fn magnitudes(rows: usize, cols: usize) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(9);
        (0..rows * cols).map(|i| rng.random::<f32>() * (1 + i % cols % 3) as f32).collect()
    }

    fn squared_error(a: &[f32], (u, v): (MatRef<'_, f32>, MatRef<'_, f32>)) -> f64 {
        let cols = v.nrows();
        let fit = |i: usize, j: usize| (0..u.ncols()).map(|k| f64::from(u[(i, k)]) * f64::from(v[(j, k)])).sum::<f64>();
        a.iter().enumerate().map(|(i, &a)| (f64::from(a) - fit(i / cols, i % cols)).powi(2)).sum()
    }

    fn singular_values(a: &[f32], rows: usize, cols: usize) -> Vec<f64> {
        let a = Mat::from_fn(rows, cols, |i, j| f64::from(a[i * cols + j]));
        FullSvd::new_thin(a.as_ref()).unwrap().S().column_vector().iter().copied().collect()
    }

    /// The error of the best fit is the sum of the squares of the singular values left out (Eckart and Young). f32 factors are off by
    /// some epsilons of the largest singular value, which error² feels to second order in the fit and to first in its rounding.
    #[test]
    fn exact_fit_leaves_out_the_smallest_singular_values() {
        for (rows, cols) in [(1, 1), (1, 9), (9, 1), (20, 33), (33, 20)] {
            let a = magnitudes(rows, cols);
            let sigma = singular_values(&a, rows, cols);
            for rank in [1, 2, 4, 16].into_iter().filter(|&k| k <= rows.min(cols)) {
                let mut svd = TruncatedSvd::new(rows, cols, rank, Svd::Exact, 0, Par::Seq);
                let left: f64 = sigma[rank..].iter().map(|s| s * s).sum();
                let error = squared_error(&a, svd.fit(&a).unwrap());
                assert!(
                    (error - left).abs() < 1e-6 * sigma[0] * sigma[0],
                    "{rows} x {cols} rank {rank}: {error} {left}"
                );
            }
        }
    }

    #[test]
    fn eigenvectors_stand_in_for_an_svd_that_does_not_converge() {
        for (rows, cols) in [(1, 1), (20, 33), (33, 20)] {
            let a = magnitudes(rows, cols);
            let sigma = singular_values(&a, rows, cols);
            let rank = rows.min(4);
            let (mut u, mut v) = (Mat::zeros(rows, rank), Mat::zeros(cols, rank));
            let view = MatRef::from_row_major_slice(&a, rows, cols);
            gram_fit(view, u.as_mut(), v.as_mut(), Par::Seq).unwrap();
            let left: f64 = sigma[rank..].iter().map(|s| s * s).sum();
            let error = squared_error(&a, (u.as_ref(), v.as_ref()));
            assert!((error - left).abs() < 1e-6 * sigma[0] * sigma[0], "{rows} x {cols}: {error} {left}");
        }
    }

    #[test]
    fn krylov_fit_is_nearly_the_best() {
        for rank in [1, 2, 4, 16] {
            let (rows, cols) = (150, 131);
            let a = magnitudes(rows, cols);
            let sigma = singular_values(&a, rows, cols);
            let left: f64 = sigma[rank..].iter().map(|s| s * s).sum();
            let mut svd = TruncatedSvd::new(rows, cols, rank, Svd::Fast, 0, Par::Seq);
            assert!(matches!(svd.solver, Solver::Krylov(_)));
            let cold = squared_error(&a, svd.fit(&a).unwrap());
            // A second fit of the same matrix starts from its own answer.
            let warm = squared_error(&a, svd.fit(&a).unwrap());
            assert!((left * 0.999_999..left * 1.002).contains(&cold), "rank {rank}: {} too much", cold / left - 1.0);
            assert!((left * 0.999_999..left * 1.000_5).contains(&warm), "rank {rank}: {} too much", warm / left - 1.0);
        }
    }

    /// Columns that depend on each other would count twice if they were kept.
    #[test]
    fn krylov_fit_of_a_matrix_of_low_rank_is_exact() {
        let (rows, cols, rank) = (200, 150, 16);
        for low in [1, 2, 5] {
            let x = magnitudes(rows, low);
            let y = magnitudes(low, cols);
            let a: Vec<f32> = (0..rows * cols)
                .map(|i| (0..low).map(|k| x[i / cols * low + k] * y[k * cols + i % cols]).sum())
                .collect();
            let mut svd = TruncatedSvd::new(rows, cols, rank, Svd::Fast, 0, Par::Seq);
            assert!(matches!(svd.solver, Solver::Krylov(_)));
            let total: f64 = a.iter().map(|&a| f64::from(a) * f64::from(a)).sum();
            for _ in 0..2 {
                let error = squared_error(&a, svd.fit(&a).unwrap());
                assert!(error < 1e-11 * total, "rank {low}: {}", error / total);
            }
        }
    }

    #[test]
    fn fits_of_zeros_are_zero() {
        for svd in [Svd::Fast, Svd::Exact] {
            let mut fits = TruncatedSvd::new(130, 120, 4, svd, 0, Par::Seq);
            let (u, v) = fits.fit(&[0.0; 130 * 120]).unwrap();
            assert_eq!((u * v.transpose()).norm_max(), 0.0);
        }
    }

    #[test]
    fn orthonormaliser_drops_dependent_columns() {
        let a = Mat::from_fn(50, 4, |i, j| [1.0, i as f32, 2.0 * i as f32 + 3.0, (i * i) as f32][j]);
        let mut q = a.clone();
        let mut orthonormaliser = Orthonormaliser::new(60, 4);
        for least in [1e-30, 0.25] {
            orthonormaliser.apply(q.as_mut(), least, Par::Seq);
        }
        let gram = q.transpose() * &q;
        let expected = Mat::from_fn(4, 4, |i, j| if i == j && i != 2 { 1.0 } else { 0.0 });
        assert!((&gram - expected).norm_max() < 1e-6, "{gram:?}");
    }

    /// LAPACK as an independent judge of the same fit.
    #[cfg(feature = "lapack")]
    #[test]
    fn exact_fit_is_that_of_lapack() {
        use ndarray::Array2;
        use ndarray_linalg::SVD;
        let (rows, cols, rank) = (96, 70, 16);
        let a = magnitudes(rows, cols);
        let (u, sigma, vt) = Array2::from_shape_vec((rows, cols), a.clone()).unwrap().svd(true, true).unwrap();
        let (u, vt) = (u.unwrap(), vt.unwrap());
        let mut svd = TruncatedSvd::new(rows, cols, rank, Svd::Exact, 0, Par::Seq);
        let (u_k, v_k) = svd.fit(&a).unwrap();
        for i in 0..rows {
            for j in 0..cols {
                let theirs: f32 = (0..rank).map(|k| u[(i, k)] * sigma[k] * vt[(k, j)]).sum();
                let ours: f32 = (0..rank).map(|k| u_k[(i, k)] * v_k[(j, k)]).sum();
                // Sixteen-term sums of values below the first singular value, about 100, and its vectors, about 0.1.
                assert!((ours - theirs).abs() < 1e-4, "({i}, {j}): {ours} {theirs}");
            }
        }
    }
}
