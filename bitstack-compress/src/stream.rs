//! A model run layer by layer, with the weights of one layer in memory at a time.

use bitstack_engine::device::{Columns, Cpu, CpuQueue, Done, Weight};
use bitstack_engine::{Decoder, EngineError, Frame, Pass, Transposed, check_weight};
use bitstack_model::{Checkpoint, Dense, WeightSpec};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Where a weight comes from: its index in the model and what the model needs there.
type Load<'a> = Box<dyn Fn(usize, &WeightSpec) -> Result<Dense, EngineError> + Sync + 'a>;

/// A decoder whose weights are loaded when they are needed, and dropped after.
pub(crate) struct Streamed<'a> {
    decoder: Decoder<Slot>,
    specs: Vec<WeightSpec>,
    load: Load<'a>,
}

impl<'a> Streamed<'a> {
    pub(crate) fn new(
        frame: Arc<Frame>,
        load: impl Fn(usize, &WeightSpec) -> Result<Dense, EngineError> + Sync + 'a,
    ) -> Result<Self, EngineError> {
        let empty =
            |_, spec: &WeightSpec| Ok::<_, EngineError>(Slot { rows: spec.rows, cols: spec.cols, weight: None });
        let specs = frame.config().weights();
        Ok(Self { decoder: Decoder::with_frame(frame, empty)?, specs, load: Box::new(load) })
    }

    /// The model of a checkpoint.
    pub(crate) fn original(checkpoint: &'a Checkpoint) -> Result<Self, EngineError> {
        let frame = Frame::new::<EngineError>(checkpoint.config().clone(), |spec| Ok(checkpoint.vector(spec)?))?;
        Self::new(Arc::new(frame), |_, spec| Ok(checkpoint.weight(spec)?))
    }

    /// The decoder. Only what was loaded may be run.
    pub(crate) fn decoder(&self) -> &Decoder<Slot> {
        &self.decoder
    }

    /// The indices of the weights of layer `layer`.
    pub(crate) fn layer_weights(&self, layer: usize) -> Range<usize> {
        self.decoder.config().layer_weights(layer)
    }

    /// Weight `index`. Those of a layer are used by every window, and by every trial again, so they are widened once.
    fn loaded(&self, index: usize) -> Result<Dense, EngineError> {
        let weight = (self.load)(index, &self.specs[index])?;
        Ok(if self.specs[index].layer.is_some() { weight.widened() } else { weight })
    }

    /// Puts a weight in the place of weight `index`, or none; what was there.
    pub(crate) fn put(&mut self, index: usize, weight: Option<Dense>) -> Result<Option<Dense>, EngineError> {
        if let Some(weight) = &weight {
            check_weight::<Cpu>(weight, &self.specs[index])?;
        }
        Ok(std::mem::replace(&mut self.decoder.weight_mut(index).weight, weight))
    }

    /// Runs `step` with some weights in memory.
    pub(crate) fn with<T>(
        &mut self,
        weights: Range<usize>,
        step: impl FnOnce(&mut Self) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let all = weights.clone().into_par_iter().with_max_len(1).map(|index| self.loaded(index));
        let loaded = all.collect::<Result<Vec<_>, _>>()?;
        let result =
            weights.clone().zip(loaded).try_for_each(|(index, weight)| self.put(index, Some(weight)).map(drop));
        let result = result.and_then(|()| step(self));
        weights.for_each(|index| self.decoder.weight_mut(index).weight = None);
        result
    }

    /// The hidden states of the windows in front of the first layer.
    pub(crate) fn embed(&mut self, windows: &[&[u32]]) -> Result<Vec<Array2<f32>>, EngineError> {
        self.with(self.decoder.config().embedding(), |model| windows.iter().map(|w| model.decoder.embed(w)).collect())
    }

    /// Takes hidden states, each of a window, through some layers.
    pub(crate) fn run(&mut self, layers: Range<usize>, hidden: &mut [Array2<f32>]) -> Result<(), EngineError> {
        layers.into_iter().try_for_each(|layer| {
            self.with(self.layer_weights(layer), |model| run_layer(&model.decoder, layer, hidden))
        })
    }
}

/// Takes hidden states, each of a window, through a layer whose weights are there.
pub(crate) fn run_layer<W: Weight<Cpu>>(
    decoder: &Decoder<W>,
    layer: usize,
    hidden: &mut [Array2<f32>],
) -> Result<(), EngineError> {
    hidden.par_iter_mut().with_max_len(1).try_for_each(|h| decoder.layer(layer, h, &mut Pass::new()))
}

/// The place of a weight.
pub(crate) struct Slot {
    rows: usize,
    cols: usize,
    weight: Option<Dense>,
}

impl Slot {
    /// Copies row `row` of the weight into `out`.
    pub(crate) fn row_into(&self, row: usize, out: &mut [f32]) {
        self.weight().row_into(row, out);
    }

    fn weight(&self) -> &Dense {
        self.weight.as_ref().expect("what is run was loaded before")
    }
}

impl Weight<Cpu> for Slot {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn multiply(&self, queue: &mut CpuQueue, x: &Vec<f32>, tokens: usize, y: &mut Vec<f32>, place: Columns) -> Done {
        Weight::<Cpu>::multiply(self.weight(), queue, x, tokens, y, place)
    }

    fn look_up(&self, queue: &mut CpuQueue, row: usize, out: &mut Vec<f32>, at: usize) -> Done {
        Weight::<Cpu>::look_up(self.weight(), queue, row, out, at)
    }
}

impl Transposed for Slot {
    fn add_transposed(&self, g: ArrayView2<'_, f32>, x: ArrayViewMut2<'_, f32>) {
        self.weight().add_transposed(g, x);
    }
}
