//! One layer, over the operations of a device, with whatever stands in its slots.

use super::pass::{Parts, Scratch};
use super::{Decoder, Frame};
use crate::device::{Columns, Context, Device, Done, Weight};
use bitstack_model::config::{
    Attention, Experts, FeedForward, FeedForwardInput, Linear, Mlp, Norm, Projections, VectorId,
};

/// A layer at work: h += attention(norm(h)); h += mlp(norm(h)), with a norm behind them as well, or instead.
pub(super) struct Layer<'l, W, D: Device> {
    pub(super) decoder: &'l Decoder<W, D>,
    pub(super) index: usize,
    pub(super) rows: usize,
}

impl<W: Weight<D>, D: Device> Layer<'_, W, D> {
    /// Takes `scratch.state` through the layer.
    pub(super) fn run(&self, pass: &mut Parts<'_, '_, D>) -> Done {
        let config = self.frame().config();
        let layer = &config.layers[self.index];
        let len = self.rows * config.hidden_size;
        D::reserve(pass.queue, &mut pass.scratch.normed, len)?;
        D::reserve(pass.queue, &mut pass.scratch.delta, len)?;

        self.norm_state(layer.attention_norm, pass)?;
        self.attention(&layer.attention, pass)?;
        self.add_delta(layer.attention_post_norm, layer.residual_scale, pass)?;

        self.norm_state(layer.mlp_norm, pass)?;
        match &layer.mlp {
            Mlp::Dense(mlp) => self.feed_forward(mlp, self.rows, pass)?,
            Mlp::Experts(experts) => self.experts(experts, pass)?,
        }
        self.add_delta(layer.mlp_post_norm, layer.residual_scale, pass)
    }

    fn frame(&self) -> &Frame<D> {
        &self.decoder.frame
    }

    fn hidden_size(&self) -> usize {
        self.frame().config().hidden_size
    }

    fn weight(&self, linear: Linear) -> &W {
        &self.decoder.weights[self.frame().config().index(linear.weight)]
    }

    fn indices<const N: usize>(&self, linears: [Linear; N]) -> [usize; N] {
        linears.map(|linear| self.frame().config().index(linear.weight))
    }

    fn bias(&self, linear: Linear, rows: usize, y: &mut D::Buffer, queue: &mut D::Queue) -> Done {
        match linear.bias {
            Some(bias) => D::add_bias(queue, y, rows, self.vector(bias), self.weight(linear).rows()),
            None => Ok(()),
        }
    }

    fn vector(&self, id: VectorId) -> &D::Buffer {
        &self.frame().vectors[id.index()]
    }

    /// The norm of the state, or the state itself.
    fn norm_state(&self, norm: Option<Norm>, pass: &mut Parts<'_, '_, D>) -> Done {
        let Scratch { state, normed, .. } = &mut *pass.scratch;
        match norm {
            Some(norm) => D::norm(pass.queue, state, self.rows, self.vector(norm.weight), norm.len, norm.eps, normed),
            None => D::copy(pass.queue, state, 0..self.rows * self.hidden_size(), normed, 0),
        }
    }

    /// Adds what a part of the layer gave to the state, through a norm and times a factor where there are such.
    fn add_delta(&self, norm: Option<Norm>, scale: Option<f32>, pass: &mut Parts<'_, '_, D>) -> Done {
        let Scratch { state, delta, .. } = &mut *pass.scratch;
        let len = self.rows * self.hidden_size();
        self.norm_in_place(norm, delta, len, pass.queue)?;
        if let Some(scale) = scale {
            D::scale(pass.queue, delta, len, scale)?;
        }
        D::add(pass.queue, state, delta, len)
    }

    /// The norm of the first `len` numbers in place, where there is one.
    fn norm_in_place(&self, norm: Option<Norm>, x: &mut D::Buffer, len: usize, queue: &mut D::Queue) -> Done {
        match norm {
            Some(norm) => D::norm_in_place(queue, x, len / norm.len, self.vector(norm.weight), norm.len, norm.eps),
            None => Ok(()),
        }
    }

    /// From `normed` to `delta`.
    fn attention(&self, attention: &Attention, pass: &mut Parts<'_, '_, D>) -> Done {
        let rows = self.rows;
        let (q_size, head_dim) = (attention.query_size(), attention.head_dim);
        self.project(attention, pass)?;
        let Scratch { q, k, v, mixed, .. } = &mut *pass.scratch;
        self.norm_in_place(attention.query_norm, q, rows * q_size, pass.queue)?;
        self.norm_in_place(attention.key_norm, k, rows * attention.kv_size(), pass.queue)?;
        if let Some(rope) = &self.frame().ropes[self.index] {
            D::rotate(pass.queue, q, attention.n_heads, head_dim, rope, pass.sequences)?;
            D::rotate(pass.queue, k, attention.n_kv_heads, head_dim, rope, pass.sequences)?;
        }

        let mut first = 0;
        for (cache, sequence) in pass.caches.iter_mut().zip(pass.sequences) {
            cache.append(pass.queue, self.index, [k, v], first, sequence.rows)?;
            first += sequence.rows;
        }
        let context = match &*pass.caches {
            [] => Context::Own { keys: k, values: v },
            caches => Context::Cached { caches, layer: self.index },
        };
        D::reserve(pass.queue, mixed, rows * q_size)?;
        D::attend(pass.queue, attention, q, pass.sequences, context, mixed)?;

        pass.observe(&self.indices([attention.output]), |s| &s.mixed, [rows, q_size])?;
        let Scratch { mixed, delta, .. } = &mut *pass.scratch;
        let output = self.weight(attention.output);
        W::multiply_group([output], pass.queue, mixed, rows, [&mut *delta])?;
        self.bias(attention.output, rows, delta, pass.queue)
    }

    /// Queries, keys and values of `normed`.
    fn project(&self, attention: &Attention, pass: &mut Parts<'_, '_, D>) -> Done {
        let rows = self.rows;
        let (q_size, kv_size) = (attention.query_size(), attention.kv_size());
        let Scratch { q, k, v, .. } = &mut *pass.scratch;
        for (buffer, size) in [(q, q_size), (k, kv_size), (v, kv_size)] {
            D::reserve(pass.queue, buffer, rows * size)?;
        }
        let shape = [rows, self.hidden_size()];
        match attention.projections {
            Projections::Separate { query, key, value } => {
                pass.observe(&self.indices([query, key, value]), |s| &s.normed, shape)?;
                let Scratch { normed, q, k, v, .. } = &mut *pass.scratch;
                let weights = [query, key, value].map(|linear| self.weight(linear));
                W::multiply_group(weights, pass.queue, normed, rows, [&mut *q, &mut *k, &mut *v])?;
                for (linear, y) in [(query, q), (key, k), (value, v)] {
                    self.bias(linear, rows, y, pass.queue)?;
                }
            }
            Projections::Fused(linear) => {
                pass.observe(&self.indices([linear]), |s| &s.normed, shape)?;
                let Scratch { normed, q, k, v, fused, .. } = &mut *pass.scratch;
                let width = q_size + 2 * kv_size;
                self.fused(linear, rows, normed, fused, pass.queue)?;
                D::columns(pass.queue, fused, rows, width, 0..q_size, q)?;
                D::columns(pass.queue, fused, rows, width, q_size..q_size + kv_size, k)?;
                D::columns(pass.queue, fused, rows, width, q_size + kv_size..width, v)?;
            }
        }
        Ok(())
    }

    /// Several projections in one weight.
    fn fused(&self, linear: Linear, rows: usize, x: &D::Buffer, y: &mut D::Buffer, queue: &mut D::Queue) -> Done {
        let weight = self.weight(linear);
        D::reserve(queue, y, rows * weight.rows())?;
        weight.multiply(queue, x, rows, y, Columns::all(weight.rows()))?;
        self.bias(linear, rows, y, queue)
    }

    /// From the first `rows` rows of `normed` to those of `delta`.
    fn feed_forward(&self, mlp: &FeedForward, rows: usize, pass: &mut Parts<'_, '_, D>) -> Done {
        let (shape, len) = ([rows, self.hidden_size()], rows * mlp.size);
        let Scratch { gate, up, .. } = &mut *pass.scratch;
        D::reserve(pass.queue, gate, len)?;
        D::reserve(pass.queue, up, len)?;
        let is_gated = match mlp.input {
            FeedForwardInput::Gated { gate, up } => {
                pass.observe(&self.indices([gate, up]), |s| &s.normed, shape)?;
                let Scratch { normed, gate: g, up: u, .. } = &mut *pass.scratch;
                let weights = [gate, up].map(|linear| self.weight(linear));
                W::multiply_group(weights, pass.queue, normed, rows, [&mut *g, &mut *u])?;
                self.bias(gate, rows, g, pass.queue)?;
                self.bias(up, rows, u, pass.queue)?;
                true
            }
            FeedForwardInput::FusedGated(linear) => {
                pass.observe(&self.indices([linear]), |s| &s.normed, shape)?;
                let Scratch { normed, gate, up, fused, .. } = &mut *pass.scratch;
                self.fused(linear, rows, normed, fused, pass.queue)?;
                D::columns(pass.queue, fused, rows, 2 * mlp.size, 0..mlp.size, gate)?;
                D::columns(pass.queue, fused, rows, 2 * mlp.size, mlp.size..2 * mlp.size, up)?;
                true
            }
            FeedForwardInput::Plain(linear) => {
                pass.observe(&self.indices([linear]), |s| &s.normed, shape)?;
                let Scratch { normed, gate, .. } = &mut *pass.scratch;
                W::multiply_group([self.weight(linear)], pass.queue, normed, rows, [&mut *gate])?;
                self.bias(linear, rows, gate, pass.queue)?;
                false
            }
        };
        let Scratch { gate, up, .. } = &mut *pass.scratch;
        D::activate(pass.queue, mlp.activation, gate, is_gated.then_some(&*up), len)?;
        pass.observe(&self.indices([mlp.down]), |s| &s.gate, [rows, mlp.size])?;
        let Scratch { gate, delta, .. } = &mut *pass.scratch;
        W::multiply_group([self.weight(mlp.down)], pass.queue, gate, rows, [&mut *delta])?;
        self.bias(mlp.down, rows, delta, pass.queue)
    }

    /// From `normed` to `delta`, each row through the experts that the router chooses for it.
    fn experts(&self, mlp: &Experts, pass: &mut Parts<'_, '_, D>) -> Done {
        let (rows, width, n) = (self.rows, self.hidden_size(), mlp.experts.len());
        pass.observe(&self.indices([mlp.router]), |s| &s.normed, [rows, width])?;
        let Scratch { normed, delta, fused, routed, expert, routes, .. } = &mut *pass.scratch;
        self.fused(mlp.router, rows, normed, fused, pass.queue)?;
        D::choose(pass.queue, fused, rows, n, mlp.n_active, mlp.normalised, routes)?;
        D::clear(pass.queue, delta, rows * width)?;
        D::reserve(pass.queue, routed, rows * width)?;
        D::reserve(pass.queue, expert, rows * width)?;
        for (i, feed_forward) in mlp.experts.iter().enumerate() {
            let own = std::mem::take(&mut pass.scratch.routes.rows[i]);
            if own.is_empty() {
                self.observe_unused(feed_forward, pass)?;
            } else {
                D::gather(pass.queue, &pass.scratch.normed, width, &own, &mut pass.scratch.routed)?;
                pass.scratch.turn_to_expert();
                let done = self.feed_forward(feed_forward, own.len(), pass);
                pass.scratch.turn_to_expert();
                done?;
                let Scratch { delta, expert, routes, .. } = &mut *pass.scratch;
                D::scatter(pass.queue, expert, width, &own, &routes.shares[i], delta)?;
            }
            pass.scratch.routes.rows[i] = own;
        }
        Ok(())
    }

    /// Shows the observer that no row goes through an expert.
    fn observe_unused(&self, mlp: &FeedForward, pass: &mut Parts<'_, '_, D>) -> Done {
        let shape = [0, self.hidden_size()];
        match mlp.input {
            FeedForwardInput::Gated { gate, up } => pass.observe(&self.indices([gate, up]), |s| &s.normed, shape),
            FeedForwardInput::FusedGated(linear) | FeedForwardInput::Plain(linear) => {
                pass.observe(&self.indices([linear]), |s| &s.normed, shape)
            }
        }?;
        pass.observe(&self.indices([mlp.down]), |s| &s.normed, [0, mlp.size])
    }
}
