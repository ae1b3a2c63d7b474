//! From a checkpoint to blocks in their order: calibrate a layer, decompose its weights, go on to the next; then sort.

use crate::calibrate::{InputStats, Walk};
use crate::journal::Units;
use crate::order::{Curve, Reference};
use crate::text::{Windows, default_seq_len, thirds, with_thirds};
use crate::vocabulary::share_by_frequency;
use crate::{
    Checkpoint, Decoder, LlmError, ModelConfig, Part, Progress, SamplingOptions, Tokenizer, WeightRole, WeightSpec,
    importance, order, quality, sample, stack,
};
use bitstack_core::{ActivationStats, Collect, Scales, Shape, WeightStack};
use bitstack_decomp::{DecomposeOptions, Nested, Parallelism};
use bitstack_format::{BlockSource, Draft, FormatError};
use bitstack_sort::{Balanced, Greedy, LoadOrder, Method, Random, Scores, Sizes};
use ndarray::ArrayView2;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;
use std::ops::Range;
use std::path::Path;

/// Windows of text that measurements choose from; and those on which the orders by perplexity are measured, if not told otherwise.
const VALIDATION_WINDOWS: usize = 16;

/// Windows for the order by gain: divergences are far less noisy than perplexities.
const GAIN_WINDOWS: usize = 2;

/// Tokens on which the importance of weights is found. It scatters by .08 levels about that on twice as many.
const PROBE_TOKENS: usize = 2048;

/// The hidden states in front of all layers that this keeps in memory, at most; those of one window at least.
const PROBE_BYTES: u64 = 2 << 30;

/// The fewest tokens that a layer is measured on. On 64 and 128 instead of 512, the divergence of a model of 14.7 million parameters is 10 and
/// 6 % larger, averaged over formats from 1.6 to 5.7 bits per weight.
const LEAST_RUN: usize = 64;

/// The most tokens of a window on which orders are checked. Orders are compared on the same ones: on 256 of 512 the same orders win, for a
/// model of 14.7 million parameters.
const CHECK_RUN: usize = 256;

/// The range of [`middle`].
const LEAST_MIDDLE: f64 = 3.2;
const MOST_MIDDLE: f64 = 4.8;

/// The level at which errors are those of the rounding by which importance is found: SmolLM2-135M has the divergence of all weights rounded, by
/// importance 1.39 nats, divided by 4 for each level above it (.084 at 4.74 bits).
const ROUNDING_LEVEL: f64 = 2.7;

/// The divergence, in nats per token, below which a model is as good as whole: half of what `compress` warns of.
const WHOLE: f64 = 0.01;

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

/// Weights are decomposed side by side up to this much memory; the results do not depend on it. A weight that needs more is alone: the
/// largest of a model of 70 billion weights needs 13 GB.
const SIDE_BY_SIDE_BYTES: u64 = 6 << 30;

/// Windows of its own text that a model writes side by side: every weight is read once for all of them, and their keys and values are in memory
/// beside it.
const OWN_WINDOWS: usize = 48;

/// A model of more weights than this does not add to a user's text: all of it would be in memory (4 GB in 16 bits).
const MOST_WRITING: u64 = 2_000_000_000;

/// A model of no more weights than this is widened to f32 (2 GB) before it writes.
const WIDENED: u64 = 500_000_000;

/// The unit of the finished load order.
const ORDER: &str = "order";

/// How a weight becomes blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ordering {
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
#[derive(Debug, Clone)]
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
    pub ordering: Ordering,
    /// Windows of calibration text.
    pub samples: usize,
    /// Tokens per window; `None`: 512, or the model's limit.
    pub seq_len: Option<usize>,
    /// Windows on which [`Ordering::Perplexity`] and [`Ordering::Greedy`] measure each block: every block of the model is a run over all of
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
            ordering: Ordering::Gain,
            samples: 64,
            seq_len: None,
            order_windows: VALIDATION_WINDOWS,
            keep_embeddings: false,
            seed: 0,
        }
    }
}

