//! Weights in units in which no square overflows, and sums of squares.

use crate::DecompError;
use ndarray::ArrayView2;

/// W·diag(s) as `rows x cols` row-major values times 2^exponent, the largest of them in [1, 2): squares and products of such values
/// stay in f32's range whatever the weight's. The powers of two are exact.
pub(crate) fn scaled(weight: ArrayView2<'_, f32>, scales: &[f32]) -> Result<(Vec<f32>, i32), DecompError> {
    let mut largest = 0.0f32;
    for (row, values) in weight.rows().into_iter().enumerate() {
        if let Some((col, &value)) = values.iter().enumerate().find(|(_, w)| !w.is_finite()) {
            return Err(DecompError::WeightNotFinite { row, col, value });
        }
        largest = values.iter().fold(largest, |m, w| m.max(w.abs()));
    }
    if largest == 0.0 {
        return Ok((vec![0.0; weight.len()], 0));
    }
    // First by the weight's own largest value, so that the product with s neither overflows nor loses digits.
    let first = ilog2(f64::from(largest));
    let unit = exp2(-first);
    let mut values: Vec<f32> = Vec::with_capacity(weight.len());
    for row in weight.rows() {
        values.extend(row.iter().zip(scales).map(|(&w, &s)| (f64::from(w) * unit) as f32 * s));
    }
    let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let second = ilog2(f64::from(largest));
    if second != 0 {
        let unit = exp2(-second);
        values.iter_mut().for_each(|x| *x = (f64::from(*x) * unit) as f32);
    }
    Ok((values, first + second))
}

/// 2^e, exact, for |e| of at most a thousand.
pub(crate) fn exp2(e: i32) -> f64 {
    2.0f64.powi(e)
}

/// The exponent of the largest power of two that is at most `x`, for positive normal `x`.
pub(crate) fn ilog2(x: f64) -> i32 {
    (x.to_bits() >> 52) as i32 - 1023
}

/// In f32 over short runs, in f64 over those.
pub(crate) fn sum_of_squares(values: &[f32]) -> f64 {
    const LANES: usize = 16;
    values
        .chunks(32 * LANES)
        .map(|run| {
            let mut lanes = [0.0f32; LANES];
            let chunks = run.chunks_exact(LANES);
            let tail: f32 = chunks.remainder().iter().map(|x| x * x).sum();
            for chunk in chunks {
                for (lane, x) in lanes.iter_mut().zip(chunk) {
                    *lane += x * x;
                }
            }
            f64::from(lanes.iter().sum::<f32>() + tail)
        })
        .sum()
}
