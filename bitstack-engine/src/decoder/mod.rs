//! The decoder: RMS norms, rotary positions, grouped-query attention, feed-forward parts; generic over its weights and the device it runs on.
//!
//! Hidden states are tokens x hidden, f32, row-major. One layer of most families is
//!
//! ```text
//! n = rms_norm(h);  q, k, v = n Wqᵀ, n Wkᵀ, n Wvᵀ (+ bias, + norm per head);  rotate q, k;  h += attention(q, k, v) Woᵀ
//! n = rms_norm(h);  h += (silu(n Wgateᵀ) ⊙ n Wupᵀ) Wdownᵀ
//! ```
//!
//! in the conventions of the Hugging Face library, whose logits it reproduces to about 1e-5. Embedding, layers and head
//! can be called one by one ([`Decoder::embed`], [`Decoder::layer`], [`Decoder::logits`]), so that a layer can be run
//! again and again on stored hidden states.

mod backward;
mod layer;
mod pass;

pub use pass::{Observer, Pass, Workspace};

pub use backward::Visit;

use crate::EngineError;
use crate::device::{Columns, Cpu, Device, Done, Sequence, Weight};
use bitstack_model::config::Norm;
use bitstack_model::{Checkpoint, Dense, ModelConfig, Progress, VectorSpec, WeightSpec};
use ndarray::{Array2, ArrayView2};
use pass::{Parts, Scratch};
use std::collections::HashMap;
use std::sync::Arc;

/// A decoder-only language model.
///
/// Clones share all but the weights; they share the weights as well where `W` is a shared pointer.
#[derive(Debug, Clone)]
pub struct Decoder<W, D: Device = Cpu> {
    frame: Arc<Frame<D>>,
    /// In the order of [`ModelConfig::weights`].
    weights: Vec<W>,
}

/// All of a decoder but its weights: config, norms, biases, the tables of rotary angles, on the device.
///
/// It is what stays when the weights change, so that a decoder over others is made for nothing
/// ([`Decoder::with_frame`]).
#[derive(Debug)]
pub struct Frame<D: Device = Cpu> {
    device: D,
    config: ModelConfig,
    /// In the order of [`ModelConfig::other_tensors`].
    vectors: Vec<D::Buffer>,
    /// For each layer.
    ropes: Vec<Arc<D::Rope>>,
}

impl Decoder<Dense> {
    /// Loads a whole checkpoint, every weight in the type it is stored in.
    ///
    /// # Errors
    /// As [`Checkpoint::weight`].
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        Self::load_with(checkpoint, &())
    }

    /// As [`load`](Self::load), telling `progress` of every weight.
    ///
    /// # Errors
    /// As [`Checkpoint::weight`].
    pub fn load_with(checkpoint: &Checkpoint, progress: &dyn Progress) -> Result<Self, EngineError> {
        Self::load_on(Cpu, checkpoint, progress)
    }

    /// The same model with every weight widened to f32: a few percent faster, twice the memory.
    pub fn widened(self) -> Self {
        Self { weights: self.weights.into_iter().map(Dense::widened).collect(), ..self }
    }
}

impl<D: Device> Decoder<Dense, D>
where
    Dense: Weight<D>,
{
    /// Loads a whole checkpoint for a device, telling `progress` of every weight.
    ///
    /// # Errors
    /// As [`Checkpoint::weight`]; those of the device.
    pub fn load_on(device: D, checkpoint: &Checkpoint, progress: &dyn Progress) -> Result<Self, EngineError> {
        let config = checkpoint.config().clone();
        progress.stage("load (weights)", config.weights().len() as u64);
        let frame = Frame::on(device, config, |spec| Ok::<_, EngineError>(checkpoint.vector(spec)?))?;
        Self::with_frame(Arc::new(frame), |_, spec| {
            progress.advance(1);
            Ok(checkpoint.weight(spec)?)
        })
    }
}

