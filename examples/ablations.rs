//! The ablations of the paper (arXiv 2410.23918, section 5), on a model of yours.
//!
//! You will learn: what each part of the published method brings. All variants are held against the original model at equal memory:
//! with and without activation scaling; sign planes against a plain SVD of the same size; the three orders; ranks; sizes of the
//! calibration set.
//!
//! `cargo run --release -p bitstack-examples --example ablations -- MODEL_DIR --calibration FILE.txt --text FILE.txt -o DIR`
//! writes DIR/ablations.md and DIR/ablations.svg, anew after each group.

use bitstack_compress::{BlockMethod, CompressOptions, Compressed, OrderBy, Scaling, block_perplexities, compress};
use bitstack_core::{ActivationStats, Collect, Scales};
use bitstack_engine::device::Cpu;
use bitstack_engine::eval::{self, Metrics, WithReference};
use bitstack_engine::stack::StackModel;
use bitstack_engine::{Decoder, EngineError, Observer, Pass, Weight};
use bitstack_format::BlockSource;
use bitstack_model::text::Windows;
use bitstack_model::{Checkpoint, Dense, Elements, Tokenizer};
use bitstack_sort::{Balanced, Greedy, LoadOrder, Random, Scores, Sizes, Sorter};
use clap::Parser;
use half::f16;
use ndarray::{Array2, ArrayView2};
use plotters::prelude::*;
use rayon::prelude::*;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// Sizes, in bits per weight of the decoder's linear layers; everything else stays as it is, as in the paper.
const BITS: [f64; 5] = [1.25, 1.5, 2.0, 3.0, 4.0];
/// Those of the tables.
const TABLE: [f64; 4] = [1.5, 2.0, 3.0, 4.0];
/// The rank that all but the ablation of ranks use: for layers of 512 x 512 what 16 is for 4096 x 4096, an eighth of a bit.
const RANK: usize = 2;
const RANKS: [usize; 5] = [1, 2, 4, 8, 16];
const SAMPLES: [usize; 6] = [16, 32, 64, 128, 256, 512];
/// Calibration windows of all but the ablation of their number.
const DEFAULT_SAMPLES: usize = 128;
/// Tokens of a calibration window: short, so that there are 512 of them in a small text.
const CALIBRATION_TOKENS: usize = 256;
/// Windows on which orders are measured, and models at the end.
const ORDER_WINDOWS: usize = 16;
const TEST_WINDOWS: usize = 24;

#[derive(Parser)]
struct Args {
    /// A Hugging Face model directory.
    model: PathBuf,
    /// Plain text to calibrate and to order on.
    #[arg(long)]
    calibration: PathBuf,
    /// Plain text to measure on.
    #[arg(long)]
    text: PathBuf,
    /// Where to write the tables and the picture.
    #[arg(long, short)]
    output: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    std::fs::create_dir_all(&args.output)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokenizer = Tokenizer::from_bytes(&checkpoint.companion("tokenizer.json")?)?;
    let calibration = std::fs::read_to_string(&args.calibration)?;
    let limit = checkpoint.config().max_positions;
    let test_tokens = tokenizer.encode(&std::fs::read_to_string(&args.text)?)?;
    let test = Windows::new(&test_tokens, limit.min(512), limit)?.evenly_spaced(TEST_WINDOWS);
    let bench = Bench::new(checkpoint, calibration, test)?;

    let mut groups = vec![Group::new("Scaling, and sign planes against plain SVD"), Group::new("Ranks")];
    let base = bench.compress(RANK, Scaling::Gram, DEFAULT_SAMPLES)?;
    let baseline = bench.curve(&base, &bench.lockstep(&base)?)?;
    let unscaled = bench.compress(RANK, Scaling::None, DEFAULT_SAMPLES)?;
    groups[0].push("sign planes, scaled", baseline.clone());
    groups[0].push("sign planes, not scaled", bench.curve(&unscaled, &bench.lockstep(&unscaled)?)?);
    let reference = bench.compress(RANK, Scaling::Reference, DEFAULT_SAMPLES)?;
    groups[0].push("sign planes, scaled as published", bench.curve(&reference, &bench.lockstep(&reference)?)?);
    for (name, scaled) in [("plain SVD, scaled", true), ("plain SVD, not scaled", false)] {
        groups[0].push(name, bench.plain_svd(&base, scaled)?);
        bench.say(name);
    }

    save(&groups, &args.output)?;

