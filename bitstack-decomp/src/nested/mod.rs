//! Nested codes: what they are and why is in the crate's documentation. Here: the input, the normalisation, and the blocks; the work on
//! the rows is in [`tile`].

mod choose;
mod lanes;
mod linear;
mod metric;
mod scalar;
mod signed;
mod tile;

use crate::envelope;
use crate::options::par;
use crate::report::measured;
use crate::spikes::{self, Entry, List, Reach};
use crate::{DecompError, DecomposeOptions, LevelReport, Nested, OutputReport, Step, Threads};
use bitstack_core::{Basis, Block, Coefficients, FactorType, Shape, SignMatrix, Values, ValuesRef, WeightStack};
use bitstack_pack::{packed_len, row_bytes};
use half::f16;
use lanes::{LANES, SUBS, TILE};
use metric::{Metric, Regularisation};
use ndarray::ArrayView2;
use rayon::prelude::*;
use tile::{RowError, Stage, Tile};

/// Rounds of Lloyd's iteration on the level values before any row is seen. More take the ratio of the planes to the 1/2 that is best for
/// a weight without neighbours, and worse under H.
const LLOYD_ROUNDS: usize = 1;
/// The first magnitude of a plane after the joint ones, in mean magnitudes of the residual: more than 1, for the sake of its tails.
const GAIN: f64 = 1.15;

