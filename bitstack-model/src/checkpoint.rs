//! Reading a Hugging Face model directory, one tensor at a time.
//!
//! A directory holds `config.json` and either `model.safetensors` or an index and its shards. Opening reads the headers
//! only, and checks that every tensor the config implies is there with the right shape and type. A tensor is then read by
//! position when it is asked for: no memory map, and never more in memory than the caller keeps.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{Error, ErrorKind, Read};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use ndarray::Array2;
use serde::Deserialize;

use crate::chat::ChatTemplate;
use crate::{Dense, Elements, ModelConfig, ModelError, VectorSpec, WeightSpec};
use bitstack_io::hostile::printable;
use bitstack_io::safetensors::{Header, HeaderError, HeaderTensor};
use bitstack_io::{Dtype, ReadAt};

/// What a checkpoint may make its reader use.
///
/// Opening takes at most [`CheckpointLimits::OPENING_BYTES_PER_BYTE`] bytes of memory for each byte of the configs, the index and the headers, which
/// must be there and within their limits before any of them is read, and 1 MiB; reading a tensor its own bytes, which must be in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointLimits {
    /// Most bytes of a config. By default 1 MiB: those in use have some kilobytes.
    pub config_bytes: u64,
    /// Most bytes of the index of the shards. By default 16 MiB: the largest in use have some megabytes.
    pub index_bytes: u64,
    /// Most bytes of the header of a safetensors file. By default 100 MB, the format's own limit.
    pub header_bytes: u64,
    /// Most bytes of another file that is read whole. By default 256 MiB: the largest `tokenizer.json` in use have some tens of megabytes.
    pub companion_bytes: u64,
    /// Most bytes of one tensor. By default 64 GiB.
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

