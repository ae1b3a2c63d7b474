//! From a stack at the levels of a plan to a model directory: an ordinary dense checkpoint that other programs load, or one of the
//! published implementation. One tensor, or a part of one, is in memory at a time.

use crate::ExchangeError;
use crate::reference::{BASIS, COEFFICIENTS, CONFIGS, MEASUREMENTS, SIGNS, layer_name, part_name};
use bitstack_core::{CoreError, FactorType, SignMatrix};
use bitstack_engine::{EngineError, stack};
use bitstack_format::{BlockSource, Dtype, FormatError};
use bitstack_io::hostile::plain_json;
use bitstack_io::{Existing, write_directory_atomically};
use bitstack_model::{Elements, ModelError, Progress, WeightSpec};
use half::{bf16, f16};
use rayon::prelude::*;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

const CONFIG: &str = "config.json";
/// Values of a weight that are rebuilt at a time: 64 MiB in f32.
const PANEL_VALUES: usize = 1 << 24;
/// Rows of a panel that one thread rebuilds at a time.
const ROWS: usize = 64;

/// What the weights of a dense checkpoint are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// 32-bit: exactly the weights that the stack stands for.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
}

impl FloatType {
    /// The name in a config.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }
}

/// How to write a model directory.
#[derive(Debug, Clone, Copy)]
pub struct ExportOptions {
    /// Whether a directory that is there is replaced. It must then hold a checkpoint and nothing else, or nothing at all.
    pub existing: Existing,
    /// Most bytes of tensors in a file, unless one tensor alone has more; by default 5 GB.
    pub shard_bytes: u64,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { existing: Existing::Refuse, shard_bytes: 5_000_000_000 }
    }
}

/// Writes the model that `levels[w]` blocks of each weight `w` make as an ordinary dense checkpoint in the directory `dir`.
///
/// Weights are rebuilt in f32 and rounded once to `float`, by default the type that the config names (`torch_dtype`), or else bf16. Tensors that are
/// not stacked are written as they are. The config is changed to name the type. Returns the bytes of all tensors.
///
/// # Errors
/// A config that does not fit the stack, damaged blocks, levels that are 0 or more than there are blocks;
/// [`ExchangeError::TooLargeFor`]; [`ExchangeError::NotACheckpoint`]; failures to write.
pub fn export_dense<S: BlockSource + Sync + ?Sized>(
    source: &S,
    levels: &[u32],
    float: Option<FloatType>,
    dir: &Path,
    options: &ExportOptions,
    progress: &dyn Progress,
) -> Result<u64, ExchangeError> {
    let config = stack::config(source)?;
    let (config_text, float) = with_float_type(&source.read_file(CONFIG)?, float)?;
    let mut tensors = Vec::new();
    let mut n_stacked = 0;
    for spec in config.weights() {
        let (name, shape) = (spec.tensor_name(), spec.tensor_shape().to_vec());
        let Some(weight) = source.weight_index(&spec.name) else {
            tensors.push(unstacked(source, &stack::kept_name(&spec)?, Some(&shape))?);
            continue;
        };
        let found = source.weights()[weight].shape;
        let (found, expected) = (vec![found.rows(), found.cols()], vec![spec.rows, spec.cols]);
        if found != expected {
            return Err(EngineError::StackShape { name: spec.name, found, expected }.into());
        }
        n_stacked += 1;
        match tensors.last_mut() {
            Some(Tensor { contents: Contents::Rebuilt(parts), .. }) if spec.first_row > 0 => parts.push(weight),
            _ => tensors.push(Tensor { name, dtype: float.dtype(), shape, contents: Contents::Rebuilt(vec![weight]) }),
        }
    }
    if n_stacked != source.weights().len() {
        let known: Vec<String> = config.weights().into_iter().map(|s| s.name).collect();
        let stray = source.weights().iter().find(|w| !known.contains(&w.name));
        return Err(EngineError::StrayWeight { name: stray.map_or_else(String::new, |w| w.name.clone()) }.into());
    }
    for spec in config.other_tensors() {
        tensors.push(unstacked(source, &spec.name, Some(&[spec.len]))?);
    }
    write_checkpoint(source, levels, tensors, dir, options, progress, |dir| {
        for file in source.files() {
            if file.name == MEASUREMENTS {
                continue;
            }
            let contents = if file.name == CONFIG { config_text.clone() } else { source.read_file(&file.name)? };
            write_file(&dir.join(&file.name), |out| put(out, &contents))?;
        }
        Ok(())
    })
}

