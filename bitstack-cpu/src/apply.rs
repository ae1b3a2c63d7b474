//! The product: checks, what is prepared once per call, and the split into tiles of rows.

use crate::kernel::scalar;
use crate::{CpuError, Isa};
use bitstack_core::{BasisRef, CoefficientsRef, Level, ValuesRef};

/// Rows rebuilt together. A multiple of it starts every task.
const TILE_ROWS: usize = 16;

/// Columns rebuilt together: a tile of W is 16 KiB.
const TILE_COLS: usize = 256;

/// Tokens are padded to this many, the lanes of the widest register.
const LANES: usize = 16;

/// Tokens taken at once; more are taken in batches, so that the buffers stay small.
const BATCH: usize = 256;

/// Below this many products per plane (rank x tokens) each is summed straight from the bits, above W is rebuilt.
const FEW: usize = 8;

/// Bytes of signs that are worth a task of their own.
const TASK_BYTES: usize = 128 << 10;

/// Over how many threads a product runs. The result is the same, bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Threads {
    /// The calling thread only.
    One,
    /// The current rayon pool: that of the calling thread if it belongs to one, the global one otherwise.
    Pool,
}

/// Buffers for [`Kernel::apply`]. They only grow, so that a call allocates nothing once a product of its size has been made.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Which basis each plane uses.
    basis_of_plane: Vec<usize>,
    /// The bases, each once, as (plane that brings it) numbers.
    bases: Vec<usize>,
    /// Few products: z = v ⊙ x, `bases x rank x tokens x padded columns`.
    z: Vec<f32>,
    /// Many tokens: the bases in f32, `bases x rank x padded columns`.
    v: Vec<f32>,
    /// Many tokens: x, `panels x padded columns x LANES`.
    x: Vec<f32>,
    /// The product, `rows x padded tokens`.
    y: Vec<f32>,
}

/// Multiplies by weights straight from their packed signs, with the instructions of one [`Isa`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    isa: Isa,
}

impl Kernel {
    /// The kernels for the best instructions of the running CPU.
    pub fn detect() -> Self {
        Self { isa: Isa::detect() }
    }

    /// The kernels for `isa`; `None` when this CPU lacks it. For tests and benchmarks.
    pub fn with_isa(isa: Isa) -> Option<Self> {
        isa.is_available().then_some(Self { isa })
    }

    /// The instructions used.
    pub fn isa(self) -> Isa {
        self.isa
    }

    /// y = x W_bᵀ, from the packed signs: W_b is never in memory.
    ///
    /// # Shapes
    /// `x`: tokens x cols, row-major; `y`: tokens x rows, row-major, overwritten. The number of tokens is that of `x`; none is fine.
    /// Any rank, additive and refitted blocks, shared and own bases, both stored types of factors.
    ///
    /// # Errors
    /// [`CpuError::PartialToken`] and [`CpuError::OutputLength`] when the lengths do not fit the weight; `y` is untouched then.
    pub fn apply(
        &self,
        level: &Level<'_>,
        x: &[f32],
        y: &mut [f32],
        threads: Threads,
        scratch: &mut Scratch,
    ) -> Result<(), CpuError> {
        let (rows, cols) = (level.shape().rows(), level.shape().cols());
        let tokens = x.len() / cols;
        if tokens * cols != x.len() {
            return Err(CpuError::PartialToken { cols, len: x.len() });
        }
        // Saturating: a product that overflows is longer than any slice.
        let expected = tokens.saturating_mul(rows);
        if y.len() != expected {
            return Err(CpuError::OutputLength { tokens, rows, expected, actual: y.len() });
        }
        scratch.find_bases(level);
        for (x, y) in x.chunks(BATCH * cols).zip(y.chunks_mut(BATCH * rows)) {
            let tokens = x.len() / cols;
            if level.planes()[0].basis.rank() * tokens < FEW {
                few(level, x, y, tokens, threads, scratch);
            } else {
                many(level, x, y, tokens, threads, scratch);
            }
        }
        Ok(())
    }
}

impl Scratch {
    fn find_bases(&mut self, level: &Level<'_>) {
        self.basis_of_plane.clear();
        self.bases.clear();
        for (i, p) in level.planes().iter().enumerate() {
            // Planes that share a basis share it with the plane before.
            if i == 0 || !same_memory(level.planes()[i - 1].basis, p.basis) {
                self.bases.push(i);
            }
            self.basis_of_plane.push(self.bases.len() - 1);
        }
    }
}