/// A compressed model, ready to be written: `draft.finish(order.weights(), ..)`. One that was made by [`compress`] says how good it is:
/// [`Quality::of`](crate::quality::Quality::of) its draft, or of the file.
#[derive(Debug)]
pub struct Compressed {
    /// Blocks, unstacked tensors and companion files.
    pub draft: Draft,
    /// The order of the blocks.
    pub order: LoadOrder,
}

/// Compresses a checkpoint.
///
/// `text` is for calibration (first half) and for choosing an order (second half); without it the model writes its own. For nested codes
/// a model of up to two billion weights also writes every third window of the calibration, so that texts unlike the user's are served too.
/// At last the stack is measured against the model, from its smallest size to the largest: see [`Quality`](crate::quality::Quality). Blocks
/// go to a scratch file in the directory `scratch`; a [`Journal`](crate::Journal) keeps them instead, and can go on after a kill.
///
/// One layer is in memory at a time, except while the model writes: then it is all there in the type it is stored in (in f32 if it has no more
/// than half a billion weights), with the keys and values of up to 48 windows. That is before the other work begins.
///
/// # Errors
/// What can be wrong with the checkpoint, the text or the options; failures to write the scratch file.
pub fn compress(
    checkpoint: &Checkpoint,
    text: Option<&str>,
    options: &CompressOptions,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<Compressed, LlmError> {
    run(checkpoint, text, options, &Units::none(scratch), progress)
}

/// [`compress`], going on from the units that are finished.
pub(crate) fn run(
    checkpoint: &Checkpoint,
    text: Option<&str>,
    options: &CompressOptions,
    units: &Units,
    progress: &dyn Progress,
) -> Result<Compressed, LlmError> {
    if options.order_windows == 0 && matches!(options.ordering, Ordering::Perplexity | Ordering::Greedy) {
        return Err(LlmError::NoWindows);
    }
    // First, so that a place that cannot be written to is known before the long work.
    let draft = Draft::create_in(units.dir())?;
    let whole = checkpoint;
    let cut = (options.method == BlockMethod::Nested && !options.keep_embeddings).then(|| whole.with_cut_vocabulary());
    let checkpoint = cut.as_ref().unwrap_or(whole);
    let seq_len = options.seq_len.unwrap_or_else(|| default_seq_len(checkpoint.config()));
    progress.part(Part::Text, 0);
    let tokens = match text {
        Some(text) => {
            let tokens = Tokenizer::from_bytes(&checkpoint.companion("tokenizer.json")?)?.encode(text)?;
            progress.part(Part::Text, tokens.len() as u64);
            tokens
        }
        None => {
            let windows = options.samples + options.order_windows.max(VALIDATION_WINDOWS);
            own_text(checkpoint, windows, seq_len, options.seed, units, progress)?
        }
    };
    let windows = Windows::new(&tokens, seq_len, checkpoint.config().max_positions)?;
    let (calibration, validation) = match text {
        Some(_) => windows.halves(),
        None => windows.split_at(options.samples),
    };
    // A text of one window has to do for both.
    let calibration = if calibration.is_empty() { windows } else { calibration };
    let calibration = calibration.evenly_spaced(options.samples);
    let ordering = validation.evenly_spaced(options.order_windows);
    let validation = validation.evenly_spaced(VALIDATION_WINDOWS);

    let n_tokens = calibration.iter().map(|w| w.len()).sum();
    let checks = beginnings(&validation, CHECK_RUN);
    let runs = runs(&validation, n_tokens, checkpoint.config().n_layers);

    let probe = probe(&validation, checkpoint.config());

    // Nested codes put their errors where the inputs are not. The model's own text goes to places where the user's does not.
    let writes = text.is_some() && options.method == BlockMethod::Nested && can_write(checkpoint.config());
    let n_own = if writes { thirds(calibration.len()) } else { 0 };
    // Two texts to a window: twice as many are written side by side, in half as many steps.
    let half = seq_len.div_ceil(2);
    let own = own_text(checkpoint, 2 * n_own, half, options.seed, units, progress)?;
    let mixed = with_thirds(&calibration, own.chunks_exact(2 * half).map(|both| &both[..seq_len]));
    let Decomposed { mut draft, errors, roundings } =
        decompose_all(checkpoint, &tokens, &mixed, &probe, options, draft, units, progress)?;
    let sizes = Sizes::new(draft.base_bytes(), draft.block_sizes())?;
    let finished = units.load(ORDER)?.and_then(|order| LoadOrder::from_weights(&order, &sizes).ok());
    let order = match (finished, options.ordering) {
        (Some(order), _) => order,
        (None, Ordering::Gain) => {
            let all = errors.iter().zip(roundings.iter().copied());
            let curves: Vec<Curve<'_>> =
                all.map(|(errors, rounded_divergence)| Curve::new(errors, rounded_divergence)).collect();
            let curves =
                order::divergence_curves(&Reference::new(checkpoint, &runs)?, &draft, &curves, units, progress)?;
            let reference = Reference::new(checkpoint, &checks)?;
            order::checked(&reference, &draft, &curves, units, progress)?
        }
        (None, Ordering::Perplexity) => {
            progress.part(Part::Order, 0);
            let scores = order::perplexities(&draft, &ordering, units, progress)?;
            Balanced { scores: Scores::new(scores) }.order(&sizes)?
        }
        (None, Ordering::Greedy) => {
            progress.part(Part::Order, 0);
            let scores = order::perplexities(&draft, &ordering, units, progress)?;
            Greedy { scores: Scores::new(scores) }.order(&sizes)?
        }
        (None, Ordering::Random) => Random { seed: options.seed }.order(&sizes)?,
    };
    units.store(ORDER, &[bytemuck::cast_slice(order.weights())])?;
    let windows = quality::windows(&validation, runs.len(), n_tokens);
    let costs = quality::costs(&errors, &roundings);
    let quality = quality::measure(checkpoint, &draft, &order, &windows, &costs, units, progress)?;
    draft.set_provenance(quality::PROVENANCE_KEY, &quality.to_json())?;
    Ok(Compressed { draft, order })
}

/// The windows on which the importance of weights is found: [`PROBE_TOKENS`] in all, fewer where their states are larger than [`PROBE_BYTES`].
fn probe<'w>(validation: &[&'w [u32]], config: &ModelConfig) -> Vec<&'w [u32]> {
    let len = validation.iter().map(|w| w.len()).max().unwrap_or(1).max(1);
    let states = 4 * (len * config.hidden_size) as u64 * (config.n_layers as u64 + 1);
    let most = (PROBE_BYTES / states).min((PROBE_TOKENS / len) as u64).max(1) as usize;
    let n = most.min(validation.len());
    (0..n).map(|i| validation[i * validation.len() / n]).collect()
}

