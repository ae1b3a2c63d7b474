//! Blocks in memory: neighbours of the load order share a mapping, which goes back to the system with the last of them.

use crate::RuntimeError;
use crate::snapshot::Table;
use crate::system::page_bytes;
use bitstack_core::{BlockRef, CoreError, SignLayout};
use bitstack_format::{BlockExtent, BlockSource, FormatError, ReadAt, StackFile, Verify};
use memmap2::MmapMut;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Mappings of at least this size begin at a multiple of it, and their whole multiples are given huge pages where the system has them:
/// a five-hundredth of the page faults, and of the address translations later.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Blocks share a mapping of up to this many bytes, so that nearly all of it are huge pages however small the blocks are ...
const RUN_BYTES: u64 = 32 << 20;
/// ... and of up to this part of the model, since a mapping goes back to the system as a whole.
const RUN_PART: u64 = 64;

/// Per entry (weight from 0, block from 1) the bytes of memory that it takes: whole pages.
///
/// # Errors
/// A block that cannot be addressed.
pub(crate) fn mapped_bytes<S: ReadAt>(
    file: &StackFile<S>,
    entries: &[(usize, usize)],
) -> Result<Vec<u64>, RuntimeError> {
    let bytes = |&(weight, block): &(usize, usize)| {
        let extent = file.block_extent(weight, block).map_err(|source| {
            let weight = file.weights()[weight].name.clone();
            RuntimeError::Block { weight, block, source: Arc::new(source) }
        })?;
        Ok((extent.len_bytes() as u64).next_multiple_of(page_bytes() as u64))
    };
    entries.iter().map(bytes).collect()
}

/// The positions of a load order at which a mapping begins, from the mapped bytes of its blocks. One begins after the first `n_first`,
/// the smallest model: the rest goes back to the system whole.
pub(crate) fn runs(bytes: &[u64], n_first: usize) -> Vec<usize> {
    let run_bytes = (bytes.iter().sum::<u64>() / RUN_PART).min(RUN_BYTES);
    let mut runs = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        runs.push(start);
        let limit = if start < n_first { n_first } else { bytes.len() };
        let mut sum = bytes[start];
        let mut best = (start + 1, sum % HUGE_PAGE_BYTES as u64);
        for (i, bytes) in bytes[..limit].iter().enumerate().skip(start + 1) {
            sum += bytes;
            if sum > run_bytes {
                break;
            }
            // As full as can be; from half of that on, with as little as can be beyond the last whole huge page.
            let beyond = sum % HUGE_PAGE_BYTES as u64;
            if sum <= run_bytes / 2 || beyond <= best.1 {
                best = (i + 1, beyond);
            }
        }
        start = best.0;
    }
    runs
}

/// Counts the bytes of mappings, in whole pages.
#[derive(Debug)]
pub(crate) struct Account {
    page_bytes: usize,
    allocated_bytes: AtomicU64,
}

impl Account {
    pub(crate) fn new() -> Self {
        Self { page_bytes: page_bytes(), allocated_bytes: AtomicU64::new(0) }
    }

    /// Bytes of all mappings that there are.
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
    fn new(account: &Arc<Account>, bytes: usize) -> Self {
        account.allocated_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Self { account: account.clone(), bytes: bytes as u64 }
    }

