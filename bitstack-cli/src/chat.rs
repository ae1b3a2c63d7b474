//! `bitstack chat`

use super::args::{Chat, Memory};
use super::keys::Interrupt;
use super::open::Beside;
use super::progress::Reporter;
use super::writer::{Parts, Writer, context};
use super::{print, size};
use anyhow::{Context, Result};
use bitstack_engine::sample::{Continuation, GenerateOptions, Past, StopReason};
use bitstack_io::in_one_line;
use bitstack_model::chat::{ChatTemplate, Message, Role};
use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

const HELP: &str = "\
/memory SIZE   change the memory size (300MB, 1.5GiB); without SIZE, say what it is
/reset         forget the conversation
/help          this
/exit          end; so does Ctrl-D
A line that ends with \\ goes on in the next. While the model writes, + and - change the memory size, and Ctrl-C stops the answer.";

/// Tokens of a conversation for which room is kept in a memory size.
const CONTEXT: usize = 2048;

/// Set when the user wants no more of an answer.
static STOP: AtomicBool = AtomicBool::new(false);

/// Reads messages from stdin, a line each, and writes the model's answers to stdout.
pub(crate) fn run(args: &Chat, reporter: &Reporter) -> Result<()> {
    talk(args, reporter).with_context(|| args.model.file.display().to_string())
}

fn talk(args: &Chat, reporter: &Reporter) -> Result<()> {
    let mut room = |parts: &Parts<'_>| {
        let most = parts.config.max_positions;
        let usual = if let Some(Memory::Bytes(_)) = args.model.memory { most.min(CONTEXT) } else { most };
        let context = context(&args.model, parts.config)?.unwrap_or(usual);
        Ok(Beside::new(parts.config, context, context))
    };
    let writer = Writer::open(&args.model, &mut room, reporter)?;
    let template = writer.template()?;
    let options = writer.options(&args.sampling, args.max_tokens.unwrap_or(usize::MAX))?;
    let options = options.end_tokens(template.end_tokens(&writer.tokenizer));
    let system: Vec<Message> = args.system.iter().map(|text| Message::new(Role::System, text)).collect();
    // What the template refuses from the beginning is told before anybody types.
    template.encode(&writer.tokenizer, &[&system[..], &[Message::new(Role::User, "Hello")]].concat())?;
    let past = Past::new(writer.config(), writer.beside().tokens)?;
    let mut talk = Talk { writer: &writer, template, options, messages: system.clone(), past: Some(past) };
    let is_terminal = std::io::stdin().is_terminal();
    if is_terminal {
        reporter.say(&format!("{}; /help lists the commands", writer.about()));
    }
    while let Some(line) = read(is_terminal)? {
        match line.trim() {
            "" => {}
            "/exit" => break,
            "/help" => reporter.say(HELP),
            "/reset" => talk.messages.clone_from(&system),
            "/memory" => reporter.say(&writer.about()),
            command if command.starts_with("/memory ") => {
                let said = size::parse(&command["/memory ".len()..]).map_err(anyhow::Error::msg);
                let said = said.and_then(|bytes| writer.set_memory(bytes));
                reporter.say(&said.unwrap_or_else(|error| in_one_line(error.as_ref())));
            }
            command if command.starts_with('/') && !command[1..].contains(['/', ' ']) => {
                reporter.say(&format!("there is no command {command}; /help lists them"));
            }
            _ => talk.answer(line, reporter)?,
        }
    }
    Ok(())
}

/// A message: a line, with those that it goes on in. None at the end of the input.
fn read(is_terminal: bool) -> Result<Option<String>> {
    let mut message = String::new();
    loop {
        if is_terminal {
            let _ = write!(std::io::stderr(), "{}", if message.is_empty() { "> " } else { ". " });
        }
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line).context("cannot read a message from stdin")? == 0 {
            if is_terminal {
                let _ = writeln!(std::io::stderr());
            }
            return Ok(Some(message).filter(|message| !message.is_empty()));
        }
        let line = line.trim_end_matches(['\n', '\r']);
        match line.strip_suffix('\\') {
            Some(line) => message.extend([line, "\n"]),
            None => return Ok(Some(message + line)),
        }
    }
}

/// A conversation.
struct Talk<'w> {
    writer: &'w Writer<'w>,
    template: &'w ChatTemplate,
    options: GenerateOptions,
    messages: Vec<Message>,
    /// The keys and values of the conversation so far. Only the tokens that it does not begin with are run; where a template changes what was said
    /// before, that is where it changes it.
    past: Option<Past>,
}

impl Talk<'_> {
    /// Writes the answer to a message.
    fn answer(&mut self, message: String, reporter: &Reporter) -> Result<()> {
        let (writer, config) = (self.writer, self.writer.config());
        let context = writer.beside().tokens;
        self.messages.push(Message::new(Role::User, message));
        let prompt = self.template.encode(&writer.tokenizer, &self.messages)?;
        if prompt.len() >= context {
            self.messages.pop();
            reporter.say(&format!(
                "with this message the conversation has {} tokens, and the context is {context}: say less, or /reset begins anew",
                prompt.len()
            ));
            return Ok(());
        }
        let past = self.past.take().context("the conversation has ended")?;
        let mut text = Continuation::after(past, config, &writer.tokenizer, &prompt, &self.options)?;
        let started = Instant::now();
        let mut first_text = None;
        let mut stdout = Ok(());
        STOP.store(false, Ordering::Relaxed);
        writer.write(&mut text, Interrupt::Says(&STOP), &mut |piece| {
            first_text.get_or_insert_with(Instant::now);
            stdout = print(piece);
            if stdout.is_ok() && !STOP.load(Ordering::Relaxed) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        stdout?;
        print("\n")?;
        let (result, past) = text.into_past();
        let (first, now) = (first_text.unwrap_or(started), Instant::now());
        let rate = result.tokens.len().saturating_sub(1) as f64 / (now - first).as_secs_f64().max(1e-9);
        reporter.say(&format!(
            "[{}; {} new tokens in {:.2} s, then {} at {rate:.1} tokens/s; {} of {} positions]",
            writer.about(),
            result.prompt_tokens - result.cached_tokens,
            (first - started).as_secs_f64(),
            result.tokens.len(),
            past.tokens().len(),
            past.capacity()
        ));
        if result.stop == StopReason::ContextFull {
            reporter.say("the context is full; /reset begins anew, and --context makes room for more");
        }
        self.messages.push(Message::new(Role::Assistant, result.text));
        self.past = Some(past);
        Ok(())
    }
}
