//! Absolute-value decomposition, arXiv 2410.23918, section 3.1: the loop over blocks.

use crate::envelope::{self, balance};
use crate::options::par;
use crate::report::OutputMetric;
use crate::scaled::{exp2, ilog2, scaled, sum_of_squares};
use crate::spikes::{self, List, Reach};
use crate::svd::TruncatedSvd;
use crate::{DecompError, DecomposeOptions, LevelReport, OutputReport, Step, Threads};
use bitstack_core::{Basis, Block, Coefficients, Shape, SignMatrix, Spikes, Values};
use bitstack_pack::{pack_into, packed_len, row_bytes};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use half::f16;
use ndarray::ArrayView2;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// From so many of the envelope's magnitudes on, an error begins that no block mends soon.
const CLEAR: f64 = 2.5;

/// What is left of a spike to the blocks.
const REST: f64 = 2.0;

/// Checks the input and makes the state of the loop.
pub(crate) fn blocks(weight: ArrayView2<'_, f32>, options: &DecomposeOptions<'_>) -> Result<Blocks, DecompError> {
    let (rows, cols) = weight.dim();
    let shape = Shape::new(rows, cols)?;
    let rank = options.rank;
    if rank == 0 || rank > rows.min(cols) {
        return Err(DecompError::Rank { rank, rows, cols });
    }
    if options.n_blocks == 0 {
        return Err(DecompError::NoBlocks);
    }
    let scales = match options.scales {
        Some(scales) if scales.as_slice().len() != cols => {
            return Err(DecompError::ScalesLength { len: scales.as_slice().len(), cols });
        }
        Some(scales) => scales.as_slice().to_vec(),
        None => vec![1.0; cols],
    };
    let (mut magnitude, exponent) = scaled(weight, &scales)?;
    let signs = SignMatrix::from_f32(rows, cols, &magnitude)?;
    magnitude.iter_mut().for_each(|r| *r = r.abs());
    let squared = magnitude.chunks_exact(cols).map(sum_of_squares).sum();
    let par = par(options.threads);
    let mut metric = None;
    if let Some(gram) = options.gram {
        let inverse: Vec<f64> = scales.iter().map(|&s| 1.0 / f64::from(s)).collect();
        let mut m = OutputMetric::new(gram, &inverse)?;
        let base = m.squared(signs.view(), &magnitude, par);
        metric = Some((m, base));
    }
    let spikes = match options.spikes {
        Some(error) => cut(weight, &scales, error, &signs, &mut magnitude),
        None => BTreeMap::new(),
    };
    Ok(Blocks {
        shape,
        rank,
        done: 0,
        left: options.n_blocks,
        svd: TruncatedSvd::new(rows, cols, rank, options.svd, options.seed, par),
        threads: options.threads,
        scales,
        exponent,
        signs,
        magnitude,
        squared,
        base: squared,
        metric,
        spikes,
        u: vec![0.0; rows * rank],
        v: vec![0.0; rank * cols],
    })
}

/// Cuts weights that are worth a place in a list down to [`REST`] magnitudes, so that the factors of block 1 are those of the others. What they
/// were, by row and column, in the units of `magnitude`.
fn cut(
    weight: ArrayView2<'_, f32>,
    scales: &[f32],
    error: f64,
    signs: &SignMatrix,
    magnitude: &mut [f32],
) -> BTreeMap<(usize, usize), f32> {
    let envelope = balance(weight, scales, true);
    let inverse = envelope::inverse(&envelope.cols);
    let column_weights: Vec<f64> = envelope.cols.iter().zip(scales).map(|(v, s)| (v * f64::from(*s)).powi(2)).collect();
    let envelope = spikes::Envelope { rows: &envelope.rows, inverse_cols: &inverse };
    let reach = Reach { clear: CLEAR, rest: REST, error };
    let places = spikes::find(weight, envelope, &column_weights, reach);
    let take = |(row, col): (usize, usize)| {
        let magnitude = &mut magnitude[row * weight.ncols() + col];
        let value = signs.view().get(row, col) * *magnitude;
        *magnitude *= (REST / envelope.normal(weight, row, col).abs()) as f32;
        ((row, col), value)
    };
    places.into_iter().map(take).collect()
}

/// The loop over blocks.
pub(crate) struct Blocks {
    shape: Shape,
    rank: usize,
    done: usize,
    left: usize,
    svd: TruncatedSvd,
    threads: Threads,
    scales: Vec<f32>,
    /// |R| in the weight's units is `magnitude` · 2^exponent.
    exponent: i32,
    /// sign(R), `rows x cols`.
    signs: SignMatrix,
    /// |R|, `rows x cols`, row-major.
    magnitude: Vec<f32>,
    /// ‖R‖², and that of W·diag(s), both in the units of `magnitude`.
    squared: f64,
    base: f64,
    /// How to measure the outputs, and the measure of W.
    metric: Option<(OutputMetric, f64)>,
    /// What [`cut`] took away. Until block 1 is made: the list is in units of its envelope.
    spikes: BTreeMap<(usize, usize), f32>,
    /// The factors as stored, in the units of `magnitude`: `rows x rank` and `rank x cols`, row-major.
    u: Vec<f32>,
    v: Vec<f32>,
}

