//! An open file: what is there of it, and reading that.

use crate::arrange::arrange;
use crate::catalog::{Catalog, Stored};
use crate::constants::PAD_PREFIX;
use crate::header::{self, Header};
use crate::write::write_stack;
use crate::{
    BlockExtent, BlockSource, FormatError, Limits, ReadAt, Report, Tensor, TensorInfo, Verify, WeightInfo, order,
    verify,
};
use bitstack_core::{Block, SignLayout};
use bitstack_io::safetensors::LENGTH_BYTES;
use bitstack_sort::{LoadOrder, Sizes, SortError};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// An open `.bitstack` file, whole or cut.
///
/// Opening reads and checks the header only. A file that ends too early, anywhere after its smallest model, is a smaller model:
/// [`BlockSource::weights`] and [`StackFile::order`] then show the blocks that are whole, and [`StackFile::missing`] what is not there.
#[derive(Debug)]
pub struct StackFile<S> {
    source: S,
    /// The file that was opened by its path, for errors.
    path: Option<PathBuf>,
    catalog: Catalog,
    /// Of whole blocks.
    order: Vec<u32>,
    /// Tensors before this one are whole.
    n_whole: usize,
    missing: Option<Missing>,
    size_bytes: u64,
}

/// What a cut file lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Missing {
    /// Blocks that are not there, or not whole.
    pub n_blocks: usize,
    /// Bytes between the end of the file and that of the last tensor.
    pub bytes: u64,
    /// The name of the first tensor that is not whole.
    pub first: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { n_blocks, bytes, first } = self;
        write!(
            f,
            "the file is cut: its last {bytes} bytes are missing, and with them {n_blocks} blocks from {first} on"
        )
    }
}

impl StackFile<File> {
    /// Opens the file at `path` with the default [`Limits`].
    ///
    /// # Errors
    /// As [`StackFile::open`], with the path.
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self, FormatError> {
        let path = path.as_ref();
        Self::open_path_with(path, &Limits::default())
    }

    /// Opens the file at `path`.
    ///
    /// # Errors
    /// As [`StackFile::open_with`], with the path. What is not a regular file (a directory, a pipe) is not opened.
    pub fn open_path_with(path: impl AsRef<Path>, limits: &Limits) -> Result<Self, FormatError> {
        let path = path.as_ref();
        let failed = |source| FormatError::File { operation: "open", path: path.to_owned(), source };
        // Before it is opened: to open a pipe is to wait for somebody to write to it.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
        }
        let file = File::open(path).map_err(failed)?;
        let at = |source| FormatError::At { path: path.to_owned(), source: Box::new(source) };
        Ok(Self { path: Some(path.to_owned()), ..Self::open_with(file, limits).map_err(at)? })
    }
}

impl<S: ReadAt> StackFile<S> {
    /// Opens a source with the default [`Limits`].
    ///
    /// # Errors
    /// A [`FormatError`] that says which rule of FORMAT.md the header breaks, or how many bytes are missing for the smallest model.
    pub fn open(source: S) -> Result<Self, FormatError> {
        Self::open_with(source, &Limits::default())
    }

    /// Opens a source.
    ///
    /// # Errors
    /// As [`StackFile::open`]; [`FormatError::LimitExceeded`] as `limits` says.
    pub fn open_with(source: S, limits: &Limits) -> Result<Self, FormatError> {
        let size_bytes = source
            .size_bytes()
            .map_err(|source| FormatError::Read { what: "the size of the file".to_owned(), source })?;
        let text = header::read_text(&source, size_bytes, limits)?;
        let header = Header::parse(&text)?;
        let data_bytes = LENGTH_BYTES + text.len() as u64;
        drop(text);
        let (mut catalog, mut order) = arrange(header, data_bytes, limits)?;

        let expected = catalog.tensors.last().map_or(data_bytes, Stored::end_bytes);
        if size_bytes > expected {
            return Err(FormatError::TrailingBytes { expected, actual: size_bytes });
        }
        let n_whole = catalog.tensors.partition_point(|t| t.end_bytes() <= size_bytes);
        let missing = catalog.tensors[n_whole..].iter().find(|t| !t.info.name.starts_with(PAD_PREFIX));
        let Some(first) = missing.map(|t| t.info.name.clone()) else {
            return Ok(Self { source, path: None, catalog, order, n_whole, missing: None, size_bytes });
        };

        let mut n_blocks = 0;
        for (weight, block) in order::blocks(&order) {
            if catalog.blocks[weight][block - 1].last() >= n_whole {
                break;
            }
            n_blocks += 1;
        }
        let n_weights = catalog.weights.len();
        if n_blocks < n_weights {
            let (weight, block) = (order[n_weights - 1] as usize, 1);
            let needed = catalog.tensors[catalog.blocks[weight][block - 1].last()].end_bytes();
            return Err(FormatError::CutTooShort { needed, have: size_bytes, first_missing: first });
        }
        for &weight in order[n_blocks..].iter().rev() {
            catalog.blocks[weight as usize].pop();
            catalog.weights[weight as usize].blocks.pop();
        }
        let missing = Missing { n_blocks: order.len() - n_blocks, bytes: expected - size_bytes, first };
        order.truncate(n_blocks);
        Ok(Self { source, path: None, catalog, order, n_whole, missing: Some(missing), size_bytes })
    }

