//! Weights become blocks.

use crate::calibrate::InputStats;
use crate::compress::{Aims, Making, shape};
use crate::job::Job;
use crate::options::{BlockMethod, Scaling, default_rank};
use crate::stream::Streamed;
use crate::{CompressError, calibrate, importance};
use bitstack_core::{ActivationStats, Collect, Scales, Shape, Threads, WeightStack};
use bitstack_decomp::{DecomposeOptions, Nested};
use bitstack_engine::EngineError;
use bitstack_model::{Part, WeightRole, WeightSpec};
use ndarray::Array2;
use std::sync::{Arc, PoisonError};

/// Blocks of a weight of nested codes that is neither ahead nor behind. One that is ahead by a level gets one more: stacks end where a further
/// block would gain as little, per byte, on each of them.
const BLOCKS: f64 = 9.5;

/// The range for those that are ahead or behind.
const LEAST_BLOCKS: f64 = 9.0;
const MOST_BLOCKS: f64 = 12.0;

/// What error feedback gains on a typical weight of a trained model ([`bitstack_decomp::feedback_gain`]): 4.5 to 6 for most of one of 14.7
/// million parameters; 2 in its first layer, whose inputs are hardly correlated.
const TYPICAL_GAIN: f64 = 5.0;

/// What the errors of an embedding count where it is looked up, in means of what they count where it is also the head: the rows rounded for
/// the one alone cost .035 nats and for the other .285 in SmolLM2-135M, .012 and .116 in Qwen2.5-0.5B.
const LOOKED_UP: f64 = 0.1;

/// What blocks of the published method leave of the square of a weight at the level that its spikes are chosen for: block 4 or 5.
const AVD_ERROR: f64 = 0.02;

/// Where weights are in the model, as far as their inputs go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// An embedding that is not the head: rows are looked up.
    Embedding,
    /// A layer.
    Layer(usize),
    /// The head, which may be the embedding too.
    Head,
}

/// What the weights of a place read, in groups of those that read the same.
pub(crate) type Inputs = Vec<Group>;

/// Some weights that read the same.
pub(crate) struct Group {
    /// Indices, in the model, of the weights.
    weights: Vec<usize>,
    stats: ActivationStats,
    /// As large as the weights themselves.
    gram: Option<Array2<f64>>,
}

