//! Commands that look at a file or cut it, without running the model: inspect, verify, plan, truncate.

use super::args::{Inspect, Plan, Truncate, Verify};
use super::open::Stack;
use super::output::{self, Output};
use super::progress::{Reporter, to_stderr};
use super::{print, quality, size};
use anyhow::Result;
use bitstack_core::SpikesRef;
use bitstack_engine::quality::PROVENANCE_KEY;
use bitstack_format::{BlockSource, WeightInfo};
use bitstack_io::{Existing, write_atomically};
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;

/// The entries in the list of spikes of a weight, and the bytes of the list; both 0 when it has none.
fn spikes(weight: &WeightInfo) -> (usize, u64) {
    let words = weight.blocks.first().map_or(0, |block| block.spike_words);
    (words.saturating_sub(SpikesRef::least_words(weight.shape)), 2 * words as u64)
}

/// `bitstack inspect`
pub(crate) fn inspect(args: &Inspect) -> Result<()> {
    let stack = Stack::open(&args.file, &Reporter::new(false))?;
    let weights = stack.file.weights();
    // What is shown as a table is not shown as a note; one that is malformed is.
    let notes: BTreeMap<_, _> =
        stack.file.provenance().iter().filter(|(key, _)| stack.quality.is_none() || *key != PROVENANCE_KEY).collect();
    if args.json {
        let weights: Vec<_> = weights
            .iter()
            .map(|w| {
                let bytes: Vec<_> = (1..=w.n_blocks()).map(|b| w.block_bytes(b)).collect();
                let (spikes, spike_bytes) = spikes(w);
                json!({
                    "name": w.name, "rows": w.shape.rows(), "cols": w.shape.cols(), "rank": w.rank,
                    "method": w.method, "blocks": w.n_blocks(), "block_bytes": bytes,
                    "spikes": spikes, "spike_bytes": spike_bytes,
                })
            })
            .collect();
        let files: Vec<_> = stack.file.files().iter().map(|f| json!({"name": f.name, "bytes": f.len_bytes})).collect();
        let tensors: Vec<_> =
            stack.file.base_tensors().iter().map(|t| json!({"name": t.name, "bytes": t.len_bytes})).collect();
        let value = json!({
            "file_bytes": stack.file.size_bytes(),
            "minimum_bytes": stack.order.minimum_bytes(),
            "total_bytes": stack.order.total_bytes(),
            "base_bytes": stack.bits.base_bytes,
            "stacked_weights": stack.bits.n_stacked,
            "missing_blocks": stack.file.missing().map_or(0, |m| m.n_blocks),
            "provenance": notes,
            "quality": quality::to_json(&stack),
            "weights": weights,
            "unstacked": tensors,
            "files": files,
            "order": stack.file.order(),
        });
        return print(&format!("{value:#}\n"));
    }
    let (least, most) = (stack.order.minimum_bytes(), stack.order.total_bytes());
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:14}{text}");
    };
    line("file", format!("{}, {}", args.file.display(), size::show(stack.file.size_bytes())));
    for (key, value) in notes {
        line(key, value.clone());
    }
    line("weights", format!("{} stacked, {} parameters", weights.len(), stack.bits.n_stacked));
    line("unstacked", format!("{} tensors, {}", stack.file.base_tensors().len(), size::show(stack.bits.base_bytes)));
    line("smallest", format!("{least} bytes resident, {:.3} bits per stacked weight", stack.bits.per_weight(least)));
    line("whole", format!("{most} bytes resident, {:.3} bits per stacked weight", stack.bits.per_weight(most)));
    let (n_spikes, spike_bytes) = weights.iter().map(spikes).fold((0, 0), |(n, sum), (m, bytes)| (n + m, sum + bytes));
    line("spikes", format!("{n_spikes} entries, {}, with the first blocks", size::show(spike_bytes)));
    let files: Vec<_> = stack.file.files().iter().map(|f| f.name.as_str()).collect();
    line("files", files.join(", "));
    if stack.quality.is_some() {
        let _ = write!(out, "\n{}", quality::table(&stack));
    }
    if let Some(text) = quality::far(&stack) {
        let _ = writeln!(out, "{text}");
    }
    let width = weights.iter().map(|w| w.name.len()).max().unwrap_or(0).max(6);
    let _ = writeln!(
        out,
        "\n{:width$}  {:>14}  {:>4}  {:>6}  {:>6}  {:>7}  {:>10}",
        "weight", "shape", "rank", "method", "blocks", "spikes", "all blocks"
    );
    for w in weights {
        let bytes: u64 = (1..=w.n_blocks()).filter_map(|b| w.block_bytes(b)).sum();
        let _ = writeln!(
            out,
            "{:width$}  {:>14}  {:>4}  {:>6}  {:>6}  {:>7}  {:>10}",
            w.name,
            w.shape.to_string(),
            w.rank,
            w.method,
            w.n_blocks(),
            spikes(w).0,
            size::show(bytes)
        );
    }
    let _ = writeln!(out, "\nload order: block 1 of every weight, then");
    let rest = || stack.order.iter().skip(weights.len());
    for id in rest().take(12) {
        let _ = writeln!(out, "  block {:2} of {}", id.block, weights[id.weight].name);
    }
    if rest().count() > 12 {
        let _ = writeln!(out, "  and {} more (--json lists all)", rest().count() - 12);
    }
    print(&out)
}