    fn lower(&mut self, bytes: usize) {
        self.account.allocated_bytes.fetch_sub(self.bytes - bytes as u64, Ordering::Relaxed);
        self.bytes = bytes as u64;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.account.allocated_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Blocks that follow one another in the load order, in one mapping.
///
/// It is filled block by block by one thread, and never changes once it is shared.
#[derive(Debug)]
pub(crate) struct Run {
    signs: SignLayout,
    map: MmapMut,
    /// Where its first block is in the mapping. Pages around the blocks are never touched, and so never there.
    start: usize,
    /// The position of the first block.
    first: usize,
    /// The blocks, and where they are from `start` on, each at the beginning of a page.
    blocks: Vec<(BlockExtent, Range<usize>)>,
    n_read: usize,
    /// After the mapping, so that it is dropped when the memory is back with the system.
    entry: Entry,
}

impl Run {
    /// New memory for the blocks of these positions, one at least; none is read yet.
    ///
    /// # Errors
    /// A block that cannot be addressed; a system that gives no memory.
    pub(crate) fn new<S: ReadAt>(
        file: &StackFile<S>,
        table: &Table,
        positions: Range<usize>,
        signs: SignLayout,
        account: &Arc<Account>,
    ) -> Result<Self, RuntimeError> {
        let first = positions.start;
        let mut blocks = Vec::with_capacity(positions.len());
        let mut bytes = 0usize;
        for position in positions {
            let (weight, block) = table.entries[position];
            let extent = file.block_extent(weight, block).map_err(|source| RuntimeError::Block {
                weight: table.name(position),
                block,
                source: Arc::new(source),
            })?;
            let from = bytes;
            // What cannot be counted cannot be mapped either.
            bytes = bytes
                .saturating_add(extent.len_bytes())
                .checked_next_multiple_of(account.page_bytes)
                .unwrap_or(usize::MAX);
            let place = from..from.saturating_add(extent.len_bytes());
            blocks.push((extent, place));
        }
        let (map, start) = map(bytes).map_err(|source| RuntimeError::Memory {
            weight: table.name(first),
            block: table.entries[first].1,
            bytes: bytes as u64,
            source: Arc::new(source),
        })?;
        Ok(Self { signs, map, start, first, blocks, n_read: 0, entry: Entry::new(account, bytes) })
    }

    /// Reads the next block and checks its values; `after_piece` is called after each piece of it.
    pub(crate) fn read_next<S: ReadAt>(
        &mut self,
        file: &StackFile<S>,
        table: &Table,
        verify: Verify,
        after_piece: &mut dyn FnMut(),
    ) -> Result<(), RuntimeError> {
        let position = self.first + self.n_read;
        let (weight, block) = table.entries[position];
        let wrong = |source| RuntimeError::Block { weight: table.name(position), block, source: Arc::new(source) };
        let unusable = |source| wrong(FormatError::Block { weight: table.name(position), block, source });
        let place = self.place(self.n_read);
        let (extent, bytes) = (&self.blocks[self.n_read].0, &mut self.map[place]);
        file.read_block_bytes_in(weight, block, self.signs, verify, bytes, after_piece).map_err(wrong)?;
        extent.view_in(self.signs, bytes).map_err(unusable)?;
        self.n_read += 1;
        Ok(())
    }

    /// The blocks that were read, to be shared. What is beyond them was never touched, and does not count any more.
    pub(crate) fn finish(mut self) -> Arc<Self> {
        let end = match self.n_read.checked_sub(1) {
            Some(last) if self.n_read < self.blocks.len() => self.blocks[last].1.end,
            _ => return Arc::new(self),
        };
        let whole = self.entry.bytes as usize;
        let huge = whole / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        let pages = if end <= huge { HUGE_PAGE_BYTES } else { self.entry.account.page_bytes };
        self.entry.lower(end.next_multiple_of(pages));
        self.blocks.truncate(self.n_read);
        Arc::new(self)
    }

    /// The positions of the blocks that were read.
    pub(crate) fn positions(&self) -> Range<usize> {
        self.first..self.first + self.n_read
    }

    fn place(&self, i: usize) -> Range<usize> {
        let Range { start, end } = self.blocks[i].1;
        self.start + start..self.start + end
    }

    fn view(&self, i: usize) -> Result<BlockRef<'_>, CoreError> {
        self.blocks[i].0.view_in(self.signs, &self.map[self.place(i)])
    }
}

/// A block in memory, and all of its run with it.
#[derive(Debug, Clone)]
pub(crate) struct Resident {
    run: Arc<Run>,
    position: usize,
}

impl Resident {
    /// The block of a position that is in the run.
    pub(crate) fn new(run: Arc<Run>, position: usize) -> Self {
        assert!(run.positions().contains(&position), "position {position} of a run of {:?}", run.positions());
        Self { run, position }
    }

    /// The block.
    pub(crate) fn view(&self) -> Result<BlockRef<'_>, CoreError> {
        self.run.view(self.position - self.run.first)
    }
}

/// New memory with room for `bytes`, and where in it they go, at the start of a page.
fn map(bytes: usize) -> io::Result<(MmapMut, usize)> {
    if bytes < HUGE_PAGE_BYTES {
        return Ok((MmapMut::map_anon(bytes)?, 0));
    }
    // The system aligns mappings to huge pages only when they consist of them.
    let map = MmapMut::map_anon(bytes.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?)?;
    let start = map.as_ptr().addr().next_multiple_of(HUGE_PAGE_BYTES) - map.as_ptr().addr();
    #[cfg(target_os = "linux")]
    {
        // Advice: without huge pages everything works as well, only slower.
        let _ = map.advise_range(memmap2::Advice::HugePage, start, bytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES);
    }
    Ok((map, start))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUGE: u64 = HUGE_PAGE_BYTES as u64;

    /// Bytes of each run.
    fn sums(bytes: &[u64], n_first: usize) -> Vec<u64> {
        let runs = runs(bytes, n_first);
        let ends = runs.iter().skip(1).copied().chain([bytes.len()]);
        runs.iter().zip(ends).map(|(&start, end)| bytes[start..end].iter().sum()).collect()
    }

    #[test]
    fn runs_hold_every_block_once_in_order_and_no_more_than_they_may() {
        for n_blocks in [0usize, 1, 2, 63, 64, 65, 1000] {
            for scale in [4096, HUGE / 4, HUGE + 4096, 3 * HUGE] {
                let bytes: Vec<u64> = (0..n_blocks as u64).map(|i| scale * (1 + i * 7 % 5)).collect();
                let n_first = n_blocks / 5;
                let (starts, sums) = (runs(&bytes, n_first), sums(&bytes, n_first));
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
