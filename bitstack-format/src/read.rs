//! Opening a file: from the header to a catalog in which every tensor is in its place.

use crate::catalog::{
    BASE_DTYPES, BASIS, BlockParts, COEFFICIENTS, Catalog, FACTOR_DTYPES, FILE_PREFIX, FactorParts, PAD_PREFIX,
    SCALE_SUFFIX, SIGNS, SPIKES, Stored, check_model_name, check_name, check_weight_name, part_name,
};
use crate::header::{AFTER_VERSION, HASH_DIGITS, HASH_OFFSET, Header, HeaderTensor, MAGIC, WeightRecord, header_hash};
use crate::tensor::wrong;
use crate::write::{alignment, pad_bytes, pad_name, write_stack};
use crate::{
    ALIGNMENT, BlockExtent, BlockKind, BlockSource, Dtype, FormatError, ReadAt, Tensor, TensorInfo, VERSION, Verify,
    WeightInfo, order,
};
use bitstack_core::{Block, BlockLayout, FactorType, Shape, SignLayout, SpikesRef};
use bitstack_io::hostile::printable;
use bitstack_io::in_one_line;
use bitstack_io::safetensors::{LENGTH_BYTES, MAX_HEADER_BYTES};
use bitstack_pack::row_bytes;
use bitstack_sort::{LoadOrder, Sizes, SortError};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What a file may make its reader use.
///
/// Opening takes at most [`Limits::OPENING_BYTES_PER_HEADER_BYTE`] bytes of memory for each byte of the header, which must be there and
/// within its limit before any of it is read, and 64 KiB. Reading takes the tensor's or block's own bytes, and no tensor is read that the file does
/// not wholly contain; verifying takes the largest block and a buffer of 1 MiB; writing a prefix a new header and that buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of a header. Never above [`MAX_HEADER_BYTES`], its default.
    pub header_bytes: u64,
    /// Most bytes of a single tensor. By default 64 GiB.
    pub tensor_bytes: u64,
}

impl Limits {
    /// The most bytes of memory that opening takes for one byte of the header, as the tests measure it on headers made for the purpose.
    pub const OPENING_BYTES_PER_HEADER_BYTE: u64 = 16;
}

impl Default for Limits {
    fn default() -> Self {
        Self { header_bytes: MAX_HEADER_BYTES, tensor_bytes: 64 << 30 }
    }
}

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

/// What [`StackFile::verify`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Tensors that were read and compared.
    pub n_tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// What is damaged, in the order of the file.
    pub damaged: Vec<Damage>,
    /// Tensors that the file ends before, in the order of the file.
    pub missing: Vec<String>,
}

