//! Feed-forward parts backwards, one for all tokens or several experts.

use super::{Visit, Way, columns, joined, view};
use crate::device::{Cpu, Device, Routes, Weight};
use crate::linear::Transposed;
use crate::{EngineError, math};
use bitstack_model::config::{Activation, Experts, FeedForward, FeedForwardInput, Mlp};
use ndarray::Axis;

/// What a feed-forward part came by.
pub(super) enum Kept {
    Dense(Between, Vec<f32>),
    Experts(Mixture),
}

impl Kept {
    /// Tokens x hidden; nothing where nobody asked for it.
    pub(super) fn output(&self) -> &[f32] {
        match self {
            Self::Dense(_, output) => output,
            Self::Experts(mixture) => &mixture.output,
        }
    }
}

/// Between the projections of a feed-forward part, all tokens x its size.
pub(super) struct Between {
    gate: Vec<f32>,
    /// Ones where nothing is gated.
    up: Vec<f32>,
    active: Vec<f32>,
}

/// What experts came by.
pub(super) struct Mixture {
    /// Tokens x experts.
    probabilities: Vec<f32>,
    routes: Routes,
    /// Of each expert; nothing where no token goes through it.
    experts: Vec<Option<Expert>>,
    output: Vec<f32>,
}

/// What an expert came by.
struct Expert {
    /// The rows of its tokens.
    x: Vec<f32>,
    between: Between,
    y: Vec<f32>,
}