impl Making<'_> {
    /// What jobs need in common is made first, so that none waits for another.
    pub(crate) fn prepare(&self, jobs: &[Job]) -> Result<(), CompressError> {
        let mut elements = 0;
        for weight in jobs.iter().filter_map(Job::weight) {
            self.inputs(self.place(weight))?;
            let spec = self.spec(weight);
            elements += (spec.rows * spec.cols) as u64;
        }
        if elements > 0 {
            self.aims()?;
            self.progress.part(Part::Decomposition, elements);
        }
        Ok(())
    }

    /// What the weights of a place read: kept until those of another are asked for.
    fn inputs(&self, place: Place) -> Result<Arc<Inputs>, CompressError> {
        let kept = || self.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, inputs)) = &*kept()
            && *of == place
        {
            return Ok(inputs.clone());
        }
        // The old ones go first, and nobody waits for the lock while these are made.
        self.forget_inputs();
        let config = self.checkpoint().config();
        let inputs = match place {
            // All columns of rows that are looked up count alike.
            Place::Embedding => {
                let stats = ActivationStats::new(config.hidden_size, Collect::Diagonal);
                vec![InputStats { weights: (0..config.vocab_parts()).collect(), stats }]
            }
            Place::Layer(layer) => {
                let mut inputs = self.walk(layer)?;
                calibrate::lend(config, layer, &mut inputs)?;
                inputs
            }
            Place::Head => {
                let hidden = self.states(config.n_layers())?;
                let model = Streamed::original(self.checkpoint())?;
                vec![calibrate::head(&model, hidden, self.collect(), self.progress)?]
            }
        };
        let specs = config.weights();
        let group = |mut input: InputStats| {
            // Without tokens all columns count alike.
            let mut gram = input.stats.take_gram().filter(|_| input.stats.tokens() > 0);
            // A head that is also the embedding is looked up as well as multiplied.
            if let Some(gram) = &mut gram
                && input.weights.iter().any(|w| specs[*w].role == WeightRole::Embedding)
            {
                let mean = gram.diag().mean().unwrap_or(0.0);
                gram.diag_mut().mapv_inplace(|h| h + LOOKED_UP * mean);
            }
            Group { weights: input.weights, stats: input.stats, gram }
        };
        let inputs = Arc::new(inputs.into_iter().map(group).collect::<Inputs>());
        *kept() = Some((place, inputs.clone()));
        Ok(inputs)
    }

    /// Whether what the weights of a place read was found here, and is kept.
    pub(crate) fn has_inputs(&self, place: Place) -> bool {
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|(of, _)| *of == place)
    }

    /// They are not needed any more.
    pub(crate) fn forget_inputs(&self) {
        *self.inputs.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The job of a weight.
    pub(crate) fn weight(&self, weight: usize) -> Result<(), CompressError> {
        let unit = Job::Weight(weight).to_string();
        if !self.finished().contains(&weight) && self.units.weight(&unit)?.is_none() {
            let spec = self.spec(weight);
            let inputs = self.inputs(self.place(weight))?;
            let group = inputs.iter().find(|group| group.weights.contains(&self.stacked[weight]));
            let group = group.expect("each weight of a place reads something");
            let (stack, errors) = self.decomposed(weight, spec, group)?;
            let kind = (self.rank(shape(spec)?), self.options.method.name());
            self.units.store_weight(&unit, spec, kind, &stack, &errors)?;
            self.progress.advance(1);
        }
        self.finished().insert(weight);
        Ok(())
    }

    pub(crate) fn rank(&self, shape: Shape) -> usize {
        match self.options.method {
            BlockMethod::Nested => 1,
            BlockMethod::Avd => self.options.rank.unwrap_or_else(|| default_rank(shape)),
        }
    }

    /// Memory that a job takes, about, beside what it has in common with others: see [`bitstack_decomp::blocks`].
    pub(crate) fn bytes_for(&self, job: Job) -> u64 {
        let Job::Weight(weight) = job else { return u64::MAX / 4 };
        let (spec, has_gram) = (self.spec(weight), self.collect() == Collect::Gram);
        let (cols, elements) = (spec.cols as u64, (spec.rows * spec.cols) as u64);
        let square = if has_gram { cols * cols } else { 0 };
        match self.options.method {
            BlockMethod::Nested => {
                let n_blocks = self.options.n_blocks.unwrap_or(MOST_BLOCKS as usize) as u64;
                let per_thread = 512 * cols * (2 * n_blocks + 3);
                4 * elements + n_blocks * elements / 2 + 12 * square + per_thread * rayon::current_num_threads() as u64
            }
            BlockMethod::Avd => 8 * elements + 4 * square,
        }
    }

    fn decomposed(
        &self,
        weight: usize,
        spec: &WeightSpec,
        Group { stats, gram, .. }: &Group,
    ) -> Result<(WeightStack, Vec<f64>), CompressError> {
        let gram = gram.as_ref().map(|gram| gram.view());
        let Aims { leads, middle, .. } = self.aims()?;
        let in_weight = |source| EngineError::Weight { name: spec.name.clone(), source };
        let in_decomposition = |source| CompressError::Decompose { name: spec.name.clone(), source };
        let config = self.checkpoint().config();
        let attention = spec.layer.map(|layer| &config.layers[layer].attention);
        let grouped = attention.is_some_and(|attention| attention.n_heads != attention.n_kv_heads);
        let scales = match self.options.scaling {
            // Nothing is known about the inputs of an embedding, or of an expert that no token met.
            _ if stats.tokens() == 0 => Scales::none(spec.cols),
            Scaling::None => Scales::none(spec.cols),
            Scaling::Gram => Scales::rms(stats).map_err(in_weight)?,
            // It folds scales into the layer in front, and there is none to take them when heads share their values.
            Scaling::Reference if grouped && spec.role == WeightRole::AttentionOutput => Scales::none(spec.cols),
            Scaling::Reference => Scales::reference(stats).map_err(in_weight)?,
        };
        let matrix = self.checkpoint().matrix(spec)?;
        let options = match self.options.method {
            BlockMethod::Nested => {
                let gain = gram.map_or(Ok(1.0), |gram| bitstack_decomp::feedback_gain(matrix.view(), gram));
                let gain = gain.map_err(in_decomposition)?;
                // Rounding knows of no feedback: a weight that gains less from it needs more levels for the same error.
                let lead = leads[weight] - 0.5 * (gain / TYPICAL_GAIN).log2();
                DecomposeOptions::nested(
                    self.options.n_blocks.unwrap_or(default_blocks(lead)),
                    Nested::around(middle + lead),
                )
                .threads(Threads::Pool)
            }
            BlockMethod::Avd => {
                let n_blocks = self.options.n_blocks.unwrap_or(16);
                DecomposeOptions::new(self.rank(shape(spec)?), n_blocks)
                    .spikes(self.options.spikes.then_some(AVD_ERROR))
            }
        };
        let mut options = options.seed(self.options.seed).scales(&scales);
        if let Some(gram) = gram {
            options = options.gram(gram);
        }
        let result = bitstack_decomp::decompose(matrix.view(), &options).map_err(in_decomposition)?;
        let error = |e: &bitstack_decomp::LevelReport| e.output.map_or(e.squared_error, |o| o.squared_error);
        let rounded = importance::rounding_error(matrix.view(), gram);
        Ok((result.stack, result.errors.iter().map(error).chain([rounded]).collect()))
    }
}

/// Blocks of a weight of nested codes that is so many levels ahead of the others.
fn default_blocks(lead: f64) -> usize {
    (BLOCKS + lead).round().clamp(LEAST_BLOCKS, MOST_BLOCKS) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_has_a_block_more_for_each_level_that_it_is_ahead() {
        assert_eq!([-9.0, -2.0, -0.4, 0.0, 0.6, 3.0, 9.0].map(default_blocks), [9, 9, 9, 10, 10, 12, 12]);
    }
}