/// All steps of a weight.
pub(crate) fn steps(
    weight: ArrayView2<'_, f32>,
    options: &DecomposeOptions<'_>,
    nested: &Nested,
) -> Result<Vec<Step>, DecompError> {
    let (rows, cols) = weight.dim();
    let shape = Shape::new(rows, cols)?;
    packed_len(rows, cols)?;
    check(weight, options, nested)?;
    let ones;
    let s = match options.scales {
        Some(scales) => scales.as_slice(),
        None => {
            ones = vec![1.0f32; cols];
            &ones
        }
    };

    let envelope = envelope::balance(weight, s, options.spikes.is_some());
    let (a_max, v_max) = (largest(&envelope.rows), largest(&envelope.cols));
    // No plane is larger than all of them together, with room for what is learned.
    let reach = nested.range / (1.0 - nested.ratio);
    for (vector, magnitude) in [(0, a_max * 2.0 * reach.max(2.0)), (1, v_max)] {
        if f16::from_f64(magnitude).is_infinite() {
            return Err(DecompError::FactorOverflow { block: 1, vector, magnitude });
        }
    }
    let basis = Basis::new(1, cols, store(&envelope.cols, nested.factors))?;
    let v = stored(basis.view().values());
    let mut normal = is_normal(basis.view().values(), &envelope.cols);
    let inverse = envelope::inverse(&v);

    // Columns that matter most come first: their errors can still be made up for by those that follow.
    let mut order: Vec<usize> = (0..cols).collect();
    if let Some(gram) = options.gram {
        order.sort_by(|&i, &j| (gram[[j, j]] * v[j] * v[j]).total_cmp(&(gram[[i, i]] * v[i] * v[i])));
    }
    // Errors per column, for the error of W·diag(s), and for everything when there is no H.
    let weights: Vec<f64> = v.iter().zip(s).map(|(v, s)| (v * f64::from(*s)).powi(2)).collect();
    let columns = Metric::diagonal(&weights, &order);
    let full = options.gram.map(|gram| {
        let regularise = Regularisation { diagonal: nested.diagonal, floor: nested.floor, damping: nested.damping };
        Metric::full(gram, &v, &order, regularise)
    });
    let metric = full.as_ref().unwrap_or(&columns);

    // Spikes are found once; their sizes are rounded again in the units of what is stored.
    let places = options.spikes.map(|error| {
        let reach = Reach { clear: 0.9 * reach, rest: 0.75 * reach, error };
        let mut column_weights = vec![0.0; cols];
        order.iter().zip(&metric.pivots).for_each(|(&c, d)| column_weights[c] = *d);
        let envelope = spikes::Envelope { rows: &envelope.rows, inverse_cols: &inverse };
        (reach, spikes::find(weight, envelope, &column_weights, reach))
    });
    let list = |rows: &[f64], unit: f64| {
        let envelope = spikes::Envelope { rows, inverse_cols: &inverse };
        let normal = |r, c| envelope.normal(weight, r, c);
        places.as_ref().map(|(reach, places)| List::new(weight.nrows(), places, normal, reach.rest, unit))
    };
    let first_list = list(&envelope.rows, 1.0);

    let q = nested.joint.min(options.n_blocks);
    let weights: Vec<f64> = (0..q).map(|b| nested.level_weight(b)).collect();
    let start: Vec<f64> = (0..q).map(|i| nested.range * nested.ratio.powi(i as i32)).collect();
    let sample = sample(weight, &envelope.rows, &inverse, reach);
    let levels = scalar::design(&sample, &weights, &start, LLOYD_ROUNDS);
    let mut plan = Plan {
        metric,
        columns: &columns,
        omega: weights.iter().zip(&levels.errors).map(|(w, e)| w / e).collect(),
        weights,
        pattern: levels.coefficients,
        sweeps: nested.sweeps,
        left: nested.left,
        rows: envelope.rows,
        spikes: first_list,
        position: vec![0; cols],
        order,
        inverse: &inverse,
    };
    plan.order.iter().enumerate().for_each(|(j, &c)| plan.position[c] = j);
    plan.learn(weight, options.n_blocks);
    let rows_before = plan.rows.clone();
    let coefficients = plan.store(nested.factors)?;
    normal &= is_normal(coefficients[0].view().values(), &rows_before);
    plan.spikes = list(&plan.rows, plan.pattern[0][0]);
    let starts: Vec<usize> = (0..rows).step_by(TILE).collect();
    let tiles: Vec<Done> = match options.threads {
        Threads::One => starts.iter().map(|&first| plan.tile(weight, first)).collect(),
        Threads::Pool => starts.par_iter().with_max_len(1).map(|&first| plan.tile(weight, first)).collect(),
    };

    let mut spikes = None;
    if let Some(mut list) = plan.spikes.take() {
        let more: Vec<_> = tiles.iter().flat_map(|tile| tile.spikes.iter().copied()).collect();
        list.extend(&more);
        spikes = list.stored(shape)?;
    }
    // Sums over tiles in their order, so that threads do not change them.
    let mut scaled_norm = 0.0f64;
    for row in weight.rows() {
        scaled_norm += row.iter().zip(s).map(|(w, s)| (f64::from(*w) * f64::from(*s)).powi(2)).sum::<f64>();
    }
    let output_norm = metric.unit * tiles.iter().map(|t| t.output_norm).sum::<f64>();
    let ratio = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
    let mut stack = WeightStack::new(shape);
    let mut errors = Vec::with_capacity(options.n_blocks);
    for (b, coefficients) in coefficients.into_iter().enumerate() {
        let mut signs = Vec::with_capacity(rows * row_bytes(cols));
        let mut error = RowError::default();
        for tile in &tiles {
            signs.extend_from_slice(&tile.signs[b]);
            error.scaled += tile.errors[b].scaled;
            error.output += tile.errors[b].output;
        }
        let squared = error.scaled * columns.unit;
        // H̃ is positive semidefinite; the rounding of its products is not.
        let output = (error.output * metric.unit).max(0.0);
        errors.push(LevelReport {
            squared_error: squared,
            relative_error: ratio(squared, scaled_norm).sqrt(),
            output: options
                .gram
                .map(|_| OutputReport { squared_error: output, relative_error: ratio(output, output_norm).sqrt() }),
        });
        stack.push(Block {
            signs: SignMatrix::from_bytes(rows, cols, signs)?,
            basis: (b == 0).then(|| basis.clone()),
            coefficients,
            spikes: spikes.take(),
        })?;
    }
    if !normal {
        // What vanishes is not seen in normalised columns, and what nearly vanishes is not what it is taken for.
        errors = measured(weight, s, options.gram, &stack, par(options.threads))?;
    }
    Ok(stack.into_blocks().into_iter().zip(errors).map(|(block, error)| Step { block, error }).collect())
}

/// What error feedback under H gains on a weight at best: the error of a code without it over the error of one with it, the same bits in
/// both. At least 1; see [the crate's documentation](crate#how-a-weight-is-used).
///
/// `weight` is `rows x cols`, `gram` its input Gram matrix H, `cols x cols`. With H̃ = diag(v) H diag(v), v the root mean squares of the
/// columns of the weight, and H̃ = U D Uᵀ: the mean of the diagonal of H̃ over the geometric mean of D (our own derivation: feedback
/// leaves independent errors in the coordinates Uᵀ, of size D each, and the diagonal is what they are without).
///
/// # Errors
/// As [`crate::blocks`]: values that are not finite, a Gram matrix of another size.
pub fn feedback_gain(weight: ArrayView2<'_, f32>, gram: ArrayView2<'_, f64>) -> Result<f64, DecompError> {
    let nested = Nested::default();
    let (rows, cols) = weight.dim();
    Shape::new(rows, cols)?;
    check(weight, &DecomposeOptions::nested(1, nested.clone()).gram(gram), &nested)?;
    let mut v = vec![0.0f64; cols];
    for row in weight.rows() {
        v.iter_mut().zip(row).for_each(|(v, w)| *v += f64::from(*w).powi(2));
    }
    v.iter_mut().for_each(|v| *v = v.sqrt());
    let order: Vec<usize> = (0..cols).collect();
    let metric = Metric::full(gram, &v, &order, Regularisation { diagonal: 0.0, floor: 0.0, damping: nested.damping });
    Ok(metric.full.map_or(1.0, |full| full.gain.max(1.0)))
}

