//! The elementwise arithmetic of the decoder, in forms a compiler turns into vector code, and the matrix product.

use std::hint::black_box;

use faer::linalg::matmul::matmul;
use faer::traits::pulp::{Arch, Simd, WithSimd};
use faer::{Accum, MatMut, MatRef, Par};

/// 2 sqrt(2/π), of the approximation of GELU.
const TWICE_ROOT: f32 = 1.595_769;

/// Defines functions that run as compiled for the widest vectors that this CPU has and the dispatcher knows. Only additions,
/// products and comparisons are vectorised, never contracted or reordered, so results are the same at every width.
///
/// The body becomes a function that is inlined in the dispatched one by force: left to itself the compiler does not inline
/// the longer ones, and then compiles them for the narrowest vectors.
macro_rules! wide {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)? $body:block)*) => {$(
        $(#[$meta])*
        $vis fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body(($($arg,)*): ($($type,)*)) $(-> $result)? $body
            Arch::new().dispatch(Op(body, ($($arg,)*)))
        }
    )*};
}

struct Op<F, A>(F, A);

impl<A, R, F: FnOnce(A) -> R> WithSimd for Op<F, A> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> R {
        (self.0)(self.1)
    }
}

/// `out = factor · a b`, on the calling thread.
///
/// faer's kernels return with the upper halves of the vector registers in use. Until these are cleared, ordinary SSE code,
/// which is what Rust compiles to by default, waits for them at every instruction: SwiGLU took six times as long after a
/// product as before any. Code compiled for AVX clears them when it returns, so a little of it is run here.
pub fn product(out: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>, factor: f32) {
    matmul(out, Accum::Replace, a, b, factor, Par::Seq);
    clear_registers();
}

/// `out += factor · a b`, on the calling thread: see [`product`].
pub(crate) fn add_product(out: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>, factor: f32) {
    matmul(out, Accum::Add, a, b, factor, Par::Seq);
    clear_registers();
}

/// e^x in f32 with a relative error below 2e-7 for x in [-87, 88]; below that range 1.6e-38, above it e^88. NaN stays NaN.
///
/// The standard library's is exact to the last bit but is a call per element; softmax and SwiGLU take one per score.
/// Cephes' `expf`: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, and n put in the exponent.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    p = p * r * r + r + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()))
}

const LANES: usize = 16;

/// Σ f(i) over a slice in 16 interleaved partial sums, always in the same order.
#[inline(always)]
fn sum_by(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut partial = [0.0_f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (p, &v) in partial.iter_mut().zip(chunk) {
            *p += f(v);
        }
    }
    partial.iter().sum::<f32>() + rest.iter().map(|&v| f(v)).sum::<f32>()
}

/// The largest element; -inf for none. NaN is passed over.
#[inline(always)]
fn max(x: &[f32]) -> f32 {
    let mut partial = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (p, &v) in partial.iter_mut().zip(chunk) {
            *p = if v > *p { v } else { *p };
        }
    }
    partial.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_by(x, |v| v * v) / x.len() as f32 + eps).sqrt()
}

/// Scores of queries with keys, times `scale`: `q` is heads x dim, `keys` positions x `width`, a head of keys for each group of queries; `out` is heads x
/// positions. Sums depend on the width of the CPU's vectors.
pub(crate) fn scores(q: &[f32], dim: usize, keys: &[f32], width: usize, scale: f32, out: &mut [f32]) {
    Arch::new().dispatch(Scores { q, dim, keys, width, scale, out });
}

struct Scores<'a> {
    q: &'a [f32],
    dim: usize,
    keys: &'a [f32],
    width: usize,
    scale: f32,
    out: &'a mut [f32],
}

