//! Where a model runs: state in a device's memory, and operations on it.
//!
//! The decoder is written once over [`Device`]. [`Cpu`] is the first; [`Plain`] is the oracle, in plain loops. Both run the decoder's tests.
//!
//! # For those who write another
//! - All operations go through a queue, which belongs to one pass at a time: a stream with its workspace, captured graphs, staging buffers. They
//!   may return before they are done, as long as each sees the results of those before it; [`Device::read`] waits. An error may come late, from a
//!   later operation of the same queue.
//! - Buffers hold f32 and belong to one pass or one cache. They grow by [`Device::reserve`] and are kept, so a token like the one before allocates
//!   nothing.
//! - Weights with one input come as a group ([`Weight::multiply_group`]), for one launch.
//! - Sequences of a pass may have different lengths, and each its own cache ([`Context`]).
//! - Only [`Device::choose`] (experts) and [`Device::read`] give something to the host; all else can be captured and replayed.

mod attend;
mod cache;
mod cpu;
mod plain;
mod rope;

pub use cache::KvCache;
pub use cpu::{Cpu, CpuQueue, Rope};
pub use plain::Plain;
pub use rope::Frequencies;

pub(crate) use attend::QUERY_BLOCK;

use crate::{EngineError, Operator};
use bitstack_core::{SignLayout, Threads};
use bitstack_cpu::Kernel;
use bitstack_model::config::{Activation, Attention};
use bitstack_model::{Dense, RopeConfig};
use bitstack_runtime::{HostMemory, Memory, Snapshot};
use std::fmt::Debug;
use std::ops::Range;

/// What operations of a device return: nothing, or why it failed.
pub type Done = Result<(), EngineError>;