/// `bitstack verify`
pub(crate) fn verify(args: &Verify, reporter: &Reporter) -> Result<ExitCode> {
    let stack = Stack::open(&args.file, &Reporter::new(true))?;
    let report = stack.file.verify(&mut reporter.bytes("verify (bytes)"))?;
    reporter.finish();
    for damage in &report.damaged {
        print(&format!("damaged: {}: {}\n", damage.name, damage.reason))?;
    }
    for name in &report.missing {
        print(&format!("missing: {name}\n"))?;
    }
    let name = args.file.display();
    if report.is_whole() {
        print(&format!("{name}: {} tensors, {} bytes, all as written\n", report.n_tensors, report.bytes))?;
        return Ok(ExitCode::SUCCESS);
    }
    to_stderr(&format!(
        "error: {name}: of {} tensors {} are damaged and {} missing; blocks before the first of them stay usable",
        report.n_tensors + report.missing.len(),
        report.damaged.len(),
        report.missing.len()
    ));
    Ok(ExitCode::FAILURE)
}

/// `bitstack plan`
pub(crate) fn plan(args: &Plan, reporter: &Reporter) -> Result<()> {
    let stack = Stack::open(&args.file, reporter)?;
    let plan = stack.plan(args.memory)?;
    warn(&stack, &plan, reporter);
    let levels = || stack.file.weights().iter().zip(plan.levels.iter());
    if args.json {
        let levels: serde_json::Map<_, _> = levels().map(|(w, l)| (w.name.clone(), json!(l))).collect();
        let value = json!({
            "budget_bytes": args.memory,
            "resident_bytes": plan.resident_bytes,
            "bits_per_weight": stack.bits.per_weight(plan.resident_bytes),
            "blocks": plan.n_blocks,
            "quality": quality::at_json(stack.quality.as_ref(), plan.resident_bytes),
            "levels": levels,
        });
        return print(&format!("{value:#}\n"));
    }
    let total = stack.order.iter().count();
    let mut out = format!(
        "{} of {} bytes used by {} of {total} blocks: {:.3} bits per stacked weight\n",
        plan.resident_bytes,
        args.memory,
        plan.n_blocks,
        stack.bits.per_weight(plan.resident_bytes)
    );
    out += &quality::sentence(stack.quality.as_ref(), plan.resident_bytes);
    out.push('\n');
    let width = stack.file.weights().iter().map(|w| w.name.len()).max().unwrap_or(0);
    for (w, level) in levels() {
        let _ = writeln!(out, "{:width$}  level {level:2} of {}", w.name, w.n_blocks());
    }
    print(&out)
}

/// `bitstack truncate`
pub(crate) fn truncate(args: &Truncate, reporter: &Reporter) -> Result<()> {
    let stack = Stack::open(&args.file, reporter)?;
    let plan = stack.plan(args.memory)?;
    let existing = if args.force { Existing::Replace } else { Existing::Refuse };
    output::check(&args.output, Output::File, args.force)?;
    let mut progress = reporter.bytes("write (bytes)");
    let bytes =
        write_atomically(&args.output, existing, |out| stack.file.write_prefix(plan.n_blocks, out, &mut progress))?;
    reporter.finish();
    reporter.say(&format!(
        "{}: {} resident ({:.3} bits per stacked weight), {} on disk{}",
        args.output.display(),
        size::show(plan.resident_bytes),
        stack.bits.per_weight(plan.resident_bytes),
        size::show(bytes),
        quality::brief(stack.quality.as_ref(), plan.resident_bytes)
    ));
    warn(&stack, &plan, reporter);
    Ok(())
}

/// Says where the model of a plan is noise.
fn warn(stack: &Stack, plan: &bitstack_sort::Plan, reporter: &Reporter) {
    if let Some(text) = quality::noise(stack.quality.as_ref(), stack.bits, plan.resident_bytes) {
        reporter.say(&text);
    }
}
