//! A model that writes, from a `.bitstack` file or a directory, at a size that may change while it does.

use super::args::{Memory, ModelArgs, Sampling};
use super::open::{self, Beside, Bits, Stack, is_model};
use super::progress::Reporter;
use super::{keys, quality, size, usage};
use anyhow::{Context, Result, anyhow};
use bitstack_engine::quality::Quality;
use bitstack_engine::sample::{Continuation, GenerateOptions};
use bitstack_engine::{Decoder, ElasticModel, SamplingOptions, stack};
use bitstack_io::in_one_line;
use bitstack_model::chat::ChatTemplate;
use bitstack_model::{Dense, ModelConfig, Tokenizer};
use bitstack_runtime::{Options, Policy, Sensors, Start, Watcher};
use std::fs::File;
use std::ops::ControlFlow;
use std::sync::Mutex;

/// What a text is made with, before any weight is read.
pub(crate) struct Parts<'p> {
    pub(crate) tokenizer: &'p Tokenizer,
    pub(crate) template: Option<&'p ChatTemplate>,
    pub(crate) config: &'p ModelConfig,
    /// Whether the model is a file of its own.
    is_stack: bool,
}

impl<'p> Parts<'p> {
    /// The model's chat template, or what to do without one.
    pub(crate) fn template(&self) -> Result<&'p ChatTemplate> {
        self.template.ok_or_else(|| {
            anyhow!(if self.is_stack {
                "there is no chat template in this file. Where the model has one (chat_template in tokenizer_config.json, or \
chat_template.jinja), compress it again, or give it with --template; where it has none, it was not made for chats: use `bitstack generate`"
            } else {
                "the model has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja): give one with --template, or use \
`bitstack generate`: a model without one was not made for chats"
            })
        })
    }
}

/// A model, its tokenizer and its template.
pub(crate) struct Writer<'r> {
    model: Model,
    pub(crate) tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    /// `generation_config.json`.
    advice: Option<String>,
    /// Room for the text beside the weights.
    beside: Beside,
    reporter: &'r Reporter,
    /// The smallest and the largest size that anything was written at since the last question.
    sizes: Mutex<Option<(u64, u64)>>,
}

enum Model {
    Stack {
        elastic: Box<ElasticModel<File>>,
        least: u64,
        most: u64,
        bits: Bits,
        quality: Option<Quality>,
        /// Follows the system's memory while it is there.
        _watcher: Option<Watcher>,
    },
    Directory {
        decoder: Decoder<Dense>,
        bytes: u64,
    },
}