/// A place where models run.
///
/// Sizes are checked by the decoder, once for the weights and then for what is given to a pass; operations may panic when they do not fit. All
/// matrices are row-major: `rows` rows, each as long as the arguments say, from the start of a buffer.
pub trait Device: Debug + Clone + Send + Sync + Sized + 'static {
    /// f32 numbers in the device's memory: none at first.
    type Buffer: Debug + Default + Send + Sync;
    /// Operations in their order, and the memory that they work in.
    type Queue: Debug + Send;
    /// Cosines and sines of rotary positions.
    type Rope: Debug + Clone + Send + Sync;

    /// A queue. `threads` says whether its operations may spread over the host's pool; the results are the same either way.
    fn queue(&self, threads: Threads) -> Result<Self::Queue, EngineError>;

    /// The angles of a config for the first `rotary_dim` elements of heads, at positions below `max_positions`.
    fn rope(&self, config: &RopeConfig, rotary_dim: usize, max_positions: usize) -> Result<Self::Rope, EngineError>;

    /// Makes room for `len` numbers at least, and keeps those that are there.
    fn reserve(queue: &mut Self::Queue, buffer: &mut Self::Buffer, len: usize) -> Done;

    /// Bytes that a buffer takes.
    fn bytes(buffer: &Self::Buffer) -> u64;

    /// Puts `values` at the start of `buffer`, which grows when it must.
    fn write(queue: &mut Self::Queue, values: &[f32], buffer: &mut Self::Buffer) -> Done;

    /// Waits for the queue, and gives the first numbers of `buffer`, as many as `values` has.
    fn read(queue: &mut Self::Queue, buffer: &Self::Buffer, values: &mut [f32]) -> Done;

    /// Waits for the queue, and gives the first `len` numbers of `buffer`, whose memory may go with them.
    fn take(queue: &mut Self::Queue, buffer: &mut Self::Buffer, len: usize) -> Result<Vec<f32>, EngineError> {
        let mut values = vec![0.0; len];
        Self::read(queue, buffer, &mut values)?;
        Ok(values)
    }

    /// The first `len` numbers of `buffer` as the host sees them: in `copy`, where it cannot look into the device's memory.
    fn look<'b>(
        queue: &mut Self::Queue,
        buffer: &'b Self::Buffer,
        len: usize,
        copy: &'b mut Vec<f32>,
    ) -> Result<&'b [f32], EngineError> {
        copy.resize(len, 0.0);
        Self::read(queue, buffer, copy)?;
        Ok(copy)
    }

    /// Copies `range` of one buffer to the place `at` of another, which has room for it.
    fn copy(
        queue: &mut Self::Queue,
        from: &Self::Buffer,
        range: Range<usize>,
        to: &mut Self::Buffer,
        at: usize,
    ) -> Done;

    /// Copies the columns `columns` of `x` (rows x `width`) to `out`.
    fn columns(
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        rows: usize,
        width: usize,
        columns: Range<usize>,
        out: &mut Self::Buffer,
    ) -> Done;

    /// out = x / sqrt(mean(x²) + eps) · weight, row by row, over rows of length `len`.
    fn norm(
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        rows: usize,
        weight: &Self::Buffer,
        len: usize,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Done;

    /// [`norm`](Self::norm) in place.
    fn norm_in_place(
        queue: &mut Self::Queue,
        x: &mut Self::Buffer,
        rows: usize,
        weight: &Self::Buffer,
        len: usize,
        eps: f32,
    ) -> Done;

    /// Puts zeros in the place of the first `len` numbers.
    fn clear(queue: &mut Self::Queue, x: &mut Self::Buffer, len: usize) -> Done;

    /// x += y, for the first `len` numbers.
    fn add(queue: &mut Self::Queue, x: &mut Self::Buffer, y: &Self::Buffer, len: usize) -> Done;

    /// Adds `bias`, of length `len`, to each row of `x`.
    fn add_bias(queue: &mut Self::Queue, x: &mut Self::Buffer, rows: usize, bias: &Self::Buffer, len: usize) -> Done;

    /// x *= factor, for the first `len` numbers.
    fn scale(queue: &mut Self::Queue, x: &mut Self::Buffer, len: usize, factor: f32) -> Done;

    /// x = cap · tanh(x / cap), for the first `len` numbers.
    fn cap(queue: &mut Self::Queue, x: &mut Self::Buffer, len: usize, cap: f32) -> Done;

    /// x = activation(x), times `up` where there is one, for the first `len` numbers.
    fn activate(
        queue: &mut Self::Queue,
        activation: Activation,
        x: &mut Self::Buffer,
        up: Option<&Self::Buffer>,
        len: usize,
    ) -> Done;

    /// Turns every head of every row of `x` (rows x `heads` · `head_dim`), or the first elements of each that `rope` has angles for, by the angles of
    /// its position: the rows of each sequence are at consecutive positions from its `past` on, sequence after sequence.
    fn rotate(
        queue: &mut Self::Queue,
        x: &mut Self::Buffer,
        heads: usize,
        head_dim: usize,
        rope: &Self::Rope,
        sequences: &[Sequence],
    ) -> Done;

    /// Attention of `q` (rows x query heads), causal in each sequence and within the window where there is one, over the keys and values of
    /// `context`; `out` has the shape of `q`.
    fn attend(
        queue: &mut Self::Queue,
        attention: &Attention,
        q: &Self::Buffer,
        sequences: &[Sequence],
        context: Context<'_, Self>,
        out: &mut Self::Buffer,
    ) -> Done;

    /// The `n_active` largest of the softmax of each row of `scores` (rows x `n_experts`), the first of equals, for the host.
    fn choose(
        queue: &mut Self::Queue,
        scores: &Self::Buffer,
        rows: usize,
        n_experts: usize,
        n_active: usize,
        normalised: bool,
        routes: &mut Routes,
    ) -> Done;

    /// Copies the rows `rows` of `x`, each of length `len`, to `out`, one after the other.
    fn gather(queue: &mut Self::Queue, x: &Self::Buffer, len: usize, rows: &[usize], out: &mut Self::Buffer) -> Done;

    /// Adds row i of `x`, of length `len`, times `shares[i]` to row `rows[i]` of `out`, in this order.
    fn scatter(
        queue: &mut Self::Queue,
        x: &Self::Buffer,
        len: usize,
        rows: &[usize],
        shares: &[f32],
        out: &mut Self::Buffer,
    ) -> Done;
}

