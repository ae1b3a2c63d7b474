//! Blocks in memory: neighbours of the load order share a run, which is given back with the last of them.

use crate::RuntimeError;
use crate::memory::{FillError, Memory};
use crate::table::Table;
use bitstack_core::BlockRef;
use bitstack_format::{BlockExtent, BlockSource, FormatError, ReadAt, StackFile, Verify};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks share a run of up to this many bytes, so that nearly all of it are whole units of the memory however small the blocks are ...
const RUN_BYTES: u64 = 32 << 20;
/// ... and of up to this part of the model, since a run is given back as a whole.
const RUN_PART: u64 = 64;

/// The extent of each entry (weight from 0, block from 1).
///
/// # Errors
/// A block that cannot be addressed.
pub(crate) fn extents<S: ReadAt>(
    file: &StackFile<S>,
    entries: &[(usize, usize)],
) -> Result<Vec<BlockExtent>, RuntimeError> {
    let extent = |&(weight, block): &(usize, usize)| {
        file.block_extent(weight, block).map_err(|source| {
            let weight = file.weights()[weight].name.clone();
            RuntimeError::Block { weight, block, source: Arc::new(source) }
        })
    };
    entries.iter().map(extent).collect()
}

/// The positions of a load order at which a run begins, from the bytes of its blocks in a memory of units of `unit_bytes`. One begins
/// after the first `n_first`, the smallest model: the rest is given back whole.
pub(crate) fn runs(bytes: &[u64], n_first: usize, unit_bytes: u64) -> Vec<usize> {
    let run_bytes = (bytes.iter().sum::<u64>() / RUN_PART).min(RUN_BYTES);
    let mut runs = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        runs.push(start);
        let limit = if start < n_first { n_first } else { bytes.len() };
        let mut sum = bytes[start];
        let mut best = (start + 1, sum % unit_bytes);
        for (i, bytes) in bytes[..limit].iter().enumerate().skip(start + 1) {
            sum += bytes;
            if sum > run_bytes {
                break;
            }
            // As full as can be; from half of that on, with as little as can be beyond the last whole unit.
            let beyond = sum % unit_bytes;
            if sum <= run_bytes / 2 || beyond <= best.1 {
                best = (i + 1, beyond);
            }
        }
        start = best.0;
    }
    runs
}

/// Counts the bytes of runs.
#[derive(Debug, Default)]
pub(crate) struct Account {
    allocated_bytes: AtomicU64,
}

impl Account {
    /// Bytes of all runs that there are.
    pub(crate) fn allocated_bytes(&self) -> u64 {
        self.allocated_bytes.load(Ordering::Relaxed)
    }
}

/// An entry in an account, for as long as it lives.
#[derive(Debug)]
struct Entry {
    account: Arc<Account>,
    bytes: u64,
}

impl Entry {
    fn new(account: &Arc<Account>, bytes: u64) -> Self {
        account.allocated_bytes.fetch_add(bytes, Ordering::Relaxed);
        Self { account: account.clone(), bytes }
    }

