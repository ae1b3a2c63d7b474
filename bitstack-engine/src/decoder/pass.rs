//! How a pass is run, and what it works in.

use crate::EngineError;
use crate::device::{Cpu, Device, Done, KvCache, QUERY_BLOCK, Sequence};
use bitstack_core::Threads;
use bitstack_model::ModelConfig;
use bitstack_model::config::{Layer, Mlp};
use ndarray::ArrayView2;
use std::ops::Range;

/// Sees the inputs of the linear operators as a pass goes by.
pub trait Observer {
    /// Called once per group of weights that read the same input, before they do: q, k, v; then o; gate, up; down (of experts after their router, of each
    /// its own, without rows where none goes through it); and the head, in all its parts (under tied embeddings they are those of the embedding).
    ///
    /// `weights` are indices into [`bitstack_model::ModelConfig::weights`]; `x` is tokens x cols. Look-ups in the embedding are not seen.
    fn input(&mut self, weights: &[usize], x: ArrayView2<'_, f32>);
}

/// How a pass is run: with or without caches and an observer, on one thread or many. It also holds the buffers that the
/// layers share ([`Workspace`]), so keep one for all calls on a sequence.
#[derive(Debug)]
pub struct Pass<'a, D: Device = Cpu> {
    /// One per sequence; none: the rows are one sequence from its start.
    pub(super) caches: &'a mut [KvCache<D>],
    /// How many rows each sequence has; none: equally many.
    rows: &'a [usize],
    pub(super) observer: Watch<'a>,
    threads: Threads,
    /// Positions that sequences will have at least.
    len: usize,
    pub(super) work: Workspace<D>,
}

/// The memory that passes work in: a queue of the device, and the buffers that the layers share. A pass makes its own; where another comes for
/// every token, they hand it on ([`Pass::in_workspace`], [`Pass::into_workspace`]).
#[derive(Debug)]
pub struct Workspace<D: Device = Cpu> {
    queue: Option<(Threads, D::Queue)>,
    scratch: Scratch<D>,
    pub(super) sequences: Vec<Sequence>,
    /// What the host sees of a buffer.
    pub(super) host: Vec<f32>,
}

impl<D: Device> Default for Workspace<D> {
    fn default() -> Self {
        Self { queue: None, scratch: Scratch::default(), sequences: Vec::new(), host: Vec::new() }
    }
}

impl Workspace {
    /// Bytes that a pass of one sequence works in on the CPU, with all threads of the current pool: at most, for passes of up to `rows` tokens that
    /// give the last one's logits, at up to `positions` positions. It is what there is beside weights and cache.
    pub fn most_bytes(config: &ModelConfig, rows: usize, positions: usize) -> u64 {
        let experts = |layer: &Layer| matches!(layer.mlp, Mlp::Experts(_));
        let states = if config.layers.iter().any(experts) { 5 } else { 3 } * config.hidden_size;
        let of_layer = |layer: &Layer| {
            let Layer { attention, mlp, .. } = layer;
            let inner = match mlp {
                Mlp::Dense(mlp) => mlp.size,
                Mlp::Experts(mlp) => mlp.experts.iter().map(|expert| expert.size).max().unwrap_or(0),
            };
            2 * (attention.query_size() + attention.kv_size() + inner)
        };
        let buffers = states + config.layers.iter().map(of_layer).max().unwrap_or(0);
        // A product keeps its inputs and results again, in an order of its own; and there may be one behind several projections in one weight.
        let inner = config.layers.iter().enumerate().flat_map(|(i, _)| config.layer_weights(i));
        let specs = config.weights();
        let product = inner.map(|i| specs[i].cols + 2 * specs[i].rows).max().unwrap_or(0);
        let head = specs[config.head()].iter().map(|spec| spec.cols + 2 * spec.rows).max().unwrap_or(0);
        let threads = rayon::current_num_threads() + 1;
        let scores = threads * QUERY_BLOCK.min(rows) * positions;
        // A few vectors of factors beside: columns of a basis in f32 and tables of one token, coefficients of all planes of a block of rows.
        let factors = specs.iter().map(|spec| 64 * spec.cols + 16 * spec.rows).max().unwrap_or(0);
        (size_of::<f32>() * (rows * (buffers + product) + head + 2 * config.vocab_size + scores + factors)) as u64
    }
}

