//! The kernel of products, above the instructions: checks, what is prepared once per call, and the split into blocks of rows.

use crate::kernel::spikes::{self, Spiked};
use crate::kernel::tables::{self, Ahead, Part, Vector};
use crate::kernel::{Line, amx, factors, scalar, tile};
use crate::{CpuError, Isa, Threads};
use bitstack_core::{BasisRef, Level, Plane, SPIKE_ROWS, SignLayout, ValuesRef};

/// At most so many rows are a task. Their product is kept as `tokens x rows` until all are done, so that tasks write apart from each other.
const MAX_BLOCK_ROWS: usize = 256;

/// Tokens taken at once; more are taken in batches, so that the buffers stay small.
const BATCH: usize = 64;

/// Up to so many tokens the products of each are summed from the bits where only the portable code is left, above W is rebuilt.
const FEW: usize = 4;

/// What, where W is rebuilt, a plane, a plane and a column of its factors, and a token cost. Measured on Zen 4: only the ratios matter of all
/// costs here, and those only roughly.
const REBUILT_PLANE_COST: usize = 350;
const REBUILT_FACTOR_COST: usize = 40;
const REBUILT_TOKEN_COST: usize = 31;

/// What a plane times a vector (a token and a column of the factors) costs from tables. Rebuilding takes longer as well where registers are
/// narrower; for NEON this is not measured.
fn tables_cost(isa: Isa) -> usize {
    match isa {
        Isa::Avx512Vnni | Isa::Amx => 8,
        Isa::Avx512 => 18,
        _ => 11,
    }
}

/// What a plane times `vectors` vectors costs by tiles, in the same measure. From counts of instructions, not measured: sixteen rows times 64
/// columns take 8 cycles a vector from tables; 24 by tiles, whatever the vectors, where nothing overlaps, and 3 to 4 a vector.
fn tiles_cost(vectors: usize) -> usize {
    vectors.saturating_mul(4).saturating_add(40)
}

/// Whether products, at `cost` a plane, cost less than W rebuilt.
fn is_cheaper(level: &Level<'_>, tokens: usize, cost: usize) -> bool {
    let (planes, rank) = (level.planes().len(), level.planes()[0].basis.rank());
    let factors = REBUILT_PLANE_COST.saturating_add(rank.saturating_mul(REBUILT_FACTOR_COST));
    let rebuilt =
        planes.saturating_mul(factors).saturating_add(tokens.next_multiple_of(tile::PANEL) * REBUILT_TOKEN_COST);
    planes.saturating_mul(cost) <= rebuilt
}

/// Buffers for [`Kernel::apply`]. They only grow, so that a call allocates nothing once a product of its size has been made.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Which basis each plane uses.
    basis_of_plane: Vec<usize>,
    /// The first plane that uses each basis.
    plane_of_basis: Vec<usize>,
    /// The product of one row of a basis and a token.
    z_row: Vec<f32>,
    /// The tables of z = v ⊙ x: `bases x groups of vectors x passes`, and the value of one step of each vector and pass.
    tables: Vec<Line>,
    scales: Vec<f32>,
    /// The codes of z for tiles: `bases x passes x groups of vectors`. Their steps are `scales`.
    tile_codes: Vec<amx::Codes>,
    /// `bases x rank x tokens x padded columns`: z.
    z: Vec<f32>,
    /// `bases x rank x padded columns`: the bases.
    v: Vec<f32>,
    /// `panels x padded columns`: the tokens.
    x: Vec<[f32; tile::PANEL]>,
    /// What blocks of rows are made in.
    blocks: BlockScratch,
}

#[derive(Debug, Default)]
struct BlockScratch {
    /// The coefficients in f32: `blocks of rows x planes x rank x rows of the block`.
    u: Vec<f32>,
    /// The product: `blocks of rows x tokens x rows of the block`.
    y: Vec<f32>,
    /// What the spikes are multiplied with, and one row of it.
    spiked_z: Vec<f32>,
    spiked_row: Vec<f32>,
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

