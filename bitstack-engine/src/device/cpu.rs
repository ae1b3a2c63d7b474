//! The CPU: vector code for each operation, products by `bitstack-cpu` and faer.

use super::{Columns, Context, Device, Done, Frequencies, Routes, Sequence, Weight, attend};
use crate::{EngineError, Operator, linear, math};
use bitstack_core::Threads;
use bitstack_cpu::Scratch;
use bitstack_model::config::{Activation, Attention};
use bitstack_model::{Dense, RopeConfig};
use std::ops::Range;

/// The host's memory and the best instructions that its CPU has.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

/// What operations work in on the CPU.
#[derive(Debug)]
pub struct CpuQueue {
    pub(crate) threads: Threads,
    /// Of the products with packed blocks.
    pub(crate) scratch: Scratch,
    /// Where a row is rebuilt.
    row: Vec<f32>,
    /// Where a product is made that is then spread over columns.
    spread: Vec<f32>,
    attention: attend::Workspace,
}

impl CpuQueue {
    fn new(threads: Threads) -> Self {
        let attention = attend::Workspace::new(threads);
        Self { threads, scratch: Scratch::default(), row: Vec::new(), spread: Vec::new(), attention }
    }

    /// A product of `rows` columns, made by `work` in rows without a gap, in the columns of `y` that `place` says.
    fn place(
        &mut self,
        rows: usize,
        tokens: usize,
        y: &mut [f32],
        place: Columns,
        work: impl FnOnce(&mut Self, &mut [f32]),
    ) {
        if tokens == 1 || place == Columns::all(rows) {
            return work(self, &mut y[place.first..place.first + tokens * rows]);
        }
        let mut spread = std::mem::take(&mut self.spread);
        work(self, take(&mut spread, tokens * rows));
        for (row, y) in spread.chunks_exact(rows).zip(y.chunks_exact_mut(place.stride)).take(tokens) {
            y[place.first..place.first + rows].copy_from_slice(row);
        }
        self.spread = spread;
    }
}