impl Frame {
    /// A frame from its parts: `vector(spec)` gives the values of each of [`ModelConfig::other_tensors`].
    ///
    /// # Errors
    /// Those of the closure, and [`EngineError::OperatorShape`] for a part of the wrong size.
    pub fn new<E: From<EngineError>>(
        config: ModelConfig,
        vector: impl FnMut(&VectorSpec) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        Self::on(Cpu, config, vector)
    }
}

impl<D: Device> Frame<D> {
    /// As [`new`](Frame::new), on a device.
    ///
    /// # Errors
    /// As [`new`](Frame::new), and those of the device.
    pub fn on<E: From<EngineError>>(
        device: D,
        config: ModelConfig,
        mut vector: impl FnMut(&VectorSpec) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let mut queue = device.queue(crate::Threads::One)?;
        let offsets: HashMap<usize, f32> = config.norms().map(|norm| (norm.weight.index(), norm.offset)).collect();
        let mut vectors = Vec::with_capacity(config.other_tensors().len());
        for (i, spec) in config.other_tensors().iter().enumerate() {
            let mut values = vector(spec)?;
            if values.len() != spec.len {
                let (found_cols, cols) = (values.len(), spec.len);
                let name = spec.name.clone();
                return Err(EngineError::OperatorShape { name, found_rows: 1, found_cols, rows: 1, cols }.into());
            }
            if let Some(offset) = offsets.get(&i).filter(|offset| **offset != 0.0) {
                values.iter_mut().for_each(|v| *v += offset);
            }
            let mut buffer = D::Buffer::default();
            D::write(&mut queue, &values, &mut buffer)?;
            vectors.push(buffer);
        }
        let mut tables = HashMap::new();
        let mut ropes = Vec::with_capacity(config.n_layers());
        for layer in &config.layers {
            let key = (layer.attention.rope, layer.attention.head_dim);
            if let std::collections::hash_map::Entry::Vacant(place) = tables.entry(key) {
                place.insert(Arc::new(device.rope(&config.ropes[key.0], key.1, config.max_positions)?));
            }
            ropes.push(Arc::clone(&tables[&key]));
        }
        Ok(Self { device, config, vectors, ropes })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device it is on.
    pub fn device(&self) -> &D {
        &self.device
    }
}

impl<W: Weight<D>, D: Device> Decoder<W, D> {
    /// A decoder from a frame, and the weights: `weight(index, spec)` gives each in the order of [`ModelConfig::weights`].
    ///
    /// # Errors
    /// Those of the closure, and [`EngineError::OperatorShape`] for a weight of the wrong size.
    pub fn with_frame<E: From<EngineError>>(
        frame: Arc<Frame<D>>,
        mut weight: impl FnMut(usize, &WeightSpec) -> Result<W, E>,
    ) -> Result<Self, E> {
        let mut weights = Vec::new();
        for (index, spec) in frame.config.weights().iter().enumerate() {
            let weight = weight(index, spec)?;
            check_weight(&weight, spec)?;
            weights.push(weight);
        }
        Ok(Self { frame, weights })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.frame.config
    }

    /// All weights, in the order of [`ModelConfig::weights`].
    pub fn weights(&self) -> &[W] {
        &self.weights
    }

    /// Puts another weight in the place of weight `index` and gives back the old one.
    ///
    /// # Errors
    /// [`EngineError::OperatorShape`] when the new one has another shape; the decoder is unchanged.
    ///
    /// # Panics
    /// When `index` is not the index of a weight.
    pub fn replace(&mut self, index: usize, weight: W) -> Result<W, EngineError> {
        let old = &mut self.weights[index];
        if (weight.rows(), weight.cols()) != (old.rows(), old.cols()) {
            check_weight(&weight, &self.frame.config.weights()[index])?;
        }
        Ok(std::mem::replace(old, weight))
    }

    /// Weight `index`, for changes that keep its shape.
    ///
    /// # Panics
    /// When `index` is not the index of a weight.
    pub fn weight_mut(&mut self, index: usize) -> &mut W {
        &mut self.weights[index]
    }