/// The files that make a checkpoint usable and travel with it, in this order.
const COMPANIONS: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// An opened model directory.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    config_text: String,
    limits: CheckpointLimits,
    files: Vec<DataFile>,
    tensors: HashMap<String, Location>,
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
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens a directory with the default [`CheckpointLimits`]: reads its configs and tensor headers, and checks that they fit together.
    ///
    /// # Errors
    /// No or malformed config, unsupported architecture, no checkpoint, damaged header, missing tensor, wrong shape or dtype.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, ModelError> {
        Self::open_with(dir, &CheckpointLimits::default())
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`ModelError::FileTooLarge`] and [`ModelError::BadCheckpoint`] for what is beyond `limits`.
    pub fn open_with(dir: impl AsRef<Path>, limits: &CheckpointLimits) -> Result<Self, ModelError> {
        let checkpoint = Self::open_headers(dir.as_ref(), limits)?;
        for weight in checkpoint.config.weights() {
            checkpoint.locate(&weight.tensor_name(), &weight.tensor_shape())?;
        }
        for vector in checkpoint.config.other_tensors() {
            checkpoint.locate(&vector.name, &[vector.len])?;
        }
        Ok(checkpoint)
    }

    /// Opens a directory whatever its tensors are: each is checked when it is read. For layouts other than that of Hugging Face.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with), but nothing about tensors that are missing or of other shapes and types.
    pub fn open_headers(dir: &Path, limits: &CheckpointLimits) -> Result<Self, ModelError> {
        let dir = dir.to_owned();
        let read_text = |path: &Path| read_text(path, limits.config_bytes);
        let config_text = read_text(&dir.join("config.json"))?;
        let mut config = ModelConfig::from_json(&config_text)?;
        let generation = dir.join("generation_config.json");
        if exists(&generation)? {
            config.add_generation_config(&read_text(&generation)?)?;
        }

        let mut checkpoint =
            Self { dir, config, config_text, limits: *limits, files: Vec::new(), tensors: HashMap::new() };
        let single = checkpoint.dir.join("model.safetensors");
        let index = checkpoint.dir.join("model.safetensors.index.json");
        if exists(&single)? {
            checkpoint.add_file(single)?;
        } else if exists(&index)? {
            checkpoint.add_shards(&index)?;
        } else {
            return Err(ModelError::NoCheckpoint { dir: checkpoint.dir });
        }
        Ok(checkpoint)
    }

    /// The directory.
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

    /// `config.json` as it stands in the directory.
    pub fn config_text(&self) -> &str {
        &self.config_text
    }

    /// Name and bytes of every file that should travel with the weights and is there: configs, tokenizer, chat template.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn companions(&self) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
        let mut files = Vec::new();
        for name in COMPANIONS {
            let path = self.dir.join(name);
            if exists(&path)? {
                files.push((name.to_owned(), read_whole(&path, self.limits.companion_bytes)?));
            }
        }
        Ok(files)
    }

    /// One companion file, such as `tokenizer.json`.
    ///
    /// # Errors
    /// A file that is missing or cannot be read.
    pub fn companion(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        read_whole(&self.dir.join(name), self.limits.companion_bytes)
    }

    /// Whether there is a companion file of this name.
    ///
    /// # Errors
    /// A directory that cannot be looked into.
    pub fn has_companion(&self, name: &str) -> Result<bool, ModelError> {
        exists(&self.dir.join(name))
    }

    /// The model's chat template, if it has one.
    ///
    /// # Errors
    /// Files that cannot be read; those of [`ChatTemplate::find`].
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, ModelError> {
        ChatTemplate::find(|name| self.has_companion(name)?.then(|| self.companion(name)).transpose())
    }

    /// Bytes that the model's tensors take in the checkpoint.
    pub fn stored_bytes(&self) -> u64 {
        let names = self.config.weights().into_iter().filter(|w| w.first_row == 0).map(|w| w.tensor_name());
        let names = names.chain(self.config.other_tensors().iter().map(|v| v.name.clone()));
        names.filter_map(|name| self.tensors.get(&name)).map(|at| at.len_bytes).sum()
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
        hasher.update(location.dtype.name().as_bytes());
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
            let found = self.tensors.get(tensor).map(|at| &self.files[at.file].path);
            if found != Some(&self.dir.join(shard)) {
                let tensor = printable(tensor);
                return Err(bad(format!("tensor {tensor} is not in {}, where the index says it is", printable(shard))));
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
            broken => bad(broken.to_string()),
        })?;
        let number = self.files.len();
        for HeaderTensor { name, dtype, shape, begin, end, .. } in header.tensors {
            let (offset_bytes, len_bytes) = (data_start + begin, end - begin);
            let location = Location { file: number, dtype, shape, offset_bytes, len_bytes };
            if let Some(other) = self.tensors.get(&name) {
                let other = self.files[other.file].path.display();
                return Err(bad(format!("tensor {} is also in {other}", printable(&name))));
            }
            self.tensors.insert(name, location);
        }
        self.files.push(DataFile { path, source: Arc::new(file) });
        Ok(())
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
        let missing = || ModelError::MissingTensor { tensor: tensor.to_owned(), place: self.dir.clone() };
        let location = self.tensors.get(tensor).ok_or_else(missing)?;
        let bytes = location.len_bytes;
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
        Err(ModelError::WrongDtype { tensor: tensor.to_owned(), path, found: location.dtype.to_string(), expected })
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
        // The header was held against the file's length, so this asks for no more memory than the file has bytes.
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

fn exists(path: &Path) -> Result<bool, ModelError> {
    path.try_exists().map_err(|source| ModelError::Io { path: path.to_owned(), source })
}

/// Opens what is a file and nothing else: to open a pipe is to wait for somebody to write to it.
fn open_regular(path: &Path) -> Result<File, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(io(Error::new(ErrorKind::InvalidInput, "it is not a regular file")));
    }
    File::open(path).map_err(io)
}

fn read_whole(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let file = open_regular(path)?;
    let bytes = file.metadata().map_err(io)?.len();
    if bytes > limit {
        return Err(ModelError::FileTooLarge { path: path.to_owned(), bytes, limit });
    }
    let mut contents = Vec::with_capacity(bytes as usize);
    // One more than it had, to notice if it grows.
    file.take(bytes + 1).read_to_end(&mut contents).map_err(io)?;
    if contents.len() as u64 > bytes {
        return Err(io(Error::new(ErrorKind::InvalidData, "it is being written to")));
    }
    Ok(contents)
}

fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let text = String::from_utf8(read_whole(path, limit)?);
    text.map_err(|e| ModelError::Io {
        path: path.to_owned(),
        source: Error::new(ErrorKind::InvalidData, e.utf8_error()),
    })
}
