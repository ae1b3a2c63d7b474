//! The oracle: every operation as its definition says, in plain loops, sums in f64.

use super::{Columns, Context, Device, Done, Frequencies, Routes, Sequence, Weight};
use crate::{EngineError, Operator};
use bitstack_core::Threads;
use bitstack_model::config::{Activation, Attention};
use bitstack_model::{Dense, RopeConfig};
use std::ops::Range;

/// The host's memory and plain loops: slow, and easy to believe.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plain;

impl Device for Plain {
    type Buffer = Vec<f32>;
    type Queue = ();
    type Rope = Frequencies;

    fn queue(&self, _: Threads) -> Result<(), EngineError> {
        Ok(())
    }

    fn rope(&self, config: &RopeConfig, rotary_dim: usize, _: usize) -> Result<Frequencies, EngineError> {
        Ok(Frequencies::new(config, rotary_dim))
    }

    fn reserve((): &mut (), buffer: &mut Vec<f32>, len: usize) -> Done {
        if buffer.len() < len {
            buffer.resize(len, f32::NAN);
        }
        Ok(())
    }

    fn bytes(buffer: &Vec<f32>) -> u64 {
        4 * buffer.capacity() as u64
    }

    fn write((): &mut (), values: &[f32], buffer: &mut Vec<f32>) -> Done {
        Self::reserve(&mut (), buffer, values.len())?;
        buffer[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read((): &mut (), buffer: &Vec<f32>, values: &mut [f32]) -> Done {
        values.copy_from_slice(&buffer[..values.len()]);
        Ok(())
    }

    fn copy((): &mut (), from: &Vec<f32>, range: Range<usize>, to: &mut Vec<f32>, at: usize) -> Done {
        for (i, value) in from[range].iter().enumerate() {
            to[at + i] = *value;
        }
        Ok(())
    }

    fn columns(
        (): &mut (),
        x: &Vec<f32>,
        rows: usize,
        width: usize,
        columns: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Done {
        for row in 0..rows {
            for (i, column) in columns.clone().enumerate() {
                out[row * columns.len() + i] = x[row * width + column];
            }
        }
        Ok(())
    }

    fn norm(
        (): &mut (),
        x: &Vec<f32>,
        rows: usize,
        weight: &Vec<f32>,
        len: usize,
        eps: f32,
        out: &mut Vec<f32>,
    ) -> Done {
        out[..rows * len].copy_from_slice(&x[..rows * len]);
        Self::norm_in_place(&mut (), out, rows, weight, len, eps)
    }

    fn norm_in_place((): &mut (), x: &mut Vec<f32>, rows: usize, weight: &Vec<f32>, len: usize, eps: f32) -> Done {
        for row in x[..rows * len].chunks_exact_mut(len) {
            let square = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / len as f64;
            let scale = 1.0 / (square + f64::from(eps)).sqrt();
            for (v, w) in row.iter_mut().zip(weight) {
                *v = (f64::from(*v) * scale * f64::from(*w)) as f32;
            }
        }
        Ok(())
    }

    fn clear((): &mut (), x: &mut Vec<f32>, len: usize) -> Done {
        x[..len].fill(0.0);
        Ok(())
    }

    fn add((): &mut (), x: &mut Vec<f32>, y: &Vec<f32>, len: usize) -> Done {
        for i in 0..len {
            x[i] += y[i];
        }
        Ok(())
    }

    fn add_bias((): &mut (), x: &mut Vec<f32>, rows: usize, bias: &Vec<f32>, len: usize) -> Done {
        for i in 0..rows * len {
            x[i] += bias[i % len];
        }
        Ok(())
    }

    fn scale((): &mut (), x: &mut Vec<f32>, len: usize, factor: f32) -> Done {
        for v in &mut x[..len] {
            *v *= factor;
        }
        Ok(())
    }

    fn cap((): &mut (), x: &mut Vec<f32>, len: usize, cap: f32) -> Done {
        for v in &mut x[..len] {
            *v = (f64::from(cap) * (f64::from(*v) / f64::from(cap)).tanh()) as f32;
        }
        Ok(())
    }

    fn activate((): &mut (), activation: Activation, x: &mut Vec<f32>, up: Option<&Vec<f32>>, len: usize) -> Done {
        for i in 0..len {
            let v = f64::from(x[i]);
            let active = match activation {
                Activation::Silu => v / (1.0 + (-v).exp()),
                Activation::GeluTanh => {
                    0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3))).tanh())
                }
            };
            x[i] = (active * up.map_or(1.0, |up| f64::from(up[i]))) as f32;
        }
        Ok(())
    }

    fn rotate(
        (): &mut (),
        x: &mut Vec<f32>,
        heads: usize,
        head_dim: usize,
        rope: &Frequencies,
        sequences: &[Sequence],
    ) -> Done {
        let positions = sequences.iter().flat_map(|s| (s.past..s.past + s.rows).map(|p| (p, s.len)));
        for (row, (position, len)) in positions.enumerate() {
            for head in 0..heads {
                let first = (row * heads + head) * head_dim;
                for (i, frequency) in rope.of(len).iter().enumerate() {
                    let (cos, sin) = rope.angle(position, *frequency);
                    let half = rope.first.len();
                    let (a, b) = (x[first + i], x[first + half + i]);
                    x[first + i] = a * cos - b * sin;
                    x[first + half + i] = b * cos + a * sin;
                }
            }
        }
        Ok(())
    }

    fn attend(
        (): &mut (),
        attention: &Attention,
        q: &Vec<f32>,
        sequences: &[Sequence],
        context: Context<'_, Self>,
        out: &mut Vec<f32>,
    ) -> Done {
        let (size, q_size, kv_size) = (attention.head_dim, attention.query_size(), attention.kv_size());
        let mut first_row = 0;
        for (s, sequence) in sequences.iter().enumerate() {
            let (keys, values) = context.of(s);
            for i in 0..sequence.rows {
                let end = sequence.past + i + 1;
                let start = attention.window.map_or(0, |window| end.saturating_sub(window));
                for head in 0..attention.n_heads {
                    let kv = head * attention.n_kv_heads / attention.n_heads * size;
                    let at = (first_row + i) * q_size + head * size;
                    let score = |position: usize| {
                        let key = &keys[position * kv_size + kv..][..size];
                        let product = (0..size).map(|c| f64::from(q[at + c]) * f64::from(key[c])).sum::<f64>();
                        let score = product * f64::from(attention.scale);
                        attention.score_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    };
                    let scores: Vec<f64> = (start..end).map(score).collect();
                    let top = scores.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
                    let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                    for c in 0..size {
                        let value = |position: usize| f64::from(values[position * kv_size + kv + c]);
                        let weighted = scores.iter().zip(start..end).map(|(s, p)| (s - top).exp() / sum * value(p));
                        out[at + c] = weighted.sum::<f64>() as f32;
                    }
                }
            }
            first_row += sequence.rows;
        }
        Ok(())
    }

    fn choose(
        (): &mut (),
        scores: &Vec<f32>,
        rows: usize,
        n_experts: usize,
        n_active: usize,
        normalised: bool,
        routes: &mut Routes,
    ) -> Done {
        let mut probabilities = Vec::with_capacity(rows * n_experts);
        for row in scores[..rows * n_experts].chunks_exact(n_experts) {
            let top = row.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
            let sum: f64 = row.iter().map(|s| f64::from(s - top).exp()).sum();
            probabilities.extend(row.iter().map(|s| (f64::from(s - top).exp() / sum) as f32));
        }
        routes.fill(&probabilities, n_experts, n_active, normalised);
        Ok(())
    }

    fn gather((): &mut (), x: &Vec<f32>, len: usize, rows: &[usize], out: &mut Vec<f32>) -> Done {
        for (i, row) in rows.iter().enumerate() {
            for c in 0..len {
                out[i * len + c] = x[row * len + c];
            }
        }
        Ok(())
    }

    fn scatter((): &mut (), x: &Vec<f32>, len: usize, rows: &[usize], shares: &[f32], out: &mut Vec<f32>) -> Done {
        for (i, (row, share)) in rows.iter().zip(shares).enumerate() {
            for c in 0..len {
                out[row * len + c] += share * x[i * len + c];
            }
        }
        Ok(())
    }
}

