//! The kernel of nested codes, the work on a tile of rows: error feedback and sweeps. Rows are independent given H and the pattern, so tiles are too.
//!
//! Everything is in normalised coordinates: x = W / (a vᵀ), planes are ±1, errors are measured by H̃ of [`Metric`]. Rows lie in lanes
//! ([`LANES`] at a time); an array over columns has, for each column, `SUBS` groups of lanes, each with one lane array per level or plane.

use super::choose::{Costs, MAX_JOINT, Nodes, choose, nodes_before, signs};
use super::lanes::{Aligned, LANES, Lane, SUBS, TILE};
use super::linear::solve_symmetric;
use super::metric::Metric;
use super::signed::{MOST_WORDS, Square, Sums, WORD, words};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use pulp::{Simd, WithSimd};

/// Columns worked on before those of the panel are brought up to date.
const BLOCK: usize = WORD;
/// Columns worked on before all others are brought up to date.
const PANEL: usize = MOST_WORDS * BLOCK;

/// Planes chosen jointly, and H̃ times them.
pub(crate) struct Group {
    /// The first plane, from 0.
    lo: usize,
    /// The number of planes.
    q: usize,
    /// Codes, `cols x SUBS`.
    z: Vec<[u8; LANES]>,
    /// H̃ P for each plane P, `cols x SUBS x q`; empty for a diagonal metric, and while the planes are being chosen.
    ph: Vec<Lane>,
}

/// What one stage (one group of planes) is to do.
pub(crate) struct Stage<'a> {
    /// Planes in the group.
    pub(crate) q: usize,
    /// Weight of each level in the feedback pass: relative to one another.
    pub(crate) omega: &'a [f64],
    /// Weight of each level in the sweeps.
    pub(crate) weights: &'a [f64],
    /// Rounds of coordinate descent.
    pub(crate) sweeps: usize,
    /// Whether to fit the pattern of these levels to the rows of the tile.
    pub(crate) learn: bool,
}

/// Errors of one row at one level.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RowError {
    /// (x − x_b) H̃ (x − x_b)ᵀ, without regularisation.
    pub(crate) output: f64,
    /// Σ_c scale_c (x − x_b)_c².
    pub(crate) scaled: f64,
}

/// A tile in work.
pub(crate) struct Tile<'a> {
    metric: &'a Metric,
    n: usize,
    /// Normalised weights, `cols x SUBS`.
    x: Vec<Lane>,
    /// H̃ x, `cols x SUBS`; empty for a diagonal metric.
    xh: Vec<Lane>,
    /// x H̃ xᵀ per row.
    xhx: Vec<f64>,
    /// a per row.
    pub(crate) row_scale: Vec<f64>,
    groups: Vec<Group>,
    /// H̃ P for the planes that are being chosen.
    sums: Option<Sums>,
    /// `pattern[level][plane]`: the magnitude of each plane at each level, in normalised coordinates, the same for all rows.
    pub(crate) pattern: Vec<Vec<f64>>,
    /// P H̃ Pᵀ, `gram[i][k][row]`, k <= i.
    gram: Vec<Vec<Vec<f64>>>,
    /// P H̃ x, `dot[i][row]`.
    dot: Vec<Vec<f64>>,
    costs: Box<Costs>,
}

fn matrix(data: &[Lane], rows: usize, width: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(data.as_flattened(), rows, width * LANES)
}

/// Some rows of the columns of a block.
fn strip(data: &Square, block: usize, rows: std::ops::Range<usize>) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(data.strip(block, rows.clone()), rows.len(), BLOCK)
}

fn matrix_mut(data: &mut [Lane], rows: usize, width: usize) -> MatMut<'_, f32> {
    MatMut::from_row_major_slice_mut(data.as_flattened_mut(), rows, width * LANES)
}

/// The magnitudes of some levels in lanes: `[(level - first) * planes + plane]`.
fn lanes(pattern: &[Vec<f64>], levels: std::ops::Range<usize>) -> Vec<Lane> {
    let p = pattern.len();
    let mut out = vec![[0.0; LANES]; levels.len() * p];
    for (out, pattern) in out.chunks_exact_mut(p).zip(&pattern[levels]) {
        out.iter_mut().zip(pattern).for_each(|(out, c)| *out = [*c as f32; LANES]);
    }
    out
}

