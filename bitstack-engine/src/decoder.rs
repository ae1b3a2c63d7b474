//! The decoder: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU; generic over its linear operators.
//!
//! Hidden states are tokens x hidden, f32, row-major. One layer is
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

pub use backward::{Transposed, Visit};

use std::ops::Range;
use std::sync::Arc;

use bitstack_model::{Checkpoint, Dense, ModelConfig, Progress, RopeConfig, VectorSpec, WEIGHTS_PER_LAYER, WeightSpec};
use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;

use crate::linear::{LinearOp, Threads};
use crate::{EngineError, math};

/// Sees the inputs of the linear operators as a pass goes by.
pub trait Observer {
    /// Called once per group of weights that read the same input, before they do: q, k, v; then o; gate, up; down; and the
    /// head, in all its parts (under tied embeddings they are those of the embedding).
    ///
    /// `weights` are indices into [`ModelConfig::weights`]; `x` is tokens x cols. Look-ups in the embedding are not seen.
    fn input(&mut self, weights: &[usize], x: ArrayView2<'_, f32>);
}

/// How a pass is run: with or without caches and an observer, on one thread or many. It also holds the buffers that the
/// layers share, so keep one for all calls on a sequence.
#[derive(Default)]
pub struct Pass<'a> {
    /// One per sequence; none: the rows are one sequence from its start.
    caches: &'a mut [KvCache],
    observer: Option<&'a mut dyn Observer>,
    threads: Threads,
    scratch: Scratch,
}

#[derive(Default)]
struct Scratch {
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    delta: Vec<f32>,
}

impl<'a> Pass<'a> {
    /// One thread, no cache (the tokens given are the whole sequence), no observer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Continues the sequence in `cache`, and adds to it.
    pub fn with_cache(self, cache: &'a mut KvCache) -> Self {
        self.with_caches(std::slice::from_mut(cache))
    }

    /// Continues several sequences in lockstep, one per cache, and adds to each: every weight is read once for all of them.
    ///
    /// Tokens and hidden states hold equally many rows of each sequence, those of the first one first: of `rows` rows and `n`
    /// caches, sequence `s` has the rows `s * rows / n .. (s + 1) * rows / n`. The sequences do not see each other, and must be
    /// equally long. No cache at all is as without this call.
    pub fn with_caches(mut self, caches: &'a mut [KvCache]) -> Self {
        self.caches = caches;
        self
    }

    /// Shows the inputs of all linear operators to `observer`.
    pub fn with_observer(mut self, observer: &'a mut dyn Observer) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Spreads every product over `threads`. The results stay the same.
    pub fn with_threads(mut self, threads: Threads) -> Self {
        self.threads = threads;
        self
    }

    /// Where `rows` rows go in layer `layer`: positions in front of them, and rows per sequence.
    fn place(&self, layer: usize, rows: usize, config: &ModelConfig) -> Result<(usize, usize), EngineError> {
        let n_sequences = self.caches.len().max(1);
        if !rows.is_multiple_of(n_sequences) {
            return Err(EngineError::UnevenRows { rows, sequences: n_sequences });
        }
        let positions = |cache: &KvCache| cache.layers[layer].0.len() / cache.kv_size;
        let past = self.caches.first().map_or(0, positions);
        if let Some(sequence) = self.caches.iter().position(|cache| positions(cache) != past) {
            let positions = positions(&self.caches[sequence]);
            return Err(EngineError::UnequalSequences { sequence, positions, first: past });
        }
        let needed = past + rows / n_sequences;
        let limit = self.caches.iter().map(|cache| cache.capacity).min().unwrap_or(config.max_positions);
        if needed > limit {
            return Err(EngineError::ContextFull { needed, limit });
        }
        Ok((past, rows / n_sequences))
    }

    fn observe(&mut self, weights: Range<usize>, x: ArrayView2<'_, f32>) {
        if let Some(observer) = &mut self.observer {
            observer.input(&weights.collect::<Vec<_>>(), x);
        }
    }
}

/// Keys and values of the tokens so far, per layer, with room for a fixed number of positions. Memory grows as they come.
#[derive(Debug, Clone)]
pub struct KvCache {
    /// Per layer, keys (rotated) and values, each positions x `kv_size`.
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    kv_size: usize,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for `capacity` positions of a model.
    ///
    /// # Errors
    /// [`EngineError::ContextFull`] when that is more than the model's limit.
    pub fn new(config: &ModelConfig, capacity: usize) -> Result<Self, EngineError> {
        if capacity > config.max_positions {
            return Err(EngineError::ContextFull { needed: capacity, limit: config.max_positions });
        }
        Ok(Self { layers: vec![Default::default(); config.n_layers], kv_size: config.kv_size(), capacity })
    }