/// The first `len` elements of a buffer that only ever grows; their values are left over from earlier uses.
pub(super) fn take(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl Device for Cpu {
    type Buffer = Vec<f32>;
    type Queue = CpuQueue;
    type Rope = Rope;

    fn queue(&self, threads: Threads) -> Result<CpuQueue, EngineError> {
        Ok(CpuQueue::new(threads))
    }

    fn rope(&self, config: &RopeConfig, rotary_dim: usize, max_positions: usize) -> Result<Rope, EngineError> {
        Ok(Rope::new(Frequencies::new(config, rotary_dim), max_positions))
    }

    fn reserve(_: &mut CpuQueue, buffer: &mut Vec<f32>, len: usize) -> Done {
        // No more than is asked for: caches ask with room to grow in mind, and count it.
        buffer.reserve_exact(len.saturating_sub(buffer.len()));
        take(buffer, len);
        Ok(())
    }

    fn bytes(buffer: &Vec<f32>) -> u64 {
        4 * buffer.capacity() as u64
    }

    fn write(_: &mut CpuQueue, values: &[f32], buffer: &mut Vec<f32>) -> Done {
        take(buffer, values.len()).copy_from_slice(values);
        Ok(())
    }

    fn read(_: &mut CpuQueue, buffer: &Vec<f32>, values: &mut [f32]) -> Done {
        values.copy_from_slice(&buffer[..values.len()]);
        Ok(())
    }

    fn take(_: &mut CpuQueue, buffer: &mut Vec<f32>, len: usize) -> Result<Vec<f32>, EngineError> {
        let mut values = std::mem::take(buffer);
        values.truncate(len);
        Ok(values)
    }

    fn look<'b>(
        _: &mut CpuQueue,
        buffer: &'b Vec<f32>,
        len: usize,
        _: &'b mut Vec<f32>,
    ) -> Result<&'b [f32], EngineError> {
        Ok(&buffer[..len])
    }

    fn copy(_: &mut CpuQueue, from: &Vec<f32>, range: Range<usize>, to: &mut Vec<f32>, at: usize) -> Done {
        to[at..at + range.len()].copy_from_slice(&from[range]);
        Ok(())
    }

    fn columns(
        _: &mut CpuQueue,
        x: &Vec<f32>,
        rows: usize,
        width: usize,
        columns: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Done {
        let to = out.chunks_exact_mut(columns.len());
        for (x, out) in x.chunks_exact(width).zip(to).take(rows) {
            out.copy_from_slice(&x[columns.clone()]);
        }
        Ok(())
    }

    fn norm(
        _: &mut CpuQueue,
        x: &Vec<f32>,
        rows: usize,
        weight: &Vec<f32>,
        len: usize,
        eps: f32,
        out: &mut Vec<f32>,
    ) -> Done {
        math::rms_norm(&x[..rows * len], &weight[..len], eps, &mut out[..rows * len]);
        Ok(())
    }

    fn norm_in_place(_: &mut CpuQueue, x: &mut Vec<f32>, rows: usize, weight: &Vec<f32>, len: usize, eps: f32) -> Done {
        math::rms_norm_in_place(&mut x[..rows * len], &weight[..len], eps);
        Ok(())
    }

    fn clear(_: &mut CpuQueue, x: &mut Vec<f32>, len: usize) -> Done {
        x[..len].fill(0.0);
        Ok(())
    }

    fn add(_: &mut CpuQueue, x: &mut Vec<f32>, y: &Vec<f32>, len: usize) -> Done {
        math::add(&mut x[..len], &y[..len]);
        Ok(())
    }

    fn add_bias(_: &mut CpuQueue, x: &mut Vec<f32>, rows: usize, bias: &Vec<f32>, len: usize) -> Done {
        math::add_bias(&mut x[..rows * len], &bias[..len]);
        Ok(())
    }

    fn scale(_: &mut CpuQueue, x: &mut Vec<f32>, len: usize, factor: f32) -> Done {
        math::scale(&mut x[..len], factor);
        Ok(())
    }

    fn cap(_: &mut CpuQueue, x: &mut Vec<f32>, len: usize, cap: f32) -> Done {
        math::cap(&mut x[..len], cap);
        Ok(())
    }

    fn activate(_: &mut CpuQueue, activation: Activation, x: &mut Vec<f32>, up: Option<&Vec<f32>>, len: usize) -> Done {
        let x = &mut x[..len];
        match (activation, up) {
            (Activation::Silu, Some(up)) => math::swiglu(x, &up[..len]),
            (Activation::Silu, None) => math::silu(x),
            (Activation::GeluTanh, up) => {
                math::gelu(x);
                if let Some(up) = up {
                    math::multiply(x, &up[..len]);
                }
            }
        }
        Ok(())
    }

    fn rotate(
        _: &mut CpuQueue,
        x: &mut Vec<f32>,
        heads: usize,
        head_dim: usize,
        rope: &Rope,
        sequences: &[Sequence],
    ) -> Done {
        let mut rest = &mut x[..];
        for sequence in sequences {
            let (own, behind) = rest.split_at_mut(sequence.rows * heads * head_dim);
            rope.rotate(own, [heads, head_dim], sequence.past, sequence.len);
            rest = behind;
        }
        Ok(())
    }

    fn attend(
        queue: &mut CpuQueue,
        attention: &Attention,
        q: &Vec<f32>,
        sequences: &[Sequence],
        context: Context<'_, Self>,
        out: &mut Vec<f32>,
    ) -> Done {
        let len = sequences.iter().map(|s| s.rows).sum::<usize>() * attention.query_size();
        queue.attention.run(attention, &q[..len], sequences, &context, &mut out[..len], queue.threads);
        Ok(())
    }

    fn choose(
        _: &mut CpuQueue,
        scores: &Vec<f32>,
        rows: usize,
        n_experts: usize,
        n_active: usize,
        normalised: bool,
        routes: &mut Routes,
    ) -> Done {
        let mut probabilities = scores[..rows * n_experts].to_vec();
        probabilities.chunks_exact_mut(n_experts).for_each(math::softmax);
        routes.fill(&probabilities, n_experts, n_active, normalised);
        Ok(())
    }

    fn gather(_: &mut CpuQueue, x: &Vec<f32>, len: usize, rows: &[usize], out: &mut Vec<f32>) -> Done {
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(len)) {
            out.copy_from_slice(&x[row * len..(row + 1) * len]);
        }
        Ok(())
    }

    fn scatter(_: &mut CpuQueue, x: &Vec<f32>, len: usize, rows: &[usize], shares: &[f32], out: &mut Vec<f32>) -> Done {
        for ((row, share), x) in rows.iter().zip(shares).zip(x.chunks_exact(len)) {
            math::add_scaled(&mut out[row * len..(row + 1) * len], x, *share);
        }
        Ok(())
    }
}

impl Weight<Cpu> for Dense {
    fn rows(&self) -> usize {
        self.shape()[0]
    }

    fn cols(&self) -> usize {
        self.shape()[1]
    }

    fn multiply(&self, queue: &mut CpuQueue, x: &Vec<f32>, tokens: usize, y: &mut Vec<f32>, place: Columns) -> Done {
        let [rows, cols] = self.shape();
        let x = &x[..tokens * cols];
        queue.place(rows, tokens, y, place, |queue, y| linear::dense_product(self, x, y, queue.threads));
        Ok(())
    }

    fn look_up(&self, _: &mut CpuQueue, row: usize, out: &mut Vec<f32>, at: usize) -> Done {
        let cols = self.shape()[1];
        self.row_into(row, &mut out[at * cols..(at + 1) * cols]);
        Ok(())
    }
}

