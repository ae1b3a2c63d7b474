//! A block in memory: a mapping of its own, so that dropping it gives the memory back to the system.

use crate::RuntimeError;
use bitstack_core::BlockRef;
use bitstack_format::{BlockExtent, BlockSource, FormatError, ReadAt, StackFile, Verify};
use memmap2::MmapMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Mappings of at least this size are given huge pages where the system has them: far fewer page faults, fewer address translations.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Counts the bytes of mappings that exist, whole pages.
#[derive(Debug)]
pub(crate) struct Account {
    page_bytes: u64,
    mapped_bytes: AtomicU64,
}

impl Account {
    pub(crate) fn new() -> Self {
        #[cfg(unix)]
        let page_bytes = rustix::param::page_size() as u64;
        #[cfg(not(unix))]
        let page_bytes = 4096;
        Self { page_bytes, mapped_bytes: AtomicU64::new(0) }
    }

    /// Bytes of all mappings that exist.
    pub(crate) fn mapped_bytes(&self) -> u64 {
        self.mapped_bytes.load(Ordering::Relaxed)
    }
}

/// A block in memory.
#[derive(Debug)]
pub(crate) struct Resident {
    extent: BlockExtent,
    map: MmapMut,
    account: Arc<Account>,
    mapped_bytes: u64,
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
        let map = MmapMut::map_anon(bytes).map_err(|source| RuntimeError::Memory {
            weight: name(),
            block,
            bytes: bytes as u64,
            source: Arc::new(source),
        })?;
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE_BYTES {
            // Advice: without huge pages everything works as well, only slower.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        let mapped_bytes = (bytes as u64).next_multiple_of(account.page_bytes);
        account.mapped_bytes.fetch_add(mapped_bytes, Ordering::Relaxed);
        let mut resident = Self { extent, map, account: account.clone(), mapped_bytes };
        file.read_block_bytes(weight, block, verify, &mut resident.map).map_err(wrong)?;
        resident.view().map_err(|source| wrong(FormatError::Block { weight: name(), block, source }))?;
        Ok(resident)
    }

    /// The block.
    pub(crate) fn view(&self) -> Result<BlockRef<'_>, bitstack_core::CoreError> {
        self.extent.view(&self.map)
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        self.account.mapped_bytes.fetch_sub(self.mapped_bytes, Ordering::Relaxed);
    }
}
