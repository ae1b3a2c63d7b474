//! Softmax attention on the CPU: of many queries by matrix products, of few by reading keys and values once for all heads that share them.

use super::cpu::take;
use super::{Context, Cpu, Sequence};
use crate::math;
use bitstack_core::Threads;
use bitstack_model::config::Attention;
use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};
use rayon::prelude::*;
use std::sync::{Mutex, PoisonError};

/// Queries per block of the attention: the scores of a block stay in cache, and little is computed above the diagonal.
pub(crate) const QUERY_BLOCK: usize = 64;

/// Products of queries' elements and positions below which an attention does not earn back the cost of waking other threads.
const SMALL: usize = 1 << 18;

/// Queries of each sequence up to which keys and values are read for them directly: a matrix product puts its operands in an order of its own first.
const FEW: usize = 3;

/// Positions of a task with few queries: their scores and values stay in cache. The same for any number of threads, so that results do not
/// depend on it.
const SPAN: usize = 128;

/// What attention works in.
#[derive(Debug)]
pub(super) struct Workspace {
    /// Scores, for each thread of the pool, and the one outside it.
    scores: Vec<Mutex<Vec<f32>>>,
    /// Of few queries: what each task gives.
    parts: Vec<f32>,
    tasks: Vec<Task>,
}

/// Some positions for the queries of one row, all heads: keys and values lie side by side.
#[derive(Debug, Clone, Copy)]
struct Task {
    sequence: usize,
    /// Row of the queries of all sequences.
    row: usize,
    first: usize,
    span: usize,
}

impl Workspace {
    pub(super) fn new(threads: Threads) -> Self {
        let n = match threads {
            Threads::One => 0,
            Threads::Pool => rayon::current_num_threads(),
        };
        Self { scores: (0..=n).map(|_| Mutex::default()).collect(), parts: Vec::new(), tasks: Vec::new() }
    }

    /// `q` and `out` are rows of all sequences x all heads.
    pub(super) fn run(
        &mut self,
        attention: &Attention,
        q: &[f32],
        sequences: &[Sequence],
        context: &Context<'_, Cpu>,
        out: &mut [f32],
        threads: Threads,
    ) {
        let longest = sequences.iter().map(|s| s.past + s.rows).max().unwrap_or(0);
        let wide = threads == Threads::Pool && q.len() * longest >= SMALL;
        if sequences.iter().all(|s| s.rows <= FEW) {
            return self.few(attention, q, sequences, context, out, wide);
        }
        let work = Attend { attention, context, scores: &self.scores };
        match sequences {
            [one] => work.sequence(0, *one, q, out, wide),
            _ => work.sequences(0, sequences, q, out, wide),
        }
    }

