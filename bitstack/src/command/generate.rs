//! `bitstack generate`

use super::args::Generate;
use super::open::Stack;
use super::progress::Reporter;
use super::{print, size, usage};
use anyhow::{Context, Result};
use bitstack_llm::stack::{StackModel, tokenizer};
use bitstack_llm::{Checkpoint, Decoder, LinearOp, SamplingOptions, Tokenizer, sample};
use std::ops::ControlFlow;
use std::time::Instant;

/// Continues the prompt, on stdout, as it comes.
pub(crate) fn run(args: &Generate, reporter: &Reporter) -> Result<()> {
    if args.file.is_dir() { directory(args, reporter) } else { stack(args, reporter) }
        .with_context(|| args.file.display().to_string())
}

fn stack(args: &Generate, reporter: &Reporter) -> Result<()> {
    let stack = Stack::open(&args.file, reporter)?;
    let plan = stack.plan(args.memory.unwrap_or(u64::MAX))?;
    let model = StackModel::open(&stack.file, &plan.levels, reporter)?;
    reporter.finish();
    let bits = stack.bits_per_weight(plan.resident_bytes);
    let about = format!("{} resident, {bits:.2} bits per stacked weight", size::show(plan.resident_bytes));
    continue_prompt(args, model.decoder(), &tokenizer(&stack.file)?, &about, reporter)
}

fn directory(args: &Generate, reporter: &Reporter) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.file)?;
    let bytes = checkpoint.stored_bytes();
    if let Some(memory) = args.memory.filter(|m| *m < bytes) {
        return Err(usage(format!("--memory {memory}: an uncompressed model has one size, {bytes} bytes")));
    }
    let about = format!("{} resident, uncompressed", size::show(bytes));
    let tokenizer = Tokenizer::from_bytes(&checkpoint.companion("tokenizer.json")?)?;
    let decoder = Decoder::load_with(&checkpoint, reporter)?;
    reporter.finish();
    continue_prompt(args, &decoder, &tokenizer, &about, reporter)
}

fn continue_prompt<L: LinearOp>(
    args: &Generate,
    decoder: &Decoder<L>,
    tokenizer: &Tokenizer,
    about: &str,
    reporter: &Reporter,
) -> Result<()> {
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
    let started = Instant::now();
    let mut first_text = None;
    let mut stdout = Ok(());
    let result = sample::generate(decoder, tokenizer, &args.prompt, args.max_tokens, sampling, &mut |text| {
        if first_text.is_none() {
            first_text = Some(Instant::now());
            stdout = print(&args.prompt);
        }
        if stdout.is_ok() {
            stdout = print(text);
        }
        if stdout.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    stdout?;
    print("\n")?;
    let (first, now) = (first_text.unwrap_or(started), Instant::now());
    let rate = result.tokens.len().saturating_sub(1) as f64 / (now - first).as_secs_f64().max(1e-9);
    reporter.say(&format!(
        "{about}; prompt of {} tokens in {:.2} s, then {} tokens at {rate:.1} tokens/s",
        result.prompt_tokens,
        (first - started).as_secs_f64(),
        result.tokens.len()
    ));
    Ok(())
}