    /// Positions in the cache.
    pub fn len(&self) -> usize {
        self.layers.last().map_or(0, |(k, _)| k.len() / self.kv_size)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in memory: what is allocated for the positions so far, which grows ahead of them.
    pub fn len_bytes(&self) -> u64 {
        self.layers.iter().map(|(k, v)| 4 * (k.capacity() + v.capacity()) as u64).sum()
    }

    /// Positions there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        for (k, v) in &mut self.layers {
            k.truncate(len.saturating_mul(self.kv_size));
            v.truncate(len.saturating_mul(self.kv_size));
        }
    }
}

/// A decoder-only language model.
///
/// Clones share all but the weights; they share the weights as well where `L` is a shared pointer.
#[derive(Debug, Clone)]
pub struct Decoder<L> {
    frame: Arc<Frame>,
    /// In the order of [`ModelConfig::weights`].
    weights: Vec<L>,
}

/// All of a decoder but its linear operators: config, norms, biases, the table of rotary angles.
///
/// It is what stays when the weights change, so that a decoder over other operators is made for nothing
/// ([`Decoder::with_frame`]).
#[derive(Debug, Clone)]
pub struct Frame {
    config: ModelConfig,
    layers: Vec<LayerVectors>,
    norm: Vec<f32>,
    rope: Rope,
}

/// Norms and biases of one layer.
#[derive(Debug, Clone, Default)]
struct LayerVectors {
    attention_norm: Vec<f32>,
    q_bias: Option<Vec<f32>>,
    k_bias: Option<Vec<f32>>,
    v_bias: Option<Vec<f32>>,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    o_bias: Option<Vec<f32>>,
    mlp_norm: Vec<f32>,
    gate_bias: Option<Vec<f32>>,
    up_bias: Option<Vec<f32>>,
    down_bias: Option<Vec<f32>>,
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
        let config = checkpoint.config().clone();
        progress.stage("load (weights)", config.weights().len() as u64);
        let weight = |_, spec: &WeightSpec| {
            progress.advance(1);
            Ok::<_, EngineError>(checkpoint.weight(spec)?)
        };
        Self::new(config, weight, |spec| Ok(checkpoint.vector(spec)?))
    }

    /// The same model with every weight widened to f32: a few percent faster, twice the memory.
    pub fn widened(self) -> Self {
        Self { weights: self.weights.into_iter().map(Dense::widened).collect(), ..self }
    }
}

impl Frame {
    /// A frame from its parts: `vector(spec)` gives the values of each of [`ModelConfig::other_tensors`].
    ///
    /// # Errors
    /// Those of the closure, and [`EngineError::OperatorShape`] for a part of the wrong size.
    pub fn new<E: From<EngineError>>(
        config: ModelConfig,
        mut vector: impl FnMut(&VectorSpec) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let mut layers: Vec<LayerVectors> = Vec::new();
        layers.resize_with(config.n_layers, LayerVectors::default);
        let mut norm = Vec::new();
        for spec in config.other_tensors() {
            let values = vector(&spec)?;
            if values.len() != spec.len {
                let (found_cols, cols) = (values.len(), spec.len);
                let error = EngineError::OperatorShape { name: spec.name, found_rows: 1, found_cols, rows: 1, cols };
                return Err(error.into());
            }
            let Some(rest) = spec.name.strip_prefix("model.layers.") else {
                norm = values;
                continue;
            };
            let (layer, part) = rest.split_once('.').expect("names of layers have a part");
            let layer = &mut layers[layer.parse::<usize>().expect("names of layers have a number")];
            match part {
                "input_layernorm.weight" => layer.attention_norm = values,
                "self_attn.q_proj.bias" => layer.q_bias = Some(values),
                "self_attn.k_proj.bias" => layer.k_bias = Some(values),
                "self_attn.v_proj.bias" => layer.v_bias = Some(values),
                "self_attn.q_norm.weight" => layer.q_norm = Some(values),
                "self_attn.k_norm.weight" => layer.k_norm = Some(values),
                "self_attn.o_proj.bias" => layer.o_bias = Some(values),
                "post_attention_layernorm.weight" => layer.mlp_norm = values,
                "mlp.gate_proj.bias" => layer.gate_bias = Some(values),
                "mlp.up_proj.bias" => layer.up_bias = Some(values),
                "mlp.down_proj.bias" => layer.down_bias = Some(values),
                other => unreachable!("other_tensors lists {other}, which no field takes"),
            }
        }
        let rope = Rope::new(Rope::inverse_frequencies(&config.rope, config.head_dim), config.max_positions);
        Ok(Self { config, layers, norm, rope })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
}

impl<L: LinearOp> Decoder<L> {
    /// A decoder from its parts.
    ///
    /// `weight(index, spec)` gives the operator of each weight in the order of [`ModelConfig::weights`]; `vector(spec)`
    /// the values of each of [`ModelConfig::other_tensors`].
    ///
    /// # Errors
    /// Those of the closures, and [`EngineError::OperatorShape`] for a part of the wrong size.
    pub fn new<E: From<EngineError>>(
        config: ModelConfig,
        weight: impl FnMut(usize, &WeightSpec) -> Result<L, E>,
        vector: impl FnMut(&VectorSpec) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        Self::with_frame(Arc::new(Frame::new(config, vector)?), weight)
    }

