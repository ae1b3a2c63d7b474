//! Activation statistics, layer by layer: the weights of one layer in memory at a time.

use crate::stream::{Slot, Streamed};
use bitstack_core::{ActivationStats, Collect};
use bitstack_engine::{Decoder, EngineError, Observer, Pass};
use bitstack_model::config::{FeedForwardInput, Linear, Mlp};
use bitstack_model::{ModelConfig, Part, Progress};
use ndarray::{Array1, Array2, ArrayView2};
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

/// Takes windows of text, by their hidden states, through layer `layer`: the inputs of its weights, q k v together, o, gate and up together, down;
/// or those of the router and of each expert.
pub(crate) fn layer(
    model: &mut Streamed<'_>,
    layer: usize,
    hidden: &mut [Array2<f32>],
    collect: Collect,
    progress: &dyn Progress,
) -> Result<Vec<InputStats>, EngineError> {
    progress.part(Part::Calibration, 0);
    model.with(model.layer_weights(layer), |model| {
        let step = |hidden: &mut _, pass: &mut Pass<'_>| model.decoder().layer(layer, hidden, pass);
        observe(model.decoder(), collect, hidden, step, progress)
    })
}

/// The input of the head, from the hidden states behind all layers.
pub(crate) fn head(
    model: &Streamed<'_>,
    mut hidden: Vec<Array2<f32>>,
    collect: Collect,
    progress: &dyn Progress,
) -> Result<InputStats, EngineError> {
    let decoder = model.decoder();
    progress.part(Part::Calibration, 0);
    let step = |hidden: &mut Array2<f32>, pass: &mut Pass<'_>| decoder.observe_head(hidden.view(), pass);
    Ok(observe(decoder, collect, &mut hidden, step, progress)?.remove(0))
}

/// Lends experts what few tokens, or none, cannot tell of their inputs: as many tokens as a quarter of the channels, of the kind that all experts read,
/// or, behind the nonlinearity, whose channels have nothing to do with each other. Errors go where inputs are not, and a few tokens leave most places
/// empty. An expert that no token met has no statistics behind its nonlinearity.
pub(crate) fn lend(config: &ModelConfig, layer: usize, inputs: &mut [InputStats]) -> Result<(), EngineError> {
    let Mlp::Experts(mlp) = &config.layers[layer].mlp else { return Ok(()) };
    let place = |inputs: &[InputStats], linear: Linear| {
        let index = config.index(linear.weight);
        inputs.iter().position(|group| group.weights.contains(&index)).expect("every weight of a layer reads something")
    };
    let lent = |gram: Option<Array2<f64>>, stats: &ActivationStats| {
        let tokens = stats.cols().div_ceil(4) as u64;
        match gram {
            Some(gram) => ActivationStats::from_gram(gram.view(), tokens),
            None => ActivationStats::from_mean_square(&stats.mean_square(), tokens),
        }
    };
    let name = || config.weights()[config.index(mlp.router.weight)].name.clone();
    let in_router = |source| EngineError::Weight { name: name(), source };
    let all = &inputs[place(inputs, mlp.router)].stats;
    let of_all = lent(all.gram(), all).map_err(in_router)?;
    for expert in &mlp.experts {
        let input = match expert.input {
            FeedForwardInput::Gated { gate, .. } => gate,
            FeedForwardInput::FusedGated(linear) | FeedForwardInput::Plain(linear) => linear,
        };
        let input = place(inputs, input);
        inputs[input].stats.merge(&of_all).map_err(in_router)?;
        let own = &mut inputs[place(inputs, expert.down)].stats;
        if own.tokens() > 0 {
            let gram = own.has_gram().then(|| Array2::from_diag(&Array1::from(own.mean_square())));
            let alone = lent(gram, own).map_err(in_router)?;
            own.merge(&alone).map_err(in_router)?;
        }
    }
    Ok(())
}

/// Runs every window through `step` and adds up what the weights saw, in the order of the windows.
fn observe(
    decoder: &Decoder<Slot>,
    collect: Collect,
    hidden: &mut [Array2<f32>],
    step: impl Fn(&mut Array2<f32>, &mut Pass<'_>) -> Result<(), EngineError> + Sync,
    progress: &dyn Progress,
) -> Result<Vec<InputStats>, EngineError> {
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
            .collect::<Result<Vec<_>, EngineError>>()?;
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
                EngineError::Weight { name, source }
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
