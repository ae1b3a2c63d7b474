//! `bitstack compress`

use super::args::{Compress, Method, MethodArgs, Order, Scale};
use super::progress::Reporter;
use super::{size, usage};
use anyhow::{Context, Result};
use bitstack_format::{Existing, write_atomically};
use bitstack_llm::{BlockMethod, Checkpoint, CompressOptions, Ordering, Scaling, compress};
use std::path::Path;
use std::time::Instant;

/// Compresses a model directory into a file.
pub(crate) fn run(args: &Compress, reporter: &Reporter) -> Result<()> {
    refuse_existing(&args.output, args.force)?;
    to_file(&args.model, &args.output, &args.method, args.force, reporter)
}

/// Compresses the model in `model` and writes `output`; replaces it only when `force` is set.
pub(crate) fn to_file(
    model: &Path,
    output: &Path,
    method: &MethodArgs,
    force: bool,
    reporter: &Reporter,
) -> Result<()> {
    let started = Instant::now();
    let checkpoint = Checkpoint::open(model)?;
    let text = match &method.calibration {
        Some(path) => Some(read_text(path)?),
        None => None,
    };
    if method.method == Method::Nested && method.rank.is_some_and(|k| k != 1) {
        return Err(usage("--rank: nested codes have rank 1; --method avd has any"));
    }
    let options = options(method);
    let directory = match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut compressed = compress(&checkpoint, text.as_deref(), &options, directory, reporter)?;
    let name = std::path::absolute(model)?.file_name().map(|n| n.to_string_lossy().into_owned());
    compressed.draft.set_provenance("model", &name.unwrap_or_default())?;
    compressed.draft.set_provenance("made by", &describe(method, text.is_some()))?;

    let existing = if force { Existing::Replace } else { Existing::Refuse };
    let mut progress = reporter.bytes("write (bytes)");
    let bytes = write_atomically(output, existing, |out| {
        compressed.draft.finish(compressed.order.weights(), out, &mut progress)
    })?;
    reporter.finish();
    reporter.say(&format!(
        "{}: {} on disk, {} to {} resident; the model itself is {}; {:.1} s{}",
        output.display(),
        size::show(bytes),
        size::show(compressed.order.minimum_bytes()),
        size::show(compressed.order.total_bytes()),
        size::show(checkpoint.stored_bytes()),
        started.elapsed().as_secs_f64(),
        peak_memory().map(|b| format!(", peak memory {}", size::show(b))).unwrap_or_default()
    ));
    Ok(())
}

fn options(args: &MethodArgs) -> CompressOptions {
    CompressOptions {
        method: match args.method {
            Method::Nested => BlockMethod::Nested,
            Method::Avd => BlockMethod::Avd,
        },
        rank: args.rank.map(usize::from),
        n_blocks: args.blocks.map(usize::from),
        scaling: match args.scale {
            Scale::Gram => Scaling::Gram,
            Scale::Reference => Scaling::Reference,
            Scale::None => Scaling::None,
        },
        ordering: match args.order {
            Order::Gain => Ordering::Gain,
            Order::Perplexity => Ordering::Perplexity,
            Order::Greedy => Ordering::Greedy,
            Order::Random => Ordering::Random,
        },
        samples: args.samples as usize,
        seq_len: args.seq_len.map(|n| n as usize),
        keep_embeddings: args.keep_embeddings,
        seed: args.seed,
    }
}

/// The options that made a file, as they would be typed.
fn describe(args: &MethodArgs, from_text: bool) -> String {
    let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| value().map(|v| v.get_name().to_owned());
    use clap::ValueEnum;
    format!(
        "bitstack {} compress --method {} {}{}--scale {} --samples {} {}--order {} {}--seed {}, calibrated on {}",
        env!("CARGO_PKG_VERSION"),
        name(&|| args.method.to_possible_value()).unwrap_or_default(),
        args.blocks.map(|n| format!("--blocks {n} ")).unwrap_or_default(),
        args.rank.map(|k| format!("--rank {k} ")).unwrap_or_default(),
        name(&|| args.scale.to_possible_value()).unwrap_or_default(),
        args.samples,
        args.seq_len.map(|n| format!("--seq-len {n} ")).unwrap_or_default(),
        name(&|| args.order.to_possible_value()).unwrap_or_default(),
        if args.keep_embeddings { "--keep-embeddings " } else { "" },
        args.seed,
        if from_text { "text of the user's" } else { "text of the model's own" },
    )
}

/// Refuses to write over a file unless told to, before any work is done.
pub(crate) fn refuse_existing(path: &Path, force: bool) -> Result<()> {
    match path.try_exists() {
        Ok(true) if !force => Err(usage(format!("{} exists; --force replaces it", path.display()))),
        _ => Ok(()),
    }
}

/// Reads a text file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))
}

/// The most memory this process has had, where the system says it.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
