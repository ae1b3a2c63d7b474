//! Activation statistics, layer by layer: the weights of one layer in memory at a time.

use crate::journal::Units;
use crate::stream::{Slot, Streamed};
use crate::{Checkpoint, Decoder, LlmError, Observer, Part, Pass, Progress};
use bitstack_core::{ActivationStats, Collect};
use ndarray::{Array2, ArrayView2};
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
    model: Streamed<'a>,
    /// Per window, the hidden states in front of the next layer.
    hidden: Vec<Array2<f32>>,
    collect: Collect,
    units: &'a Units,
    progress: &'a dyn Progress,
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
        progress: &'a dyn Progress,
    ) -> Result<Self, LlmError> {
        let config = checkpoint.config();
        let model = Streamed::original(checkpoint)?;
        let mut walk = Self { model, hidden: Vec::new(), collect, units, progress };
        progress.part(Part::Calibration, 0);
        if layer > 0 {
            walk.hidden = windows.iter().map(|w| Array2::zeros((w.len(), config.hidden_size))).collect();
        }
        let kept =
            (1..=layer).rev().find_map(|layer| walk.restore(layer).map(|found| found.then_some(layer)).transpose());
        let from = match kept.transpose()? {
            Some(layer) => layer,
            None => {
                walk.hidden = walk.model.embed(windows)?;
                0
            }
        };
        walk.model.run(from..layer, &mut walk.hidden)?;
        Ok(walk)
    }

    /// Takes all windows through layer `layer`; the inputs of its weights, q k v together, o, gate and up together, down. The states
    /// behind it are kept.
    pub(crate) fn layer(&mut self, layer: usize) -> Result<Vec<InputStats>, LlmError> {
        let Self { model, hidden, collect, progress, .. } = self;
        progress.part(Part::Calibration, 0);
        let inputs = model.with(model.layer_weights(layer), |model| {
            let step = |hidden: &mut _, pass: &mut Pass<'_>| model.decoder().layer(layer, hidden, pass);
            observe(model.decoder(), *collect, hidden, step, *progress)
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
        let decoder = self.model.decoder();
        self.progress.part(Part::Calibration, 0);
        let step = |hidden: &mut Array2<f32>, pass: &mut Pass<'_>| decoder.observe_head(hidden.view(), pass);
        Ok(observe(decoder, self.collect, &mut std::mem::take(&mut self.hidden), step, self.progress)?.remove(0))
    }

    /// Fills the states with those kept in front of a layer; whether there were any. If not, they may hold anything.
    fn restore(&mut self, layer: usize) -> Result<bool, LlmError> {
        let slices = self.hidden.iter_mut().map(|h| h.as_slice_mut().expect("states are in row order"));
        let mut parts: Vec<&mut [u8]> = slices.map(bytemuck::cast_slice_mut).collect();
        Ok(self.units.load_into(&states(layer), &mut parts)?)
    }
}

/// Runs every window through `step` and adds up what the weights saw, in the order of the windows.
fn observe(
    decoder: &Decoder<Slot>,
    collect: Collect,
    hidden: &mut [Array2<f32>],
    step: impl Fn(&mut Array2<f32>, &mut Pass<'_>) -> Result<(), LlmError> + Sync,
    progress: &dyn Progress,
) -> Result<Vec<InputStats>, LlmError> {
    let mut sums: Vec<InputStats> = Vec::new();
    for windows in hidden.chunks_mut(SIDE_BY_SIDE) {
        let tokens = windows.iter().map(|w| w.nrows() as u64).sum();
        progress.part(Part::Calibration, tokens);
        let seen = windows
            .par_iter_mut()
            .with_max_len(1)
            .map(|hidden| {
                let mut inputs = Inputs::default();
                step(hidden, &mut Pass::new().with_observer(&mut inputs))?;
                Ok(inputs.0)
            })
            .collect::<Result<Vec<_>, LlmError>>()?;
        progress.part(Part::Gram, tokens);
        if sums.is_empty() {
            sums.extend(seen[0].iter().map(|(weights, x)| InputStats {
                weights: weights.clone(),
                stats: ActivationStats::new(x.ncols(), collect),
            }));
        }
        sums.par_iter_mut().enumerate().with_max_len(1).try_for_each(|(group, sum)| {
            seen.iter().try_for_each(|inputs| sum.stats.update(inputs[group].1.view())).map_err(|source| {
                let name = decoder.config().weights()[sum.weights[0]].name.clone();
                LlmError::Weight { name, source }
            })
        })?;
    }
    Ok(sums)
}

/// Copies of the inputs that one window brings to the weights of a layer.
#[derive(Default)]
struct Inputs(Vec<(Vec<usize>, Array2<f32>)>);

impl Observer for Inputs {
    fn input(&mut self, weights: &[usize], x: ArrayView2<'_, f32>) {
        self.0.push((weights.to_vec(), x.to_owned()));
    }
}
