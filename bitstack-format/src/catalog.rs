//! What a stack is made of and where its bytes are, the same for a file and for a draft; reading with every hash checked.

use crate::constants::{FILE_PREFIX, MAX_FILE_NAME_BYTES, MAX_NAME_BYTES, PAD_PREFIX};
use crate::{FormatError, ReadAt, Tensor, TensorInfo};
use bitstack_core::{
    Basis, Block, BlockLayout, Coefficients, CoreError, FactorType, Shape, SignMatrix, Spikes, Values, WeightStack, f16,
};
use bitstack_io::safetensors::METADATA_KEY;
use std::collections::{BTreeMap, HashMap};

const COPY_BYTES: u64 = 1 << 20;

/// How the blocks of a weight are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockKind {
    /// A sign plane with low-rank magnitudes: [`Block`].
    Sign,
}

impl BlockKind {
    /// The name in the metadata.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sign => "sign",
        }
    }
}

/// A stacked weight and the blocks of it that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WeightInfo {
    /// The name, as in the model.
    pub name: String,
    /// `rows x cols`.
    pub shape: Shape,
    /// Rank of the factors, the same for all blocks.
    pub rank: usize,
    /// How the stack was made; a free string such as `avd` or `nested`.
    pub method: String,
    /// How the blocks are stored.
    pub kind: BlockKind,
    /// The blocks, first to last. In a cut file those that are whole.
    pub blocks: Vec<BlockLayout>,
}

impl WeightInfo {
    /// The number of blocks that are there.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Resident bytes of block `block`, counted from 1: the sum of its tensors. `None` when there is no such block.
    pub fn block_bytes(&self, block: usize) -> Option<u64> {
        self.blocks.get(block.checked_sub(1)?)?.bytes()
    }

    /// Checks that a block can be this weight's next.
    pub(crate) fn check_next(&self, layout: &BlockLayout) -> Result<(), CoreError> {
        let number = self.blocks.len() + 1;
        let equal = |what, expected, actual| {
            if expected == actual { Ok(()) } else { Err(CoreError::Mismatch { what, expected, actual }) }
        };
        equal("rows of the block", self.shape.rows(), layout.shape.rows())?;
        equal("columns of the block", self.shape.cols(), layout.shape.cols())?;
        equal("the rank of all blocks of a weight", self.rank, layout.rank)?;
        if number == 1 && layout.basis.is_none() {
            return Err(CoreError::NoBasis);
        }
        let codes = self.blocks.first().is_some_and(|first| first.coefficients == FactorType::I8);
        if layout.coefficients == FactorType::Scales && !codes {
            return Err(CoreError::NoCodes { block: number });
        }
        if layout.planes != 1 && layout.planes != number {
            return Err(CoreError::Planes { block: number, planes: layout.planes });
        }
        if layout.spike_words > 0 && number > 1 {
            return Err(CoreError::SpikesLate { block: number });
        }
        Ok(())
    }
}

/// A stack that can be read: a [`crate::StackFile`] or a [`crate::Draft`].
///
/// Weights are counted from 0, the blocks of a weight from 1. Whatever a method returns has been compared with its BLAKE3 hash.
pub trait BlockSource {
    /// The stacked weights.
    fn weights(&self) -> &[WeightInfo];

    /// The unstacked tensors (norms, biases, whatever was kept as it is), in the order of the file.
    fn base_tensors(&self) -> Vec<&TensorInfo>;

    /// The companion files (`config.json`, tokenizer, ...) by their own names, without the `file/` they have as tensors.
    fn files(&self) -> Vec<&TensorInfo>;

    /// Where the stack comes from: keys and values given by whoever made it.
    fn provenance(&self) -> &BTreeMap<String, String>;

    /// Reads any tensor by its name: an unstacked one by that of the model, part of a block by `<weight>.block.<number>.<part>`.
    ///
    /// # Errors
    /// [`FormatError::NoSuch`], [`FormatError::Missing`] (the file is cut), [`FormatError::Damaged`], [`FormatError::Read`].
    fn read_tensor(&self, name: &str) -> Result<Tensor, FormatError>;

    /// Reads a companion file, such as `config.json`.
    ///
    /// # Errors
    /// As [`BlockSource::read_tensor`].
    fn read_file(&self, name: &str) -> Result<Vec<u8>, FormatError>;

    /// Reads block `block` (from 1) of weight `weight` (from 0). It fits the blocks before it, or it is an error.
    ///
    /// # Errors
    /// [`FormatError::NoSuchWeight`], [`FormatError::NoSuchBlock`], [`FormatError::Damaged`], [`FormatError::Block`] (whole, but with
    /// values that no block may have), [`FormatError::Read`].
    fn read_block(&self, weight: usize, block: usize) -> Result<Block, FormatError>;

