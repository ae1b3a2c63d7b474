//! `bitstack bench`: speed on this machine, as ratios within one run.

use super::args::{BenchDecode, BenchDecompose, BenchKernels, BenchLoad, Device, ModelShape};
use super::compress::peak_memory;
use super::open::Stack;
use super::progress::Reporter;
use super::{print, size, usage};
use anyhow::{Context, Result};
use bitstack_cpu::measure::{Case, Pool};
use bitstack_cpu::{Isa, Kernel, Threads};
use bitstack_decomp::{DecomposeOptions, Nested, Svd, blocks, decompose as decompose_weight, feedback_gain};
use bitstack_engine::{ElasticModel, measure, synthetic};
use bitstack_format::Existing;
use bitstack_model::Progress;
use bitstack_runtime::measure::Operation;
use bitstack_runtime::{Options, Verify};
use ndarray::{Array2, Axis};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A chain of blocks: seconds per block, and the error after each.
struct Chain {
    seconds: f64,
    errors: Vec<f64>,
}

/// `bitstack bench decompose`
pub(crate) fn decompose(args: &BenchDecompose, reporter: &Reporter) -> Result<()> {
    if let Some(shape) = args.shape {
        return whole_model(args, shape, reporter);
    }
    let (n, rank, n_blocks) = (args.size as usize, usize::from(args.rank), usize::from(args.blocks));
    let weight = test_matrix(n, n);
    reporter.stage("decompose (blocks)", 2 * n_blocks as u64);
    let run = |svd| -> Result<Chain> {
        let mut chain = Chain { seconds: 0.0, errors: Vec::new() };
        let options = DecomposeOptions::new(rank, n_blocks).svd(svd);
        let mut steps = blocks(weight.view(), &options)?;
        loop {
            let start = Instant::now();
            let Some(step) = steps.next() else { break };
            chain.seconds += start.elapsed().as_secs_f64();
            chain.errors.push(step?.error.relative_error);
            reporter.advance(1);
        }
        chain.seconds /= chain.errors.len() as f64;
        Ok(chain)
    };
    let (fast, exact) = (run(Svd::Fast)?, run(Svd::Exact)?);
    reporter.stage("nested codes (weights)", 1);
    let nested = nested_per_second(&weight, n_blocks)?;
    reporter.advance(1);
    reporter.finish();
    let ratio = exact.seconds / fast.seconds;
    let per_second = (n * n) as f64 / fast.seconds;
    if args.json {
        let value = json!({
            "machine": machine(), "rows": n, "cols": n, "rank": rank, "threads": 1,
            "exact_seconds_per_block": exact.seconds, "fast_seconds_per_block": fast.seconds, "ratio": ratio,
            "fast_weights_per_second": per_second, "nested_weights_per_second": nested, "exact_errors": exact.errors, "fast_errors": fast.errors,
        });
        return print(&format!("{value:#}\n"));
    }
    let mut out = format!("{n} x {n}, rank {rank}, one thread; {}\n\n", machine());
    let _ = writeln!(out, "method            s/block      ratio");
    let _ = writeln!(out, "full SVD      {:11.4} {:10.1}", exact.seconds, 1.0);
    let _ = writeln!(out, "block Krylov  {:11.4} {ratio:10.1}", fast.seconds);
    let _ = writeln!(out, "\nnested codes, {n_blocks} blocks, with H: {:.2} million weights per second", nested / 1e6);
    let _ = writeln!(out, "\nblocks   error, full SVD   error, block Krylov   excess");
    for (b, (e, f)) in exact.errors.iter().zip(&fast.errors).enumerate() {
        let excess = if *e > 0.0 { (f / e - 1.0) * 100.0 } else { 0.0 };
        let _ = writeln!(out, "{:6}   {e:15.6}   {f:19.6}   {excess:5.2} %", b + 1);
    }
    print(&out)
}

/// Weights per second and thread of nested codes.
fn nested_per_second(weight: &Array2<f32>, n_blocks: usize) -> Result<f64> {
    let gram = test_gram(weight.ncols());
    let options = DecomposeOptions::nested(n_blocks, Nested::default()).gram(gram.view());
    let start = Instant::now();
    decompose_weight(weight.view(), &options)?;
    Ok(weight.len() as f64 / start.elapsed().as_secs_f64())
}