    /// A decoder from a frame, and `weight(index, spec)` as in [`new`](Self::new).
    ///
    /// # Errors
    /// Those of the closure, and [`EngineError::OperatorShape`] for an operator of the wrong size.
    pub fn with_frame<E: From<EngineError>>(
        frame: Arc<Frame>,
        mut weight: impl FnMut(usize, &WeightSpec) -> Result<L, E>,
    ) -> Result<Self, E> {
        let mut weights = Vec::new();
        for (index, spec) in frame.config.weights().iter().enumerate() {
            let operator = weight(index, spec)?;
            check_operator(&operator, spec)?;
            weights.push(operator);
        }
        Ok(Self { frame, weights })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.frame.config
    }

    /// All linear operators, in the order of [`ModelConfig::weights`].
    pub fn linears(&self) -> &[L] {
        &self.weights
    }

    /// Puts another operator in the place of weight `index` and gives back the old one.
    ///
    /// # Errors
    /// [`EngineError::OperatorShape`] when the new one has another shape; the decoder is unchanged.
    ///
    /// # Panics
    /// When `index` is not the index of a weight.
    pub fn replace(&mut self, index: usize, operator: L) -> Result<L, EngineError> {
        let old = &mut self.weights[index];
        if (operator.rows(), operator.cols()) != (old.rows(), old.cols()) {
            check_operator(&operator, &self.frame.config.weights()[index])?;
        }
        Ok(std::mem::replace(old, operator))
    }

    /// The operator of weight `index`, for changes that keep its shape.
    ///
    /// # Panics
    /// When `index` is not the index of a weight.
    pub fn linear_mut(&mut self, index: usize) -> &mut L {
        &mut self.weights[index]
    }

    /// Embeds tokens: tokens x hidden.
    ///
    /// # Errors
    /// No tokens, or one outside the vocabulary.
    pub fn embed(&self, tokens: &[u32]) -> Result<Array2<f32>, EngineError> {
        if tokens.is_empty() {
            return Err(EngineError::NoTokens);
        }
        let vocab_size = self.frame.config.vocab_size;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab_size) {
            return Err(EngineError::TokenOutOfRange { token, vocab_size });
        }
        let part_rows = self.frame.config.vocab_part_rows;
        let mut hidden = vec![0.0; tokens.len() * self.frame.config.hidden_size];
        for (&token, row) in tokens.iter().zip(hidden.chunks_exact_mut(self.frame.config.hidden_size)) {
            let (part, row_of_part) = (token as usize / part_rows, token as usize % part_rows);
            self.weights[part].row_into(row_of_part, row);
        }
        Ok(Array2::from_shape_vec((tokens.len(), self.frame.config.hidden_size), hidden).expect("one row per token"))
    }

