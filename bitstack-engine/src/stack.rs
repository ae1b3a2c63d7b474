//! Models made of stacks: a `.bitstack` file, or the draft of one, opened at the levels of a plan.

use crate::{Decoder, EngineError, Frame};
use bitstack_format::{BlockSource, Dtype, FormatError, Tensor};
use bitstack_model::chat::ChatTemplate;
use bitstack_model::{Dense, Elements, ModelConfig, Progress, Tokenizer, VectorSpec, WeightSpec};
use half::{bf16, f16};
use rayon::prelude::*;
use std::sync::Arc;

/// A decoder over the blocks of a source, each weight rebuilt in f32 at its level. Changing levels rebuilds the weights whose level
/// changed, and reads no others.
///
/// The rebuilt weights take 32 bits each, whatever the level: for measuring an order, where one weight after another goes to another level.
/// To use a model there is [`crate::ElasticModel`], which does without them.
#[derive(Debug)]
pub struct StackModel<'s, S: ?Sized> {
    source: &'s S,
    decoder: Decoder<Arc<Dense>>,
    /// Per stacked weight, its index in the model and its present level.
    stacked: Vec<(usize, u32)>,
}

impl<'s, S: BlockSource + Sync + ?Sized> StackModel<'s, S> {
    /// Opens the model with `levels[w]` blocks of weight `w` of the source.
    ///
    /// # Errors
    /// Malformed config, weights that are missing or have another shape than the config says, damaged blocks, levels that are 0 or
    /// more than there are blocks.
    pub fn open(source: &'s S, levels: &[u32], progress: &dyn Progress) -> Result<Self, EngineError> {
        let frame = frame(source)?;
        let specs = frame.config().weights();
        progress.stage("load (weights)", specs.len() as u64);
        let decoder = Decoder::with_frame(frame, |_, spec| {
            progress.advance(1);
            weight_at(source, spec, levels).map(Arc::new)
        })?;
        let place = |name: &str| specs.iter().position(|spec| spec.name == name).expect("the frame has a place for it");
        let level = |weight: usize| levels.get(weight).copied().unwrap_or(0);
        let stacked = source.weights().iter().enumerate().map(|(w, info)| (place(&info.name), level(w))).collect();
        Ok(Self { source, decoder, stacked })
    }

