//! `bitstack export`

use super::args::{Export, Float, Layout};
use super::open::Stack;
use super::output::{self, Output};
use super::progress::Reporter;
use super::{size, usage};
use anyhow::Result;
use bitstack_exchange::{ExportOptions, FloatType, export_dense, export_reference};
use bitstack_io::Existing;

/// Writes a file, at a memory size, as a model directory.
pub(crate) fn run(args: &Export, reporter: &Reporter) -> Result<()> {
    if args.layout == Layout::Reference && args.dtype.is_some() {
        return Err(usage("--dtype goes with --as hf: the published layout keeps the factors as they are, in f16"));
    }
    output::check(&args.output, Output::Directory, args.force)?;
    let stack = Stack::open(&args.file, reporter)?;
    let plan = stack.plan(args.memory.unwrap_or(stack.order.total_bytes()))?;
    let existing = if args.force { Existing::Replace } else { Existing::Refuse };
    let options = ExportOptions { existing, shard_bytes: args.shard_size };
    let bytes = match args.layout {
        Layout::Hf => {
            let float = args.dtype.map(|dtype| match dtype {
                Float::F32 => FloatType::F32,
                Float::F16 => FloatType::F16,
                Float::Bf16 => FloatType::Bf16,
            });
            export_dense(&stack.file, &plan.levels, float, &args.output, &options, reporter)?
        }
        Layout::Reference => {
            let order = &stack.file.order()[..plan.n_blocks];
            export_reference(&stack.file, order, &args.output, &options, reporter)?
        }
    };
    reporter.finish();
    reporter.say(&format!(
        "{}: {} of tensors, from {} resident ({:.3} bits per stacked weight)",
        args.output.display(),
        size::show(bytes),
        size::show(plan.resident_bytes),
        stack.bits.per_weight(plan.resident_bytes)
    ));
    Ok(())
}