impl<'a> Tile<'a> {
    /// `x`: `cols x SUBS` normalised weights; `row_scale`: a of each row.
    pub(crate) fn new(metric: &'a Metric, x: Vec<Lane>, row_scale: Vec<f64>) -> Self {
        let n = metric.n;
        let mut xh = Vec::new();
        if let Some(full) = &metric.full {
            xh = vec![[0.0; LANES]; n * SUBS];
            for (block, xh) in xh.chunks_mut(BLOCK * SUBS).enumerate() {
                let cols = xh.len() / SUBS;
                let h = strip(&full.h, block, 0..n).subcols(0, cols).transpose();
                matmul(matrix_mut(xh, cols, SUBS), Accum::Replace, h, matrix(&x, n, SUBS), 1.0, Par::Seq);
            }
        }
        let mut xhx = vec![0.0f64; TILE];
        for c in 0..n {
            for s in 0..SUBS {
                for l in 0..LANES {
                    let v = x[c * SUBS + s][l];
                    let hv = if xh.is_empty() { metric.diagonal[c] * v } else { xh[c * SUBS + s][l] };
                    xhx[s * LANES + l] += f64::from(v) * f64::from(hv);
                }
            }
        }
        Self {
            metric,
            n,
            x,
            xh,
            xhx,
            row_scale,
            groups: Vec::new(),
            sums: None,
            pattern: Vec::new(),
            gram: Vec::new(),
            dot: Vec::new(),
            costs: Box::new(Aligned([[0.0; LANES]; 1 << MAX_JOINT])),
        }
    }

    fn planes(&self) -> usize {
        self.pattern.len()
    }

    /// Adds a group of planes; `pattern` has one entry per level of it: the magnitudes of all planes up to that level. Groups after the
    /// first have one plane.
    pub(crate) fn stage(&mut self, stage: &Stage<'_>, pattern: &[Vec<f64>]) {
        let (q, lo) = (stage.q, self.planes());
        for (b, pattern) in pattern.iter().enumerate() {
            self.pattern.push(pattern.clone());
            self.gram.push(vec![vec![0.0; TILE]; lo + b + 1]);
            self.dot.push(vec![0.0; TILE]);
        }
        self.groups.push(Group { lo, q, z: vec![[0; LANES]; self.n * SUBS], ph: Vec::new() });
        let omega = vec![stage.omega.to_vec(); TILE];
        self.feedback(&omega);
        if self.metric.full.is_none() {
            // Without H a sweep is a round of Lloyd's iteration, and feedback was none: the same loop does.
            for _ in 0..stage.sweeps.max(2) {
                self.products();
                let weights = self.weigh(stage);
                self.feedback(&weights);
            }
        } else {
            self.multiply();
            for _ in 0..stage.sweeps {
                self.products();
                let weights = self.weigh(stage);
                self.sweep(&weights);
            }
        }
        if stage.learn {
            self.products();
            self.weigh(stage);
        }
        self.keep(stage.q);
    }

    /// Keeps H̃ times the planes of the last group, which are chosen.
    fn keep(&mut self, q: usize) {
        if let (Some(sums), Some(group)) = (self.sums.take(), self.groups.last_mut()) {
            group.ph = vec![[0.0; LANES]; self.n * SUBS * q];
            let mut columns = vec![[0.0; LANES]; BLOCK * q];
            for j0 in (0..self.n).step_by(BLOCK) {
                let range = j0..self.n.min(j0 + BLOCK);
                for s in 0..SUBS {
                    sums.rows(s, q, range.clone(), &mut columns);
                    for (j, column) in range.clone().zip(columns.chunks_exact(q)) {
                        group.ph[(j * SUBS + s) * q..][..q].copy_from_slice(column);
                    }
                }
            }
        }
    }

