//! Reading a Hugging Face model directory, or a GGUF file, one tensor at a time.
//!
//! A directory holds `config.json` and either `model.safetensors` or an index and its shards. Opening reads the headers
//! only, and checks that every tensor the config implies is there with the right shape and type. A tensor is then read by
//! position when it is asked for: no memory map, and never more in memory than the caller keeps.
//!
//! A GGUF file presents itself as such a directory (`gguf`): with a config and a tokenizer made of its metadata, and its quantised
//! tensors in half precision.

mod companions;
mod from_gguf;
mod whole;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use ndarray::Array2;
use serde::Deserialize;

use crate::chat::ChatTemplate;
use crate::config::{name_in_text_part, text_part};
use crate::files::{exists, open_regular, read_head, read_text};
use crate::gguf::{self, Differs, is_gguf};
use crate::recognize::{advice, recognize_head};
use crate::{Dense, Elements, ModelConfig, ModelError, VectorSpec, WeightSpec};
use bitstack_gguf::BlockType;
use bitstack_io::hostile::printable;
use bitstack_io::safetensors::{Header, HeaderError, HeaderTensor};
use bitstack_io::{Dtype, ReadAt};
use companions::CONFIG;

/// What a checkpoint may make its reader use.
///
/// Opening takes at most [`CheckpointLimits::OPENING_BYTES_PER_BYTE`] bytes of memory for each byte of the configs, the index and the headers, which
/// must be there and within their limits before any of them is read, and 1 MiB (64 MiB where the config names experts, of which there may be 32768 in all);
/// reading a tensor its own bytes, which must be in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointLimits {
    /// Most bytes of a config. By default 1 MiB: those in use have some kilobytes.
    pub config_bytes: u64,
    /// Most bytes of the index of the shards. By default 16 MiB: the largest in use have some megabytes.
    pub index_bytes: u64,
    /// Most bytes of the header of a safetensors file, or of a GGUF file. By default 100 MB, the limit of the former's format.
    pub header_bytes: u64,
    /// Most bytes of another file that is read whole. By default 256 MiB: the largest `tokenizer.json` in use have some tens of megabytes.
    pub companion_bytes: u64,
    /// Most bytes of one tensor, as it is read: quantised ones in half precision. By default 64 GiB.
    pub tensor_bytes: u64,
}

impl CheckpointLimits {
    /// The most bytes of memory that opening takes for one byte of what it reads, as the tests measure it on files made for the purpose.
    pub const OPENING_BYTES_PER_BYTE: u64 = 128;
}

impl Default for CheckpointLimits {
    fn default() -> Self {
        Self {
            config_bytes: 1 << 20,
            index_bytes: 16 << 20,
            header_bytes: 100_000_000,
            companion_bytes: 1 << 28,
            tensor_bytes: 64 << 30,
        }
    }
}

/// An opened model directory, or GGUF file.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    config_text: String,
    /// Whether the model is the text model of one of text and images.
    is_part: bool,
    limits: CheckpointLimits,
    files: Vec<DataFile>,
    tensors: HashMap<String, Location>,
    /// Tensors that are not in the file where the index says they are, and what is wrong. It matters for those that are used.
    misplaced: HashMap<String, String>,
    remarks: Vec<String>,
    /// The metadata of a GGUF file.
    gguf: Option<Arc<gguf::Source>>,
}

#[derive(Clone)]
struct DataFile {
    path: PathBuf,
    source: Arc<dyn ReadAt + Send + Sync>,
}

impl fmt::Debug for DataFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataFile").field("path", &self.path).finish_non_exhaustive()
    }
}

impl DataFile {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), ModelError> {
        let read = self.source.read_exact_at(buf, offset_bytes);
        read.map_err(|source| ModelError::Io { path: self.path.clone(), source })
    }
}

#[derive(Debug, Clone)]
struct Location {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    offset_bytes: u64,
    len_bytes: u64,
    /// How a quantised tensor is stored; `dtype` is then F16.
    quantised: Option<BlockType>,
    /// By what the elements differ from those of a directory.
    differs: Differs,
}

impl Location {
    /// Bytes of the elements, as they are read.
    fn element_bytes(&self) -> u64 {
        // The shape was held against the file's length.
        self.dtype.bytes_of(&self.shape).unwrap_or(u64::MAX)
    }