    for rank in RANKS {
        let curve = match rank {
            RANK => baseline.clone(),
            _ => {
                let stack = bench.compress(rank, Scaling::Gram, DEFAULT_SAMPLES)?;
                bench.curve(&stack, &bench.lockstep(&stack)?)?
            }
        };
        groups[1].push(&format!("rank {rank}"), curve);
    }

    save(&groups, &args.output)?;

    let mut orders = Group::new("Orders");
    let validation_tokens = tokenizer.encode(&bench.calibration)?;
    let validation = Windows::new(&validation_tokens, limit.min(512), limit)?.halves().1.evenly_spaced(ORDER_WINDOWS);
    let sizes = Sizes::new(base.draft.base_bytes(), base.draft.block_sizes())?;
    let scores = Scores::new(block_perplexities(&base.draft, &validation, &())?);
    bench.say("perplexities with one block more");
    orders.push("average (level by level)", bench.curve(&base, &Balanced { scores: scores.clone() }.order(&sizes)?)?);
    orders.push("greedy", bench.curve(&base, &Greedy { scores }.order(&sizes)?)?);
    for seed in 0..2 {
        orders.push(&format!("random, seed {seed}"), bench.curve(&base, &Random { seed }.order(&sizes)?)?);
    }
    groups.push(orders);
    save(&groups, &args.output)?;

    let mut samples = Group::new("Calibration windows");
    for n in SAMPLES {
        let curve = match n {
            DEFAULT_SAMPLES => baseline.clone(),
            _ => {
                let stack = bench.compress(RANK, Scaling::Gram, n)?;
                bench.curve(&stack, &bench.lockstep(&stack)?)?
            }
        };
        samples.push(&format!("{n} windows of {CALIBRATION_TOKENS} tokens"), curve);
    }
    groups.push(samples);

    save(&groups, &args.output)?;
    // What no ablation may change: more memory is a better model.
    let (_, least) = baseline.first().ok_or("no size fits")?;
    let (_, most) = baseline.last().ok_or("no size fits")?;
    assert!(kl(most) < kl(least), "a stack of more blocks is nearer to its model");
    print!("{}", tables(&groups)?);
    Ok(())
}

/// A curve: bits per weight, and how good the model is there. Sizes below a variant's smallest are left out.
type Curve = Vec<(f64, Metrics)>;

struct Group {
    title: &'static str,
    curves: Vec<(String, Curve)>,
}

impl Group {
    fn new(title: &'static str) -> Self {
        Self { title, curves: Vec::new() }
    }

    fn push(&mut self, name: &str, curve: Curve) {
        self.curves.push((name.to_owned(), curve));
    }
}

fn kl(metrics: &Metrics) -> f64 {
    metrics.kl.map_or(f64::NAN, |kl| kl.mean)
}

/// What all variants share.
struct Bench<'a> {
    checkpoint: Checkpoint,
    calibration: String,
    test: Vec<&'a [u32]>,
    /// The original model's logits on the test windows.
    truth: Vec<Array2<f32>>,
    /// Weights in the decoder's linear layers.
    n_linear: f64,
    started: Instant,
}

impl<'a> Bench<'a> {
    fn new(checkpoint: Checkpoint, calibration: String, test: Vec<&'a [u32]>) -> Result<Self> {
        let original = Decoder::load(&checkpoint)?;
        let truth = logits(&original, &test)?;
        let layers = checkpoint.config().weights().into_iter().filter(|w| w.layer.is_some());
        let n_linear = layers.map(|w| (w.rows * w.cols) as f64).sum();
        Ok(Self { checkpoint, calibration, test, truth, n_linear, started: Instant::now() })
    }

    fn say(&self, what: &str) {
        eprintln!("{:6.0} s  {what}", self.started.elapsed().as_secs_f64());
    }

    /// The published decomposition, with enough blocks for the largest size; embeddings and head are left alone.
    fn compress(&self, rank: usize, scaling: Scaling, samples: usize) -> Result<Compressed> {
        let options = CompressOptions {
            method: BlockMethod::Avd,
            rank: Some(rank),
            n_blocks: Some(if rank <= 4 { 5 } else { 3 }),
            scaling,
            ordering: OrderBy::Random,
            samples,
            seq_len: Some(CALIBRATION_TOKENS.min(self.checkpoint.config().max_positions)),
            keep_embeddings: true,
            ..Default::default()
        };
        let stack = compress(&self.checkpoint, Some(&self.calibration), &options, &std::env::temp_dir(), &())?;
        self.say(&format!("rank {rank}, scaling {scaling:?}, {samples} windows"));
        Ok(stack)
    }