    /// The layout of signs that these kernels read fastest. Any other works as well.
    pub fn layout(self) -> SignLayout {
        if tables::has(self.isa) { SignLayout::Strips } else { SignLayout::Rows }
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
            let vectors = tokens.saturating_mul(level.planes()[0].basis.rank());
            let (by_tables, by_tiles) = (vectors.saturating_mul(tables_cost(self.isa)), tiles_cost(vectors));
            let done = (by_tiles < by_tables && is_cheaper(level, tokens, by_tiles))
                .then(|| amx::Tiles::of(self.isa))
                .flatten()
                .is_some_and(|tiles| tiled(tiles, level, x, y, tokens, threads, scratch))
                || (tables::has(self.isa)
                    && is_cheaper(level, tokens, by_tables)
                    && looked_up(self.isa, level, x, y, tokens, threads, scratch));
            if !done && tokens <= FEW {
                summed(level, x, y, tokens, threads, scratch);
            } else if !done {
                rebuilt(self.isa, level, x, y, tokens, threads, scratch);
            }
        }
        Ok(())
    }
}

impl Scratch {
    fn find_bases(&mut self, level: &Level<'_>) {
        self.basis_of_plane.clear();
        self.plane_of_basis.clear();
        for (i, p) in level.planes().iter().enumerate() {
            // Planes that share a basis share it with the plane before.
            if i == 0 || !same_memory(level.planes()[i - 1].basis, p.basis) {
                self.plane_of_basis.push(i);
            }
            self.basis_of_plane.push(self.plane_of_basis.len() - 1);
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

/// Row `k` of a basis in f32.
fn widen(basis: BasisRef<'_>, k: usize, out: &mut [f32]) {
    let row = k * basis.cols()..(k + 1) * basis.cols();
    match basis.values() {
        ValuesRef::F16(values) => {
            for (o, v) in out.iter_mut().zip(&values[row]) {
                *o = factors::widened(*v);
            }
        }
        ValuesRef::I8 { codes, scales } => {
            let scale = scales[k].to_f32();
            for (o, &v) in out.iter_mut().zip(&codes[row]) {
                *o = f32::from(v) * scale;
            }
        }
        ValuesRef::Scales(_) => unreachable!("a basis has values of its own"),
    }
}

/// The rows of one task: their first, how many, their part of the product, `tokens x rows`, and their coefficients, `planes x rank x rows`.
struct Block<'a> {
    first_row: usize,
    rows: usize,
    y: &'a mut [f32],
    u: &'a mut [f32],
}

impl<'a> Block<'a> {
    /// Widens the coefficients of all blocks and calls `task` for each.
    fn for_each(self, split: Split<'_>, task: &(impl Fn(Block<'_>) + Sync)) {
        if self.rows <= split.block_rows {
            factors::coefficients(split.isa, split.level.planes(), self.first_row, self.rows, self.u);
            return task(self);
        }
        let (top, bottom) = self.halves(split.block_rows);
        match split.threads {
            Threads::One => {
                top.for_each(split, task);
                bottom.for_each(split, task);
            }
            Threads::Pool => {
                rayon::join(|| top.for_each(split, task), || bottom.for_each(split, task));
            }
        }
    }

    fn halves(self, block_rows: usize) -> (Self, Self) {
        let Self { first_row, rows, y, u } = self;
        let half = (rows / 2).next_multiple_of(block_rows);
        let (top_y, bottom_y) = y.split_at_mut(y.len() / rows * half);
        let (top_u, bottom_u) = u.split_at_mut(u.len() / rows * half);
        (
            Self { first_row, rows: half, y: top_y, u: top_u },
            Self { first_row: first_row + half, rows: rows - half, y: bottom_y, u: bottom_u },
        )
    }
}

/// How a product is split into tasks.
#[derive(Clone, Copy)]
struct Split<'a> {
    isa: Isa,
    level: &'a Level<'a>,
    x: &'a [f32],
    block_rows: usize,
    threads: Threads,
}