impl<W: Weight<Cpu> + Transposed> Way<'_, W> {
    /// The feed-forward part of `x`, tokens x hidden; its output where it is needed.
    pub(super) fn mlp(&mut self, mlp: &Mlp, x: &[f32], needs_output: bool) -> Result<Kept, EngineError> {
        match mlp {
            Mlp::Dense(dense) => {
                let between = self.between(dense, x)?;
                let output = if needs_output { self.apply(dense.down, &between.active)? } else { Vec::new() };
                Ok(Kept::Dense(between, output))
            }
            Mlp::Experts(experts) => Ok(Kept::Experts(self.mixture(experts, x)?)),
        }
    }

    /// Adds the gradient by `x` to `g_x`, from `g`, that by the output; both tokens x hidden.
    pub(super) fn mlp_backward(
        &self,
        mlp: &Mlp,
        kept: Kept,
        x: &[f32],
        g: &[f32],
        g_x: &mut [f32],
        visit: &mut Visit<'_>,
    ) {
        match (mlp, kept) {
            (Mlp::Dense(dense), Kept::Dense(between, _)) => {
                self.feed_forward_backward(dense, between, x, g, g_x, visit);
            }
            (Mlp::Experts(experts), Kept::Experts(mixture)) => {
                self.mixture_backward(experts, mixture, x, g, g_x, visit);
            }
            _ => unreachable!("what is kept is that of the part"),
        }
    }

    fn between(&mut self, mlp: &FeedForward, x: &[f32]) -> Result<Between, EngineError> {
        let (gate, up, is_gated) = match mlp.input {
            FeedForwardInput::Gated { gate, up } => (self.apply(gate, x)?, self.apply(up, x)?, true),
            FeedForwardInput::FusedGated(linear) => {
                let both = self.apply(linear, x)?;
                let [gate, up] = [0, mlp.size].map(|first| columns(&both, 2 * mlp.size, first, mlp.size));
                (gate, up, true)
            }
            FeedForwardInput::Plain(linear) => {
                let gate = self.apply(linear, x)?;
                let ones = vec![1.0; gate.len()];
                (gate, ones, false)
            }
        };
        let mut active = gate.clone();
        let len = active.len();
        Cpu::activate(&mut self.queue, mlp.activation, &mut active, is_gated.then_some(&up), len)?;
        Ok(Between { gate, up, active })
    }

    fn feed_forward_backward(
        &self,
        mlp: &FeedForward,
        between: Between,
        x: &[f32],
        g: &[f32],
        g_x: &mut [f32],
        visit: &mut Visit<'_>,
    ) {
        let Between { mut gate, mut up, active } = between;
        let mut g_active = vec![0.0; active.len()];
        self.linear_backward(mlp.down, &active, g, &mut g_active, visit);
        match mlp.activation {
            Activation::Silu => math::swiglu_backward(&mut gate, &mut up, &g_active),
            Activation::GeluTanh => math::geglu_backward(&mut gate, &mut up, &g_active),
        }
        match mlp.input {
            FeedForwardInput::Gated { gate: of_gate, up: of_up } => {
                self.linear_backward(of_gate, x, &gate, g_x, visit);
                self.linear_backward(of_up, x, &up, g_x, visit);
            }
            FeedForwardInput::FusedGated(linear) => {
                let both = joined([(&gate, mlp.size), (&up, mlp.size)]);
                self.linear_backward(linear, x, &both, g_x, visit);
            }
            FeedForwardInput::Plain(linear) => self.linear_backward(linear, x, &gate, g_x, visit),
        }
    }

    fn mixture(&mut self, mlp: &Experts, x: &[f32]) -> Result<Mixture, EngineError> {
        let n = mlp.experts.len();
        let mut probabilities = self.apply(mlp.router, x)?;
        let (tokens, mut routes) = (probabilities.len() / n, Routes::default());
        Cpu::choose(&mut self.queue, &probabilities, tokens, n, mlp.n_active, mlp.normalised, &mut routes)?;
        probabilities.chunks_exact_mut(n).for_each(math::softmax);
        let width = x.len() / tokens;
        let (mut experts, mut output) = (Vec::with_capacity(n), vec![0.0; x.len()]);
        for (expert, (rows, shares)) in mlp.experts.iter().zip(routes.rows.iter().zip(&routes.shares)) {
            if rows.is_empty() {
                experts.push(None);
                continue;
            }
            let x = view(x, width).select(Axis(0), rows).into_raw_vec_and_offset().0;
            let between = self.between(expert, &x)?;
            let y = self.apply(expert.down, &between.active)?;
            Cpu::scatter(&mut self.queue, &y, width, rows, shares, &mut output)?;
            experts.push(Some(Expert { x, between, y }));
        }
        Ok(Mixture { probabilities, routes, experts, output })
    }

    /// With y = Σ aᵉ fᵉ(x): by fᵉ it is aᵉ g, by aᵉ g · fᵉ(x). Shares are probabilities p, or normalised pᵉ / Σ p over the chosen ones c; then
    /// by pᵉ it is (gᵉ − Σ aᶜ gᶜ) / Σ p from the gradients gᵉ by the shares.
    fn mixture_backward(
        &self,
        mlp: &Experts,
        mixture: Mixture,
        x: &[f32],
        g: &[f32],
        g_x: &mut [f32],
        visit: &mut Visit<'_>,
    ) {
        let Mixture { probabilities, routes, experts, .. } = mixture;
        let n = mlp.experts.len();
        let width = x.len() * n / probabilities.len();
        // By the shares, then by the probabilities, then by the scores.
        let mut g_scores = vec![0.0; probabilities.len()];
        // Of each token, Σ aᶜ gᶜ and Σ p.
        let mut sums = vec![[0.0f32; 2]; probabilities.len() / n];
        for (e, kept) in experts.into_iter().enumerate() {
            let Some(Expert { x: own, between, y }) = kept else { continue };
            let (rows, shares) = (&routes.rows[e], &routes.shares[e]);
            let mut g_y = view(g, width).select(Axis(0), rows);
            for (((row, share), mut g_y), y) in rows.iter().zip(shares).zip(g_y.rows_mut()).zip(y.chunks_exact(width)) {
                let by_share: f32 = g_y.iter().zip(y).map(|(g, y)| g * y).sum();
                g_scores[row * n + e] = by_share;
                let [mean, sum] = &mut sums[*row];
                *mean += share * by_share;
                *sum += probabilities[row * n + e];
                g_y *= *share;
            }
            let mut g_own = vec![0.0; own.len()];
            let g_y = g_y.as_slice().expect("a fresh array");
            self.feed_forward_backward(&mlp.experts[e], between, &own, g_y, &mut g_own, visit);
            for (row, g) in rows.iter().zip(g_own.chunks_exact(width)) {
                math::add(&mut g_x[row * width..(row + 1) * width], g);
            }
        }
        if mlp.normalised {
            for (e, rows) in routes.rows.iter().enumerate() {
                for row in rows {
                    let ([mean, sum], g) = (sums[*row], &mut g_scores[row * n + e]);
                    *g = (*g - mean) / sum;
                }
            }
        }
        for (p, g) in probabilities.chunks_exact(n).zip(g_scores.chunks_exact_mut(n)) {
            math::softmax_backward(p, g);
        }
        self.linear_backward(mlp.router, x, &g_scores, g_x, visit);
    }
}