fn same_memory(a: BasisRef<'_>, b: BasisRef<'_>) -> bool {
    match (a.values(), b.values()) {
        (ValuesRef::F16(a), ValuesRef::F16(b)) => std::ptr::eq(a, b),
        (ValuesRef::I8 { codes: a, .. }, ValuesRef::I8 { codes: b, .. }) => std::ptr::eq(a, b),
        _ => false,
    }
}

/// A buffer of at least `len` values, of any value.
fn grown<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

/// Row `k` of a basis in f32; `out` may be longer, and is filled up with zeros.
fn widen(basis: BasisRef<'_>, k: usize, out: &mut [f32]) {
    let cols = basis.cols();
    let (out, padding) = out.split_at_mut(cols);
    match basis.values() {
        ValuesRef::F16(values) => {
            for (o, v) in out.iter_mut().zip(&values[k * cols..]) {
                *o = v.to_f32();
            }
        }
        ValuesRef::I8 { codes, scales } => {
            let scale = scales[k].to_f32();
            for (o, &v) in out.iter_mut().zip(&codes[k * cols..]) {
                *o = f32::from(v) * scale;
            }
        }
    }
    padding.fill(0.0);
}

/// U[row, plane, k].
fn coefficient(u: CoefficientsRef<'_>, row: usize, plane: usize, k: usize) -> f32 {
    let vector = plane * u.rank() + k;
    let index = row * u.planes() * u.rank() + vector;
    match u.values() {
        ValuesRef::F16(values) => values[index].to_f32(),
        ValuesRef::I8 { codes, scales } => f32::from(codes[index]) * scales[vector].to_f32(),
    }
}

/// Calls `task(first_row, out)` for tiles of rows that together are all of them; `out` is `rows x width`.
fn split(
    first_row: usize,
    out: &mut [f32],
    width: usize,
    task_rows: usize,
    threads: Threads,
    task: &(impl Fn(usize, &mut [f32]) + Sync),
) {
    let rows = out.len() / width;
    if threads == Threads::One || rows <= task_rows {
        return task(first_row, out);
    }
    let half = (rows / 2).next_multiple_of(TILE_ROWS).min(rows);
    let (top, bottom) = out.split_at_mut(half * width);
    rayon::join(
        || split(first_row, top, width, task_rows, threads, task),
        || split(first_row + half, bottom, width, task_rows, threads, task),
    );
}

fn task_rows(level: &Level<'_>, factor: usize) -> usize {
    let row_bytes = level.shape().cols().div_ceil(8) * level.planes().len() * factor;
    (TASK_BYTES / row_bytes).next_multiple_of(TILE_ROWS).max(TILE_ROWS)
}

/// y[t, r] = Σ_plane Σ_k U[r, plane, k] · Σ_c S[r, c] z[k, t, c], with z[k, t] = V[k] ⊙ x[t] made once.
fn few(level: &Level<'_>, x: &[f32], y: &mut [f32], tokens: usize, threads: Threads, scratch: &mut Scratch) {
    let (rows, cols) = (level.shape().rows(), level.shape().cols());
    let (planes, rank) = (level.planes(), level.planes()[0].basis.rank());
    let padded = cols.next_multiple_of(8);
    let z = grown(&mut scratch.z, scratch.bases.len() * rank * tokens * padded);
    for (z, &plane) in z.chunks_exact_mut(rank * tokens * padded).zip(&scratch.bases) {
        for (k, z) in z.chunks_exact_mut(tokens * padded).enumerate() {
            let (first, rest) = z.split_at_mut(padded);
            widen(planes[plane].basis, k, first);
            for (z, x) in rest.chunks_exact_mut(padded).zip(x.chunks_exact(cols).skip(1)) {
                z.copy_from_slice(first);
                times(z, x);
            }
            times(first, &x[..cols]);
        }
    }
    let (z, basis_of_plane) = (&*z, &scratch.basis_of_plane);
    let task = |first_row: usize, out: &mut [f32]| {
        for (r, out) in (first_row..).zip(out.chunks_exact_mut(tokens)) {
            out.fill(0.0);
            for (p, &basis) in planes.iter().zip(basis_of_plane) {
                let z = &z[basis * rank * tokens * padded..][..rank * tokens * padded];
                let bits = p.signs.row(r);
                for (k, z) in z.chunks_exact(tokens * padded).enumerate() {
                    let u = coefficient(p.coefficients, r, p.plane, k);
                    for (o, z) in out.iter_mut().zip(z.chunks_exact(padded)) {
                        *o += u * scalar::signed_sum(bits, z);
                    }
                }
            }
        }
    };
    let task_rows = task_rows(level, rank * tokens);
    if tokens == 1 {
        return split(0, y, 1, task_rows, threads, &task);
    }
    let yt = grown(&mut scratch.y, rows * tokens);
    split(0, yt, tokens, task_rows, threads, &task);
    transpose(yt, tokens, y, rows);
}

