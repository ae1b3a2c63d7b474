use crate::catalog::{
    BlockParts, Catalog, FactorParts, Stored, check_file_name, check_model_name, check_name, check_weight_name,
    part_name,
};
use crate::constants::{BASE_DTYPES, BASIS, COEFFICIENTS, FILE_PREFIX, SCALE_SUFFIX, SIGNS, SPIKES};
use crate::tensor::wrong;
use crate::write::write_stack;
use crate::{BlockKind, BlockSource, Dtype, FormatError, ReadAt, StackFile, Tensor, TensorInfo, WeightInfo, WriteAt};
use bitstack_core::{Block, BlockLayout, BlockRef, CoreError, Shape, ValuesRef, WeightStack, f16};
use bitstack_io::FileAt;
use bitstack_io::hostile::MAX_DIMS;
use bitstack_pack::row_bytes;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A stack in the making: everything goes to a scratch file as it comes, weight after weight, and [`Draft::finish`] puts it in load order.
///
/// The scratch file has no name and is gone with the draft, however the program ends. Blocks that must outlive the program are written
/// to small files of their own, which a draft takes in without copying ([`Draft::add_blocks_of`]). A draft can be read like a file
/// ([`BlockSource`]), to measure what an order is made from.
#[derive(Debug)]
pub struct Draft {
    storage: Storage,
    /// Where the scratch file is, for errors.
    place: PathBuf,
    len_bytes: u64,
    catalog: Catalog,
}

impl Draft {
    /// An empty draft with its scratch file in `dir`, which needs room for the whole stack.
    ///
    /// # Errors
    /// [`FormatError::File`] when no file can be created there.
    pub fn create_in(dir: impl AsRef<Path>) -> Result<Self, FormatError> {
        let dir = dir.as_ref().to_owned();
        let scratch = tempfile::tempfile_in(&dir).map_err(|source| FormatError::File {
            operation: "create a scratch file in",
            path: dir.clone(),
            source,
        })?;
        Ok(Self::create_on(scratch, dir))
    }

    /// An empty draft on storage of the caller's, which is empty too. Errors call its place `place`.
    ///
    /// ```
    /// let draft = bitstack_format::Draft::create_on(Vec::new(), "memory");
    /// # assert!(bitstack_format::BlockSource::weights(&draft).is_empty());
    /// ```
    pub fn create_on(scratch: impl WriteAt + 'static, place: impl Into<PathBuf>) -> Self {
        let storage = Storage { scratch: Box::new(scratch), parts: Vec::new() };
        Self { storage, place: place.into(), len_bytes: 0, catalog: Catalog::default() }
    }

    /// Notes where the stack comes from, under a key of the caller's: a model's name, options, a version. A key given again is replaced.
    ///
    /// # Errors
    /// [`FormatError::Name`] for a key that is empty, too long or not printable.
    pub fn set_provenance(&mut self, key: &str, value: &str) -> Result<(), FormatError> {
        check_name("provenance key", key)?;
        self.catalog.provenance.insert(key.to_owned(), value.to_owned());
        Ok(())
    }

    /// Adds a companion file, such as `config.json`. Files keep the order in which they come.
    ///
    /// # Errors
    /// [`FormatError::Name`], [`FormatError::Duplicate`], [`FormatError::Tensor`] when it is empty, [`FormatError::File`].
    pub fn push_file(&mut self, name: &str, contents: &[u8]) -> Result<(), FormatError> {
        check_file_name(name)?;
        let info = TensorInfo::new(format!("{FILE_PREFIX}{name}"), Dtype::U8, vec![contents.len()])?;
        let i = self.append(info, contents)?;
        self.catalog.add_file(i)
    }

    /// Adds an unstacked tensor, `data` being its elements row-major and little-endian. Tensors keep the order in which they come.
    ///
    /// # Errors
    /// [`FormatError::Name`], [`FormatError::Duplicate`], [`FormatError::Tensor`] for a type other than F32, F16 and BF16 or data of
    /// another length than the shape demands, [`FormatError::File`].
    pub fn push_base(&mut self, name: &str, dtype: Dtype, shape: &[usize], data: &[u8]) -> Result<(), FormatError> {
        check_model_name("tensor", name)?;
        if !BASE_DTYPES.contains(&dtype) {
            return Err(wrong(name, "dtype", dtype, "F32, F16 or BF16"));
        }
        if self.weight_index(name).is_some() {
            return Err(FormatError::Duplicate { name: name.to_owned() });
        }
        if shape.len() > MAX_DIMS {
            return Err(wrong(name, "the number of dimensions", shape.len(), format!("at most {MAX_DIMS}")));
        }
        let info = TensorInfo::new(name.to_owned(), dtype, shape.to_vec())?;
        let i = self.append(info, data)?;
        self.catalog.base.push(i);
        Ok(())
    }

