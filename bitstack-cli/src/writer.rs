//! A model that writes, from a `.bitstack` file or a directory, at a size that may change while it does.

use super::args::{Memory, ModelArgs, Sampling};
use super::open::{Bits, Stack};
use super::progress::Reporter;
use super::{keys, quality, size, usage};
use anyhow::{Result, anyhow};
use bitstack_engine::quality::Quality;
use bitstack_engine::sample::{Continuation, GenerateOptions};
use bitstack_engine::{Decoder, ElasticModel, SamplingOptions, stack};
use bitstack_io::in_one_line;
use bitstack_model::chat::ChatTemplate;
use bitstack_model::{Checkpoint, Dense, ModelConfig, Tokenizer};
use bitstack_runtime::{Options, Policy, Sensors, Start, Watcher};
use std::fs::File;
use std::ops::ControlFlow;
use std::sync::Mutex;

/// A model, its tokenizer and its template.
pub(crate) struct Writer<'r> {
    model: Model,
    pub(crate) tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    /// `generation_config.json`.
    advice: Option<String>,
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
    /// Opens a file or a directory.
    pub(crate) fn open(args: &ModelArgs, reporter: &'r Reporter) -> Result<Self> {
        let writer = if args.file.is_dir() { Self::directory(args, reporter) } else { Self::stack(args, reporter) }?;
        reporter.finish();
        Ok(writer)
    }

    fn stack(args: &ModelArgs, reporter: &'r Reporter) -> Result<Self> {
        let stack = Stack::open(&args.file, reporter)?;
        let (least, most) = (stack.order.minimum_bytes(), stack.order.total_bytes());
        let (budget, policy) = match args.memory {
            None => (most, None),
            Some(Memory::Bytes(bytes)) => (bytes, None),
            Some(Memory::Auto) => {
                let reading = Sensors::detect().read();
                let policy = Policy::new(reading.limit_bytes.unwrap_or(0));
                (policy.first_budget(&reading, least..=most), Some(policy))
            }
        };
        let plan = stack.plan(budget)?;
        let (bits, quality) = (stack.bits, stack.quality);
        let tokenizer = stack::tokenizer(&stack.file)?;
        let template = stack::chat_template(&stack.file)?;
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
        Ok(Self::new(model, tokenizer, template, advice, reporter))
    }

    fn directory(args: &ModelArgs, reporter: &'r Reporter) -> Result<Self> {
        let checkpoint = Checkpoint::open(&args.file)?;
        let bytes = checkpoint.stored_bytes();
        match args.memory {
            Some(Memory::Bytes(memory)) if memory < bytes => {
                return Err(usage(format!("--memory {memory}: an uncompressed model has one size, {bytes} bytes")));
            }
            Some(Memory::Auto) => {
                return Err(usage(format!(
                    "--memory auto: an uncompressed model has one size, {bytes} bytes; `bitstack compress` it"
                )));
            }
            _ => {}
        }
        let tokenizer = Tokenizer::from_bytes(&checkpoint.companion("tokenizer.json")?)?;
        let template = checkpoint.chat_template()?;
        let name = "generation_config.json";
        let advice = checkpoint.has_companion(name)?.then(|| checkpoint.companion(name)).transpose()?;
        let decoder = Decoder::load_with(&checkpoint, reporter)?;
        Ok(Self::new(Model::Directory { decoder, bytes }, tokenizer, template, advice, reporter))
    }

    fn new(
        model: Model,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        advice: Option<Vec<u8>>,
        reporter: &'r Reporter,
    ) -> Self {
        let advice = advice.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Self { model, tokenizer, template, advice, reporter, sizes: Mutex::new(None) }
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
        self.template.as_ref().ok_or_else(|| {
            anyhow!(match self.model {
                Model::Stack { .. } =>
                    "there is no chat template in this file. Where the model has one (chat_template in tokenizer_config.json, or \
chat_template.jinja), compress it again; where it has none, it was not made for chats: use `bitstack generate`",
                Model::Directory { .. } =>
                    "the model has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja): it was not made for \
chats; use `bitstack generate`",
            })
        })
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
        let said = self.set_memory(budget).unwrap_or_else(|error| in_one_line(error.as_ref()));
        self.reporter.say(&format!("\n[{said}]"));
    }

    /// Goes to another memory size, and says what that is.
    pub(crate) fn set_memory(&self, budget_bytes: u64) -> Result<String> {
        let Model::Stack { elastic, least, bits, quality, .. } = &self.model else {
            return Err(usage("an uncompressed model has one size; `bitstack compress` it"));
        };
        if budget_bytes < *least {
            return Err(usage(format!(
                "{budget_bytes} bytes are less than the smallest size of this model, {least} bytes ({})",
                size::show(*least)
            )));
        }
        let resident = elastic.elastic().set_budget(budget_bytes)?.resident_bytes;
        Ok(described(resident, *bits, quality.as_ref()))
    }

    /// The memory that the last text was written in.
    pub(crate) fn about(&self) -> String {
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
