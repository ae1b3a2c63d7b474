//! A model that multiplies by its packed blocks, and grows and shrinks while it is in use.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::device::{Cpu, PackedDevice};
use crate::sample::{Continuation, GenerateOptions, Generation};
use crate::{Decoder, EngineError, Frame, stack};
use bitstack_format::{BlockSource, ReadAt, StackFile};
use bitstack_model::{ModelConfig, Progress, Tokenizer};
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
pub struct ElasticModel<S, D: PackedDevice = Cpu> {
    elastic: Elastic<S, D::Memory>,
    frame: Arc<Frame<D>>,
    /// In the order of [`ModelConfig::weights`].
    places: Vec<Place<D::Kept>>,
}

/// Is given the text that each token adds, and the snapshot it was made at; may stop the generation.
pub type OnToken<'f, D = Cpu> = dyn FnMut(&str, &Snapshot<<D as PackedDevice>::Memory>) -> ControlFlow<()> + 'f;

/// Where a weight is.
#[derive(Debug)]
enum Place<K> {
    /// In the stack, by its number there.
    Stacked(usize),
    /// Beside it, as it was.
    Kept(K),
}

impl<S: ReadAt + Send + Sync + 'static> ElasticModel<S> {
    /// Opens a model with what fits in `budget_bytes`. Whatever [`Options::signs`] says, the signs are laid out for the best kernels of
    /// this CPU.
    ///
    /// # Errors
    /// As [`open_on`](Self::open_on).
    pub fn open(
        file: StackFile<S>,
        budget_bytes: u64,
        options: Options,
        progress: &dyn Progress,
    ) -> Result<Self, EngineError> {
        Self::open_on(Cpu, file, budget_bytes, options, progress)
    }
}

impl<S: ReadAt + Send + Sync + 'static, D: PackedDevice> ElasticModel<S, D> {
    /// Opens a model on a device with what fits in `budget_bytes` of its memory. The device says how signs are laid out, whatever
    /// [`Options::signs`] does.
    ///
    /// # Errors
    /// Malformed config, weights that are missing or have another shape than the config says, damaged blocks, a budget below the
    /// smallest size; those of the device.
    pub fn open_on(
        device: D,
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
                None => Place::Kept(device.keep(stack::kept(&file, spec)?)?),
            });
            progress.advance(1);
        }
        if let Some(w) = used.iter().position(|used| !used) {
            return Err(EngineError::StrayWeight { name: file.weights()[w].name.clone() });
        }
        let options = Options { signs: device.signs(), ..options };
        let memory = device.memory();
        let frame = Frame::on(device, config, |spec| stack::vector(&file, spec))?;
        let elastic = Elastic::open_in(memory, file, budget_bytes, options)?;
        let model = Self { elastic, frame: Arc::new(frame), places };
        // Shapes are checked here, so that no later pass can fail on them.
        model.at(&model.elastic.snapshot())?;
        Ok(model)
    }

    /// The resident blocks: their budget, their state, their snapshots.
    pub fn elastic(&self) -> &Elastic<S, D::Memory> {
        &self.elastic
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.frame.config()
    }

    /// The model at a snapshot. Costs microseconds per weight: keep it as long as the snapshot is the newest.
    ///
    /// # Errors
    /// Weights of another shape than the config says.
    pub fn at<'a>(&'a self, snapshot: &'a Snapshot<D::Memory>) -> Result<Decoder<D::Operator<'a>, D>, EngineError> {
        let device = self.frame.device();
        Decoder::with_frame(Arc::clone(&self.frame), |index, _| match &self.places[index] {
            Place::Kept(weight) => Ok(device.kept(weight)),
            Place::Stacked(weight) => device.packed(snapshot, *weight),
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
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut OnToken<'_, D>,
    ) -> Result<Generation, EngineError> {
        let mut text = Continuation::<D>::new(self.config(), tokenizer, prompt, options)?;
        self.run(&mut text, on_token)?;
        Ok(text.finish())
    }

    /// Steps to the end of a text, or until `on_token` stops it; see [`generate`](Self::generate).
    ///
    /// # Errors
    /// As [`Continuation::step`].
    pub fn run(&self, text: &mut Continuation<'_, D>, on_token: &mut OnToken<'_, D>) -> Result<(), EngineError> {
        loop {
            let snapshot = self.elastic.snapshot();
            let decoder = self.at(&snapshot)?;
            loop {
                if !text.run_piece(&decoder)? {
                    let Some(piece) = text.step(&decoder)? else { return Ok(()) };
                    if on_token(&piece, &snapshot).is_break() {
                        text.stop();
                        return Ok(());
                    }
                }
                if !Arc::ptr_eq(&snapshot, &self.elastic.snapshot()) {
                    break;
                }
            }
        }
    }
}
