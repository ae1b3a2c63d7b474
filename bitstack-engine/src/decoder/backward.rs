//! Layers and head run backwards: from the gradient of a number by the states behind them to that by the states in front.
//!
//! Derivatives of the formulas in [`decoder`](super): own derivation, checked against differences of the forward pass. Whole sequences, no cache.

use super::check_state;
use crate::device::{Columns, Context, Cpu, CpuQueue, Device, QUERY_BLOCK, Sequence, Weight};
use crate::linear::Transposed;
use crate::{Decoder, EngineError, Pass, math};
use bitstack_core::Threads;
use bitstack_model::config::{
    Activation, Attention, FeedForward, FeedForwardInput, Linear, Mlp, Norm, Projections, VectorId,
};
use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};

/// Sees inputs x (tokens x cols) of each linear operator and the gradient g by its outputs (tokens x rows): that by the weight is gᵀ x.
pub type Visit<'v> = dyn FnMut(usize, ArrayView2<'_, f32>, ArrayView2<'_, f32>) + 'v;

impl<W: Weight<Cpu>> Decoder<W> {
    /// Takes `grad` from behind layer `layer` to in front of it, where the hidden states of one whole sequence are `hidden`; both tokens x
    /// hidden. `visit` is called for each weight of the layer, by its index.
    ///
    /// # Errors
    /// [`EngineError::StateShape`]; [`EngineError::NoGradient`] for a layer with other parts than separate projections, a gated feed-forward part with
    /// SiLU, and norms in front.
    pub fn layer_backward(
        &self,
        layer: usize,
        hidden: ArrayView2<'_, f32>,
        grad: &mut Array2<f32>,
        visit: &mut Visit<'_>,
    ) -> Result<(), EngineError>
    where
        W: Transposed,
    {
        let config = &self.frame.config;
        let (tokens, width) = (hidden.nrows(), config.hidden_size);
        check_state("hidden", hidden, width)?;
        check_state("gradient", grad.view(), width)?;
        let parts = &config.layers[layer];
        let attention = &parts.attention;
        let (Projections::Separate { query, key, value }, None, None, None) =
            (attention.projections, attention.score_cap, parts.attention_post_norm, parts.mlp_post_norm)
        else {
            return Err(EngineError::NoGradient { layer });
        };
        let Mlp::Dense(FeedForward {
            size: inner,
            input: FeedForwardInput::Gated { gate, up },
            activation: Activation::Silu,
            down,
        }) = parts.mlp
        else {
            return Err(EngineError::NoGradient { layer });
        };
        let (q_size, kv_size) = (attention.query_size(), attention.kv_size());
        let index = |linear: Linear| config.index(linear.weight);
        let weight = |linear: Linear| &self.weights[index(linear)];
        let vector = |id: VectorId| &self.frame.vectors[id.index()][..];
        let norm = |x: &[f32], norm: Norm| {
            let mut y = vec![0.0; x.len()];
            math::rms_norm(x, vector(norm.weight), norm.eps, &mut y);
            y
        };
        let mut queue = Cpu.queue(Threads::One)?;
        let hidden = hidden.as_standard_layout();
        let h = hidden.as_slice().expect("made standard above");
        let apply = |queue: &mut CpuQueue, linear: Linear, x: &Vec<f32>| {
            let weight = weight(linear);
            let mut y = vec![0.0; tokens * weight.rows()];
            weight.multiply(queue, x, tokens, &mut y, Columns::all(weight.rows()))?;
            if let Some(bias) = linear.bias {
                math::add_bias(&mut y, vector(bias));
            }
            Ok::<_, EngineError>(y)
        };

        // Forward once more, keeping all that is needed on the way back.
        let normed = norm(h, parts.attention_norm);
        let (q_raw, k_raw, values) =
            (apply(&mut queue, query, &normed)?, apply(&mut queue, key, &normed)?, apply(&mut queue, value, &normed)?);
        let rope = &self.frame.ropes[layer];
        let ready = |raw: &[f32], norm: Option<Norm>, heads: usize| {
            let mut x = raw.to_vec();
            if let Some(norm) = norm {
                math::rms_norm_in_place(&mut x, vector(norm.weight), norm.eps);
            }
            rope.rotate(&mut x, heads, 0);
            x
        };
        let q = ready(&q_raw, attention.query_norm, attention.n_heads);
        let keys = ready(&k_raw, attention.key_norm, attention.n_kv_heads);
        let mut mixed = vec![0.0; tokens * q_size];
        let sequence = [Sequence { past: 0, rows: tokens }];
        let context = Context::Own { keys: &keys, values: &values };
        Cpu::attend(&mut queue, attention, &q, &sequence, context, &mut mixed)?;
        let mut middle = apply(&mut queue, attention.output, &mixed)?;
        math::add(&mut middle, h);
        let mlp_normed = norm(&middle, parts.mlp_norm);
        let (g, u) = (apply(&mut queue, gate, &mlp_normed)?, apply(&mut queue, up, &mlp_normed)?);
        let mut active = g.clone();
        math::swiglu(&mut active, &u);

        // Backward: the mlp.
        let grad = grad.as_slice_mut().expect("gradients are in row order");
        visit(index(down), view(&active, inner), view(grad, width));
        let mut g_active = vec![0.0; tokens * inner];
        weight(down).add_transposed(view(grad, width), view_mut(&mut g_active, inner));
        let (mut g_gate, mut g_up) = (g, u);
        math::swiglu_backward(&mut g_gate, &mut g_up, &g_active);
        visit(index(gate), view(&mlp_normed, width), view(&g_gate, inner));
        visit(index(up), view(&mlp_normed, width), view(&g_up, inner));
        let mut g_normed = vec![0.0; tokens * width];
        weight(gate).add_transposed(view(&g_gate, inner), view_mut(&mut g_normed, width));
        weight(up).add_transposed(view(&g_up, inner), view_mut(&mut g_normed, width));
        math::rms_norm_backward(&middle, vector(parts.mlp_norm.weight), parts.mlp_norm.eps, &g_normed, grad);

        // The attention.
        visit(index(attention.output), view(&mixed, q_size), view(grad, width));
        let mut g_mixed = vec![0.0; tokens * q_size];
        weight(attention.output).add_transposed(view(grad, width), view_mut(&mut g_mixed, q_size));
        let [mut g_q, mut g_k, mut g_v] = [q_size, kv_size, kv_size].map(|size| vec![0.0; tokens * size]);
        attention_backward(attention, [&q, &keys, &values, &g_mixed], [&mut g_q, &mut g_k, &mut g_v]);
        for (g, raw, norm, heads) in [
            (&mut g_q, &q_raw, attention.query_norm, attention.n_heads),
            (&mut g_k, &k_raw, attention.key_norm, attention.n_kv_heads),
        ] {
            rope.rotate_back(g, heads);
            if let Some(norm) = norm {
                let behind = std::mem::replace(g, vec![0.0; raw.len()]);
                math::rms_norm_backward(raw, vector(norm.weight), norm.eps, &behind, g);
            }
        }
        g_normed.fill(0.0);
        for (linear, g) in [(query, &g_q), (key, &g_k), (value, &g_v)] {
            let rows = weight(linear).rows();
            visit(index(linear), view(&normed, width), view(g, rows));
            weight(linear).add_transposed(view(g, rows), view_mut(&mut g_normed, width));
        }
        math::rms_norm_backward(h, vector(parts.attention_norm.weight), parts.attention_norm.eps, &g_normed, grad);
        Ok(())
    }