impl Weight<Cpu> for Operator<'_> {
    fn rows(&self) -> usize {
        self.shape()[0]
    }

    fn cols(&self) -> usize {
        self.shape()[1]
    }

    fn multiply(&self, queue: &mut CpuQueue, x: &Vec<f32>, tokens: usize, y: &mut Vec<f32>, place: Columns) -> Done {
        let (level, kernel) = match self {
            Self::Kept(dense) => return Weight::<Cpu>::multiply(*dense, queue, x, tokens, y, place),
            Self::Planes { level, kernel } => (level, kernel),
        };
        let [rows, cols] = self.shape();
        let x = &x[..tokens * cols];
        queue.place(rows, tokens, y, place, |queue, y| {
            let done = kernel.apply(level, x, y, queue.threads, &mut queue.scratch);
            done.expect("the decoder gives x of tokens x cols and y of tokens x rows");
        });
        Ok(())
    }

    fn look_up(&self, queue: &mut CpuQueue, row: usize, out: &mut Vec<f32>, at: usize) -> Done {
        let cols = self.shape()[1];
        self.row_into(row, &mut queue.row, &mut out[at * cols..(at + 1) * cols]);
        Ok(())
    }
}

/// Rotary position embedding.
#[derive(Debug, Clone)]
pub struct Rope {
    frequencies: Frequencies,
    /// Cosines, then sines, of the first positions of sequences that have the first frequencies; others are computed when they come.
    table: Vec<f32>,
}

impl Rope {
    /// Positions whose angles are kept; 4 MB at a head size of 128.
    const KEPT: usize = 8192;

    pub(crate) fn new(frequencies: Frequencies, max_positions: usize) -> Self {
        let rotary_dim = 2 * frequencies.first.len();
        let mut table = vec![0.0; max_positions.min(Self::KEPT) * rotary_dim];
        for (position, row) in table.chunks_exact_mut(rotary_dim).enumerate() {
            let (cos, sin) = row.split_at_mut(rotary_dim / 2);
            for ((f, cos), sin) in frequencies.first.iter().zip(cos).zip(sin) {
                (*cos, *sin) = frequencies.angle(position, *f);
            }
        }
        Self { frequencies, table }
    }

    /// Rotates every head of every row of `x`, which has `heads` of them; the first row is at position `past` of a sequence of `len`.
    pub(crate) fn rotate(&self, x: &mut [f32], [heads, head_dim]: [usize; 2], past: usize, len: usize) {
        let half = self.frequencies.first.len();
        let long = self.frequencies.of_long(len);
        let table = if long.is_some() { &[][..] } else { &self.table[..] };
        let frequencies = long.as_ref().unwrap_or(&self.frequencies.first);
        for (token, row) in x.chunks_exact_mut(head_dim * heads).enumerate() {
            let position = past + token;
            let Some(angles) = table.get(position * 2 * half..(position + 1) * 2 * half) else {
                for head in row.chunks_exact_mut(head_dim) {
                    let (a, b) = head[..2 * half].split_at_mut(half);
                    for ((a, b), f) in a.iter_mut().zip(b).zip(frequencies) {
                        let (cos, sin) = self.frequencies.angle(position, *f);
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
                continue;
            };
            let (cos, sin) = angles.split_at(half);
            for head in row.chunks_exact_mut(head_dim) {
                let (a, b) = head[..2 * half].split_at_mut(half);
                for (((a, b), &cos), &sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }

    /// The rotation the other way, of a whole sequence: that of the mirror image, mirrored.
    pub(crate) fn rotate_back(&self, x: &mut [f32], [heads, head_dim]: [usize; 2]) {
        let half = self.frequencies.first.len();
        let mirror = |x: &mut [f32]| {
            for head in x.chunks_exact_mut(head_dim) {
                head[half..2 * half].iter_mut().for_each(|v| *v = -*v);
            }
        };
        mirror(x);
        self.rotate(x, [heads, head_dim], 0, x.len() / (heads * head_dim));
        mirror(x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_beyond_the_table_rotate_like_those_in_it() {
        let frequencies = Frequencies::new(&RopeConfig { theta: 100.0, scaling: None }, 4);
        let (kept, fresh) = (Rope::new(frequencies.clone(), 8), Rope::new(frequencies, 2));
        let x: Vec<f32> = (0..5 * 8).map(|i| i as f32).collect();
        let (mut a, mut b) = (x.clone(), x);
        kept.rotate(&mut a, [2, 4], 0, 5);
        fresh.rotate(&mut b, [2, 4], 0, 5);
        assert_eq!(a, b);
        // By hand, token 1, first pair of its second head: (12, 14) turned by 1 radian.
        let (sin, cos) = 1.0_f32.sin_cos();
        assert!((a[12] - (12.0 * cos - 14.0 * sin)).abs() < 1e-5 && (a[14] - (14.0 * cos + 12.0 * sin)).abs() < 1e-5);
    }
}