/// The beginnings of the windows on which layers are measured: short enough that all these runs together, of half of the model each, read an
/// eighth as many tokens as calibration does.
fn runs<'w>(validation: &[&'w [u32]], calibration: usize, n_layers: usize) -> Vec<&'w [u32]> {
    beginnings(validation, (calibration / (8 * n_layers.max(1))).max(LEAST_RUN))
}

/// The first tokens of the windows for the order by gain.
fn beginnings<'w>(validation: &[&'w [u32]], tokens: usize) -> Vec<&'w [u32]> {
    validation.iter().take(GAIN_WINDOWS).map(|w| &w[..w.len().min(tokens)]).collect()
}

/// The default rank of a weight under the published method: 16, lowered until the f16 factors of a block take at most 1/8 bit per weight, which is what they
/// take at rank 16 in a 4096 x 4096 weight.
pub fn default_rank(shape: Shape) -> usize {
    let bits_per_rank = 16.0 * (shape.rows() + shape.cols()) as f64 / shape.n_elems() as f64;
    ((0.125 / bits_per_rank) as usize).clamp(1, 16)
}

/// The level that codes of an ordinary weight are best at, from the divergences of the model when each weight alone is rounded: where the whole model
/// becomes as good as the original, within a range. A lower one makes the small sizes of a model better and the large ones worse.
///
/// Models of real size need more levels. SmolLM2-135M, with 1.39 nats, would have 5.8: made for 5.0 in place of 4.7 it is 5 to 13 % worse up to 3.7
/// bits per weight, and 2 to 4 % better above (on another text than the calibration's 1 to 6 % and 3 to 7 %). A model of 14.7 million
/// parameters has .016 nats: made for 3.4 in place of 3.87 it is a sixth better at 2.2 and 2.7 bits, and at most 7 % worse above 5.
fn middle(roundings: &[f64]) -> f64 {
    let nats: f64 = roundings.iter().map(|nats| nats.max(0.0)).sum();
    (ROUNDING_LEVEL + 0.5 * (nats / WHOLE).log2()).clamp(LEAST_MIDDLE, MOST_MIDDLE)
}

