//! A model's parts as values: what each layer is made of, with the places of its weights and vectors.
//!
//! A slot that a family does not use is `None`, or the plain variant. A decoder runs whatever stands in the slots; the enums are exhaustive, so that one
//! that does not know a variant does not compile.

use std::ops::Range;

/// Place of a weight matrix of a layer: its index among [`super::ModelConfig::layer_weights`] of all layers, embedding and head not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WeightId(pub(super) usize);

/// Place of a vector: its index in [`super::ModelConfig::other_tensors`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VectorId(pub(super) usize);

impl VectorId {
    /// The index in [`super::ModelConfig::other_tensors`].
    pub fn index(self) -> usize {
        self.0
    }
}

/// An RMS norm: x / sqrt(mean(x²) + eps) · weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Its factors.
    pub weight: VectorId,
    /// How many they are: it goes over rows of this length.
    pub len: usize,
    /// Added to each factor: 1 where a checkpoint stores them as differences from 1 (Gemma).
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
}

/// y = x Wᵀ + bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linear {
    /// W, output x input features.
    pub weight: WeightId,
    /// One number per output feature.
    pub bias: Option<VectorId>,
}

/// One decoder layer: h += attention(h), h += mlp(h), each with a norm in front, a norm behind, or both.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// In front of the attention.
    pub attention_norm: Option<Norm>,
    /// The attention.
    pub attention: Attention,
    /// Behind the attention, before its result is added (beside one in front "sandwich" norms: Gemma 3; alone: OLMo 2).
    pub attention_post_norm: Option<Norm>,
    /// In front of the feed-forward part.
    pub mlp_norm: Option<Norm>,
    /// The feed-forward part.
    pub mlp: Mlp,
    /// Behind the feed-forward part, before its result is added.
    pub mlp_post_norm: Option<Norm>,
    /// What the attention and the feed-forward part give is multiplied by this before it is added (Granite).
    pub residual_scale: Option<f32>,
    /// Its weights among those of all layers, as [`super::LayerBuilder::finish`] gives them.
    pub weights: Range<usize>,
}

/// Softmax attention with rotary positions; heads of queries share heads of keys and values in equal groups.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// The projections in front.
    pub projections: Projections,
    /// RMS norm of each query head, or of all together where it is as long as they are (OLMo 2).
    pub query_norm: Option<Norm>,
    /// RMS norm of each key head, or of all together.
    pub key_norm: Option<Norm>,
    /// Index of the rotary table in [`super::ModelConfig::ropes`]; `None`: heads are not turned (some layers of SmolLM3).
    pub rope: Option<usize>,
    /// How many elements of each head, from its first on, are turned: all in most families. Even, and at most `head_dim`.
    pub rotary_dim: usize,
    /// Factor of the scores: 1 / sqrt(head_dim) in most families.
    pub scale: f32,
    /// How many positions (its own included) a token attends to; `None`: all before it.
    pub window: Option<usize>,
    /// Scores become cap · tanh(score / cap), before the mask.
    pub score_cap: Option<f32>,
    /// The projection behind.
    pub output: Linear,
}

impl Attention {
    /// Width of all query heads together.
    pub fn query_size(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_size(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}

/// How queries, keys and values are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projections {
    /// Each by a weight of its own.
    Separate {
        /// Queries.
        query: Linear,
        /// Keys.
        key: Linear,
        /// Values.
        value: Linear,
    },
    /// By one weight, whose rows are those of queries, keys and values, in this order (Phi-3).
    Fused(Linear),
}

/// The feed-forward part of a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Mlp {
    /// One that all tokens go through.
    Dense(FeedForward),
    /// Several, of which each token goes through a few (mixture of experts).
    Experts(Experts),
}

/// Two projections with a nonlinearity between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeedForward {
    /// Width between the two.
    pub size: usize,
    /// The projection in front.
    pub input: FeedForwardInput,
    /// The nonlinearity.
    pub activation: Activation,
    /// The projection behind.
    pub down: Linear,
}

/// The projection in front of a feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedForwardInput {
    /// activation(x Wgateᵀ) ⊙ x Wupᵀ.
    Gated {
        /// The gate.
        gate: Linear,
        /// What it gates.
        up: Linear,
    },
    /// The same, by one weight, whose rows are those of the gate and those of `up`, in this order (Phi-3).
    FusedGated(Linear),
    /// activation(x Wupᵀ).
    Plain(Linear),
}

/// A nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e^-x).
    Silu,
    /// x/2 (1 + tanh(sqrt(2/π) (x + 0.044715 x³))), the approximation that checkpoints name `gelu_pytorch_tanh`.
    GeluTanh,
}

/// A mixture of experts: softmax of the router's scores, the largest `n_active` of them, and the sum of these experts' results by their
/// shares.
#[derive(Debug, Clone, PartialEq)]
pub struct Experts {
    /// Scores of the experts, one output each.
    pub router: Linear,
    /// The experts.
    pub experts: Vec<FeedForward>,
    /// How many of them a token goes through.
    pub n_active: usize,
    /// Whether the shares of these are scaled to sum to 1.
    pub normalised: bool,
}
