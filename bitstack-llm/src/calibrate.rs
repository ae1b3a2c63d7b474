//! Activation statistics, layer by layer: the weights of one layer in memory at a time.

use crate::{Checkpoint, Decoder, Dense, LinearOp, LlmError, Observer, Pass, Threads};
use bitstack_core::{ActivationStats, Collect};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

/// Windows run side by side before their inputs are added up: enough for the threads of an ordinary machine, few enough that their
/// inputs (windows x tokens x channels) stay small beside a layer. A constant, so that results do not depend on the machine.
const SIDE_BY_SIDE: usize = 8;

/// The inputs of some weights, added up over the windows.
pub(crate) struct InputStats {
    /// Indices, in the model, of the weights that read this input.
    pub(crate) weights: Vec<usize>,
    pub(crate) stats: ActivationStats,
}

/// Windows of text on their way through the original model.
pub(crate) struct Walk<'a> {
    checkpoint: &'a Checkpoint,
    decoder: Decoder<Slot>,
    /// Per window, the hidden states in front of the next layer.
    hidden: Vec<Array2<f32>>,
    collect: Collect,
}

impl<'a> Walk<'a> {
    /// Embeds the windows.
    pub(crate) fn new(checkpoint: &'a Checkpoint, windows: &[&[u32]], collect: Collect) -> Result<Self, LlmError> {
        let empty = |_, spec: &crate::WeightSpec| Ok(Slot { rows: spec.rows, cols: spec.cols, weight: None });
        let decoder = Decoder::new(checkpoint.config().clone(), empty, |spec| checkpoint.vector(spec))?;
        let mut walk = Self { checkpoint, decoder, hidden: Vec::new(), collect };
        walk.load(0..1)?;
        walk.hidden = windows.iter().map(|w| walk.decoder.embed(w)).collect::<Result<_, _>>()?;
        walk.unload(0..1);
        Ok(walk)
    }

    /// Takes all windows through layer `layer`; the inputs of its weights, q k v together, o, gate and up together, down.
    pub(crate) fn layer(&mut self, layer: usize) -> Result<Vec<InputStats>, LlmError> {
        let specs = self.checkpoint.config().weights();
        let first = specs.iter().position(|w| w.layer == Some(layer)).expect("a layer has weights");
        let range = first..first + specs.iter().filter(|w| w.layer == Some(layer)).count();
        self.load(range.clone())?;
        let mut hidden = std::mem::take(&mut self.hidden);
        let stats = self.collect(&mut hidden, |decoder, hidden, pass| decoder.layer(layer, hidden, pass));
        self.hidden = hidden;
        self.unload(range);
        stats
    }

    /// The input of the head, after all layers.
    pub(crate) fn head(mut self) -> Result<InputStats, LlmError> {
        let mut hidden = std::mem::take(&mut self.hidden);
        let mut stats = self.collect(&mut hidden, |decoder, hidden, pass| decoder.observe_head(hidden.view(), pass))?;
        Ok(stats.remove(0))
    }

    fn load(&mut self, weights: std::ops::Range<usize>) -> Result<(), LlmError> {
        let specs = self.checkpoint.config().weights();
        for index in weights {
            self.decoder.linear_mut(index).weight = Some(self.checkpoint.weight(&specs[index])?);
        }
        Ok(())
    }

    fn unload(&mut self, weights: std::ops::Range<usize>) {
        weights.for_each(|index| self.decoder.linear_mut(index).weight = None);
    }

    /// Runs every window through `step` and adds up what the weights saw, in the order of the windows.
    fn collect(
        &self,
        hidden: &mut [Array2<f32>],
        step: impl Fn(&Decoder<Slot>, &mut Array2<f32>, &mut Pass<'_>) -> Result<(), LlmError> + Sync,
    ) -> Result<Vec<InputStats>, LlmError> {
        let mut sums: Vec<InputStats> = Vec::new();
        for windows in hidden.chunks_mut(SIDE_BY_SIDE) {
            let seen = windows
                .par_iter_mut()
                .with_max_len(1)
                .map(|hidden| {
                    let mut inputs = Inputs::default();
                    step(&self.decoder, hidden, &mut Pass::new().with_observer(&mut inputs))?;
                    Ok(inputs.0)
                })
                .collect::<Result<Vec<_>, LlmError>>()?;
            if sums.is_empty() {
                sums.extend(seen[0].iter().map(|(weights, x)| InputStats {
                    weights: weights.clone(),
                    stats: ActivationStats::new(x.ncols(), self.collect),
                }));
            }
            sums.par_iter_mut().enumerate().with_max_len(1).try_for_each(|(group, sum)| {
                seen.iter().try_for_each(|inputs| sum.stats.update(inputs[group].1.view())).map_err(|source| {
                    let name = self.checkpoint.config().weights()[sum.weights[0]].name.clone();
                    LlmError::Weight { name, source }
                })
            })?;
        }
        Ok(sums)
    }
}

/// Copies of the inputs that one window brings to the weights of a layer.
#[derive(Default)]
struct Inputs(Vec<(Vec<usize>, Array2<f32>)>);

impl Observer for Inputs {
    fn input(&mut self, weights: &[usize], x: ArrayView2<'_, f32>) {
        self.0.push((weights.to_vec(), x.to_owned()));
    }
}

/// The place of a weight, which is in memory only while its layer runs.
struct Slot {
    rows: usize,
    cols: usize,
    weight: Option<Dense>,
}

impl Slot {
    fn weight(&self) -> &Dense {
        self.weight.as_ref().expect("a layer's weights are loaded before it runs")
    }
}

impl LinearOp for Slot {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn apply(&self, x: ArrayView2<'_, f32>, y: ArrayViewMut2<'_, f32>, threads: Threads) {
        self.weight().apply(x, y, threads);
    }

    fn row_into(&self, row: usize, out: &mut [f32]) {
        self.weight().row_into(row, out);
    }
}