    /// Adds a stacked weight without blocks and returns its index. `method` is a free string that says how the stack was made.
    ///
    /// # Errors
    /// [`FormatError::Name`], [`FormatError::Duplicate`], [`FormatError::Tensor`] for rank 0.
    pub fn add_weight(&mut self, name: &str, shape: Shape, rank: usize, method: &str) -> Result<usize, FormatError> {
        check_weight_name(name)?;
        check_name("method", method)?;
        if self.weight_index(name).is_some() || self.catalog.contains(name) {
            return Err(FormatError::Duplicate { name: name.to_owned() });
        }
        if rank == 0 {
            return Err(wrong(name, "rank", 0, "at least 1"));
        }
        let (name, method) = (name.to_owned(), method.to_owned());
        self.catalog.weights.push(WeightInfo { name, shape, rank, method, kind: BlockKind::Sign, blocks: Vec::new() });
        self.catalog.blocks.push(Vec::new());
        Ok(self.catalog.weights.len() - 1)
    }

    /// Adds the next block of a weight; on an error the draft is as it was.
    ///
    /// # Errors
    /// [`FormatError::NoSuchWeight`], [`FormatError::Block`] when it does not fit the weight or the blocks before it,
    /// [`FormatError::Name`] or [`FormatError::Duplicate`] when the name of a part is too long or taken, [`FormatError::File`].
    pub fn push_block(&mut self, weight: usize, block: BlockRef<'_>) -> Result<(), FormatError> {
        let n_weights = self.catalog.weights.len();
        let info = self.catalog.weights.get(weight).ok_or(FormatError::NoSuchWeight { weight, n_weights })?;
        let name = info.name.clone();
        let number = info.n_blocks() + 1;
        let layout = checked_layout(info, &block).map_err(|source| FormatError::Block {
            weight: name.clone(),
            block: number,
            source,
        })?;

        let (n_tensors, len_bytes) = (self.catalog.tensors.len(), self.len_bytes);
        match self.append_block(&name, number, &layout, block) {
            Ok(parts) => {
                self.catalog.weights[weight].blocks.push(layout);
                self.catalog.blocks[weight].push(parts);
                Ok(())
            }
            Err(error) => {
                self.catalog.truncate(n_tensors);
                self.len_bytes = len_bytes;
                Err(error)
            }
        }
    }

    /// Adds a weight with all its blocks and returns its index: [`Draft::add_weight`] and [`Draft::push_block`] in one. `method` is a free
    /// string that says how the stack was made. Blocks that were added before an error stay.
    ///
    /// # Errors
    /// As both; [`FormatError::Tensor`] for a stack without blocks.
    pub fn push_stack(&mut self, name: &str, stack: &WeightStack, method: &str) -> Result<usize, FormatError> {
        let weight = self.add_weight(name, stack.shape(), stack.rank().unwrap_or(0), method)?;
        stack.blocks().iter().try_for_each(|block| self.push_block(weight, block.view()))?;
        Ok(weight)
    }

    /// Adds all blocks of the weights of a file, each a weight of this draft that has none yet. Nothing is copied: the draft reads from the
    /// file, which has to stay as it is. On an error the draft is as it was.
    ///
    /// # Errors
    /// As [`StackFile::open`] and [`Draft::add_blocks_in`], with the path.
    pub fn add_blocks_of(&mut self, path: impl AsRef<Path>) -> Result<(), FormatError> {
        let path = path.as_ref();
        let added = StackFile::open(FileAt::new(path)).and_then(|file| self.add_blocks_in(file));
        added.map_err(|source| FormatError::At { path: path.to_owned(), source: Box::new(source) })
    }