    /// Level by level in the order of the model, for ablations that are not about the order.
    fn lockstep(&self, stack: &Compressed) -> Result<LoadOrder> {
        let blocks = stack.draft.block_sizes();
        let scores = Scores::new(blocks.iter().map(|b| vec![0.0; b.len()]));
        Ok(Balanced { scores }.order(&Sizes::new(stack.draft.base_bytes(), &blocks)?)?)
    }

    /// The levels at every size, where one fits.
    fn levels(&self, stack: &Compressed, order: &LoadOrder) -> Vec<(f64, Vec<u32>)> {
        let budget = |bits: f64| stack.draft.base_bytes() + (bits * self.n_linear / 8.0) as u64;
        BITS.into_iter().filter_map(|bits| Some((bits, order.plan(budget(bits)).ok()?.levels))).collect()
    }

    fn curve(&self, stack: &Compressed, order: &LoadOrder) -> Result<Curve> {
        let mut curve = Vec::new();
        for (bits, levels) in self.levels(stack, order) {
            let model = StackModel::open(&stack.draft, &levels, &())?;
            curve.push((bits, self.measure(model.decoder())?));
        }
        Ok(curve)
    }

    fn measure<L: Weight<Cpu>>(&self, model: &Decoder<L>) -> Result<Metrics> {
        let found = logits(model, &self.test)?;
        let scores = found
            .iter()
            .zip(&self.truth)
            .zip(&self.test)
            .map(|((found, truth), window)| eval::Tally::of(found.view(), Some(truth.view()), &window[1..]));
        Ok(Metrics::of(&scores.collect::<Result<Vec<_>, EngineError>>()?, WithReference::Yes)?)
    }