    /// Each task gives, for every head, the largest score m, Σ e^(score - m) and Σ e^(score - m) v; those of a head are then
    /// put together in the order of their positions.
    fn few(
        &mut self,
        attention: &Attention,
        q: &[f32],
        sequences: &[Sequence],
        context: &Context<'_, Cpu>,
        out: &mut [f32],
        wide: bool,
    ) {
        let Attention { n_heads, n_kv_heads, head_dim, scale, window, score_cap, .. } = *attention;
        let (width, q_size) = (n_kv_heads * head_dim, n_heads * head_dim);
        let Self { scores, parts, tasks } = self;
        tasks.clear();
        let mut row = 0;
        for (sequence, Sequence { past, rows, .. }) in sequences.iter().enumerate() {
            for end in past + 1..=past + rows {
                let begin = window.map_or(0, |w| end.saturating_sub(w));
                let spans = (begin..end).step_by(SPAN);
                tasks.extend(spans.map(|first| Task { sequence, row, first, span: SPAN.min(end - first) }));
                row += 1;
            }
        }
        let part_len = n_heads * (head_dim + 2);
        let parts = take(parts, tasks.len() * part_len);
        let run = |(task, part): (&Task, &mut [f32])| {
            let own = rayon::current_thread_index().map_or(0, |i| i + 1) % scores.len();
            let mut scores = scores[own].lock().unwrap_or_else(PoisonError::into_inner);
            let scores = take(&mut scores, n_heads * task.span);
            let [keys, values] =
                <[_; 2]>::from(context.of(task.sequence)).map(|x| &x[task.first * width..][..task.span * width]);
            let (sums, mixed) = part.split_at_mut(2 * n_heads);
            math::scores(&q[task.row * q_size..][..q_size], head_dim, keys, width, scale, scores);
            if let Some(cap) = score_cap {
                math::cap(scores, cap);
            }
            for (scores, sums) in scores.chunks_exact_mut(task.span).zip(sums.as_chunks_mut::<2>().0) {
                *sums = math::exponentials(scores);
            }
            math::mix(scores, values, width, head_dim, mixed);
        };
        if wide {
            tasks.par_iter().zip(parts.par_chunks_exact_mut(part_len)).for_each(run);
        } else {
            tasks.iter().zip(parts.chunks_exact_mut(part_len)).for_each(run);
        }
        for (tasks, parts) in pieces(tasks, parts, part_len) {
            let out = &mut out[tasks[0].row * q_size..][..q_size];
            for (g, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let part = |i: usize| {
                    let part = &parts[i * part_len..][..part_len];
                    (part[2 * g], part[2 * g + 1], &part[2 * n_heads + g * head_dim..][..head_dim])
                };
                let top = (0..tasks.len()).map(|i| part(i).0).fold(f32::NEG_INFINITY, f32::max);
                let factor = |m: f32| if m == top { 1.0 } else { (m - top).exp() };
                let total: f32 = (0..tasks.len()).map(|i| part(i).1 * factor(part(i).0)).sum();
                out.fill(0.0);
                for i in 0..tasks.len() {
                    let (m, _, mixed) = part(i);
                    math::add_scaled(out, mixed, factor(m) / total);
                }
            }
        }
    }
}

/// The tasks of one row, with their parts.
fn pieces<'a>(tasks: &'a [Task], parts: &'a [f32], part_len: usize) -> impl Iterator<Item = (&'a [Task], &'a [f32])> {
    let mut parts = parts;
    tasks.chunk_by(|a, b| a.row == b.row).map(move |tasks| {
        let (own, rest) = parts.split_at(tasks.len() * part_len);
        parts = rest;
        (tasks, own)
    })
}

/// Many queries at work.
#[derive(Clone, Copy)]
struct Attend<'a> {
    attention: &'a Attention,
    context: &'a Context<'a, Cpu>,
    scores: &'a [Mutex<Vec<f32>>],
}