fn times(z: &mut [f32], x: &[f32]) {
    for (z, x) in z.iter_mut().zip(x) {
        *z *= x;
    }
}

/// Rebuilds a tile of W at a time, in the cache, and multiplies all tokens by it.
fn many(level: &Level<'_>, x: &[f32], y: &mut [f32], tokens: usize, threads: Threads, scratch: &mut Scratch) {
    let (rows, cols) = (level.shape().rows(), level.shape().cols());
    let (planes, rank) = (level.planes(), level.planes()[0].basis.rank());
    let padded = cols.next_multiple_of(8);
    let width = tokens.next_multiple_of(LANES);

    let v = grown(&mut scratch.v, scratch.bases.len() * rank * padded);
    for (v, &plane) in v.chunks_exact_mut(rank * padded).zip(&scratch.bases) {
        for (k, v) in v.chunks_exact_mut(padded).enumerate() {
            widen(planes[plane].basis, k, v);
        }
    }
    let panels = grown(&mut scratch.x, width * padded);
    for (panel, x) in panels.chunks_exact_mut(padded * LANES).zip(x.chunks(LANES * cols)) {
        panel.fill(0.0);
        for (t, x) in x.chunks_exact(cols).enumerate() {
            for (lanes, &x) in panel.as_chunks_mut::<LANES>().0.iter_mut().zip(x) {
                lanes[t] = x;
            }
        }
    }

    let (v, panels, basis_of_plane) = (&*v, &*panels, &scratch.basis_of_plane);
    let task = |first_row: usize, out: &mut [f32]| {
        let mut w = [0.0f32; TILE_ROWS * TILE_COLS];
        for (first_row, out) in (first_row..).step_by(TILE_ROWS).zip(out.chunks_mut(TILE_ROWS * width)) {
            out.fill(0.0);
            for first_col in (0..padded).step_by(TILE_COLS) {
                let n = TILE_COLS.min(padded - first_col);
                for (r, w) in (first_row..).zip(w.chunks_exact_mut(TILE_COLS).take(out.len() / width)) {
                    let w = &mut w[..n];
                    w.fill(0.0);
                    for (p, &basis) in planes.iter().zip(basis_of_plane) {
                        let mut m = [0.0f32; TILE_COLS];
                        for k in 0..rank {
                            let u = coefficient(p.coefficients, r, p.plane, k);
                            let v = &v[(basis * rank + k) * padded + first_col..][..n];
                            for (m, v) in m.iter_mut().zip(v) {
                                *m += u * v;
                            }
                        }
                        scalar::add_signed(&p.signs.row(r)[first_col / 8..][..n / 8], &m[..n], w);
                    }
                }
                for (panel, t) in panels.chunks_exact(padded * LANES).zip((0..).step_by(LANES)) {
                    let x = &panel[first_col * LANES..][..n * LANES];
                    for (w, out) in w.chunks_exact(TILE_COLS).zip(out.chunks_exact_mut(width)) {
                        let out = out[t..].first_chunk_mut().expect("the width is a multiple of the lanes");
                        scalar::add_products(&w[..n], x.as_chunks().0, out);
                    }
                }
            }
        }
    };
    let yt = grown(&mut scratch.y, rows * width);
    split(0, yt, width, TILE_ROWS, threads, &task);
    transpose(yt, width, y, rows);
}

/// `y[t, r] = yt[r, t]`: `yt` is `rows x width`, `y` is `tokens x rows`.
fn transpose(yt: &[f32], width: usize, y: &mut [f32], rows: usize) {
    for (t, y) in y.chunks_exact_mut(rows).enumerate() {
        for (y, yt) in y.iter_mut().zip(yt.chunks_exact(width)) {
            *y = yt[t];
        }
    }
}
