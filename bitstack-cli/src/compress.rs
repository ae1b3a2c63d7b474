//! `bitstack compress`

use super::args::{Compress, Method, MethodArgs, Order, Scale};
use super::open::{self, Stack};
use super::output::{self, Output};
use super::progress::{Reporter, to_stderr};
use super::timings::{Timings, table};
use super::{print, quality, size, usage};
use anyhow::{Context, Result};
use bitstack_compress::{BlockMethod, CompressError, CompressOptions, Journal, OrderBy, Scaling};
use bitstack_io::Existing;
use bitstack_model::text::Excerpt;
use bitstack_model::{Part, Progress};
use bitstack_runtime::process_peak_bytes;
use serde_json::json;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The exit status when the file is written, but far from the original.
const FAR: u8 = 3;

/// Compresses the model in `args.model` and writes `args.output`, going on from a journal beside it if there is one; says how good it is.
pub(crate) fn run(args: &Compress, reporter: &Reporter) -> Result<ExitCode> {
    write(args, reporter)?;
    let stack = Stack::open(&args.output, reporter)?;
    if args.json {
        let value = json!({
            "file": args.output.display().to_string(),
            "file_bytes": stack.file.size_bytes(),
            "minimum_bytes": stack.order.minimum_bytes(),
            "total_bytes": stack.order.total_bytes(),
            "quality": quality::to_json(&stack),
        });
        print(&format!("{value:#}\n"))?;
    } else {
        print(&quality::table(&stack))?;
    }
    let Some(text) = quality::far(&stack) else { return Ok(ExitCode::SUCCESS) };
    // Also when quiet: it is the reason of the exit status.
    to_stderr(&format!("warning: {}: {text}", args.output.display()));
    Ok(ExitCode::from(FAR))
}

fn write(args: &Compress, reporter: &Reporter) -> Result<()> {
    let (output, method) = (&args.output, &args.method);
    if method.method == Method::Nested && method.rank.is_some_and(|k| k != 1) {
        return Err(usage("--rank: nested codes have rank 1; --method avd has any"));
    }
    if method.method == Method::Nested && method.spikes {
        return Err(usage("--spikes: is for --method avd; nested codes list spikes wherever that pays"));
    }
    let directory = journal_of(output);
    // A process killed just after it had written the output left both; otherwise an output is not to be touched.
    if args.restart || !Journal::has_output(&directory) {
        output::check(output, Output::File, args.force)?;
    }
    let started = Instant::now();
    let timings = Timings::new(reporter, Part::Opening);
    // Before the model, which may have to be downloaded.
    let text = method.calibration.as_deref().map(|path| read_text(path, reporter)).transpose()?;
    let checkpoint = open::checkpoint(&args.model, &args.opening, reporter)?;
    if !checkpoint.has_companion("tokenizer.json")? {
        reporter.say(&format!(
            "warning: {}: there is no tokenizer; the new file will hold none, and eval, generate and chat need one",
            args.model.display()
        ));
    }
    let options = options(method);
    if args.restart {
        Journal::discard(&directory)?;
    }
    let journal = Journal::open(&directory, &checkpoint, text.as_deref(), &options, &timings).map_err(|e| match e {
        e @ CompressError::JournalDiffers { .. } => {
            usage(format!("{e}; --restart throws it away, another --output leaves it alone"))
        }
        e => e.into(),
    })?;
    if journal.is_written(output)? {
        reporter.finish();
        reporter.say(&format!("{}: was complete already", output.display()));
        return Ok(journal.remove()?);
    }
    output::check(output, Output::File, args.force)?;

    let unfinished = Unfinished::announce(&directory);
    let work = || -> Result<_> {
        let mut compressed = journal.compress(&timings)?;
        compressed.draft.set_provenance("model", &name_of(&args.model)?)?;
        compressed.draft.set_provenance("made by", &describe(args, text.is_some()))?;
        let resident = (compressed.order.minimum_bytes(), compressed.order.total_bytes());
        let existing = if args.force { Existing::Replace } else { Existing::Refuse };
        timings.part(Part::Writing, resident.1);
        let bytes = journal.write(&compressed, output, existing, &mut reporter.bytes("write (bytes)"))?;
        Ok((resident, bytes))
    };
    let ((least, most), bytes) = work().map_err(|e| match journal.has_work() {
        true => e.context(format!("{unfinished}: what is done is kept, and the same command goes on from there")),
        false => e,
    })?;
    journal.remove()?;
    drop(unfinished);
    reporter.finish();
    reporter.say(&format!(
        "{}: {} on disk, {} to {} resident; the model itself is {}; {:.1} s{}",
        output.display(),
        size::show(bytes),
        size::show(least),
        size::show(most),
        size::show(checkpoint.stored_bytes()),
        started.elapsed().as_secs_f64(),
        process_peak_bytes().map(|b| format!(", peak memory {}", size::show(b))).unwrap_or_default()
    ));
    if args.timings {
        to_stderr(&table(&timings.so_far()));
    }
    Ok(())
}