    /// Takes from the weights what no plane reaches: where the error at the last level of the first group weighs more than `price`, its
    /// weight being the pivot of its column times `row_weights`. `nearest` gives the entry for an error. The worst `most` at most; their
    /// rows, columns and entries. The codes then see one more sweep.
    pub(crate) fn mend(
        &mut self,
        stage: &Stage<'_>,
        row_weights: &[f64],
        price: f64,
        most: usize,
        nearest: impl Fn(f64) -> Option<(i8, f32)>,
    ) -> Vec<(usize, usize, i8, f32)> {
        let p = self.planes();
        let coefficients = lanes(&self.pattern, p - 1..p);
        let mut found = Vec::new();
        for at in 0..self.n * SUBS {
            let value = value(&self.groups, &coefficients, at);
            let (j, s) = (at / SUBS, at % SUBS);
            for l in 0..LANES {
                let error = f64::from(self.x[at][l] - value[l]);
                let row = s * LANES + l;
                let weight = error * error * self.metric.pivots[j] * row_weights[row];
                if weight > price {
                    found.push((weight, row, j, error));
                }
            }
        }
        if found.len() > most {
            found.select_nth_unstable_by(most, |a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
            found.truncate(most);
        }
        let mut out = Vec::with_capacity(found.len());
        for (_, row, j, error) in found {
            let Some((size, value)) = nearest(error) else { continue };
            let (s, l) = (row / LANES, row % LANES);
            let (own, old) = (self.metric.diagonal[j], self.x[j * SUBS + s][l]);
            self.x[j * SUBS + s][l] -= value;
            match &self.metric.full {
                Some(full) => {
                    self.xhx[row] += f64::from(value) * f64::from(value * own - 2.0 * self.xh[j * SUBS + s][l]);
                    for k in 0..self.n {
                        self.xh[k * SUBS + s][l] -= value * full.h.get(j, k);
                    }
                }
                None => self.xhx[row] += f64::from(own) * f64::from(value) * f64::from(value - 2.0 * old),
            }
            out.push((row, j, size, value));
        }
        if !out.is_empty() && self.metric.full.is_some() {
            self.multiply();
            for _ in 0..2 {
                self.products();
                let weights = self.weigh(stage);
                self.sweep(&weights);
            }
            self.keep(stage.q);
        } else if !out.is_empty() {
            for _ in 0..2 {
                self.products();
                let weights = self.weigh(stage);
                self.feedback(&weights);
            }
        }
        out
    }

    /// Mean magnitude of the residual at the last level.
    pub(crate) fn residual(&self) -> f64 {
        let p = self.planes();
        let coefficients = lanes(&self.pattern, p - 1..p);
        let mut sum = 0.0f64;
        for at in 0..self.n * SUBS {
            let value = value(&self.groups, &coefficients, at);
            for l in 0..LANES {
                if self.row_scale[at % SUBS * LANES + l] > 0.0 {
                    sum += f64::from((self.x[at][l] - value[l]).abs());
                }
            }
        }
        let rows = self.row_scale.iter().filter(|a| **a > 0.0).count().max(1);
        sum / (self.n * rows) as f64
    }

    /// All node values of the last group, times the root of each level's weight; and the roots.
    fn tables(&self, weights: &[Vec<f64>]) -> (Vec<Nodes>, Vec<Vec<Lane>>) {
        let Some(group) = self.groups.last() else { return Default::default() };
        let q = group.q;
        let mut tables = vec![Aligned([[0.0; LANES]; nodes_before(MAX_JOINT)]); SUBS];
        let mut roots = vec![vec![[0.0; LANES]; q]; SUBS];
        for r in 0..TILE {
            // Only ratios matter: the largest weight becomes 1.
            let top = weights[r].iter().fold(0.0f64, |m, w| m.max(*w));
            let (s, l) = (r / LANES, r % LANES);
            for b in 0..q {
                let root = if top > 0.0 { (weights[r][b] / top).sqrt() } else { 0.0 };
                roots[s][b][l] = root as f32;
                for node in 0..2usize << b {
                    let value: f64 = (0..=b)
                        .map(|i| {
                            let c = self.pattern[group.lo + b][group.lo + i];
                            if (node >> (b - i)) & 1 == 1 { c } else { -c }
                        })
                        .sum();
                    tables[s].0[nodes_before(b) + node][l] = (value * root) as f32;
                }
            }
        }
        (tables, roots)
    }

    /// One pass over the columns, each level's error fed forward into its own target; sets the codes of the last group.
    fn feedback(&mut self, weights: &[Vec<f64>]) {
        let (n, p) = (self.n, self.planes());
        let (tables, roots) = self.tables(weights);
        let Some(lo) = self.groups.last().map(|g| g.lo) else { return };
        let coefficients = lanes(&self.pattern, lo..p);
        let Some((group, before)) = self.groups.split_last_mut() else { return };
        let q = group.q;
        let arch = pulp::Arch::new();
        // What is left to be chosen for: all levels of a joint group have nothing before them, and later groups one level.
        let mut rest = self.x.clone();
        if !before.is_empty() {
            for (at, rest) in rest.iter_mut().enumerate() {
                let base = value(before, &coefficients, at);
                (0..LANES).for_each(|l| rest[l] -= base[l]);
            }
        }
        let mut fed = self.metric.full.as_ref().map(|full| {
            // x + (x − v) (Ũ − 1) is x Ũ less what the chosen values v bring.
            let mut goals = vec![[0.0; LANES]; n * SUBS];
            for (block, goals) in goals.chunks_mut(BLOCK * SUBS).enumerate() {
                let cols = goals.len() / SUBS;
                let rows = block * BLOCK + cols;
                let u = strip(&full.u, block, 0..rows).subcols(0, cols).transpose();
                let rest = matrix(&rest[..rows * SUBS], rows, SUBS);
                matmul(matrix_mut(goals, cols, SUBS), Accum::Replace, u, rest, 1.0, Par::Seq);
            }
            rest = goals;
            (full, Sums::zeros(TILE * q, &full.u))
        });
        let mut factor = vec![0.0f32; BLOCK * BLOCK];
        let mut carried = vec![[0.0f32; LANES]; BLOCK * q];
        let mut values = vec![[0.0f32; LANES]; BLOCK * q];
        let mut signs = vec![0u64; MOST_WORDS * TILE * q];
        for panel in (0..n).step_by(PANEL) {
            let end = n.min(panel + PANEL);
            for (j0, signs) in (panel..end).step_by(BLOCK).zip(signs.chunks_exact_mut(TILE * q)) {
                let j1 = end.min(j0 + BLOCK);
                if let Some((full, _)) = &fed {
                    // The block of Ũ on the diagonal, transposed.
                    for i in j0..j1 {
                        let row = full.u.row(i, j0 / BLOCK);
                        (i - j0..j1 - j0).for_each(|k| factor[k * BLOCK + i - j0] = row[k]);
                    }
                }
                for s in 0..SUBS {
                    if let Some((_, sums)) = &fed {
                        sums.rows(s, q, j0..j1, &mut carried);
                    }
                    let columns = Columns {
                        range: j0..j1,
                        s,
                        q,
                        lo,
                        p,
                        z: &mut group.z,
                        coefficients: &coefficients,
                        table: &tables[s],
                        roots: &roots[s],
                        costs: &mut self.costs,
                    };
                    let fed = fed.as_ref().map(|_| Fed { factor: &factor, carried: &carried, values: &mut values });
                    arch.dispatch(Feedback { columns, rest: &rest, fed });
                }
                if let Some((full, sums)) = &mut fed {
                    words(&group.z[j0 * SUBS..j1 * SUBS], q, signs);
                    sums.add(&full.u, j0, signs, j1..end);
                }
            }
            if let Some((full, sums)) = &mut fed {
                let blocks = (end - panel).div_ceil(BLOCK);
                sums.add(&full.u, panel, &signs[..blocks * TILE * q], end..n);
            }
        }
    }

    /// H̃ times the planes of the last group.
    fn multiply(&mut self) {
        let (Some(full), Some(group)) = (&self.metric.full, self.groups.last()) else { return };
        let planes = TILE * group.q;
        let mut signs = vec![0u64; self.n.div_ceil(BLOCK) * planes];
        for (codes, signs) in group.z.chunks(BLOCK * SUBS).zip(signs.chunks_exact_mut(planes)) {
            words(codes, group.q, signs);
        }
        let mut sums = Sums::zeros(planes, &full.h);
        sums.add(&full.h, 0, &signs, 0..self.n);
        self.sums = Some(sums);
    }

    /// One round of coordinate descent over the codes of the last group on Σ_b weights_b · (x − x_b) H̃ (x − x_b)ᵀ.
    fn sweep(&mut self, weights: &[Vec<f64>]) {
        let (n, p) = (self.n, self.planes());
        let (tables, roots) = self.tables(weights);
        let Some(lo) = self.groups.last().map(|g| g.lo) else { return };
        let (Some(full), Some(sums)) = (&self.metric.full, &mut self.sums) else { return };
        let coefficients = lanes(&self.pattern, lo..p);
        let Some((group, before)) = self.groups.split_last_mut() else { return };
        let q = group.q;
        let arch = pulp::Arch::new();
        let mut ph = vec![[0.0f32; LANES]; BLOCK * q];
        let mut changes = vec![[0.0f32; LANES]; BLOCK * q];
        let mut signs = [(); 2].map(|()| vec![0u64; MOST_WORDS * TILE * q]);
        for panel in (0..n).step_by(PANEL) {
            let end = n.min(panel + PANEL);
            for (b, j0) in (panel..end).step_by(BLOCK).enumerate() {
                let j1 = end.min(j0 + BLOCK);
                let block = b * TILE * q..(b + 1) * TILE * q;
                words(&group.z[j0 * SUBS..j1 * SUBS], q, &mut signs[0][block.clone()]);
                for s in 0..SUBS {
                    sums.rows(s, q, j0..j1, &mut ph);
                    let columns = Columns {
                        range: j0..j1,
                        s,
                        q,
                        lo,
                        p,
                        z: &mut group.z,
                        coefficients: &coefficients,
                        table: &tables[s],
                        roots: &roots[s],
                        costs: &mut self.costs,
                    };
                    let (ph, changes) = (&ph[..], &mut changes[..]);
                    arch.dispatch(Sweep { columns, before, h: &full.h, xh: &self.xh, ph, changes });
                }
                words(&group.z[j0 * SUBS..j1 * SUBS], q, &mut signs[1][block.clone()]);
                sums.change(&full.h, j0, [0, 1].map(|i| &signs[i][block.clone()]), panel..end);
            }
            let blocks = ..(end - panel).div_ceil(BLOCK) * TILE * q;
            for others in [0..panel, end..n] {
                sums.change(&full.h, panel, [0, 1].map(|i| &signs[i][blocks]), others);
            }
        }
    }

    /// Inner products of the planes of the last group with all planes and with x, under H̃.
    fn products(&mut self) {
        let n = self.n;
        let Some((group, before)) = self.groups.split_last() else { return };
        let (q, lo) = (group.q, group.lo);
        let p = lo + q;
        for i in lo..p {
            self.gram[i].iter_mut().for_each(|row| row.fill(0.0));
            self.dot[i].fill(0.0);
        }
        let arch = pulp::Arch::new();
        let mut plane = vec![[0.0f32; LANES]; BLOCK * p];
        let mut products = vec![[0.0f32; LANES]; BLOCK * q];
        let mut weights = vec![[0.0f32; LANES]; BLOCK];
        let mut part = vec![[0.0f32; LANES]; q * (p + 1)];
        let mut ph = vec![[0.0f32; LANES]; BLOCK * q];
        for j0 in (0..n).step_by(BLOCK) {
            let m = BLOCK.min(n - j0);
            for s in 0..SUBS {
                if let Some(sums) = &self.sums {
                    sums.rows(s, q, j0..j0 + m, &mut ph);
                }
                part.fill([0.0; LANES]);
                for j in 0..m {
                    let at = (j0 + j) * SUBS + s;
                    for g in before.iter().chain([group]) {
                        for i in 0..g.q {
                            plane[(g.lo + i) * BLOCK + j] = signs(&g.z[at], g.q, i);
                        }
                    }
                    for i in 0..q {
                        products[i * BLOCK + j] = if self.sums.is_none() {
                            let h = self.metric.diagonal[j0 + j];
                            plane[(lo + i) * BLOCK + j].map(|x| x * h)
                        } else {
                            ph[j * q + i]
                        };
                    }
                    weights[j] = self.x[at];
                }
                arch.dispatch(Products { m, q, lo, plane: &plane, products: &products, x: &weights, sums: &mut part });
                for i in 0..q {
                    for k in 0..=lo + i {
                        for l in 0..LANES {
                            self.gram[lo + i][k][s * LANES + l] += f64::from(part[i * (p + 1) + k][l]);
                        }
                    }
                    for l in 0..LANES {
                        self.dot[lo + i][s * LANES + l] += f64::from(part[i * (p + 1) + p][l]);
                    }
                }
            }
        }
    }

    /// Per row the weight of each level of the last group for the next sweep: weights / error. Where the pattern is still to be learned,
    /// first least squares for it, over all rows.
    fn weigh(&mut self, stage: &Stage<'_>) -> Vec<Vec<f64>> {
        let p = self.planes();
        let lo = p - stage.q;
        let gram = |i: usize, k: usize| if k <= i { &self.gram[i][k] } else { &self.gram[k][i] };
        if stage.learn {
            // All rows that are there count alike, so that none of the others depend on one that is much larger.
            let live = |(_, a): &(&f64, &f64)| **a > 0.0;
            let sum = |x: &[f64]| x.iter().zip(&self.row_scale).filter(live).map(|(x, _)| x).sum::<f64>();
            let sums: Vec<Vec<f64>> = (0..p).map(|i| (0..p).map(|k| sum(gram(i, k))).collect()).collect();
            let dots: Vec<f64> = self.dot.iter().map(|dot| sum(dot)).collect();
            for b in lo..p {
                let m = b + 1;
                let pattern = &mut self.pattern[b];
                // What is added to the diagonal holds back changes, not values: where planes are all alike the products are rounding.
                let mean = (0..m).map(|i| sums[i][i]).sum::<f64>() / m as f64;
                let mut a = Vec::with_capacity(m * m);
                let mut y = Vec::with_capacity(m);
                for i in 0..m {
                    y.push(dots[i] - (0..m).map(|k| sums[i][k] * pattern[k]).sum::<f64>());
                    a.extend((0..m).map(|k| sums[i][k] + if i == k { 1e-3 * mean } else { 0.0 }));
                }
                if mean > 0.0 && solve_symmetric(&mut a, &mut y) {
                    pattern.iter_mut().zip(&y).for_each(|(c, d)| *c += d);
                }
            }
        }
        let mut out = vec![vec![0.0; stage.q]; TILE];
        for r in 0..TILE {
            for b in lo..p {
                let c = &self.pattern[b];
                let mut error = self.xhx[r];
                for i in 0..c.len() {
                    let product = (0..c.len()).map(|k| gram(i, k)[r] * c[k]).sum::<f64>();
                    error += c[i] * (product - 2.0 * self.dot[i][r]);
                }
                // A floor for rows that are exact, or zero.
                let error = error.max(1e-9 * self.xhx[r]);
                out[r][b - lo] = if error > 0.0 { stage.weights[b - lo] * self.xhx[r] / error } else { 1.0 };
            }
        }
        out
    }

    /// What (x + p) H̃ (x + p)ᵀ is more than x H̃ xᵀ, without regularisation, for a row and some spikes p, each a place among the columns
    /// here and a value.
    pub(crate) fn norm_of_spikes(&self, row: usize, spikes: &[(usize, f32)]) -> f64 {
        let (s, l) = (row / LANES, row % LANES);
        let mut sum = 0.0;
        for &(j, p) in spikes {
            let at = j * SUBS + s;
            let x = self.x[at][l];
            let xh = if self.xh.is_empty() {
                self.metric.diagonal[j] * x
            } else {
                self.xh[at][l] - self.metric.added[j] * x
            };
            let mut ph = 0.0;
            for &(k, q) in spikes {
                let h = match &self.metric.full {
                    Some(full) if j != k => full.h.get(j, k),
                    _ if j == k => self.metric.diagonal[j] - self.metric.added[j],
                    _ => 0.0,
                };
                ph += f64::from(h) * f64::from(q);
            }
            sum += f64::from(p) * (2.0 * f64::from(xh) + ph);
        }
        sum
    }

    /// x H̃ xᵀ of each row, without regularisation.
    pub(crate) fn norms(&self) -> Vec<f64> {
        let mut norms = self.xhx.clone();
        for (c, added) in self.metric.added.iter().enumerate().filter(|(_, added)| **added > 0.0) {
            for (r, norm) in norms.iter_mut().enumerate() {
                *norm -= f64::from(*added) * f64::from(self.x[c * SUBS + r / LANES][r % LANES]).powi(2);
            }
        }
        norms
    }

    /// Errors of every level, `[level][row]`; `scale` weighs the columns for [`RowError::scaled`].
    pub(crate) fn errors(&self, scale: &[f32]) -> Vec<Vec<RowError>> {
        let p = self.planes();
        let coefficients = lanes(&self.pattern, 0..p);
        let mut out = vec![vec![RowError::default(); TILE]; p];
        for c in 0..self.n {
            for s in 0..SUBS {
                let at = c * SUBS + s;
                for b in 0..p {
                    let u = &coefficients[b * p..];
                    let value = value(&self.groups, &u[..=b], at);
                    let mut g = [0.0f32; LANES];
                    if !self.xh.is_empty() {
                        g = self.xh[at].map(|x| -x);
                        for group in &self.groups {
                            for i in 0..group.q.min((b + 1).saturating_sub(group.lo)) {
                                for l in 0..LANES {
                                    g[l] += u[group.lo + i][l] * group.ph[at * group.q + i][l];
                                }
                            }
                        }
                    }
                    for l in 0..LANES {
                        let e = f64::from(value[l] - self.x[at][l]);
                        let ge =
                            if self.xh.is_empty() { e * f64::from(self.metric.diagonal[c]) } else { f64::from(g[l]) };
                        let sum = &mut out[b][s * LANES + l];
                        sum.output += e * (ge - e * f64::from(self.metric.added[c]));
                        sum.scaled += e * e * f64::from(scale[c]);
                    }
                }
            }
        }
        out
    }

    /// Whether plane `i` is +1 at column `c` of row `r`.
    pub(crate) fn positive(&self, i: usize, c: usize, r: usize) -> bool {
        let Some(group) = self.groups.iter().rfind(|g| g.lo <= i) else { return true };
        (group.z[c * SUBS + r / LANES][r % LANES] >> (group.q - 1 - (i - group.lo))) & 1 == 1
    }
}

/// What a pass over a block of columns needs of the tile, for one group of lanes.
///
/// The passes are structs and not closures for the sake of [`pulp`]: their bodies have to be inlined into the function that it compiles
/// for the instructions of the CPU.
struct Columns<'a> {
    range: std::ops::Range<usize>,
    s: usize,
    q: usize,
    lo: usize,
    p: usize,
    z: &'a mut [[u8; LANES]],
    coefficients: &'a [Lane],
    table: &'a Nodes,
    roots: &'a [Lane],
    costs: &'a mut Costs,
}

