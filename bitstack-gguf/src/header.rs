//! The header: metadata, and the table of tensors.

use crate::reader::Reader;
use crate::{BlockType, GgufError, Value};
use bitstack_io::ReadAt;
use bitstack_io::hostile::printable;
use std::collections::{BTreeMap, HashSet};

/// The bytes that a GGUF file begins with.
pub const MAGIC: [u8; 4] = *b"GGUF";

/// The most dimensions of a tensor.
const MAX_DIMS: u32 = 4;

/// What a file may make its reader use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Most bytes of the header. By default 256 MiB: the largest in use have some tens of megabytes, nearly all of it the tokenizer.
    pub header_bytes: u64,
}

impl Limits {
    /// The most bytes of memory that reading takes for a byte of the header, as the tests measure it.
    pub const BYTES_PER_BYTE: u64 = 24;

    /// A limit on the bytes of the header.
    #[must_use]
    pub fn header_bytes(self, header_bytes: u64) -> Self {
        Self { header_bytes }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { header_bytes: 256 << 20 }
    }
}

/// The header of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<TensorInfo>,
}

/// A tensor of the table. Its bytes lie inside the file, and overlap those of no other.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// The name.
    pub name: String,
    /// The type of the elements.
    pub kind: BlockType,
    /// The dimensions, slowest first (a file has them the other way round); rows are whole blocks.
    pub shape: Vec<usize>,
    /// The first byte, from the start of the file.
    pub offset_bytes: u64,
    /// The bytes.
    pub len_bytes: u64,
}

impl Gguf {
    /// Reads the header of a file, and holds it against the file's length.
    ///
    /// # Errors
    /// [`GgufError`]: the rule that is broken.
    pub fn read(source: &(impl ReadAt + ?Sized), limits: &Limits) -> Result<Self, GgufError> {
        let mut reader = Reader::new(source, limits.header_bytes)?;
        let start = || "the start of the header".to_owned();
        let magic = reader.u32(&start)?.to_le_bytes();
        if magic != MAGIC {
            return Err(GgufError::Magic { found: magic.to_vec() });
        }
        let version = reader.u32(&start)?;
        match version {
            2 | 3 => {}
            swapped if matches!(swapped.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian),
            found => return Err(GgufError::Version { found }),
        }
        let n_tensors = reader.u64(&start)?;
        let n_keys = reader.u64(&start)?;
        // A key takes its length, the number of its type and a byte at least; a tensor its two lengths, a dimension, its type and its offset.
        reader.need_each(n_keys, 13, &|| format!("metadata of {n_keys} keys"))?;
        reader.need_each(n_tensors, 32, &|| format!("a table of {n_tensors} tensors"))?;

        let mut metadata = BTreeMap::new();
        for _ in 0..n_keys {
            let key = reader.name("a key")?;
            let value = reader.value(&key)?;
            if metadata.contains_key(&key) {
                return Err(GgufError::Duplicate { name: printable(&key) });
            }
            metadata.insert(key, value);
        }
        let mut tensors = Vec::new();
        for _ in 0..n_tensors {
            tensors.push(tensor(&mut reader)?);
        }
        let alignment = alignment(&metadata)?;
        let data_start = reader.offset().next_multiple_of(alignment);
        let data_bytes = reader.file_bytes().saturating_sub(data_start);
        check_places(&mut tensors, data_bytes, alignment)?;
        tensors.iter_mut().for_each(|tensor| tensor.offset_bytes += data_start);
        Ok(Self { version, metadata, tensors })
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// All tensors, in the order of their data.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }
}

/// One line of the table; the offset is as yet from the start of the data.
fn tensor<S: ReadAt + ?Sized>(reader: &mut Reader<'_, S>) -> Result<TensorInfo, GgufError> {
    let name = reader.name("the name of a tensor")?;
    let what = || format!("tensor {}", printable(&name));
    let n_dims = reader.u32(&what)?;
    let mut dims = Vec::new();
    for _ in 0..n_dims.min(MAX_DIMS) {
        dims.push(reader.u64(&what)?);
    }
    dims.reverse();
    let id = if n_dims <= MAX_DIMS { reader.u32(&what)? } else { 0 };
    let kind = BlockType::from_id(id).ok_or_else(|| GgufError::TensorType {
        tensor: printable(&name),
        found: BlockType::name_of(id),
        supported: BlockType::ALL.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", "),
    })?;
    let refused = |rule| GgufError::Shape { tensor: printable(&name), shape: dims.clone(), kind: kind.name(), rule };
    if n_dims == 0 || n_dims > MAX_DIMS {
        return Err(refused("a tensor has 1 to 4 dimensions"));
    }
    if dims.last().is_some_and(|&row| row == 0 || !row.is_multiple_of(kind.block_elements() as u64)) {
        return Err(refused("a row is one or more whole blocks"));
    }
    let n_elements = dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
    let blocks = n_elements.map(|n| n / kind.block_elements() as u64);
    let len_bytes = blocks.and_then(|n| n.checked_mul(kind.block_bytes() as u64));
    let shape = dims.iter().map(|&dim| usize::try_from(dim)).collect::<Result<Vec<_>, _>>().ok();
    let (Some(len_bytes), Some(shape)) = (len_bytes, shape) else {
        return Err(refused("it is not addressable"));
    };
    let offset_bytes = reader.u64(&what)?;
    Ok(TensorInfo { name, kind, shape, offset_bytes, len_bytes })
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    const DEFAULT: u64 = 32;
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT) };
    let found = || GgufError::Alignment { found: printable(&format!("{value:?}")) };
    value.as_u64().filter(|n| n.is_power_of_two() && (8..=65_536).contains(n)).ok_or_else(found)
}

/// Puts the tensors in the order of their data, and checks that each lies inside the data, aligned, behind the one before.
fn check_places(tensors: &mut [TensorInfo], data: u64, alignment: u64) -> Result<(), GgufError> {
    let mut names = HashSet::with_capacity(tensors.len());
    if let Some(twice) = tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
        return Err(GgufError::Duplicate { name: format!("tensor {}", printable(&twice.name)) });
    }
    drop(names);
    tensors.sort_by_key(|tensor| (tensor.offset_bytes, tensor.len_bytes));
    let mut end = 0;
    for TensorInfo { name, offset_bytes: offset, len_bytes: len, .. } in tensors.iter() {
        let refused = |rule| GgufError::Place { tensor: printable(name), len: *len, offset: *offset, data, rule };
        if !offset.is_multiple_of(alignment) {
            return Err(refused("it is not aligned"));
        }
        if *offset < end {
            return Err(refused("it overlaps another tensor"));
        }
        end =
            offset.checked_add(*len).filter(|end| *end <= data).ok_or_else(|| refused("the file is cut or damaged"))?;
    }
    Ok(())
}
