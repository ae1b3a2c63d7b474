//! `bitstack generate`

use super::args::Generate;
use super::keys::Interrupt;
use super::open::Beside;
use super::print;
use super::progress::Reporter;
use super::usage;
use super::writer::{Parts, Writer, context};
use anyhow::{Context, Result};
use bitstack_engine::sample::Continuation;
use bitstack_model::Tokenizer;
use bitstack_model::chat::{Message, Role};
use std::ops::ControlFlow;
use std::time::Instant;

/// Continues the prompt, on stdout, as it comes.
pub(crate) fn run(args: &Generate, reporter: &Reporter) -> Result<()> {
    write(args, reporter).with_context(|| args.model.file.display().to_string())
}

fn write(args: &Generate, reporter: &Reporter) -> Result<()> {
    let mut prompt = Vec::new();
    let mut room = |parts: &Parts<'_>| {
        prompt = if args.chat {
            parts.template()?.encode(parts.tokenizer, &[Message::new(Role::User, &*args.prompt)])?
        } else {
            parts.tokenizer.encode(&args.prompt)?
        };
        let context = context(&args.model, parts.config)?.unwrap_or(parts.config.max_positions);
        if prompt.len() > context {
            return Err(usage(format!("the prompt has {} tokens, more than the context of {context}", prompt.len())));
        }
        let tokens = prompt.len().saturating_add(args.max_tokens).min(context);
        Ok(Beside::new(parts.config, prompt.len(), tokens))
    };
    let writer = Writer::open(&args.model, &mut room, reporter)?;
    let mut options = writer.options(&args.sampling, writer.beside().new_tokens(args.max_tokens))?;
    let shown = if args.chat { "" } else { &*args.prompt };
    if args.chat {
        options = options.end_tokens(writer.template()?.end_tokens(&writer.tokenizer));
    } else if let Some(token) = doubled(&writer.tokenizer, &args.prompt, &prompt)? {
        reporter.say(&format!(
            "warning: the prompt begins with {token}, which the tokenizer adds as well: the model sees it twice; leave it out"
        ));
    }
    let started = Instant::now();
    let mut first_text = None;
    let mut stdout = Ok(());
    let mut text = Continuation::new(writer.config(), &writer.tokenizer, &prompt, &options)?;
    writer.write(&mut text, Interrupt::Ends, &mut |piece| {
        if first_text.is_none() {
            first_text = Some(Instant::now());
            stdout = print(shown);
        }
        if stdout.is_ok() && !piece.is_empty() {
            stdout = print(piece);
        }
        // Breaks off when nobody reads any more.
        if stdout.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    stdout?;
    print("\n")?;
    let result = text.finish();
    let (first, now) = (first_text.unwrap_or(started), Instant::now());
    let rate = result.tokens.len().saturating_sub(1) as f64 / (now - first).as_secs_f64().max(1e-9);
    reporter.say(&format!(
        "{}; prompt of {} tokens in {:.2} s, then {} tokens at {rate:.1} tokens/s",
        writer.about(),
        result.prompt_tokens,
        (first - started).as_secs_f64(),
        result.tokens.len()
    ));
    Ok(())
}

/// The special token that a prompt begins with and the tokenizer adds too.
fn doubled(tokenizer: &Tokenizer, prompt: &str, tokens: &[u32]) -> Result<Option<String>> {
    let [first, second, ..] = tokens else { return Ok(None) };
    if first != second || tokenizer.encode_as_is(prompt)?.len() == tokens.len() {
        return Ok(None);
    }
    let special = tokenizer.special_tokens().into_iter();
    Ok(special.filter(|text| prompt.starts_with(text)).find(|text| tokenizer.special_token_id(text) == Some(*first)))
}