impl Attend<'_> {
    /// Several sequences, the first of them number `first`: shared out by sequence.
    fn sequences(self, first: usize, sequences: &[Sequence], q: &[f32], out: &mut [f32], wide: bool) {
        match sequences {
            [] => {}
            [one] => self.sequence(first, *one, q, out, false),
            _ => {
                let half = sequences.len() / 2;
                let (front, back) = sequences.split_at(half);
                let at = front.iter().map(|s| s.rows).sum::<usize>() * self.attention.query_size();
                let ((q_front, q_back), (out_front, out_back)) = (q.split_at(at), out.split_at_mut(at));
                let mut do_front = || self.sequences(first, front, q_front, out_front, wide);
                let mut do_back = || self.sequences(first + half, back, q_back, out_back, wide);
                if wide {
                    rayon::join(do_front, do_back);
                } else {
                    do_front();
                    do_back();
                }
            }
        }
    }

    /// One sequence, number `index`; where `wide`, shared out by head.
    fn sequence(self, index: usize, sequence: Sequence, q: &[f32], out: &mut [f32], wide: bool) {
        let (keys, values) = self.context.of(index);
        let (head_dim, total) = (self.attention.head_dim, sequence.past + sequence.rows);
        let (q_size, kv_size) = (self.attention.query_size(), self.attention.kv_size());
        let q = MatRef::from_row_major_slice(q, sequence.rows, q_size);
        let keys = MatRef::from_row_major_slice(&keys[..total * kv_size], total, kv_size);
        let values = MatRef::from_row_major_slice(&values[..total * kv_size], total, kv_size);
        let mut out = MatMut::from_row_major_slice_mut(out, sequence.rows, q_size);
        let group = self.attention.n_heads / self.attention.n_kv_heads;
        let one_head = |head: usize, out: MatMut<'_, f32>| {
            let q = q.subcols(head * head_dim, head_dim);
            let [keys, values] = [keys, values].map(|x| x.subcols(head / group * head_dim, head_dim));
            self.head(sequence, [q, keys, values], out);
        };
        if wide {
            out.par_col_chunks_mut(head_dim).enumerate().for_each(|(head, out)| one_head(head, out));
        } else {
            for head in 0..self.attention.n_heads {
                one_head(head, out.rb_mut().subcols_mut(head * head_dim, head_dim));
            }
        }
    }

    fn head(self, sequence: Sequence, [q, keys, values]: [MatRef<'_, f32>; 3], mut out: MatMut<'_, f32>) {
        let Attention { window, scale, score_cap, .. } = *self.attention;
        // A thread outside the pool, or of another, takes turns with others like it.
        let own = rayon::current_thread_index().map_or(0, |i| i + 1) % self.scores.len();
        let mut scores = self.scores[own].lock().unwrap_or_else(PoisonError::into_inner);
        for start in (0..sequence.rows).step_by(QUERY_BLOCK) {
            let rows = QUERY_BLOCK.min(sequence.rows - start);
            // Keys from the first one the block's first query sees to the block's own last one.
            let first = window.map_or(0, |w| (sequence.past + start + 1).saturating_sub(w));
            let span = sequence.past + start + rows - first;
            let scores = take(&mut scores, rows * span);
            let products = MatMut::from_row_major_slice_mut(scores, rows, span);
            math::product(products, q.subrows(start, rows), keys.subrows(first, span).transpose(), scale);
            if let Some(cap) = score_cap {
                math::cap(scores, cap);
            }
            for (r, row) in scores.chunks_exact_mut(span).enumerate() {
                let end = sequence.past + start + r + 1 - first;
                let begin = window.map_or(0, |w| end.saturating_sub(w));
                row[..begin].fill(0.0);
                math::softmax(&mut row[begin..end]);
                row[end..].fill(0.0);
            }
            let weights = MatRef::from_row_major_slice(scores, rows, span);
            math::product(out.rb_mut().subrows_mut(start, rows), weights, values.subrows(first, span), 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitstack_model::Checkpoint;

    /// Values in [-1, 1] without a pattern.
    fn random(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) as f32 * 0.618).sin()).collect()
    }

    #[test]
    fn few_queries_attend_as_many_do() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../bitstack-model/tests/data/llama");
        let mut attention = Checkpoint::open(path).unwrap().config().layers[0].attention.clone();
        // Heads of one vector, of several, and with something left over; positions of one task and of several, and one more or less.
        for (n_heads, n_kv_heads, head_dim) in [(4, 2, 6), (9, 3, 64), (7, 1, 40), (2, 2, 16)] {
            (attention.n_heads, attention.n_kv_heads, attention.head_dim) = (n_heads, n_kv_heads, head_dim);
            attention.scale = 1.0 / (head_dim as f32).sqrt();
            for (window, score_cap) in [(None, None), (Some(100), Some(2.0)), (Some(1), None)] {
                (attention.window, attention.score_cap) = (window, score_cap);
                for rows in 1..=FEW {
                    let pasts = [0, 3, SPAN - rows, SPAN + 1 - rows, 3 * SPAN + 17];
                    let total = pasts[4] + rows;
                    let [keys, values] = [1, 2].map(|seed| random(total * n_kv_heads * head_dim, seed));
                    let q = random(rows * n_heads * head_dim, 3);
                    let context: Context<'_, Cpu> = Context::Own { keys: &keys, values: &values };
                    for past in pasts {
                        let sequence = Sequence { past, rows, len: past + rows };
                        let mut found = vec![f32::NAN; q.len()];
                        let mut work = Workspace::new(Threads::One);
                        work.few(&attention, &q, &[sequence], &context, &mut found, false);
                        let mut expected = vec![0.0; q.len()];
                        let many = Attend { attention: &attention, context: &context, scores: &work.scores };
                        many.sequence(0, sequence, &q, &mut expected, false);
                        // Sums of up to 800 terms of at most 1, in another order.
                        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                        assert!(
                            worst < 2e-5,
                            "{n_heads}/{n_kv_heads} x {head_dim}, {window:?}, {past} + {rows}: {worst}"
                        );
                    }
                }
            }
        }
    }
}
