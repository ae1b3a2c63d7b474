//! `bitstack bench`: prints what `bitstack_bench` measures.

use super::args::{BenchDecode, BenchDecompose, BenchKernels, BenchLoad, Device, ModelShape};
use super::open::Stack;
use super::progress::Reporter;
use super::{print, size, usage};
use anyhow::{Context, Result};
use bitstack_bench::decode::{Schedule, bytes_at_level, decoding, resizing};
use bitstack_bench::decompose::{self, Comparison, MODEL_BLOCKS, Width};
use bitstack_bench::kernels::{Case, Pool};
use bitstack_bench::load::{self, Operation};
use bitstack_bench::{machine, synthetic};
use bitstack_cpu::Kernel;
use bitstack_engine::ElasticModel;
use bitstack_io::Existing;
use bitstack_model::Progress;
use bitstack_runtime::{Options, Verify, process_peak_bytes};
use serde_json::json;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// `bitstack bench decompose`
pub(crate) fn decompose(args: &BenchDecompose, reporter: &Reporter) -> Result<()> {
    if let Some(shape) = args.shape {
        return whole_model(args, shape, reporter);
    }
    let (n, rank, n_blocks) = (args.size as usize, usize::from(args.rank), usize::from(args.blocks));
    let measured = Comparison::measure(n, rank, n_blocks, reporter)?;
    reporter.finish();
    let Comparison { exact, fast, nested_weights_per_second: nested, .. } = &measured;
    let ratio = measured.ratio();
    if args.json {
        let value = json!({
            "machine": machine(), "rows": n, "cols": n, "rank": rank, "threads": 1,
            "exact_seconds_per_block": exact.seconds, "fast_seconds_per_block": fast.seconds, "ratio": ratio,
            "fast_weights_per_second": measured.fast_weights_per_second(), "nested_weights_per_second": nested,
            "exact_errors": exact.errors, "fast_errors": fast.errors,
        });
        return print(&format!("{value:#}\n"));
    }
    let mut out = format!("{n} x {n}, rank {rank}, one thread; {}\n\n", machine());
    let _ = writeln!(out, "method            s/block      ratio");
    let _ = writeln!(out, "full SVD      {:11.4} {:10.1}", exact.seconds, 1.0);
    let _ = writeln!(out, "block Krylov  {:11.4} {ratio:10.1}", fast.seconds);
    let _ = writeln!(out, "\nnested codes, {n_blocks} blocks, with H: {:.2} million weights per second", nested / 1e6);
    let _ = writeln!(out, "\nblocks   error, full SVD   error, block Krylov   excess");
    let errors = exact.errors.iter().zip(&fast.errors).zip(measured.excess_percent());
    for (b, ((e, f), excess)) in errors.enumerate() {
        let _ = writeln!(out, "{:6}   {e:15.6}   {f:19.6}   {excess:5.2} %", b + 1);
    }
    print(&out)
}

/// Time for the layers and the head of a model, from measured rates.
fn whole_model(args: &BenchDecompose, shape: ModelShape, reporter: &Reporter) -> Result<()> {
    let widths = decompose::model(&shape.of(), reporter)?;
    reporter.finish();
    let threads = rayon::current_num_threads();
    let minutes = widths.iter().map(Width::seconds).sum::<f64>() / 60.0;
    if args.json {
        let widths = widths.each_ref().map(|w| {
            json!({
                "cols": w.cols, "matrices": w.matrices, "weights": w.n_weights(), "seconds_per_matrix": w.seconds_per_matrix,
                "weights_per_second": w.weights_per_second, "thread_minutes": w.seconds() / 60.0,
            })
        });
        let value = json!({ "machine": machine(), "widths": widths, "thread_minutes": minutes, "threads": threads });
        return print(&format!("{value:#}\n"));
    }
    let mut out = format!("nested codes with H, {MODEL_BLOCKS} blocks, one thread; {}\n\n", machine());
    let _ = writeln!(out, "columns   matrices   s/matrix   million weights/s   weights    minutes");
    for w in &widths {
        let _ = writeln!(
            out,
            "{:7} {:10} {:10.1} {:19.2} {:9.2e} {:10.0}",
            w.cols,
            w.matrices,
            w.seconds_per_matrix,
            w.weights_per_second / 1e6,
            w.n_weights() as f64,
            w.seconds() / 60.0
        );
    }
    let _ = writeln!(
        out,
        "\nall layers and the head: {minutes:.0} minutes of one thread, {:.0} on {threads} threads",
        minutes / threads as f64
    );
    print(&out)
}