/// A damaged tensor or block.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damage {
    /// The name of the tensor; of its signs for a block whose tensors are whole but not a valid block.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Report {
    /// Whether nothing is damaged or missing.
    pub fn is_whole(&self) -> bool {
        self.damaged.is_empty() && self.missing.is_empty()
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
        let text = read_header(&source, size_bytes, limits)?;
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
        let tensors = &self.catalog.tensors[..self.n_whole];
        let total: u64 = tensors.iter().map(|t| t.info.len_bytes).sum();
        let mut done = 0;
        let mut damaged: Vec<(usize, String)> = Vec::new();
        let mut in_block = vec![false; tensors.len()];
        let mut buffer = Vec::new();
        // Blocks are read as they would be for use, which checks their values too.
        for (weight, block) in order::blocks(&self.order) {
            let parts = self.catalog.block_parts(weight, block)?;
            match self.catalog.load_block(&self.source, weight, block) {
                Ok(_) => {}
                Err(error @ FormatError::Block { .. }) => damaged.push((parts.signs, in_one_line(&error))),
                Err(FormatError::Damaged { .. } | FormatError::Read { .. }) => {
                    // More than one part may be damaged.
                    for i in parts.tensors() {
                        match self.catalog.stream(&self.source, i, &mut buffer, |_| Ok(())) {
                            Ok(()) => {}
                            Err(error) => damaged.push((i, in_one_line(&error))),
                        }
                    }
                }
                Err(error) => return Err(error),
            }
            for i in parts.tensors() {
                in_block[i] = true;
                done += tensors[i].info.len_bytes;
            }
            progress(done, total);
        }
        for i in (0..tensors.len()).filter(|&i| !in_block[i]) {
            let is_pad = tensors[i].info.name.starts_with(PAD_PREFIX);
            let mut is_zero = true;
            let checked = self.catalog.stream(&self.source, i, &mut buffer, |bytes| {
                is_zero &= !is_pad || bytes.iter().all(|&b| b == 0);
                done += bytes.len() as u64;
                progress(done, total);
                Ok(())
            });
            match checked {
                Ok(()) if is_zero => {}
                Ok(()) => damaged.push((i, format!("tensor {} is not zero", tensors[i].info.name))),
                Err(error) => damaged.push((i, in_one_line(&error))),
            }
        }
        damaged.sort();
        Ok(Report {
            n_tensors: tensors.len(),
            bytes: total,
            damaged: damaged
                .into_iter()
                .map(|(i, reason)| Damage { name: tensors[i].info.name.clone(), reason })
                .collect(),
            missing: self.catalog.tensors[self.n_whole..].iter().map(|t| t.info.name.clone()).collect(),
        })
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

/// Reads the text of the header, once it is sure that it is one of ours, of a length within bounds, and undamaged.
fn read_header(source: &impl ReadAt, size_bytes: u64, limits: &Limits) -> Result<Vec<u8>, FormatError> {
    let read = |bytes: &mut [u8], offset| {
        let error = |source| FormatError::Read { what: "the header".to_owned(), source };
        source.read_exact_at(bytes, offset).map_err(error)
    };
    let cut = |needed| FormatError::HeaderCut { needed, have: size_bytes };
    if size_bytes < LENGTH_BYTES {
        return Err(cut(LENGTH_BYTES));
    }
    // Up to the hash and its closing quote; a file may be cut in there.
    let mut start = [0; HASH_OFFSET + HASH_DIGITS + 1];
    let n = start.len().min(usize::try_from(size_bytes).unwrap_or(usize::MAX));
    let start = &mut start[..n];
    read(start, 0)?;
    let (length, start) = start.split_at(LENGTH_BYTES as usize);
    let length: [u8; 8] = length.try_into().expect("the first part of a split has its length");
    let header_bytes = u64::from_le_bytes(length);
    check_start(start)?;

    let limit = limits.header_bytes.min(MAX_HEADER_BYTES);
    if header_bytes > limit {
        return Err(FormatError::LimitExceeded { what: "the header".to_owned(), value: header_bytes, limit });
    }
    // No overflow: the header's length is at most MAX_HEADER_BYTES.
    let data_bytes = LENGTH_BYTES + header_bytes;
    if !data_bytes.is_multiple_of(ALIGNMENT) || data_bytes <= (HASH_OFFSET + HASH_DIGITS) as u64 {
        return Err(FormatError::HeaderLength { header_bytes });
    }
    if size_bytes < data_bytes {
        return Err(cut(data_bytes));
    }
    let mut text = vec![0; header_bytes as usize];
    read(&mut text, LENGTH_BYTES)?;
    let hash_at = HASH_OFFSET - LENGTH_BYTES as usize;
    if header_hash(length, &text).to_hex().as_bytes() != &text[hash_at..][..HASH_DIGITS] {
        return Err(FormatError::HeaderDamaged);
    }
    Ok(text)
}

/// Compares the start of a header's text, as far as it is there, with what it must be.
fn check_start(start: &[u8]) -> Result<(), FormatError> {
    let n = start.len().min(MAGIC.len());
    if start[..n] != MAGIC.as_bytes()[..n] {
        let found = printable(&String::from_utf8_lossy(&start[..n]));
        return Err(FormatError::NotBitstack { found: format!("{found:?} (after 8 bytes of length)") });
    }
    let after_magic = &start[n..];
    let expected = format!("{VERSION}{AFTER_VERSION}");
    let n = after_magic.len().min(expected.len());
    if after_magic[..n] == expected.as_bytes()[..n] {
        return Ok(());
    }
    let version = after_magic.split(|&c| c == b'"').next().unwrap_or_default();
    if version == VERSION.as_bytes() {
        return Err(FormatError::HeaderJson { reason: "header_blake3 does not follow the version".to_owned() });
    }
    Err(FormatError::Version { found: printable(&String::from_utf8_lossy(version)) })
}

/// Puts the tensors of a header in their places, each of which must hold exactly the tensor that belongs there.
fn arrange(header: Header, data_bytes: u64, limits: &Limits) -> Result<(Catalog, Vec<u32>), FormatError> {
    let mut weights = Vec::new();
    let mut n_blocks = Vec::new();
    for record in header.weights()? {
        let n = required(record.n_blocks, "n_blocks", &record.name)?;
        n_blocks.push(usize::try_from(n).unwrap_or(usize::MAX));
        weights.push(weight_info(record)?);
    }
    order::check(&header.order, &n_blocks)?;
    let counts = order::counts(&header.order, n_blocks.len());
    if let Some(w) = (0..n_blocks.len()).find(|&w| counts[w] != n_blocks[w]) {
        let (name, n, count) = (&weights[w].name, n_blocks[w], counts[w]);
        let reason = format!("weight {name} has n_blocks {n}, and {count} blocks in the load order");
        return Err(FormatError::Metadata { field: "weights", reason });
    }

    let mut catalog = Catalog::default();
    catalog.provenance = header.provenance;
    for HeaderTensor { info, offset_bytes, hash } in header.tensors {
        let end = offset_bytes.checked_add(info.len_bytes).and_then(|end| end.checked_add(data_bytes));
        if end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(wrong(&info.name, "the second data offset", offset_bytes, "within a file of 2^63 - 1 bytes"));
        }
        if info.len_bytes > limits.tensor_bytes {
            let (what, value) = (format!("tensor {}", info.name), info.len_bytes);
            return Err(FormatError::LimitExceeded { what, value, limit: limits.tensor_bytes });
        }
        catalog.add(Stored { info, offset_bytes: data_bytes + offset_bytes, hash })?;
    }

    let mut places = Places { tensors: &catalog.tensors, next: 0, n_pads: 0 };
    let mut files = Vec::new();
    while places.peek().is_some_and(|t| t.name.starts_with(FILE_PREFIX)) {
        files.push(places.take_bytes()?);
    }
    let first_block = part_name(&weights[header.order[0] as usize].name, 1, SIGNS);
    let names: HashSet<&str> = weights.iter().map(|w| w.name.as_str()).collect();
    let mut base = Vec::new();
    while let Some(info) = places.peek().filter(|t| t.name != first_block) {
        check_model_name("tensor", &info.name)?;
        places.check_dtype(info, BASE_DTYPES)?;
        if names.contains(info.name.as_str()) {
            return Err(FormatError::Duplicate { name: info.name.clone() });
        }
        base.push(places.take(ALIGNMENT)?);
    }
    drop(names);
    let mut blocks = vec![Vec::new(); weights.len()];
    for (w, block) in order::blocks(&header.order) {
        let weight: &mut WeightInfo = &mut weights[w];
        let (layout, parts) = places.take_block(weight, block)?;
        weight.check_next(&layout).map_err(|source| FormatError::Block {
            weight: weight.name.clone(),
            block,
            source,
        })?;
        weight.blocks.push(layout);
        blocks[w].push(parts);
    }
    if let Some(info) = places.tensors.get(places.next) {
        let found = info.info.name.clone();
        return Err(FormatError::UnexpectedTensor { expected: "no more".to_owned(), found });
    }

    for i in files {
        catalog.add_file(i)?;
    }
    catalog.base = base;
    catalog.weights = weights;
    catalog.blocks = blocks;
    Ok((catalog, header.order))
}

