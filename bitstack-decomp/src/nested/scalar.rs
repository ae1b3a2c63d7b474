//! Level values for a single weight without neighbours: where the joint codes start from.

use super::linear::solve_symmetric;

/// Level values fitted to a sample of normalised weights.
pub(crate) struct Levels {
    /// `coefficients[b][i]`: of plane i at level b + 1, for i <= b.
    pub(crate) coefficients: Vec<Vec<f64>>,
    /// Mean squared error of each level.
    pub(crate) errors: Vec<f64>,
}

/// Lloyd's iteration on the product of the levels' errors to the powers `weights`: codes that minimise Σ_b w_b/err_b (x − value_b)²,
/// then least squares for the coefficients of each level. `start`: the coefficients of the planes, the same at every level.
pub(crate) fn design(sample: &[f32], weights: &[f64], start: &[f64], rounds: usize) -> Levels {
    let q = weights.len();
    let mut coefficients: Vec<Vec<f64>> = (0..q).map(|b| start[..=b].to_vec()).collect();
    let mut errors: Vec<f64> = (0..q).map(|b| 0.36 * 0.25f64.powi(b as i32)).collect();
    let sign = |z: usize, i: usize| if (z >> (q - 1 - i)) & 1 == 1 { 1.0 } else { -1.0 };
    let mut values = vec![0.0f64; (2 << q) - 2];
    let mut costs = vec![0.0f64; 1 << q];
    for _ in 0..rounds {
        for b in 0..q {
            for p in 0..2usize << b {
                let prefix = p << (q - 1 - b);
                values[(2 << b) - 2 + p] = (0..=b).map(|i| coefficients[b][i] * sign(prefix, i)).sum();
            }
        }
        // Per level: Σ σ_i σ_k and Σ x σ_i over the sample, and the squared error.
        let mut gram = vec![0.0f64; q * q];
        let mut dot = vec![0.0f64; q];
        let mut squares = vec![0.0f64; q];
        let om: Vec<f64> = weights.iter().zip(&errors).map(|(w, e)| w / e.max(1e-12)).collect();
        for &x in sample {
            let x = f64::from(x);
            costs[0] = 0.0;
            for b in 0..q {
                let nodes = &values[(2 << b) - 2..];
                for k in (0..1usize << b).rev() {
                    let parent = costs[k];
                    for child in [2 * k + 1, 2 * k] {
                        costs[child] = parent + om[b] * (x - nodes[child]).powi(2);
                    }
                }
            }
            let z = (0..1 << q).min_by(|&a, &b| costs[a].total_cmp(&costs[b])).unwrap_or(0);
            for i in 0..q {
                dot[i] += x * sign(z, i);
                for k in 0..q {
                    gram[i * q + k] += sign(z, i) * sign(z, k);
                }
                squares[i] += (x - values[(2 << i) - 2 + (z >> (q - 1 - i))]).powi(2);
            }
        }
        let n = sample.len().max(1) as f64;
        for b in 0..q {
            errors[b] = (squares[b] / n).max(1e-12);
            let m = b + 1;
            let mut a = vec![0.0; m * m];
            let mut y = vec![0.0; m];
            for i in 0..m {
                y[i] = dot[i] - (0..m).map(|k| gram[i * q + k] * coefficients[b][k]).sum::<f64>();
                for k in 0..m {
                    a[i * m + k] = gram[i * q + k] + if i == k { 1e-6 * n } else { 0.0 };
                }
            }
            if solve_symmetric(&mut a, &mut y) {
                coefficients[b].iter_mut().zip(&y).for_each(|(c, d)| *c += d);
            }
        }
    }
    Levels { coefficients, errors }
}
