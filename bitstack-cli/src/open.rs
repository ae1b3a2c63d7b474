//! Opening what the user names, and what is common to all commands on a stack: its order, its plans, its sizes.

use super::args::Opening;
use super::progress::Reporter;
use super::{size, usage};
use anyhow::{Context, Error, Result, anyhow};
use bitstack_engine::quality::Quality;
use bitstack_engine::sample::PIECE;
use bitstack_engine::{KvCache, Workspace};
use bitstack_format::{BlockSource, StackFile};
use bitstack_hub::{Hub, PREFIX, Repo};
use bitstack_model::{Checkpoint, CheckpointLimits, ModelConfig, ModelError, recognize};
use bitstack_sort::{LoadOrder, Plan, Sizes, SortError};
use std::fs::File;
use std::path::{Path, PathBuf};

/// A path that the user gave, or, of `hf:OWNER/NAME`, where the model is after it has been downloaded as far as it was not there.
pub(crate) fn local(path: &Path, reporter: &Reporter) -> Result<PathBuf> {
    let Some(name) = path.to_str().filter(|name| name.starts_with(PREFIX)) else { return Ok(path.to_owned()) };
    let repo: Repo = name.parse().map_err(|e: bitstack_hub::HubError| usage(e.to_string()))?;
    let found = Hub::from_environment()?.fetch(&repo, &mut reporter.bytes("download (bytes)"))?;
    reporter.finish();
    if found.is_stale {
        reporter.say(&format!(
            "{repo}: the Hub cannot be reached; this is the model as it was downloaded ({})",
            found.commit
        ));
    }
    Ok(found.path)
}

/// Whether a path is that of an uncompressed model.
pub(crate) fn is_model(path: &Path) -> bool {
    path.to_str().is_some_and(|name| name.starts_with(PREFIX)) || Checkpoint::is_at(path)
}

/// An open file with its load order.
pub(crate) struct Stack {
    pub(crate) file: StackFile<File>,
    pub(crate) order: LoadOrder,
    pub(crate) bits: Bits,
    /// How good it is, if it says so.
    pub(crate) quality: Option<Quality>,
}

/// What a text takes beside the weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Beside {
    /// Tokens of the prompt.
    pub(crate) prompt: usize,
    /// Tokens of the text, prompt and answer.
    pub(crate) tokens: usize,
    /// Keys and values of all of them.
    pub(crate) cache_bytes: u64,
    /// What a pass works in, at most.
    pub(crate) scratch_bytes: u64,
}

impl Beside {
    /// For a text of `tokens` tokens, `prompt` of which come at once.
    pub(crate) fn new(config: &ModelConfig, prompt: usize, tokens: usize) -> Self {
        let scratch_bytes = Workspace::most_bytes(config, prompt.clamp(1, PIECE), tokens);
        Self { prompt, tokens, cache_bytes: KvCache::full_bytes(config, tokens), scratch_bytes }
    }

    /// Tokens to generate, of `most`: the last one is not run, and takes no room.
    pub(crate) fn new_tokens(self, most: usize) -> usize {
        most.min(self.tokens + 1 - self.prompt)
    }

    pub(crate) fn bytes(self) -> u64 {
        self.cache_bytes + self.scratch_bytes
    }

    /// What remains of a memory size for weights, of which the smallest model has `least`.
    pub(crate) fn rest(self, memory: u64, least: u64) -> Result<u64> {
        let rest = memory.checked_sub(self.bytes()).filter(|rest| *rest >= least);
        rest.ok_or_else(|| {
            usage(format!(
                "--memory {memory} is too little: {} bytes are needed, {least} for the weights of the smallest size and {self}; give that, or a \
smaller --context",
                least + self.bytes(),
            ))
        })
    }
}

impl std::fmt::Display for Beside {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [cache, scratch] = [self.cache_bytes, self.scratch_bytes].map(size::show);
        write!(f, "{cache} cache and {scratch} scratch for {} tokens", self.tokens)
    }
}

/// What bits per stacked weight are counted from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bits {
    /// Resident bytes that are not stacked weights.
    pub(crate) base_bytes: u64,
    /// Weights that are stacked.
    pub(crate) n_stacked: u64,
}

impl Bits {
    /// Bits per stacked weight when `resident_bytes` are loaded.
    pub(crate) fn per_weight(self, resident_bytes: u64) -> f64 {
        (resident_bytes - self.base_bytes) as f64 * 8.0 / self.n_stacked as f64
    }
}

impl Stack {
    /// Opens a `.bitstack` file; of a cut one, says what is missing and takes what is there.
    pub(crate) fn open(path: &Path, reporter: &Reporter) -> Result<Self> {
        if path.is_dir() {
            return Err(usage(format!("{} is a directory, not a .bitstack file", path.display())));
        }
        let file = StackFile::open_path(path).map_err(|error| match recognize(path) {
            Some(advice) => anyhow::anyhow!("{} is {advice}", path.display()),
            None => error.into(),
        })?;
        if let Some(missing) = file.missing() {
            reporter.say(&format!("warning: {}: {missing}", path.display()));
        }
        Self::with_order(file).with_context(|| path.display().to_string())
    }

    fn with_order(file: StackFile<File>) -> Result<Self> {
        let base_bytes = file.base_bytes();
        let sizes = Sizes::new(base_bytes, file.block_sizes())?;
        let order = LoadOrder::from_weights(file.order(), &sizes)?;
        let n_stacked = file.weights().iter().map(|w| w.shape.n_elems() as u64).sum();
        let quality = Quality::of(&file);
        Ok(Self { file, order, bits: Bits { base_bytes, n_stacked }, quality })
    }

    /// The plan for a budget; below the minimum an error that says what the least is.
    pub(crate) fn plan(&self, budget_bytes: u64) -> Result<Plan> {
        match self.order.plan(budget_bytes) {
            Err(SortError::BudgetBelowMinimum { budget_bytes, minimum_bytes }) => Err(usage(format!(
                "--memory {budget_bytes} is below the smallest size of this model, {minimum_bytes} bytes; give at least that"
            ))),
            other => Ok(other?),
        }
    }

    /// `n` budgets, evenly spaced from the smallest size to the whole file.
    pub(crate) fn budgets(&self, n: usize) -> Vec<u64> {
        let (least, most) = (self.order.minimum_bytes(), self.order.total_bytes());
        match n {
            0 | 1 => vec![most],
            n => (0..n as u64).map(|i| least + (most - least) * i / (n as u64 - 1)).collect(),
        }
    }
}

/// Opens an uncompressed model: a directory, a GGUF file, or one of the Hub. Says what its user should know of it.
pub(crate) fn checkpoint(path: &Path, opening: &Opening, reporter: &Reporter) -> Result<Checkpoint> {
    let opened =
        Checkpoint::open_ignoring(local(path, reporter)?, &opening.ignore_tensors, &CheckpointLimits::default());
    let checkpoint = opened.map_err(|error| with_advice(&error).unwrap_or_else(|| error.into()))?;
    for remark in checkpoint.remarks() {
        reporter.say(&format!("warning: {}: {remark}", path.display()));
    }
    Ok(checkpoint)
}

/// What a user can do about tensors that are left over.
pub(crate) fn with_advice(error: &ModelError) -> Option<Error> {
    let is_theirs = matches!(error, ModelError::UnusedTensors { .. });
    is_theirs.then(|| anyhow!("{error}; --ignore-tensors PATTERN lets them be"))
}