/// Calls `task` for all blocks of rows of a product, which it adds up in a block that is zero before, and adds the spikes; `y` is
/// `tokens x rows`.
fn for_each_block(
    split: Split<'_>,
    y: &mut [f32],
    tokens: usize,
    scratch: &mut BlockScratch,
    task: impl Fn(Block<'_>) + Sync,
) {
    const { assert!(tables::GROUP_ROWS.is_multiple_of(SPIKE_ROWS) && MAX_BLOCK_ROWS.is_multiple_of(SPIKE_ROWS)) };
    let Split { isa, level, x, block_rows, .. } = split;
    let (rows, cols) = (level.shape().rows(), level.shape().cols());
    let BlockScratch { u, y: blocks, spiked_z, spiked_row } = scratch;
    let spiked = level.spikes().map(|s| {
        let z = grown(spiked_z, spikes::z_len(tokens, cols));
        Spiked::new(isa, s, x, grown(spiked_row, cols), z)
    });
    let task = |block: Block<'_>| {
        let Block { first_row, rows, y, u } = block;
        task(Block { first_row, rows, y, u });
        if let Some(spiked) = &spiked {
            spiked.add(isa, first_row, rows, y);
        }
    };
    let u = grown(u, rows * level.planes().len() * level.planes()[0].coefficients.rank());
    if tokens == 1 {
        y.fill(0.0);
        return Block { first_row: 0, rows, y, u }.for_each(split, &task);
    }
    let blocks = grown(blocks, rows * tokens);
    blocks.fill(0.0);
    Block { first_row: 0, rows, y: blocks, u }.for_each(split, &task);
    for (first_row, block) in (0..rows).step_by(block_rows).zip(blocks.chunks(block_rows * tokens)) {
        let n = block.len() / tokens;
        for (y, block) in y.chunks_exact_mut(rows).zip(block.chunks_exact(n)) {
            y[first_row..][..n].copy_from_slice(block);
        }
    }
}

/// Groups of 4 vectors, then one of 2 or 1; 3 are 4 of which one is zero. Yields the first vector and the size of the group.
fn groups(vectors: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..vectors).step_by(4).map(move |first| match vectors - first {
        n @ (1 | 2) => (first, n),
        _ => (first, 4),
    })
}

/// y[t, r] = Σ_plane Σ_k U[r, plane, k] · Σ_c S[r, c] z[k, t, c], with z[k, t] = V[k] ⊙ x[t], from tables of z. False, and nothing done,
/// when z cannot be put in tables.
fn looked_up(
    isa: Isa,
    level: &Level<'_>,
    x: &[f32],
    y: &mut [f32],
    tokens: usize,
    threads: Threads,
    scratch: &mut Scratch,
) -> bool {
    let cols = level.shape().cols();
    let (planes, rank) = (level.planes(), level.planes()[0].basis.rank());
    let n_lines = cols.div_ceil(tables::LINE_COLS);
    let n_vectors = rank * tokens;
    let (basis_lines, basis_scales) = groups(n_vectors).fold((0, 0), |(lines, scales), (_, n)| {
        let n_passes = n_lines.div_ceil(tables::pass_lines(n_lines, n));
        (lines + tables::table_lines(n_lines, n), scales + n_passes * n)
    });
    let n_bases = scratch.plane_of_basis.len();
    let all_tables = grown(&mut scratch.tables, n_bases * basis_lines);
    let all_scales = grown(&mut scratch.scales, n_bases * basis_scales);
    let z_row = grown(&mut scratch.z_row, n_lines * tables::LINE_COLS);
    z_row[cols..].fill(0.0);

    let each_basis = all_tables.chunks_exact_mut(basis_lines).zip(all_scales.chunks_exact_mut(basis_scales));
    for ((mut basis_tables, mut basis_scales), &plane) in each_basis.zip(&scratch.plane_of_basis) {
        for (first, n) in groups(n_vectors) {
            let pass_lines = tables::pass_lines(n_lines, n);
            let (group_tables, rest) = basis_tables.split_at_mut(tables::table_lines(n_lines, n));
            basis_tables = rest;
            let (group_scales, rest) = basis_scales.split_at_mut(n_lines.div_ceil(pass_lines) * n);
            basis_scales = rest;
            for i in 0..n {
                let (k, t) = ((first + i) / tokens, (first + i) % tokens);
                if k == rank {
                    z_row[..cols].fill(0.0);
                } else {
                    factors::products(isa, planes[plane].basis, k, &x[t * cols..][..cols], &mut z_row[..cols]);
                }
                let passes = group_tables.chunks_mut(tables::table_lines(pass_lines, n));
                let z_passes = z_row.chunks(pass_lines * tables::LINE_COLS);
                for ((tables, scales), z) in passes.zip(group_scales.chunks_exact_mut(n)).zip(z_passes) {
                    match tables::build(isa, z, tables, i, n) {
                        Some(scale) => scales[i] = scale,
                        None => return false,
                    }
                }
            }
        }
    }

    let (all_tables, all_scales, basis_of_plane) = (&*all_tables, &*all_scales, &scratch.basis_of_plane);
    let block_rows = rows_of_block(n_bases, planes.len());
    let split = Split { isa, level, x, block_rows, threads };
    for_each_block(split, y, tokens, &mut scratch.blocks, |block| {
        let Block { first_row, rows, y, u } = block;
        let (mut first_table, mut first_scale) = (0, 0);
        for (first, n) in groups(n_vectors) {
            let pass_lines = tables::pass_lines(n_lines, n);
            for first_line in (0..n_lines).step_by(pass_lines) {
                let lines = first_line..n_lines.min(first_line + pass_lines);
                let n_tables = tables::table_lines(lines.len(), n);
                for (i, (p, &basis)) in planes.iter().zip(basis_of_plane).enumerate() {
                    let tables = &all_tables[basis * basis_lines + first_table..][..n_tables];
                    let scales = &all_scales[basis * basis_scales + first_scale..][..n];
                    let mut vectors = [Vector { scale: 0.0, u: &u[..rows], y: 0 }; 4];
                    for (j, (v, &scale)) in vectors.iter_mut().zip(scales).enumerate() {
                        // A vector beyond the last is zero: it adds nothing.
                        let (k, t) = ((first + j) / tokens, (first + j) % tokens);
                        if k < rank {
                            *v = Vector { scale, u: &u[(i * rank + k) * rows..][..rows], y: t * rows };
                        }
                    }
                    let part = Part { signs: p.signs, rows: first_row..first_row + rows, lines: lines.clone() };
                    let ahead = after(planes, i, &part, n_lines, first_row + block_rows);
                    tables::pass(isa, &part, tables, &vectors[..n], y, ahead);
                }
                first_table += n_tables;
                first_scale += n;
            }
        }
    });
    true
}

