//! The memory of this process: mappings, of huge pages as far as that goes.

use crate::RuntimeError;
use crate::memory::{FillError, Memory};
use crate::system::page_bytes;
use bitstack_core::{BlockRef, SignLayout};
use bitstack_format::BlockExtent;
use memmap2::MmapMut;
use std::io;
use std::ops::Range;

/// Mappings of at least this size begin at a multiple of it, and their whole multiples are given huge pages where the system has them:
/// a five-hundredth of the page faults, and of the address translations later.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The memory of this process. Each run is a mapping, which goes back to the system when the run is dropped. Blocks are read straight
/// into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct HostMemory;

/// A mapping with the blocks of a run.
#[derive(Debug)]
pub struct HostRun {
    map: MmapMut,
    /// Where its blocks are in the mapping, each at the beginning of a page. Pages around them are never touched, and so never there.
    places: Vec<Range<usize>>,
    /// Whole pages that it takes.
    bytes: usize,
}

impl HostRun {
    /// The bytes of block `index`, as [`BlockExtent::view_in`] takes them.
    ///
    /// # Panics
    /// When the run has no such block.
    pub fn bytes(&self, index: usize) -> &[u8] {
        &self.map[self.places[index].clone()]
    }
}

impl Memory for HostMemory {
    type Run = HostRun;
    type Staging = ();
    type Error = io::Error;

    /// As preferred: kernels on the host read every layout.
    fn signs(&self, preferred: SignLayout) -> SignLayout {
        preferred
    }

    /// Whole pages.
    fn block_bytes(&self, block: &BlockExtent) -> u64 {
        (block.len_bytes() as u64).next_multiple_of(page_bytes() as u64)
    }

    /// Those of a huge page.
    fn unit_bytes(&self) -> u64 {
        HUGE_PAGE_BYTES as u64
    }

    fn staging(&self, _block_bytes: usize) -> io::Result<()> {
        Ok(())
    }

    fn reserve(&self, blocks: &[BlockExtent]) -> io::Result<HostRun> {
        let page_bytes = page_bytes();
        let mut bytes = 0usize;
        let mut places: Vec<Range<usize>> = Vec::with_capacity(blocks.len());
        for block in blocks {
            let end = bytes.checked_add(block.len_bytes()).ok_or(io::ErrorKind::OutOfMemory)?;
            places.push(bytes..end);
            bytes = end.checked_next_multiple_of(page_bytes).ok_or(io::ErrorKind::OutOfMemory)?;
        }
        let (map, start) = map(bytes)?;
        for place in &mut places {
            *place = start + place.start..start + place.end;
        }
        Ok(HostRun { map, places, bytes })
    }

    fn fill(
        &self,
        run: &mut HostRun,
        index: usize,
        (): &mut (),
        read: impl FnOnce(&mut [u8]) -> Result<BlockRef<'_>, RuntimeError>,
    ) -> Result<(), FillError<io::Error>> {
        read(&mut run.map[run.places[index].clone()])?;
        Ok(())
    }

    /// What is beyond the blocks was never touched, and does not count any more.
    fn seal(&self, run: &mut HostRun, n_blocks: usize) -> io::Result<()> {
        if n_blocks < run.places.len() {
            let end = run.places[n_blocks - 1].end - run.places[0].start;
            let huge = run.bytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
            let unit = if end <= huge { HUGE_PAGE_BYTES } else { page_bytes() };
            run.bytes = end.next_multiple_of(unit);
            run.places.truncate(n_blocks);
        }
        Ok(())
    }

    fn run_bytes(&self, run: &HostRun) -> u64 {
        run.bytes as u64
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