/// A weight `W`, rows x cols (output x input features), known by what it does on a device.
pub trait Weight<D: Device>: Send + Sync {
    /// Output features.
    fn rows(&self) -> usize;

    /// Input features.
    fn cols(&self) -> usize;

    /// `y = x Wᵀ`: `x` is tokens x cols; the result, tokens x rows, goes to the columns of `y` that `place` says.
    ///
    /// # Errors
    /// Those of the device.
    ///
    /// # Panics
    /// May panic when a shape does not fit; the decoder checks shapes once, when it is built.
    fn multiply(&self, queue: &mut D::Queue, x: &D::Buffer, tokens: usize, y: &mut D::Buffer, place: Columns) -> Done;

    /// The products of several weights with one input, each into a buffer of its own.
    ///
    /// # Errors
    /// As [`multiply`](Self::multiply).
    fn multiply_group<const N: usize>(
        group: [&Self; N],
        queue: &mut D::Queue,
        x: &D::Buffer,
        tokens: usize,
        ys: [&mut D::Buffer; N],
    ) -> Done
    where
        Self: Sized,
    {
        group
            .into_iter()
            .zip(ys)
            .try_for_each(|(weight, y)| weight.multiply(queue, x, tokens, y, Columns::all(weight.rows())))
    }

    /// Copies row `row` of `W` (a token's embedding) to row `at` of `out`, whose rows have `cols` elements.
    ///
    /// # Errors
    /// Those of the device.
    ///
    /// # Panics
    /// May panic when there is no such row.
    fn look_up(&self, queue: &mut D::Queue, row: usize, out: &mut D::Buffer, at: usize) -> Done;
}

/// A device that multiplies by packed blocks, which come and go in its memory: with [`bitstack_runtime`], a model whose size changes while it runs
/// ([`crate::ElasticModel`]).
pub trait PackedDevice: Device {
    /// The memory of blocks.
    type Memory: Memory;
    /// A weight beside the stack, on the device.
    type Kept: Debug + Send + Sync;
    /// A weight as a pass multiplies by it, at one snapshot.
    type Operator<'a>: Weight<Self>;

    /// The memory, for the blocks of one model.
    fn memory(&self) -> Self::Memory;

    /// The layout of signs that its kernels read fastest.
    fn signs(&self) -> SignLayout;

    /// Takes a weight that is not stacked.
    ///
    /// # Errors
    /// Those of the device.
    fn keep(&self, weight: Dense) -> Result<Self::Kept, EngineError>;

    /// A weight that is not stacked.
    fn kept<'a>(&self, weight: &'a Self::Kept) -> Self::Operator<'a>;

    /// Weight `weight` of the stack, from the blocks that a snapshot holds.
    ///
    /// # Errors
    /// [`bitstack_runtime::RuntimeError`]; those of the device.
    fn packed<'a>(
        &self,
        snapshot: &'a Snapshot<Self::Memory>,
        weight: usize,
    ) -> Result<Self::Operator<'a>, EngineError>;
}

/// Implements [`PackedDevice`] for a device that works in the memory of the host.
macro_rules! packed_on_the_host {
    ($device:ty) => {
        impl PackedDevice for $device {
            type Memory = HostMemory;
            type Kept = Dense;
            type Operator<'a> = Operator<'a>;

            fn memory(&self) -> HostMemory {
                HostMemory
            }

            fn signs(&self) -> SignLayout {
                Kernel::detect().layout()
            }

            fn keep(&self, weight: Dense) -> Result<Dense, EngineError> {
                Ok(weight)
            }

            fn kept<'a>(&self, weight: &'a Dense) -> Operator<'a> {
                Operator::Kept(weight)
            }

            fn packed<'a>(&self, snapshot: &'a Snapshot, weight: usize) -> Result<Operator<'a>, EngineError> {
                Ok(Operator::Planes { level: snapshot.level(weight)?, kernel: Kernel::detect() })
            }
        }
    };
}

packed_on_the_host!(Cpu);
packed_on_the_host!(Plain);

