//! `bitstack generate`

use super::args::{Generate, Memory};
use super::open::{self, Beside, Stack, is_model};
use super::progress::Reporter;
use super::{keys, print, quality, size, usage};
use anyhow::{Context, Result};
use bitstack_engine::sample::{self, Generation};
use bitstack_engine::stack::{config, tokenizer};
use bitstack_engine::{Decoder, ElasticModel, SamplingOptions};
use bitstack_io::in_one_line;
use bitstack_model::{ModelConfig, Tokenizer};
use bitstack_runtime::{Options, Policy, Sensors, Start, Watcher};
use std::ops::ControlFlow;
use std::time::Instant;

/// Continues the prompt, on stdout, as it comes.
pub(crate) fn run(args: &Generate, reporter: &Reporter) -> Result<()> {
    if is_model(&args.file) { directory(args, reporter) } else { stack(args, reporter) }
        .with_context(|| args.file.display().to_string())
}

fn stack(args: &Generate, reporter: &Reporter) -> Result<()> {
    let stack = Stack::open(&args.file, reporter)?;
    let bits = stack.bits;
    let (least, most) = (stack.order.minimum_bytes(), stack.order.total_bytes());
    let tokenizer = tokenizer(&stack.file)?;
    let beside = beside(args, &tokenizer, &config(&stack.file)?)?;
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
    let quality = stack.quality;
    let options =
        Options { start: if args.progressive { Start::Smallest } else { Start::Whole }, ..Options::default() };
    let model = ElasticModel::open(stack.file, budget, options, reporter)?;
    reporter.finish();
    if let Some(text) = quality::noise(quality.as_ref(), bits, plan.resident_bytes) {
        reporter.say(&text);
    }
    let elastic = model.elastic();

    let _watcher = policy.map(|policy| Watcher::start(elastic, policy)).transpose()?;
    // A tenth of the way from the smallest size to the largest for every key.
    let step = ((most - least) / 10).max(1);
    let on_key = |key: u8| {
        let budget = elastic.status().budget_bytes.clamp(least, most);
        let budget = match key {
            b'+' | b'=' => (budget + step).min(most),
            b'-' | b'_' => budget.saturating_sub(step).max(least),
            _ => return,
        };
        match elastic.set_budget(budget) {
            Ok(plan) => {
                let bits = bits.per_weight(plan.resident_bytes);
                reporter.say(&format!(
                    "\n[{} resident, {bits:.2} bits per stacked weight{}]",
                    size::show(plan.resident_bytes),
                    quality::brief(quality.as_ref(), plan.resident_bytes)
                ));
            }
            Err(error) => reporter.say(&format!("\n[{}]", in_one_line(&error))),
        }
    };
    let mut sizes: Option<(u64, u64)> = None;
    let mut writer = Writer::new(&args.prompt);
    let result = keys::during(on_key, || {
        model.generate(
            &tokenizer,
            &args.prompt,
            beside.new_tokens(args.max_tokens),
            sampling(args),
            &mut |text, snapshot| {
                let bytes = snapshot.resident_bytes();
                let (low, high) = sizes.unwrap_or((bytes, bytes));
                sizes = Some((low.min(bytes), high.max(bytes)));
                writer.write(text)
            },
        )
    })?;
    if let Some(error) = elastic.status().error {
        reporter.say(&format!("warning: {}", in_one_line(&error)));
    }
    let (low, high) = sizes.unwrap_or((elastic.status().resident_bytes, elastic.status().resident_bytes));
    let about = if low == high {
        let quality = quality::brief(quality.as_ref(), high);
        format!("{} resident, {:.2} bits per stacked weight{quality}", size::show(high), bits.per_weight(high))
    } else {
        format!(
            "{} to {} resident, {:.2} to {:.2} bits per stacked weight",
            size::show(low),
            size::show(high),
            bits.per_weight(low),
            bits.per_weight(high)
        )
    };
    writer.finish(&result, &format!("{about}; {beside}"), reporter)
}

/// Room for the prompt and the answer.
fn beside(args: &Generate, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Beside> {
    let prompt = tokenizer.encode(&args.prompt)?.len();
    let context = args.context.map_or(config.max_positions, |n| n as usize);
    if context > config.max_positions {
        return Err(usage(format!("--context {context}: the model has {} positions at most", config.max_positions)));
    }
    if prompt > context {
        return Err(usage(format!("the prompt has {prompt} tokens, more than the context of {context}")));
    }
    Ok(Beside::new(config, prompt, prompt.saturating_add(args.max_tokens).min(context)))
}

fn directory(args: &Generate, reporter: &Reporter) -> Result<()> {
    let checkpoint = open::checkpoint(&args.file, &args.opening, reporter)?;
    let bytes = checkpoint.stored_bytes();
    let tokenizer = Tokenizer::from_bytes(&checkpoint.companion("tokenizer.json")?)?;
    let beside = beside(args, &tokenizer, checkpoint.config())?;
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
    let about = format!("{} resident, uncompressed; {beside}", size::show(bytes));
    let decoder = Decoder::load_with(&checkpoint, reporter)?;
    reporter.finish();
    let mut writer = Writer::new(&args.prompt);
    let on_text = &mut |text: &str| writer.write(text);
    let new_tokens = beside.new_tokens(args.max_tokens);
    let result = sample::generate(&decoder, &tokenizer, &args.prompt, new_tokens, sampling(args), on_text)?;
    writer.finish(&result, &about, reporter)
}

fn sampling(args: &Generate) -> SamplingOptions {
    let mut sampling = if args.temperature == 0.0 {
        SamplingOptions::greedy()
    } else {
        SamplingOptions::with_temperature(args.temperature, args.seed)
    };
    if let Some(k) = args.top_k {
        sampling = sampling.top_k(k);
    }
    if let Some(p) = args.top_p {
        sampling = sampling.top_p(p);
    }
    sampling
}

/// Puts the text on stdout as it comes, the prompt first, and keeps the time.
struct Writer<'a> {
    prompt: &'a str,
    started: Instant,
    first_text: Option<Instant>,
    stdout: Result<()>,
}

impl<'a> Writer<'a> {
    fn new(prompt: &'a str) -> Self {
        Self { prompt, started: Instant::now(), first_text: None, stdout: Ok(()) }
    }

    /// Breaks off when nobody reads any more.
    fn write(&mut self, text: &str) -> ControlFlow<()> {
        if self.first_text.is_none() {
            self.first_text = Some(Instant::now());
            self.stdout = print(self.prompt);
        }
        if self.stdout.is_ok() && !text.is_empty() {
            self.stdout = print(text);
        }
        if self.stdout.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn finish(self, result: &Generation, about: &str, reporter: &Reporter) -> Result<()> {
        self.stdout?;
        print("\n")?;
        let (first, now) = (self.first_text.unwrap_or(self.started), Instant::now());
        let rate = result.tokens.len().saturating_sub(1) as f64 / (now - first).as_secs_f64().max(1e-9);
        reporter.say(&format!(
            "{about}; prompt of {} tokens in {:.2} s, then {} tokens at {rate:.1} tokens/s",
            result.prompt_tokens,
            (first - self.started).as_secs_f64(),
            result.tokens.len()
        ));
        Ok(())
    }
}