/// Blocks of a weight of nested codes that is so many levels ahead of the others.
fn default_blocks(lead: f64) -> usize {
    (BLOCKS + lead).round().clamp(LEAST_BLOCKS, MOST_BLOCKS) as usize
}

/// Whether a model is small enough that it can be in memory to write a third of the calibration.
fn can_write(config: &ModelConfig) -> bool {
    n_elements(config) <= MOST_WRITING
}

fn n_elements(config: &ModelConfig) -> u64 {
    config.weights().iter().map(|w| w.rows as u64 * w.cols as u64).sum()
}

/// Text of the model's own: windows sampled at temperature 1, one after the other in one list.
///
/// They are sampled in groups, and a group is there whole or not at all: what a window's neighbours are may show in its tokens.
fn own_text(
    checkpoint: &Checkpoint,
    n_windows: usize,
    seq_len: usize,
    seed: u64,
    units: &Units,
    progress: &dyn Progress,
) -> Result<Vec<u32>, LlmError> {
    let name = |group: usize| format!("text.{group:05}");
    let firsts = (0..n_windows).step_by(OWN_WINDOWS);
    let mut groups = (0..firsts.len()).map(|group| units.load(&name(group))).collect::<Result<Vec<_>, _>>()?;
    if groups.iter().any(Option::is_none) {
        let decoder = Decoder::load_with(checkpoint, progress)?;
        let decoder = if n_elements(checkpoint.config()) <= WIDENED { decoder.widened() } else { decoder };
        let steps = seq_len.saturating_sub(1);
        progress.stage("text from the model (steps)", groups.len().saturating_mul(steps) as u64);
        for ((group, windows), first) in groups.iter_mut().enumerate().zip(firsts) {
            if windows.is_some() {
                progress.advance(steps as u64);
                continue;
            }
            let starts: Vec<u32> = (first..n_windows.min(first + OWN_WINDOWS))
                .map(|window| start_token(checkpoint.config().vocab_size, seed, window))
                .collect();
            let sampling = SamplingOptions::with_temperature(1.0, seed.wrapping_add(first as u64));
            let sampled = sample::windows(&decoder, &starts, seq_len, sampling, progress)?.concat();
            units.store(&name(group), &[bytemuck::cast_slice(&sampled)])?;
            *windows = Some(sampled);
        }
    }
    progress.part(Part::Text, (n_windows * seq_len) as u64);
    Ok(groups.into_iter().flatten().flatten().collect())
}

/// The token that window `window` of the model's own text begins with: any of the vocabulary.
///
/// Models see an end token between texts. But what those that were taught to chat write after it is hardly ever anything but a system prompt.
fn start_token(vocab_size: usize, seed: u64, window: usize) -> u32 {
    // The samples that follow come from the seed itself; the start must not be one of their numbers.
    let seed = !seed.wrapping_add(window as u64);
    StdRng::seed_from_u64(seed).random_range(0..vocab_size as u32)
}

