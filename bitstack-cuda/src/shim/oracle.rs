//! Weights and inputs at random, and what kernels may make of them: the reference in f64, and how far from it.

use super::device::{Kind, Numbers};
use bitstack_core::{
    Basis, Block, Coefficients, Level, SPIKE_SIZES, Shape, SignMatrix, Spike, Spikes, Values, WeightStack, f16,
};
use rand::{RngExt, rngs::StdRng};

pub(super) fn gauss(rng: &mut StdRng) -> f32 {
    let (a, b): (f64, f64) = (rng.random(), rng.random());
    ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
}

/// What blocks are like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kinds {
    pub(super) own_bases: bool,
    pub(super) refitted: bool,
    pub(super) eight_bit: bool,
    /// How many.
    pub(super) spikes: usize,
}

pub(super) const SHARED: Kinds = Kinds { own_bases: false, refitted: true, eight_bit: false, spikes: 0 };
pub(super) const ADDITIVE: Kinds = Kinds { own_bases: true, refitted: false, eight_bit: false, spikes: 0 };

/// At random places, every fourth once more at the place before; sizes from 1 to 19.
fn spikes(rng: &mut StdRng, shape: Shape, n: usize) -> Spikes {
    let mut entries: Vec<Spike> = Vec::new();
    while entries.len() < n {
        let size = rng.random_range(1..=SPIKE_SIZES as i8) * if rng.random() { 1 } else { -1 };
        let (row, col) = match entries.last() {
            Some(last) if entries.len() % 4 == 3 => (last.row, last.col),
            _ => (rng.random_range(0..shape.rows()), rng.random_range(0..shape.cols())),
        };
        entries.push(Spike { row, col, size });
    }
    let sizes = std::array::from_fn(|i| f16::from_f32(1.235f32.powi(i as i32)));
    Spikes::encode(shape, sizes, &entries).unwrap()
}

pub(super) fn stack(
    rng: &mut StdRng,
    (rows, cols): (usize, usize),
    rank: usize,
    planes: usize,
    kinds: Kinds,
) -> WeightStack {
    let mut stack = WeightStack::new(Shape::new(rows, cols).unwrap());
    for i in 1..=planes {
        let mut values = |n: usize, vectors: usize, size: f32| {
            if kinds.eight_bit {
                let codes = (0..n).map(|_| (gauss(rng) * 40.0) as i8).collect();
                Values::I8 { codes, scales: (0..vectors).map(|v| f16::from_f32(size / (40 + v) as f32)).collect() }
            } else {
                Values::F16((0..n).map(|_| f16::from_f32(gauss(rng) * size)).collect())
            }
        };
        let basis =
            (i == 1 || kinds.own_bases).then(|| Basis::new(rank, cols, values(rank * cols, rank, 1.0)).unwrap());
        let count = if kinds.refitted { i } else { 1 };
        let u = match values(rows * count * rank, count * rank, 0.5f32.powi(i as i32)) {
            // Some blocks bring no codes of their own.
            Values::I8 { scales, .. } if i % 3 == 2 => Values::Scales(scales),
            u => u,
        };
        let signs: Vec<f32> = (0..rows * cols).map(|_| gauss(rng)).collect();
        let signs = SignMatrix::from_f32(rows, cols, &signs).unwrap();
        let coefficients = Coefficients::new(rows, count, rank, u).unwrap();
        let spikes = (i == 1 && kinds.spikes > 0).then(|| spikes(rng, stack.shape(), kinds.spikes));
        stack.push(Block { signs, basis, coefficients, spikes }).unwrap();
    }
    stack
}

/// What the spikes add to a row of y.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SpikeSum {
    pub(super) exact: f64,
    /// Σ of the terms' absolute values.
    pub(super) size: f64,
    /// The most that f32 may be off by: a term is a product of five factors, some of them products themselves, and the sum has as many
    /// additions as terms, and one more to what y was.
    pub(super) bound: f64,
}

pub(super) fn spike_sums(level: &Level<'_>, x: &[f32]) -> Vec<SpikeSum> {
    let mut sums = vec![SpikeSum::default(); level.shape().rows()];
    let Some(spikes) = level.spikes() else { return sums };
    let mut terms = vec![0; sums.len()];
    for (r, c, value) in (0..spikes.list.n_tiles()).flat_map(|tile| spikes.list.entries(tile)) {
        let unit = f64::from(spikes.row_unit(r)) * f64::from(spikes.basis.get(0, c));
        let term = f64::from(value) * unit * f64::from(x[c]);
        sums[r].exact += term;
        sums[r].size += term.abs();
        terms[r] += 1;
    }
    for (sum, terms) in sums.iter_mut().zip(terms) {
        sum.bound = f64::from(terms + 8) * f64::from(f32::EPSILON) * sum.size;
    }
    sums
}

/// For each row, the most that y may be off by, spikes aside: every z is rounded to a multiple of the largest z of its 512 columns over 32512, or of
/// twice that, so is off by at most that largest over 32512; the rest is f32 arithmetic on terms that add up to Σ |U| |z| at most.
fn fused_bound(level: &Level<'_>, x: &[f32]) -> Vec<f64> {
    let mut bound = vec![0.0; level.shape().rows()];
    for p in level.planes() {
        for k in 0..p.basis.rank() {
            let z: Vec<f64> = x.iter().enumerate().map(|(c, &x)| f64::from(p.basis.get(k, c) * x).abs()).collect();
            let step: f64 =
                z.chunks(512).map(|z| z.iter().fold(0.0, |a: f64, &b| a.max(b)) / 32512.0 * z.len() as f64).sum();
            let sum: f64 = z.iter().sum();
            for (r, bound) in bound.iter_mut().enumerate() {
                *bound +=
                    f64::from(p.coefficients.get(r, p.plane, k).abs()) * (step + 16.0 * f64::from(f32::EPSILON) * sum);
            }
        }
    }
    bound
}

fn norm(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Checks y against the oracle, element by element; returns the error's norm over that of y.
pub(super) fn check_fused(stack: &WeightStack, x: &Numbers, tokens: usize, y: &[f32], kind: Kind, what: &str) -> f64 {
    let (rows, cols) = (stack.shape().rows(), stack.shape().cols());
    let level = stack.level(stack.top_level()).unwrap();
    let (mut errors, mut exact) = (Vec::new(), Vec::new());
    for token in 0..tokens {
        let x = &x.values[token * cols..][..cols];
        let (expected, bound, spikes) = (level.matvec(x).unwrap(), fused_bound(&level, x), spike_sums(&level, x));
        for r in 0..rows {
            let error = (f64::from(y[token * rows + r]) - expected[r]).abs();
            let bound = bound[r] + spikes[r].bound;
            // y is rounded with the spikes and, where there are any, before; halves have a smallest step of 2^-24.
            let before = if spikes[r].size > 0.0 { expected[r].abs() + spikes[r].size } else { 0.0 };
            let bound = bound + kind.rounding() * (expected[r].abs() + before + 2.0 * bound) + 2f64.powi(-24);
            assert!(
                error <= bound,
                "{what}: token {token}, row {r}: {} for {}, {error:e} > {bound:e}",
                y[token * rows + r],
                expected[r]
            );
            errors.push(error);
            exact.push(expected[r]);
        }
    }
    norm(errors) / norm(exact)
}

pub(super) fn inputs(rng: &mut StdRng, kind: Kind, n: usize) -> Numbers {
    Numbers::new(kind, &(0..n).map(|_| gauss(rng)).collect::<Vec<_>>())
}