/// A Gram matrix of neighbours that resemble each other: 0.9^|i − j|.
fn test_gram(cols: usize) -> Array2<f64> {
    let powers: Vec<f64> = (0..cols).map(|i| 0.9f64.powi(i as i32)).collect();
    Array2::from_shape_fn((cols, cols), |(i, j)| powers[i.abs_diff(j)])
}

/// What the weights of one input width take in a model.
struct Width {
    cols: usize,
    /// Weights of that width.
    matrices: usize,
    rows: usize,
    /// Once for each weight: factors of H, and the pattern.
    seconds_per_matrix: f64,
    weights_per_second: f64,
}

impl Width {
    /// From two decompositions, of some rows and of four times as many.
    fn measure(cols: usize, matrices: usize, rows: usize, reporter: &Reporter) -> Result<Self> {
        const ROWS: usize = 256;
        let gram = test_gram(cols);
        let options = DecomposeOptions::nested(8, Nested::default()).gram(gram.view());
        let weight = test_matrix(4 * ROWS, cols);
        let start = Instant::now();
        feedback_gain(weight.view(), gram.view())?;
        let gain = start.elapsed().as_secs_f64();
        reporter.advance(1);
        let mut seconds = [0.0; 2];
        for (seconds, rows) in seconds.iter_mut().zip([ROWS, 4 * ROWS]) {
            let start = Instant::now();
            decompose_weight(weight.view().split_at(Axis(0), rows).0, &options)?;
            *seconds = start.elapsed().as_secs_f64();
            reporter.advance(1);
        }
        let more = (seconds[1] - seconds[0]).max(f64::MIN_POSITIVE);
        Ok(Self {
            cols,
            matrices,
            rows,
            seconds_per_matrix: gain + (seconds[0] - more / 3.0).max(0.0),
            weights_per_second: (3 * ROWS * cols) as f64 / more,
        })
    }

    fn seconds(&self) -> f64 {
        self.matrices as f64 * self.seconds_per_matrix + (self.rows * self.cols) as f64 / self.weights_per_second
    }
}