/// All weights decomposed.
struct Decomposed {
    draft: Draft,
    /// Per stacked weight, the squared error of its outputs at every level, and at last that of the rounded weight, per token.
    errors: Vec<Vec<f64>>,
    /// Per stacked weight, the divergence of the model when it alone is rounded; none where nothing asks for it, or no run is wanted.
    roundings: Vec<f64>,
}

/// Measures what each weight counts for, on the windows `probe` and by the frequencies of `tokens`; calibrates and decomposes.
#[expect(clippy::too_many_arguments, reason = "each is another part of what a compression is")]
fn decompose_all(
    checkpoint: &Checkpoint,
    tokens: &[u32],
    windows: &[&[u32]],
    probe: &[&[u32]],
    options: &CompressOptions,
    draft: Draft,
    units: &Units,
    progress: &dyn Progress,
) -> Result<Decomposed, LlmError> {
    let config = checkpoint.config();
    let specs = config.weights();
    let mut work = Work {
        checkpoint,
        options,
        units,
        progress,
        draft,
        errors: Vec::new(),
        leads: Vec::new(),
        middle: MOST_MIDDLE,
    };
    for (name, contents) in checkpoint.companions()? {
        work.draft.push_file(&name, &contents)?;
    }
    for spec in config.other_tensors() {
        let (dtype, data) = stack::stored(&checkpoint.elements(&spec.name, &[spec.len])?);
        work.draft.push_base(&spec.name, dtype, &[spec.len], &data)?;
    }
    for spec in &specs {
        let shape = work.shape(spec)?;
        if work.is_kept(spec) {
            let (dtype, data) = stack::stored(&checkpoint.elements(&spec.tensor_name(), &spec.tensor_shape())?);
            work.draft.push_base(&spec.tensor_name(), dtype, &spec.tensor_shape(), &data)?;
        } else {
            work.draft.add_weight(&spec.name, shape, work.rank(shape), options.method.name())?;
            work.errors.push(Vec::new());
        }
    }

    let mut roundings = match (options.ordering, options.method) {
        (Ordering::Random, _) | (Ordering::Perplexity | Ordering::Greedy, BlockMethod::Avd) => Vec::new(),
        _ => importance::roundings(checkpoint, &work.draft, probe, options.seed, units, progress)?,
    };
    if !roundings.is_empty() {
        let stacked: Vec<&WeightSpec> = specs.iter().filter(|spec| !work.is_kept(spec)).collect();
        share_by_frequency(&mut roundings, &stacked, tokens);
    }
    let sizes: Vec<f64> = work.draft.weights().iter().map(|w| w.shape.n_elems() as f64).collect();
    (work.leads, work.middle) = if roundings.is_empty() {
        (vec![0.0; sizes.len()], MOST_MIDDLE)
    } else {
        (importance::leads(&roundings, &sizes), middle(&roundings))
    };
    let finished = work.take_finished()?;
    progress.stage("decompose (weights)", work.errors.len() as u64);
    progress.advance(finished);
    if finished > 0 {
        progress.resumed(finished, work.errors.len() as u64);
    }
    let open: Vec<&WeightSpec> = specs.iter().filter(|s| work.is_open(s)).collect();
    let (Some(_), n_layers) = (open.first(), config.n_layers) else {
        return Ok(Decomposed { draft: work.draft, errors: work.errors, roundings });
    };
    if open[0].role == WeightRole::Embedding && !config.tied {
        // Rows of an embedding are looked up, not multiplied: all its columns count alike.
        work.weights(vec![InputStats {
            weights: (0..config.vocab_parts()).collect(),
            stats: ActivationStats::new(config.hidden_size, Collect::Diagonal),
        }])?;
    }
    let needs_gram = options.ordering == Ordering::Gain || options.method == BlockMethod::Nested;
    let collect = if needs_gram { Collect::Gram } else { Collect::Diagonal };
    let first = open.iter().filter_map(|s| s.layer).min().unwrap_or(n_layers);
    let mut walk = Walk::new(checkpoint, windows, collect, first, units, progress)?;
    for layer in first..n_layers {
        work.weights(walk.layer(layer)?)?;
        walk.finish(layer)?;
    }
    if specs.iter().any(|s| s.layer.is_none() && work.is_open(s)) {
        work.weights(vec![walk.head()?])?;
    }
    walk.finish(n_layers)?;
    Ok(Decomposed { draft: work.draft, errors: work.errors, roundings })
}