    /// Reads the first `level` blocks of weight `weight` (from 0): all there is to know of it at that level.
    ///
    /// ```
    /// use bitstack_core::{Basis, Block, Coefficients, Shape, SignMatrix, Values, WeightStack, f16};
    /// use bitstack_format::{BlockSource, Draft};
    ///
    /// let half = |x: f32| vec![f16::from_f32(x); 2];
    /// let mut stack = WeightStack::new(Shape::new(2, 2)?);
    /// stack.push(Block {
    ///     signs: SignMatrix::from_f32(2, 2, &[1.0, -1.0, 1.0, 1.0])?,
    ///     basis: Some(Basis::new(1, 2, Values::F16(half(1.0)))?),
    ///     coefficients: Coefficients::new(2, 1, 1, Values::F16(half(0.5)))?,
    ///     spikes: None,
    /// })?;
    /// let mut draft = Draft::create_on(Vec::new(), "memory");
    /// let weight = draft.push_stack("fc.weight", &stack, "avd")?;
    /// let read = draft.read_stack(weight, 1)?;
    /// assert_eq!(read.level(1)?.reconstruct(), [0.5, -0.5, 0.5, 0.5]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`BlockSource::read_block`]; [`FormatError::NoSuchBlock`] for level 0, too.
    fn read_stack(&self, weight: usize, level: u32) -> Result<WeightStack, FormatError> {
        let n_weights = self.weights().len();
        let info = self.weights().get(weight).ok_or(FormatError::NoSuchWeight { weight, n_weights })?;
        let mut stack = WeightStack::new(info.shape);
        if level == 0 {
            return Err(FormatError::NoSuchBlock { weight: info.name.clone(), block: 0, n_blocks: info.n_blocks() });
        }
        for block in 1..=level as usize {
            let invalid = |source| FormatError::Block { weight: info.name.clone(), block, source };
            stack.push(self.read_block(weight, block)?).map_err(invalid)?;
        }
        Ok(stack)
    }

    /// The index of the weight of this name.
    fn weight_index(&self, name: &str) -> Option<usize> {
        self.weights().iter().position(|w| w.name == name)
    }

    /// Resident bytes of all unstacked tensors. Companion files and pads do not count.
    fn base_bytes(&self) -> u64 {
        self.base_tensors().iter().map(|t| t.len_bytes).sum()
    }

    /// Resident bytes of every block: `[weight][block - 1]`.
    fn block_sizes(&self) -> Vec<Vec<u64>> {
        // Layouts in a catalog come from tensors whose bytes could be counted.
        self.weights().iter().map(|w| w.blocks.iter().map(|b| b.bytes().unwrap_or(u64::MAX)).collect()).collect()
    }
}

/// A tensor with its place in the source.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) info: TensorInfo,
    pub(crate) offset_bytes: u64,
    pub(crate) hash: [u8; 32],
}

impl Stored {
    /// The offset after its last byte.
    pub(crate) fn end_bytes(&self) -> u64 {
        self.offset_bytes + self.info.len_bytes
    }
}

/// The tensors of a block, as indices into [`Catalog::tensors`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockParts {
    pub(crate) signs: usize,
    pub(crate) basis: Option<FactorParts>,
    pub(crate) coefficients: FactorParts,
    pub(crate) spikes: Option<usize>,
}

/// The tensors of a factor: F16 values, or I8 codes with their scales, or scales only, which are then the values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FactorParts {
    pub(crate) values: usize,
    pub(crate) scales: Option<usize>,
    pub(crate) only_scales: bool,
}

impl BlockParts {
    /// All of them, in the order of the file.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = usize> + use<> {
        let factors = self.basis.into_iter().chain([self.coefficients]);
        let factors = factors.flat_map(|f| std::iter::once(f.values).chain(f.scales));
        std::iter::once(self.signs).chain(factors).chain(self.spikes)
    }

    /// The same parts with other indices.
    pub(crate) fn map<E>(self, mut to: impl FnMut(usize) -> Result<usize, E>) -> Result<Self, E> {
        let mut factor = |f: FactorParts| -> Result<FactorParts, E> {
            Ok(FactorParts { values: to(f.values)?, scales: f.scales.map(&mut to).transpose()?, ..f })
        };
        let basis = self.basis.map(&mut factor).transpose()?;
        let coefficients = factor(self.coefficients)?;
        let spikes = self.spikes.map(&mut to).transpose()?;
        Ok(Self { signs: to(self.signs)?, basis, coefficients, spikes })
    }

    /// The last of them.
    pub(crate) fn last(&self) -> usize {
        self.spikes.or(self.coefficients.scales).unwrap_or(self.coefficients.values)
    }
}

/// The names of the parts of a block.
pub(crate) fn part_name(weight: &str, block: usize, part: &str) -> String {
    format!("{weight}.block.{block}.{part}")
}

