//! Weights on the device.

use crate::driver::upload;
use crate::error::{CudaError, Doing, at_most, equal};
use crate::layout::{
    BlockAddress, FactorAddress, MAX_PRODUCTS, PackedFactor, device_bytes, pack_basis, pack_coefficients, pack_signs,
    pack_spikes, products_of_rank, weight_table,
};
use crate::plan::Size;
use bitstack_core::{BlockRef, CoreError, Level, Shape, ValuesRef};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use std::sync::Arc;

/// How the planes of a stack use bases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bases {
    /// All planes share that of the first block: nested codes, and the fastest products.
    Shared,
    /// Any block may bring its own.
    Own,
}

/// A weight whose planes lie in device memory; planes can be added on top and dropped again.
///
/// A table in device memory says where the planes are, and the kernels read it when they run: products captured in a CUDA graph stay
/// right when planes come and go, and need no new capture. (A graph does not keep the memory it uses: it must not be launched
/// after the stack, or the buffers it was captured with, are gone.)
///
/// Everything a stack does happens on the stream it was made with. Products on another stream wait for it, and it for them.
#[derive(Debug)]
pub struct DeviceStack {
    shape: Shape,
    rank: usize,
    max_planes: usize,
    bases: Bases,
    /// Whether products need the launch for spikes; the first block 1 says so, since a captured graph stays as it is.
    spikes: Option<bool>,
    stream: Arc<CudaStream>,
    blocks: Vec<DeviceBlock>,
    table: CudaSlice<u8>,
}

#[derive(Debug)]
struct DeviceBlock {
    signs: CudaSlice<u8>,
    basis: Option<DeviceFactor>,
    coefficients: DeviceFactor,
    planes: usize,
    spikes: Option<CudaSlice<u8>>,
    bytes: usize,
}

#[derive(Debug)]
struct DeviceFactor {
    /// `None`: those of block 1.
    values: Option<CudaSlice<u8>>,
    scales: Option<CudaSlice<u8>>,
}

impl DeviceFactor {
    fn new(stream: &Arc<CudaStream>, what: &'static str, packed: &PackedFactor) -> Result<Self, CudaError> {
        let values = (!packed.values.is_empty()).then(|| upload(stream, what, &packed.values)).transpose()?;
        let scales = packed.scales.as_ref().map(|s| upload(stream, what, s)).transpose()?;
        Ok(Self { values, scales })
    }

    fn address(&self, stream: &CudaStream) -> FactorAddress {
        let scales = self.scales.as_ref().map(|s| s.device_ptr(stream).0);
        FactorAddress { values: self.values.as_ref().map(|v| v.device_ptr(stream).0), scales }
    }
}

impl DeviceStack {
    /// An empty stack for a weight of this shape and rank, with room for `max_planes` planes.
    ///
    /// # Errors
    /// [`CudaError::TooLarge`] when `max_planes · ⌈rank / 16⌉` is above 64, or a side of the shape does not fit in 31 bits.
    pub fn new(
        stream: &Arc<CudaStream>,
        shape: Shape,
        rank: usize,
        max_planes: usize,
        bases: Bases,
    ) -> Result<Self, CudaError> {
        at_most("rows of a weight", i32::MAX as usize, shape.rows())?;
        // A launch has at most 65535 units along its second axis.
        at_most("columns of a weight", 65535 * 128, shape.cols())?;
        if rank == 0 || max_planes == 0 {
            return Err(CudaError::Mismatch { what: "the rank and the planes of a stack", expected: 1, actual: 0 });
        }
        at_most("planes times sixteens of ranks", MAX_PRODUCTS, max_planes.saturating_mul(products_of_rank(rank)))?;
        let table = upload(stream, "a weight's table", bytemuck::bytes_of(&weight_table(shape, rank, &[])))?;
        let (stream, blocks) = (stream.clone(), Vec::new());
        Ok(Self { shape, rank, max_planes, bases, spikes: None, stream, blocks, table })
    }

