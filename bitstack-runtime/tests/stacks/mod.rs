//! Small stacks, and sources that wait, fail or change.
#![allow(dead_code, unused_macros, unused_imports, reason = "every test file uses its own part of this")]

pub(crate) mod device;

use bitstack_core::{Basis, Block, Coefficients, Shape, SignMatrix, Spike, Spikes, Values, f16};
use bitstack_format::{BlockSource, Draft, Dtype, ReadAt, StackFile};
use bitstack_runtime::{Elastic, HostMemory, Memory, Options, Snapshot};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::io;
use std::sync::{Condvar, Mutex};

/// A stack with one weight for each shape, of `n_blocks` blocks each, some additive, some refitted, with one basis or more; all but the
/// second have spikes.
pub(crate) fn stack(shapes: &[(usize, usize)], n_blocks: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(7);
    let mut draft = Draft::create_in(std::env::temp_dir()).unwrap();
    draft.push_file("config.json", b"{}").unwrap();
    draft.push_base("norm.weight", Dtype::F32, &[5], &[0; 20]).unwrap();
    for (i, &(rows, cols)) in shapes.iter().enumerate() {
        let shape = Shape::new(rows, cols).unwrap();
        let w = draft.add_weight(&format!("layers.{i}.weight"), shape, 1, "sample").unwrap();
        for b in 1..=n_blocks {
            let planes = if i % 2 == 0 { b } else { 1 };
            let mut halves = |n: usize| -> Values {
                Values::F16((0..n).map(|_| f16::from_f32(rng.random_range(-1.0..1.0))).collect())
            };
            let basis = (b == 1 || b == 3).then(|| Basis::new(1, cols, halves(cols)).unwrap());
            let coefficients = Coefficients::new(rows, planes, 1, halves(rows * planes)).unwrap();
            let mut bytes = vec![0u8; rows * cols.div_ceil(8)];
            rng.fill(&mut bytes[..]);
            if !cols.is_multiple_of(8) {
                bytes
                    .chunks_exact_mut(cols.div_ceil(8))
                    .for_each(|row| *row.last_mut().unwrap() &= (1 << (cols % 8)) - 1);
            }
            let spikes = (b == 1 && i != 1).then(|| {
                let entries = (0..=rows).map(|row| {
                    let col = rng.random_range(0..cols);
                    Spike { row: row % rows, col, size: if row % 2 == 0 { 15 } else { -1 } }
                });
                let sizes = std::array::from_fn(|i| f16::from_f32(4.0 + i as f32));
                Spikes::encode(shape, sizes, &entries.collect::<Vec<_>>()).unwrap()
            });
            let signs = SignMatrix::from_bytes(rows, cols, bytes).unwrap();
            let block = Block { signs, basis, coefficients, spikes };
            draft.push_block(w, block.view()).unwrap();
        }
    }
    // Every first block, then two blocks of a weight at a time where there are some, so that levels differ.
    let n = shapes.len() as u32;
    let mut order: Vec<u32> = (0..n).rev().collect();
    for b in (1..n_blocks).step_by(2) {
        for w in 0..n {
            order.extend(std::iter::repeat_n(w, 2.min(n_blocks - b)));
        }
    }
    let mut bytes = Vec::new();
    draft.finish(&order, &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

/// Four weights of awkward shapes with five blocks each.
pub(crate) fn small() -> Vec<u8> {
    stack(&[(24, 40), (17, 33), (8, 64), (5, 7)], 5)
}

/// As many, of which one is so much larger that several blocks of the others share a mapping.
pub(crate) fn uneven() -> Vec<u8> {
    stack(&[(1536, 1024), (17, 33), (8, 64), (5, 7)], 5)
}

/// The product of every weight at these levels with an input of its own, read from the file block by block: what a snapshot must give.
pub(crate) fn products(file: &[u8], levels: &[u32]) -> Vec<Vec<f64>> {
    let file = StackFile::open(file).unwrap();
    let weights = file.weights();
    let product = |(w, &level): (usize, &u32)| {
        let stack = file.read_stack(w, level).unwrap();
        let level = stack.level(level).unwrap();
        level.matvec(&input(weights[w].shape.cols())).unwrap()
    };
    levels.iter().enumerate().map(product).collect()
}

/// The same products from a snapshot.
pub(crate) fn products_of<M: ReadableMemory>(snapshot: &Snapshot<M>) -> Vec<Vec<f64>> {
    (0..snapshot.levels().len()).map(|w| M::product(snapshot, w)).collect()
}

/// A memory that tests can read.
pub(crate) trait ReadableMemory: Memory + Clone {
    /// The product of a weight of a snapshot with its input.
    fn product(snapshot: &Snapshot<Self>, weight: usize) -> Vec<f64>;

    /// Compares the bytes of all runs with those that the memory has given, where it can tell.
    fn check_used_bytes(&self, expected: u64);
}

impl ReadableMemory for HostMemory {
    fn product(snapshot: &Snapshot, weight: usize) -> Vec<f64> {
        let level = snapshot.level(weight).unwrap();
        assert!(level.planes().iter().all(|plane| plane.signs.layout() == snapshot.signs()));
        level.matvec(&input(level.shape().cols())).unwrap()
    }

    fn check_used_bytes(&self, _expected: u64) {}
}

/// Runs tests over the memory of this process and over a device: functions that take a memory.
macro_rules! over_both_memories {
    ($($test:ident,)*) => {
        mod host {
            $(#[test]
            fn $test() {
                super::$test(bitstack_runtime::HostMemory);
            })*
        }

        mod device {
            $(#[test]
            fn $test() {
                super::$test(crate::stacks::device::Device::with_capacity(1 << 30));
            })*
        }
    };
}
pub(crate) use over_both_memories;

fn input(cols: usize) -> Vec<f32> {
    (0..cols).map(|c| (c as f32 * 0.7).sin()).collect()
}

/// Opens a model over any source, in any memory.
pub(crate) fn open<S: ReadAt + Send + Sync + 'static, M: Memory + Clone>(
    memory: &M,
    source: S,
    budget_bytes: u64,
    options: Options,
) -> Elastic<S, M> {
    Elastic::open_in(memory.clone(), StackFile::open(source).unwrap(), budget_bytes, options).unwrap()
}

/// What a [`Gate`] does with reads that it has no permit for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beyond {
    Wait,
    Fail,
    Panic,
}