    /// Runs one layer on `hidden` (tokens x hidden) in place.
    ///
    /// The tokens follow those that the pass's cache holds for this layer, and are the start of the sequence without one; of
    /// several sequences see [`Pass::with_caches`].
    ///
    /// # Errors
    /// [`EngineError::ContextFull`] when the positions run past a cache or the model; [`EngineError::StateShape`];
    /// [`EngineError::UnevenRows`] and [`EngineError::UnequalSequences`] for several sequences. The caches are unchanged then.
    ///
    /// # Panics
    /// When there is no layer of this number.
    pub fn layer(&self, layer: usize, hidden: &mut Array2<f32>, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        let config = &self.frame.config;
        let (rows, width) = (hidden.nrows(), config.hidden_size);
        check_state("hidden", hidden.view(), width)?;
        let (past, tokens) = pass.place(layer, rows, config)?;
        let threads = pass.threads;
        let (q_size, kv_size, inner) = (config.query_size(), config.kv_size(), config.intermediate_size);
        if !hidden.is_standard_layout() {
            *hidden = hidden.as_standard_layout().into_owned();
        }
        let h = hidden.as_slice_mut().expect("made standard above");
        let vectors = &self.frame.layers[layer];
        let first = config.vocab_parts() + layer * WEIGHTS_PER_LAYER;
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] =
            std::array::from_fn::<_, WEIGHTS_PER_LAYER, _>(|i| &self.weights[first + i]);

        // The buffers leave the pass while it is borrowed by the observer, and come back at the end.
        let mut scratch = std::mem::take(&mut pass.scratch);
        let Scratch { normed, q, k, v, mixed, gate, up, delta } = &mut scratch;

        let normed = take(normed, rows * width);
        math::rms_norm(h, &vectors.attention_norm, config.norm_eps, normed);
        pass.observe(first..first + 3, view(normed, width));
        let q = take(q, rows * q_size);
        // Of one sequence they are made in their place, of several at once, and then put there.
        let (new_k, new_v) = match &mut *pass.caches {
            [cache] => {
                let (k, v) = &mut cache.layers[layer];
                k.resize((past + tokens) * kv_size, 0.0);
                v.resize((past + tokens) * kv_size, 0.0);
                (&mut k[past * kv_size..], &mut v[past * kv_size..])
            }
            _ => (take(k, rows * kv_size), take(v, rows * kv_size)),
        };
        q_proj.apply(view(normed, width), view_mut(q, q_size), threads);
        k_proj.apply(view(normed, width), view_mut(new_k, kv_size), threads);
        v_proj.apply(view(normed, width), view_mut(new_v, kv_size), threads);
        bias(q, &vectors.q_bias);
        bias(new_k, &vectors.k_bias);
        bias(new_v, &vectors.v_bias);
        if let Some(norm) = &vectors.q_norm {
            math::rms_norm_in_place(q, norm, config.norm_eps);
        }
        if let Some(norm) = &vectors.k_norm {
            math::rms_norm_in_place(new_k, norm, config.norm_eps);
        }
        for (q, k) in q.chunks_exact_mut(tokens * q_size).zip(new_k.chunks_exact_mut(tokens * kv_size)) {
            self.frame.rope.rotate(q, config.head_dim, tokens, past);
            self.frame.rope.rotate(k, config.head_dim, tokens, past);
        }

        let mixed = take(mixed, rows * q_size);
        let window = config.windows[layer];
        match &mut *pass.caches {
            [] => attention(config, window, q, take(k, rows * kv_size), take(v, rows * kv_size), mixed, past, threads),
            [cache] => {
                let (keys, values) = &cache.layers[layer];
                attention(config, window, q, keys, values, mixed, past, threads);
            }
            caches => {
                for (cache, (k, v)) in caches.iter_mut().zip(k.chunks(tokens * kv_size).zip(v.chunks(tokens * kv_size)))
                {
                    let (keys, values) = &mut cache.layers[layer];
                    keys.extend_from_slice(k);
                    values.extend_from_slice(v);
                }
                let one = |((q, mixed), cache): ((&[f32], &mut [f32]), &KvCache)| {
                    let (keys, values) = &cache.layers[layer];
                    attention(config, window, q, keys, values, mixed, past, Threads::One);
                };
                let len = tokens * q_size;
                if threads == Threads::One || is_small(config, rows, past + tokens) {
                    q.chunks_exact(len).zip(mixed.chunks_exact_mut(len)).zip(&*caches).for_each(one);
                } else {
                    q.par_chunks_exact(len).zip(mixed.par_chunks_exact_mut(len)).zip(&*caches).for_each(one);
                }
            }
        }
        pass.observe(first + 3..first + 4, view(mixed, q_size));
        let delta = take(delta, rows * width);
        o_proj.apply(view(mixed, q_size), view_mut(delta, width), threads);
        bias(delta, &vectors.o_bias);
        math::add(h, delta);