/// What is fed forward: the block of Ũ on the diagonal, transposed; for each plane, what came from the blocks before; the values of this
/// block.
struct Fed<'a> {
    factor: &'a [f32],
    carried: &'a [Lane],
    values: &'a mut [Lane],
}

struct Feedback<'a> {
    columns: Columns<'a>,
    /// What is left, under H̃ times Ũ; `cols x SUBS`.
    rest: &'a [Lane],
    fed: Option<Fed<'a>>,
}

impl WithSimd for Feedback<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { columns, rest, mut fed } = self;
        let Columns { range, s, q, lo, p, z, coefficients, table, roots, costs } = columns;
        for (k, j) in range.enumerate() {
            let at = j * SUBS + s;
            let mut goals = [[0.0; LANES]; MAX_JOINT];
            for b in 0..q {
                let mut goal = rest[at];
                if let Some(Fed { factor, carried, values }) = &fed {
                    let mut sum = [0.0; LANES];
                    for (u, carried) in coefficients[b * p + lo..][..=b].iter().zip(&carried[k * q..]) {
                        for l in 0..LANES {
                            sum[l] += u[l] * carried[l];
                        }
                    }
                    for (f, values) in factor[k * BLOCK..][..k].iter().zip(values.chunks_exact(q)) {
                        for l in 0..LANES {
                            sum[l] += f * values[b][l];
                        }
                    }
                    for l in 0..LANES {
                        goal[l] -= sum[l];
                    }
                }
                for l in 0..LANES {
                    goals[b][l] = goal[l] * roots[b][l];
                }
            }
            z[at] = choose(&goals[..q], table, costs);
            if let Some(Fed { values, .. }) = &mut fed {
                let chosen = suffix(&z[at], q, lo, p, coefficients);
                values[k * q..][..q].copy_from_slice(&chosen[..q]);
            }
        }
    }
}

