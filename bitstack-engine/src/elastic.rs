//! A model that multiplies by its packed blocks, and grows and shrinks while it is in use.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::sample::{Continuation, Generation};
use crate::{Decoder, EngineError, Frame, Operator, SamplingOptions, stack};
use bitstack_cpu::Kernel;
use bitstack_format::{BlockSource, ReadAt, StackFile};
use bitstack_model::{Dense, ModelConfig, Progress, Tokenizer};
use bitstack_runtime::{Elastic, Options, Snapshot};

/// A model over the resident blocks of a file: no weight is ever rebuilt as a whole, so the memory it takes is the memory that
/// its plan says, and what a pass needs for its activations.
///
/// The blocks are an [`Elastic`]'s. A pass runs on one [`Snapshot`] of them, from start to end:
///
/// ```no_run
/// use bitstack_engine::{ElasticModel, Pass};
/// use bitstack_format::StackFile;
///
/// let model = ElasticModel::open(StackFile::open_path("llama.bitstack")?, 3_000_000_000, Default::default(), &())?;
/// model.elastic().set_budget(2_000_000_000)?; // from any thread, at any time
/// let snapshot = model.elastic().snapshot();
/// let logits = model.at(&snapshot)?.forward(&[1, 2, 3], &mut Pass::new())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ElasticModel<S> {
    elastic: Elastic<S>,
    frame: Arc<Frame>,
    /// In the order of [`ModelConfig::weights`].
    places: Vec<Place>,
    kernel: Kernel,
}

/// Where a weight is.
#[derive(Debug)]
enum Place {
    /// In the stack, by its number there.
    Stacked(usize),
    /// Beside it, as it was.
    Kept(Dense),
}

impl<S: ReadAt + Send + Sync + 'static> ElasticModel<S> {
    /// Opens a model with what fits in `budget_bytes`. Whatever [`Options::signs`] says, the signs are laid out for the best kernels of
    /// this CPU.
    ///
    /// # Errors
    /// Malformed config, weights that are missing or have another shape than the config says, damaged blocks, a budget below the
    /// smallest size.
    pub fn open(
        file: StackFile<S>,
        budget_bytes: u64,
        options: Options,
        progress: &dyn Progress,
    ) -> Result<Self, EngineError> {
        let config = stack::config(&file)?;
        let specs = config.weights();
        progress.stage("load (weights)", specs.len() as u64);
        let mut used = vec![false; file.weights().len()];
        let mut places = Vec::with_capacity(specs.len());
        for spec in &specs {
            places.push(match file.weight_index(&spec.name) {
                Some(weight) => {
                    used[weight] = true;
                    Place::Stacked(weight)
                }
                None => Place::Kept(stack::kept(&file, spec)?),
            });
            progress.advance(1);
        }
        if let Some(w) = used.iter().position(|used| !used) {
            return Err(EngineError::StrayWeight { name: file.weights()[w].name.clone() });
        }
        let frame = Frame::new(config, |spec| stack::vector(&file, spec))?;
        let kernel = Kernel::detect();
        let elastic = Elastic::open(file, budget_bytes, Options { signs: kernel.layout(), ..options })?;
        let model = Self { elastic, frame: Arc::new(frame), places, kernel };
        // Shapes are checked here, so that no later pass can fail on them.
        model.at(&model.elastic.snapshot())?;
        Ok(model)
    }

    /// The resident blocks: their budget, their state, their snapshots.
    pub fn elastic(&self) -> &Elastic<S> {
        &self.elastic
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.frame.config()
    }

    /// Uses these kernels instead of the best for this CPU.
    pub fn with_kernel(self, kernel: Kernel) -> Self {
        Self { kernel, ..self }
    }

    /// The model at a snapshot. Costs microseconds per weight: keep it as long as the snapshot is the newest.
    ///
    /// # Errors
    /// Weights of another shape than the config says.
    pub fn at<'a>(&'a self, snapshot: &'a Snapshot) -> Result<Decoder<Operator<'a>>, EngineError> {
        Decoder::with_frame(Arc::clone(&self.frame), |index, _| match &self.places[index] {
            Place::Kept(dense) => Ok(Operator::Kept(dense)),
            Place::Stacked(weight) => Ok(Operator::Planes { level: snapshot.level(*weight)?, kernel: self.kernel }),
        })
    }

    /// Continues a prompt as [`crate::sample::generate`] does, every token at the size that is resident when it begins.
    ///
    /// `on_token` is called for every token with the text it adds (often none) and may stop the generation.
    ///
    /// # Errors
    /// As [`crate::sample::generate`].
    pub fn generate(
        &self,
        tokenizer: &Tokenizer,
        prompt: &str,
        max_tokens: usize,
        sampling: SamplingOptions,
        on_token: &mut dyn FnMut(&str, &Snapshot) -> ControlFlow<()>,
    ) -> Result<Generation, EngineError> {
        let mut text = Continuation::new(self.config(), tokenizer, prompt, max_tokens, sampling)?;
        loop {
            let snapshot = self.elastic.snapshot();
            let decoder = self.at(&snapshot)?;
            loop {
                let Some(piece) = text.step(&decoder)? else { return Ok(text.finish()) };
                if on_token(&piece, &snapshot).is_break() {
                    return Ok(text.stopped());
                }
                if !Arc::ptr_eq(&snapshot, &self.elastic.snapshot()) {
                    break;
                }
            }
        }
    }
}
