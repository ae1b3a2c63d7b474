use crate::{BasisRef, BlockRef, CoefficientsRef, CoreError, SPIKE_ROWS, Shape, SpikesRef};
use bitstack_pack::SignView;

/// One plane of a level: signs, the basis it uses, and where its coefficients are.
#[derive(Debug, Clone, Copy)]
pub struct Plane<'a> {
    /// The signs, `rows x cols`.
    pub signs: SignView<'a>,
    /// The basis, `rank x cols`, its own or shared.
    pub basis: BasisRef<'a>,
    /// The coefficients that hold this plane's, `rows x planes x rank`.
    pub coefficients: CoefficientsRef<'a>,
    /// Which plane of `coefficients`, from 0.
    pub plane: usize,
}

/// The spikes of a weight with the envelope that their values are in units of.
#[derive(Debug, Clone, Copy)]
pub struct LevelSpikes<'a> {
    /// The list.
    pub list: SpikesRef<'a>,
    /// The basis of block 1; its first row is meant.
    pub basis: BasisRef<'a>,
    /// The coefficients of block 1; those of its first plane and rank are meant.
    pub coefficients: CoefficientsRef<'a>,
}

impl LevelSpikes<'_> {
    /// The size of a unit in a row, without that of the column.
    pub fn row_unit(&self, row: usize) -> f32 {
        self.coefficients.get(row, 0, 0)
    }
}

/// A weight at a level: its planes with the bases and coefficients valid there, and the plain arithmetic on them.
///
/// This is the oracle that kernels are checked against, written to be obviously right; [`Level::reconstruct_rows`] is also quick
/// enough to rebuild a model with.
#[derive(Debug, Clone)]
pub struct Level<'a> {
    shape: Shape,
    planes: Vec<Plane<'a>>,
    spikes: Option<LevelSpikes<'a>>,
}

impl<'a> Level<'a> {
    /// Puts the first blocks of a weight together; the level is their number.
    ///
    /// # Errors
    /// When a block does not fit the shape or the blocks before it; [`CoreError::NoSuchLevel`] when there is none.
    pub fn new(shape: Shape, blocks: impl IntoIterator<Item = BlockRef<'a>>) -> Result<Self, CoreError> {
        let mut planes: Vec<Plane<'a>> = Vec::new();
        let (mut first, mut spikes) = (None, None);
        for block in blocks {
            block.check(shape, planes.len() + 1, first)?;
            let basis = block.basis.or(planes.last().map(|p| p.basis)).ok_or(CoreError::NoBasis)?;
            let coefficients = block.coefficients.with_first(*first.get_or_insert(block.coefficients));
            planes.push(Plane { signs: block.signs, basis, coefficients, plane: 0 });
            if let Some(list) = block.spikes {
                spikes = Some(LevelSpikes { list, basis, coefficients });
            }
            if coefficients.planes() > 1 {
                for (plane, p) in planes.iter_mut().enumerate() {
                    (p.coefficients, p.plane) = (coefficients, plane);
                }
            }
        }
        if planes.is_empty() {
            return Err(CoreError::NoSuchLevel { level: 0, blocks: 0 });
        }
        Ok(Self { shape, planes, spikes })
    }

    /// The weight's shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The planes, first to last.
    pub fn planes(&self) -> &[Plane<'a>] {
        &self.planes
    }