    /// Embeds tokens: tokens x hidden.
    ///
    /// # Errors
    /// No tokens, or one outside the vocabulary.
    pub fn embed(&self, tokens: &[u32]) -> Result<Array2<f32>, EngineError> {
        let mut pass = Pass::new();
        self.embed_tokens(tokens, &mut pass)?;
        self.state(tokens.len(), &mut pass)
    }

    /// Runs one layer on `hidden` (tokens x hidden) in place.
    ///
    /// The tokens follow those that the pass's cache holds for this layer, and are the start of the sequence without one; of
    /// several sequences see [`Pass::with_caches`].
    ///
    /// # Errors
    /// [`EngineError::ContextFull`] when the positions run past a cache or the model; [`EngineError::StateShape`];
    /// [`EngineError::UnevenRows`] for several sequences. The caches are unchanged then. Those of the device.
    ///
    /// # Panics
    /// When there is no layer of this number.
    pub fn layer(&self, layer: usize, hidden: &mut Array2<f32>, pass: &mut Pass<'_, D>) -> Result<(), EngineError> {
        let rows = hidden.nrows();
        self.put_state("hidden", hidden.view(), pass)?;
        self.run_layer(layer, rows, pass)?;
        *hidden = self.state(rows, pass)?;
        Ok(())
    }

    /// Final norm and head of hidden states behind the last layer: tokens x vocabulary.
    ///
    /// Take few rows at a time where the vocabulary is large.
    ///
    /// # Errors
    /// [`EngineError::StateShape`]; those of the device.
    pub fn logits(&self, hidden: ArrayView2<'_, f32>, pass: &mut Pass<'_, D>) -> Result<Array2<f32>, EngineError> {
        self.put_state("hidden", hidden, pass)?;
        self.all_logits(hidden.nrows(), pass)
    }

    /// Shows the head's input to the pass's observer, without running the head.
    ///
    /// # Errors
    /// [`EngineError::StateShape`]; those of the device.
    pub fn observe_head(&self, hidden: ArrayView2<'_, f32>, pass: &mut Pass<'_, D>) -> Result<(), EngineError> {
        self.put_state("hidden", hidden, pass)?;
        self.head_input(hidden.nrows(), &mut pass.parts(&self.frame.device)?)
    }

    /// Embedding and all layers: the hidden states behind the last one, tokens x hidden.
    ///
    /// # Errors
    /// Those of [`embed`](Self::embed) and [`layer`](Self::layer).
    pub fn hidden(&self, tokens: &[u32], pass: &mut Pass<'_, D>) -> Result<Array2<f32>, EngineError> {
        self.run(tokens, pass)?;
        self.state(tokens.len(), pass)
    }

    /// The whole model: logits of every token, tokens x vocabulary.
    ///
    /// # Errors
    /// Those of [`embed`](Self::embed) and [`layer`](Self::layer).
    pub fn forward(&self, tokens: &[u32], pass: &mut Pass<'_, D>) -> Result<Array2<f32>, EngineError> {
        self.run(tokens, pass)?;
        self.all_logits(tokens.len(), pass)
    }

    /// The whole model, for the logits behind the last token of each sequence of the pass: sequences x vocabulary, row-major. From the second such
    /// call of a pass on, nothing is allocated but for caches that grow.
    ///
    /// # Errors
    /// Those of [`embed`](Self::embed) and [`layer`](Self::layer).
    pub fn last_logits<'p>(&self, tokens: &[u32], pass: &'p mut Pass<'_, D>) -> Result<&'p [f32], EngineError> {
        self.run(tokens, pass)?;
        let width = self.frame.config.hidden_size;
        let mut parts = pass.parts(&self.frame.device)?;
        let (mut last, n) = (0, parts.sequences.len());
        for (i, Sequence { rows, .. }) in parts.sequences.iter().enumerate() {
            last += rows;
            let Scratch { state, routed, .. } = &mut *parts.scratch;
            D::reserve(parts.queue, routed, n * width)?;
            D::copy(parts.queue, state, (last - 1) * width..last * width, routed, i * width)?;
        }
        std::mem::swap(&mut parts.scratch.state, &mut parts.scratch.routed);
        self.run_head(n, &mut parts)?;
        pass.take_logits(&self.frame.device, n * self.frame.config.vocab_size)?;
        Ok(&pass.work.host)
    }

