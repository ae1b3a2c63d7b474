//! How to compress.

use bitstack_core::Shape;
use serde::{Deserialize, Serialize};

/// How a weight becomes blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockMethod {
    /// Nested codes: all sign planes chosen together, under the Gram matrix of the inputs.
    #[default]
    Nested,
    /// Absolute-value decomposition, the published method.
    Avd,
}

impl BlockMethod {
    /// The name that files give it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nested => "nested",
            Self::Avd => "avd",
        }
    }
}

/// How input channels are weighed against each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scaling {
    /// Root mean square of each channel: the diagonal of the Gram matrix.
    #[default]
    Gram,
    /// As the published implementation does: norms per sequence, and none for the attention's output projection under grouped-query
    /// attention.
    Reference,
    /// All alike.
    None,
}

/// By what the blocks of the model are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OrderBy {
    /// Fall of the predicted divergence per byte: the model forward and backward once, a run per layer, and a few at each of eight sizes to
    /// check it.
    #[default]
    Gain,
    /// The paper's: level by level, by measured perplexity; one model run per block.
    Perplexity,
    /// The paper's ablation: by measured perplexity, and any weight may run ahead.
    Greedy,
    /// The paper's ablation.
    Random,
}

/// How to compress.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompressOptions {
    /// How a weight becomes blocks.
    pub method: BlockMethod,
    /// Whether the published method keeps weights far outside the others in a list beside block 1; nested codes do where it pays, whatever is
    /// said here.
    pub spikes: bool,
    /// Rank of the blocks' magnitudes; `None`: see [`default_rank`]. Nested codes have rank 1.
    pub rank: Option<usize>,
    /// Blocks per weight; `None`: 16 for the published method, and for nested codes 9 to 12, which are then nearly exact: of each
    /// weight those that are worth their bytes by the time all others have theirs.
    pub n_blocks: Option<usize>,
    /// Channel scales.
    pub scaling: Scaling,
    /// Load order.
    pub ordering: OrderBy,
    /// Windows of calibration text.
    pub samples: usize,
    /// Tokens per window; `None`: 512, or the model's limit.
    pub seq_len: Option<usize>,
    /// Windows on which [`OrderBy::Perplexity`] and [`OrderBy::Greedy`] measure each block: every block of the model is a run over all of
    /// them. At least one for these orders.
    pub order_windows: usize,
    /// Leave embeddings and head unstacked.
    pub keep_embeddings: bool,
    /// Seed of everything random.
    pub seed: u64,
}

impl Default for CompressOptions {
    fn default() -> Self {
        Self {
            method: BlockMethod::default(),
            spikes: false,
            rank: None,
            n_blocks: None,
            scaling: Scaling::Gram,
            ordering: OrderBy::Gain,
            samples: 64,
            seq_len: None,
            order_windows: 16,
            keep_embeddings: false,
            seed: 0,
        }
    }
}

/// The default rank of a weight under the published method: 16, lowered until the f16 factors of a block take at most 1/8 bit per weight, which is what they
/// take at rank 16 in a 4096 x 4096 weight.
pub fn default_rank(shape: Shape) -> usize {
    let bits_per_rank = 16.0 * (shape.rows() + shape.cols()) as f64 / shape.n_elems() as f64;
    ((0.125 / bits_per_rank) as usize).clamp(1, 16)
}