impl WithSimd for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { q, dim, keys, width, scale, out } = self;
        let span = keys.len() / width;
        let group = q.len() / width;
        // Row by row: memory is read in the order in which it lies.
        for (p, row) in keys.chunks_exact(width).enumerate() {
            let groups = q.chunks_exact(group * dim).zip(out.chunks_exact_mut(group * span));
            for (key, (q, out)) in row.chunks_exact(dim).zip(groups) {
                let (key, key_rest) = S::as_simd_f32s(key);
                for (q, out) in q.chunks_exact(dim).zip(out.chunks_exact_mut(span)) {
                    let (q, q_rest) = S::as_simd_f32s(q);
                    let mut sum = simd.splat_f32s(0.0);
                    for (&a, &b) in q.iter().zip(key) {
                        sum = simd.mul_add_f32s(a, b, sum);
                    }
                    let rest: f32 = q_rest.iter().zip(key_rest).map(|(a, b)| a * b).sum();
                    out[p] = (simd.reduce_sum_f32s(sum) + rest) * scale;
                }
            }
        }
    }
}

/// Σ weight · value: `weights` is heads x positions, `values` positions x `width`, a head of values for each group of heads; `out` is heads x dim. Sums
/// depend on the width of the CPU's vectors.
pub(crate) fn mix(weights: &[f32], values: &[f32], width: usize, dim: usize, out: &mut [f32]) {
    Arch::new().dispatch(Mix { weights, values, width, dim, out });
}

struct Mix<'a> {
    weights: &'a [f32],
    values: &'a [f32],
    width: usize,
    dim: usize,
    out: &'a mut [f32],
}

impl WithSimd for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        /// Values at a time, so that sums are loaded and stored less often.
        const AT_ONCE: usize = 4;
        let Self { weights, values, width, dim, out } = self;
        let span = values.len() / width;
        let group = out.len() / width;
        out.fill(0.0);
        for (block, values) in values.chunks(AT_ONCE * width).enumerate() {
            let n = values.len() / width;
            let groups = weights.chunks_exact(group * span).zip(out.chunks_exact_mut(group * dim));
            for (head, (weights, out)) in groups.enumerate() {
                // Behind the last value, the last once more, with no weight.
                let rows: [_; AT_ONCE] = std::array::from_fn(|i| {
                    let first = i.min(n - 1) * width + head * dim;
                    S::as_simd_f32s(&values[first..first + dim])
                });
                for (weights, out) in weights.chunks_exact(span).zip(out.chunks_exact_mut(dim)) {
                    let weight: [f32; AT_ONCE] =
                        std::array::from_fn(|i| if i < n { weights[block * AT_ONCE + i] } else { 0.0 });
                    let (out, out_rest) = S::as_mut_simd_f32s(out);
                    let wide = weight.map(|weight| simd.splat_f32s(weight));
                    let [a, b, c, d] = rows.map(|(row, _)| row);
                    for ((((out, &a), &b), &c), &d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                        let first = simd.mul_add_f32s(wide[1], b, simd.mul_add_f32s(wide[0], a, *out));
                        *out = simd.mul_add_f32s(wide[3], d, simd.mul_add_f32s(wide[2], c, first));
                    }
                    for (d, out) in out_rest.iter_mut().enumerate() {
                        *out += rows.iter().zip(weight).map(|((_, rest), weight)| rest[d] * weight).sum::<f32>();
                    }
                }
            }
        }
    }
}