fn required<T>(value: Option<T>, field: &'static str, weight: &str) -> Result<T, FormatError> {
    let reason = || format!("weight {weight} has no {field}");
    value.ok_or_else(|| FormatError::Metadata { field: "weights", reason: reason() })
}

fn weight_info(record: WeightRecord<'_>) -> Result<WeightInfo, FormatError> {
    let name = record.name.into_owned();
    check_weight_name(&name)?;
    let [rows, cols, rank] = [(record.rows, "rows"), (record.cols, "cols"), (record.rank, "rank")]
        .map(|(value, field)| required(value, field, &name));
    let (rows, cols, rank) = (rows?, cols?, rank?);
    let too_large =
        || FormatError::Metadata { field: "weights", reason: format!("weight {name}: {rows} x {cols}, rank {rank}") };
    let [Ok(rows_), Ok(cols_), Ok(rank_)] = [rows, cols, rank].map(usize::try_from) else {
        return Err(too_large());
    };
    let shape = Shape::new(rows_, cols_).map_err(|_| too_large())?;
    if rank == 0 {
        return Err(too_large());
    }
    let method = required(record.method, "method", &name)?.into_owned();
    check_name("method", &method)?;
    Ok(WeightInfo { name, shape, rank: rank_, method, kind: BlockKind::Sign, blocks: Vec::new() })
}