/// The observer of a pass, or none.
pub(super) struct Watch<'a>(Option<&'a mut dyn Observer>);

impl std::fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "observed" } else { "not observed" })
    }
}

impl Watch<'_> {
    /// Shows the input of some weights, rows x cols at the start of a buffer.
    pub(super) fn see<D: Device>(
        &mut self,
        queue: &mut D::Queue,
        weights: &[usize],
        x: &D::Buffer,
        [rows, cols]: [usize; 2],
        host: &mut Vec<f32>,
    ) -> Done {
        if let Some(observer) = &mut self.0 {
            let x = D::look(queue, x, rows * cols, host)?;
            observer.input(weights, ArrayView2::from_shape((rows, cols), x).expect("as many as asked for"));
        }
        Ok(())
    }
}

/// Buffers that the layers share.
#[derive(Debug)]
pub(super) struct Scratch<D: Device> {
    pub(super) state: D::Buffer,
    pub(super) normed: D::Buffer,
    pub(super) q: D::Buffer,
    pub(super) k: D::Buffer,
    pub(super) v: D::Buffer,
    pub(super) mixed: D::Buffer,
    pub(super) gate: D::Buffer,
    pub(super) up: D::Buffer,
    /// What several projections in one weight give.
    pub(super) fused: D::Buffer,
    pub(super) delta: D::Buffer,
    /// Rows on their way through an expert.
    pub(super) routed: D::Buffer,
    pub(super) expert: D::Buffer,
    pub(super) logits: D::Buffer,
    pub(super) routes: crate::device::Routes,
}

impl<D: Device> Default for Scratch<D> {
    fn default() -> Self {
        let [state, normed, q, k, v, mixed, gate, up, fused, delta, routed, expert, logits] =
            std::array::from_fn(|_| D::Buffer::default());
        let routes = crate::device::Routes::default();
        Self { state, normed, q, k, v, mixed, gate, up, fused, delta, routed, expert, logits, routes }
    }
}

impl<D: Device> Scratch<D> {
    /// Puts the buffers of an expert in the place of those of a feed-forward part, and back.
    pub(super) fn turn_to_expert(&mut self) {
        std::mem::swap(&mut self.normed, &mut self.routed);
        std::mem::swap(&mut self.delta, &mut self.expert);
    }
}

impl<D: Device> Default for Pass<'_, D> {
    fn default() -> Self {
        let (observer, work) = (Watch(None), Workspace::default());
        Self { caches: &mut [], rows: &[], observer, threads: Threads::One, len: 0, work }
    }
}

impl<'a, D: Device> Pass<'a, D> {
    /// One thread, no cache (the tokens given are the whole sequence), no observer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Continues the sequence in `cache`, and adds to it.
    pub fn with_cache(self, cache: &'a mut KvCache<D>) -> Self {
        self.with_caches(std::slice::from_mut(cache))
    }

    /// Continues several sequences side by side, one per cache, and adds to each: every weight is read once for all of them. The sequences do not
    /// see each other, and may be of different lengths.
    ///
    /// Tokens and hidden states hold the rows of the first sequence, then those of the second, and so on: equally many of each, but for
    /// [`with_rows`](Self::with_rows). No cache at all is as without this call.
    pub fn with_caches(mut self, caches: &'a mut [KvCache<D>]) -> Self {
        self.caches = caches;
        self
    }

    /// How many rows each of the sequences has in the next call.
    pub fn with_rows(mut self, rows: &'a [usize]) -> Self {
        self.rows = rows;
        self
    }