    /// Embedding and all layers, in the pass.
    fn run(&self, tokens: &[u32], pass: &mut Pass<'_, D>) -> Done {
        self.embed_tokens(tokens, pass)?;
        (0..self.frame.config.n_layers()).try_for_each(|layer| self.run_layer(layer, tokens.len(), pass))
    }

    fn embed_tokens(&self, tokens: &[u32], pass: &mut Pass<'_, D>) -> Done {
        let config = &self.frame.config;
        if tokens.is_empty() {
            return Err(EngineError::NoTokens);
        }
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= config.vocab_size) {
            return Err(EngineError::TokenOutOfRange { token, vocab_size: config.vocab_size });
        }
        let Parts { queue, scratch, .. } = pass.parts(&self.frame.device)?;
        let len = tokens.len() * config.hidden_size;
        D::reserve(queue, &mut scratch.state, len)?;
        for (i, &token) in tokens.iter().enumerate() {
            let (part, row) = (token as usize / config.vocab_part_rows, token as usize % config.vocab_part_rows);
            self.weights[part].look_up(queue, row, &mut scratch.state, i)?;
        }
        match config.embedding_scale {
            Some(scale) => D::scale(queue, &mut scratch.state, len, scale),
            None => Ok(()),
        }
    }

    fn run_layer(&self, layer: usize, rows: usize, pass: &mut Pass<'_, D>) -> Done {
        pass.place(layer, rows, self.frame.config.max_positions)?;
        layer::Layer { decoder: self, index: layer, rows }.run(&mut pass.parts(&self.frame.device)?)
    }

    /// The final norm of the state, in `normed`.
    fn head_input(&self, rows: usize, pass: &mut Parts<'_, '_, D>) -> Done {
        let Frame { config, vectors, .. } = &*self.frame;
        let (Norm { weight, eps, .. }, width) = (config.norm, config.hidden_size);
        let Scratch { state, normed, .. } = &mut *pass.scratch;
        D::reserve(pass.queue, normed, rows * width)?;
        D::norm(pass.queue, state, rows, &vectors[weight.index()], width, eps, normed)?;
        pass.observe_range(config.head(), |s| &s.normed, [rows, width])
    }

    /// Final norm and head of the state, in `logits`.
    fn run_head(&self, rows: usize, pass: &mut Parts<'_, '_, D>) -> Done {
        self.head_input(rows, pass)?;
        let config = &self.frame.config;
        let Scratch { normed, logits, .. } = &mut *pass.scratch;
        D::reserve(pass.queue, logits, rows * config.vocab_size)?;
        for (i, part) in self.weights[config.head()].iter().enumerate() {
            let place = Columns { first: i * config.vocab_part_rows, stride: config.vocab_size };
            part.multiply(pass.queue, normed, rows, logits, place)?;
        }
        match config.logit_cap {
            Some(cap) => D::cap(pass.queue, logits, rows * config.vocab_size, cap),
            None => Ok(()),
        }
    }

    fn all_logits(&self, rows: usize, pass: &mut Pass<'_, D>) -> Result<Array2<f32>, EngineError> {
        let parts = &mut pass.parts(&self.frame.device)?;
        self.run_head(rows, parts)?;
        take::<D>(parts.queue, &mut parts.scratch.logits, [rows, self.frame.config.vocab_size])
    }

    fn put_state(&self, what: &'static str, state: ArrayView2<'_, f32>, pass: &mut Pass<'_, D>) -> Done {
        check_state(what, state, self.frame.config.hidden_size)?;
        let Parts { queue, scratch, .. } = pass.parts(&self.frame.device)?;
        let state = state.as_standard_layout();
        D::write(queue, state.as_slice().expect("made standard above"), &mut scratch.state)
    }

