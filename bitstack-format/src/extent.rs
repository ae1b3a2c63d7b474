//! A block as one run of bytes: what a program keeps in memory when it uses blocks in place.

use crate::catalog::{BlockParts, Catalog, FactorParts, Stored};
use crate::{FormatError, ReadAt};
use bitstack_core::{
    BasisRef, BlockLayout, BlockRef, CoefficientsRef, CoreError, Shape, SignLayout, SignView, SpikesRef, ValuesRef,
};
use bitstack_pack::{STRIP_ROWS, row_bytes, to_strips};
use std::io;
use std::ops::Range;

/// Whether bytes are compared with their BLAKE3 hashes as they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Verify {
    /// Every byte that is used, at the cost of a pass of hashing over it.
    #[default]
    Always,
    /// No byte: for storage that is trusted, or was verified before.
    Never,
}

/// The bytes of a block, from the first of its signs to the last of its coefficients or spikes, and where its parts are among them.
///
/// The parts lie in a file one after another, so that a block is read at once and used where it is, by [`BlockExtent::view`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockExtent {
    layout: BlockLayout,
    len_bytes: usize,
    signs: Range<usize>,
    basis: Option<FactorExtent>,
    coefficients: FactorExtent,
    spikes: Option<Range<usize>>,
}

/// Where the values of a factor are among the bytes of a block, and its scales when it is of 8 bits.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FactorExtent {
    values: Range<usize>,
    scales: Option<Range<usize>>,
    only_scales: bool,
}

impl BlockExtent {
    /// What the block is made of.
    pub fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    /// Bytes from the first to the last, pads between the parts included: a few more than the resident bytes of the block, which are
    /// those of its parts.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The block whose bytes these are, as [`StackFile::read_block_bytes`](crate::StackFile::read_block_bytes) reads them.
    ///
    /// # Errors
    /// [`CoreError::Mismatch`] when there are not [`len_bytes`](Self::len_bytes) of them or they do not begin at an even address;
    /// [`CoreError::Signs`] and [`CoreError::NotFinite`] for values that no block may have; the errors of [`SpikesRef::new`]. Single
    /// entries of a list of spikes are looked at when they are read, not here.
    pub fn view<'a>(&self, bytes: &'a [u8]) -> Result<BlockRef<'a>, CoreError> {
        self.view_in(SignLayout::Rows, bytes)
    }

    /// As [`view`](Self::view), of bytes whose signs are in another layout, as
    /// [`StackFile::read_block_bytes_in`](crate::StackFile::read_block_bytes_in) reads them.
    ///
    /// # Errors
    /// As [`view`](Self::view).
    pub fn view_in<'a>(&self, layout: SignLayout, bytes: &'a [u8]) -> Result<BlockRef<'a>, CoreError> {
        self.check_len(bytes)?;
        let BlockLayout { shape, rank, planes, .. } = self.layout;
        let signs = SignView::with_layout(shape.rows(), shape.cols(), layout, &bytes[self.signs.clone()])
            .map_err(|source| CoreError::Signs { shape, source })?;
        let basis = match &self.basis {
            Some(basis) => Some(BasisRef::new(rank, shape.cols(), basis.view(bytes)?)?),
            None => None,
        };
        let coefficients = CoefficientsRef::new(shape.rows(), planes, rank, self.coefficients.view(bytes)?)?;
        Ok(BlockRef { signs, basis, coefficients, spikes: self.view_spikes(bytes)? })
    }

    fn view_spikes<'a>(&self, bytes: &'a [u8]) -> Result<Option<SpikesRef<'a>>, CoreError> {
        let Some(spikes) = &self.spikes else { return Ok(None) };
        SpikesRef::new(self.layout.shape, words(&bytes[spikes.clone()])?).map(Some)
    }

    pub(crate) fn check_len(&self, bytes: &[u8]) -> Result<(), CoreError> {
        if bytes.len() == self.len_bytes {
            return Ok(());
        }
        Err(CoreError::Mismatch { what: "the bytes of a block", expected: self.len_bytes, actual: bytes.len() })
    }

    /// Turns words read from a file, which are little-endian, into those of this machine.
    fn make_native(&self, bytes: &mut [u8]) {
        if cfg!(target_endian = "little") {
            return;
        }
        let factors = self.basis.iter().chain([&self.coefficients]);
        let halves = factors.map(|factor| factor.scales.as_ref().unwrap_or(&factor.values));
        for words in halves.chain(&self.spikes) {
            bytes[words.clone()].chunks_exact_mut(2).for_each(|word| word.swap(0, 1));
        }
    }
}

impl FactorExtent {
    fn view<'a>(&self, bytes: &'a [u8]) -> Result<ValuesRef<'a>, CoreError> {
        let values = &bytes[self.values.clone()];
        Ok(match &self.scales {
            None if self.only_scales => ValuesRef::Scales(words(values)?),
            None => ValuesRef::F16(words(values)?),
            Some(scales) => {
                ValuesRef::I8 { codes: bytemuck::cast_slice(values), scales: words(&bytes[scales.clone()])? }
            }
        })
    }
}

/// Bytes as words of 16 bits.
fn words<T: bytemuck::Pod>(bytes: &[u8]) -> Result<&[T], CoreError> {
    bytemuck::try_cast_slice(bytes).map_err(|_| CoreError::Mismatch {
        what: "the multiple at which the bytes of a block begin in memory",
        expected: align_of::<T>(),
        actual: 1,
    })
}