/// Time for the layers and the head of a model, from measured rates.
fn whole_model(args: &BenchDecompose, shape: ModelShape, reporter: &Reporter) -> Result<()> {
    let shape = shape.of();
    let kv_rows = shape.hidden_size / shape.n_heads * shape.n_kv_heads;
    let rows = 2 * shape.hidden_size + 2 * kv_rows + 2 * shape.intermediate_size;
    reporter.stage("nested codes (parts)", 6);
    let widths = [
        Width::measure(shape.hidden_size, 6 * shape.n_layers + 1, rows * shape.n_layers + shape.vocab_size, reporter)?,
        Width::measure(shape.intermediate_size, shape.n_layers, shape.hidden_size * shape.n_layers, reporter)?,
    ];
    reporter.finish();
    let threads = rayon::current_num_threads();
    let minutes = widths.iter().map(Width::seconds).sum::<f64>() / 60.0;
    if args.json {
        let widths = widths.each_ref().map(|w| {
            json!({
                "cols": w.cols, "matrices": w.matrices, "weights": w.rows * w.cols, "seconds_per_matrix": w.seconds_per_matrix,
                "weights_per_second": w.weights_per_second, "thread_minutes": w.seconds() / 60.0,
            })
        });
        let value = json!({ "machine": machine(), "widths": widths, "thread_minutes": minutes, "threads": threads });
        return print(&format!("{value:#}\n"));
    }
    let mut out = format!("nested codes with H, 8 blocks, one thread; {}\n\n", machine());
    let _ = writeln!(out, "columns   matrices   s/matrix   million weights/s   weights    minutes");
    for w in &widths {
        let _ = writeln!(
            out,
            "{:7} {:10} {:10.1} {:19.2} {:9.2e} {:10.0}",
            w.cols,
            w.matrices,
            w.seconds_per_matrix,
            w.weights_per_second / 1e6,
            (w.rows * w.cols) as f64,
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
    let best = Isa::detect();
    let case = Case {
        rows: rows as usize,
        cols: cols as usize,
        level: 1,
        rank: 1,
        spikes: 0,
        tokens: 1,
        isa: best,
        threads: Threads::One,
    };
    let mut cases = Vec::new();
    for threads in [Threads::One, Threads::Pool] {
        cases.extend([1, 2, 4, 8].map(|level| Case { level, threads, ..case }));
        cases.push(Case { level: 4, spikes: 4, threads, ..case });
    }
    cases.extend(Isa::available().filter(|isa| *isa != best).map(|isa| Case { level: 4, isa, ..case }));
    cases.extend([1, 4].map(|level| Case { level, rank: 16, ..case }));
    for threads in [Threads::One, Threads::Pool] {
        cases.extend([4, 16, 64, 256].map(|tokens| Case { level: 4, tokens, threads, ..case }));
    }
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
    let threads = |t: Threads| if t == Threads::One { 1 } else { rayon::current_num_threads() };
    if args.json {
        let values: Vec<_> = measured
            .iter()
            .map(|m| {
                json!({
                    "machine": machine(), "rows": m.case.rows, "cols": m.case.cols, "level": m.case.level,
                    "rank": m.case.rank, "spikes_per_thousand": m.case.spikes, "tokens": m.case.tokens,
                    "isa": m.case.isa.to_string(), "threads": threads(m.case.threads), "seconds": m.seconds,
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
            threads(m.case.threads),
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
    use bitstack_cuda::measure::{Cases, run};
    let mut cases = Cases::default();
    if args.rows.is_some() || args.cols.is_some() {
        cases.shapes = vec![(args.rows.unwrap_or(4096) as usize, args.cols.unwrap_or(4096) as usize)];
    }
    let n_cases = cases.shapes.len() * cases.levels.len() * cases.ranks.len() * cases.batches.len();
    reporter.stage("measure (products)", n_cases as u64);
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

/// What tokens took while a model rested or changed.
struct Phase {
    /// Median and slowest.
    seconds: (f64, f64),
    /// The same over what each would have taken at rest at its size: median, 90 and 99 in 100, slowest.
    of_rest: [f64; 4],
}

impl Phase {
    fn new(all: &measure::Resizing, tokens: &[measure::Token]) -> Self {
        let at = |sorted: &[f64], share: f64| {
            let last = sorted.len().saturating_sub(1);
            sorted.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
        };
        let mut seconds: Vec<f64> = tokens.iter().map(|t| t.seconds).collect();
        seconds.sort_unstable_by(f64::total_cmp);
        let of_rest = all.of_rest(tokens);
        Self {
            seconds: (at(&seconds, 0.5), at(&seconds, 1.0)),
            of_rest: [0.5, 0.9, 0.99, 1.0].map(|share| at(&of_rest, share)),
        }
    }
}

/// `bitstack bench load`
pub(crate) fn load(args: &BenchLoad, reporter: &Reporter) -> Result<()> {
    /// Times that the model grows and shrinks while it decodes.
    const ROUNDS: usize = 3;
    /// Until the host of a virtual machine has taken back what was freed.
    const PAUSE: Duration = Duration::from_secs(5);
    let (path, _scratch) = model_file(args.file.as_deref(), args.shape, args.blocks.into(), reporter)?;
    // As the model that follows has it.
    let layout = Kernel::detect().layout();
    reporter.stage("load (rounds)", args.rounds.into());
    let mut rows = Vec::new();
    for _ in 0..args.rounds {
        rows.extend(bitstack_runtime::measure::load(&path, layout, 1)?);
        reporter.advance(1);
    }
    let median = |operation: Operation| -> Option<(u64, f64, Option<i64>)> {
        let mut rows: Vec<_> = rows.iter().filter(|r| r.operation == operation).collect();
        rows.sort_by_key(|r| r.time);
        rows.get(rows.len() / 2).map(|r| (r.bytes, r.time.as_secs_f64(), r.resident_set_change))
    };
    let operations = [
        ("plain read of the file", "read", Operation::Read),
        ("growing", "grow", Operation::Grow(Verify::Never)),
        ("growing, with hashes", "grow_verified", Operation::Grow(Verify::Always)),
        ("shrinking", "shrink", Operation::Shrink),
    ];
    let yardstick = median(Operation::Read).map_or(f64::NAN, |(bytes, seconds, _)| bytes as f64 / seconds);

    // What tokens take meanwhile.
    let stack = Stack::open(&path, reporter)?;
    let (least, most) = (stack.order.minimum_bytes(), stack.order.total_bytes());
    let model = ElasticModel::open(stack.file, least, Options::default(), reporter)?;
    reporter.finish();
    let tokens = measure::resizing(&model, least, most, 64, ROUNDS, PAUSE)?;
    let growing_seconds = tokens.growing.iter().map(|t| t.seconds).sum::<f64>() / ROUNDS as f64;
    let phases = [
        ("at rest, smallest", "rest_smallest", &tokens.small),
        ("growing", "growing", &tokens.growing),
        ("at rest, largest", "rest_largest", &tokens.large),
        ("shrinking", "shrinking", &tokens.shrinking),
        ("after that", "shrunk", &tokens.shrunk),
    ]
    .map(|(name, key, phase)| (name, key, Phase::new(&tokens, phase)));

    if args.json {
        let mut value = json!({
            "machine": machine(), "threads": rayon::current_num_threads(), "rounds": args.rounds,
            "growing_seconds_while_decoding": growing_seconds,
        });
        for (_, key, operation) in operations {
            if let Some((bytes, seconds, change)) = median(operation) {
                value[key] = json!({
                    "bytes": bytes, "seconds": seconds, "of_plain_read": bytes as f64 / seconds / yardstick,
                    "resident_set_change": change,
                });
            }
        }
        for (_, key, p) in phases {
            value["tokens"][key] = json!({
                "median_seconds": p.seconds.0, "slowest_seconds": p.seconds.1, "median_of_rest": p.of_rest[0],
                "percentile_90_of_rest": p.of_rest[1], "percentile_99_of_rest": p.of_rest[2],
                "slowest_of_rest": p.of_rest[3],
            });
        }
        return print(&format!("{value:#}\n"));
    }
    let mut out = format!("{}; medians of {} rounds\n\n", machine(), args.rounds);
    out.push_str("                            bytes   seconds    GB/s  of read  process grew by\n");
    for (name, _, operation) in operations {
        let Some((bytes, seconds, change)) = median(operation) else { continue };
        let change = change.map_or("unknown".to_owned(), |c| {
            format!("{}{}", if c < 0 { "-" } else { "" }, size::show(c.unsigned_abs()))
        });
        let rate = bytes as f64 / seconds;
        let _ = writeln!(
            out,
            "{name:22}  {:>11}  {seconds:8.4}  {:6.2}  {:7.2}  {change:>15}",
            size::show(bytes),
            rate / 1e9,
            rate / yardstick
        );
    }
    let rate = (most - least) as f64 / growing_seconds / 1e9;
    let _ = writeln!(out, "\ngrowing while tokens are decoded takes {growing_seconds:.2} s, {rate:.2} GB/s");
    out.push_str("\n                        milliseconds     times the median at rest of the same size\n");
    out.push_str("tokens               median   slowest     median    90 %    99 %  slowest\n");
    for (name, _, p) in phases {
        let ((median, slowest), [p50, p90, p99, p100]) = (p.seconds, p.of_rest);
        let (median, slowest) = (median * 1e3, slowest * 1e3);
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
        let bytes = stack.order.cumulative_bytes();
        let n_weights = stack.order.n_weights();
        let at_level = |level: &u8| bytes[(n_weights * usize::from(*level)).min(bytes.len() - 1)];
        args.levels.iter().map(at_level).collect()
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
        model.elastic().set_budget(budget)?;
        model.elastic().wait()?;
        rows.push((measure::decoding(&model, args.tokens.into())?, peak_memory()));
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
                    "slowest_token_seconds": d.token_seconds.iter().copied().fold(0.0, f64::max),
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

/// Gaussian entries, columns of log-normal size: the spread of a trained weight times its activation scales.
fn test_matrix(rows: usize, cols: usize) -> Array2<f32> {
    let mut rng = StdRng::seed_from_u64(1);
    // Box and Muller's transform of two uniform numbers.
    let mut gauss = move || {
        let (a, b): (f64, f64) = (rng.random(), rng.random());
        ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    };
    let columns: Vec<f32> = (0..cols).map(|_| gauss().exp()).collect();
    Array2::from_shape_fn((rows, cols), |(_, c)| gauss() * columns[c])
}

/// The processor's name, as the system gives it.
pub(crate) fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!("{}, {threads} hardware threads", cpu.unwrap_or_else(|| std::env::consts::ARCH.to_owned()))
}