    fn state(&self, rows: usize, pass: &mut Pass<'_, D>) -> Result<Array2<f32>, EngineError> {
        let Parts { queue, scratch, .. } = pass.parts(&self.frame.device)?;
        take::<D>(queue, &mut scratch.state, [rows, self.frame.config.hidden_size])
    }
}

/// A matrix at the start of a buffer.
fn take<D: Device>(
    queue: &mut D::Queue,
    buffer: &mut D::Buffer,
    [rows, cols]: [usize; 2],
) -> Result<Array2<f32>, EngineError> {
    let values = D::take(queue, buffer, rows * cols)?;
    Ok(Array2::from_shape_vec((rows, cols), values).expect("as many as asked for"))
}

/// Checks that a weight has the shape that a model needs.
///
/// # Errors
/// [`EngineError::OperatorShape`].
pub fn check_weight<D: Device>(weight: &impl Weight<D>, spec: &WeightSpec) -> Result<(), EngineError> {
    if (weight.rows(), weight.cols()) == (spec.rows, spec.cols) {
        return Ok(());
    }
    Err(EngineError::OperatorShape {
        name: spec.name.clone(),
        found_rows: weight.rows(),
        found_cols: weight.cols(),
        rows: spec.rows,
        cols: spec.cols,
    })
}

fn check_state(what: &'static str, state: ArrayView2<'_, f32>, cols: usize) -> Result<(), EngineError> {
    let (found_rows, found_cols) = state.dim();
    if found_rows > 0 && found_cols == cols {
        return Ok(());
    }
    Err(EngineError::StateShape { what, found_rows, found_cols, rows: found_rows.max(1), cols })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Frequencies, Plain, Rope};
    use half::bf16;
    use std::collections::HashMap;
    use std::path::Path;

    #[derive(serde::Deserialize)]
    struct Expected {
        input_ids: Vec<u32>,
        logits: HashMap<usize, Vec<f32>>,
    }

    /// Against what the reference library computed.
    ///
    /// Its logits come from models that were converted to bf16 as a whole and back, which rounded the rotary
    /// frequencies too (no file stores them); the same rounding is made here, and `rope` makes a table from the result. With it everything else is
    /// held to the error of f32 sums in another order, and of six printed decimals. Without it logits differ by up to 8e-3.
    fn check<D: Device>(device: D, rope: impl Fn(Frequencies) -> D::Rope)
    where
        Dense: Weight<D>,
    {
        for name in ["llama", "llama31", "mistral", "mistral_window", "qwen2", "qwen3"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bitstack-model/tests/data").join(name);
            let checkpoint = Checkpoint::open(&dir).unwrap();
            let mut model = Decoder::load_on(device.clone(), &checkpoint, &()).unwrap();
            let frame = Arc::get_mut(&mut model.frame).unwrap();
            let mut frequencies = Frequencies::new(&frame.config.ropes[0], frame.config.layers[0].attention.head_dim);
            frequencies.first.iter_mut().for_each(|f| *f = bf16::from_f32(*f).to_f32());
            let rope = Arc::new(rope(frequencies));
            frame.ropes.fill(rope);
            let expected: Expected =
                serde_json::from_slice(&std::fs::read(dir.join("expected_logits.json")).unwrap()).unwrap();
            let logits = model.forward(&expected.input_ids, &mut Pass::new()).unwrap();
            assert_eq!(expected.logits.len(), 3);
            for (&position, row) in &expected.logits {
                assert_eq!(row.len(), logits.ncols());
                for (found, wanted) in logits.row(position).iter().zip(row) {
                    assert!((found - wanted).abs() < 2e-5, "{name}, position {position}: {found}, expected {wanted}");
                }
            }
        }
    }

    #[test]
    fn logits_of_every_architecture_are_those_of_the_reference_library() {
        check(Cpu, |frequencies| Rope::new(frequencies, 256));
        check(Plain, |frequencies| frequencies);
    }
}
