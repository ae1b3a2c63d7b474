//! The attention backwards.

use super::{Visit, Way, cap_slope, columns, joined};
use crate::device::{Context, Cpu, Device, QUERY_BLOCK, Sequence, Weight};
use crate::linear::Transposed;
use crate::{EngineError, math};
use bitstack_model::config::{Attention, Projections};
use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};

/// What an attention came by, all tokens x their widths.
pub(super) struct Attended {
    /// Queries and keys as the projections gave them.
    raw: [Vec<f32>; 2],
    /// Queries and keys behind their norms, turned.
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// In front of the output projection.
    mixed: Vec<f32>,
    pub(super) output: Vec<f32>,
}

impl<W: Weight<Cpu> + Transposed> Way<'_, W> {
    /// The attention of `x`, tokens x hidden.
    pub(super) fn attention(&mut self, attention: &Attention, x: &[f32]) -> Result<Attended, EngineError> {
        let (q_size, kv_size) = (attention.query_size(), attention.kv_size());
        let [q_raw, k_raw, values] = match attention.projections {
            Projections::Separate { query, key, value } => {
                [self.apply(query, x)?, self.apply(key, x)?, self.apply(value, x)?]
            }
            Projections::Fused(linear) => {
                let (all, width) = (self.apply(linear, x)?, q_size + 2 * kv_size);
                [(0, q_size), (q_size, kv_size), (q_size + kv_size, kv_size)]
                    .map(|(first, n)| columns(&all, width, first, n))
            }
        };
        let ready = |raw: &[f32], norm, heads| {
            let mut x = self.normed(norm, raw).into_owned();
            if let Some(rope) = &self.decoder.frame.ropes[self.layer] {
                let len = x.len() / (heads * attention.head_dim);
                rope.rotate(&mut x, [heads, attention.head_dim], 0, len);
            }
            x
        };
        let q = ready(&q_raw, attention.query_norm, attention.n_heads);
        let keys = ready(&k_raw, attention.key_norm, attention.n_kv_heads);
        let mut mixed = vec![0.0; q.len()];
        let sequence = [Sequence { past: 0, rows: q.len() / q_size, len: q.len() / q_size }];
        let context = Context::Own { keys: &keys, values: &values };
        Cpu::attend(&mut self.queue, attention, &q, &sequence, context, &mut mixed)?;
        let output = self.apply(attention.output, &mixed)?;
        Ok(Attended { raw: [q_raw, k_raw], q, keys, values, mixed, output })
    }

    /// Adds the gradient by `x` to `g_x`, from `g`, that by the output; both tokens x hidden.
    pub(super) fn attention_backward(
        &self,
        attention: &Attention,
        attended: &Attended,
        x: &[f32],
        g: &[f32],
        g_x: &mut [f32],
        visit: &mut Visit<'_>,
    ) {
        let Attended { raw: [q_raw, k_raw], q, keys, values, mixed, .. } = attended;
        let mut g_mixed = vec![0.0; mixed.len()];
        self.linear_backward(attention.output, mixed, g, &mut g_mixed, visit);
        let [mut g_q, mut g_k, mut g_v] = [q, keys, values].map(|x| vec![0.0; x.len()]);
        scores_backward(attention, [q, keys, values, &g_mixed], [&mut g_q, &mut g_k, &mut g_v]);
        for (g, raw, norm, heads) in [
            (&mut g_q, q_raw, attention.query_norm, attention.n_heads),
            (&mut g_k, k_raw, attention.key_norm, attention.n_kv_heads),
        ] {
            if let Some(rope) = &self.decoder.frame.ropes[self.layer] {
                rope.rotate_back(g, [heads, attention.head_dim]);
            }
            if norm.is_some() {
                let behind = std::mem::replace(g, vec![0.0; raw.len()]);
                self.normed_backward(norm, raw, &behind, g);
            }
        }
        match attention.projections {
            Projections::Separate { query, key, value } => {
                for (linear, g) in [(query, &g_q), (key, &g_k), (value, &g_v)] {
                    self.linear_backward(linear, x, g, g_x, visit);
                }
            }
            Projections::Fused(linear) => {
                let kv_size = attention.kv_size();
                let g = joined([(&g_q, attention.query_size()), (&g_k, kv_size), (&g_v, kv_size)]);
                self.linear_backward(linear, x, &g, g_x, visit);
            }
        }
    }
}

/// The gradients by q, keys and values, all zero before, from those: `[q, keys, values, gradient by the output]`, shaped as in [`Device::attend`].
///
/// With P = softmax(s Q Kᵀ) and O = P V: by V it is Pᵀ G, by the scores P ⊙ (G Vᵀ − rowsum(P ⊙ G Vᵀ)) =: S, by Q s S K, by K s Sᵀ Q. A cap of the
/// scores multiplies S by its slopes.
fn scores_backward(attention: &Attention, [q, keys, values, g_out]: [&[f32]; 4], [g_q, g_k, g_v]: [&mut [f32]; 3]) {
    let Attention { head_dim, n_heads, n_kv_heads, window, scale, score_cap, .. } = *attention;
    let group = n_heads / n_kv_heads;
    let (q_size, kv_size) = (attention.query_size(), attention.kv_size());
    let tokens = q.len() / q_size;
    let [q, g_out] = [q, g_out].map(|x| MatRef::from_row_major_slice(x, tokens, q_size));
    let [keys, values] = [keys, values].map(|x| MatRef::from_row_major_slice(x, tokens, kv_size));
    let mut g_q = MatMut::from_row_major_slice_mut(g_q, tokens, q_size);
    let [mut g_k, mut g_v] = [g_k, g_v].map(|x| MatMut::from_row_major_slice_mut(x, tokens, kv_size));
    let (mut scores, mut g_scores, mut capped) = (Vec::new(), Vec::new(), Vec::new());
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
            if let Some(cap) = score_cap {
                math::cap(&mut scores, cap);
                capped.clone_from(&scores);
            }
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
            if let Some(cap) = score_cap {
                g_scores.iter_mut().zip(&capped).for_each(|(g, value)| *g *= cap_slope(*value, cap));
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
