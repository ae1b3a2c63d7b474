//! Puts the parts of a model together, in the order of its lists of tensors.

use super::layer::{Layer, Linear, Norm, VectorId, WeightId};
use super::{ModelConfig, RopeConfig, VectorSpec, WeightRole, WeightSpec};

/// The tensors of the layers so far. Names are those of a Hugging Face checkpoint.
#[derive(Debug, Default)]
pub struct Builder {
    weights: Vec<WeightSpec>,
    vectors: Vec<VectorSpec>,
    layers: Vec<Layer>,
}

impl Builder {
    /// Begins the next layer.
    pub fn layer(&mut self) -> LayerBuilder<'_> {
        let (layer, first) = (self.layers.len(), self.weights.len());
        LayerBuilder { model: self, layer, first }
    }

    /// A norm beside the layers.
    pub fn norm(&mut self, name: &str, len: usize, eps: f32, offset: f32) -> Norm {
        Norm { weight: self.vector(name.to_owned(), len), len, offset, eps }
    }

    /// The model, with an embedding and a head of `vocab_size` tokens, as yet untied and uncut, and without end tokens. `norm` is the one in front of the head.
    pub fn finish(
        self,
        hidden_size: usize,
        vocab_size: usize,
        max_positions: usize,
        ropes: Vec<RopeConfig>,
        norm: Norm,
    ) -> ModelConfig {
        ModelConfig {
            hidden_size,
            vocab_size,
            vocab_part_rows: vocab_size,
            max_positions,
            embedding_scale: None,
            layers: self.layers,
            norm,
            logit_scale: None,
            logit_cap: None,
            ropes,
            tied: false,
            eos_tokens: Vec::new(),
            remarks: Vec::new(),
            inner: self.weights,
            vectors: self.vectors,
        }
    }

    fn vector(&mut self, name: String, len: usize) -> VectorId {
        self.vectors.push(VectorSpec { name, len });
        VectorId(self.vectors.len() - 1)
    }
}

/// A layer in the making. Parts are named without the `model.layers.N.` in front.
pub struct LayerBuilder<'m> {
    model: &'m mut Builder,
    layer: usize,
    first: usize,
}

impl LayerBuilder<'_> {
    /// A weight of rows x cols and, with `bias`, its bias.
    pub fn linear(&mut self, part: &str, role: WeightRole, [rows, cols]: [usize; 2], bias: bool) -> Linear {
        let name = format!("model.layers.{}.{part}", self.layer);
        let bias = bias.then(|| self.model.vector(format!("{name}.bias"), rows));
        let layer = Some(self.layer);
        self.model.weights.push(WeightSpec { name, first_row: 0, rows, tensor_rows: rows, cols, role, layer });
        Linear { weight: WeightId(self.model.weights.len() - 1), bias }
    }

    /// A norm of `len` factors.
    pub fn norm(&mut self, part: &str, len: usize, eps: f32, offset: f32) -> Norm {
        self.model.norm(&format!("model.layers.{}.{part}.weight", self.layer), len, eps, offset)
    }

    /// Ends the layer: `make` gets the range of its weights.
    pub fn finish(self, make: impl FnOnce(std::ops::Range<usize>) -> Layer) {
        let layer = make(self.first..self.model.weights.len());
        self.model.layers.push(layer);
    }
}