struct Sweep<'a> {
    columns: Columns<'a>,
    before: &'a [Group],
    h: &'a Square,
    xh: &'a [Lane],
    /// H̃ times the planes, this block, this group of lanes.
    ph: &'a [Lane],
    /// Of each level's value, this block, this group of lanes.
    changes: &'a mut [Lane],
}

impl WithSimd for Sweep<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { columns, before, h, xh, ph, changes } = self;
        let Columns { range, s, q, lo, p, z, coefficients, table, roots, costs } = columns;
        for j in range.clone() {
            let (at, k) = (j * SUBS + s, j - range.start);
            let row = h.row(j, j / BLOCK);
            let inverse = if row[k] > 0.0 { 1.0 / row[k] } else { 0.0 };
            let old = z[at];
            let values = suffix(&old, q, lo, p, coefficients);
            let mut goals = [[0.0; LANES]; MAX_JOINT];
            for b in 0..q {
                // The gradient of this level's error with respect to its value here.
                let u = &coefficients[b * p..][..p];
                let mut g = [0.0f32; LANES];
                for other in before {
                    for i in 0..other.q {
                        let (u, ph) = (&u[other.lo + i], &other.ph[at * other.q + i]);
                        for l in 0..LANES {
                            g[l] += u[l] * ph[l];
                        }
                    }
                }
                for (u, ph) in u[lo..][..=b].iter().zip(&ph[k * q..]) {
                    for l in 0..LANES {
                        g[l] += u[l] * ph[l];
                    }
                }
                for (f, changes) in row[..k].iter().zip(changes.chunks_exact(q)) {
                    for l in 0..LANES {
                        g[l] += f * changes[b][l];
                    }
                }
                for l in 0..LANES {
                    goals[b][l] = (values[b][l] - (g[l] - xh[at][l]) * inverse) * roots[b][l];
                }
            }
            z[at] = choose(&goals[..q], table, costs);
            let after = suffix(&z[at], q, lo, p, coefficients);
            for (b, change) in changes[k * q..][..q].iter_mut().enumerate() {
                for l in 0..LANES {
                    change[l] = after[b][l] - values[b][l];
                }
            }
        }
    }
}