    /// [`Draft::add_blocks_of`] a file that is open. The draft reads from its source.
    ///
    /// # Errors
    /// [`FormatError::Missing`] when the file is cut, [`FormatError::NoSuch`] for a weight that the draft does not have,
    /// [`FormatError::Duplicate`] for one that has blocks, [`FormatError::Tensor`] for one that is not the same in shape, rank or method. Blocks
    /// are compared with their hashes when they are read.
    pub fn add_blocks_in<S: ReadAt + Send + Sync + 'static>(&mut self, file: StackFile<S>) -> Result<(), FormatError> {
        if let Some(missing) = file.missing() {
            return Err(FormatError::Missing { name: missing.first.clone() });
        }
        let len_bytes = file.size_bytes();
        let (source, theirs) = file.into_parts();
        let mut indices = Vec::with_capacity(theirs.weights.len());
        for weight in &theirs.weights {
            let name = &weight.name;
            let i =
                self.weight_index(name).ok_or_else(|| FormatError::NoSuch { what: "weight", name: name.clone() })?;
            let ours = &self.catalog.weights[i];
            if ours.n_blocks() > 0 {
                return Err(FormatError::Duplicate { name: name.clone() });
            }
            let same = |what, theirs: &dyn std::fmt::Display, ours: &dyn std::fmt::Display| {
                let (theirs, ours) = (theirs.to_string(), ours.to_string());
                if theirs == ours { Ok(()) } else { Err(wrong(name, what, theirs, ours)) }
            };
            same("the shape", &weight.shape, &ours.shape)?;
            same("the rank", &weight.rank, &ours.rank)?;
            same("the method", &weight.method, &ours.method)?;
            indices.push(i);
        }
        let mut parts =
            theirs.blocks.iter().flatten().flat_map(BlockParts::tensors).map(|t| &theirs.tensors[t].info.name);
        if let Some(name) = parts.find(|name| self.catalog.contains(name)) {
            return Err(FormatError::Duplicate { name: name.clone() });
        }
        let start = self.storage.parts.last().map_or(FIRST_PART, |p| p.start + p.len_bytes);
        for ((i, weight), blocks) in indices.into_iter().zip(theirs.weights).zip(theirs.blocks) {
            self.catalog.weights[i].blocks = weight.blocks;
            for parts in blocks {
                let parts = parts.map(|t| {
                    let stored = &theirs.tensors[t];
                    self.catalog.add(Stored { offset_bytes: start + stored.offset_bytes, ..stored.clone() })
                })?;
                self.catalog.blocks[i].push(parts);
            }
        }
        self.storage.parts.push(Part { source: Box::new(source), start, len_bytes });
        Ok(())
    }

    /// Writes the file: companion files, unstacked tensors, then the blocks of `order`. Every byte is compared with its hash on the
    /// way. Calls `progress` with the bytes done and the bytes in all; returns the bytes written. The draft stays as it is, so several
    /// orders can be written. The same contents and order give the same bytes.
    ///
    /// `order` holds indices of weights; the k-th mention of a weight is its block k. It begins with every weight once. Last blocks of
    /// a weight that it does not mention are left out.
    ///
    /// # Errors
    /// [`FormatError::Order`], [`FormatError::Write`], [`FormatError::LimitExceeded`] for a header that no safetensors reader would take;
    /// [`FormatError::Read`] and [`FormatError::Damaged`] when the scratch file fails.
    pub fn finish(
        &self,
        order: &[u32],
        out: impl Write,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<u64, FormatError> {
        self.placed(write_stack(&self.catalog, &self.storage, order, out, progress))
    }

    /// Says of a failed read where it failed.
    fn placed<T>(&self, result: Result<T, FormatError>) -> Result<T, FormatError> {
        result.map_err(|error| error.of(format_args!("a scratch file in {}", self.place.display())))
    }

    /// Writes a tensor at the end of the scratch file. On failure nothing has changed: the next one goes to the same place.
    fn append(&mut self, info: TensorInfo, bytes: &[u8]) -> Result<usize, FormatError> {
        // Of a part of a block: the weight's own name may be too long for those of its parts.
        check_name("tensor", &info.name)?;
        if self.catalog.contains(&info.name) {
            return Err(FormatError::Duplicate { name: info.name });
        }
        if info.len_bytes != bytes.len() as u64 {
            return Err(wrong(&info.name, "the number of bytes", bytes.len(), info.len_bytes));
        }
        self.storage.scratch.write_all_at(bytes, self.len_bytes).map_err(|source| FormatError::File {
            operation: "write to a scratch file in",
            path: self.place.clone(),
            source,
        })?;
        let stored = Stored { info, offset_bytes: self.len_bytes, hash: *blake3::hash(bytes).as_bytes() };
        self.len_bytes += bytes.len() as u64;
        self.catalog.add(stored)
    }

    fn append_block(
        &mut self,
        weight: &str,
        number: usize,
        layout: &BlockLayout,
        block: BlockRef<'_>,
    ) -> Result<BlockParts, FormatError> {
        let &BlockLayout { shape, rank, planes, .. } = layout;
        let (rows, cols) = (shape.rows(), shape.cols());
        let part = |part| part_name(weight, number, part);
        let signs = TensorInfo::new(part(SIGNS), Dtype::U8, vec![rows, row_bytes(cols)])?;
        let signs = self.append(signs, &block.signs.as_rows())?;
        let basis = match block.basis {
            Some(v) => Some(self.append_factor(part(BASIS), vec![rank, cols], vec![rank], v.values())?),
            None => None,
        };
        let values = block.coefficients.values();
        let coefficients =
            self.append_factor(part(COEFFICIENTS), vec![rows, planes, rank], vec![planes, rank], values)?;
        let spikes = match block.spikes {
            Some(spikes) => {
                let words = spikes.words();
                let info = TensorInfo::new(part(SPIKES), Dtype::U16, vec![words.len()])?;
                Some(self.append(info, &little_endian(words))?)
            }
            None => None,
        };
        Ok(BlockParts { signs, basis, coefficients, spikes })
    }

    fn append_factor(
        &mut self,
        name: String,
        shape: Vec<usize>,
        scales_shape: Vec<usize>,
        values: ValuesRef<'_>,
    ) -> Result<FactorParts, FormatError> {
        match values {
            ValuesRef::F16(values) => {
                let values = self.append(TensorInfo::new(name, Dtype::F16, shape)?, &little_endian(bits(values)))?;
                Ok(FactorParts { values, scales: None, only_scales: false })
            }
            ValuesRef::I8 { codes, scales } => {
                let scales_name = format!("{name}{SCALE_SUFFIX}");
                let values = self.append(TensorInfo::new(name, Dtype::I8, shape)?, bytemuck::cast_slice(codes))?;
                let info = TensorInfo::new(scales_name, Dtype::F16, scales_shape)?;
                let scales = self.append(info, &little_endian(bits(scales)))?;
                Ok(FactorParts { values, scales: Some(scales), only_scales: false })
            }
            ValuesRef::Scales(scales) => {
                let info = TensorInfo::new(format!("{name}{SCALE_SUFFIX}"), Dtype::F16, scales_shape)?;
                let values = self.append(info, &little_endian(bits(scales)))?;
                Ok(FactorParts { values, scales: None, only_scales: true })
            }
        }
    }
}