    /// The name of the type that it is stored in.
    fn type_name(&self) -> &'static str {
        self.quantised.map_or(self.dtype.name(), BlockType::name)
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens a directory or a GGUF file with the default [`CheckpointLimits`]: reads its configs and tensor headers, and checks that they fit
    /// together.
    ///
    /// # Errors
    /// No or malformed config, unsupported architecture, no checkpoint, damaged header, missing tensor, wrong shape or dtype.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, ModelError> {
        Self::open_with(dir, &CheckpointLimits::default())
    }

    /// Whether a path is one that [`open`](Self::open) is for: a directory, or a file that begins as a GGUF file does, whatever its name.
    pub fn is_at(path: &Path) -> bool {
        let head = || open_regular(path).ok().and_then(|file| read_head(&file).ok());
        path.is_dir() || head().is_some_and(|head| is_gguf(&head))
    }

    /// Opens a directory or a GGUF file.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`ModelError::FileTooLarge`] and [`ModelError::BadCheckpoint`] for what is beyond `limits`.
    pub fn open_with(dir: impl AsRef<Path>, limits: &CheckpointLimits) -> Result<Self, ModelError> {
        Self::open_ignoring(dir, &[], limits)
    }

    /// Opens a directory, and leaves tensors be that the model does not use where their names match one of the patterns `ignored`: `*` stands for any
    /// characters, `?` for one.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with).
    pub fn open_ignoring(
        dir: impl AsRef<Path>,
        ignored: &[String],
        limits: &CheckpointLimits,
    ) -> Result<Self, ModelError> {
        let checkpoint = Self::open_headers(dir.as_ref(), limits)?;
        let mut used = HashSet::new();
        for weight in checkpoint.config.weights() {
            checkpoint.locate(&weight.tensor_name(), &weight.tensor_shape())?;
            used.insert(weight.tensor_name());
        }
        for vector in checkpoint.config.other_tensors() {
            checkpoint.locate(&vector.name, &[vector.len])?;
            used.insert(vector.name.clone());
        }
        checkpoint.check_used(&used, ignored)?;
        Ok(checkpoint)
    }

    /// Opens a directory whatever its tensors are: each is checked when it is read. For layouts other than that of Hugging Face.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with), but nothing about tensors that are missing, left over, or of other shapes and types.
    pub fn open_headers(dir: &Path, limits: &CheckpointLimits) -> Result<Self, ModelError> {
        let dir = dir.to_owned();
        if dir.is_file() {
            return Self::open_gguf(dir, limits);
        }
        if dir.is_dir() && !exists(&dir.join(CONFIG))? {
            return Err(ModelError::NoCheckpoint { missing: "config.json is not there", advice: advice(&dir), dir });
        }
        let whole = read_text(&dir.join(CONFIG), limits.config_bytes)?;
        let part = text_part(&whole)?;
        let is_part = part.is_some();
        let config_text = part.unwrap_or(whole);
        let config = ModelConfig::from_json(&config_text)?;
        let mut remarks = config.remarks().to_vec();
        if is_part {
            let remark =
                "config.json: a model of text and images; its text model is used, and tensors for images are not";
            remarks.push(remark.to_owned());
        }
        let mut checkpoint = Self {
            dir,
            config,
            config_text,
            is_part,
            limits: *limits,
            files: Vec::new(),
            tensors: HashMap::new(),
            misplaced: HashMap::new(),
            remarks,
            gguf: None,
        };
        let mut config = checkpoint.config.clone();
        config.find_end_tokens(|name| checkpoint.find_companion(name))?;
        checkpoint.config = config;
        let single = checkpoint.dir.join("model.safetensors");
        let index = checkpoint.dir.join("model.safetensors.index.json");
        if exists(&single)? {
            checkpoint.add_file(single)?;
        } else if exists(&index)? {
            checkpoint.add_shards(&index)?;
        } else {
            return Err(ModelError::NoCheckpoint {
                missing: "neither model.safetensors nor model.safetensors.index.json is there",
                advice: advice(&checkpoint.dir),
                dir: checkpoint.dir,
            });
        }
        checkpoint.untie()?;
        Ok(checkpoint)
    }

    /// What its user should know of how the checkpoint was read, a line each: nothing, as a rule.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// The directory, or the GGUF file.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's shape, with the end tokens of `generation_config.json` added.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The same checkpoint with its embedding and head in parts: [`ModelConfig::cut_vocabulary`].
    #[must_use]
    pub fn with_cut_vocabulary(&self) -> Self {
        Self { config: self.config.clone().cut_vocabulary(), ..self.clone() }
    }

    /// `config.json` as it stands in the directory, but for a head that is not tied although the file says so; where that is a model of text and
    /// images, the config of its text model; and of a GGUF file what its metadata make.
    pub fn config_text(&self) -> &str {
        &self.config_text
    }

    /// The model's chat template, if it has one.
    ///
    /// # Errors
    /// Files that cannot be read; those of [`ChatTemplate::find`].
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, ModelError> {
        ChatTemplate::find(|name| self.has_companion(name)?.then(|| self.companion(name)).transpose())
    }

    /// Bytes that the model's tensors take in the types they are read in: in the checkpoint, but for quantised ones, which are read in half precision.
    pub fn stored_bytes(&self) -> u64 {
        let names = self.config.weights().into_iter().filter(|w| w.first_row == 0).map(|w| w.tensor_name());
        let names = names.chain(self.config.other_tensors().iter().map(|v| v.name.clone()));
        names.filter_map(|name| self.tensors.get(&name)).map(Location::element_bytes).sum()
    }

    /// Reads one weight matrix, in the type it is stored in.
    ///
    /// # Errors
    /// Missing tensor, wrong shape or dtype, NaN or infinite elements, a read that fails.
    pub fn weight(&self, weight: &WeightSpec) -> Result<Dense, ModelError> {
        let first = weight.first_row * weight.cols;
        let elements =
            self.part(&weight.tensor_name(), &weight.tensor_shape(), first..first + weight.rows * weight.cols)?;
        Ok(Dense::new(weight.rows, weight.cols, elements).expect("as many elements as the shape, which was checked"))
    }

    /// Reads one weight matrix as an f32 array, rows x cols.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    pub fn matrix(&self, weight: &WeightSpec) -> Result<Array2<f32>, ModelError> {
        let values = self.weight(weight)?.into_elements().into_f32();
        Ok(Array2::from_shape_vec((weight.rows, weight.cols), values).expect("as many elements as the shape"))
    }

    /// Reads one norm or bias.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    pub fn vector(&self, vector: &VectorSpec) -> Result<Vec<f32>, ModelError> {
        Ok(self.elements(&vector.name, &[vector.len])?.into_f32())
    }

    /// The BLAKE3 hash of a tensor's bytes, read piece by piece.
    ///
    /// # Errors
    /// A tensor that is missing, a read that fails.
    pub fn tensor_hash(&self, tensor: &str) -> Result<blake3::Hash, ModelError> {
        const LEAST_PIECE_BYTES: usize = 1 << 20;
        let location = self
            .tensors
            .get(tensor)
            .ok_or_else(|| ModelError::MissingTensor { tensor: tensor.to_owned(), place: self.dir.clone() })?;
        let file = &self.files[location.file];
        let mut hasher = blake3::Hasher::new();
        hasher.update(location.type_name().as_bytes());
        let mut buffer = vec![0; file.source.best_read_bytes().max(LEAST_PIECE_BYTES)];
        let (mut offset, end) = (location.offset_bytes, location.offset_bytes + location.len_bytes);
        while offset < end {
            let n = (end - offset).min(buffer.len() as u64);
            let piece = &mut buffer[..n as usize];
            file.read_exact_at(piece, offset)?;
            hasher.update(piece);
            offset += n;
        }
        Ok(hasher.finalize())
    }

    fn add_shards(&mut self, index_path: &Path) -> Result<(), ModelError> {
        let bad = |reason| ModelError::BadCheckpoint { path: index_path.to_owned(), reason };
        let index: Index = serde_json::from_str(&read_text(index_path, self.limits.index_bytes)?)
            .map_err(|source| ModelError::Json { file: index_path.display().to_string(), source })?;
        let mut shards: Vec<&String> = index.weight_map.values().collect::<HashSet<_>>().into_iter().collect();
        shards.sort_unstable();
        for shard in shards {
            // The index must not lead out of the model's directory.
            let mut parts = Path::new(shard).components();
            let is_plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            if !is_plain || shard.chars().any(char::is_control) {
                return Err(bad(format!("shard name {:?} is not a plain file name", printable(shard))));
            }
            self.add_file(self.dir.join(shard))?;
        }
        for (tensor, shard) in &index.weight_map {
            let found = self.tensors.get(&self.own_name(tensor.clone())).map(|at| &self.files[at.file].path);
            if found != Some(&self.dir.join(shard)) {
                let reason = format!("tensor {} is not in {}, where it says", printable(tensor), printable(shard));
                self.misplaced.insert(self.own_name(tensor.clone()), reason);
            }
        }
        Ok(())
    }

    /// Reads a safetensors header: 8 bytes of length, then JSON, then the tensors' bytes without holes.
    fn add_file(&mut self, path: PathBuf) -> Result<(), ModelError> {
        let bad = |reason: String| ModelError::BadCheckpoint { path: path.clone(), reason };
        let file = open_regular(&path)?;
        let (header, data_start) = Header::read(&file, self.limits.header_bytes).map_err(|error| match error {
            HeaderError::Read { source } => ModelError::Io { path: path.clone(), source },
            broken => match read_head(&file).ok().and_then(|head| recognize_head(&head)) {
                Some(advice) => ModelError::OtherFile { path: path.clone(), advice: advice.to_owned() },
                None => bad(broken.to_string()),
            },
        })?;
        let number = self.files.len();
        for HeaderTensor { name, dtype, shape, begin, end, .. } in header.tensors {
            let (offset_bytes, len_bytes) = (data_start + begin, end - begin);
            let name = self.own_name(name);
            let (quantised, differs) = (None, Differs::Not);
            let location = Location { file: number, dtype, shape, offset_bytes, len_bytes, quantised, differs };
            if let Some(other) = self.tensors.get(&name) {
                let other = self.files[other.file].path.display();
                return Err(bad(format!("tensor {} is also in {other}", printable(&name))));
            }
            self.tensors.insert(name, location);
        }
        self.files.push(DataFile { path, source: Arc::new(file) });
        Ok(())
    }

    /// The name under which a tensor of the files is known.
    fn own_name(&self, name: String) -> String {
        if self.is_part { name_in_text_part(name) } else { name }
    }

    /// The names of all tensors, in no order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor, by its full name.
    ///
    /// # Errors
    /// A tensor that is missing, or larger than the limit.
    pub fn shape(&self, tensor: &str) -> Result<&[usize], ModelError> {
        Ok(&self.find(tensor)?.shape)
    }

    /// Reads a tensor of half-precision values, by its full name.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    pub fn halves(&self, tensor: &str, shape: &[usize]) -> Result<Vec<f16>, ModelError> {
        let location = self.find(tensor)?;
        self.check_dtype(tensor, location, &[Dtype::F16], "F16")?;
        match self.elements(tensor, shape)? {
            Elements::F16(values) => Ok(values),
            _ => unreachable!("elements keep the type that was just checked"),
        }
    }

    /// Reads a tensor of `len` bytes, by its full name, whatever its dimensions.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    pub fn bytes(&self, tensor: &str, len: usize) -> Result<Vec<u8>, ModelError> {
        let location = self.find(tensor)?;
        self.check_dtype(tensor, location, &[Dtype::U8], "U8")?;
        // No overflow: the header was held against the file's length.
        if location.shape.iter().product::<usize>() != len {
            return Err(self.wrong_shape(tensor, location, &[len]));
        }
        let mut bytes = vec![0; len];
        self.read(location, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn find(&self, tensor: &str) -> Result<&Location, ModelError> {
        if let Some(reason) = self.misplaced.get(tensor) {
            let path = self.dir.join("model.safetensors.index.json");
            return Err(ModelError::BadCheckpoint { path, reason: reason.clone() });
        }
        let missing = || ModelError::MissingTensor { tensor: tensor.to_owned(), place: self.dir.clone() };
        let location = self.tensors.get(tensor).ok_or_else(missing)?;
        let bytes = location.element_bytes();
        if bytes > self.limits.tensor_bytes {
            let reason = format!("tensor {tensor} has {bytes} bytes; the limit is {}", self.limits.tensor_bytes);
            return Err(ModelError::BadCheckpoint { path: self.files[location.file].path.clone(), reason });
        }
        Ok(location)
    }

    fn locate(&self, tensor: &str, expected: &[usize]) -> Result<&Location, ModelError> {
        let location = self.find(tensor)?;
        self.check_dtype(tensor, location, &[Dtype::F32, Dtype::F16, Dtype::BF16], "F32, F16 or BF16")?;
        if location.shape != expected {
            return Err(self.wrong_shape(tensor, location, expected));
        }
        Ok(location)
    }

    fn check_dtype(
        &self,
        tensor: &str,
        location: &Location,
        allowed: &[Dtype],
        expected: &'static str,
    ) -> Result<(), ModelError> {
        if allowed.contains(&location.dtype) {
            return Ok(());
        }
        let path = self.files[location.file].path.clone();
        Err(ModelError::WrongDtype {
            tensor: tensor.to_owned(),
            path,
            found: location.type_name().to_owned(),
            expected,
        })
    }

    fn wrong_shape(&self, tensor: &str, location: &Location, expected: &[usize]) -> ModelError {
        ModelError::WrongShape {
            tensor: tensor.to_owned(),
            path: self.files[location.file].path.clone(),
            found: location.shape.clone(),
            expected: expected.to_vec(),
        }
    }

    /// Fills `bytes` from byte `first` of a tensor on.
    fn read(&self, location: &Location, first: usize, bytes: &mut [u8]) -> Result<(), ModelError> {
        self.files[location.file].read_exact_at(bytes, location.offset_bytes + first as u64)
    }

    /// Reads the elements of any tensor, by its full name, in the type they are stored in.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    pub fn elements(&self, tensor: &str, shape: &[usize]) -> Result<Elements, ModelError> {
        self.part(tensor, shape, 0..shape.iter().product())
    }

    /// Reads some of the elements of a tensor of this shape, which has them.
    fn part(&self, tensor: &str, shape: &[usize], range: Range<usize>) -> Result<Elements, ModelError> {
        let location = self.locate(tensor, shape)?;
        let n_rows = shape[0];
        match location.differs {
            Differs::Not => return self.stored(tensor, location, range),
            Differs::Interleaved(heads) if heads == 0 || !n_rows.is_multiple_of(2 * heads) => {
                return Err(self.wrong_shape(tensor, location, &[2 * heads]));
            }
            _ => {}
        }
        let all = self.stored(tensor, location, 0..shape.iter().product())?;
        Ok(location.differs.undone(all, n_rows, range))
    }

    /// Reads some of the elements of a tensor in the order in which they are stored; of a quantised one, whole blocks.
    fn stored(&self, tensor: &str, location: &Location, range: Range<usize>) -> Result<Elements, ModelError> {
        // The header was held against the file's length, so this asks for no more memory than the file has bytes; of quantised tensors, for eight
        // times as much.
        let (first, len) = (range.start, range.len());
        let offset = first * location.dtype.bits() as usize / 8;
        let finite = |first_bad: Option<(usize, f32)>| match first_bad {
            None => Ok(()),
            Some((index, value)) => Err(ModelError::NotFinite {
                tensor: tensor.to_owned(),
                path: self.files[location.file].path.clone(),
                index: first + index,
                value,
            }),
        };
        if let Some(kind) = location.quantised {
            let file = &self.files[location.file];
            let mut values = vec![f16::ZERO; len];
            let read = gguf::read_halves(&file.source, kind, location.offset_bytes, first, &mut values);
            read.map_err(|source| ModelError::Gguf { path: file.path.clone(), source })?;
            finite(values.iter().position(|v| !v.is_finite()).map(|i| (i, values[i].to_f32())))?;
            return Ok(Elements::F16(values));
        }
        // Files are little-endian; `from_le` does nothing on machines that are, too.
        match location.dtype {
            Dtype::F32 => {
                let mut values = vec![0.0_f32; len];
                self.read(location, offset, bytemuck::cast_slice_mut(&mut values))?;
                values.iter_mut().for_each(|v| *v = f32::from_bits(u32::from_le(v.to_bits())));
                finite(values.iter().position(|v| !v.is_finite()).map(|i| (i, values[i])))?;
                Ok(Elements::F32(values))
            }
            Dtype::F16 => {
                let mut values = vec![f16::ZERO; len];
                self.read(location, offset, bytemuck::cast_slice_mut(&mut values))?;
                values.iter_mut().for_each(|v| *v = f16::from_bits(u16::from_le(v.to_bits())));
                finite(values.iter().position(|v| !v.is_finite()).map(|i| (i, values[i].to_f32())))?;
                Ok(Elements::F16(values))
            }
            _ => {
                let mut values = vec![bf16::ZERO; len];
                self.read(location, offset, bytemuck::cast_slice_mut(&mut values))?;
                values.iter_mut().for_each(|v| *v = bf16::from_bits(u16::from_le(v.to_bits())));
                finite(values.iter().position(|v| !v.is_finite()).map(|i| (i, values[i].to_f32())))?;
                Ok(Elements::Bf16(values))
            }
        }
    }
}