/// Sums over `m` columns of products of planes (`BLOCK` columns each) with H̃ P and of x with H̃ P; `q x (lo + q + 1)` sums.
struct Products<'a> {
    m: usize,
    q: usize,
    lo: usize,
    plane: &'a [Lane],
    products: &'a [Lane],
    x: &'a [Lane],
    sums: &'a mut [Lane],
}

impl WithSimd for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { m, q, lo, plane, products, x, sums } = self;
        let width = lo + q + 1;
        for i in 0..q {
            let ph = &products[i * BLOCK..][..m];
            for k in (0..=lo + i).chain([lo + q]) {
                let other = if k < lo + q { &plane[k * BLOCK..][..m] } else { &x[..m] };
                let mut sum = [0.0f32; LANES];
                for (a, b) in ph.iter().zip(other) {
                    for l in 0..LANES {
                        sum[l] += a[l] * b[l];
                    }
                }
                sums[i * width + k] = sum;
            }
        }
    }
}

/// Σ_i u_i σ_i over all planes of the groups that `u` has coefficients for.
#[inline(always)]
fn value(groups: &[Group], u: &[Lane], at: usize) -> Lane {
    let mut out = [0.0; LANES];
    for group in groups {
        for i in 0..group.q.min(u.len().saturating_sub(group.lo)) {
            let sign = signs(&group.z[at], group.q, i);
            for l in 0..LANES {
                out[l] += u[group.lo + i][l] * sign[l];
            }
        }
    }
    out
}

/// What the planes of a group (from plane `lo` of `p`) add to each of its levels.
#[inline(always)]
fn suffix(z: &[u8; LANES], q: usize, lo: usize, p: usize, coefficients: &[Lane]) -> [Lane; MAX_JOINT] {
    let mut out = [[0.0; LANES]; MAX_JOINT];
    for i in 0..q {
        let sign = signs(z, q, i);
        for b in i..q {
            let u = &coefficients[b * p + lo + i];
            for l in 0..LANES {
                out[b][l] += u[l] * sign[l];
            }
        }
    }
    out
}