/// Writes the blocks of `order`, a prefix of a load order, as a checkpoint of the published implementation in the directory `dir`:
/// the tensors and files that [`crate::import`] reads, with the same bits. Returns the bytes of all tensors.
///
/// # Errors
/// [`ExchangeError::NotInReferenceLayout`] for a weight outside the layers, one in a layer that is not stacked, and for blocks that are not additive, share a basis, are stored in
/// 8 bits, or have spikes; [`ExchangeError::NotACheckpoint`]; orders that are not those of these blocks; damaged blocks; failures to write.
pub fn export_reference<S: BlockSource + Sync + ?Sized>(
    source: &S,
    order: &[u32],
    dir: &Path,
    options: &ExportOptions,
    progress: &dyn Progress,
) -> Result<u64, ExchangeError> {
    let n_weights = source.weights().len();
    let mut levels = vec![0_u32; n_weights];
    let misplaced = |position| {
        let reason = "the first blocks of all weights must come first, each once".to_owned();
        ExchangeError::from(FormatError::Order { position, reason })
    };
    for (position, &weight) in order.iter().enumerate() {
        let weight = weight as usize;
        *levels.get_mut(weight).ok_or(FormatError::NoSuchWeight { weight, n_weights })? += 1;
        if (position < n_weights) != (levels[weight] == 1) {
            return Err(misplaced(position));
        }
    }
    if order.len() < n_weights {
        return Err(misplaced(order.len()));
    }
    let is_kept = |spec: &WeightSpec| spec.layer.is_some() && source.weight_index(&spec.name).is_none();
    // Blocks without a config are taken as they are.
    let weights = match stack::companion(source, CONFIG)? {
        Some(_) => stack::config(source)?.weights(),
        None => Vec::new(),
    };
    if let Some(spec) = weights.into_iter().find(is_kept) {
        let reason = "there all weights of a layer are stacked, and this one is kept as it was".to_owned();
        return Err(ExchangeError::NotInReferenceLayout { name: spec.name, reason });
    }
    let mut names = Vec::new();
    let mut sizes = Vec::new();
    let mut tensors = Vec::new();
    for base in source.base_tensors() {
        tensors.push(unstacked(source, &base.name, None)?);
    }
    for (weight, info) in source.weights().iter().enumerate() {
        let refused = |reason: String| ExchangeError::NotInReferenceLayout { name: info.name.clone(), reason };
        names.push(layer_name(&info.name).ok_or_else(|| {
            refused("only weights in layers are stacked there; compress with --keep-embeddings".to_owned())
        })?);
        let (rows, cols) = (info.shape.rows(), info.shape.cols());
        let n_signs = info.shape.n_elems().div_ceil(8);
        sizes.push(n_signs as u64 + 2 * (info.rank * (rows + cols)) as u64);
        for block in 1..=levels[weight] as usize {
            let missing = || FormatError::NoSuchBlock { weight: info.name.clone(), block, n_blocks: info.n_blocks() };
            let layout = info.blocks.get(block - 1).ok_or_else(missing)?;
            let additive = layout.planes == 1 && layout.basis.is_some();
            if !additive || layout.basis != Some(FactorType::F16) || layout.coefficients != FactorType::F16 {
                let what = match (additive, info.method.as_str()) {
                    (false, method) => {
                        format!("block {block} is not additive with a basis of its own (it is {method})")
                    }
                    (true, _) => format!("the factors of block {block} are stored in 8 bits"),
                };
                return Err(refused(format!("{what}; compress with --method avd")));
            }
            if layout.spike_words > 0 {
                let what = "it has spikes, for which there is no place in that layout";
                return Err(refused(format!("{what}; export --as hf writes them into the weights")));
            }
            let part = |part| format!("{}.block.{block}.{part}", info.name);
            let name = |part| part_name(&info.name, part, block - 1);
            let stored = Contents::Stored;
            tensors.push(Tensor {
                name: name(COEFFICIENTS),
                dtype: Dtype::F16,
                shape: vec![rows, info.rank],
                contents: stored(part("u")),
            });
            tensors.push(Tensor {
                name: name(BASIS),
                dtype: Dtype::F16,
                shape: vec![info.rank, cols],
                contents: stored(part("v")),
            });
            tensors.push(Tensor {
                name: name(SIGNS),
                dtype: Dtype::U8,
                shape: vec![n_signs],
                contents: Contents::Signs { weight, block, part: part("signs") },
            });
        }
    }
    let base_bytes: u64 = source.base_tensors().iter().map(|t| t.len_bytes).sum();
    write_checkpoint(source, &levels, tensors, dir, options, progress, |dir| {
        for file in source.files() {
            let contents = source.read_file(&file.name)?;
            write_file(&dir.join(&file.name), |out| put(out, &contents))?;
        }
        write_file(&dir.join(CONFIGS), |out| list_sizes(order, &names, &sizes, base_bytes, out))
    })
}