impl Catalog {
    /// Where the parts of a block are among its bytes.
    pub(crate) fn block_extent(&self, weight: usize, block: usize) -> Result<BlockExtent, FormatError> {
        let parts = self.block_parts(weight, block)?;
        let info = &self.weights[weight];
        let start = self.tensors[parts.signs].offset_bytes;
        let out_of_memory = || FormatError::OutOfMemory {
            what: format!("block {block} of weight {}", info.name),
            bytes: self.tensors[parts.last()].end_bytes() - start,
        };
        let range = |i: usize| -> Result<Range<usize>, FormatError> {
            let tensor: &Stored = &self.tensors[i];
            let [from, to] = [tensor.offset_bytes, tensor.end_bytes()].map(|at| usize::try_from(at - start));
            Ok(from.map_err(|_| out_of_memory())?..to.map_err(|_| out_of_memory())?)
        };
        let factor = |parts: FactorParts| -> Result<FactorExtent, FormatError> {
            let FactorParts { values, scales, only_scales } = parts;
            Ok(FactorExtent { values: range(values)?, scales: scales.map(range).transpose()?, only_scales })
        };
        Ok(BlockExtent {
            layout: info.blocks[block - 1],
            len_bytes: range(parts.last())?.end,
            signs: range(parts.signs)?,
            basis: parts.basis.map(factor).transpose()?,
            coefficients: factor(parts.coefficients)?,
            spikes: parts.spikes.map(range).transpose()?,
        })
    }

    /// Reads the bytes of block `block` of weight `weight`, with its signs in `layout`; those of pads stay as they are. Looks at every
    /// entry of its spikes, once and for all views.
    pub(crate) fn read_block_bytes(
        &self,
        source: &(impl ReadAt + ?Sized),
        (weight, block): (usize, usize),
        layout: SignLayout,
        verify: Verify,
        bytes: &mut [u8],
        after_piece: &mut dyn FnMut(),
    ) -> Result<(), FormatError> {
        let parts: BlockParts = self.block_parts(weight, block)?;
        let extent = self.block_extent(weight, block)?;
        let info = &self.weights[weight];
        let invalid = |source| FormatError::Block { weight: info.name.clone(), block, source };
        extent.check_len(bytes).map_err(invalid)?;
        let start = self.tensors[parts.signs].offset_bytes;
        let shape = (layout == SignLayout::Strips).then_some(extent.layout.shape);
        match verify {
            Verify::Never => {
                let (signs, as_it_is) = bytes.split_at_mut(shape.map_or(0, |_| extent.signs.end));
                let offset = start + signs.len() as u64;
                read_pieces(source, start, signs, shape, None, after_piece)
                    .and_then(|()| read_pieces(source, offset, as_it_is, None, None, after_piece))
                    .map_err(|source| FormatError::Read {
                        what: format!("block {block} of weight {}", info.name),
                        source,
                    })?;
            }
            Verify::Always => {
                for i in parts.tensors() {
                    let tensor = &self.tensors[i];
                    // The length was checked: the ends of its tensors are within the block.
                    let part = (tensor.offset_bytes - start) as usize..(tensor.end_bytes() - start) as usize;
                    let shape = shape.filter(|_| i == parts.signs);
                    read_verified(source, tensor, &mut bytes[part], shape, after_piece)?;
                }
            }
        }
        extent.make_native(bytes);
        extent.view_spikes(bytes).and_then(|spikes| spikes.map_or(Ok(()), SpikesRef::check)).map_err(invalid)
    }
}

/// As [`read_pieces`], for all of a tensor.
fn read_verified(
    source: &(impl ReadAt + ?Sized),
    tensor: &Stored,
    bytes: &mut [u8],
    strips: Option<Shape>,
    after_piece: &mut dyn FnMut(),
) -> Result<(), FormatError> {
    let mut hasher = blake3::Hasher::new();
    read_pieces(source, tensor.offset_bytes, bytes, strips, Some(&mut hasher), after_piece)
        .map_err(|source| FormatError::Read { what: format!("tensor {}", tensor.info.name), source })?;
    if *hasher.finalize().as_bytes() == tensor.hash {
        return Ok(());
    }
    Err(FormatError::Damaged { name: tensor.info.name.clone() })
}

/// Fills `bytes` with those from `offset_bytes` on, hashed in that order. The signs of a matrix of shape `strips` are put in strips then.
fn read_pieces(
    source: &(impl ReadAt + ?Sized),
    mut offset_bytes: u64,
    bytes: &mut [u8],
    strips: Option<Shape>,
    mut hasher: Option<&mut blake3::Hasher>,
    after_piece: &mut dyn FnMut(),
) -> io::Result<()> {
    let row_bytes = strips.map_or(1, |shape| row_bytes(shape.cols()));
    let strip_bytes = STRIP_ROWS * row_bytes;
    let piece_bytes = strip_bytes.max(source.best_read_bytes() / strip_bytes * strip_bytes);
    for piece in bytes.chunks_mut(piece_bytes) {
        source.read_exact_at(piece, offset_bytes)?;
        offset_bytes += piece.len() as u64;
        if let Some(hasher) = &mut hasher {
            hasher.update(piece);
        }
        if let Some(shape) = strips {
            to_strips(piece.len() / row_bytes, shape.cols(), piece).map_err(io::Error::other)?;
        }
        after_piece();
    }
    Ok(())
}