/// The file to measure with: the user's, or one of random planes, which is there as long as the directory.
fn model_file(
    file: Option<&Path>,
    shape: ModelShape,
    n_blocks: usize,
    reporter: &Reporter,
) -> Result<(PathBuf, Option<TempDir>)> {
    if let Some(file) = file {
        return Ok((file.to_owned(), None));
    }
    let shape = shape.of();
    let scratch = tempfile::tempdir()?;
    let path = scratch.path().join("synthetic.bitstack");
    synthetic::write(&path, Existing::Refuse, &shape, n_blocks, 1, reporter).with_context(|| {
        format!("a model of random planes in {} (TMPDIR chooses another)", scratch.path().display())
    })?;
    Ok((path, Some(scratch)))
}

impl ModelShape {
    fn of(self) -> synthetic::ModelShape {
        match self {
            Self::Llama1b => synthetic::ModelShape::LLAMA_1B,
            Self::Llama8b => synthetic::ModelShape::LLAMA_8B,
        }
    }
}

/// `bitstack bench kernels`
pub(crate) fn kernels(args: &BenchKernels, reporter: &Reporter) -> Result<()> {
    if args.device == Device::Cuda {
        return cuda_kernels(args, reporter);
    }
    let (rows, cols) = (args.rows.unwrap_or(4096), args.cols.unwrap_or(4096));
    if !cols.is_multiple_of(8) {
        return Err(usage(format!("--cols {cols}: give a multiple of 8")));
    }
    let pool = Pool::new(usize::try_from(args.pool)?).with_context(|| format!("--pool {}", args.pool))?;
    let cases = Case::table(rows as usize, cols as usize);
    reporter.stage("measure (products)", cases.len() as u64);
    let mut measured = Vec::new();
    for case in cases {
        let time = Duration::try_from_secs_f64(args.seconds).map_err(|e| usage(format!("--seconds: {e}")))?;
        let row = pool
            .measure(case, time)?
            .ok_or_else(|| usage(format!("--pool {}: smaller than one weight of {rows} x {cols}", args.pool)))?;
        measured.push(row);
        reporter.advance(1);
    }
    reporter.finish();
    if args.json {
        let values: Vec<_> = measured
            .iter()
            .map(|m| {
                json!({
                    "machine": machine(), "rows": m.case.rows, "cols": m.case.cols, "level": m.case.level,
                    "rank": m.case.rank, "spikes_per_thousand": m.case.spikes, "tokens": m.case.tokens,
                    "isa": m.case.isa.to_string(), "threads": m.case.n_threads(), "seconds": m.seconds,
                    "compressed_bytes": m.compressed_bytes, "bytes_per_second": m.bytes_per_second,
                    "plain_read_bytes_per_second": m.plain_read_bytes_per_second,
                    "of_plain_read": m.of_plain_read(), "dense_seconds": m.dense_seconds, "of_dense": m.of_dense(),
                })
            })
            .collect();
        return print(&format!("{:#}\n", serde_json::Value::Array(values)));
    }
    let mut out = format!("{rows} x {cols}; {}\n", machine());
    out.push_str("of read: compressed bytes per second over those of a plain read of the same memory\n");
    out.push_str("of dense: times faster than a dense product, bf16 for one token, f32 for more\n");
    out.push_str("spikes: entries of their list for a thousand weights\n\n");
    out.push_str("isa           threads  rank  level  spikes  tokens        us    GB/s  of read  of dense\n");
    for m in &measured {
        let _ = writeln!(
            out,
            "{:12}  {:7}  {:4}  {:5}  {:6}  {:6}  {:8.1}  {:6.2}  {:7.2}  {:8.2}",
            m.case.isa,
            m.case.n_threads(),
            m.case.rank,
            m.case.level,
            m.case.spikes,
            m.case.tokens,
            m.seconds * 1e6,
            m.bytes_per_second / 1e9,
            m.of_plain_read(),
            m.of_dense()
        );
    }
    print(&out)
}