    /// A stack with all planes of `blocks`, and room for no more.
    ///
    /// # Errors
    /// Those of [`Level::new`], [`Self::new`] and [`Self::push`].
    pub fn from_blocks<'a>(
        stream: &Arc<CudaStream>,
        shape: Shape,
        blocks: impl IntoIterator<Item = BlockRef<'a>>,
    ) -> Result<Self, CudaError> {
        let blocks: Vec<_> = blocks.into_iter().collect();
        let number = blocks.len();
        Level::new(shape, blocks.iter().copied()).map_err(|source| CudaError::Block {
            block: number,
            shape,
            source,
        })?;
        let shared = blocks.iter().skip(1).all(|b| b.basis.is_none());
        let bases = if shared { Bases::Shared } else { Bases::Own };
        let mut stack = Self::new(stream, shape, blocks[0].coefficients.rank(), number, bases)?;
        for block in blocks {
            stack.push(block)?;
        }
        Ok(stack)
    }

    /// Puts a block on top: uploads it and raises the level by one, in stream order. The stack is unchanged on error.
    ///
    /// # Errors
    /// [`CudaError::Block`] when it does not fit, [`CudaError::BasisNotShared`], [`CudaError::SpikesUnexpected`],
    /// [`CudaError::TooLarge`] when there is no room, [`CudaError::OutOfMemory`].
    pub fn push(&mut self, block: BlockRef<'_>) -> Result<(), CudaError> {
        let number = self.blocks.len() + 1;
        self.check(&block, number)?;
        at_most("the number of planes", self.max_planes, number)?;
        let coefficients = pack_coefficients(block.coefficients);
        let basis = block.basis.map(pack_basis);
        self.blocks.push(DeviceBlock {
            signs: upload(&self.stream, "signs", &pack_signs(block.signs))?,
            basis: basis.map(|v| DeviceFactor::new(&self.stream, "a basis", &v)).transpose()?,
            coefficients: DeviceFactor::new(&self.stream, "coefficients", &coefficients)?,
            planes: block.coefficients.planes(),
            spikes: block.spikes.map(|s| upload(&self.stream, "spikes", &pack_spikes(s))).transpose()?,
            bytes: device_bytes(&block),
        });
        self.write_table().inspect_err(|_| self.blocks.truncate(number - 1))?;
        self.spikes.get_or_insert(block.spikes.is_some());
        Ok(())
    }

    /// Drops planes until `level` are left; their memory is freed in stream order. Nothing happens when there are no more than that.
    ///
    /// # Errors
    /// [`CudaError::Driver`]; the planes are dropped all the same.
    pub fn truncate(&mut self, level: u32) -> Result<(), CudaError> {
        if level >= self.level() {
            return Ok(());
        }
        // The table first: memory it points to must stay until kernels that may read it are done.
        let dropped = self.blocks.split_off(level as usize);
        let written = self.write_table();
        drop(dropped);
        written
    }

    /// The weight's shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Columns of the factors.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Planes on the device.
    pub fn level(&self) -> u32 {
        // More do not fit on any device.
        self.blocks.len() as u32
    }

    /// How the planes use bases.
    pub fn bases(&self) -> Bases {
        self.bases
    }

    /// Bytes of device memory the planes and spikes take, padding to whole tiles included.
    pub fn device_bytes(&self) -> usize {
        self.blocks.iter().map(|b| b.bytes).sum()
    }

    /// The stream that uploads and frees.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The table in device memory, always that of [`Self::level`] planes.
    pub(crate) fn table(&self) -> &CudaSlice<u8> {
        &self.table
    }

    pub(crate) fn size(&self) -> Size {
        Size {
            rows: self.shape.rows(),
            cols: self.shape.cols(),
            rank: self.rank,
            bases: if self.bases == Bases::Shared { 1 } else { self.max_planes },
            spikes: self.spikes == Some(true),
        }
    }

    fn check(&self, block: &BlockRef<'_>, number: usize) -> Result<(), CudaError> {
        let wrong = |source| CudaError::Block { block: number, shape: self.shape, source };
        let same = |what, expected, actual| equal(what, expected, actual);
        same("rows of the signs", self.shape.rows(), block.signs.rows())?;
        same("columns of the signs", self.shape.cols(), block.signs.cols())?;
        same("rows of the coefficients", self.shape.rows(), block.coefficients.rows())?;
        same("the rank of the coefficients", self.rank, block.coefficients.rank())?;
        if let Some(basis) = block.basis {
            same("columns of the basis", self.shape.cols(), basis.cols())?;
            same("the rank of the basis", self.rank, basis.rank())?;
            if number > 1 && self.bases == Bases::Shared {
                return Err(CudaError::BasisNotShared { block: number });
            }
        } else if number == 1 {
            return Err(wrong(CoreError::NoBasis));
        }
        let codes = self.blocks.first().is_some_and(|first| first.coefficients.scales.is_some());
        if matches!(block.coefficients.values(), ValuesRef::Scales(_)) && !codes {
            return Err(wrong(CoreError::NoCodes { block: number }));
        }
        if let Some(spikes) = block.spikes {
            same("rows of the spikes", self.shape.rows(), spikes.shape().rows())?;
            same("columns of the spikes", self.shape.cols(), spikes.shape().cols())?;
            if number > 1 {
                return Err(wrong(CoreError::SpikesLate { block: number }));
            }
            // A product captured in a graph has no launch for them.
            if self.spikes == Some(false) {
                return Err(CudaError::SpikesUnexpected);
            }
        }
        let planes = block.coefficients.planes();
        if planes != 1 && planes != number {
            return Err(wrong(CoreError::Planes { block: number, planes }));
        }
        Ok(())
    }

    fn write_table(&mut self) -> Result<(), CudaError> {
        let address = |block: &DeviceBlock| BlockAddress {
            signs: block.signs.device_ptr(&self.stream).0,
            basis: block.basis.as_ref().map(|v| v.address(&self.stream)),
            coefficients: block.coefficients.address(&self.stream),
            planes: block.planes,
            spikes: block.spikes.as_ref().map(|s| s.device_ptr(&self.stream).0),
        };
        let blocks: Vec<_> = self.blocks.iter().map(address).collect();
        let table = weight_table(self.shape, self.rank, &blocks);
        self.stream.memcpy_htod(bytemuck::bytes_of(&table), &mut self.table).doing("write a weight's table")
    }
}