impl Iterator for Blocks {
    type Item = Result<Step, DecompError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let step = self.step();
        (self.done, self.left) = (self.done + 1, if step.is_ok() { self.left - 1 } else { 0 });
        Some(step)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Blocks {}

impl Blocks {
    fn step(&mut self) -> Result<Step, DecompError> {
        let (rows, cols, rank) = (self.shape.rows(), self.shape.cols(), self.rank);
        let (u, v) = self.factors()?;
        let spikes = self.list()?;
        let next = self.subtract()?;
        let block = Block {
            signs: std::mem::replace(&mut self.signs, next),
            basis: Some(Basis::new(rank, cols, Values::F16(v))?),
            coefficients: Coefficients::new(rows, 1, rank, Values::F16(u))?,
            spikes,
        };
        Ok(Step { block, error: self.error() })
    }

    /// The factors of the best fit of |R|, as stored; leaves what they are worth in `self.u` and `self.v`.
    fn factors(&mut self) -> Result<(Vec<f16>, Vec<f16>), DecompError> {
        let (rows, cols, rank) = (self.shape.rows(), self.shape.cols(), self.rank);
        let (mut u16, mut v16) = (vec![f16::ZERO; rows * rank], vec![f16::ZERO; rank * cols]);
        self.u.fill(0.0);
        self.v.fill(0.0);
        if self.squared == 0.0 {
            return Ok((u16, v16));
        }
        let block = self.done + 1;
        let (u, v) =
            self.svd.fit(&self.magnitude).map_err(|_no_convergence| DecompError::SvdFailed { block, rows, cols })?;
        let unit = exp2(-self.exponent);
        for k in 0..rank {
            // Both get the length √σ, and V is divided by s. Then both are multiplied by powers of two, which is exact, such that their
            // largest values are alike and their product is in the weight's units.
            let (length_u, length_v) = (u.col(k).norm_l2(), v.col(k).norm_l2());
            if length_u == 0.0 || length_v == 0.0 {
                continue;
            }
            let root = (length_v / length_u).sqrt();
            let split_u = |r: usize| f64::from(u[(r, k)] * root);
            let split_v = |c: usize| f64::from(v[(c, k)] / root) / f64::from(self.scales[c]);
            let largest_u = (0..rows).map(|r| split_u(r).abs()).fold(0.0, f64::max);
            let largest_v = (0..cols).map(|c| split_v(c).abs()).fold(0.0, f64::max);
            if largest_u == 0.0 || largest_v == 0.0 {
                continue;
            }
            let exponent_u = (self.exponent + ilog2(largest_v) - ilog2(largest_u)).div_euclid(2);
            let (unit_u, unit_v) = (exp2(exponent_u), exp2(self.exponent - exponent_u));
            let magnitude = (largest_u * unit_u).max(largest_v * unit_v);
            if f16::from_f64(magnitude).is_infinite() {
                return Err(DecompError::FactorOverflow { block, vector: k, magnitude });
            }
            for r in 0..rows {
                let stored = f16::from_f64(split_u(r) * unit_u);
                u16[r * rank + k] = stored;
                self.u[r * rank + k] = stored.to_f32();
            }
            for c in 0..cols {
                let stored = f16::from_f64(split_v(c) * unit_v);
                v16[k * cols + c] = stored;
                self.v[k * cols + c] = (stored.to_f64() * f64::from(self.scales[c]) * unit) as f32;
            }
        }
        Ok((u16, v16))
    }

    /// The list of spikes, in units of the envelope of the factors; R without it.
    fn list(&mut self) -> Result<Option<Spikes>, DecompError> {
        let (cols, rank) = (self.shape.cols(), self.rank);
        let mut left = std::mem::take(&mut self.spikes);
        if left.is_empty() {
            return Ok(None);
        }
        let unit = |row: usize, col: usize| f64::from(self.u[row * rank]) * f64::from(self.v[col]);
        let places: Vec<(usize, usize)> = left.keys().copied().filter(|(row, col)| unit(*row, *col) > 0.0).collect();
        let normal = |row, col| f64::from(left[&(row, col)]) / unit(row, col);
        let list = List::new(self.shape.rows(), &places, normal, REST, 1.0);
        for (row, col) in places {
            let of_place = list.row(row).iter().filter(|entry| entry.col == col);
            let listed: f64 = of_place.map(|entry| f64::from(entry.value)).sum();
            let value = left.get_mut(&(row, col)).expect("places are of the map");
            *value = (f64::from(*value) - listed * unit(row, col)) as f32;
        }
        let mut signs = self.signs.as_bytes().to_vec();
        for ((row, col), value) in left {
            self.magnitude[row * cols + col] = value.abs();
            let (byte, bit) = (row * row_bytes(cols) + col / 8, 1 << (col % 8));
            signs[byte] = if value < 0.0 { signs[byte] & !bit } else { signs[byte] | bit };
        }
        self.signs = SignMatrix::from_bytes(self.shape.rows(), cols, signs)?;
        list.stored(self.shape)
    }