fn check(weight: ArrayView2<'_, f32>, options: &DecomposeOptions<'_>, nested: &Nested) -> Result<(), DecompError> {
    let cols = weight.ncols();
    if options.rank != 1 {
        return Err(DecompError::NestedRank { rank: options.rank });
    }
    if options.n_blocks == 0 {
        return Err(DecompError::NoBlocks);
    }
    let setting = |setting, expected, value: f64, good: bool| {
        if good { Ok(()) } else { Err(DecompError::NestedSetting { setting, expected, value }) }
    };
    let joint = nested.joint as f64;
    setting("the number of joint planes", "from 1 to 8", joint, (1..=Nested::MAX_JOINT).contains(&nested.joint))?;
    setting("the range", "from 0.1 to 10", nested.range, (0.1..=10.0).contains(&nested.range))?;
    setting("the ratio", "from 0.1 to 0.9", nested.ratio, (0.1..=0.9).contains(&nested.ratio))?;
    for &w in &nested.level_weights {
        setting("the weight of a level", "from 1e-6 to 1e6", w, (1e-6..=1e6).contains(&w))?;
    }
    for share in [nested.diagonal, nested.floor, nested.damping] {
        setting("a share of the diagonal", "from 0 to 1e3", share, (0.0..=1e3).contains(&share))?;
    }
    for ((row, col), &value) in weight.indexed_iter() {
        if !value.is_finite() {
            return Err(DecompError::WeightNotFinite { row, col, value });
        }
    }
    if let Some(scales) = options.scales
        && scales.as_slice().len() != cols
    {
        return Err(DecompError::ScalesLength { len: scales.as_slice().len(), cols });
    }
    if let Some(gram) = options.gram {
        if gram.dim() != (cols, cols) {
            return Err(DecompError::GramShape { rows: gram.nrows(), cols: gram.ncols(), expected: cols });
        }
        for ((row, col), &value) in gram.indexed_iter() {
            if !value.is_finite() {
                return Err(DecompError::GramNotFinite { row, col, value });
            }
        }
    }
    Ok(())
}

/// What is the same for all tiles of a weight.
struct Plan<'a> {
    metric: &'a Metric,
    columns: &'a Metric,
    weights: Vec<f64>,
    omega: Vec<f64>,
    /// `pattern[level][plane]`: the magnitudes of the planes; before it is learned of the joint ones only.
    pattern: Vec<Vec<f64>>,
    sweeps: usize,
    /// The error for which spikes are taken that codes leave.
    left: f64,
    /// a of every row.
    rows: Vec<f64>,
    order: Vec<usize>,
    /// Which place in the order each column has.
    position: Vec<usize>,
    /// 1 / v, 0 where v is.
    inverse: &'a [f32],
    /// The weights that are not the planes' alone.
    spikes: Option<List>,
}

/// A finished tile, one entry per level, errors in normalised columns.
struct Done {
    signs: Vec<Vec<u8>>,
    errors: Vec<RowError>,
    output_norm: f64,
    /// Rows and entries of spikes that were found on the way.
    spikes: Vec<(usize, Entry)>,
}

