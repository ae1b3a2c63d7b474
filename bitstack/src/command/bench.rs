//! `bitstack bench`: speed on this machine, as ratios within one run.

use super::args::BenchDecompose;
use super::print;
use super::progress::Reporter;
use anyhow::Result;
use bitstack_decomp::{DecomposeOptions, Svd, blocks};
use bitstack_llm::Progress;
use ndarray::Array2;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use std::fmt::Write;
use std::time::Instant;

/// A chain of blocks: seconds per block, and the error after each.
struct Chain {
    seconds: f64,
    errors: Vec<f64>,
}

/// `bitstack bench decompose`
pub(crate) fn decompose(args: &BenchDecompose, reporter: &Reporter) -> Result<()> {
    let (n, rank, n_blocks) = (args.size as usize, usize::from(args.rank), usize::from(args.blocks));
    let weight = test_matrix(n);
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
    reporter.finish();
    let ratio = exact.seconds / fast.seconds;
    let per_second = (n * n) as f64 / fast.seconds;
    if args.json {
        let value = json!({
            "machine": machine(), "rows": n, "cols": n, "rank": rank, "threads": 1,
            "exact_seconds_per_block": exact.seconds, "fast_seconds_per_block": fast.seconds, "ratio": ratio,
            "fast_weights_per_second": per_second, "exact_errors": exact.errors, "fast_errors": fast.errors,
        });
        return print(&format!("{value:#}\n"));
    }
    let mut out = format!("{n} x {n}, rank {rank}, one thread; {}\n\n", machine());
    let _ = writeln!(out, "method            s/block      ratio");
    let _ = writeln!(out, "full SVD      {:11.4} {:10.1}", exact.seconds, 1.0);
    let _ = writeln!(out, "block Krylov  {:11.4} {ratio:10.1}", fast.seconds);
    let _ = writeln!(out, "\nblocks   error, full SVD   error, block Krylov   excess");
    for (b, (e, f)) in exact.errors.iter().zip(&fast.errors).enumerate() {
        let excess = if *e > 0.0 { (f / e - 1.0) * 100.0 } else { 0.0 };
        let _ = writeln!(out, "{:6}   {e:15.6}   {f:19.6}   {excess:5.2} %", b + 1);
    }
    print(&out)
}

/// Gaussian entries, columns of log-normal size: the spread of a trained weight times its activation scales.
fn test_matrix(n: usize) -> Array2<f32> {
    let mut rng = StdRng::seed_from_u64(1);
    // Box and Muller's transform of two uniform numbers.
    let mut gauss = move || {
        let (a, b): (f64, f64) = (rng.random(), rng.random());
        ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    };
    let columns: Vec<f32> = (0..n).map(|_| gauss().exp()).collect();
    Array2::from_shape_fn((n, n), |(_, c)| gauss() * columns[c])
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