    /// The spikes P, added at every level.
    pub fn spikes(&self) -> Option<LevelSpikes<'a>> {
        self.spikes
    }

    /// Rebuilds rows `first_row..` of W in f32: `out` is `n x cols`, row-major, and overwritten. Sums run over rank, then planes;
    /// then come the spikes.
    ///
    /// # Errors
    /// [`CoreError::Mismatch`] when `out` is not whole rows, or more rows than there are.
    pub fn reconstruct_rows(&self, first_row: usize, out: &mut [f32]) -> Result<(), CoreError> {
        let (rows, cols) = (self.shape.rows(), self.shape.cols());
        let n = out.len() / cols;
        if n * cols != out.len() {
            return Err(CoreError::Mismatch {
                what: "the length of rebuilt rows",
                expected: n * cols,
                actual: out.len(),
            });
        }
        if first_row > rows || n > rows - first_row {
            let expected = rows.saturating_sub(first_row);
            return Err(CoreError::Mismatch { what: "the number of rows left to rebuild", expected, actual: n });
        }
        let bases = self.bases_f32();
        let mut magnitude = vec![0.0f32; cols];
        for (r, out) in (first_row..).zip(out.chunks_exact_mut(cols)) {
            out.fill(0.0);
            for (p, &basis) in self.planes.iter().zip(&bases.of_plane) {
                let v = &bases.values[basis];
                magnitude.fill(0.0);
                for (k, v) in v.chunks_exact(cols).enumerate() {
                    let u = p.coefficients.get(r, p.plane, k);
                    for (m, &v) in magnitude.iter_mut().zip(v) {
                        *m += u * v;
                    }
                }
                p.signs.apply_row(r, &mut magnitude);
                for (o, &m) in out.iter_mut().zip(&magnitude) {
                    *o += m;
                }
            }
        }
        self.add_spikes(first_row, out);
        Ok(())
    }

    /// Rebuilds one row of W as [`reconstruct_rows`](Self::reconstruct_rows) does, in memory that is given: `work` has room for `cols` values.
    /// For many rows the other is faster, which widens each basis once.
    ///
    /// # Errors
    /// [`CoreError::Mismatch`] when `out` or `work` has not `cols` values, or there is no such row.
    pub fn reconstruct_row(&self, row: usize, work: &mut [f32], out: &mut [f32]) -> Result<(), CoreError> {
        let (rows, cols) = (self.shape.rows(), self.shape.cols());
        for (what, len) in [("the length of a rebuilt row", out.len()), ("the room to rebuild a row in", work.len())] {
            if len != cols {
                return Err(CoreError::Mismatch { what, expected: cols, actual: len });
            }
        }
        if row >= rows {
            return Err(CoreError::Mismatch { what: "rows, to rebuild one of", expected: row + 1, actual: rows });
        }
        out.fill(0.0);
        for p in &self.planes {
            work.fill(0.0);
            for k in 0..p.basis.rank() {
                let u = p.coefficients.get(row, p.plane, k);
                work.iter_mut().enumerate().for_each(|(c, m)| *m += u * p.basis.get(k, c));
            }
            p.signs.apply_row(row, work);
            out.iter_mut().zip(&*work).for_each(|(o, &m)| *o += m);
        }
        self.add_spikes(row, out);
        Ok(())
    }

    /// Adds the spikes to whole rows from `first_row` on.
    fn add_spikes(&self, first_row: usize, out: &mut [f32]) {
        let cols = self.shape.cols();
        let n = out.len() / cols;
        if let Some(spikes) = self.spikes
            && n > 0
        {
            for tile in first_row / SPIKE_ROWS..=(first_row + n - 1) / SPIKE_ROWS {
                for (r, c, value) in spikes.list.entries(tile) {
                    if (first_row..first_row + n).contains(&r) {
                        out[(r - first_row) * cols + c] += value * (spikes.row_unit(r) * spikes.basis.get(0, c));
                    }
                }
            }
        }
    }

    /// Rebuilds W, `rows x cols`, row-major, in f32.
    pub fn reconstruct(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.n_elems()];
        self.reconstruct_rows(0, &mut out).expect("the buffer was made for this shape");
        out
    }

    /// [`reconstruct`](Self::reconstruct) as an array, `rows x cols`.
    #[cfg(feature = "ndarray")]
    pub fn reconstruct_array(&self) -> ndarray::Array2<f32> {
        let shape = (self.shape.rows(), self.shape.cols());
        ndarray::Array2::from_shape_vec(shape, self.reconstruct()).expect("as many values as the shape")
    }

    /// y = W x in f64, straight from the definition: every kernel's oracle. The stored values are exact in f64, so the only errors
    /// are those of f64 sums.
    ///
    /// # Errors
    /// [`CoreError::Mismatch`] when `x` has not `cols` values.
    pub fn matvec(&self, x: &[f32]) -> Result<Vec<f64>, CoreError> {
        let (rows, cols) = (self.shape.rows(), self.shape.cols());
        if x.len() != cols {
            return Err(CoreError::Mismatch { what: "the length of x", expected: cols, actual: x.len() });
        }
        let mut y = vec![0.0; rows];
        for p in &self.planes {
            for k in 0..p.basis.rank() {
                let z: Vec<f64> = (0..cols).map(|c| f64::from(p.basis.get(k, c)) * f64::from(x[c])).collect();
                for (r, y) in y.iter_mut().enumerate() {
                    let t: f64 = (0..cols).map(|c| f64::from(p.signs.get(r, c)) * z[c]).sum();
                    *y += f64::from(p.coefficients.get(r, p.plane, k)) * t;
                }
            }
        }
        if let Some(spikes) = self.spikes {
            for (r, c, value) in (0..spikes.list.n_tiles()).flat_map(|tile| spikes.list.entries(tile)) {
                let unit = f64::from(spikes.row_unit(r)) * f64::from(spikes.basis.get(0, c));
                y[r] += f64::from(value) * unit * f64::from(x[c]);
            }
        }
        Ok(y)
    }

    /// The bases in f32, each shared one once.
    fn bases_f32(&self) -> Bases {
        let mut seen: Vec<BasisRef<'a>> = Vec::new();
        let mut bases = Bases { values: Vec::new(), of_plane: Vec::with_capacity(self.planes.len()) };
        for p in &self.planes {
            // Planes that share a basis share it with the plane before.
            if !seen.last().is_some_and(|b| same_memory(*b, p.basis)) {
                let (rank, cols) = (p.basis.rank(), p.basis.cols());
                seen.push(p.basis);
                bases.values.push((0..rank * cols).map(|i| p.basis.get(i / cols, i % cols)).collect());
            }
            bases.of_plane.push(bases.values.len() - 1);
        }
        bases
    }
}

struct Bases {
    values: Vec<Vec<f32>>,
    of_plane: Vec<usize>,
}

fn same_memory(a: BasisRef<'_>, b: BasisRef<'_>) -> bool {
    use crate::ValuesRef::{F16, I8};
    match (a.values(), b.values()) {
        (F16(a), F16(b)) => std::ptr::eq(a, b),
        (I8 { codes: a, .. }, I8 { codes: b, .. }) => std::ptr::eq(a, b),
        _ => false,
    }
}