impl<'r> Writer<'r> {
    /// Opens a file or an uncompressed model; `room` says for how long a text.
    pub(crate) fn open(
        args: &ModelArgs,
        room: &mut dyn FnMut(&Parts<'_>) -> Result<Beside>,
        reporter: &'r Reporter,
    ) -> Result<Self> {
        let writer = if is_model(&args.file) {
            Self::directory(args, room, reporter)
        } else {
            Self::stack(args, room, reporter)
        }?;
        reporter.finish();
        Ok(writer)
    }

    fn stack(
        args: &ModelArgs,
        room: &mut dyn FnMut(&Parts<'_>) -> Result<Beside>,
        reporter: &'r Reporter,
    ) -> Result<Self> {
        let stack = Stack::open(&args.file, reporter)?;
        let (least, most) = (stack.order.minimum_bytes(), stack.order.total_bytes());
        if stack::companion(&stack.file, "tokenizer.json")?.is_none() {
            return Err(anyhow!(
                "there is no tokenizer in this file: compress the model again with its tokenizer.json beside the weights"
            ));
        }
        let tokenizer = stack::tokenizer(&stack.file)?;
        let template = template(args, |name| Ok(stack::companion(&stack.file, name)?))?;
        let config = stack::config(&stack.file)?;
        let beside =
            room(&Parts { tokenizer: &tokenizer, template: template.as_ref(), config: &config, is_stack: true })?;
        let (budget, policy) = match args.memory {
            None => (most, None),
            Some(Memory::Bytes(bytes)) => (beside.rest(bytes, least)?, None),
            Some(Memory::Auto) => {
                let mut reading = Sensors::detect().read();
                reading.available_bytes = reading.available_bytes.map(|bytes| bytes.saturating_sub(beside.bytes()));
                let policy = Policy::new(reading.limit_bytes.unwrap_or(0));
                (policy.first_budget(&reading, least..=most), Some(policy))
            }
        };
        let plan = stack.plan(budget)?;
        let (bits, quality) = (stack.bits, stack.quality);
        let advice = stack::companion(&stack.file, "generation_config.json")?;
        let options =
            Options { start: if args.progressive { Start::Smallest } else { Start::Whole }, ..Options::default() };
        let elastic = Box::new(ElasticModel::open(stack.file, budget, options, reporter)?);
        reporter.finish();
        if let Some(text) = quality::noise(quality.as_ref(), bits, plan.resident_bytes) {
            reporter.say(&text);
        }
        let _watcher = policy.map(|policy| Watcher::start(elastic.elastic(), policy)).transpose()?;
        let model = Model::Stack { elastic, least, most, bits, quality, _watcher };
        Ok(Self::new(model, tokenizer, template, advice, beside, reporter))
    }

    fn directory(
        args: &ModelArgs,
        room: &mut dyn FnMut(&Parts<'_>) -> Result<Beside>,
        reporter: &'r Reporter,
    ) -> Result<Self> {
        let checkpoint = open::checkpoint(&args.file, &args.opening, reporter)?;
        let bytes = checkpoint.stored_bytes();
        let tokenizer = Tokenizer::from_bytes(&checkpoint.companion("tokenizer.json")?)?;
        let template = template(args, |name| {
            Ok(checkpoint.has_companion(name)?.then(|| checkpoint.companion(name)).transpose()?)
        })?;
        let config = checkpoint.config();
        let beside = room(&Parts { tokenizer: &tokenizer, template: template.as_ref(), config, is_stack: false })?;
        match args.memory {
            Some(Memory::Bytes(memory)) if memory < bytes + beside.bytes() => {
                return Err(usage(format!(
                    "--memory {memory}: an uncompressed model has one size, {bytes} bytes, and {beside} beside"
                )));
            }
            Some(Memory::Auto) => {
                return Err(usage(format!(
                    "--memory auto: an uncompressed model has one size, {bytes} bytes; `bitstack compress` it"
                )));
            }
            _ => {}
        }
        let name = "generation_config.json";
        let advice = checkpoint.has_companion(name)?.then(|| checkpoint.companion(name)).transpose()?;
        let decoder = Decoder::load_with(&checkpoint, reporter)?;
        Ok(Self::new(Model::Directory { decoder, bytes }, tokenizer, template, advice, beside, reporter))
    }

    fn new(
        model: Model,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        advice: Option<Vec<u8>>,
        beside: Beside,
        reporter: &'r Reporter,
    ) -> Self {
        let advice = advice.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Self { model, tokenizer, template, advice, beside, reporter, sizes: Mutex::new(None) }
    }

    /// The model's shape.
    pub(crate) fn config(&self) -> &ModelConfig {
        match &self.model {
            Model::Stack { elastic, .. } => elastic.config(),
            Model::Directory { decoder, .. } => decoder.config(),
        }
    }

    /// The model's chat template, or what to do without one.
    pub(crate) fn template(&self) -> Result<&ChatTemplate> {
        let is_stack = matches!(self.model, Model::Stack { .. });
        let (tokenizer, template, config) = (&self.tokenizer, self.template.as_ref(), self.config());
        Parts { tokenizer, template, config, is_stack }.template()
    }

    /// Room for the text beside the weights.
    pub(crate) fn beside(&self) -> Beside {
        self.beside
    }

    /// How to continue a text: what the user says, else what the model advises, else the defaults.
    pub(crate) fn options(&self, args: &Sampling, max_tokens: usize) -> Result<GenerateOptions> {
        let mut sampling = SamplingOptions::with_temperature(0.8, args.seed);
        if let Some(advice) = &self.advice {
            sampling = sampling.advised_by(advice)?;
        }
        sampling.temperature = args.temperature.unwrap_or(sampling.temperature);
        sampling.top_k = args.top_k.unwrap_or(sampling.top_k);
        sampling.top_p = args.top_p.unwrap_or(sampling.top_p);
        sampling.min_p = args.min_p.unwrap_or(sampling.min_p);
        sampling.repetition_penalty = args.repetition_penalty.unwrap_or(sampling.repetition_penalty);
        sampling.presence_penalty = args.presence_penalty.unwrap_or(0.0);
        sampling.frequency_penalty = args.frequency_penalty.unwrap_or(0.0);
        Ok(GenerateOptions::new(max_tokens, sampling).stop(args.stop.clone()))
    }

    /// Writes a text to its end, or until `on_text` stops it, which is given every piece. Keys change the memory size meanwhile.
    pub(crate) fn write(
        &self,
        text: &mut Continuation<'_>,
        interrupt: keys::Interrupt,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<()> {
        *self.sizes() = None;
        match &self.model {
            Model::Stack { elastic, .. } => keys::during(
                |key| self.on_key(key),
                interrupt,
                || {
                    elastic.run(text, &mut |piece, snapshot| {
                        let bytes = snapshot.resident_bytes();
                        let mut sizes = self.sizes();
                        let (low, high) = sizes.unwrap_or((bytes, bytes));
                        *sizes = Some((low.min(bytes), high.max(bytes)));
                        drop(sizes);
                        on_text(piece)
                    })
                },
            )?,
            Model::Directory { decoder, .. } => {
                keys::during(|_| {}, interrupt, || text.run(decoder, on_text))?;
            }
        }
        if let Model::Stack { elastic, .. } = &self.model
            && let Some(error) = elastic.elastic().status().error
        {
            self.reporter.say(&format!("warning: {}", in_one_line(&error)));
        }
        Ok(())
    }

    fn on_key(&self, key: u8) {
        let Model::Stack { elastic, least, most, .. } = &self.model else { return };
        // A tenth of the way from the smallest size to the largest for every key.
        let step = ((most - least) / 10).max(1);
        let budget = elastic.elastic().status().budget_bytes.clamp(*least, *most);
        let budget = match key {
            b'+' | b'=' => (budget + step).min(*most),
            b'-' | b'_' => budget.saturating_sub(step).max(*least),
            _ => return,
        };
        let said = self.set_weights(budget).unwrap_or_else(|error| in_one_line(error.as_ref()));
        self.reporter.say(&format!("\n[{said}]"));
    }

    /// Goes to another memory size, for all that --memory is for, and says what that is.
    pub(crate) fn set_memory(&self, memory: u64) -> Result<String> {
        let Model::Stack { least, .. } = &self.model else {
            return Err(usage("an uncompressed model has one size; `bitstack compress` it"));
        };
        self.set_weights(self.beside.rest(memory, *least)?)
    }

    fn set_weights(&self, budget_bytes: u64) -> Result<String> {
        let Model::Stack { elastic, bits, quality, .. } = &self.model else { return Ok(self.about()) };
        let resident = elastic.elastic().set_budget(budget_bytes)?.resident_bytes;
        Ok(described(resident, *bits, quality.as_ref()))
    }

    /// The memory that the last text was written in.
    pub(crate) fn about(&self) -> String {
        format!("{}; {}", self.weights(), self.beside)
    }

    fn weights(&self) -> String {
        match &self.model {
            Model::Directory { bytes, .. } => format!("{} resident, uncompressed", size::show(*bytes)),
            Model::Stack { elastic, bits, quality, .. } => {
                let now = elastic.elastic().status().resident_bytes;
                let (low, high) = self.sizes().unwrap_or((now, now));
                if low == high {
                    return described(high, *bits, quality.as_ref());
                }
                let (least, most) = (bits.per_weight(low), bits.per_weight(high));
                let [low, high] = [low, high].map(size::show);
                format!("{low} to {high} resident, {least:.2} to {most:.2} bits per stacked weight")
            }
        }
    }

    fn sizes(&self) -> std::sync::MutexGuard<'_, Option<(u64, u64)>> {
        self.sizes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn described(resident_bytes: u64, bits: Bits, quality: Option<&Quality>) -> String {
    format!(
        "{} resident, {:.2} bits per stacked weight{}",
        size::show(resident_bytes),
        bits.per_weight(resident_bytes),
        quality::brief(quality, resident_bytes)
    )
}

/// The template that the user gives, or else the model's own, with the model's special tokens. `read` gives a file of the model.
fn template(args: &ModelArgs, read: impl Fn(&str) -> Result<Option<Vec<u8>>>) -> Result<Option<ChatTemplate>> {
    ChatTemplate::find(|name| match &args.template {
        Some(path) if name == ChatTemplate::FILES[0] => {
            Ok(Some(std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?))
        }
        _ => read(name),
    })
}

/// The context that the user asks for, in tokens.
pub(crate) fn context(args: &ModelArgs, config: &ModelConfig) -> Result<Option<usize>> {
    let (context, most) = (args.context.map(|n| n as usize), config.max_positions);
    match context {
        Some(context) if context > most => {
            Err(usage(format!("--context {context}: the model has {most} positions at most")))
        }
        context => Ok(context),
    }
}
