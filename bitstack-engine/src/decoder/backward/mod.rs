//! Layers and head run backwards: from the gradient of a number by the states behind them to that by the states in front.
//!
//! Derivatives of the formulas in [`decoder`](super): own derivation, checked against differences of the forward pass. Whole sequences, no cache.

mod attention;
mod mlp;

use super::check_state;
use crate::device::{Columns, Cpu, CpuQueue, Device, Weight};
use crate::linear::Transposed;
use crate::{Decoder, EngineError, Pass, math};
use bitstack_core::Threads;
use bitstack_model::config::{Linear, Norm, VectorId};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, Zip};
use std::borrow::Cow;

/// Sees inputs x (tokens x cols) of each linear operator and the gradient g by its outputs (tokens x rows): that by the weight is gᵀ x.
pub type Visit<'v> = dyn FnMut(usize, ArrayView2<'_, f32>, ArrayView2<'_, f32>) + 'v;

impl<W: Weight<Cpu> + Transposed> Decoder<W> {
    /// Takes `grad` from behind layer `layer` to in front of it, where the hidden states of one whole sequence are `hidden`; both tokens x
    /// hidden. `visit` is called for each weight of the layer, by its index; not for those of experts that no token goes through.
    ///
    /// Which experts a token goes through is taken as given: the choice has no gradient, but their shares have.
    ///
    /// # Errors
    /// [`EngineError::StateShape`]; those of the device.
    pub fn layer_backward(
        &self,
        layer: usize,
        hidden: ArrayView2<'_, f32>,
        grad: &mut Array2<f32>,
        visit: &mut Visit<'_>,
    ) -> Result<(), EngineError> {
        let config = &self.frame.config;
        check_state("hidden", hidden, config.hidden_size)?;
        check_state("gradient", grad.view(), config.hidden_size)?;
        let parts = &config.layers[layer];
        let (attention_post_norm, mlp_post_norm) = (parts.attention_post_norm, parts.mlp_post_norm);
        let scale = parts.residual_scale;
        let hidden = hidden.as_standard_layout();
        let h = hidden.as_slice().expect("made standard above");
        let mut way = Way { decoder: self, layer, queue: Cpu.queue(Threads::One)? };

        // Forward once more, keeping all that is needed on the way back.
        let normed = way.normed(parts.attention_norm, h);
        let attention = way.attention(&parts.attention, &normed)?;
        let mut middle = way.behind(attention_post_norm, scale, &attention.output);
        math::add(&mut middle, h);
        let mlp_normed = way.normed(parts.mlp_norm, &middle);
        let mlp = way.mlp(&parts.mlp, &mlp_normed, mlp_post_norm.is_some())?;

        let grad = grad.as_slice_mut().expect("gradients are in row order");
        let mut g_normed = vec![0.0; h.len()];
        let g = way.behind_backward(mlp_post_norm, scale, mlp.output(), grad);
        way.mlp_backward(&parts.mlp, mlp, &mlp_normed, &g, &mut g_normed, visit);
        way.normed_backward(parts.mlp_norm, &middle, &g_normed, grad);

        g_normed.fill(0.0);
        let g = way.behind_backward(attention_post_norm, scale, &attention.output, grad);
        way.attention_backward(&parts.attention, &attention, &normed, &g, &mut g_normed, visit);
        way.normed_backward(parts.attention_norm, h, &g_normed, grad);
        Ok(())
    }