impl<'a> Plan<'a> {
    /// A tile of some rows of the weight.
    fn rows(&self, weight: ArrayView2<'_, f32>, rows: impl IntoIterator<Item = usize>) -> Tile<'a> {
        let mut a = vec![0.0f64; TILE];
        let mut x = vec![[0.0f32; LANES]; weight.ncols() * SUBS];
        for (r, row) in rows.into_iter().enumerate() {
            a[r] = self.rows[row];
            let scale = if a[r] > 0.0 { 1.0 / a[r] } else { 0.0 };
            for (j, &c) in self.order.iter().enumerate() {
                x[j * SUBS + r / LANES][r % LANES] =
                    (f64::from(weight[[row, c]]) * scale * f64::from(self.inverse[c])) as f32;
            }
            for spike in self.spikes.iter().flat_map(|list| list.row(row)) {
                x[self.position[spike.col] * SUBS + r / LANES][r % LANES] -= spike.value;
            }
        }
        Tile::new(self.metric, x, a)
    }

    /// Fits the pattern to a sample of the rows, for all blocks.
    fn learn(&mut self, weight: ArrayView2<'_, f32>, n_blocks: usize) {
        let rows = weight.nrows();
        let n = TILE.min(rows);
        let mut tile = self.rows(weight, (0..n).map(|r| r * rows / n));
        self.joint(&mut tile, true);
        for _ in self.weights.len()..n_blocks {
            let mut pattern = tile.pattern[tile.pattern.len() - 1].clone();
            pattern.push(tile.residual() * GAIN);
            self.later(&mut tile, pattern, true);
        }
        self.pattern = tile.pattern;
    }

    /// The joint planes of a tile; the spikes that they leave, as row of the tile and entry.
    fn joint(&self, tile: &mut Tile<'_>, learn: bool) -> Vec<(usize, Entry)> {
        let (omega, weights, sweeps) = (&self.omega, &self.weights, self.sweeps);
        let q = weights.len();
        let stage = Stage { q, omega, weights, sweeps, learn };
        tile.stage(&stage, &self.pattern[..q]);
        let Some(list) = &self.spikes else { return Vec::new() };
        let mean = self.rows.iter().map(|a| a * a).sum::<f64>() / self.rows.len() as f64;
        let row_weights: Vec<f64> = tile.row_scale.iter().map(|a| a * a / mean).collect();
        let pivots = self.metric.pivots.iter().sum::<f64>() / self.metric.n as f64;
        let most = (spikes::MOST_LEFT * (TILE * self.metric.n) as f64) as usize;
        let price = spikes::price(self.left) * pivots;
        let found = tile.mend(&stage, &row_weights, price, most, |value| list.nearest(value));
        found.into_iter().map(|(row, j, size, value)| (row, Entry { col: self.order[j], size, value })).collect()
    }

    fn later(&self, tile: &mut Tile<'_>, pattern: Vec<f64>, learn: bool) {
        // A single plane has little to gain from more.
        let sweeps = self.sweeps.min(2);
        tile.stage(&Stage { q: 1, omega: &[1.0], weights: &[1.0], sweeps, learn }, &[pattern]);
    }

    /// The coefficients of all blocks as they are stored; rows and pattern become what the stored values say (but for the rounding of f16
    /// beyond the first plane).
    fn store(&mut self, factors: FactorType) -> Result<Vec<Coefficients>, DecompError> {
        // Of weights that are nothing, or nothing but rounding, anything may have been learned: the scales must stay within f16's range.
        let largest = self.pattern.iter().flatten().fold(0.0f64, |m, c| m.max(c.abs()));
        self.pattern[0][0] = self.pattern[0][0].max(largest / 256.0);
        let unit = if largest > 0.0 { self.pattern[0][0] } else { 1.0 };
        let rows = self.rows.len();
        let first: Vec<f64> = self.rows.iter().map(|a| a * unit).collect();
        let first = store(&first, factors);
        let mut out = Vec::with_capacity(self.pattern.len());
        if let Values::I8 { scales, .. } = &first {
            // One size per row, for all levels; each further level brings the magnitudes of its planes.
            self.rows = stored(first.view()).iter().map(|u| u / unit).collect();
            let code = scales[0].to_f64() / unit;
            out.push(Coefficients::new(rows, 1, 1, first)?);
            for (b, pattern) in self.pattern.iter_mut().enumerate().skip(1) {
                let scales: Vec<f16> = pattern.iter().map(|c| f16::from_f64(c * code)).collect();
                pattern.iter_mut().zip(&scales).for_each(|(c, scale)| *c = scale.to_f64() / code);
                out.push(Coefficients::new(rows, b + 1, 1, Values::Scales(scales))?);
            }
        } else {
            // Eight bits do not reach from the largest row to the smallest.
            self.rows = stored(first.view()).iter().map(|u| u / unit).collect();
            for (b, pattern) in self.pattern.iter().enumerate() {
                let values = self.rows.iter().flat_map(|a| pattern.iter().map(move |c| f16::from_f64(a * c)));
                out.push(Coefficients::new(rows, b + 1, 1, Values::F16(values.collect()))?);
            }
        }
        Ok(out)
    }

    fn tile(&self, weight: ArrayView2<'_, f32>, first: usize) -> Done {
        let (rows, cols) = weight.dim();
        let here = TILE.min(rows - first);
        let mut tile = self.rows(weight, first..first + here);
        let spikes = self.joint(&mut tile, false);
        let n_blocks = self.pattern.len();
        for pattern in &self.pattern[self.weights.len()..] {
            self.later(&mut tile, pattern.clone(), false);
        }
        let a = &self.rows[first..first + here];
        let mut signs = vec![vec![0u8; here * row_bytes(cols)]; n_blocks];
        for (i, bytes) in signs.iter_mut().enumerate() {
            for (row, bytes) in bytes.chunks_exact_mut(row_bytes(cols)).enumerate() {
                for (j, &c) in self.order.iter().enumerate() {
                    bytes[c / 8] |= u8::from(tile.positive(i, j, row)) << (c % 8);
                }
            }
        }
        let errors = tile.errors(&self.columns.diagonal);
        let sum = |rows: &Vec<RowError>| {
            let mut sum = RowError::default();
            for (error, a) in rows.iter().zip(a) {
                sum.scaled += error.scaled * a * a;
                sum.output += error.output * a * a;
            }
            sum
        };
        let mut norms = tile.norms();
        if let Some(list) = &self.spikes {
            for (r, norm) in norms[..here].iter_mut().enumerate() {
                let found = spikes.iter().filter(|spike| spike.0 == r).map(|spike| &spike.1);
                let spikes: Vec<_> =
                    list.row(first + r).iter().chain(found).map(|e| (self.position[e.col], e.value)).collect();
                *norm += tile.norm_of_spikes(r, &spikes);
            }
        }
        Done {
            spikes: spikes.into_iter().map(|(row, entry)| (first + row, entry)).collect(),
            signs,
            errors: errors.iter().map(sum).collect(),
            output_norm: norms.iter().zip(a).map(|(n, a)| n * a * a).sum(),
        }
    }
}

/// A vector of the envelope as it is stored. An error of ε in a value makes the steps of its row or column larger or smaller by ε, no
/// more: the codes are chosen for the stored values.
fn store(values: &[f64], factors: FactorType) -> Values {
    /// The smallest code of a value that is not zero: its rounding is at most 1/16 of it.
    const SMALLEST: f64 = 8.0;
    let max = largest(values);
    let min = values.iter().filter(|v| **v > 0.0).fold(max, |m, v| m.min(*v));
    let scale = f16::from_f64(max / 127.0);
    if factors == FactorType::I8 && scale.is_normal() && min * 127.0 >= SMALLEST * max {
        let codes = values.iter().map(|v| (v / scale.to_f64()).round().min(127.0) as i8).collect();
        Values::I8 { codes, scales: vec![scale] }
    } else {
        Values::F16(values.iter().map(|v| f16::from_f64(*v)).collect())
    }
}

/// The values of a stored vector.
fn stored(values: ValuesRef<'_>) -> Vec<f64> {
    match values {
        ValuesRef::F16(values) => values.iter().map(|v| v.to_f64()).collect(),
        ValuesRef::I8 { codes, scales } => codes.iter().map(|c| f64::from(*c) * scales[0].to_f64()).collect(),
        ValuesRef::Scales(_) => unreachable!("vectors of the envelope have values"),
    }
}

/// Whether all values of a stored vector that are not zero by right kept the digits of their type.
fn is_normal(stored: ValuesRef<'_>, values: &[f64]) -> bool {
    match stored {
        ValuesRef::F16(stored) => stored.iter().zip(values).all(|(f, x)| *x == 0.0 || f.is_normal()),
        ValuesRef::I8 { .. } | ValuesRef::Scales(_) => true,
    }
}

/// Normalised weights, evenly spread over the matrix, none beyond `most`.
fn sample(weight: ArrayView2<'_, f32>, a: &[f64], inverse: &[f32], most: f64) -> Vec<f32> {
    const SIZE: usize = 2048;
    let (rows, cols) = weight.dim();
    let n = SIZE.min(rows * cols);
    (0..n)
        .map(|k| {
            // Rows evenly spaced, columns by a stride that no ordinary width is a multiple of.
            let (r, c) = ((k as u128 * rows as u128 / n as u128) as usize, k.wrapping_mul(7919) % cols);
            let x = if a[r] > 0.0 { f64::from(weight[[r, c]]) / a[r] * f64::from(inverse[c]) } else { 0.0 };
            x.clamp(-most, most) as f32
        })
        .collect()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |m, v| m.max(*v))
}
