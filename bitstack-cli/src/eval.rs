//! `bitstack eval`

use super::args::Eval;
use super::compress::read_text;
use super::open::{self, Stack, is_model};
use super::output::{self, Output};
use super::plot::{Curve, Panel, svg};
use super::progress::{Reporter, to_stderr};
use super::{print, usage};
use anyhow::{Context, Result};
use bitstack_engine::device::Cpu;
use bitstack_engine::eval::{Metrics, Reference, perplexity};
use bitstack_engine::stack::tokenizer;
use bitstack_engine::{Decoder, ElasticModel, Weight};
use bitstack_io::{Existing, FileError, write_atomically};
use bitstack_model::text::{Windows, default_seq_len};
use bitstack_model::{Dense, ModelConfig, Progress, Tokenizer};
use bitstack_runtime::Options;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Sizes of a curve when nothing else is asked for.
const STEPS: usize = 8;

/// One measured size.
struct Row {
    file: PathBuf,
    budget_bytes: u64,
    resident_bytes: u64,
    bits_per_weight: f64,
    metrics: Metrics,
}

/// The exit status when a result is not a number.
const NOT_A_NUMBER: u8 = 4;

/// Measures every file at every size.
pub(crate) fn run(args: &Eval, reporter: &Reporter) -> Result<ExitCode> {
    if let Some(path) = &args.plot {
        output::check(path, Output::File, true)?;
    }
    let text = read_text(&args.text, reporter)?;
    let reference = match &args.reference {
        Some(dir) => Some(Decoder::load_with(&open::checkpoint(dir, &args.opening, reporter)?, reporter)?),
        None => None,
    };
    let mut rows = Vec::new();
    let mut measure = Measure { args, text: &text, original: reference.as_ref(), reference: None, reporter };
    for file in &args.files {
        if is_model(file) { measure.directory(file, &mut rows) } else { measure.stack(file, &mut rows) }
            .with_context(|| file.display().to_string())?;
    }
    reporter.finish();
    if args.json {
        let values: Vec<Value> = rows.iter().map(to_json).collect();
        print(&format!("{:#}\n", Value::Array(values)))?;
    } else {
        print(&table(&rows, args.files.len() > 1))?;
    }
    if let Some(path) = &args.plot {
        let picture = picture(&rows, reference.is_some())?;
        write_atomically(path, Existing::Replace, |out| Ok::<_, FileError>(out.write_all(picture.as_bytes())?))?;
        reporter.say(&format!("picture: {}", path.display()));
    }
    let bad = rows.iter().filter(|row| !row.metrics.perplexity.is_finite());
    let bad: Vec<String> = bad.map(|row| format!("{} at {} bytes", row.file.display(), row.resident_bytes)).collect();
    if bad.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    // Also when quiet: it is the reason of the exit status.
    to_stderr(&format!(
        "error: the perplexity is not a finite number, as the model's logits are not ({}); are its weights as they should be?",
        bad.join(", ")
    ));
    Ok(ExitCode::from(NOT_A_NUMBER))
}

struct Measure<'a> {
    args: &'a Eval,
    text: &'a str,
    original: Option<&'a Decoder<Dense>>,
    /// The original on the windows of the last file: those of the next are nearly always the same.
    reference: Option<Reference<'a, Dense>>,
    reporter: &'a Reporter,
}

