//! What never changes while a model is loaded.

use bitstack_core::{Shape, SignLayout};
use bitstack_format::BlockExtent;
use bitstack_sort::LoadOrder;
use std::sync::atomic::AtomicUsize;

/// The load order, and where the blocks of each weight are in it. All snapshots and runs of a model share one table.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) order: LoadOrder,
    /// Per position of the order the weight (from 0) and its block (from 1).
    pub(crate) entries: Vec<(usize, usize)>,
    /// Per position the parts of the block among its bytes.
    pub(crate) extents: Vec<BlockExtent>,
    /// Bytes of the largest of them.
    pub(crate) largest_block_bytes: usize,
    /// The layout in which blocks come with their signs.
    pub(crate) signs: SignLayout,
    pub(crate) weights: Vec<TableWeight>,
    /// The positions at which a run of blocks begins, rising.
    pub(crate) runs: Vec<usize>,
    /// Snapshots that exist; all but one are held by somebody.
    pub(crate) live: AtomicUsize,
}

#[derive(Debug)]
pub(crate) struct TableWeight {
    pub(crate) name: String,
    pub(crate) shape: Shape,
    /// The positions of its blocks in the load order, rising.
    pub(crate) positions: Vec<usize>,
}

impl Table {
    /// The name of the weight whose block has this position.
    pub(crate) fn name(&self, position: usize) -> String {
        self.weights[self.entries[position].0].name.clone()
    }

    /// The position after the run that this one is in.
    pub(crate) fn run_end(&self, position: usize) -> usize {
        let next = self.runs.partition_point(|&start| start <= position);
        self.runs.get(next).copied().unwrap_or(self.entries.len())
    }
}