    /// The load order of the blocks that are there: indices of weights; a weight's first mention is its block 1, and so on.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// [`StackFile::order`] with the bytes of every size there is: what a budget can be, before anything is loaded.
    ///
    /// ```no_run
    /// let file = bitstack_format::StackFile::open_path("llama.bitstack")?;
    /// let plan = file.load_order()?.plan(4 << 30)?;
    /// println!("{} blocks, {} bytes", plan.n_blocks, plan.resident_bytes);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`SortError::SizeOverflow`] when the sizes do not add up to a 64-bit number of bytes.
    pub fn load_order(&self) -> Result<LoadOrder, SortError> {
        LoadOrder::from_weights(&self.order, &Sizes::new(self.base_bytes(), self.block_sizes())?)
    }

    /// What a cut file lacks; `None` when the file is whole.
    pub fn missing(&self) -> Option<&Missing> {
        self.missing.as_ref()
    }

    /// Bytes of the file as it is.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads everything that is there and compares it with its hashes. Calls `progress` with the bytes done and the bytes in all.
    ///
    /// # Errors
    /// [`FormatError::OutOfMemory`]; whatever is wrong with the file, unreadable parts included, is in the report.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Report, FormatError> {
        verify::verify(&self.catalog, &self.source, &self.order, self.n_whole, progress)
    }

    /// Writes a clean smaller file: the unstacked part, the companion files and the first `n_blocks` blocks of the load order. Every byte
    /// is compared with its hash on the way. Calls `progress` with the bytes done and the bytes in all; returns the bytes written.
    ///
    /// # Errors
    /// [`FormatError::Order`] when there are not so many blocks, or fewer than weights; [`FormatError::Damaged`];
    /// [`FormatError::Write`].
    pub fn write_prefix(
        &self,
        n_blocks: usize,
        out: impl Write,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<u64, FormatError> {
        let order = self.order.get(..n_blocks).ok_or_else(|| FormatError::Order {
            position: self.order.len(),
            reason: format!("the file has {} blocks, {n_blocks} were asked for", self.order.len()),
        })?;
        self.placed(write_stack(&self.catalog, &self.source, order, out, progress))
    }

    /// Says of a failed read where it failed.
    fn placed<T>(&self, result: Result<T, FormatError>) -> Result<T, FormatError> {
        match &self.path {
            Some(path) => result.map_err(|error| error.of(format_args!("{}", path.display()))),
            None => result,
        }
    }

    /// The bytes that block `block` (from 1) of weight `weight` (from 0) takes, and where its parts are among them.
    ///
    /// # Errors
    /// [`FormatError::NoSuchWeight`], [`FormatError::NoSuchBlock`]; [`FormatError::OutOfMemory`] when they cannot be addressed.
    pub fn block_extent(&self, weight: usize, block: usize) -> Result<BlockExtent, FormatError> {
        self.catalog.block_extent(weight, block)
    }

    /// Reads the bytes of a block into `bytes`, which must be [`BlockExtent::len_bytes`] of them, for [`BlockExtent::view`]. Numbers
    /// of more than one byte come in the order of this machine. What `bytes` holds between the parts, and after an error, is
    /// unspecified.
    ///
    /// # Errors
    /// As [`BlockSource::read_block`], except that the signs and factors of the block are checked by [`BlockExtent::view`], and only its
    /// spikes here; [`FormatError::Block`] when `bytes` is of another length, or begins at an odd address and the block has spikes.
    pub fn read_block_bytes(
        &self,
        weight: usize,
        block: usize,
        verify: Verify,
        bytes: &mut [u8],
    ) -> Result<(), FormatError> {
        self.read_block_bytes_in(weight, block, SignLayout::Rows, verify, bytes, &mut || {})
    }

    /// As [`read_block_bytes`](Self::read_block_bytes), with the signs in `layout`, for [`BlockExtent::view_in`]. `after_piece` is called
    /// each time that some more has been read (and hashed), at most [`ReadAt::best_read_bytes`] or the rows of one strip: for those who read beside
    /// work that must not wait, and rest now and then.
    ///
    /// # Errors
    /// As [`read_block_bytes`](Self::read_block_bytes).
    pub fn read_block_bytes_in(
        &self,
        weight: usize,
        block: usize,
        layout: SignLayout,
        verify: Verify,
        bytes: &mut [u8],
        after_piece: &mut dyn FnMut(),
    ) -> Result<(), FormatError> {
        self.placed(self.catalog.read_block_bytes(&self.source, (weight, block), layout, verify, bytes, after_piece))
    }

    /// The source, and the catalog, offsets being from the start of the source.
    pub(crate) fn into_parts(self) -> (S, Catalog) {
        (self.source, self.catalog)
    }

    fn whole(&self, i: usize) -> Result<usize, FormatError> {
        if i < self.n_whole {
            return Ok(i);
        }
        Err(FormatError::Missing { name: self.catalog.tensors[i].info.name.clone() })
    }
}

impl<S: ReadAt> BlockSource for StackFile<S> {
    fn weights(&self) -> &[WeightInfo] {
        &self.catalog.weights
    }

    fn base_tensors(&self) -> Vec<&TensorInfo> {
        self.catalog.base.iter().map(|&i| &self.catalog.tensors[i].info).collect()
    }

    fn files(&self) -> Vec<&TensorInfo> {
        self.catalog.files.iter().map(|(info, _)| info).collect()
    }

    fn provenance(&self) -> &BTreeMap<String, String> {
        &self.catalog.provenance
    }

    fn read_tensor(&self, name: &str) -> Result<Tensor, FormatError> {
        self.placed(self.catalog.load_tensor(&self.source, self.whole(self.catalog.tensor_index(name)?)?))
    }

    fn read_file(&self, name: &str) -> Result<Vec<u8>, FormatError> {
        self.placed(self.catalog.load_bytes(&self.source, self.catalog.file_index(name)?))
    }

    fn read_block(&self, weight: usize, block: usize) -> Result<Block, FormatError> {
        self.placed(self.catalog.load_block(&self.source, weight, block))
    }
}