/// As [`looked_up`], by products of tiles.
fn tiled(
    tiles: amx::Tiles,
    level: &Level<'_>,
    x: &[f32],
    y: &mut [f32],
    tokens: usize,
    threads: Threads,
    scratch: &mut Scratch,
) -> bool {
    let cols = level.shape().cols();
    let (planes, rank) = (level.planes(), level.planes()[0].basis.rank());
    let n_vectors = rank * tokens;
    // Groups of one size, but for the last.
    let group = n_vectors.div_ceil(n_vectors.div_ceil(amx::VECTORS));
    let n_groups = n_vectors.div_ceil(group);
    let passes = cols.div_ceil(amx::PASS_COLS);
    let n_bases = scratch.plane_of_basis.len();
    let all_codes = grown(&mut scratch.tile_codes, n_bases * passes * n_groups);
    let all_scales = grown(&mut scratch.scales, n_bases * passes * n_vectors);
    let z_row = grown(&mut scratch.z_row, passes * amx::PASS_COLS);
    z_row[cols..].fill(0.0);
    let each_basis = all_codes.chunks_exact_mut(passes * n_groups).zip(all_scales.chunks_exact_mut(passes * n_vectors));
    for ((codes, scales), &plane) in each_basis.zip(&scratch.plane_of_basis) {
        for k in 0..rank {
            for (t, x) in x.chunks_exact(cols).enumerate() {
                factors::products(tiles.isa(), planes[plane].basis, k, x, &mut z_row[..cols]);
                let vector = k * tokens + t;
                for (pass, z) in z_row.as_chunks::<{ amx::PASS_COLS }>().0.iter().enumerate() {
                    match tiles.encode(z, &mut codes[pass * n_groups + vector / group], vector % group) {
                        Some(scale) => scales[pass * n_vectors + vector] = scale,
                        None => return false,
                    }
                }
            }
        }
    }

    let (all_codes, all_scales, basis_of_plane) = (&*all_codes, &*all_scales, &scratch.basis_of_plane);
    let n_lines = cols.div_ceil(tables::LINE_COLS);
    let block_rows = rows_of_block(n_bases, planes.len());
    let split = Split { isa: tiles.isa(), level, x, block_rows, threads };
    for_each_block(split, y, tokens, &mut scratch.blocks, |block| {
        let Block { first_row, rows, y, u } = block;
        let mut tiles = tiles.configure(group);
        for (pass, first_line) in (0..n_lines).step_by(amx::PASS_LINES).enumerate() {
            let lines = first_line..n_lines.min(first_line + amx::PASS_LINES);
            for (i, (p, &basis)) in planes.iter().zip(basis_of_plane).enumerate() {
                let at = basis * passes + pass;
                let (codes, scales) = (&all_codes[at * n_groups..][..n_groups], &all_scales[at * n_vectors..]);
                let vector = |v: usize| {
                    let (k, t) = (v / tokens, v % tokens);
                    Vector { scale: scales[v], u: &u[(i * rank + k) * rows..][..rows], y: t * rows }
                };
                let part = Part { signs: p.signs, rows: first_row..first_row + rows, lines: lines.clone() };
                let ahead = after(planes, i, &part, n_lines, first_row + block_rows);
                tiles.pass(&part, codes, n_vectors, vector, y, ahead);
            }
        }
    });
    true
}