/// `bitstack bench kernels --device cuda`
#[cfg(feature = "cuda")]
fn cuda_kernels(args: &BenchKernels, reporter: &Reporter) -> Result<()> {
    use bitstack_bench::cuda::{Cases, run};
    let mut cases = Cases::default();
    if args.rows.is_some() || args.cols.is_some() {
        cases.shapes = vec![(args.rows.unwrap_or(4096) as usize, args.cols.unwrap_or(4096) as usize)];
    }
    reporter.stage("measure (products)", cases.len() as u64);
    let report = run(0, &cases, |_| reporter.advance(1))?;
    reporter.finish();
    if !args.json {
        return print(&report.to_string());
    }
    let values: Vec<_> = report
        .rows
        .iter()
        .map(|r| {
            json!({
                "device": report.device, "copy_bytes_per_second": report.copy_gigabytes_per_second * 1e9,
                "rows": r.rows, "cols": r.cols, "rank": r.rank, "level": r.level, "tokens": r.tokens,
                "kernel": format!("{:?}", r.method).to_lowercase(), "seconds": r.microseconds * 1e-6,
                "compressed_bytes": r.compressed_bytes, "bytes_per_second": r.gigabytes_per_second * 1e9,
                "of_copy": r.ratio_to_copy, "cublas_f16_seconds": r.cublas_microseconds.map(|us| us * 1e-6),
                "relative_error": r.relative_error,
            })
        })
        .collect();
    print(&format!("{:#}\n", serde_json::Value::Array(values)))
}

/// `bitstack bench kernels --device cuda`
#[cfg(not(feature = "cuda"))]
fn cuda_kernels(_args: &BenchKernels, _reporter: &Reporter) -> Result<()> {
    Err(usage("--device cuda: this build has no CUDA kernels; make one with `cargo install bitstack --features cuda`"))
}

/// `bitstack bench load`
pub(crate) fn load(args: &BenchLoad, reporter: &Reporter) -> Result<()> {
    let (path, _scratch) = model_file(args.file.as_deref(), args.shape, args.blocks.into(), reporter)?;
    // As the model that follows has it.
    let layout = Kernel::detect().layout();
    reporter.stage("load (rounds)", args.rounds.into());
    let mut rows = Vec::new();
    for _ in 0..args.rounds {
        rows.extend(load::load(&path, layout, 1)?);
        reporter.advance(1);
    }
    let operations = [
        ("plain read of the file", "read", Operation::Read),
        ("growing", "grow", Operation::Grow(Verify::Never)),
        ("growing, with hashes", "grow_verified", Operation::Grow(Verify::Always)),
        ("shrinking", "shrink", Operation::Shrink),
    ];
    let yardstick = load::median(&rows, Operation::Read).map_or(f64::NAN, |row| row.bytes_per_second());
    let measured = operations.into_iter().filter_map(|(name, key, operation)| {
        load::median(&rows, operation).map(|row| (name, key, row, row.bytes_per_second() / yardstick))
    });

    // What tokens take meanwhile.
    let stack = Stack::open(&path, reporter)?;
    let (least, most) = (stack.order.minimum_bytes(), stack.order.total_bytes());
    let model = ElasticModel::open(stack.file, least, Options::default(), reporter)?;
    reporter.finish();
    let tokens = resizing(&model, Schedule::default())?;
    let growing_seconds = tokens.growing_seconds();
    let phases = [
        ("at rest, smallest", "rest_smallest", &tokens.small),
        ("growing", "growing", &tokens.growing),
        ("at rest, largest", "rest_largest", &tokens.large),
        ("shrinking", "shrinking", &tokens.shrinking),
        ("after that", "shrunk", &tokens.shrunk),
    ]
    .map(|(name, key, phase)| (name, key, tokens.phase(phase)));

    if args.json {
        let mut value = json!({
            "machine": machine(), "threads": rayon::current_num_threads(), "rounds": args.rounds,
            "growing_seconds_while_decoding": growing_seconds,
        });
        for (_, key, row, of_read) in measured {
            value[key] = json!({
                "bytes": row.bytes, "seconds": row.time.as_secs_f64(), "of_plain_read": of_read,
                "resident_set_change": row.resident_set_change,
            });
        }
        for (_, key, p) in phases {
            value["tokens"][key] = json!({
                "median_seconds": p.median_seconds, "slowest_seconds": p.slowest_seconds, "median_of_rest": p.of_rest[0],
                "percentile_90_of_rest": p.of_rest[1], "percentile_99_of_rest": p.of_rest[2],
                "slowest_of_rest": p.of_rest[3],
            });
        }
        return print(&format!("{value:#}\n"));
    }
    let mut out = format!("{}; medians of {} rounds\n\n", machine(), args.rounds);
    out.push_str("                            bytes   seconds    GB/s  of read  process grew by\n");
    for (name, _, row, of_read) in measured {
        let change = row.resident_set_change.map_or("unknown".to_owned(), |c| {
            format!("{}{}", if c < 0 { "-" } else { "" }, size::show(c.unsigned_abs()))
        });
        let _ = writeln!(
            out,
            "{name:22}  {:>11}  {:8.4}  {:6.2}  {of_read:7.2}  {change:>15}",
            size::show(row.bytes),
            row.time.as_secs_f64(),
            row.bytes_per_second() / 1e9
        );
    }
    let rate = (most - least) as f64 / growing_seconds / 1e9;
    let _ = writeln!(out, "\ngrowing while tokens are decoded takes {growing_seconds:.2} s, {rate:.2} GB/s");
    out.push_str("\n                        milliseconds     times the median at rest of the same size\n");
    out.push_str("tokens               median   slowest     median    90 %    99 %  slowest\n");
    for (name, _, p) in phases {
        let (median, slowest) = (p.median_seconds * 1e3, p.slowest_seconds * 1e3);
        let [p50, p90, p99, p100] = p.of_rest;
        let _ = writeln!(out, "{name:17}  {median:8.1}  {slowest:8.1}   {p50:8.2}  {p90:6.2}  {p99:6.2}  {p100:7.2}");
    }
    print(&out)
}