/// A model by the last part of its path, or by its name at the Hub.
fn name_of(model: &Path) -> Result<String> {
    match model.to_str().filter(|name| name.starts_with(bitstack_hub::PREFIX)) {
        Some(name) => Ok(name.to_owned()),
        None => Ok(std::path::absolute(model)?.file_name().unwrap_or_default().to_string_lossy().into_owned()),
    }
}

/// The journal of an output: a directory beside it.
fn journal_of(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// The journal of the compression that is going on, for the message when the user stops it.
static AT_WORK: Mutex<Option<String>> = Mutex::new(None);

/// An announcement that stopping now loses nothing; it ends when this is dropped.
struct Unfinished(String);

impl Unfinished {
    fn announce(journal: &Path) -> Self {
        let text = format!("unfinished ({})", journal.display());
        at_work().replace(text.clone());
        // A second call finds the handler set, and one that cannot be set leaves the system's, which ends the process as well.
        let _ = ctrlc::try_set_handler(|| {
            if let Some(text) = &*at_work() {
                to_stderr(&format!("\n{text}: the same command goes on from here"));
            }
            std::process::exit(130);
        });
        Self(text)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        at_work().take();
    }
}

impl std::fmt::Display for Unfinished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

fn at_work() -> MutexGuard<'static, Option<String>> {
    AT_WORK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options(args: &MethodArgs) -> CompressOptions {
    CompressOptions {
        method: match args.method {
            Method::Nested => BlockMethod::Nested,
            Method::Avd => BlockMethod::Avd,
        },
        spikes: args.spikes,
        rank: args.rank.map(usize::from),
        n_blocks: args.blocks.map(usize::from),
        scaling: match args.scale {
            Scale::Gram => Scaling::Gram,
            Scale::Reference => Scaling::Reference,
            Scale::None => Scaling::None,
        },
        ordering: match args.order {
            Order::Gain => OrderBy::Gain,
            Order::Perplexity => OrderBy::Perplexity,
            Order::Greedy => OrderBy::Greedy,
            Order::Random => OrderBy::Random,
        },
        samples: args.samples as usize,
        seq_len: args.seq_len.map(|n| n as usize),
        order_windows: args.order_windows as usize,
        keep_embeddings: args.keep_embeddings,
        seed: args.seed,
    }
}

/// The options that made a file, as they would be typed.
fn describe(Compress { method: args, opening, .. }: &Compress, from_text: bool) -> String {
    let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| value().map(|v| v.get_name().to_owned());
    use clap::ValueEnum;
    format!(
        "bitstack {} compress {}--method {} {}{}{}--scale {} --samples {} {}--order {} {}{}--seed {}, calibrated on {}",
        env!("CARGO_PKG_VERSION"),
        opening.ignore_tensors.iter().map(|pattern| format!("--ignore-tensors '{pattern}' ")).collect::<String>(),
        name(&|| args.method.to_possible_value()).unwrap_or_default(),
        args.blocks.map(|n| format!("--blocks {n} ")).unwrap_or_default(),
        args.rank.map(|k| format!("--rank {k} ")).unwrap_or_default(),
        if args.spikes { "--spikes " } else { "" },
        name(&|| args.scale.to_possible_value()).unwrap_or_default(),
        args.samples,
        args.seq_len.map(|n| format!("--seq-len {n} ")).unwrap_or_default(),
        name(&|| args.order.to_possible_value()).unwrap_or_default(),
        match args.order {
            Order::Perplexity | Order::Greedy => format!("--order-windows {} ", args.order_windows),
            Order::Gain | Order::Random => String::new(),
        },
        if args.keep_embeddings { "--keep-embeddings " } else { "" },
        args.seed,
        if from_text { "text of the user's" } else { "text of the model's own" },
    )
}

/// Reads a text file; of a long one, parts that are spread over it.
pub(crate) fn read_text(path: &Path, reporter: &Reporter) -> Result<String> {
    let read = || {
        let file = File::open(path)?;
        // A pipe has no places to read at.
        if file.metadata()?.is_file() { Excerpt::read(&file) } else { Excerpt::read(&fs::read(path)?[..]) }
    };
    let excerpt = read().with_context(|| format!("cannot read {}", path.display()))?;
    if excerpt.is_partial() {
        reporter.say(&format!(
            "{}: {} of {}, in 64 stretches spread over the text, stand for all of it",
            path.display(),
            size::show(Excerpt::MOST_BYTES),
            size::show(excerpt.total_bytes)
        ));
    }
    Ok(excerpt.text)
}