#[derive(Debug, Default)]
pub(crate) struct Catalog {
    /// Every tensor, pads too where there are some.
    pub(crate) tensors: Vec<Stored>,
    index: HashMap<String, usize>,
    /// Companion files by their own names, and where they are in `tensors`.
    pub(crate) files: Vec<(TensorInfo, usize)>,
    pub(crate) base: Vec<usize>,
    pub(crate) weights: Vec<WeightInfo>,
    pub(crate) blocks: Vec<Vec<BlockParts>>,
    pub(crate) provenance: BTreeMap<String, String>,
}

impl Catalog {
    /// Adds a tensor whose name is not taken yet and returns its index.
    pub(crate) fn add(&mut self, stored: Stored) -> Result<usize, FormatError> {
        let i = self.tensors.len();
        if self.index.insert(stored.info.name.clone(), i).is_some() {
            return Err(FormatError::Duplicate { name: stored.info.name });
        }
        self.tensors.push(stored);
        Ok(i)
    }

    /// Forgets the tensors from index `n` on, which nothing may refer to yet.
    pub(crate) fn truncate(&mut self, n: usize) {
        for stored in self.tensors.drain(n..) {
            self.index.remove(&stored.info.name);
        }
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Enters tensor `i` as a companion file.
    pub(crate) fn add_file(&mut self, i: usize) -> Result<(), FormatError> {
        let info = &self.tensors[i].info;
        let name = info.name.strip_prefix(FILE_PREFIX).unwrap_or(&info.name).to_owned();
        check_file_name(&name)?;
        self.files.push((TensorInfo { name, ..info.clone() }, i));
        Ok(())
    }

    /// The parts of a block, or which of weight and block there is not.
    pub(crate) fn block_parts(&self, weight: usize, block: usize) -> Result<BlockParts, FormatError> {
        let n_weights = self.weights.len();
        let blocks = self.blocks.get(weight).ok_or(FormatError::NoSuchWeight { weight, n_weights })?;
        block.checked_sub(1).and_then(|b| blocks.get(b)).copied().ok_or_else(|| FormatError::NoSuchBlock {
            weight: self.weights[weight].name.clone(),
            block,
            n_blocks: blocks.len(),
        })
    }

    pub(crate) fn tensor_index(&self, name: &str) -> Result<usize, FormatError> {
        self.index.get(name).copied().ok_or_else(|| FormatError::NoSuch { what: "tensor", name: name.to_owned() })
    }

    pub(crate) fn file_index(&self, name: &str) -> Result<usize, FormatError> {
        let found = self.files.iter().find(|(info, _)| info.name == name);
        found.map(|&(_, i)| i).ok_or_else(|| FormatError::NoSuch { what: "file", name: name.to_owned() })
    }

    /// Reads the bytes of tensor `i` as elements of type `T`, in file order of bytes.
    fn load<T: bytemuck::Pod>(&self, source: &(impl ReadAt + ?Sized), i: usize) -> Result<Vec<T>, FormatError> {
        let stored = &self.tensors[i];
        let name = &stored.info.name;
        let bytes = stored.info.len_bytes;
        let out_of_memory = || FormatError::OutOfMemory { what: format!("tensor {name}"), bytes };
        let n = usize::try_from(bytes).map_err(|_| out_of_memory())? / size_of::<T>();
        let mut values: Vec<T> = Vec::new();
        values.try_reserve_exact(n).map_err(|_| out_of_memory())?;
        values.resize(n, T::zeroed());
        let target: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        source
            .read_exact_at(target, stored.offset_bytes)
            .map_err(|source| FormatError::Read { what: format!("tensor {name}"), source })?;
        if *blake3::hash(target).as_bytes() != stored.hash {
            return Err(FormatError::Damaged { name: name.clone() });
        }
        Ok(values)
    }

    pub(crate) fn load_bytes(&self, source: &(impl ReadAt + ?Sized), i: usize) -> Result<Vec<u8>, FormatError> {
        self.load(source, i)
    }

    pub(crate) fn load_tensor(&self, source: &(impl ReadAt + ?Sized), i: usize) -> Result<Tensor, FormatError> {
        let data = self.load(source, i)?;
        let TensorInfo { dtype, shape, .. } = self.tensors[i].info.clone();
        Ok(Tensor { dtype, shape, data })
    }

    /// Reads tensor `i` piece by piece, gives each piece to `sink`, and compares the hash at the end.
    pub(crate) fn stream(
        &self,
        source: &(impl ReadAt + ?Sized),
        i: usize,
        buffer: &mut Vec<u8>,
        mut sink: impl FnMut(&[u8]) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let stored = &self.tensors[i];
        let mut hasher = blake3::Hasher::new();
        let mut offset = stored.offset_bytes;
        while offset < stored.end_bytes() {
            let n = COPY_BYTES.min(stored.end_bytes() - offset);
            buffer.resize(n as usize, 0);
            source
                .read_exact_at(buffer, offset)
                .map_err(|source| FormatError::Read { what: format!("tensor {}", stored.info.name), source })?;
            hasher.update(buffer);
            sink(buffer)?;
            offset += n;
        }
        if *hasher.finalize().as_bytes() != stored.hash {
            return Err(FormatError::Damaged { name: stored.info.name.clone() });
        }
        Ok(())
    }

    fn load_halves(&self, source: &(impl ReadAt + ?Sized), i: usize) -> Result<Vec<f16>, FormatError> {
        let mut values: Vec<f16> = self.load(source, i)?;
        if cfg!(target_endian = "big") {
            values.iter_mut().for_each(|x| *x = f16::from_bits(u16::from_le(x.to_bits())));
        }
        Ok(values)
    }

    fn load_words(&self, source: &(impl ReadAt + ?Sized), i: usize) -> Result<Vec<u16>, FormatError> {
        let mut words: Vec<u16> = self.load(source, i)?;
        words.iter_mut().for_each(|word| *word = u16::from_le(*word));
        Ok(words)
    }

    fn load_factor(&self, source: &(impl ReadAt + ?Sized), parts: FactorParts) -> Result<Values, FormatError> {
        Ok(match parts.scales {
            None if parts.only_scales => Values::Scales(self.load_halves(source, parts.values)?),
            None => Values::F16(self.load_halves(source, parts.values)?),
            Some(scales) => {
                Values::I8 { codes: self.load(source, parts.values)?, scales: self.load_halves(source, scales)? }
            }
        })
    }

    pub(crate) fn load_block(
        &self,
        source: &(impl ReadAt + ?Sized),
        weight: usize,
        block: usize,
    ) -> Result<Block, FormatError> {
        let parts = self.block_parts(weight, block)?;
        let info = &self.weights[weight];
        let layout = info.blocks[block - 1];
        let (rows, cols, rank) = (info.shape.rows(), info.shape.cols(), info.rank);
        let signs = self.load(source, parts.signs)?;
        let basis = parts.basis.map(|basis| self.load_factor(source, basis)).transpose()?;
        let coefficients = self.load_factor(source, parts.coefficients)?;
        let spikes = parts.spikes.map(|spikes| self.load_words(source, spikes)).transpose()?;
        let build = || {
            Ok(Block {
                signs: SignMatrix::from_bytes(rows, cols, signs)
                    .map_err(|source| CoreError::Signs { shape: info.shape, source })?,
                basis: basis.map(|values| Basis::new(rank, cols, values)).transpose()?,
                coefficients: Coefficients::new(rows, layout.planes, rank, coefficients)?,
                spikes: spikes.map(|words| Spikes::new(info.shape, words)).transpose()?,
            })
        };
        build().map_err(|source| FormatError::Block { weight: info.name.clone(), block, source })
    }
}

/// Names are printed and become keys of JSON objects: not empty, not endless, nothing that moves a terminal's cursor.
pub(crate) fn check_name(what: &'static str, name: &str) -> Result<(), FormatError> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_NAME_BYTES {
        "it is longer than 1024 bytes"
    } else if name.chars().any(char::is_control) {
        "it has control characters"
    } else {
        return Ok(());
    };
    Err(FormatError::Name { what, name: name.chars().take(64).collect(), reason })
}