    /// The gradient by the hidden states in front of the final norm, tokens x hidden, of a number whose gradient by the logits `gradient`
    /// makes of the logits, in place (tokens x vocabulary). It is shown the head's inputs too, tokens x hidden, and the slopes of the logits by what the
    /// head gives, tokens x vocabulary, where those are not 1.
    ///
    /// # Errors
    /// [`EngineError::StateShape`]; those of the device.
    pub fn head_backward(
        &self,
        hidden: ArrayView2<'_, f32>,
        gradient: impl FnOnce(ArrayView2<'_, f32>, Option<ArrayView2<'_, f32>>, &mut Array2<f32>),
    ) -> Result<Array2<f32>, EngineError> {
        let config = &self.frame.config;
        let width = config.hidden_size;
        let mut logits = self.logits(hidden, &mut Pass::new())?;
        let hidden = hidden.as_standard_layout();
        let h = hidden.as_slice().expect("made standard above");
        let (weight, eps) = (&self.frame.vectors[config.norm.weight.index()], config.norm.eps);
        let mut normed = vec![0.0; h.len()];
        math::rms_norm(h, weight, eps, &mut normed);
        let scale = config.logit_scale.unwrap_or(1.0);
        let slopes = match config.logit_cap {
            Some(cap) => Some(logits.mapv(|logit| scale * cap_slope(logit, cap))),
            None => (scale != 1.0).then(|| Array2::from_elem(logits.dim(), scale)),
        };
        gradient(view(&normed, width), slopes.as_ref().map(|slopes| slopes.view()), &mut logits);
        if let Some(slopes) = slopes {
            Zip::from(&mut logits).and(&slopes).for_each(|g, slope| *g *= slope);
        }
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

/// A layer on the way back.
struct Way<'l, W> {
    decoder: &'l Decoder<W>,
    layer: usize,
    queue: CpuQueue,
}

impl<W: Weight<Cpu> + Transposed> Way<'_, W> {
    fn index(&self, linear: Linear) -> usize {
        self.decoder.frame.config.index(linear.weight)
    }

    fn weight(&self, linear: Linear) -> &W {
        &self.decoder.weights[self.index(linear)]
    }

    fn vector(&self, id: VectorId) -> &[f32] {
        &self.decoder.frame.vectors[id.index()]
    }

    /// What a linear operator gives for `x`, rows of its inputs.
    fn apply(&mut self, linear: Linear, x: &[f32]) -> Result<Vec<f32>, EngineError> {
        let decoder = self.decoder;
        let weight = &decoder.weights[self.index(linear)];
        let tokens = x.len() / weight.cols();
        let mut y = vec![0.0; tokens * weight.rows()];
        // Buffers of the CPU are vectors.
        weight.multiply(&mut self.queue, &x.to_vec(), tokens, &mut y, Columns::all(weight.rows()))?;
        if let Some(bias) = linear.bias {
            math::add_bias(&mut y, &decoder.frame.vectors[bias.index()]);
        }
        Ok(y)
    }

    /// Shows a linear operator's inputs and the gradient by its outputs, and adds that by its inputs to `g_x`.
    fn linear_backward(&self, linear: Linear, x: &[f32], g: &[f32], g_x: &mut [f32], visit: &mut Visit<'_>) {
        let weight = self.weight(linear);
        let (rows, cols) = (weight.rows(), weight.cols());
        visit(self.index(linear), view(x, cols), view(g, rows));
        weight.add_transposed(view(g, rows), view_mut(g_x, cols));
    }

    /// A norm of `x`, or `x` where there is none.
    fn normed<'x>(&self, norm: Option<Norm>, x: &'x [f32]) -> Cow<'x, [f32]> {
        let Some(norm) = norm else { return Cow::Borrowed(x) };
        let mut y = vec![0.0; x.len()];
        math::rms_norm(x, self.vector(norm.weight), norm.eps, &mut y);
        Cow::Owned(y)
    }

    /// Adds the gradient by the input `x` of a norm to `g_x`, from `g`, that by its output.
    fn normed_backward(&self, norm: Option<Norm>, x: &[f32], g: &[f32], g_x: &mut [f32]) {
        match norm {
            Some(norm) => math::rms_norm_backward(x, self.vector(norm.weight), norm.eps, g, g_x),
            None => math::add(g_x, g),
        }
    }

    /// What is added to the state where a part of the layer gives `x`.
    fn behind(&self, norm: Option<Norm>, scale: Option<f32>, x: &[f32]) -> Vec<f32> {
        let mut y = self.normed(norm, x).into_owned();
        if let Some(scale) = scale {
            math::scale(&mut y, scale);
        }
        y
    }

    /// The gradient by `x` from `g`, that by what is added.
    fn behind_backward<'g>(&self, norm: Option<Norm>, scale: Option<f32>, x: &[f32], g: &'g [f32]) -> Cow<'g, [f32]> {
        let mut g = Cow::Borrowed(g);
        if let Some(scale) = scale {
            math::scale(g.to_mut(), scale);
        }
        if norm.is_some() {
            let mut g_x = vec![0.0; x.len()];
            self.normed_backward(norm, x, &g, &mut g_x);
            g = Cow::Owned(g_x);
        }
        g
    }
}