    /// Goes to other levels.
    ///
    /// # Errors
    /// Damaged blocks, levels out of range; weights already changed stay changed, so call it again or drop the model.
    pub fn set_levels(&mut self, levels: &[u32]) -> Result<(), EngineError> {
        for (weight, (index, level)) in self.stacked.iter_mut().enumerate() {
            let new = levels.get(weight).copied().unwrap_or(0);
            if new != *level {
                *self.decoder.weight_mut(*index) = Arc::new(rebuild(self.source, weight, new)?);
                *level = new;
            }
        }
        Ok(())
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder<Arc<Dense>> {
        &self.decoder
    }

    /// The model, taken out.
    pub fn into_decoder(self) -> Decoder<Arc<Dense>> {
        self.decoder
    }
}

/// The model's config, with its end tokens ([`ModelConfig::find_end_tokens`]).
///
/// # Errors
/// No or malformed `config.json`.
pub fn config<S: BlockSource + ?Sized>(source: &S) -> Result<ModelConfig, EngineError> {
    let config = ModelConfig::from_json(&String::from_utf8_lossy(&source.read_file("config.json")?))?;
    let mut config = config.cut_as(source.weights().iter().map(|info| &info.name[..]));
    config.find_end_tokens(|name| {
        let is_there = source.files().iter().any(|file| file.name == name);
        Ok::<_, EngineError>(is_there.then(|| source.read_file(name)).transpose()?)
    })?;
    Ok(config)
}

/// All of the model but its weights; every stacked weight has its place in it.
///
/// # Errors
/// No or malformed `config.json`, a stacked weight that it does not know, vectors that are missing or of another shape.
pub fn frame<S: BlockSource + ?Sized>(source: &S) -> Result<Arc<Frame>, EngineError> {
    let config = config(source)?;
    let specs = config.weights();
    if let Some(info) = source.weights().iter().find(|info| !specs.iter().any(|spec| spec.name == info.name)) {
        return Err(EngineError::StrayWeight { name: info.name.clone() });
    }
    Frame::new(config, |spec| vector(source, spec)).map(Arc::new)
}

/// A weight of the model: rebuilt from its first `levels[w]` blocks where it is weight `w` of the source, or as it was kept.
///
/// # Errors
/// As [`rebuild`]; a kept weight that is missing, or of another shape or type than the model's.
pub fn weight_at<S: BlockSource + ?Sized>(source: &S, spec: &WeightSpec, levels: &[u32]) -> Result<Dense, EngineError> {
    match source.weight_index(&spec.name) {
        None => kept(source, spec),
        Some(weight) => rebuild(source, weight, levels.get(weight).copied().unwrap_or(0)),
    }
}

/// The model's tokenizer.
///
/// # Errors
/// No or malformed `tokenizer.json`.
pub fn tokenizer<S: BlockSource + ?Sized>(source: &S) -> Result<Tokenizer, EngineError> {
    Ok(Tokenizer::from_bytes(&source.read_file("tokenizer.json")?)?)
}

/// The model's chat template, if the file has one: files that were written without it do not.
///
/// # Errors
/// Damaged files; those of [`ChatTemplate::find`].
pub fn chat_template<S: BlockSource + ?Sized>(source: &S) -> Result<Option<ChatTemplate>, EngineError> {
    ChatTemplate::find(|name| companion(source, name))
}

/// A companion file, if there is one of this name.
///
/// # Errors
/// A damaged file.
pub fn companion<S: BlockSource + ?Sized>(source: &S, name: &str) -> Result<Option<Vec<u8>>, EngineError> {
    let is_there = source.files().iter().any(|file| file.name == name);
    Ok(is_there.then(|| source.read_file(name)).transpose()?)
}

/// The name of the tensor of a weight that is not stacked. A part of one always is.
///
/// # Errors
/// [`FormatError::NoSuch`] for a part: the stack lacks it.
pub fn kept_name(spec: &WeightSpec) -> Result<String, EngineError> {
    if spec.rows == spec.tensor_rows {
        return Ok(spec.tensor_name());
    }
    Err(FormatError::NoSuch { what: "weight", name: spec.name.clone() }.into())
}

/// A weight that was not stacked.
pub(crate) fn kept<S: BlockSource + ?Sized>(source: &S, spec: &WeightSpec) -> Result<Dense, EngineError> {
    let tensor = source.read_tensor(&kept_name(spec)?)?;
    let shape = spec.tensor_shape();
    if tensor.shape != shape {
        let expected = shape.to_vec();
        return Err(EngineError::StackShape { name: spec.name.clone(), found: tensor.shape, expected });
    }
    let dense = Dense::new(spec.rows, spec.cols, elements(&spec.name, tensor)?);
    Ok(dense.expect("the reader checked the number of elements against the shape"))
}

/// A norm or a bias.
pub(crate) fn vector<S: BlockSource + ?Sized>(source: &S, spec: &VectorSpec) -> Result<Vec<f32>, EngineError> {
    Ok(elements(&spec.name, source.read_tensor(&spec.name)?)?.into_f32())
}

/// Rebuilds weight `weight` of the source from its first `level` blocks, in f32.
///
/// # Errors
/// Damaged blocks, a level that is 0 or more than there are blocks.
///
/// # Panics
/// When `weight` is not the index of a stacked weight.
pub fn rebuild<S: BlockSource + ?Sized>(source: &S, weight: usize, level: u32) -> Result<Dense, EngineError> {
    let info = &source.weights()[weight];
    let in_weight = |source| EngineError::Weight { name: info.name.clone(), source };
    let stack = source.read_stack(weight, level)?;
    let level = stack.level(level).map_err(in_weight)?;
    let (rows, cols) = (info.shape.rows(), info.shape.cols());
    let mut values = vec![0.0; rows * cols];
    // Enough rows that widening the bases for each part does not count.
    const ROWS: usize = 64;
    values
        .par_chunks_mut(ROWS * cols)
        .enumerate()
        .try_for_each(|(i, rows)| level.reconstruct_rows(i * ROWS, rows))
        .map_err(in_weight)?;
    Ok(Dense::new(rows, cols, Elements::F32(values)).expect("as many values as the shape"))
}

/// The elements of an unstacked tensor; its length was checked against its shape by the reader.
fn elements(name: &str, tensor: Tensor) -> Result<Elements, EngineError> {
    let halves = |data: &[u8]| data.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect::<Vec<_>>();
    Ok(match tensor.dtype {
        Dtype::F32 => Elements::F32(tensor.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Dtype::F16 => Elements::F16(halves(&tensor.data).into_iter().map(f16::from_bits).collect()),
        Dtype::BF16 => Elements::Bf16(halves(&tensor.data).into_iter().map(bf16::from_bits).collect()),
        other => return Err(EngineError::StackDtype { name: name.to_owned(), found: other.name() }),
    })
}

/// The stored type and little-endian bytes of elements, as a file holds them.
pub fn stored(elements: &Elements) -> (Dtype, Vec<u8>) {
    match elements {
        Elements::F32(v) => (Dtype::F32, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
        Elements::F16(v) => (Dtype::F16, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
        Elements::Bf16(v) => (Dtype::BF16, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
    }
}
