//! Activation statistics, layer by layer: the weights of one layer in memory at a time.

use crate::journal::Units;
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
    units: &'a Units,
}

/// The unit of the hidden states in front of a layer.
fn states(layer: usize) -> String {
    format!("states.{layer:04}")
}

impl<'a> Walk<'a> {
    /// Brings the windows to the front of layer `layer` (`n_layers`: of the head): from where a former walk left them, if it did.
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        windows: &[&[u32]],
        collect: Collect,
        layer: usize,
        units: &'a Units,
    ) -> Result<Self, LlmError> {
        let empty = |_, spec: &crate::WeightSpec| Ok(Slot { rows: spec.rows, cols: spec.cols, weight: None });
        let decoder = Decoder::new(checkpoint.config().clone(), empty, |spec| checkpoint.vector(spec))?;
        let mut walk = Self { checkpoint, decoder, hidden: Vec::new(), collect, units };
        if layer > 0 {
            walk.hidden = windows.iter().map(|w| Array2::zeros((w.len(), checkpoint.config().hidden_size))).collect();
        }
        let kept =
            (1..=layer).rev().find_map(|layer| walk.restore(layer).map(|found| found.then_some(layer)).transpose());
        let from = match kept.transpose()? {
            Some(layer) => layer,
            None => {
                walk.load(0..1)?;
                walk.hidden = windows.iter().map(|w| walk.decoder.embed(w)).collect::<Result<_, _>>()?;
                walk.unload(0..1);
                0
            }
        };
        for layer in from..layer {
            let step = |walk: &Self, hidden: &mut [Array2<f32>]| {
                let run = |h: &mut Array2<f32>| walk.decoder.layer(layer, h, &mut Pass::new());
                hidden.par_iter_mut().with_max_len(1).try_for_each(run)
            };
            walk.with_layer(layer, step)?;
        }
        Ok(walk)
    }

    /// Takes all windows through layer `layer`; the inputs of its weights, q k v together, o, gate and up together, down. The states
    /// behind it are kept.
    pub(crate) fn layer(&mut self, layer: usize) -> Result<Vec<InputStats>, LlmError> {
        let inputs = self.with_layer(layer, |walk, hidden| {
            walk.collect(hidden, |decoder, hidden, pass| decoder.layer(layer, hidden, pass))
        })?;
        let slices = self.hidden.iter().map(|h| h.as_slice().expect("states are in row order"));
        let parts: Vec<&[u8]> = slices.map(bytemuck::cast_slice).collect();
        self.units.store(&states(layer + 1), &parts)?;
        Ok(inputs)
    }

    /// The weights of a layer are finished: the states in front of it are not needed any more.
    pub(crate) fn finish(&self, layer: usize) -> Result<(), LlmError> {
        Ok(self.units.remove(&states(layer))?)
    }

    /// The input of the head, after all layers.
    pub(crate) fn head(&mut self) -> Result<InputStats, LlmError> {
        let mut hidden = std::mem::take(&mut self.hidden);
        let mut stats = self.collect(&mut hidden, |decoder, hidden, pass| decoder.observe_head(hidden.view(), pass))?;
        Ok(stats.remove(0))
    }

    /// Fills the states with those kept in front of a layer; whether there were any. If not, they may hold anything.
    fn restore(&mut self, layer: usize) -> Result<bool, LlmError> {
        let slices = self.hidden.iter_mut().map(|h| h.as_slice_mut().expect("states are in row order"));
        let mut parts: Vec<&mut [u8]> = slices.map(bytemuck::cast_slice_mut).collect();
        Ok(self.units.load_into(&states(layer), &mut parts)?)
    }

    /// Runs `step` on the states with the weights of a layer in memory.
    fn with_layer<T>(
        &mut self,
        layer: usize,
        step: impl FnOnce(&Self, &mut [Array2<f32>]) -> Result<T, LlmError>,
    ) -> Result<T, LlmError> {
        let specs = self.checkpoint.config().weights();
        let first = specs.iter().position(|w| w.layer == Some(layer)).expect("a layer has weights");
        let range = first..first + specs.iter().filter(|w| w.layer == Some(layer)).count();
        self.load(range.clone())?;
        let mut hidden = std::mem::take(&mut self.hidden);
        let result = step(self, &mut hidden);
        self.hidden = hidden;
        self.unload(range);
        result
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