/// Runs of jobs, in their order, that stay within `limit` together, or are one job.
fn batches(needs: &[u64], limit: u64) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut sum = 0;
    for (i, need) in needs.iter().enumerate() {
        sum += need;
        match batches.last_mut() {
            Some(last) if sum <= limit => last.end = i + 1,
            _ => {
                batches.push(i..i + 1);
                sum = *need;
            }
        }
    }
    batches
}

/// What decomposing goes through.
struct Work<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a CompressOptions,
    units: &'a Units,
    progress: &'a dyn Progress,
    draft: Draft,
    /// See [`Decomposed`].
    errors: Vec<Vec<f64>>,
    /// See [`importance::leads`].
    leads: Vec<f64>,
    /// See [`middle`].
    middle: f64,
}

impl Work<'_> {
    fn is_kept(&self, spec: &WeightSpec) -> bool {
        self.options.keep_embeddings && matches!(spec.role, WeightRole::Embedding | WeightRole::Head)
    }

    /// Whether the weight is to be stacked and is not yet.
    fn is_open(&self, spec: &WeightSpec) -> bool {
        self.draft.weight_index(&spec.name).is_some_and(|weight| self.errors[weight].is_empty())
    }

    /// Takes the weights that are finished into the draft; how many there are.
    fn take_finished(&mut self) -> Result<u64, LlmError> {
        let mut finished = 0;
        for (weight, errors) in self.errors.iter_mut().enumerate() {
            if let Some(found) = self.units.take_weight(weight, &mut self.draft)? {
                *errors = found;
                finished += 1;
            }
        }
        Ok(finished)
    }

    fn shape(&self, spec: &WeightSpec) -> Result<Shape, LlmError> {
        Shape::new(spec.rows, spec.cols).map_err(|source| LlmError::Weight { name: spec.name.clone(), source })
    }

    fn rank(&self, shape: Shape) -> usize {
        match self.options.method {
            BlockMethod::Nested => 1,
            BlockMethod::Avd => self.options.rank.unwrap_or_else(|| default_rank(shape)),
        }
    }

    /// Decomposes the weights that read these inputs, as many side by side as memory allows, and puts their blocks into the draft.
    fn weights(&mut self, mut inputs: Vec<InputStats>) -> Result<(), LlmError> {
        let specs = self.checkpoint.config().weights();
        // Once for all weights that read the same input: it is as large as they are.
        let mut grams: Vec<_> = inputs.iter_mut().map(|group| group.stats.take_gram()).collect();
        for (group, gram) in inputs.iter().zip(&mut grams) {
            // A head that is also the embedding is looked up as well as multiplied: there all columns count alike.
            if let Some(gram) = gram
                && group.weights.iter().any(|w| specs[*w].role == WeightRole::Embedding)
            {
                let mean = gram.diag().mean().unwrap_or(0.0);
                gram.diag_mut().mapv_inplace(|h| h + LOOKED_UP * mean);
            }
        }
        let jobs: Vec<(&WeightSpec, usize)> = inputs
            .iter()
            .enumerate()
            .flat_map(|(group, input)| input.weights.iter().map(move |w| (*w, group)))
            .map(|(w, group)| (&specs[w], group))
            .filter(|(spec, _)| self.is_open(spec))
            .collect();
        self.progress.part(Part::Decomposition, jobs.iter().map(|(spec, _)| (spec.rows * spec.cols) as u64).sum());
        let needs: Vec<u64> = jobs.iter().map(|(spec, group)| self.bytes_for(spec, grams[*group].is_some())).collect();
        for batch in batches(&needs, SIDE_BY_SIDE_BYTES) {
            let done = jobs[batch.clone()]
                .par_iter()
                .with_max_len(1)
                .map(|(spec, group)| {
                    let gram = grams[*group].as_ref().map(|g| g.view());
                    let (stack, errors) = self.one(spec, &inputs[*group].stats, gram)?;
                    let weight = self.draft.weight_index(&spec.name).expect("an open weight is in the draft");
                    let kind = (self.draft.weights()[weight].rank, self.options.method.name());
                    let is_kept = self.units.store_weight(weight, spec, kind, &stack, &errors)?;
                    self.progress.advance(1);
                    Ok((weight, (!is_kept).then_some(stack), errors))
                })
                .collect::<Result<Vec<_>, LlmError>>()?;
            for (weight, stack, errors) in done {
                match stack {
                    None => {
                        let taken = self.units.take_weight(weight, &mut self.draft)?;
                        taken
                            .ok_or_else(|| FormatError::Damaged { name: self.draft.weights()[weight].name.clone() })?;
                    }
                    Some(stack) => {
                        stack.blocks().iter().try_for_each(|block| self.draft.push_block(weight, block.view()))?;
                    }
                }
                self.errors[weight] = errors;
            }
            let first_needed = jobs.get(batch.end).map_or(grams.len(), |(_, group)| *group);
            grams[..first_needed].fill(None);
        }
        Ok(())
    }

    /// Memory that decomposing a weight takes, about: see [`bitstack_decomp::blocks`].
    fn bytes_for(&self, spec: &WeightSpec, has_gram: bool) -> u64 {
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

    fn one(
        &self,
        spec: &WeightSpec,
        stats: &ActivationStats,
        gram: Option<ArrayView2<'_, f64>>,
    ) -> Result<(WeightStack, Vec<f64>), LlmError> {
        let in_weight = |source| LlmError::Weight { name: spec.name.clone(), source };
        let in_decomposition = |source| LlmError::Decompose { name: spec.name.clone(), source };
        let config = self.checkpoint.config();
        let grouped = config.n_heads != config.n_kv_heads;
        let scales = match self.options.scaling {
            // Nothing is known about the inputs of an embedding.
            _ if stats.tokens() == 0 => Scales::none(spec.cols),
            Scaling::None => Scales::none(spec.cols),
            Scaling::Gram => Scales::rms(stats).map_err(in_weight)?,
            // It folds scales into the layer in front, and there is none to take them when heads share their values.
            Scaling::Reference if grouped && spec.role == WeightRole::AttentionOutput => Scales::none(spec.cols),
            Scaling::Reference => Scales::reference(stats).map_err(in_weight)?,
        };
        let matrix = self.checkpoint.matrix(spec)?;
        let options = match self.options.method {
            BlockMethod::Nested => {
                let gain = gram.map_or(Ok(1.0), |gram| bitstack_decomp::feedback_gain(matrix.view(), gram));
                let gain = gain.map_err(in_decomposition)?;
                let weight = self.draft.weight_index(&spec.name).expect("an open weight is in the draft");
                // Rounding knows of no feedback: a weight that gains less from it needs more levels for the same error.
                let lead = self.leads[weight] - 0.5 * (gain / TYPICAL_GAIN).log2();
                DecomposeOptions::nested(
                    self.options.n_blocks.unwrap_or(default_blocks(lead)),
                    Nested::around(self.middle + lead),
                )
                .parallelism(Parallelism::Rayon)
            }
            BlockMethod::Avd => {
                let n_blocks = self.options.n_blocks.unwrap_or(16);
                DecomposeOptions::new(self.rank(self.shape(spec)?), n_blocks)
                    .spikes(self.options.spikes.then_some(AVD_ERROR))
            }
        };
        let mut options = options.seed(self.options.seed).scales(&scales);
        if let Some(gram) = gram {
            options = options.gram(gram);
        }
        let result = bitstack_decomp::decompose(matrix.view(), &options).map_err(in_decomposition)?;
        let error = |e: &bitstack_decomp::LevelError| e.output.map_or(e.squared_error, |o| o.squared_error);
        let rounded = importance::rounding_error(matrix.view(), gram);
        Ok((result.stack, result.errors.iter().map(error).chain([rounded]).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_has_a_block_more_for_each_level_that_it_is_ahead() {
        assert_eq!([-9.0, -2.0, -0.4, 0.0, 0.6, 3.0, 9.0].map(default_blocks), [9, 9, 9, 10, 10, 12, 12]);
    }

    #[test]
    fn runs_of_all_layers_read_an_eighth_of_the_tokens_of_calibration() {
        let window: Vec<u32> = (0..512).collect();
        let validation = [&window[..]; 3];
        for (calibration, n_layers) in [(64 * 512, 30), (64 * 512, 4), (128 * 512, 80), (512, 30)] {
            let runs = runs(&validation, calibration, n_layers);
            let len = runs[0].len();
            assert!(runs.len() == GAIN_WINDOWS && runs.iter().all(|run| run[..] == window[..len]));
            // Two windows through half of the model are one.
            assert!(len == LEAST_RUN || 8 * n_layers * len <= calibration, "{len}");
            assert!(len == window.len() || 8 * n_layers * (len + 1) > calibration, "{len}");
        }
        assert_eq!(runs(&validation[..1], 1 << 20, 10).len(), 1);
    }

    #[test]
    fn codes_are_made_for_the_level_at_which_the_model_is_as_good_as_whole() {
        // A level and a half above that of rounding, an eighth of its divergence is left.
        assert!((middle(&[0.05, -1e-9, 0.03]) - (ROUNDING_LEVEL + 1.5)).abs() < 1e-6);
        assert_eq!(
            [&[][..], &[0.0], &[1e-3], &[1e3]].map(middle),
            [LEAST_MIDDLE, LEAST_MIDDLE, LEAST_MIDDLE, MOST_MIDDLE]
        );
    }

    #[test]
    fn models_that_need_much_memory_do_not_write_for_a_text() {
        let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/llama");
        let mut config = Checkpoint::open(data).unwrap().config().clone();
        assert!(can_write(&config));
        // The shape of Llama 3.2 1B: 1.24 billion; and with four times the layers.
        (config.hidden_size, config.intermediate_size, config.n_layers) = (2048, 8192, 16);
        (config.vocab_size, config.vocab_part_rows) = (128_256, 128_256);
        assert!(can_write(&config));
        config.n_layers = 64;
        assert!(!can_write(&config));
    }

    #[test]
    fn importance_is_found_on_few_enough_windows_that_their_states_fit() {
        let windows: Vec<Vec<u32>> = (0..16).map(|w| vec![w; 512]).collect();
        let windows: Vec<&[u32]> = windows.iter().map(|w| &w[..]).collect();
        let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/llama");
        let mut config = Checkpoint::open(data).unwrap().config().clone();
        let firsts = |config: &ModelConfig| probe(&windows, config).iter().map(|w| w[0]).collect::<Vec<_>>();
        assert_eq!(firsts(&config), [0, 4, 8, 12]);
        (config.hidden_size, config.n_layers) = (16384, 126);
        assert_eq!(firsts(&config), [0]);
        assert_eq!(probe(&[&[1, 2]], &config), [[1, 2]]);
    }

    #[test]
    fn batches_keep_the_order_and_the_limit() {
        assert_eq!(batches(&[3, 3, 4, 11, 1, 9, 1], 10), [0..3, 3..4, 4..6, 6..7]);
        assert!(batches(&[], 10).is_empty());
        assert_eq!(batches(&[20, 20], 10), [0..1, 1..2]);
    }
}
