//! What a forward pass works on.

use crate::RuntimeError;
use crate::host::HostMemory;
use crate::memory::Memory;
use crate::resident::Resident;
use crate::swap::Prefix;
use crate::table::{Table, TableWeight};
use bitstack_core::{Level, SignLayout};
use bitstack_format::{BlockExtent, FormatError};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A model at one size: the first blocks of the load order, all in memory, unchanged as long as it is held.
///
/// A forward pass takes one at its start and works on it to its end, whatever happens to the budget meanwhile. Blocks that the budget
/// has no room for any more leave memory when the last snapshot that holds them (or a neighbour in their run) is dropped, so do not
/// keep one without need.
#[derive(Debug)]
pub struct Snapshot<M: Memory = HostMemory> {
    table: Arc<Table>,
    /// The first blocks of the load order.
    blocks: Vec<Resident<M>>,
    levels: Vec<u32>,
}

/// Where a block of a snapshot is, for kernels that read the memory it is in.
#[derive(Debug)]
pub struct ResidentBlock<'a, M: Memory> {
    /// The run that holds it.
    pub run: &'a M::Run,
    /// Its index in the run, from 0.
    pub index: usize,
    /// What it is made of, and where its parts are among the bytes that it was filled from.
    pub extent: &'a BlockExtent,
}

impl<M: Memory> Snapshot<M> {
    /// The snapshot without blocks. Only the loader sees it.
    pub(crate) fn empty(table: Arc<Table>) -> Self {
        let levels = vec![0; table.weights.len()];
        Self::new(table, Vec::new(), levels)
    }

    fn new(table: Arc<Table>, blocks: Vec<Resident<M>>, levels: Vec<u32>) -> Self {
        table.live.fetch_add(1, Ordering::Relaxed);
        Self { table, blocks, levels }
    }

    /// Per weight the number of its blocks that are there, at least 1: the levels of a plan.
    pub fn levels(&self) -> &[u32] {
        &self.levels
    }

    /// The number of blocks of all weights together: the length of the prefix of the load order that this is.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Bytes of these blocks and of the unstacked tensors: the `resident_bytes` of the plan.
    pub fn resident_bytes(&self) -> u64 {
        self.table.order.cumulative_bytes()[self.blocks.len()]
    }

    /// The layout in which blocks came with their signs: [`Memory::signs`].
    pub fn signs(&self) -> SignLayout {
        self.table.signs
    }

    /// The blocks of weight `weight` (from 0, in the order of the file) that are there, from block 1 on: as many as its level.
    ///
    /// # Errors
    /// [`RuntimeError::NoSuchWeight`].
    pub fn blocks(&self, weight: usize) -> Result<impl ExactSizeIterator<Item = ResidentBlock<'_, M>>, RuntimeError> {
        let positions = &self.weight(weight)?.positions[..self.levels[weight] as usize];
        Ok(positions.iter().map(|&position| {
            let (run, index) = self.blocks[position].place();
            ResidentBlock { run, index, extent: &self.table.extents[position] }
        }))
    }

    fn weight(&self, weight: usize) -> Result<&TableWeight, RuntimeError> {
        let n_weights = self.levels.len();
        self.table.weights.get(weight).ok_or(RuntimeError::NoSuchWeight { weight, n_weights })
    }
}

impl Snapshot {
    /// Weight `weight` (from 0, in the order of the file) at its level. Its planes borrow from the snapshot.
    ///
    /// Putting it together takes time in proportion to its rows and columns (the factors are looked through for values that are not
    /// finite), not to its elements.
    ///
    /// # Errors
    /// [`RuntimeError::NoSuchWeight`]; [`RuntimeError::Block`] when the blocks, each of which is valid, do not fit together.
    pub fn level(&self, weight: usize) -> Result<Level<'_>, RuntimeError> {
        let TableWeight { name, shape, .. } = self.weight(weight)?;
        let wrong = |block, source| {
            let weight = name.clone();
            let source = FormatError::Block { weight: weight.clone(), block, source };
            RuntimeError::Block { weight, block, source: Arc::new(source) }
        };
        let resident = self.blocks(weight)?;
        let level = resident.len();
        let mut blocks = Vec::with_capacity(level);
        for (i, block) in resident.enumerate() {
            let view = block.extent.view_in(self.signs(), block.run.bytes(block.index));
            blocks.push(view.map_err(|source| wrong(i + 1, source))?);
        }
        Level::new(*shape, blocks).map_err(|source| wrong(level, source))
    }
}

impl<M: Memory> Drop for Snapshot<M> {
    fn drop(&mut self) {
        self.table.live.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<M: Memory> Prefix for Snapshot<M> {
    type Item = Resident<M>;

    fn len(&self) -> usize {
        self.blocks.len()
    }

    fn cut(&self, len: usize) -> Self {
        let mut levels = self.levels.clone();
        for &(weight, _) in &self.table.entries[len..self.blocks.len()] {
            levels[weight] -= 1;
        }
        Self::new(self.table.clone(), self.blocks[..len].to_vec(), levels)
    }

    fn grown(&self, items: Vec<Resident<M>>) -> Self {
        let mut levels = self.levels.clone();
        let mut blocks = Vec::with_capacity(self.blocks.len() + items.len());
        blocks.extend_from_slice(&self.blocks);
        blocks.extend(items);
        for &(weight, _) in &self.table.entries[self.blocks.len()..blocks.len()] {
            levels[weight] += 1;
        }
        Self::new(self.table.clone(), blocks, levels)
    }
}