wide! {
    /// Replaces scores by e^(score - m), with m the largest of them; gives m and their sum.
    pub(crate) fn exponentials(x: &mut [f32]) -> [f32; 2] {
        let top = max(x);
        x.iter_mut().for_each(|v| *v = exp(*v - top));
        [top, sum_by(x, |v| v)]
    }

    /// See [`product`].
    fn clear_registers() {
        black_box(black_box([0.0_f32; LANES]).map(|v| v + 1.0));
    }

    /// Replaces scores by their softmax.
    pub fn softmax(x: &mut [f32]) {
        let top = max(x);
        x.iter_mut().for_each(|v| *v = exp(*v - top));
        let scale = 1.0 / sum_by(x, |v| v);
        x.iter_mut().for_each(|v| *v *= scale);
    }

    /// log Σ e^x. Partial sums of 256 elements in f32, these in f64: the error is that of the exponentials.
    pub(crate) fn log_sum_exp(x: &[f32]) -> f64 {
        let top = max(x);
        if !top.is_finite() {
            return f64::NAN;
        }
        let mut sum = 0.0;
        for chunk in x.chunks(256) {
            sum += f64::from(sum_by(chunk, |v| exp(v - top)));
        }
        f64::from(top) + sum.ln()
    }

    /// Σ p (a - b) with p = e^(a - norm): how far two rows of logits differ where the first puts its probability.
    pub(crate) fn expected_difference(a: &[f32], b: &[f32], norm: f32) -> f64 {
        let mut sum = 0.0;
        for (a, b) in a.chunks(256).zip(b.chunks(256)) {
            let mut partial = [0.0_f32; LANES];
            let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
            for (a, b) in a.iter().zip(b) {
                for ((p, &a), &b) in partial.iter_mut().zip(a).zip(b) {
                    *p += exp(a - norm) * (a - b);
                }
            }
            for ((p, &a), &b) in partial.iter_mut().zip(a_rest).zip(b_rest) {
                *p += exp(a - norm) * (a - b);
            }
            sum += f64::from(partial.iter().sum::<f32>());
        }
        sum
    }

    /// Index of the largest element, the first of equals; 0 for none.
    pub(crate) fn argmax(x: &[f32]) -> usize {
        let top = max(x);
        x.iter().position(|&v| v == top).unwrap_or(0)
    }

    /// `out = x / sqrt(mean(x²) + eps) * weight`, row by row.
    pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
            let scale = inverse_rms(x, eps);
            for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * w;
            }
        }
    }

    /// [`rms_norm`] of every row in place.
    pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
        for x in x.chunks_exact_mut(weight.len()) {
            let scale = inverse_rms(x, eps);
            for (x, &w) in x.iter_mut().zip(weight) {
                *x = *x * scale * w;
            }
        }
    }

    /// `gate = silu(gate) * up`, silu(x) = x / (1 + e^-x).
    pub(crate) fn swiglu(gate: &mut [f32], up: &[f32]) {
        for (gate, &up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + exp(-*gate)) * up;
        }
    }

    /// `x = silu(x)`.
    pub(crate) fn silu(x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x = *x / (1.0 + exp(-*x)));
    }

    /// The approximation of GELU by a tanh: x/2 (1 + tanh(u)) = x / (1 + e^-2u) with u = sqrt(2/π) (x + 0.044715 x³).
    pub(crate) fn gelu(x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x = *x / (1.0 + exp(-TWICE_ROOT * (*x + 0.044_715 * *x * *x * *x))));
    }

    /// `x = cap tanh(x / cap)`, tanh(t) = 1 - 2 / (e^2t + 1).
    pub(crate) fn cap(x: &mut [f32], cap: f32) {
        x.iter_mut().for_each(|x| *x = cap * (1.0 - 2.0 / (exp(2.0 * *x / cap) + 1.0)));
    }

    /// `x *= factor`.
    pub(crate) fn scale(x: &mut [f32], factor: f32) {
        x.iter_mut().for_each(|x| *x *= factor);
    }

    /// `x *= y`.
    pub(crate) fn multiply(x: &mut [f32], y: &[f32]) {
        for (x, &y) in x.iter_mut().zip(y) {
            *x *= y;
        }
    }

    /// `x += factor y`.
    pub(crate) fn add_scaled(x: &mut [f32], y: &[f32], factor: f32) {
        for (x, &y) in x.iter_mut().zip(y) {
            *x += factor * y;
        }
    }

    /// Adds the gradient by `x` of [`rms_norm`] to `out`, from `g`, that by its output, row by row. With y = x s w and s = 1 / sqrt(mean(x²) + eps)
    /// it is s (w g − x s² mean(w g x)).
    pub(crate) fn rms_norm_backward(x: &[f32], weight: &[f32], eps: f32, g: &[f32], out: &mut [f32]) {
        let n = weight.len();
        for ((x, g), out) in x.chunks_exact(n).zip(g.chunks_exact(n)).zip(out.chunks_exact_mut(n)) {
            let scale = inverse_rms(x, eps);
            let mut sum = 0.0;
            for ((&x, &g), &w) in x.iter().zip(g).zip(weight) {
                sum += x * g * w;
            }
            let along = scale * scale * sum / n as f32;
            for (((out, &x), &g), &w) in out.iter_mut().zip(x).zip(g).zip(weight) {
                *out += scale * (w * g - x * along);
            }
        }
    }

    /// From the arguments of [`swiglu`] and `g`, the gradient by its result, the gradients by each, in their place.
    pub(crate) fn swiglu_backward(gate: &mut [f32], up: &mut [f32], g: &[f32]) {
        for ((gate, up), &g) in gate.iter_mut().zip(up).zip(g) {
            let sigmoid = 1.0 / (1.0 + exp(-*gate));
            let silu = *gate * sigmoid;
            *gate = g * *up * (sigmoid + silu * (1.0 - sigmoid));
            *up = g * silu;
        }
    }

    /// As [`swiglu_backward`] for gelu(gate) · up: gelu(x) = x σ(t(x)) has the slope σ + x σ (1 − σ) t'.
    pub(crate) fn geglu_backward(gate: &mut [f32], up: &mut [f32], g: &[f32]) {
        for ((gate, up), &g) in gate.iter_mut().zip(up).zip(g) {
            let x = *gate;
            let sigmoid = 1.0 / (1.0 + exp(-TWICE_ROOT * (x + 0.044_715 * x * x * x)));
            let inner = TWICE_ROOT * (1.0 + 3.0 * 0.044_715 * x * x);
            *gate = g * *up * (sigmoid + x * sigmoid * (1.0 - sigmoid) * inner);
            *up = g * x * sigmoid;
        }
    }

    /// From probabilities and the gradient by them, that by the scores whose [`softmax`] they are, in its place.
    pub(crate) fn softmax_backward(p: &[f32], g: &mut [f32]) {
        let mut mean = 0.0;
        for (&p, &g) in p.iter().zip(g.iter()) {
            mean += p * g;
        }
        for (&p, g) in p.iter().zip(g) {
            *g = p * (*g - mean);
        }
    }

    /// Adds `bias` to every row of `x`.
    pub(crate) fn add_bias(x: &mut [f32], bias: &[f32]) {
        for row in x.chunks_exact_mut(bias.len()) {
            for (x, &b) in row.iter_mut().zip(bias) {
                *x += b;
            }
        }
    }

    /// `x += y`.
    pub(crate) fn add(x: &mut [f32], y: &[f32]) {
        for (x, &y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_standard_library() {
        let mut worst = 0.0_f64;
        for i in 0..=1_750_000 {
            let x = -87.0 + i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2e-7, "relative error {worst}");
        assert!(exp(-1e30) > 0.0 && exp(-1e30) < 2e-38);
        assert_eq!(exp(f32::NEG_INFINITY), exp(-87.0));
        assert!(exp(1e30).is_finite());
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn softmax_sums_to_one_and_ignores_a_common_shift() {
        let x: Vec<f32> = (0..77).map(|i| (i * 37 % 101) as f32 / 10.0).collect();
        let (mut a, mut b) = (x.clone(), x.iter().map(|v| v + 64.0).collect::<Vec<_>>());
        softmax(&mut a);
        softmax(&mut b);
        assert!((a.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        // The shift rounds the scores to 2^-17 of themselves.
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5));
        let exact = x.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
        assert!((log_sum_exp(&x) - exact).abs() < 1e-6);
    }

    #[test]
    fn a_row_without_finite_scores_has_no_log_sum() {
        assert!(log_sum_exp(&[f32::NAN, f32::NAN]).is_nan());
        assert!(log_sum_exp(&[f32::INFINITY, 0.0]).is_nan());
    }
}