/// `bitstack bench decode`
pub(crate) fn decode(args: &BenchDecode, reporter: &Reporter) -> Result<()> {
    let n_blocks = args.levels.iter().copied().max().unwrap_or(1);
    let (path, _scratch) = model_file(args.file.as_deref(), args.shape, n_blocks.into(), reporter)?;
    let stack = Stack::open(&path, reporter)?;
    let bits = stack.bits;
    let budgets: Vec<u64> = if args.memory.is_empty() {
        args.levels.iter().map(|&level| bytes_at_level(&stack.order, level.into())).collect()
    } else {
        args.memory.clone()
    };
    for &budget in &budgets {
        stack.plan(budget)?;
    }
    let smallest = budgets.iter().copied().min().unwrap_or(u64::MAX);
    let model = ElasticModel::open(stack.file, smallest, Options::default(), reporter)?;
    let mut rows = Vec::new();
    reporter.stage("decode (sizes)", budgets.len() as u64);
    for budget in budgets {
        rows.push((decoding(&model, budget, args.tokens.into())?, process_peak_bytes()));
        reporter.advance(1);
    }
    reporter.finish();
    let threads = rayon::current_num_threads();
    if args.json {
        let values: Vec<_> = rows
            .iter()
            .map(|(d, peak)| {
                json!({
                    "machine": machine(), "threads": threads, "resident_bytes": d.resident_bytes,
                    "bits_per_weight": bits.per_weight(d.resident_bytes), "seconds_per_token": d.median_seconds(),
                    "slowest_token_seconds": d.slowest_seconds(),
                    "bytes_per_second": d.bytes_per_second(), "read_bytes_per_second": d.read_bytes_per_second,
                    "ratio": d.ratio(), "cache_bytes": d.cache_bytes, "peak_process_bytes": peak,
                })
            })
            .collect();
        return print(&format!("{:#}\n", serde_json::Value::Array(values)));
    }
    let mut out = format!("{threads} threads; {}; medians over {} tokens\n\n", machine(), args.tokens - 1);
    let _ = writeln!(out, " resident  bits/weight  tokens/s  decode, GB/s  plain read, GB/s  ratio  peak of process");
    for (d, peak) in &rows {
        let _ = writeln!(
            out,
            "{:>9}  {:11.2}  {:8.2}  {:12.1}  {:16.1}  {:5.2}  {:>15}",
            size::show(d.resident_bytes),
            bits.per_weight(d.resident_bytes),
            1.0 / d.median_seconds(),
            d.bytes_per_second() / 1e9,
            d.read_bytes_per_second / 1e9,
            d.ratio(),
            peak.map_or("unknown".to_owned(), size::show)
        );
    }
    print(&out)
}
