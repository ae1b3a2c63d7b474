//! A memory that the run-time cannot address: bytes behind a lock, known by handles, that copies reach late. As a GPU's would be, it is
//! small and may fail.

use super::{ReadableMemory, input};
use bitstack_core::{BlockRef, Level, SignLayout};
use bitstack_format::BlockExtent;
use bitstack_runtime::{FillError, Memory, RuntimeError, Snapshot};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// Every place begins at a multiple of this.
const ALIGN_BYTES: usize = 256;

/// A device; clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct Device(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    capacity_bytes: usize,
    memory: BTreeMap<u64, Vec<u8>>,
    next_handle: u64,
    /// Copies that were asked for and not waited for.
    copies: Vec<PendingCopy>,
    /// Fills that work; one more fails.
    fills_left: usize,
    /// Waits for copies that work; one more fails.
    waits_left: usize,
    staging: StagingUse,
}

/// What readers had to copy from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StagingUse {
    pub(crate) now: usize,
    pub(crate) most: usize,
    /// Of the largest.
    pub(crate) bytes: usize,
}

#[derive(Debug)]
struct PendingCopy {
    handle: u64,
    to: usize,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DeviceError {
    #[error("{asked} bytes asked for, {free} free")]
    Full { asked: usize, free: usize },
    #[error("the device takes no copy")]
    Fill,
    #[error("a copy has failed")]
    Copy,
}

/// A handle to bytes of the device.
#[derive(Debug)]
pub(crate) struct DeviceRun {
    device: Device,
    handle: u64,
    places: Vec<Range<usize>>,
    bytes: usize,
}

/// Memory of the host that copies begin at. Words, so that it is aligned.
#[derive(Debug)]
pub(crate) struct Staging {
    device: Device,
    words: Vec<u64>,
}

impl Device {
    pub(crate) fn with_capacity(capacity_bytes: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            capacity_bytes,
            memory: BTreeMap::new(),
            next_handle: 1,
            copies: Vec::new(),
            fills_left: usize::MAX,
            waits_left: usize::MAX,
            staging: StagingUse::default(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn set_capacity(&self, bytes: usize) {
        self.lock().capacity_bytes = bytes;
    }

    /// From now on `n` fills work.
    pub(crate) fn permit_fills(&self, n: usize) {
        self.lock().fills_left = n;
    }

    /// From now on `n` waits for copies work.
    pub(crate) fn permit_waits(&self, n: usize) {
        self.lock().waits_left = n;
    }

    pub(crate) fn used_bytes(&self) -> usize {
        self.lock().used_bytes()
    }

    pub(crate) fn staging_use(&self) -> StagingUse {
        self.lock().staging
    }

    /// The bytes of a block, as words, and how many there are.
    fn download(&self, run: &DeviceRun, index: usize) -> (Vec<u64>, usize) {
        let state = self.lock();
        assert!(state.copies.iter().all(|copy| copy.handle != run.handle), "read before the copies were waited for");
        let bytes = &state.memory[&run.handle][run.places[index].clone()];
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        (words, bytes.len())
    }
}

impl State {
    fn used_bytes(&self) -> usize {
        self.memory.values().map(Vec::len).sum()
    }
}

/// Counts one down, unless there is no end to them; false when there was none left.
fn take(left: &mut usize) -> bool {
    let some = *left > 0;
    if some && *left < usize::MAX {
        *left -= 1;
    }
    some
}

impl Memory for Device {
    type Run = DeviceRun;
    type Staging = Staging;
    type Error = DeviceError;

    fn signs(&self, _preferred: SignLayout) -> SignLayout {
        SignLayout::Rows
    }

    fn block_bytes(&self, block: &BlockExtent) -> u64 {
        block.len_bytes().next_multiple_of(ALIGN_BYTES) as u64
    }

    fn unit_bytes(&self) -> u64 {
        64 << 10
    }

    fn staging(&self, block_bytes: usize) -> Result<Staging, DeviceError> {
        let mut state = self.lock();
        let used = &mut state.staging;
        used.now += 1;
        used.most = used.most.max(used.now);
        used.bytes = used.bytes.max(block_bytes);
        Ok(Staging { device: self.clone(), words: vec![u64::MAX; block_bytes.div_ceil(8)] })
    }

    fn reserve(&self, blocks: &[BlockExtent]) -> Result<DeviceRun, DeviceError> {
        let mut bytes = 0;
        let place = |block: &BlockExtent| {
            let place = bytes..bytes + block.len_bytes();
            bytes = place.end.next_multiple_of(ALIGN_BYTES);
            place
        };
        let places = blocks.iter().map(place).collect();
        let mut state = self.lock();
        let free = state.capacity_bytes.saturating_sub(state.used_bytes());
        if bytes > free {
            return Err(DeviceError::Full { asked: bytes, free });
        }
        let handle = state.next_handle;
        state.next_handle += 1;
        state.memory.insert(handle, vec![0xa5; bytes]);
        Ok(DeviceRun { device: self.clone(), handle, places, bytes })
    }

    fn fill(
        &self,
        run: &mut DeviceRun,
        index: usize,
        staging: &mut Staging,
        read: impl FnOnce(&mut [u8]) -> Result<BlockRef<'_>, RuntimeError>,
    ) -> Result<(), FillError<DeviceError>> {
        let place = run.places[index].clone();
        let bytes = &mut bytemuck::cast_slice_mut(&mut staging.words)[..place.len()];
        assert_eq!(read(bytes)?.signs.layout(), SignLayout::Rows);
        let mut state = self.lock();
        if !take(&mut state.fills_left) {
            return Err(FillError::Memory(DeviceError::Fill));
        }
        state.copies.push(PendingCopy { handle: run.handle, to: place.start, bytes: bytes.to_vec() });
        Ok(())
    }

    fn seal(&self, run: &mut DeviceRun, n_blocks: usize) -> Result<(), DeviceError> {
        let mut state = self.lock();
        if !take(&mut state.waits_left) {
            return Err(DeviceError::Copy);
        }
        let state = &mut *state;
        let memory = state.memory.get_mut(&run.handle).unwrap();
        for copy in state.copies.extract_if(.., |copy| copy.handle == run.handle) {
            memory[copy.to..copy.to + copy.bytes.len()].copy_from_slice(&copy.bytes);
        }
        run.bytes = run.places[n_blocks - 1].end.next_multiple_of(ALIGN_BYTES);
        memory.truncate(run.bytes);
        run.places.truncate(n_blocks);
        Ok(())
    }

    fn run_bytes(&self, run: &DeviceRun) -> u64 {
        run.bytes as u64
    }
}

impl Drop for DeviceRun {
    fn drop(&mut self) {
        let mut state = self.device.lock();
        state.copies.retain(|copy| copy.handle != self.handle);
        state.memory.remove(&self.handle);
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.device.lock().staging.now -= 1;
    }
}

impl ReadableMemory for Device {
    fn product(snapshot: &Snapshot<Self>, weight: usize) -> Vec<f64> {
        let blocks: Vec<_> = snapshot.blocks(weight).unwrap().collect();
        let shape = blocks[0].extent.layout().shape;
        let bytes: Vec<_> = blocks.iter().map(|block| block.run.device.download(block.run, block.index)).collect();
        let views = blocks.iter().zip(&bytes).map(|(block, (words, len))| {
            block.extent.view_in(snapshot.signs(), &bytemuck::cast_slice(words)[..*len]).unwrap()
        });
        Level::new(shape, views).unwrap().matvec(&input(shape.cols())).unwrap()
    }

    fn check_used_bytes(&self, expected: u64) {
        assert_eq!(self.used_bytes() as u64, expected, "bytes used on the device");
    }
}