/// A tensor to be written.
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    contents: Contents,
}

enum Contents {
    /// A tensor of the source, as it is.
    Stored(String),
    /// The signs of a block (from 1), in the published order of bits.
    Signs { weight: usize, block: usize, part: String },
    /// A weight, rebuilt; or the parts of one, one below the other.
    Rebuilt(Vec<usize>),
}

impl Tensor {
    fn len_bytes(&self) -> u64 {
        // Tensors of a source have been counted in 64 bits, and rebuilt ones have at most four bytes for each element of a `Shape`.
        self.dtype.bytes_of(&self.shape).expect("bytes that can be counted")
    }
}

/// A tensor of the source that is written as it is, of this shape where the model demands one.
fn unstacked<S: BlockSource + ?Sized>(
    source: &S,
    name: &str,
    expected: Option<&[usize]>,
) -> Result<Tensor, ExchangeError> {
    let infos = source.base_tensors();
    let Some(info) = infos.iter().find(|t| t.name == name) else {
        return Err(FormatError::NoSuch { what: "tensor", name: name.to_owned() }.into());
    };
    if let Some(expected) = expected.filter(|e| *e != info.shape) {
        let (found, expected) = (info.shape.clone(), expected.to_vec());
        return Err(EngineError::StackShape { name: name.to_owned(), found, expected }.into());
    }
    let contents = Contents::Stored(info.name.clone());
    Ok(Tensor { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone(), contents })
}