    /// The gradient by the hidden states in front of the final norm, tokens x hidden, of a number whose gradient by the logits `gradient`
    /// makes of the logits, in place (tokens x vocabulary); it is shown the head's inputs too, tokens x hidden.
    ///
    /// # Errors
    /// [`EngineError::StateShape`]; [`EngineError::NoGradient`] where logits are capped.
    pub fn head_backward(
        &self,
        hidden: ArrayView2<'_, f32>,
        gradient: impl FnOnce(ArrayView2<'_, f32>, &mut Array2<f32>),
    ) -> Result<Array2<f32>, EngineError>
    where
        W: Transposed,
    {
        let config = &self.frame.config;
        let width = config.hidden_size;
        if config.logit_cap.is_some() {
            return Err(EngineError::NoGradient { layer: config.n_layers() });
        }
        let mut logits = self.logits(hidden, &mut Pass::new())?;
        let hidden = hidden.as_standard_layout();
        let h = hidden.as_slice().expect("made standard above");
        let (weight, eps) = (&self.frame.vectors[config.norm.weight.index()], config.norm.eps);
        let mut normed = vec![0.0; h.len()];
        math::rms_norm(h, weight, eps, &mut normed);
        gradient(view(&normed, width), &mut logits);
        let mut g_normed = vec![0.0; normed.len()];
        let parts = logits.axis_chunks_iter(Axis(1), config.vocab_part_rows);
        for (part, g) in self.weights[config.head()].iter().zip(parts) {
            part.add_transposed(g.as_standard_layout().view(), view_mut(&mut g_normed, width));
        }
        let mut grad = Array2::zeros(hidden.dim());
        math::rms_norm_backward(h, weight, eps, &g_normed, grad.as_slice_mut().expect("a fresh array"));
        Ok(grad)
    }
}

fn view(x: &[f32], cols: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((x.len() / cols, cols), x).expect("whole rows")
}

fn view_mut(x: &mut [f32], cols: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((x.len() / cols, cols), x).expect("whole rows")
}

/// The gradients by q, keys and values, all zero before, from those: `[q, keys, values, gradient by the output]`, shaped as in [`Device::attend`].
///
/// With P = softmax(s Q Kᵀ) and O = P V: by V it is Pᵀ G, by the scores P ⊙ (G Vᵀ − rowsum(P ⊙ G Vᵀ)) =: S, by Q s S K, by K s Sᵀ Q.
fn attention_backward(attention: &Attention, [q, keys, values, g_out]: [&[f32]; 4], [g_q, g_k, g_v]: [&mut [f32]; 3]) {
    let Attention { head_dim, n_heads, n_kv_heads, window, scale, .. } = *attention;
    let group = n_heads / n_kv_heads;
    let (q_size, kv_size) = (attention.query_size(), attention.kv_size());
    let tokens = q.len() / q_size;
    let [q, g_out] = [q, g_out].map(|x| MatRef::from_row_major_slice(x, tokens, q_size));
    let [keys, values] = [keys, values].map(|x| MatRef::from_row_major_slice(x, tokens, kv_size));
    let mut g_q = MatMut::from_row_major_slice_mut(g_q, tokens, q_size);
    let [mut g_k, mut g_v] = [g_k, g_v].map(|x| MatMut::from_row_major_slice_mut(x, tokens, kv_size));
    let (mut scores, mut g_scores) = (Vec::new(), Vec::new());
    for head in 0..n_heads {
        let [q, g_out] = [q, g_out].map(|x| x.subcols(head * head_dim, head_dim));
        let kv = head / group * head_dim;
        let [keys, values] = [keys, values].map(|x| x.subcols(kv, head_dim));
        for start in (0..tokens).step_by(QUERY_BLOCK) {
            let rows = QUERY_BLOCK.min(tokens - start);
            let first = window.map_or(0, |w| (start + 1).saturating_sub(w));
            let span = start + rows - first;
            let [keys, values] = [keys, values].map(|x| x.subrows(first, span));
            let [q, g_out] = [q, g_out].map(|x| x.subrows(start, rows));
            scores.resize(rows * span, 0.0);
            g_scores.resize(rows * span, 0.0);
            math::product(MatMut::from_row_major_slice_mut(&mut scores, rows, span), q, keys.transpose(), scale);
            math::product(MatMut::from_row_major_slice_mut(&mut g_scores, rows, span), g_out, values.transpose(), 1.0);
            for (r, (p, g)) in scores.chunks_exact_mut(span).zip(g_scores.chunks_exact_mut(span)).enumerate() {
                let end = start + r + 1 - first;
                let begin = window.map_or(0, |w| end.saturating_sub(w));
                for outside in [0..begin, end..span] {
                    p[outside.clone()].fill(0.0);
                    g[outside].fill(0.0);
                }
                math::softmax(&mut p[begin..end]);
                math::softmax_backward(&p[begin..end], &mut g[begin..end]);
            }
            let p = MatRef::from_row_major_slice(&scores, rows, span);
            let g = MatRef::from_row_major_slice(&g_scores, rows, span);
            let block = |x: &mut MatMut<'_, f32>, from: usize, n: usize, at: usize, a: MatRef<'_, f32>, b, factor| {
                math::add_product(x.rb_mut().submatrix_mut(from, at, n, head_dim), a, b, factor);
            };
            block(&mut g_v, first, span, kv, p.transpose(), g_out, 1.0);
            block(&mut g_q, start, rows, head * head_dim, g, keys, scale);
            block(&mut g_k, first, span, kv, g.transpose(), q, scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitstack_model::{Checkpoint, Dense, Elements};
    use std::path::Path;

    const MODELS: [&str; 6] = ["llama", "llama31", "mistral", "mistral_window", "qwen2", "qwen3"];

    fn model(name: &str) -> Decoder<Dense> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bitstack-model/tests/data").join(name);
        Decoder::load(&Checkpoint::open(&dir).unwrap()).unwrap().widened()
    }

    /// Values between -1 and 1 without a pattern that any product could cancel.
    fn noise(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(r, c)| ((r * 7919 + c * 104_729 + seed * 31) as f32).sin())
    }

    fn dot(a: &Array2<f32>, b: &Array2<f32>) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    /// Against (f(x + εd) − f(x − εd)) / 2ε of f = Σ c ⊙ layer(x). The forward pass is f32: its rounding, 1e-6 of f or so, over ε = 1e-2, and
    /// third derivatives times ε² leave less than 1 % of a difference that is not small; sums are compared, relative to their largest term.
    fn check(name: &str, found: f64, f: impl Fn(f32) -> f64) {
        let differences = [1e-2, 3e-3].map(|e: f32| (f(e) - f(-e)) / (2.0 * f64::from(e)));
        let near = |d: f64| (found - d).abs() <= 0.01 * d.abs() + 2e-3;
        assert!(differences.into_iter().any(near), "{name}: {found}, differences {differences:?}");
    }

    #[test]
    fn gradients_of_layers_are_the_slopes_of_the_forward_pass() {
        for name in MODELS {
            let mut model = model(name);
            let width = model.config().hidden_size;
            let tokens = 70;
            for layer in 0..model.config().n_layers() {
                let (x, c) = (noise(tokens, width, layer), noise(tokens, width, 50 + layer));
                let f = |model: &Decoder<Dense>, x: &Array2<f32>| {
                    let mut out = x.clone();
                    model.layer(layer, &mut out, &mut Pass::new()).unwrap();
                    dot(&out, &c)
                };
                let mut grad = c.clone();
                let mut by_weight = Vec::new();
                model
                    .layer_backward(layer, x.view(), &mut grad, &mut |w, x, g| by_weight.push((w, g.t().dot(&x))))
                    .unwrap();
                let d = noise(tokens, width, 99);
                check(name, dot(&grad, &d), |e| f(&model, &(&x + &(&d * e))));

                let mut seen: Vec<usize> = by_weight.iter().map(|(w, _)| *w).collect();
                seen.sort_unstable();
                assert_eq!(seen, model.config().layer_weights(layer).collect::<Vec<_>>());
                for (w, g) in by_weight {
                    let own = model.weights()[w].clone();
                    let values = Array2::from_shape_vec(g.dim(), own.clone().into_elements().into_f32()).unwrap();
                    // A step of a share of the weight itself.
                    let d = noise(g.nrows(), g.ncols(), w) * (values.mapv(|v| v * v).mean().unwrap().sqrt());
                    let mut slope = |e: f32| {
                        let moved = (&values + &(&d * e)).into_raw_vec_and_offset().0;
                        let moved = Dense::new(g.nrows(), g.ncols(), Elements::F32(moved)).unwrap();
                        model.replace(w, moved).unwrap();
                        f(&model, &x)
                    };
                    let at = [1e-2, -1e-2, 3e-3, -3e-3].map(&mut slope);
                    model.replace(w, own).unwrap();
                    let of = |e: f32| at[[1e-2, -1e-2, 3e-3, -3e-3].iter().position(|x| *x == e).unwrap()];
                    check(&format!("{name}, weight {w}"), dot(&g, &d), of);
                }
            }
        }
    }

    #[test]
    fn gradients_of_heads_are_the_slopes_of_the_logits() {
        for name in MODELS {
            let model = model(name);
            let width = model.config().hidden_size;
            let (x, c) = (noise(9, width, 1), noise(9, model.config().vocab_size, 2));
            let grad = model.head_backward(x.view(), |_, g| g.assign(&c)).unwrap();
            let d = noise(9, width, 3);
            let f = |e: f32| dot(&model.logits((&x + &(&d * e)).view(), &mut Pass::new()).unwrap(), &c);
            check(name, dot(&grad, &d), f);
        }
    }
}
