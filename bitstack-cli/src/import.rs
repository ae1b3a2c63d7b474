//! `bitstack import`

use super::args::Import;
use super::open::{local, with_advice};
use super::output::{self, Output};
use super::progress::Reporter;
use super::size;
use anyhow::Result;
use bitstack_exchange::ExchangeError;
use bitstack_format::BlockSource;
use bitstack_io::{Existing, write_atomically};
use std::path::Path;

/// Turns a checkpoint of the published implementation into a file.
pub(crate) fn run(args: &Import, reporter: &Reporter) -> Result<()> {
    output::check(&args.output, Output::File, args.force)?;
    let directory = match args.output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let ignored = &args.opening.ignore_tensors;
    let imported = bitstack_exchange::import(&local(&args.directory, reporter)?, ignored, directory, reporter);
    let mut imported = imported.map_err(|error| match &error {
        ExchangeError::Model(inner) => with_advice(inner).unwrap_or_else(|| error.into()),
        _ => error.into(),
    })?;
    let name = std::path::absolute(&args.directory)?.file_name().map(|n| n.to_string_lossy().into_owned());
    imported.draft.set_provenance("model", &name.unwrap_or_default())?;
    let made_by =
        format!("bitstack {} import, from a checkpoint of the published implementation", env!("CARGO_PKG_VERSION"));
    imported.draft.set_provenance("made by", &made_by)?;

    let existing = if args.force { Existing::Replace } else { Existing::Refuse };
    let mut progress = reporter.bytes("write (bytes)");
    let bytes = write_atomically(&args.output, existing, |out| {
        imported.draft.finish(imported.order.weights(), out, &mut progress)
    })?;
    reporter.finish();
    reporter.say(&format!(
        "{}: {} blocks of {} weights, {} on disk, {} to {} resident",
        args.output.display(),
        imported.order.n_blocks(),
        imported.draft.weights().len(),
        size::show(bytes),
        size::show(imported.order.minimum_bytes()),
        size::show(imported.order.total_bytes()),
    ));
    Ok(())
}
