//! The envelope of a weight: what its rows and columns are large by.

use ndarray::ArrayView2;

/// Weights beyond so many standard deviations count for no more in the envelope, where they can go to a list.
const CLEAR: f64 = 3.0;

/// A rank-1 envelope a vᵀ of |W|.
pub(crate) struct Envelope {
    pub(crate) rows: Vec<f64>,
    pub(crate) cols: Vec<f64>,
}

/// Rows and columns of W·diag(s) / (a bᵀ) get root mean square 1; v = b / s. With `list`, nothing in them counts for more than [`CLEAR`].
pub(crate) fn balance(weight: ArrayView2<'_, f32>, s: &[f32], list: bool) -> Envelope {
    let most = if list { CLEAR } else { f64::INFINITY };
    /// Rounds in which everything counts, and in which nothing counts for more than `most`. A single weight 10⁴ times all others raises its
    /// row by hundreds at first; each round then takes an eighth of what is left of it.
    const ROUNDS: [usize; 2] = [4, 6];
    let (rows, cols) = weight.dim();
    let (mut a, mut b) = (vec![1.0f64; rows], vec![1.0f64; cols]);
    for round in 0..ROUNDS[0] + ROUNDS[1] {
        let most = if round < ROUNDS[0] { f64::INFINITY } else { most * most };
        let inverse: Vec<f64> =
            b.iter().zip(s).map(|(b, s)| if *b > 0.0 { (f64::from(*s) / b).powi(2) } else { 0.0 }).collect();
        let live_cols = b.iter().filter(|b| **b > 0.0).count().max(1) as f64;
        let mut live_rows = 0usize;
        let mut sums = vec![0.0f64; cols];
        for (row, a) in weight.rows().into_iter().zip(&mut a) {
            let last = if *a > 0.0 { 1.0 / (*a * *a) } else { 0.0 };
            let squares = |last: f64| {
                row.iter().zip(&inverse).map(|(w, i)| (f64::from(*w).powi(2) * i * last).min(most)).sum::<f64>()
                    / live_cols
            };
            *a = if last > 0.0 { (squares(last) / last).sqrt() } else { 0.0 };
            if *a > 0.0 {
                live_rows += 1;
                let scale = 1.0 / (*a * *a);
                for ((sum, w), i) in sums.iter_mut().zip(row).zip(&inverse) {
                    *sum += (f64::from(*w).powi(2) * i * scale).min(most);
                }
            }
        }
        for (b, sum) in b.iter_mut().zip(&sums) {
            *b *= (sum / live_rows.max(1) as f64).sqrt();
        }
    }
    let mut v: Vec<f64> = b.iter().zip(s).map(|(b, s)| b / f64::from(*s)).collect();
    // The magnitude is split evenly, so that both factors stay well inside f16's range.
    let rms = |x: &[f64]| (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64).sqrt();
    let (ra, rv) = (rms(&a), rms(&v));
    if ra > 0.0 && rv > 0.0 {
        let f = (ra / rv).sqrt();
        v.iter_mut().for_each(|v| *v *= f);
        a.iter_mut().for_each(|a| *a /= f);
    }
    Envelope { rows: a, cols: v }
}

/// One over the magnitudes of columns; 0 for a column of zeros.
pub(crate) fn inverse(cols: &[f64]) -> Vec<f32> {
    cols.iter().map(|v| if *v > 0.0 { (1.0 / v) as f32 } else { 0.0 }).collect()
}