/// Writes a model directory: its tensors in one or more files, and what `write_others` puts beside them.
fn write_checkpoint<S: BlockSource + Sync + ?Sized>(
    source: &S,
    levels: &[u32],
    tensors: Vec<Tensor>,
    dir: &Path,
    options: &ExportOptions,
    progress: &dyn Progress,
    write_others: impl FnOnce(&Path) -> Result<(), ExchangeError>,
) -> Result<u64, ExchangeError> {
    if options.existing == Existing::Replace {
        check_replaceable(dir)?;
    }
    let total: u64 = tensors.iter().map(Tensor::len_bytes).sum();
    write_directory_atomically(dir, options.existing, |dir| {
        write_others(dir)?;
        let shards = split(tensors, options.shard_bytes);
        let mut places = Map::new();
        progress.stage("write (bytes)", total);
        for (i, shard) in shards.iter().enumerate() {
            let file = match shards.len() {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            places.extend(shard.iter().map(|t| (t.name.clone(), Value::from(file.as_str()))));
            write_file(&dir.join(&file), |out| {
                put(out, &header(shard))?;
                shard.iter().try_for_each(|tensor| write_tensor(source, levels, tensor, out, progress))
            })?;
        }
        if shards.len() > 1 {
            let index = json!({ "metadata": { "total_size": total }, "weight_map": places });
            write_file(&dir.join("model.safetensors.index.json"), |out| put(out, format!("{index:#}\n").as_bytes()))?;
        }
        Ok(total)
    })
}

/// Cuts the tensors into files of at most `shard_bytes`. In a file, those with larger elements come first: then every tensor begins at
/// a multiple of its element's size.
fn split(tensors: Vec<Tensor>, shard_bytes: u64) -> Vec<Vec<Tensor>> {
    let mut shards: Vec<Vec<Tensor>> = vec![Vec::new()];
    let mut bytes = 0;
    for tensor in tensors {
        let shard = shards.last_mut().expect("there is one from the start");
        if bytes + tensor.len_bytes() > shard_bytes && !shard.is_empty() {
            bytes = 0;
            shards.push(Vec::new());
        }
        bytes += tensor.len_bytes();
        shards.last_mut().expect("there is one from the start").push(tensor);
    }
    shards.iter_mut().for_each(|shard| shard.sort_by_key(|t| std::cmp::Reverse(t.dtype.bits())));
    shards
}

/// The header of a safetensors file: its length in 8 bytes, then JSON, padded with spaces so that the data begins at a multiple of 8.
fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut fields = Map::new();
    fields.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.len_bytes();
        let field = json!({ "dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [offset, end] });
        fields.insert(tensor.name.clone(), field);
        offset = end;
    }
    let mut text = Value::Object(fields).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    header
}

fn write_tensor<S: BlockSource + Sync + ?Sized>(
    source: &S,
    levels: &[u32],
    tensor: &Tensor,
    out: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<(), ExchangeError> {
    match &tensor.contents {
        Contents::Stored(name) => put(out, &source.read_tensor(name)?.data)?,
        Contents::Signs { weight, block, part } => {
            let info = &source.weights()[*weight];
            let bytes = source.read_tensor(part)?.data;
            let signs = SignMatrix::from_bytes(info.shape.rows(), info.shape.cols(), bytes).map_err(|signs| {
                let source = CoreError::Signs { shape: info.shape, source: signs };
                FormatError::Block { weight: info.name.clone(), block: *block, source }
            })?;
            put(out, &signs.view().to_reference_bytes())?;
        }
        Contents::Rebuilt(parts) => {
            return parts.iter().try_for_each(|&weight| {
                let level = levels.get(weight).copied().unwrap_or(0);
                write_rebuilt(source, weight, level, tensor.dtype, out, progress)
            });
        }
    }
    progress.advance(tensor.len_bytes());
    Ok(())
}

/// Rebuilds a weight from its first `level` blocks and writes it, some rows at a time.
fn write_rebuilt<S: BlockSource + ?Sized>(
    source: &S,
    weight: usize,
    level: u32,
    dtype: Dtype,
    out: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<(), ExchangeError> {
    let info = &source.weights()[weight];
    let in_weight = |source| EngineError::Weight { name: info.name.clone(), source };
    let stack = source.read_stack(weight, level)?;
    let level = stack.level(level).map_err(in_weight)?;
    let (rows, cols) = (info.shape.rows(), info.shape.cols());
    let panel_rows = (PANEL_VALUES / cols).clamp(1, rows);
    let mut panel = vec![0.0_f32; panel_rows * cols];
    for first in (0..rows).step_by(panel_rows) {
        let n_values = panel_rows.min(rows - first) * cols;
        let values = &mut panel[..n_values];
        values
            .par_chunks_mut(ROWS * cols)
            .enumerate()
            .try_for_each(|(i, part)| level.reconstruct_rows(first + i * ROWS, part))
            .map_err(in_weight)?;
        let elements = match dtype {
            Dtype::F16 => Elements::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            Dtype::BF16 => Elements::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
            _ => Elements::F32(values.to_vec()),
        };
        let too_large = match &elements {
            Elements::F16(v) => v.iter().position(|x| !x.is_finite()),
            Elements::Bf16(v) => v.iter().position(|x| !x.is_finite()),
            Elements::F32(v) => v.iter().position(|x| !x.is_finite()),
        };
        if let Some(at) = too_large {
            return Err(ExchangeError::TooLargeFor { name: info.name.clone(), value: values[at], dtype: dtype.name() });
        }
        let (_, bytes) = stack::stored(&elements);
        put(out, &bytes)?;
        progress.advance(bytes.len() as u64);
    }
    Ok(())
}

/// Writes `compression_config.json`: the sizes with one block more each, from the smallest on.
fn list_sizes(
    order: &[u32],
    names: &[String],
    block_bytes: &[u64],
    base_bytes: u64,
    out: &mut dyn Write,
) -> Result<(), ExchangeError> {
    let mut levels = vec![1_u32; names.len()];
    let mut memory = base_bytes + block_bytes.iter().sum::<u64>();
    let mut more = order[names.len()..].iter();
    put(out, b"[\n")?;
    loop {
        let size = Size { memory, layers: Layers { names, levels: &levels } };
        serde_json::to_writer(&mut *out, &size).map_err(|e| FormatError::from(io::Error::from(e)))?;
        let Some(&weight) = more.next() else { break };
        levels[weight as usize] += 1;
        memory += block_bytes[weight as usize];
        put(out, b",\n")?;
    }
    put(out, b"\n]\n")
}

#[derive(Serialize)]
struct Size<'a> {
    memory: u64,
    layers: Layers<'a>,
}

struct Layers<'a> {
    names: &'a [String],
    levels: &'a [u32],
}

impl Serialize for Layers<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.names.iter().zip(self.levels))
    }
}

