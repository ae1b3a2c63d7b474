//! A block in memory: a mapping of its own, so that dropping it gives the memory back to the system.

use crate::RuntimeError;
use crate::system::page_bytes;
use bitstack_core::{BlockRef, CoreError};
use bitstack_format::{BlockExtent, BlockSource, FormatError, ReadAt, StackFile, Verify};
use memmap2::MmapMut;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks of at least this size begin at a multiple of it, and their whole multiples are given huge pages where the system has them:
/// a five-hundredth of the page faults, and of the address translations later.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Counts the bytes of blocks in memory, in whole pages.
#[derive(Debug)]
pub(crate) struct Account {
    page_bytes: u64,
    allocated_bytes: AtomicU64,
}

impl Account {
    pub(crate) fn new() -> Self {
        Self { page_bytes: page_bytes(), allocated_bytes: AtomicU64::new(0) }
    }

    /// Bytes of all blocks that are in memory.
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
        let bytes = (bytes as u64).next_multiple_of(account.page_bytes);
        account.allocated_bytes.fetch_add(bytes, Ordering::Relaxed);
        Self { account: account.clone(), bytes }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.account.allocated_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A block in memory.
#[derive(Debug)]
pub(crate) struct Resident {
    extent: BlockExtent,
    map: MmapMut,
    /// Where the block is in the mapping. Pages around it are never touched, and so never there.
    place: Range<usize>,
    /// After the mapping, so that it is dropped when the memory is back with the system.
    _entry: Entry,
}

impl Resident {
    /// Reads block `block` (from 1) of weight `weight` into a new mapping, and checks its values.
    pub(crate) fn read<S: ReadAt>(
        file: &StackFile<S>,
        weight: usize,
        block: usize,
        verify: Verify,
        account: &Arc<Account>,
    ) -> Result<Self, RuntimeError> {
        let name = || file.weights()[weight].name.clone();
        let wrong = |source| RuntimeError::Block { weight: name(), block, source: Arc::new(source) };
        let extent = file.block_extent(weight, block).map_err(wrong)?;
        let bytes = extent.len_bytes();
        let (map, place) = map(bytes).map_err(|source| RuntimeError::Memory {
            weight: name(),
            block,
            bytes: bytes as u64,
            source: Arc::new(source),
        })?;
        let mut resident = Self { extent, map, place: place.clone(), _entry: Entry::new(account, bytes) };
        file.read_block_bytes(weight, block, verify, &mut resident.map[place]).map_err(wrong)?;
        resident.view().map_err(|source| wrong(FormatError::Block { weight: name(), block, source }))?;
        Ok(resident)
    }

    /// The block.
    pub(crate) fn view(&self) -> Result<BlockRef<'_>, CoreError> {
        self.extent.view(&self.map[self.place.clone()])
    }
}

/// New memory with room for `bytes`, and the place in it where they go, at the start of a page.
fn map(bytes: usize) -> io::Result<(MmapMut, Range<usize>)> {
    if bytes < HUGE_PAGE_BYTES {
        return Ok((MmapMut::map_anon(bytes)?, 0..bytes));
    }
    // The system aligns mappings to huge pages only when they consist of them.
    let map = MmapMut::map_anon(bytes.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?)?;
    let start = map.as_ptr().addr().next_multiple_of(HUGE_PAGE_BYTES) - map.as_ptr().addr();
    #[cfg(target_os = "linux")]
    {
        // Advice: without huge pages everything works as well, only slower.
        let _ = map.advise_range(memmap2::Advice::HugePage, start, bytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES);
    }
    Ok((map, start..start + bytes))
}