/// Walks over the tensors of a header in their order.
struct Places<'a> {
    tensors: &'a [Stored],
    next: usize,
    n_pads: usize,
}

impl<'a> Places<'a> {
    /// The next tensor that is not a pad.
    fn peek(&self) -> Option<&'a TensorInfo> {
        let mut rest = self.tensors[self.next..].iter().map(|t| &t.info);
        rest.next().and_then(|info| if info.name.starts_with(PAD_PREFIX) { rest.next() } else { Some(info) })
    }

    /// Takes the next tensor, which must be there, and the pad before it when its alignment needs one.
    fn take(&mut self, alignment: u64) -> Result<usize, FormatError> {
        let stored = &self.tensors[self.next];
        let pad = pad_bytes(stored.offset_bytes, alignment);
        let is_pad = stored.info.name.starts_with(PAD_PREFIX);
        if pad > 0 {
            self.check_name(&stored.info, &pad_name(self.n_pads))?;
            self.check_dtype(&stored.info, &[Dtype::U8])?;
            self.check_shape(&stored.info, &[pad as usize])?;
            self.n_pads += 1;
            self.next += 1;
        } else if is_pad {
            let expected = self.peek().map_or("no pad", |info| &info.name).to_owned();
            return Err(FormatError::UnexpectedTensor { expected, found: stored.info.name.clone() });
        }
        let i = self.next;
        self.next += 1;
        Ok(i)
    }

    /// Takes the next tensor, a list of bytes at any offset.
    fn take_bytes(&mut self) -> Result<usize, FormatError> {
        let i = self.take(1)?;
        let info = &self.tensors[i].info;
        self.check_dtype(info, &[Dtype::U8])?;
        if info.shape.len() != 1 {
            return Err(wrong(&info.name, "shape", format!("{:?}", info.shape), "one dimension"));
        }
        Ok(i)
    }

    /// Takes part of a block.
    fn take_part(&mut self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Result<usize, FormatError> {
        let found = || "the end of the header".to_owned();
        let info =
            self.peek().ok_or_else(|| FormatError::UnexpectedTensor { expected: name.to_owned(), found: found() })?;
        self.check_name(info, name)?;
        self.check_dtype(info, dtypes)?;
        self.check_shape(info, shape)?;
        self.take(alignment(info.dtype, name.ends_with(SIGNS)))
    }

    /// Takes a factor, stored as F16 or as I8 with scales.
    fn take_factor(
        &mut self,
        name: &str,
        shape: &[usize],
        scales_shape: &[usize],
    ) -> Result<(FactorType, FactorParts), FormatError> {
        let values = self.take_part(name, FACTOR_DTYPES, shape)?;
        if self.tensors[values].info.dtype == Dtype::F16 {
            return Ok((FactorType::F16, FactorParts { values, scales: None, only_scales: false }));
        }
        let scales = self.take_part(&format!("{name}{SCALE_SUFFIX}"), &[Dtype::F16], scales_shape)?;
        Ok((FactorType::I8, FactorParts { values, scales: Some(scales), only_scales: false }))
    }

    /// Takes a list of spikes, as long as the tensor says, and long enough to say where its tiles end.
    fn take_spikes(&mut self, info: &TensorInfo, shape: Shape) -> Result<usize, FormatError> {
        let least = SpikesRef::least_words(shape);
        if info.shape.len() != 1 || info.shape[0] < least {
            let expected = format!("one dimension of at least {least}");
            return Err(wrong(&info.name, "shape", format!("{:?}", info.shape), expected));
        }
        self.take_part(&info.name, &[Dtype::U16], &info.shape)
    }

    fn take_block(&mut self, weight: &WeightInfo, block: usize) -> Result<(BlockLayout, BlockParts), FormatError> {
        let (rows, cols, rank) = (weight.shape.rows(), weight.shape.cols(), weight.rank);
        let part = |part| part_name(&weight.name, block, part);
        let signs = self.take_part(&part(SIGNS), &[Dtype::U8], &[rows, row_bytes(cols)])?;
        let mut basis = None;
        if self.peek().is_some_and(|info| info.name == part(BASIS)) {
            basis = Some(self.take_factor(&part(BASIS), &[rank, cols], &[rank])?);
        }
        // The planes are what the tensor says; that they are 1 or the number of the block is checked with the weight.
        let planes_at = |dim: usize| self.peek().and_then(|info| info.shape.get(dim).copied()).unwrap_or(1);
        let scales = format!("{}{SCALE_SUFFIX}", part(COEFFICIENTS));
        let (planes, coefficients) = if self.peek().is_some_and(|info| info.name == scales) {
            let planes = planes_at(0);
            let values = self.take_part(&scales, &[Dtype::F16], &[planes, rank])?;
            (planes, (FactorType::Scales, FactorParts { values, scales: None, only_scales: true }))
        } else {
            let planes = planes_at(1);
            (planes, self.take_factor(&part(COEFFICIENTS), &[rows, planes, rank], &[planes, rank])?)
        };
        let spikes = match self.peek() {
            Some(info) if info.name == part(SPIKES) => Some(self.take_spikes(info, weight.shape)?),
            _ => None,
        };
        let layout = BlockLayout {
            shape: weight.shape,
            rank,
            planes,
            basis: basis.map(|(factor, _)| factor),
            coefficients: coefficients.0,
            // That only block 1 has them is checked with the weight.
            spike_words: spikes.map_or(0, |i| self.tensors[i].info.shape[0]),
        };
        let (basis, coefficients) = (basis.map(|(_, parts)| parts), coefficients.1);
        Ok((layout, BlockParts { signs, basis, coefficients, spikes }))
    }

    fn check_name(&self, info: &TensorInfo, expected: &str) -> Result<(), FormatError> {
        if info.name == expected {
            return Ok(());
        }
        Err(FormatError::UnexpectedTensor { expected: expected.to_owned(), found: info.name.clone() })
    }

    fn check_dtype(&self, info: &TensorInfo, allowed: &[Dtype]) -> Result<(), FormatError> {
        if allowed.contains(&info.dtype) {
            return Ok(());
        }
        let names: Vec<&str> = allowed.iter().map(|d| d.name()).collect();
        Err(wrong(&info.name, "dtype", info.dtype, names.join(" or ")))
    }

    fn check_shape(&self, info: &TensorInfo, expected: &[usize]) -> Result<(), FormatError> {
        if info.shape == expected {
            return Ok(());
        }
        Err(wrong(&info.name, "shape", format!("{:?}", info.shape), format!("{expected:?}")))
    }
}