fn put(out: &mut dyn Write, bytes: &[u8]) -> Result<(), ExchangeError> {
    Ok(out.write_all(bytes).map_err(FormatError::from)?)
}

/// Creates a file that is not there yet.
fn write_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), ExchangeError>,
) -> Result<(), ExchangeError> {
    let failed = |operation, source| FormatError::File { operation, path: path.to_owned(), source };
    let mut out = BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(|e| failed("create", e))?);
    write(&mut out).map_err(|error| match error {
        ExchangeError::Format(FormatError::Write { source }) => failed("write", source).into(),
        other => other,
    })?;
    Ok(out.flush().map_err(|e| failed("write", e))?)
}

/// The type that rebuilt weights are written in, and a config that names it.
fn with_float_type(config: &[u8], wanted: Option<FloatType>) -> Result<(Vec<u8>, FloatType), ExchangeError> {
    let json = |source| ModelError::Json { file: CONFIG.to_owned(), source };
    let mut fields: Map<String, Value> = serde_json::from_slice(&plain_json(config)).map_err(json)?;
    // Newer releases of the Python library write the shorter name.
    let key = if fields.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    let named = fields.get(key).and_then(Value::as_str).unwrap_or_default();
    let known = [FloatType::F32, FloatType::F16, FloatType::Bf16].into_iter().find(|f| f.name() == named);
    let float = wanted.or(known).unwrap_or(FloatType::Bf16);
    if known == Some(float) {
        return Ok((config.to_vec(), float));
    }
    fields.insert(key.to_owned(), float.name().into());
    Ok((format!("{:#}\n", Value::Object(fields)).into_bytes(), float))
}

/// Checks that a directory that is to be replaced holds a checkpoint and nothing else: a wrong `-o` must not cost more than that.
fn check_replaceable(dir: &Path) -> Result<(), ExchangeError> {
    let io = |source| ModelError::Io { path: dir.to_owned(), source };
    let refused = |found| Err(ExchangeError::NotACheckpoint { dir: dir.to_owned(), found });
    if !dir.is_dir() {
        return Ok(());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().map_err(io)?.is_dir() {
            return refused(format!("the directory {name}"));
        }
        names.push(name);
    }
    if names.is_empty() || names.iter().any(|name| name == CONFIG) {
        return Ok(());
    }
    refused(format!("{} but no config.json", names[0]))
}
