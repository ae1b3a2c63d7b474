//! A model as a value: its layers, put together by one file per family from a Hugging Face `config.json`, and the list of tensors that follows.
//!
//! The modules within belong together with this one: they read and build [`ModelConfig`], whose lists are private to them.

mod builder;
mod ends;
mod families;
mod fields;
mod harmless;
mod layer;
mod rope;
mod text_part;

pub use builder::{Builder, LayerBuilder};
pub use layer::{
    Activation, Attention, Experts, FeedForward, FeedForwardInput, Layer, Linear, Mlp, Norm, Projections, VectorId,
    WeightId,
};
pub use rope::{DynamicScaling, Llama3Scaling, LongRopeScaling, RopeConfig, RopeScaling, YarnScaling};
pub(crate) use text_part::{is_of_images, name_in_text_part, text_part};

use crate::ModelError;
use fields::parse_object;
use std::ops::Range;

/// Limits on what a config may claim. They are far above every published model of these families, and low enough
/// that the product of any two fits in 64 bits and a typing error is caught before memory is asked for.
mod limit {
    pub(super) const HIDDEN: usize = 1 << 17;
    pub(super) const INTERMEDIATE: usize = 1 << 20;
    pub(super) const LAYERS: usize = 1 << 10;
    /// Of all layers together.
    pub(super) const EXPERTS: usize = 1 << 15;
    pub(super) const HEADS: usize = 1 << 12;
    pub(super) const HEAD_DIM: usize = 1 << 12;
    pub(super) const VOCAB: usize = 1 << 22;
    pub(super) const VOCAB_PARTS: usize = 64;
    pub(super) const POSITIONS: usize = 1 << 24;
}

/// Everything about a model that decides its arithmetic; read by [`ModelConfig::from_json`], or made with a [`Builder`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of tokens the embedding and the head know.
    pub vocab_size: usize,
    /// Rows of the embedding, and of the head, that are one weight: `vocab_size` where they are whole. See [`ModelConfig::cut_vocabulary`].
    pub vocab_part_rows: usize,
    /// Largest number of positions.
    pub max_positions: usize,
    /// Embedded tokens are multiplied by this.
    pub embedding_scale: Option<f32>,
    /// The decoder layers.
    pub layers: Vec<Layer>,
    /// The norm in front of the head.
    pub norm: Norm,
    /// What the head gives is multiplied by this.
    pub logit_scale: Option<f32>,
    /// Logits become cap · tanh(logit / cap), after the scale.
    pub logit_cap: Option<f32>,
    /// The rotary tables that layers choose from.
    pub ropes: Vec<RopeConfig>,
    /// Whether the head is the embedding matrix.
    pub tied: bool,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
    remarks: Vec<String>,
    /// The weights of all layers.
    inner: Vec<WeightSpec>,
    vectors: Vec<VectorSpec>,
}

/// What a weight matrix does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightRole {
    /// Token embedding: its rows are looked up. With tied embeddings it is the head as well.
    Embedding,
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Output projection of the attention.
    AttentionOutput,
    /// Gate of the feed-forward part.
    Gate,
    /// Up projection.
    Up,
    /// Down projection.
    Down,
    /// Output head, where it is not the embedding.
    Head,
    /// Query, key and value projections in one.
    QueryKeyValue,
    /// Gate and up projection in one.
    GateUp,
    /// Scores of experts.
    Router,
}

/// One weight matrix of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightSpec {
    /// Name as in a Hugging Face checkpoint, without the trailing `.weight`; of a part, with `.rows.` and its first row.
    pub name: String,
    /// Its first row in the tensor of the checkpoint: 0 but for parts.
    pub first_row: usize,
    /// Output features.
    pub rows: usize,
    /// Rows of the tensor.
    pub tensor_rows: usize,
    /// Input features.
    pub cols: usize,
    /// What it does.
    pub role: WeightRole,
    /// The layer it belongs to; `None` for embedding and head.
    pub layer: Option<usize>,
}

impl WeightSpec {
    /// Name of the tensor in a checkpoint.
    pub fn tensor_name(&self) -> String {
        let name = match self.role {
            WeightRole::Embedding => EMBEDDING,
            WeightRole::Head => HEAD,
            _ => &self.name,
        };
        format!("{name}.weight")
    }

    /// Shape of the tensor in a checkpoint.
    pub fn tensor_shape(&self) -> [usize; 2] {
        [self.tensor_rows, self.cols]
    }
}

/// One vector of a model that is never stacked: a norm's weight or a bias.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VectorSpec {
    /// Full tensor name as in a checkpoint.
    pub name: String,
    /// Number of elements.
    pub len: usize,
}

const EMBEDDING: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";
/// Between the name of a weight that is cut and the first row of a part.
const PART: &str = ".rows.";