impl Measure<'_> {
    fn stack(&mut self, path: &Path, rows: &mut Vec<Row>) -> Result<()> {
        let stack = Stack::open(path, self.reporter)?;
        let bits = stack.bits;
        let budgets = match self.args.steps {
            Some(n) => stack.budgets(n.into()),
            None if !self.args.memory.is_empty() => self.args.memory.clone(),
            None => stack.budgets(if self.args.plot.is_some() { STEPS } else { 1 }),
        };
        // All plans first: a size that is too small is told before the long work.
        let plans = budgets.iter().map(|b| stack.plan(*b)).collect::<Result<Vec<_>>>()?;
        let tokens = self.tokens(&tokenizer(&stack.file)?)?;
        let model = ElasticModel::open(stack.file, budgets[0], Options::default(), self.reporter)?;
        let windows = self.windows(&tokens, model.config())?;
        self.refer_to(&windows)?;
        self.reporter.stage("eval (windows)", (plans.len() * windows.len()) as u64);
        for (budget_bytes, plan) in budgets.into_iter().zip(plans) {
            model.elastic().set_budget(budget_bytes)?;
            model.elastic().wait()?;
            let snapshot = model.elastic().snapshot();
            rows.push(Row {
                file: path.to_owned(),
                budget_bytes,
                resident_bytes: plan.resident_bytes,
                bits_per_weight: bits.per_weight(plan.resident_bytes),
                metrics: self.metrics(&model.at(&snapshot)?, &windows)?,
            });
        }
        Ok(())
    }

    /// The uncompressed model.
    fn directory(&mut self, path: &Path, rows: &mut Vec<Row>) -> Result<()> {
        let checkpoint = open::checkpoint(path, &self.args.opening, self.reporter)?;
        let bytes = checkpoint.stored_bytes();
        if let Some(budget) = self.args.memory.iter().find(|m| **m < bytes) {
            return Err(usage(format!("--memory {budget}: an uncompressed model has one size, {bytes} bytes")));
        }
        let decoder = Decoder::load_with(&checkpoint, self.reporter)?;
        let tokens = self.tokens(&Tokenizer::from_bytes(&checkpoint.companion("tokenizer.json")?)?)?;
        let windows = self.windows(&tokens, decoder.config())?;
        self.refer_to(&windows)?;
        self.reporter.stage("eval (windows)", windows.len() as u64);
        let n_weights: usize = decoder.config().weights().iter().map(|w| w.rows * w.cols).sum();
        let n_others: usize = decoder.config().other_tensors().iter().map(|v| v.len).sum();
        rows.push(Row {
            file: path.to_owned(),
            budget_bytes: bytes,
            resident_bytes: bytes,
            bits_per_weight: bytes as f64 * 8.0 / (n_weights + n_others) as f64,
            metrics: self.metrics(&decoder, &windows)?,
        });
        Ok(())
    }

    fn tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        tokenizer.encode(self.text).with_context(|| self.args.text.display().to_string())
    }

    fn windows<'t>(&self, tokens: &'t [u32], config: &ModelConfig) -> Result<Vec<&'t [u32]>> {
        let seq_len = self.args.seq_len.map_or_else(|| default_seq_len(config), |n| n as usize);
        let windows = Windows::new(tokens, seq_len, config.max_positions);
        Ok(windows.with_context(|| self.args.text.display().to_string())?.evenly_spaced(self.args.samples as usize))
    }

    /// Runs the original on these windows, if there is one and it has not.
    fn refer_to(&mut self, windows: &[&[u32]]) -> Result<()> {
        let Some(original) = self.original else { return Ok(()) };
        if self.reference.as_ref().is_none_or(|reference| reference.windows() != windows) {
            self.reporter.stage("original (windows)", windows.len() as u64);
            self.reference = Some(Reference::new(original, windows, self.reporter)?);
        }
        Ok(())
    }

    fn metrics<L: Weight<Cpu>>(&self, model: &Decoder<L>, windows: &[&[u32]]) -> Result<Metrics> {
        Ok(match &self.reference {
            Some(reference) => reference.compare(model, self.reporter)?,
            None => perplexity(model, windows, self.reporter)?,
        })
    }
}

fn to_json(row: &Row) -> Value {
    let m = &row.metrics;
    json!({
        "file": row.file.display().to_string(),
        "budget_bytes": row.budget_bytes,
        "resident_bytes": row.resident_bytes,
        "bits_per_weight": row.bits_per_weight,
        "perplexity": m.perplexity,
        "perplexity_stderr": m.perplexity_stderr,
        "kl": m.kl.map(|e| e.mean),
        "kl_stderr": m.kl.map(|e| e.stderr),
        "top1": m.top1.map(|e| e.mean),
        "top1_stderr": m.top1.map(|e| e.stderr),
        "tokens": m.tokens,
    })
}

fn table(rows: &[Row], name_files: bool) -> String {
    let compared = rows.iter().any(|r| r.metrics.kl.is_some());
    let mut out = format!("{:>14}  {:>11}  {:>18}", "resident bytes", "bits/weight", "perplexity");
    if compared {
        let _ = write!(out, "  {:>21}  {:>15}", "KL, nats", "top-1");
    }
    out.push('\n');
    for row in rows {
        let m = &row.metrics;
        let stderr = format!("± {:.2}", m.perplexity_stderr);
        let _ = write!(
            out,
            "{:14}  {:11.3}  {:>18}",
            row.resident_bytes,
            row.bits_per_weight,
            format!("{:.3} {stderr:>7}", m.perplexity)
        );
        if let (Some(kl), Some(top1)) = (m.kl, m.top1) {
            let kl = format!("{:.6} ± {:.6}", kl.mean, kl.stderr);
            let _ = write!(out, "  {kl:>21}  {:>15}", format!("{:.4} ± {:.4}", top1.mean, top1.stderr));
        }
        if name_files {
            let _ = write!(out, "  {}", row.file.display());
        }
        out.push('\n');
    }
    out
}

fn picture(rows: &[Row], compared: bool) -> Result<String> {
    let curves = |value: &dyn Fn(&Metrics) -> Option<f64>| -> Vec<Curve> {
        let mut curves: Vec<Curve> = Vec::new();
        for row in rows {
            let name = row.file.file_name().unwrap_or(row.file.as_os_str()).to_string_lossy().into_owned();
            let Some(y) = value(&row.metrics) else { continue };
            let point = (row.resident_bytes as f64 / 1e6, y);
            match curves.iter_mut().find(|c| c.name == name) {
                Some(curve) => curve.points.push(point),
                None => curves.push(Curve { name, points: vec![point] }),
            }
        }
        curves.iter_mut().for_each(|c| c.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
        curves
    };
    let mut panels = vec![Panel {
        title: "Perplexity at every size",
        y_label: "perplexity",
        curves: curves(&|m| Some(m.perplexity)),
        baseline: None,
    }];
    if compared {
        panels.push(Panel {
            title: "Divergence from the original model",
            y_label: "KL divergence, nats per token",
            curves: curves(&|m| m.kl.map(|e| e.mean)),
            baseline: None,
        });
    }
    svg(&panels)
}