    /// Turns queries and keys as in sequences of `len` positions where they are shorter so far: a prompt that is run in pieces. It matters for
    /// models whose rotary frequencies depend on the length ([`bitstack_model::RopeConfig::changes_above`]).
    pub fn with_length(mut self, len: usize) -> Self {
        self.len = len;
        self
    }

    /// Shows the inputs of all linear operators to `observer`.
    pub fn with_observer(mut self, observer: &'a mut dyn Observer) -> Self {
        self.observer = Watch(Some(observer));
        self
    }

    /// Spreads every product over `threads`. The results stay the same.
    pub fn with_threads(mut self, threads: Threads) -> Self {
        self.threads = threads;
        self
    }

    /// Works in memory that another pass has used.
    pub fn in_workspace(mut self, workspace: Workspace<D>) -> Self {
        self.work = workspace;
        self
    }

    /// Gives the memory on to another pass.
    pub fn into_workspace(self) -> Workspace<D> {
        self.work
    }

    /// Finds out where `rows` rows go in layer `layer`: the sequences of this call.
    pub(super) fn place(&mut self, layer: usize, rows: usize, max_positions: usize) -> Done {
        let n = self.caches.len().max(1);
        let listed = self.rows.len() == n && self.rows.iter().sum::<usize>() == rows && !self.rows.contains(&0);
        let even = self.rows.is_empty() && rows.is_multiple_of(n);
        if !listed && !even {
            return Err(EngineError::UnevenRows { rows, sequences: n });
        }
        self.work.sequences.clear();
        for i in 0..n {
            let rows = if listed { self.rows[i] } else { rows / n };
            let past = self.caches.get(i).map_or(0, |cache| cache.positions(layer));
            let limit = self.caches.get(i).map_or(max_positions, KvCache::capacity);
            if past + rows > limit {
                return Err(EngineError::ContextFull { needed: past + rows, limit });
            }
            self.work.sequences.push(Sequence { past, rows, len: self.len.max(past + rows) });
        }
        Ok(())
    }

    /// The first `len` logits, in `host`.
    pub(super) fn take_logits(&mut self, device: &D, len: usize) -> Done {
        let Parts { queue, scratch, host, .. } = self.parts(device)?;
        host.resize(len, 0.0);
        D::read(queue, &scratch.logits, host)
    }

    /// The parts of the pass, with a queue of the device.
    pub(super) fn parts(&mut self, device: &D) -> Result<Parts<'_, 'a, D>, EngineError> {
        let Workspace { queue, scratch, sequences, host } = &mut self.work;
        if queue.as_ref().is_none_or(|(threads, _)| *threads != self.threads) {
            *queue = Some((self.threads, device.queue(self.threads)?));
        }
        let (_, queue) = queue.as_mut().expect("made above");
        Ok(Parts { queue, scratch, caches: self.caches, sequences, observer: &mut self.observer, host })
    }
}

/// A pass at work.
pub(super) struct Parts<'p, 'a, D: Device> {
    pub(super) queue: &'p mut D::Queue,
    pub(super) scratch: &'p mut Scratch<D>,
    pub(super) caches: &'p mut [KvCache<D>],
    pub(super) sequences: &'p [Sequence],
    pub(super) observer: &'p mut Watch<'a>,
    pub(super) host: &'p mut Vec<f32>,
}

impl<D: Device> Parts<'_, '_, D> {
    /// Shows the observer the input of some weights.
    pub(super) fn observe(&mut self, weights: &[usize], x: fn(&Scratch<D>) -> &D::Buffer, shape: [usize; 2]) -> Done {
        self.observer.see::<D>(self.queue, weights, x(self.scratch), shape, self.host)
    }

    /// As [`observe`](Self::observe), of weights that follow each other.
    pub(super) fn observe_range(
        &mut self,
        weights: Range<usize>,
        x: fn(&Scratch<D>) -> &D::Buffer,
        shape: [usize; 2],
    ) -> Done {
        if self.observer.0.is_some() {
            self.observe(&Vec::from_iter(weights), x, shape)?;
        }
        Ok(())
    }
}