/// A source that lets a number of reads pass.
#[derive(Debug)]
pub(crate) struct Gate {
    bytes: Mutex<Vec<u8>>,
    state: Mutex<(usize, Beyond)>,
    changed: Condvar,
    reads: Mutex<usize>,
}

impl Gate {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let state = Mutex::new((usize::MAX, Beyond::Wait));
        Self { bytes: Mutex::new(bytes), state, changed: Condvar::new(), reads: Mutex::new(0) }
    }

    /// From now on `n` reads pass.
    pub(crate) fn permit(&self, n: usize, beyond: Beyond) {
        *self.state.lock().unwrap() = (n, beyond);
        self.changed.notify_all();
    }

    /// Reads that passed so far.
    pub(crate) fn reads(&self) -> usize {
        *self.reads.lock().unwrap()
    }

    /// Changes the bytes under everybody's feet.
    pub(crate) fn change(&self, f: impl FnOnce(&mut Vec<u8>)) {
        f(&mut self.bytes.lock().unwrap());
    }
}

impl ReadAt for Gate {
    fn size_bytes(&self) -> io::Result<u64> {
        self.bytes.lock().unwrap().size_bytes()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        while state.0 == 0 {
            match state.1 {
                Beyond::Wait => state = self.changed.wait(state).unwrap(),
                Beyond::Fail => return Err(io::Error::other("the disk is on fire")),
                Beyond::Panic => {
                    drop(state);
                    panic!("the source has a bug");
                }
            }
        }
        state.0 -= 1;
        drop(state);
        *self.reads.lock().unwrap() += 1;
        self.bytes.lock().unwrap().read_exact_at(buf, offset_bytes)
    }
}