/// Where the parts begin in the addresses of a [`Storage`]; the scratch file is below.
const FIRST_PART: u64 = 1 << 62;

/// The scratch file and the files taken in, one after another.
#[derive(Debug)]
struct Storage {
    scratch: Box<dyn WriteAt>,
    /// By their starts.
    parts: Vec<Part>,
}

/// A file taken in.
struct Part {
    source: Box<dyn ReadAt + Send + Sync>,
    start: u64,
    len_bytes: u64,
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Part").field("start", &self.start).field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}

impl ReadAt for Storage {
    fn size_bytes(&self) -> io::Result<u64> {
        self.parts.last().map_or_else(|| self.scratch.size_bytes(), |p| Ok(p.start + p.len_bytes))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        match self.parts.partition_point(|p| p.start <= offset_bytes).checked_sub(1) {
            None => self.scratch.read_exact_at(buf, offset_bytes),
            Some(i) => {
                let Part { source, start, .. } = &self.parts[i];
                source.read_exact_at(buf, offset_bytes - start)
            }
        }
    }

    fn best_read_bytes(&self) -> usize {
        let parts = self.parts.iter().map(|part| part.source.best_read_bytes());
        parts.fold(self.scratch.best_read_bytes(), usize::max)
    }
}

impl BlockSource for Draft {
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
        self.placed(self.catalog.load_tensor(&self.storage, self.catalog.tensor_index(name)?))
    }

    fn read_file(&self, name: &str) -> Result<Vec<u8>, FormatError> {
        self.placed(self.catalog.load_bytes(&self.storage, self.catalog.file_index(name)?))
    }

    fn read_block(&self, weight: usize, block: usize) -> Result<Block, FormatError> {
        self.placed(self.catalog.load_block(&self.storage, weight, block))
    }
}

/// The layout of a block, when its parts agree with each other and with the weight.
fn checked_layout(weight: &WeightInfo, block: &BlockRef<'_>) -> Result<BlockLayout, CoreError> {
    let layout = block.layout()?;
    let equal = |what, expected, actual| {
        if expected == actual { Ok(()) } else { Err(CoreError::Mismatch { what, expected, actual }) }
    };
    equal("rows of the coefficients", layout.shape.rows(), block.coefficients.rows())?;
    if let Some(basis) = block.basis {
        equal("columns of the basis", layout.shape.cols(), basis.cols())?;
        equal("the rank of the basis", layout.rank, basis.rank())?;
    }
    if let Some(spikes) = block.spikes {
        equal("rows of the spikes", layout.shape.rows(), spikes.shape().rows())?;
        equal("columns of the spikes", layout.shape.cols(), spikes.shape().cols())?;
        spikes.check()?;
    }
    weight.check_next(&layout)?;
    Ok(layout)
}

fn bits(values: &[f16]) -> &[u16] {
    bytemuck::cast_slice(values)
}

/// The bytes of words, least significant first.
fn little_endian(words: &[u16]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(words))
    } else {
        Cow::Owned(words.iter().flat_map(|word| word.to_le_bytes()).collect())
    }
}
