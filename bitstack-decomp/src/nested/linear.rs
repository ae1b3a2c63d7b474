//! Small dense systems.

/// Solves A x = y in place by Cholesky for a symmetric positive definite A (row-major, overwritten); the answer replaces y. False, and y
/// is not the answer, when A is not positive definite.
pub(crate) fn solve_symmetric(a: &mut [f64], y: &mut [f64]) -> bool {
    let n = y.len();
    for i in 0..n {
        for k in 0..=i {
            let mut sum = a[i * n + k];
            for j in 0..k {
                sum -= a[i * n + j] * a[k * n + j];
            }
            if i == k {
                if sum.is_nan() || sum <= 0.0 {
                    return false;
                }
                a[i * n + i] = sum.sqrt();
            } else {
                a[i * n + k] = sum / a[k * n + k];
            }
        }
    }
    for i in 0..n {
        for j in 0..i {
            y[i] -= a[i * n + j] * y[j];
        }
        y[i] /= a[i * n + i];
    }
    for i in (0..n).rev() {
        for j in i + 1..n {
            y[i] -= a[j * n + i] * y[j];
        }
        y[i] /= a[i * n + i];
    }
    true
}