/// The slope of cap · tanh(x / cap), from its value: 1 − tanh².
fn cap_slope(value: f32, cap: f32) -> f32 {
    1.0 - (value / cap).powi(2)
}

/// The columns from `first` on of rows of `width`, `n` of them.
fn columns(x: &[f32], width: usize, first: usize, n: usize) -> Vec<f32> {
    x.chunks_exact(width).flat_map(|row| &row[first..first + n]).copied().collect()
}

/// Puts matrices side by side, each with its number of columns.
fn joined<const N: usize>(parts: [(&[f32], usize); N]) -> Vec<f32> {
    let rows = parts[0].0.len() / parts[0].1;
    let row = |r: usize| parts.into_iter().flat_map(move |(x, n)| &x[r * n..(r + 1) * n]);
    (0..rows).flat_map(row).copied().collect()
}

fn view(x: &[f32], cols: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((x.len() / cols, cols), x).expect("whole rows")
}

fn view_mut(x: &mut [f32], cols: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((x.len() / cols, cols), x).expect("whole rows")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{MODELS, checkpoint};
    use bitstack_model::{Dense, Elements};

    const STEPS: [f32; 3] = [1e-2, 3e-3, 1e-3];

    /// A model of the test data, with caps of scores and logits too: they have none, or only one.
    fn model(name: &str) -> Decoder<Dense> {
        let mut model = Decoder::load(&checkpoint(name)).unwrap().widened();
        if name == "gemma3" {
            let config = &mut std::sync::Arc::get_mut(&mut model.frame).unwrap().config;
            config.layers.iter_mut().for_each(|layer| layer.attention.score_cap = Some(2.0));
        }
        model
    }

    /// Values between -1 and 1 without a pattern that any product could cancel.
    fn noise(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(r, c)| ((r * 7919 + c * 104_729 + seed * 31) as f32).sin())
    }

    fn dot(a: &Array2<f32>, b: &Array2<f32>) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    /// Against (f(x + εd) − f(x − εd)) / 2ε of f = Σ c ⊙ layer(x). The forward pass is f32: its rounding, 1e-6 of f or so, over ε = 1e-2, and
    /// third derivatives times ε² leave less than 1 % of a difference that is not small; sums are compared, relative to their largest term. A token that
    /// comes to another expert within a step spoils it: the smallest meets none here.
    fn check(name: &str, found: f64, f: impl Fn(f32) -> f64) {
        let differences = STEPS.map(|e: f32| (f(e) - f(-e)) / (2.0 * f64::from(e)));
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
                    let at = STEPS.map(|e| [slope(e), slope(-e)]);
                    model.replace(w, own).unwrap();
                    let of = |e: f32| at[STEPS.iter().position(|x| *x == e.abs()).unwrap()][usize::from(e < 0.0)];
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
            let grad = model.head_backward(x.view(), |_, _, g| g.assign(&c)).unwrap();
            let d = noise(9, width, 3);
            let f = |e: f32| dot(&model.logits((&x + &(&d * e)).view(), &mut Pass::new()).unwrap(), &c);
            check(name, dot(&grad, &d), f);
        }
    }
}
