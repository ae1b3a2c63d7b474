//! Nested codes.

mod choose;
mod linear;
mod metric;
mod scalar;
mod tile;

use bitstack_core::{Basis, Block, Coefficients, CoreError, FactorType, Scales, SignMatrix, Values, f16};
use choose::LANES;
use metric::{Metric, Regularisation};
use ndarray::{ArrayView1, ArrayView2};
use rayon::prelude::*;
use tile::{Grid, RowError, SUBS, Stage, TILE, Tile};

/// Settings.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "experimental")]
pub struct Nested {
    pub n_blocks: usize,
    pub joint: usize,
    pub sweeps: usize,
    pub diagonal: f64,
    pub damping: f64,
    pub weights: Vec<f64>,
    pub omega: Vec<f64>,
    pub ratio: f64,
    pub clip: f64,
    pub start: Vec<f64>,
    pub gain: f64,
    pub tail: usize,
    pub rounds: usize,
    pub order: usize,
    pub bytes: bool,
}

/// Errors.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "experimental")]
pub enum NestedError {
    #[error(transparent)]
    Core(#[from] CoreError),
    #[error("bad")]
    Bad,
}

/// One block and its errors.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "experimental")]
pub struct NestedStep {
    pub block: Block,
    pub squared_error: f64,
    pub relative_error: f64,
    pub output: Option<(f64, f64)>,
}

/// The decomposition.
#[allow(missing_docs, reason = "experimental")]
pub fn nested_blocks(
    weight: ArrayView2<'_, f32>,
    scales: Option<&Scales>,
    gram: Option<ArrayView2<'_, f64>>,
    options: &Nested,
) -> Result<Vec<NestedStep>, NestedError> {
    let (rows, cols) = weight.dim();
    let ones;
    let s = match scales {
        Some(s) => s.as_slice(),
        None => {
            ones = vec![1.0f32; cols];
            &ones
        }
    };
    let envelope = balance(weight, s);
    let (basis, v) = store_basis(&envelope.cols)?;
    let mut order: Vec<usize> = (0..cols).collect();
    let importance = |c: usize| match gram {
        Some(g) => g[[c, c]] * if options.order == 2 { v[c] * v[c] } else { 1.0 },
        None => f64::from(s[c]),
    };
    if options.order > 0 && gram.is_some() {
        order.sort_by(|&a, &b| importance(b).total_cmp(&importance(a)));
    }
    let metric = match gram {
        Some(gram) => {
            let regularise = Regularisation { diagonal: options.diagonal, damping: options.damping };
            Metric::full(gram, &v, &order, regularise)
        }
        None => {
            let weights: Vec<f64> = v.iter().zip(s).map(|(v, s)| (v * f64::from(*s)).powi(2)).collect();
            Metric::diagonal(&weights, &order)
        }
    };
    // Column scale of the scaled error, in normalised coordinates.
    let scaled: Vec<f32> = order.iter().map(|&c| (v[c] * f64::from(s[c])).powi(2) as f32).collect();

    let q = options.joint.min(options.n_blocks);
    let inverse: Vec<f32> = v.iter().map(|v| if *v > 0.0 { (1.0 / v) as f32 } else { 0.0 }).collect();
    let sample = sample(weight, &envelope.rows, &inverse);
    let start: Vec<f64> = if options.start.is_empty() { (0..q).map(|i| options.clip * options.ratio.powi(i as i32)).collect() } else { options.start[..q].to_vec() };
    let levels = scalar::design(&sample, &options.weights[..q], &start, options.rounds);
    if std::env::var("SHOW").is_ok() { eprintln!("design {:.5?}\n{:.3?}", levels.errors, levels.coefficients); }
    let omega: Vec<f64> = (0..q).map(|b| options.omega[b] / levels.errors[b]).collect();
    let a_max = envelope.rows.iter().fold(0.0f64, |m, a| m.max(*a));
    let grids: Vec<Grid> = (0..options.n_blocks)
        .map(|b| {
            if options.bytes && b < q {
                // A margin for what refits and row shapes do to the coefficients.
                let steps = levels.coefficients[b]
                    .iter()
                    .map(|c| f16::from_f64(c * a_max * 1.3 / 127.0).to_f32())
                    .collect();
                Grid::I8 { steps }
            } else {
                Grid::F16
            }
        })
        .collect();

    let tiles: Vec<usize> = (0..rows).step_by(TILE).collect();
    let row_bytes = cols.div_ceil(8);
    let done: Vec<TileResult> = tiles
        .par_iter()
        .map(|&r0| {
            let here = TILE.min(rows - r0);
            let mut a = envelope.rows[r0..r0 + here].to_vec();
            a.resize(TILE, 0.0);
            let mut x = vec![[0.0f32; LANES]; cols * SUBS];
            for r in 0..here {
                let row: ArrayView1<'_, f32> = weight.row(r0 + r);
                let scale = if a[r] > 0.0 { 1.0 / a[r] } else { 0.0 };
                for (j, &c) in order.iter().enumerate() {
                    x[j * SUBS + r / LANES][r % LANES] = (f64::from(row[c]) * scale) as f32 * inverse[c];
                }
            }
            let mut tile = Tile::new(&metric, x, a.clone());
            let stage = Stage {
                q,
                omega: &omega,
                weights: &options.weights[..q],
                sweeps: options.sweeps,
                grids: &grids[..q],
            };
            tile.stage(&stage, &levels.coefficients, &[1.0; TILE]);
            let mut p = q;
            while p < options.n_blocks {
                let g = options.tail.min(options.n_blocks - p);
                let residual: Vec<f64> = tile.residual().iter().map(|r| r * options.gain).collect();
                let start: Vec<Vec<f64>> = (0..g).map(|b| (0..=b).map(|i| 0.5f64.powi(i as i32)).collect()).collect();
                let omega: Vec<f64> = (0..g).map(|b| 4f64.powi(b as i32)).collect();
                let stage = Stage { q: g, omega: &omega, weights: &vec![1.0; g], sweeps: options.sweeps, grids: &grids[p..p + g] };
                tile.stage(&stage, &start, &residual);
                p += g;
            }
            let errors = tile.errors(&scaled);
            let mut signs = vec![vec![0u8; here * row_bytes]; p];
            for (i, bytes) in signs.iter_mut().enumerate() {
                for (j, &c) in order.iter().enumerate() {
                    for r in 0..here {
                        bytes[r * row_bytes + c / 8] |= u8::from(tile.positive(i, j, r)) << (c % 8);
                    }
                }
            }
            TileResult { signs, coefficients: tile.coefficients, errors, row_scale: a, here }
        })
        .collect();

    // Norms.
    let mut scaled_norm = 0.0f64;
    for row in weight.rows() {
        scaled_norm += row.iter().zip(s).map(|(w, s)| (f64::from(*w) * f64::from(*s)).powi(2)).sum::<f64>();
    }
    let output_norm = gram.map(|g| {
        let mut total = 0.0f64;
        for row in weight.rows() {
            let w: ndarray::Array1<f64> = row.mapv(f64::from);
            total += w.dot(&g.dot(&w));
        }
        total
    });
    let mut steps = Vec::new();
    for b in 0..options.n_blocks {
        let mut bytes = Vec::with_capacity(rows * row_bytes);
        let mut values = vec![0.0f64; rows * (b + 1)];
        let (mut squared, mut output) = (0.0f64, 0.0f64);
        let mut r0 = 0;
        for tile in &done {
            bytes.extend_from_slice(&tile.signs[b]);
            for r in 0..tile.here {
                for i in 0..=b {
                    values[(r0 + r) * (b + 1) + i] = tile.coefficients[b][i][r] * tile.row_scale[r];
                }
                let e: RowError = tile.errors[b][r];
                squared += e.scaled * tile.row_scale[r].powi(2);
                output += e.output * tile.row_scale[r].powi(2) * metric.unit;
            }
            r0 += tile.here;
        }
        let values = match &grids[b] {
            Grid::F16 => Values::F16(values.iter().map(|c| f16::from_f64(*c)).collect()),
            Grid::I8 { steps } => Values::I8 {
                codes: values
                    .iter()
                    .enumerate()
                    .map(|(k, c)| {
                        let step = f64::from(steps[k % (b + 1)]);
                        if step > 0.0 { (c / step).round() as i8 } else { 0 }
                    })
                    .collect(),
                scales: steps.iter().map(|s| f16::from_f32(*s)).collect(),
            },
        };
        let signs = SignMatrix::from_bytes(rows, cols, bytes).map_err(|_| NestedError::Bad)?;
        let coefficients = Coefficients::new(rows, b + 1, 1, values)?;
        steps.push(NestedStep {
            block: Block { signs, basis: (b == 0).then(|| basis.clone()), coefficients },
            squared_error: squared,
            relative_error: if scaled_norm > 0.0 { (squared / scaled_norm).sqrt() } else { 0.0 },
            output: output_norm.map(|norm| (output, if norm > 0.0 { output / norm } else { 0.0 })),
        });
    }
    Ok(steps)
}

struct TileResult {
    signs: Vec<Vec<u8>>,
    coefficients: Vec<Vec<Vec<f64>>>,
    errors: Vec<Vec<RowError>>,
    row_scale: Vec<f64>,
    here: usize,
}

/// A rank-1 envelope a vᵀ of |W|.
struct Envelope {
    rows: Vec<f64>,
    cols: Vec<f64>,
}

/// Rows and columns of W·diag(s) / (a bᵀ) get root mean square 1; v = b / s.
fn balance(weight: ArrayView2<'_, f32>, s: &[f32]) -> Envelope {
    let (rows, cols) = weight.dim();
    let mut a = vec![1.0f64; rows];
    let mut b = vec![1.0f64; cols];
    for _ in 0..6 {
        let inverse: Vec<f64> =
            b.iter().zip(s).map(|(b, s)| if *b > 0.0 { (f64::from(*s) / b).powi(2) } else { 0.0 }).collect();
        let live = b.iter().filter(|b| **b > 0.0).count().max(1) as f64;
        let mut sums = vec![0.0f64; cols];
        let mut live_rows = 0usize;
        for (row, a) in weight.rows().into_iter().zip(&mut a) {
            *a = (row.iter().zip(&inverse).map(|(w, i)| f64::from(*w).powi(2) * i).sum::<f64>() / live).sqrt();
            if *a > 0.0 {
                live_rows += 1;
                let i = 1.0 / (*a * *a);
                sums.iter_mut().zip(row).for_each(|(s, w)| *s += f64::from(*w).powi(2) * i);
            }
        }
        for ((b, sum), s) in b.iter_mut().zip(&sums).zip(s) {
            *b = (sum / live_rows.max(1) as f64).sqrt() * f64::from(*s);
        }
    }
    let mut v: Vec<f64> = b.iter().zip(s).map(|(b, s)| b / f64::from(*s)).collect();
    // The magnitude is split evenly, so that both factors stay well inside f16's range.
    let rms = |x: &[f64]| (x.iter().map(|x| x * x).sum::<f64>() / x.len().max(1) as f64).sqrt();
    let (ra, rv) = (rms(&a), rms(&v));
    if ra > 0.0 && rv > 0.0 {
        let f = (ra / rv).sqrt();
        v.iter_mut().for_each(|v| *v *= f);
        a.iter_mut().for_each(|a| *a /= f);
    }
    Envelope { rows: a, cols: v }
}

/// The basis as stored, and its values.
fn store_basis(v: &[f64]) -> Result<(Basis, Vec<f64>), NestedError> {
    let max = v.iter().fold(0.0f64, |m, v| m.max(*v));
    let min = v.iter().filter(|v| **v > 0.0).fold(max, |m, v| m.min(*v));
    let values = if min * 127.0 >= 8.0 * max && max > 0.0 {
        let scale = f16::from_f64(max / 127.0);
        let codes = v.iter().map(|v| (v / scale.to_f64()).round().min(127.0) as i8).collect();
        Values::I8 { codes, scales: vec![scale] }
    } else {
        Values::F16(v.iter().map(|v| f16::from_f64(*v)).collect())
    };
    let basis = Basis::new(1, v.len(), values)?;
    let stored = (0..v.len()).map(|c| f64::from(basis.view().get(0, c))).collect();
    Ok((basis, stored))
}

/// Normalised weights, evenly spread over the matrix.
fn sample(weight: ArrayView2<'_, f32>, a: &[f64], inverse: &[f32]) -> Vec<f32> {
    let (rows, cols) = weight.dim();
    let total = rows * cols;
    let n = total.min(2048);
    (0..n)
        .map(|k| {
            // A stride that shares no factor with the columns visits them all.
            let at = (k as u128 * total as u128 / n as u128) as usize;
            let (r, c) = (at / cols, (at + k * 7) % cols);
            if a[r] > 0.0 { (f64::from(weight[[r, c]]) / a[r]) as f32 * inverse[c] } else { 0.0 }
        })
        .collect()
}

/// The factor type of coefficients.
#[allow(dead_code, reason = "experimental")]
fn factor(bytes: bool) -> FactorType {
    if bytes { FactorType::I8 } else { FactorType::F16 }
}