macro_rules! forward_weight {
    ($($pointer:ty),*) => {$(
        impl<D: Device, W: Weight<D>> Weight<D> for $pointer {
            fn rows(&self) -> usize {
                (**self).rows()
            }
            fn cols(&self) -> usize {
                (**self).cols()
            }
            fn multiply(&self, queue: &mut D::Queue, x: &D::Buffer, tokens: usize, y: &mut D::Buffer, place: Columns) -> Done {
                (**self).multiply(queue, x, tokens, y, place)
            }
            fn multiply_group<const N: usize>(
                group: [&Self; N],
                queue: &mut D::Queue,
                x: &D::Buffer,
                tokens: usize,
                ys: [&mut D::Buffer; N],
            ) -> Done {
                W::multiply_group(group.map(|weight| &**weight), queue, x, tokens, ys)
            }
            fn look_up(&self, queue: &mut D::Queue, row: usize, out: &mut D::Buffer, at: usize) -> Done {
                (**self).look_up(queue, row, out, at)
            }
        }
    )*};
}

forward_weight!(&W, std::sync::Arc<W>);

/// The columns that a product goes to: `first` and as many as the weight has rows, in rows of `stride` columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// The first column.
    pub first: usize,
    /// Columns of the whole.
    pub stride: usize,
}

impl Columns {
    /// All `n` columns.
    pub fn all(n: usize) -> Self {
        Self { first: 0, stride: n }
    }
}

/// The part of a pass that belongs to one sequence: its next rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Positions in front of them.
    pub past: usize,
    /// How many they are.
    pub rows: usize,
    /// Positions of the sequence, for rotary angles that depend on it: those so far and these rows, or more where it is known that more come.
    pub len: usize,
}

/// The keys (rotated) and values that an attention looks at.
#[derive(Debug)]
pub enum Context<'a, D: Device> {
    /// Those of the pass itself, rows x kv size: one sequence from its start.
    Own {
        /// Keys.
        keys: &'a D::Buffer,
        /// Values.
        values: &'a D::Buffer,
    },
    /// Those of layer `layer` in the cache of each sequence, which have the pass's rows already.
    Cached {
        /// One per sequence.
        caches: &'a [KvCache<D>],
        /// The layer.
        layer: usize,
    },
}

impl<'a, D: Device> Context<'a, D> {
    /// Keys and values of a sequence.
    pub fn of(&self, sequence: usize) -> (&'a D::Buffer, &'a D::Buffer) {
        match *self {
            Self::Own { keys, values } => (keys, values),
            Self::Cached { caches, layer } => caches[sequence].layer(layer),
        }
    }
}

/// Which rows go through which experts.
#[derive(Debug, Default)]
pub struct Routes {
    /// Per expert, the rows that go through it, in order.
    pub rows: Vec<Vec<usize>>,
    /// Per expert and row, what its result counts.
    pub shares: Vec<Vec<f32>>,
}

impl Routes {
    /// Fills them from the probabilities of the experts, row after row, as [`Device::choose`] says.
    pub fn fill(&mut self, probabilities: &[f32], n_experts: usize, n_active: usize, normalised: bool) {
        self.rows.resize_with(n_experts, Vec::new);
        self.shares.resize_with(n_experts, Vec::new);
        self.rows.iter_mut().for_each(Vec::clear);
        self.shares.iter_mut().for_each(Vec::clear);
        for (row, p) in probabilities.chunks_exact(n_experts).enumerate() {
            // The number of those that come first; few experts, so that sorting them would not be faster.
            let is_before = |e: usize, than: usize| p[e] > p[than] || p[e] == p[than] && e < than;
            let is_chosen = |e: usize| (0..n_experts).filter(|other| is_before(*other, e)).count() < n_active;
            let sum: f32 = if normalised { (0..n_experts).filter(|e| is_chosen(*e)).map(|e| p[e]).sum() } else { 1.0 };
            for expert in (0..n_experts).filter(|e| is_chosen(*e)) {
                self.rows[expert].push(row);
                self.shares[expert].push(p[expert] / sum);
            }
        }
    }
}
