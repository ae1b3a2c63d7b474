//! The seam between the run-time and the memory that blocks live in.

use crate::RuntimeError;
use bitstack_core::{BlockRef, SignLayout};
use bitstack_format::BlockExtent;
use std::error::Error;
use std::fmt;

/// A memory in which blocks live: it reserves *runs* of blocks, fills them, and takes them back.
///
/// [`HostMemory`](crate::HostMemory) is the memory of this process. A GPU's memory is another implementation: the run-time over it, and
/// everything that [`Elastic`](crate::Elastic) promises, is the same.
///
/// A run holds a few blocks that follow one another in the load order. Its life:
///
/// 1. [`reserve`](Self::reserve) takes memory for all of its blocks.
/// 2. [`fill`](Self::fill) brings its blocks in, from index 0 up, each once. One thread does this; other threads fill other runs meanwhile.
///    A block may fail. Then no later block of the run is filled.
/// 3. [`seal`](Self::seal) ends the filling and says how many blocks came in. It is not called when there is none.
/// 4. Snapshots share the run. Nobody changes it any more, and any thread may read it.
/// 5. The last snapshot that holds one of its blocks drops the run.
///
/// A run that fails on the way is dropped where it stands.
///
/// # What an implementation guarantees
/// - **Whole.** `reserve` takes all of the memory that the run needs. A lack of memory is an error here, not later.
/// - **Ready.** When `seal` returns `Ok`, every block of the run can be read, by all threads and on all streams that the implementation
///   lets read. `fill` may return before its copy is done; `seal` waits for all of them, or orders them before every later read. An
///   error of such a copy is an error of `seal` at the latest.
/// - **Unchanging.** No byte of a sealed run changes, and no block moves, until the run is dropped.
/// - **Given back.** Dropping a run, sealed or not, gives its memory back, after the work that still reads or writes it. Drop never
///   panics. It runs on whatever thread lets go last, so it is quick: [`Elastic::set_budget`](crate::Elastic::set_budget) waits for it.
/// - **On its own.** Runs may outlive the `Memory` value and the model. They keep what they need for their own end.
/// - **Side by side.** All methods may be called from several threads at once.
///
/// An error leaves the other runs as they are. The model then keeps the size it has, and the next budget tries again.
///
/// # Example
/// A memory that reading threads cannot write to: they fill a buffer, and its bytes are copied.
///
/// ```no_run
/// use bitstack_core::{BlockRef, SignLayout};
/// use bitstack_format::{BlockExtent, StackFile};
/// use bitstack_runtime::{Elastic, FillError, Memory, Options, RuntimeError};
/// use std::collections::TryReserveError;
///
/// #[derive(Debug)]
/// struct Device;
///
/// impl Memory for Device {
///     type Run = Vec<Vec<u8>>;
///     type Staging = Vec<u16>; // begins at an even address
///     type Error = TryReserveError;
///
///     fn signs(&self, _preferred: SignLayout) -> SignLayout {
///         SignLayout::Rows
///     }
///     fn block_bytes(&self, block: &BlockExtent) -> u64 {
///         block.len_bytes() as u64
///     }
///     fn unit_bytes(&self) -> u64 {
///         1
///     }
///     fn staging(&self, block_bytes: usize) -> Result<Vec<u16>, TryReserveError> {
///         let mut words = Vec::new();
///         words.try_reserve_exact(block_bytes.div_ceil(2))?;
///         words.resize(block_bytes.div_ceil(2), 0);
///         Ok(words)
///     }
///     fn reserve(&self, blocks: &[BlockExtent]) -> Result<Self::Run, TryReserveError> {
///         let place = |block: &BlockExtent| {
///             let mut place = Vec::new();
///             place.try_reserve_exact(block.len_bytes())?;
///             place.resize(block.len_bytes(), 0);
///             Ok(place)
///         };
///         blocks.iter().map(place).collect()
///     }
///     fn fill(
///         &self,
///         run: &mut Self::Run,
///         index: usize,
///         staging: &mut Vec<u16>,
///         read: impl FnOnce(&mut [u8]) -> Result<BlockRef<'_>, RuntimeError>,
///     ) -> Result<(), FillError<TryReserveError>> {
///         let bytes = &mut bytemuck::cast_slice_mut(staging)[..run[index].len()];
///         read(bytes)?;
///         run[index].copy_from_slice(bytes);
///         Ok(())
///     }
///     fn seal(&self, run: &mut Self::Run, n_blocks: usize) -> Result<(), TryReserveError> {
///         run.truncate(n_blocks);
///         Ok(())
///     }
///     fn run_bytes(&self, run: &Self::Run) -> u64 {
///         run.iter().map(|place| place.len() as u64).sum()
///     }
/// }
///
/// let file = StackFile::open_path("model.bitstack")?;
/// let model = Elastic::open_in(Device, file, 4_000_000_000, Options::default())?;
/// let snapshot = model.snapshot();
/// for block in snapshot.blocks(0)? {
///     let bytes: &[u8] = &block.run[block.index]; // for a kernel of the device
///     assert_eq!(bytes.len(), block.extent.len_bytes());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Memory: fmt::Debug + Send + Sync + 'static {
    /// Memory for a run of blocks. Dropping it gives the memory back.
    type Run: fmt::Debug + Send + Sync;

    /// What one reading thread needs to fill runs, and uses again for each block: a buffer that copies to a device start from, or `()`.
    /// A copy may still run when the next block comes; [`fill`](Self::fill) then waits for it, or uses another part of the buffer.
    type Staging;

    /// Why the memory cannot be had, or cannot be filled.
    type Error: Error + Send + Sync + 'static;

    /// The layout in which blocks come with their signs, `preferred` being [`Options::signs`](crate::Options::signs). Always the same
    /// answer.
    fn signs(&self, preferred: SignLayout) -> SignLayout;

    /// Bytes that a block takes in this memory, with what its place is rounded up to. Runs are formed by this. It may be an estimate:
    /// [`run_bytes`](Self::run_bytes) is what counts.
    fn block_bytes(&self, block: &BlockExtent) -> u64;

    /// Bytes, at least 1, of which the memory is best taken in whole multiples, such as a huge page. Runs are formed so that little is
    /// beyond them.
    fn unit_bytes(&self) -> u64;

    /// What a thread needs to fill runs whose blocks have at most `block_bytes` ([`BlockExtent::len_bytes`]) each. It is dropped when
    /// the thread has no more to read: after each of its runs was sealed or dropped.
    ///
    /// # Errors
    /// There is no memory for it.
    fn staging(&self, block_bytes: usize) -> Result<Self::Staging, Self::Error>;

    /// Takes memory for these blocks, at least one.
    ///
    /// # Errors
    /// There is not enough memory.
    fn reserve(&self, blocks: &[BlockExtent]) -> Result<Self::Run, Self::Error>;

    /// Brings block `index` of a run in.
    ///
    /// The implementation calls `read` once, with memory of exactly [`BlockExtent::len_bytes`] bytes that begins at an even address:
    /// the place of the block itself where the host can write to it, `staging` otherwise. `read` fills it from the file, checks it, and
    /// returns the block that is there; what lies between the parts of the block stays as it was. `read` can take long, fail, and panic,
    /// so call it without locks. After it the bytes, or the block's parts in a form of its own, are brought to their place.
    ///
    /// # Errors
    /// [`FillError::Block`] with the error of `read`, or [`FillError::Memory`].
    fn fill(
        &self,
        run: &mut Self::Run,
        index: usize,
        staging: &mut Self::Staging,
        read: impl FnOnce(&mut [u8]) -> Result<BlockRef<'_>, RuntimeError>,
    ) -> Result<(), FillError<Self::Error>>;

    /// Ends the filling. Blocks 0 to `n_blocks` of the run, at least one, are used from now on, and the others never: what they took may
    /// be given back.
    ///
    /// # Errors
    /// A fill that did not wait has failed. None of the run's blocks is used then.
    fn seal(&self, run: &mut Self::Run, n_blocks: usize) -> Result<(), Self::Error>;

    /// Bytes that a run takes now. They change at most when it is sealed.
    fn run_bytes(&self, run: &Self::Run) -> u64;
}

/// Why a block does not come in.
#[derive(Debug)]
pub enum FillError<E> {
    /// It cannot be read: what `read` returned.
    Block(RuntimeError),
    /// The memory cannot take it.
    Memory(E),
}

impl<E> From<RuntimeError> for FillError<E> {
    fn from(error: RuntimeError) -> Self {
        Self::Block(error)
    }
}