impl ModelConfig {
    /// Reads the text of a `config.json`. Every field that changes the arithmetic is understood, or refused by name. Fields that are left out have
    /// the values of their class in the Hugging Face library (5.24).
    ///
    /// # Errors
    /// Malformed JSON, an architecture or rotary scaling that is not supported, a missing field, a value out of range, a field about which nothing is
    /// known; each names the field and the value.
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        families::describe(&parse_object(text.as_bytes(), "config.json")?)
    }

    /// What its user should know of how the config was read, a line each: nothing, as a rule.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// Number of decoder layers.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Cuts the embedding and the head into parts by rows, each a weight of its own: 16 where the vocabulary is large.
    ///
    /// Tokenizers number their tokens in the order in which they were merged, so the first tokens are frequent and the last rare: of the
    /// tokens of English text, the first twelfth of a vocabulary of 49152 is 77 %, the last .5 %. A part counts as much as its tokens are
    /// frequent, for what is looked up and for what is predicted; so rare tokens have fewer blocks, and sizes of the model lie
    /// closer together.
    #[must_use]
    pub fn cut_vocabulary(mut self) -> Self {
        const MOST_PARTS: usize = 16;
        /// Fewer rows are not worth a basis of their own.
        const LEAST_ROWS: usize = 2048;
        /// What codes are made of at a time.
        const TILE_ROWS: usize = 64;
        let rows = self.vocab_size.div_ceil(MOST_PARTS).next_multiple_of(TILE_ROWS).max(LEAST_ROWS);
        self.vocab_part_rows = rows.min(self.vocab_size);
        self
    }

    /// Weights that the embedding is cut into.
    pub fn vocab_parts(&self) -> usize {
        self.vocab_size.div_ceil(self.vocab_part_rows)
    }

    /// The vocabulary cut as it is in a model whose weights have these names.
    #[must_use]
    pub fn cut_as<'n>(mut self, names: impl Iterator<Item = &'n str>) -> Self {
        // The second part says how long the first is. Parts of any other length have names that no weight of the model has.
        let part = |name: &str| name.strip_prefix(EMBEDDING)?.strip_prefix(PART)?.parse::<usize>().ok();
        let rows = names.filter_map(part).filter(|first| *first > 0).min();
        if let Some(rows) =
            rows.filter(|rows| *rows < self.vocab_size && self.vocab_size.div_ceil(*rows) <= limit::VOCAB_PARTS)
        {
            self.vocab_part_rows = rows;
        }
        self
    }

    /// Every weight matrix in forward order: the embedding, those of each layer, and the head unless it is tied; embedding and head in parts
    /// where they are cut. The position in this list is the weight's index everywhere.
    pub fn weights(&self) -> Vec<WeightSpec> {
        let outer = |name: &'static str, role| {
            (0..self.vocab_size).step_by(self.vocab_part_rows).map(move |first_row| WeightSpec {
                name: if self.vocab_parts() > 1 { format!("{name}{PART}{first_row}") } else { name.to_owned() },
                first_row,
                rows: self.vocab_part_rows.min(self.vocab_size - first_row),
                tensor_rows: self.vocab_size,
                cols: self.hidden_size,
                role,
                layer: None,
            })
        };
        let mut weights = Vec::with_capacity(self.inner.len() + 2 * self.vocab_parts());
        weights.extend(outer(EMBEDDING, WeightRole::Embedding));
        weights.extend_from_slice(&self.inner);
        if !self.tied {
            weights.extend(outer(HEAD, WeightRole::Head));
        }
        weights
    }

    /// Every norm: those of the layers, and the final one.
    pub fn norms(&self) -> impl Iterator<Item = Norm> + '_ {
        let of_layer = |layer: &Layer| {
            let Attention { query_norm, key_norm, .. } = layer.attention;
            let outer = [layer.attention_norm, layer.attention_post_norm];
            outer.into_iter().chain([query_norm, key_norm, layer.mlp_norm, layer.mlp_post_norm]).flatten()
        };
        self.layers.iter().flat_map(of_layer).chain([self.norm])
    }

    /// The index of a layer's weight in [`weights`](Self::weights).
    pub fn index(&self, weight: WeightId) -> usize {
        self.vocab_parts() + weight.0
    }

    /// The indices of the weights of layer `layer`.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn layer_weights(&self, layer: usize) -> Range<usize> {
        let Range { start, end } = self.layers[layer].weights;
        self.vocab_parts() + start..self.vocab_parts() + end
    }

    /// The indices of the weights that look tokens up: the embedding, or its parts.
    pub fn embedding(&self) -> Range<usize> {
        0..self.vocab_parts()
    }

    /// The indices of the weights that give the logits: the head, or its parts; those of the embedding when it is tied.
    pub fn head(&self) -> Range<usize> {
        let first = if self.tied { 0 } else { self.vocab_parts() + self.inner.len() };
        first..first + self.vocab_parts()
    }

    /// Every tensor that is not a weight matrix: norms and biases, layer by layer, then the final norm.
    pub fn other_tensors(&self) -> &[VectorSpec] {
        &self.vectors
    }
}