        math::rms_norm(h, &vectors.mlp_norm, config.norm_eps, normed);
        pass.observe(first + 4..first + 6, view(normed, width));
        let gate = take(gate, rows * inner);
        let up = take(up, rows * inner);
        gate_proj.apply(view(normed, width), view_mut(gate, inner), threads);
        up_proj.apply(view(normed, width), view_mut(up, inner), threads);
        bias(gate, &vectors.gate_bias);
        bias(up, &vectors.up_bias);
        math::swiglu(gate, up);
        pass.observe(first + 6..first + 7, view(gate, inner));
        down_proj.apply(view(gate, inner), view_mut(delta, width), threads);
        bias(delta, &vectors.down_bias);
        math::add(h, delta);

        pass.scratch = scratch;
        Ok(())
    }

    /// Final norm and head of hidden states behind the last layer: tokens x vocabulary.
    ///
    /// Take few rows at a time where the vocabulary is large.
    ///
    /// # Errors
    /// [`EngineError::StateShape`].
    pub fn logits(&self, hidden: ArrayView2<'_, f32>, pass: &mut Pass<'_>) -> Result<Array2<f32>, EngineError> {
        let width = self.frame.config.hidden_size;
        let normed = self.head_input(hidden, pass)?;
        let mut logits = Array2::zeros((hidden.nrows(), self.frame.config.vocab_size));
        let parts = logits.axis_chunks_iter_mut(Axis(1), self.frame.config.vocab_part_rows);
        for (part, logits) in self.weights[self.head()].iter().zip(parts) {
            part.apply(view(&normed, width), logits, pass.threads);
        }
        pass.scratch.normed = normed;
        Ok(logits)
    }

    /// Shows the head's input to the pass's observer, without running the head.
    ///
    /// # Errors
    /// [`EngineError::StateShape`].
    pub fn observe_head(&self, hidden: ArrayView2<'_, f32>, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        pass.scratch.normed = self.head_input(hidden, pass)?;
        Ok(())
    }

    /// The weights that look tokens up: the embedding, or its parts.
    pub fn embedding(&self) -> Range<usize> {
        0..self.frame.config.vocab_parts()
    }

    /// The weights that give the logits: the head, or its parts; those of the embedding when it is tied.
    pub fn head(&self) -> Range<usize> {
        let n = self.weights.len();
        if self.frame.config.tied { self.embedding() } else { n - self.frame.config.vocab_parts()..n }
    }

    /// The final norm of `hidden`, in the pass's buffer.
    fn head_input(&self, hidden: ArrayView2<'_, f32>, pass: &mut Pass<'_>) -> Result<Vec<f32>, EngineError> {
        let width = self.frame.config.hidden_size;
        check_state("hidden", hidden, width)?;
        let hidden = hidden.as_standard_layout();
        let mut normed = std::mem::take(&mut pass.scratch.normed);
        normed.resize(hidden.len(), 0.0);
        math::rms_norm(
            hidden.as_slice().expect("made standard above"),
            &self.frame.norm,
            self.frame.config.norm_eps,
            &mut normed,
        );
        pass.observe(self.head(), view(&normed, width));
        Ok(normed)
    }

    /// Embedding and all layers: the hidden states behind the last one, tokens x hidden.
    ///
    /// # Errors
    /// Those of [`embed`](Self::embed) and [`layer`](Self::layer).
    pub fn hidden(&self, tokens: &[u32], pass: &mut Pass<'_>) -> Result<Array2<f32>, EngineError> {
        let mut hidden = self.embed(tokens)?;
        for layer in 0..self.frame.config.n_layers {
            self.layer(layer, &mut hidden, pass)?;
        }
        Ok(hidden)
    }

    /// The whole model: logits of every token, tokens x vocabulary.
    ///
    /// # Errors
    /// Those of [`embed`](Self::embed) and [`layer`](Self::layer).
    pub fn forward(&self, tokens: &[u32], pass: &mut Pass<'_>) -> Result<Array2<f32>, EngineError> {
        let hidden = self.hidden(tokens, pass)?;
        self.logits(hidden.view(), pass)
    }
}