    /// Subtracts S ⊙ (U V) from R, panel of rows by panel of rows, and returns the signs of what is left.
    fn subtract(&mut self) -> Result<SignMatrix, DecompError> {
        let (rows, cols, rank) = (self.shape.rows(), self.shape.cols(), self.rank);
        let mut signs = self.signs.as_bytes().to_vec();
        let v = MatRef::from_row_major_slice(&self.v, rank, cols);
        let panel = |scratch: &mut Scratch, ((a, s), u): Panel<'_>| {
            subtract_panel(a, s, MatRef::from_row_major_slice(u, u.len() / rank, rank), v, scratch)
        };
        let (a_len, s_len, u_len) = (PANEL_ROWS * cols, PANEL_ROWS * row_bytes(cols), PANEL_ROWS * rank);
        let sums: Result<Vec<f64>, DecompError> = match self.threads {
            Threads::One => {
                let scratch = &mut Scratch::new();
                let panels = self.magnitude.chunks_mut(a_len).zip(signs.chunks_mut(s_len)).zip(self.u.chunks(u_len));
                panels.map(|p| panel(scratch, p)).collect()
            }
            Threads::Pool => {
                let panels = self.magnitude.par_chunks_mut(a_len).zip(signs.par_chunks_mut(s_len));
                panels.zip(self.u.par_chunks(u_len)).map_init(Scratch::new, panel).collect()
            }
        };
        self.squared = sums?.iter().sum();
        Ok(SignMatrix::from_bytes(rows, cols, signs)?)
    }

    fn error(&mut self) -> LevelReport {
        let ratio = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let unit = exp2(2 * self.exponent);
        let par = par(self.threads);
        let output = self.metric.as_mut().map(|(metric, base)| {
            let squared = metric.squared(self.signs.view(), &self.magnitude, par);
            OutputReport { squared_error: squared * unit, relative_error: ratio(squared, *base).sqrt() }
        });
        LevelReport {
            squared_error: self.squared * unit,
            relative_error: ratio(self.squared, self.base).sqrt(),
            output,
        }
    }
}

/// |R|, packed signs and U of some rows.
type Panel<'a> = ((&'a mut [f32], &'a mut [u8]), &'a [f32]);

const PANEL_ROWS: usize = 64;
/// A whole number of bytes of signs.
const PANEL_COLS: usize = 512;

/// Room for a tile of U V and its signs.
struct Scratch {
    fit: Vec<f32>,
    signs: Vec<u8>,
}

impl Scratch {
    fn new() -> Self {
        Self { fit: vec![0.0; PANEL_ROWS * PANEL_COLS], signs: vec![0; PANEL_ROWS * PANEL_COLS / 8] }
    }
}

/// R − S ⊙ (U V) = S ⊙ (|R| − U V), so the signs change where |R| − U V is negative, and its absolute values are the new |R|. Returns
/// their sum of squares.
fn subtract_panel(
    magnitude: &mut [f32],
    signs: &mut [u8],
    u: MatRef<'_, f32>,
    v: MatRef<'_, f32>,
    scratch: &mut Scratch,
) -> Result<f64, DecompError> {
    let (rows, cols) = (u.nrows(), v.ncols());
    let mut sum = 0.0;
    for col in (0..cols).step_by(PANEL_COLS) {
        let width = PANEL_COLS.min(cols - col);
        let fit = &mut scratch.fit[..rows * width];
        let out = MatMut::from_row_major_slice_mut(fit, rows, width);
        matmul(out, Accum::Replace, u, v.subcols(col, width), 1.0, Par::Seq);
        for (a, d) in magnitude.chunks_exact_mut(cols).zip(fit.chunks_exact_mut(width)) {
            let a = &mut a[col..col + width];
            for (a, d) in a.iter_mut().zip(d) {
                *d = *a - *d;
                *a = d.abs();
            }
            sum += sum_of_squares(a);
        }
        let kept = &mut scratch.signs[..packed_len(rows, width)?];
        pack_into(rows, width, fit, kept)?;
        let rows = signs.chunks_exact_mut(row_bytes(cols)).zip(kept.chunks_exact(row_bytes(width)));
        for ((s, kept), d) in rows.zip(fit.chunks_exact(width)) {
            let s = &mut s[col / 8..][..kept.len()];
            for (s, kept) in s.iter_mut().zip(kept) {
                *s = !(*s ^ kept);
            }
            if !width.is_multiple_of(8) {
                s[kept.len() - 1] &= (1 << (width % 8)) - 1;
            }
            // What is left of a residual fitted exactly has no sign of its own: sign(0) = +1.
            if d.contains(&0.0) {
                d.iter().enumerate().filter(|(_, d)| **d == 0.0).for_each(|(c, _)| s[c / 8] |= 1 << (c % 8));
            }
        }
    }
    Ok(sum)
}