    /// A plain SVD of the same size at the same levels as a stack: blocks without signs, of rank k + rows·cols / (16 (rows + cols)), whose sum is
    /// the truncated SVD of the weight, in f16.
    fn plain_svd(&self, stack: &Compressed, scaled: bool) -> Result<Curve> {
        let specs = self.checkpoint.config().weights();
        let mut model = Decoder::load(&self.checkpoint)?;
        let stats = self.statistics(&model)?;
        let stacked: Vec<usize> = (0..specs.len()).filter(|&i| specs[i].layer.is_some()).collect();
        let factors = stacked
            .par_iter()
            .map(|&i| {
                let scales = match scaled {
                    true => Scales::rms(&stats[i])?,
                    false => Scales::none(specs[i].cols),
                };
                factors(self.checkpoint.matrix(&specs[i])?.view(), &scales)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut curve = Vec::new();
        for (bits, levels) in self.levels(stack, &self.lockstep(stack)?) {
            for (&i, (u, v)) in stacked.iter().zip(&factors) {
                let (rows, cols) = (specs[i].rows, specs[i].cols);
                let weight = stack.draft.weight_index(&specs[i].name).ok_or("every linear layer is stacked")?;
                let block_rank = RANK + rows * cols / (16 * (rows + cols));
                let rank = (block_rank * levels[weight] as usize).min(u.ncols());
                let (u, v) = (u.slice(ndarray::s![.., ..rank]), v.slice(ndarray::s![..rank, ..]));
                let values = u.dot(&v).into_raw_vec_and_offset().0;
                *model.weight_mut(i) =
                    Dense::new(rows, cols, Elements::F32(values)).ok_or("as many values as the shape")?;
            }
            curve.push((bits, self.measure(&model)?));
        }
        Ok(curve)
    }

    /// Statistics of the inputs of every weight, on the calibration windows.
    fn statistics(&self, model: &Decoder<Dense>) -> Result<Vec<ActivationStats>> {
        let tokenizer = Tokenizer::from_bytes(&self.checkpoint.companion("tokenizer.json")?)?;
        let tokens = tokenizer.encode(&self.calibration)?;
        let limit = self.checkpoint.config().max_positions;
        let windows = Windows::new(&tokens, CALIBRATION_TOKENS.min(limit), limit)?.halves().0;
        let new = |l: &Dense| ActivationStats::new(l.shape()[1], Collect::Diagonal);
        let mut seen = Seen(model.weights().iter().map(new).collect());
        for window in windows.evenly_spaced(DEFAULT_SAMPLES) {
            model.forward(window, &mut Pass::new().with_observer(&mut seen))?;
        }
        Ok(seen.0)
    }
}

/// Adds up the inputs that weights are shown.
struct Seen(Vec<ActivationStats>);

impl Observer for Seen {
    fn input(&mut self, weights: &[usize], x: ArrayView2<'_, f32>) {
        weights.iter().for_each(|&w| self.0[w].update(x).expect("activations are finite"));
    }
}

fn logits<L: Weight<Cpu>>(model: &Decoder<L>, windows: &[&[u32]]) -> Result<Vec<Array2<f32>>> {
    let run = |window: &&[u32]| model.forward(&window[..window.len() - 1], &mut Pass::new());
    Ok(windows.par_iter().with_max_len(1).map(run).collect::<Result<Vec<_>, EngineError>>()?)
}

/// All of the SVD of W·diag(s), singular values split as square roots, V divided by s: as f16 holds them.
fn factors(weight: ArrayView2<'_, f32>, scales: &Scales) -> Result<(Array2<f32>, Array2<f32>)> {
    let scaled = scales.apply(weight)?;
    let matrix = faer::Mat::from_fn(scaled.nrows(), scaled.ncols(), |r, c| scaled[[r, c]]);
    let svd = matrix.thin_svd().map_err(|e| format!("the SVD did not converge: {e:?}"))?;
    let root = |k: usize| svd.S()[k].sqrt();
    let half = |x: f32| f16::from_f32(x).to_f32();
    let rank = scaled.nrows().min(scaled.ncols());
    let u = Array2::from_shape_fn((scaled.nrows(), rank), |(r, k)| half(svd.U()[(r, k)] * root(k)));
    let v =
        Array2::from_shape_fn((rank, scaled.ncols()), |(k, c)| half(svd.V()[(c, k)] * root(k) / scales.as_slice()[c]));
    Ok((u, v))
}

/// Writes what has been measured so far.
fn save(groups: &[Group], dir: &Path) -> Result<()> {
    std::fs::write(dir.join("ablations.md"), tables(groups)?)?;
    draw(groups, &dir.join("ablations.svg"))
}

/// The groups as tables.
fn tables(groups: &[Group]) -> Result<String> {
    let mut text = String::new();
    for group in groups {
        writeln!(text, "**{}**\n\n| | {} |", group.title, TABLE.map(|bits| format!("{bits} bits")).join(" | "))?;
        writeln!(text, "| --- |{}", " --- |".repeat(TABLE.len()))?;
        for (name, curve) in &group.curves {
            write!(text, "| {name} |")?;
            for bits in TABLE {
                match curve.iter().find(|(b, _)| *b == bits) {
                    Some((_, m)) => write!(text, " {} ({}) |", digits(kl(m)), digits(m.perplexity))?,
                    None => write!(text, " |")?,
                }
            }
            writeln!(text)?;
        }
        writeln!(text)?;
    }
    Ok(text)
}

/// Three digits.
fn digits(x: f64) -> String {
    let decimals = (2 - x.abs().log10().floor() as i64).clamp(0, 6) as usize;
    format!("{x:.decimals$}")
}

/// The groups as curves of the divergence, a panel each.
fn draw(groups: &[Group], path: &Path) -> Result<()> {
    let root = SVGBackend::new(path, (980, 760)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, group) in root.split_evenly((2, 2)).iter().zip(groups) {
        if group.curves.is_empty() {
            continue;
        }
        let values: Vec<f64> = group.curves.iter().flat_map(|(_, c)| c).map(|(_, m)| kl(m)).collect();
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        let mut chart = ChartBuilder::on(area)
            .caption(group.title, ("sans-serif", 15))
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(56)
            .build_cartesian_2d(BITS[0] - 0.1..BITS[BITS.len() - 1] + 0.1, (low * 0.8..high * 1.25).log_scale())?;
        chart
            .configure_mesh()
            .x_desc("bits per weight of the linear layers")
            .y_desc("KL divergence, nats per token")
            .y_label_formatter(&|y| digits(*y))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .draw()?;
        for (i, (name, curve)) in group.curves.iter().enumerate() {
            let colour = Palette99::pick(i).to_rgba();
            let points = || curve.iter().map(|(bits, m)| (*bits, kl(m)));
            chart
                .draw_series(LineSeries::new(points(), colour.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 14, y)], colour.stroke_width(2)));
            chart.draw_series(points().map(|p| Circle::new(p, 2, colour.filled())))?;
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.2))
            .label_font(("sans-serif", 11))
            .draw()?;
    }
    Ok(root.present()?)
}