    fn change(&mut self, bytes: u64) {
        if bytes <= self.bytes {
            self.account.allocated_bytes.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        } else {
            self.account.allocated_bytes.fetch_add(bytes - self.bytes, Ordering::Relaxed);
        }
        self.bytes = bytes;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.account.allocated_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Blocks that follow one another in the load order, in one run of a memory.
///
/// It is filled block by block by one thread, and never changes once it is shared.
#[derive(Debug)]
pub(crate) struct Run<M: Memory> {
    memory: M::Run,
    /// The position of the first block.
    first: usize,
    n_filled: usize,
    /// After the memory, so that it is dropped when that is given back.
    entry: Entry,
}

impl<M: Memory> Run<M> {
    /// New memory for the blocks of these positions, one at least; none is filled yet.
    ///
    /// # Errors
    /// A memory that has no more.
    pub(crate) fn new(
        memory: &M,
        table: &Table,
        positions: Range<usize>,
        account: &Arc<Account>,
    ) -> Result<Self, RuntimeError> {
        let first = positions.start;
        let extents = &table.extents[positions];
        let run = memory.reserve(extents).map_err(|source| {
            let bytes = extents.iter().fold(0, |sum: u64, extent| sum.saturating_add(memory.block_bytes(extent)));
            no_memory(table, first, bytes, source)
        })?;
        let entry = Entry::new(account, memory.run_bytes(&run));
        Ok(Self { memory: run, first, n_filled: 0, entry })
    }

    /// Reads the next block and checks its values; `after_piece` is called after each piece of it.
    pub(crate) fn fill_next<S: ReadAt>(
        &mut self,
        memory: &M,
        staging: &mut M::Staging,
        file: &StackFile<S>,
        table: &Table,
        verify: Verify,
        after_piece: &mut dyn FnMut(),
    ) -> Result<(), RuntimeError> {
        let position = self.first + self.n_filled;
        let (weight, block) = table.entries[position];
        let wrong = |source| RuntimeError::Block { weight: table.name(position), block, source: Arc::new(source) };
        let unusable = |source| wrong(FormatError::Block { weight: table.name(position), block, source });
        memory
            .fill(&mut self.memory, self.n_filled, staging, |bytes: &mut [u8]| -> Result<BlockRef<'_>, RuntimeError> {
                file.read_block_bytes_in(weight, block, table.signs, verify, bytes, after_piece).map_err(wrong)?;
                table.extents[position].view_in(table.signs, bytes).map_err(unusable)
            })
            .map_err(|error| match error {
                FillError::Block(error) => error,
                FillError::Memory(source) => not_filled(table, position, source),
            })?;
        self.n_filled += 1;
        Ok(())
    }

    /// The blocks that were filled, one at least, to be shared.
    ///
    /// # Errors
    /// A memory that says only now that it could not be filled.
    pub(crate) fn seal(mut self, memory: &M, table: &Table) -> Result<Arc<Self>, RuntimeError> {
        memory.seal(&mut self.memory, self.n_filled).map_err(|source| not_filled(table, self.first, source))?;
        self.entry.change(memory.run_bytes(&self.memory));
        Ok(Arc::new(self))
    }

    /// The positions of the blocks that were filled.
    pub(crate) fn positions(&self) -> Range<usize> {
        self.first..self.first + self.n_filled
    }
}

/// The memory has none for a run of so many bytes that begins at a position, or for what it takes to fill it.
pub(crate) fn no_memory<E>(table: &Table, position: usize, bytes: u64, source: E) -> RuntimeError
where
    E: std::error::Error + Send + Sync + 'static,
{
    let block = table.entries[position].1;
    RuntimeError::Memory { weight: table.name(position), block, bytes, source: Arc::new(source) }
}

fn not_filled<E>(table: &Table, position: usize, source: E) -> RuntimeError
where
    E: std::error::Error + Send + Sync + 'static,
{
    let block = table.entries[position].1;
    RuntimeError::Fill { weight: table.name(position), block, source: Arc::new(source) }
}

/// A block in memory, and all of its run with it.
#[derive(Debug)]
pub(crate) struct Resident<M: Memory> {
    run: Arc<Run<M>>,
    position: usize,
}

// Derived, this would ask the same of the memory.
impl<M: Memory> Clone for Resident<M> {
    fn clone(&self) -> Self {
        Self { run: self.run.clone(), position: self.position }
    }
}

impl<M: Memory> Resident<M> {
    /// The block of a position that is in the run.
    pub(crate) fn new(run: Arc<Run<M>>, position: usize) -> Self {
        assert!(run.positions().contains(&position), "position {position} of a run of {:?}", run.positions());
        Self { run, position }
    }

    /// The run in its memory, and the index of the block there.
    pub(crate) fn place(&self) -> (&M::Run, usize) {
        (&self.run.memory, self.position - self.run.first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUGE: u64 = 2 << 20;

    /// Bytes of each run.
    fn sums(bytes: &[u64], n_first: usize) -> Vec<u64> {
        let runs = runs(bytes, n_first, HUGE);
        let ends = runs.iter().skip(1).copied().chain([bytes.len()]);
        runs.iter().zip(ends).map(|(&start, end)| bytes[start..end].iter().sum()).collect()
    }

    #[test]
    fn runs_hold_every_block_once_in_order_and_no_more_than_they_may() {
        for n_blocks in [0usize, 1, 2, 63, 64, 65, 1000] {
            for scale in [4096, HUGE / 4, HUGE + 4096, 3 * HUGE] {
                let bytes: Vec<u64> = (0..n_blocks as u64).map(|i| scale * (1 + i * 7 % 5)).collect();
                let n_first = n_blocks / 5;
                let (starts, sums) = (runs(&bytes, n_first, HUGE), sums(&bytes, n_first));
                assert!(starts.is_sorted_by(|a, b| a < b) && starts.first() == (n_blocks > 0).then_some(&0));
                assert!(n_first == n_blocks || starts.contains(&n_first), "the smallest model ends with a run");
                let total: u64 = bytes.iter().sum();
                assert_eq!(sums.iter().sum::<u64>(), total);
                let limit = (total / RUN_PART).min(RUN_BYTES);
                for (start, sum) in starts.iter().zip(sums) {
                    assert!(sum <= limit || sum == bytes[*start], "a run of {sum} bytes, {limit} allowed");
                }
            }
        }
    }

    #[test]
    fn runs_of_a_large_model_are_huge_pages_and_little_else() {
        // Blocks of a model of 8 billion weights: signs of 0.5, 2 and 7 MiB, and their factors.
        let layer = [2048, 512, 512, 2048, 7168, 7168, 7168].map(|signs| (signs << 10) + 5 * 4096);
        let bytes: Vec<u64> = layer.iter().copied().cycle().take(7 * 32 * 3).collect();
        let beyond: u64 = sums(&bytes, 7 * 32).iter().map(|sum| sum % HUGE).sum();
        assert!(beyond * 100 < bytes.iter().sum(), "{beyond} bytes in small pages");
    }
}