/// Names of weights and unstacked tensors must not be taken for something else.
pub(crate) fn check_model_name(what: &'static str, name: &str) -> Result<(), FormatError> {
    check_name(what, name)?;
    if name == METADATA_KEY || name.starts_with(FILE_PREFIX) || name.starts_with(PAD_PREFIX) {
        let reason = "names that begin with file/ or pad. and the name __metadata__ are reserved";
        return Err(FormatError::Name { what, name: name.to_owned(), reason });
    }
    Ok(())
}

/// [`check_model_name`] for a weight, whose name begins those of its parts.
pub(crate) fn check_weight_name(name: &str) -> Result<(), FormatError> {
    check_model_name("weight", name)?;
    if PAD_PREFIX.strip_suffix('.') == Some(name) {
        let reason = "its parts would be taken for pads";
        return Err(FormatError::Name { what: "weight", name: name.to_owned(), reason });
    }
    Ok(())
}

/// A companion file may end up in a directory: its name is a plain one.
pub(crate) fn check_file_name(name: &str) -> Result<(), FormatError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > MAX_FILE_NAME_BYTES || name.starts_with('.') || !name.chars().all(plain) {
        let reason = "it must be 1 to 255 letters, digits, dots, hyphens and underscores, and not begin with a dot";
        return Err(FormatError::Name { what: "file", name: name.chars().take(64).collect(), reason });
    }
    Ok(())
}