/// Rows of a task. What z was made into comes into the first-level cache once for all planes of a task that share a basis.
fn rows_of_block(n_bases: usize, n_planes: usize) -> usize {
    (MAX_BLOCK_ROWS * n_bases / n_planes).next_multiple_of(tables::GROUP_ROWS).min(MAX_BLOCK_ROWS)
}

/// What comes after a part of plane `i`: that of the next plane, the next lines, or the next task.
fn after(planes: &[Plane<'_>], i: usize, part: &Part<'_>, n_lines: usize, next_row: usize) -> Ahead {
    match planes.get(i + 1) {
        Some(next) => Ahead::new(next.signs, part.rows.start, part.lines.start),
        None if part.lines.end < n_lines => Ahead::new(planes[0].signs, part.rows.start, part.lines.end),
        None => Ahead::new(planes[0].signs, next_row, 0),
    }
}

/// y[t, r] = Σ_plane Σ_k U[r, plane, k] · Σ_c S[r, c] z[k, t, c], with z[k, t] = V[k] ⊙ x[t] made once, in f32.
fn summed(level: &Level<'_>, x: &[f32], y: &mut [f32], tokens: usize, threads: Threads, scratch: &mut Scratch) {
    let cols = level.shape().cols();
    let (planes, rank) = (level.planes(), level.planes()[0].basis.rank());
    let padded = cols.next_multiple_of(8);
    let basis_values = rank * tokens * padded;
    let z = grown(&mut scratch.z, scratch.plane_of_basis.len() * basis_values);
    for (z, &plane) in z.chunks_exact_mut(basis_values).zip(&scratch.plane_of_basis) {
        for (k, z) in z.chunks_exact_mut(tokens * padded).enumerate() {
            for (z, x) in z.chunks_exact_mut(padded).zip(x.chunks_exact(cols)) {
                z[cols..].fill(0.0);
                factors::products(Isa::Scalar, planes[plane].basis, k, x, &mut z[..cols]);
            }
        }
    }
    let (z, basis_of_plane) = (&*z, &scratch.basis_of_plane);
    let split = Split { isa: Isa::Scalar, level, x, block_rows: MAX_BLOCK_ROWS, threads };
    for_each_block(split, y, tokens, &mut scratch.blocks, |block| {
        let Block { first_row, rows, y, u } = block;
        for (i, (p, &basis)) in planes.iter().zip(basis_of_plane).enumerate() {
            let z = &z[basis * basis_values..][..basis_values];
            for r in 0..rows {
                let bits = p.signs.row(first_row + r);
                for (k, z) in z.chunks_exact(tokens * padded).enumerate() {
                    let u = u[(i * rank + k) * rows + r];
                    for (t, z) in z.chunks_exact(padded).enumerate() {
                        y[t * rows + r] += u * scalar::signed_sum(&bits, z);
                    }
                }
            }
        }
    });
}

/// Rebuilds a tile of W at a time, in the cache, and multiplies all tokens by it.
fn rebuilt(
    isa: Isa,
    level: &Level<'_>,
    x: &[f32],
    y: &mut [f32],
    tokens: usize,
    threads: Threads,
    scratch: &mut Scratch,
) {
    let cols = level.shape().cols();
    let (planes, rank) = (level.planes(), level.planes()[0].basis.rank());
    let padded = cols.next_multiple_of(tile::STRIP);
    // Rows of a basis a power of two apart would fall on the same few lines of the cache.
    let v_stride = padded + tile::STRIP;
    let width = tokens.next_multiple_of(tile::PANEL);

    let v = grown(&mut scratch.v, scratch.plane_of_basis.len() * rank * v_stride);
    for (v, &plane) in v.chunks_exact_mut(rank * v_stride).zip(&scratch.plane_of_basis) {
        for (k, v) in v.chunks_exact_mut(v_stride).enumerate() {
            v[cols..].fill(0.0);
            widen(planes[plane].basis, k, &mut v[..cols]);
        }
    }
    let panels = grown(&mut scratch.x, width / tile::PANEL * padded);
    for (panel, x) in panels.chunks_exact_mut(padded).zip(x.chunks(tile::PANEL * cols)) {
        panel.fill([0.0; tile::PANEL]);
        for (t, x) in x.chunks_exact(cols).enumerate() {
            for (tokens, &x) in panel.iter_mut().zip(x) {
                tokens[t] = x;
            }
        }
    }

    let (v, panels, basis_of_plane) = (&*v, &*panels, &scratch.basis_of_plane);
    let split = Split { isa, level, x, block_rows: MAX_BLOCK_ROWS, threads };
    for_each_block(split, y, tokens, &mut scratch.blocks, |block| {
        let Block { first_row, rows, y, u } = block;
        let mut w: tile::Tile = [[0.0; tile::COLS]; tile::ROWS];
        for first_r in (0..rows).step_by(tile::ROWS) {
            let tile_rows = tile::ROWS.min(rows - first_r);
            let mut sums = [[[0.0; tile::PANEL]; tile::ROWS]; BATCH.div_ceil(tile::PANEL)];
            for first_col in (0..cols).step_by(tile::COLS) {
                let n = tile::COLS.min(cols - first_col);
                for (r, w) in (first_r..).zip(&mut w[..tile_rows]) {
                    w.fill(0.0);
                    for (i, (p, &basis)) in planes.iter().zip(basis_of_plane).enumerate() {
                        let mut bits = [0; tile::COLS / 8];
                        let bits = &mut bits[..n.div_ceil(8)];
                        p.signs.copy_row(first_row + r, first_col / 8, bits);
                        let plane = tile::PlaneRow {
                            bits,
                            u: &u[i * rank * rows + r..],
                            u_stride: rows,
                            v: &v[basis * rank * v_stride + first_col..],
                            v_stride,
                            rank,
                        };
                        tile::add_plane(isa, plane, w);
                    }
                }
                for (panel, sums) in panels.chunks_exact(padded).zip(&mut sums) {
                    tile::multiply(isa, &w, &panel[first_col..][..n], sums);
                }
            }
            for (t, y) in y.chunks_exact_mut(rows).enumerate() {
                let sums = &sums[t / tile::PANEL];
                for (y, sums) in y[first_r..][..tile_rows].iter_mut().zip(sums) {
                    *y = sums[t % tile::PANEL];
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use bitstack_core::{Basis, Block, Coefficients, Shape, SignMatrix, Spike, Spikes, Values, WeightStack, f16};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// Blocks with a basis each, or with that of the first, and a spike for forty weights.
    fn stack(rng: &mut StdRng, rows: usize, cols: usize, rank: usize, blocks: usize) -> WeightStack {
        let shape = Shape::new(rows, cols).unwrap();
        let sizes = std::array::from_fn(|i| f16::from_f32((i + 1) as f32 / 4.0));
        let entries: Vec<Spike> = (0..rows * cols / 40 + 2)
            .map(|_| Spike {
                row: rng.random_range(0..rows),
                col: rng.random_range(0..cols),
                size: rng.random_range(1..16),
            })
            .collect();
        let mut halves = |n: usize| Values::F16((0..n).map(|_| f16::from_f32(rng.random_range(-1.0..1.0))).collect());
        let mut stack = WeightStack::new(shape);
        for number in 0..blocks {
            let own_basis = number == 0 || rank > 1;
            let Values::F16(signs) = halves(rows * cols) else { unreachable!("made so") };
            let signs: Vec<f32> = signs.into_iter().map(f16::to_f32).collect();
            let block = Block {
                signs: SignMatrix::from_f32(rows, cols, &signs).unwrap(),
                basis: own_basis.then(|| Basis::new(rank, cols, halves(rank * cols)).unwrap()),
                coefficients: Coefficients::new(rows, 1, rank, halves(rows * rank)).unwrap(),
                spikes: (number == 0).then(|| Spikes::encode(shape, sizes, &entries).unwrap()),
            };
            stack.push(block).unwrap();
        }
        stack
    }

    #[test]
    #[expect(clippy::print_stderr, reason = "says what does not run")]
    fn products_of_tiles_equal_the_definition_with_and_without_their_instructions() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut scratch = Scratch::default();
        if amx::Tiles::of(Isa::Amx).is_none() {
            eprintln!("skipped: this CPU has no {}, only plain loops in its place", Isa::Amx);
        }
        for (rows, cols, rank, tokens, blocks) in [
            (1, 1, 1, 1, 1),
            (15, 7, 1, 2, 2),
            (16, 8, 2, 8, 1),
            (17, 65, 3, 5, 2),
            (31, 511, 1, 16, 3),
            (32, 512, 16, 1, 2),
            (33, 513, 16, 2, 2),
            (65, 1031, 1, 17, 3),
            (300, 600, 1, 33, 1),
        ] {
            let stack = stack(&mut rng, rows, cols, rank, blocks);
            let level = stack.level(stack.top_level()).unwrap();
            let mut x: Vec<f32> = (0..tokens * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
            // Some columns of one token far above the rest.
            x[..cols].iter_mut().step_by(200).for_each(|x| *x *= 50.0);
            let expected: Vec<f64> = x.chunks(cols).flat_map(|x| level.matvec(x).unwrap()).collect();
            scratch.find_bases(&level);
            for tiles in [Some(amx::Tiles::Plain), amx::Tiles::of(Isa::Amx)].into_iter().flatten() {
                let what = format!("{rows} x {cols}, rank {rank}, {tokens} tokens, {tiles:?}");
                let mut y = vec![f32::NAN; tokens * rows];
                assert!(tiled(tiles, &level, &x, &mut y, tokens, Threads::One, &mut scratch), "{what}");
                // Codes are within half of 1/32639 of the largest |z| of 512 columns; of a token's |v x| <= 50 or 1, times |u| <= 1, at random signs:
                // the errors of sqrt(blocks · rank · cols) of them add up, here to six times their deviation. Sums of spikes in f32
                // are off by much less: by 10⁻⁶ of some hundreds, where x is 50.
                for (t, (y, expected)) in y.chunks(rows).zip(expected.chunks(rows)).enumerate() {
                    let largest = if t == 0 { 50.0 } else { 1.0 };
                    let deviation = largest / 32639.0 / 12.0f64.sqrt() * ((blocks * rank * cols) as f64).sqrt();
                    for (y, expected) in y.iter().zip(expected) {
                        let error = (f64::from(*y) - expected).abs();
                        assert!(error <= 6.0 * deviation + 1e-5, "{what}, token {t}: {y}, not {expected}");
                    }
                }
                let mut pooled = vec![f32::NAN; tokens * rows];
                assert!(tiled(tiles, &level, &x, &mut pooled, tokens, Threads::Pool, &mut scratch), "{what}");
                assert!(y.iter().zip(&pooled).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}: pool");
                let last = std::mem::replace(&mut x[cols - 1], f32::NAN);
                assert!(!tiled(tiles, &level, &x, &mut pooled, tokens, Threads::One, &mut scratch), "{what}: NaN");
                x[cols - 1] = last;
            }
        }
    }
}