/// A product row by row: `row(r, out)` gives row `r` of the weight.
fn multiply(
    [rows, cols]: [usize; 2],
    row: impl Fn(usize, &mut [f32]),
    x: &[f32],
    tokens: usize,
    y: &mut [f32],
    place: Columns,
) {
    let mut weight = vec![0.0; cols];
    for r in 0..rows {
        row(r, &mut weight);
        for token in 0..tokens {
            let x = &x[token * cols..][..cols];
            let sum: f64 = x.iter().zip(&weight).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            y[token * place.stride + place.first + r] = sum as f32;
        }
    }
}

macro_rules! plain_weight {
    ($type:ty, $row:expr) => {
        impl Weight<Plain> for $type {
            fn rows(&self) -> usize {
                self.shape()[0]
            }

            fn cols(&self) -> usize {
                self.shape()[1]
            }

            fn multiply(&self, (): &mut (), x: &Vec<f32>, tokens: usize, y: &mut Vec<f32>, place: Columns) -> Done {
                let row: fn(&Self, usize, &mut [f32]) = $row;
                multiply(self.shape(), |r, out| row(self, r, out), x, tokens, y, place);
                Ok(())
            }

            fn look_up(&self, (): &mut (), row: usize, out: &mut Vec<f32>, at: usize) -> Done {
                let cols = self.shape()[1];
                let copy: fn(&Self, usize, &mut [f32]) = $row;
                copy(self, row, &mut out[at * cols..(at + 1) * cols]);
                Ok(())
            }
        }
    };
}

plain_weight!(Dense, |weight, row, out| weight.row_into(row, out));
plain_weight!(Operator<'_>, |weight, row, out| weight.row_into(row, &mut Vec::new(), out));