/// Checks that an operator has the size of the weight whose place it takes.
///
/// # Errors
/// [`EngineError::OperatorShape`].
pub fn check_operator(operator: &impl LinearOp, spec: &WeightSpec) -> Result<(), EngineError> {
    if (operator.rows(), operator.cols()) == (spec.rows, spec.cols) {
        return Ok(());
    }
    Err(EngineError::OperatorShape {
        name: spec.name.clone(),
        found_rows: operator.rows(),
        found_cols: operator.cols(),
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

/// The first `len` elements of a buffer that only ever grows; their values are left over from earlier uses.
fn take(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

fn view(x: &[f32], cols: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((x.len() / cols, cols), x).expect("whole rows")
}

fn view_mut(x: &mut [f32], cols: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((x.len() / cols, cols), x).expect("whole rows")
}

fn bias(x: &mut [f32], bias: &Option<Vec<f32>>) {
    if let Some(bias) = bias {
        math::add_bias(x, bias);
    }
}

/// Rotary position embedding.
#[derive(Debug, Clone)]
struct Rope {
    inverse_frequencies: Vec<f32>,
    /// Cosines, then sines, of the first positions; further ones are computed when they come.
    table: Vec<f32>,
}

impl Rope {
    /// Positions whose angles are kept; 4 MB at a head size of 128.
    const KEPT: usize = 8192;

    fn new(inverse_frequencies: Vec<f32>, max_positions: usize) -> Self {
        let head_dim = 2 * inverse_frequencies.len();
        let mut rope = Self { inverse_frequencies, table: Vec::new() };
        let mut table = vec![0.0; max_positions.min(Self::KEPT) * head_dim];
        for (position, row) in table.chunks_exact_mut(head_dim).enumerate() {
            rope.angles(position, row);
        }
        rope.table = table;
        rope
    }

    /// Radians per position of each pair of elements of a head: theta^(-2i / head_dim), in f32 whatever the type of the
    /// weights, as the Hugging Face library computes and keeps them.
    fn inverse_frequencies(config: &RopeConfig, head_dim: usize) -> Vec<f32> {
        let frequency = |i: usize| config.theta.powf(-((2 * i) as f64) / head_dim as f64);
        let scaled = |frequency: f64| {
            let Some(s) = config.scaling else { return frequency };
            // Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated.
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            let turns = s.original_positions / wavelength;
            let kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0.0, 1.0);
            frequency * (kept + (1.0 - kept) / s.factor)
        };
        (0..head_dim / 2).map(|i| scaled(frequency(i)) as f32).collect()
    }

    /// Cosines and sines at one position. The angle is rounded to f32 as in the reference implementation, where that
    /// rounding is part of what the model was trained with.
    fn angles(&self, position: usize, row: &mut [f32]) {
        let (cos, sin) = row.split_at_mut(self.inverse_frequencies.len());
        for ((&f, cos), sin) in self.inverse_frequencies.iter().zip(cos).zip(sin) {
            let (s, c) = f64::from(position as f32 * f).sin_cos();
            (*cos, *sin) = (c as f32, s as f32);
        }
    }

    /// Rotates every head of every row of `x`; the first row is at position `past`.
    fn rotate(&self, x: &mut [f32], head_dim: usize, tokens: usize, past: usize) {
        let mut fresh = Vec::new();
        let half = head_dim / 2;
        for (token, row) in x.chunks_exact_mut(x.len() / tokens).enumerate() {
            let position = past + token;
            let angles = match self.table.get(position * head_dim..(position + 1) * head_dim) {
                Some(kept) => kept,
                None => {
                    fresh.resize(head_dim, 0.0);
                    self.angles(position, &mut fresh);
                    &fresh
                }
            };
            let (cos, sin) = angles.split_at(half);
            for head in row.chunks_exact_mut(head_dim) {
                let (a, b) = head.split_at_mut(half);
                for (((a, b), &cos), &sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}

/// Queries per block of the attention: the scores of a block stay in cache, and little is computed above the diagonal.
const QUERY_BLOCK: usize = 64;

/// Softmax attention of `q` (tokens x query heads) over keys and values (past + tokens x key heads), causal, and within the
/// last `window` positions where there is one. `out` has the shape of `q`.
#[expect(clippy::too_many_arguments, reason = "three matrices, an output, and where in the sequence they lie")]
fn attention(
    config: &ModelConfig,
    window: Option<usize>,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    out: &mut [f32],
    past: usize,
    threads: Threads,
) {
    let (head_dim, group) = (config.head_dim, config.n_heads / config.n_kv_heads);
    let tokens = q.len() / config.query_size();
    let total = past + tokens;
    let q = MatRef::from_row_major_slice(q, tokens, config.query_size());
    let keys = MatRef::from_row_major_slice(keys, total, config.kv_size());
    let values = MatRef::from_row_major_slice(values, total, config.kv_size());
    let mut out = MatMut::from_row_major_slice_mut(out, tokens, config.query_size());
    let scale = 1.0 / (head_dim as f32).sqrt();

    let one_head = |head: usize, mut out: MatMut<'_, f32>| {
        let q = q.subcols(head * head_dim, head_dim);
        let keys = keys.subcols(head / group * head_dim, head_dim);
        let values = values.subcols(head / group * head_dim, head_dim);
        let mut scores = Vec::new();
        for start in (0..tokens).step_by(QUERY_BLOCK) {
            let rows = QUERY_BLOCK.min(tokens - start);
            // Keys from the first one the block's first query sees to the block's own last one.
            let first = window.map_or(0, |w| (past + start + 1).saturating_sub(w));
            let span = past + start + rows - first;
            let scores = take(&mut scores, rows * span);
            let products = MatMut::from_row_major_slice_mut(scores, rows, span);
            let keys = keys.subrows(first, span).transpose();
            math::product(products, q.subrows(start, rows), keys, scale);
            for (r, row) in scores.chunks_exact_mut(span).enumerate() {
                let end = past + start + r + 1 - first;
                let begin = window.map_or(0, |w| end.saturating_sub(w));
                row[..begin].fill(0.0);
                math::softmax(&mut row[begin..end]);
                row[end..].fill(0.0);
            }
            let weights = MatRef::from_row_major_slice(scores, rows, span);
            let out = out.rb_mut().subrows_mut(start, rows);
            math::product(out, weights, values.subrows(first, span), 1.0);
        }
    };
    if threads == Threads::One || is_small(config, tokens, total) {
        for head in 0..config.n_heads {
            one_head(head, out.rb_mut().subcols_mut(head * head_dim, head_dim));
        }
    } else {
        out.par_col_chunks_mut(head_dim).enumerate().for_each(|(head, out)| one_head(head, out));
    }
}

/// Whether the attention of so many queries, each over `total` positions, does not earn back the cost of waking other threads.
fn is_small(config: &ModelConfig, queries: usize, total: usize) -> bool {
    config.query_size() * queries * total < 1 << 18
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use std::collections::HashMap;
    use std::path::Path;

    #[derive(serde::Deserialize)]
    struct Expected {
        input_ids: Vec<u32>,
        logits: HashMap<usize, Vec<f32>>,
    }

    /// The expected logits come from models that were converted to bf16 as a whole and back, which rounded the rotary
    /// frequencies too (no file stores them); the same rounding is made here. With it everything else is held to the
    /// error of f32 sums in another order, and of six printed decimals. Without it logits differ by up to 8e-3.
    #[test]
    fn logits_of_every_architecture_are_those_of_the_reference_library() {
        for name in ["llama", "llama31", "mistral", "mistral_window", "qwen2", "qwen3"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bitstack-model/tests/data").join(name);
            let mut model = Decoder::load(&Checkpoint::open(&dir).unwrap()).unwrap();
            let frame = Arc::make_mut(&mut model.frame);
            let rounded = frame.rope.inverse_frequencies.iter().map(|&f| bf16::from_f32(f).to_f32()).collect();
            frame.rope = Rope::new(rounded, frame.config.max_positions);
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
    fn positions_beyond_the_table_rotate_like_those_in_it() {
        let frequencies = vec![1.0, 0.1];
        let (kept, fresh) = (Rope::new(frequencies.clone(), 8), Rope::new(frequencies, 2));
        let x: Vec<f32> = (0..5 * 8).map(|i| i as f32).collect();
        let (mut a, mut b) = (x.clone(), x);
        kept.rotate(&mut a, 4, 5, 0);
        fresh.rotate(&mut b, 4, 5, 0);
        assert_eq!(a, b);
        // By hand, token 1, first pair of its second head: (12, 14) turned by 1 radian.
        let (sin, cos) = 1.0_f32.sin_cos();
        assert!((a[12] - (12.0 * cos - 14.0 * sin)).abs() < 1e-5 && (a[14] - (14.0 * cos + 12.0 * sin)).abs() < 1e-5);
    }
}
