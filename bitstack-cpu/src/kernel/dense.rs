//! Dense products: of one token or two row by row, of many from tiles of W widened in the cache.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{factors, tile};
use crate::Isa;

/// Elements of an ordinary matrix, row-major, in the type they are stored in. All widen to f32 exactly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DenseValues<'a> {
    /// 32-bit.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// The upper half of an f32.
    Bf16(&'a [bf16]),
}

impl DenseValues<'_> {
    /// Number of elements.
    pub fn len(self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::F16(w) => w.len(),
            Self::Bf16(w) => w.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    pub(crate) fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Self::F32(w) => (Self::F32(&w[..at]), Self::F32(&w[at..])),
            Self::F16(w) => (Self::F16(&w[..at]), Self::F16(&w[at..])),
            Self::Bf16(w) => (Self::Bf16(&w[..at]), Self::Bf16(&w[at..])),
        }
    }

    /// The values from `start` on, as many as `out` has, as f32.
    fn widen(self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Self::F32(w) => out.copy_from_slice(&w[range]),
            Self::F16(w) => w[range].convert_to_f32_slice(out),
            Self::Bf16(w) => {
                for (out, w) in out.iter_mut().zip(&w[range]) {
                    *out = f32::from_bits(u32::from(w.to_bits()) << 16);
                }
            }
        }
    }
}

/// Rows of a task of a product from tiles.
pub(crate) const TASK_ROWS: usize = 4 * tile::ROWS;

/// Tokens (tokens x cols, row-major) side by side in panels: `panels x columns`, the last one filled up with zeros.
pub(crate) fn panels(x: &[f32], cols: usize) -> Vec<[f32; tile::PANEL]> {
    let tokens = x.len() / cols;
    let mut panels = vec![[0.0; tile::PANEL]; tokens.div_ceil(tile::PANEL) * cols];
    for (t, x) in x.chunks_exact(cols).enumerate() {
        for (panel, &x) in panels[t / tile::PANEL * cols..].iter_mut().zip(x) {
            panel[t % tile::PANEL] = x;
        }
    }
    panels
}

/// y = x Wᵀ, a tile of W at a time. `w` is rows of `cols` values, `panels` as [`panels`] makes them; `y` has a slice for each token.
pub(crate) fn tiles(isa: Isa, w: DenseValues<'_>, cols: usize, panels: &[[f32; tile::PANEL]], y: &mut [&mut [f32]]) {
    let rows = w.len() / cols;
    let mut tile: tile::Tile = [[0.0; tile::COLS]; tile::ROWS];
    for first_row in (0..rows).step_by(tile::ROWS) {
        let n_rows = tile::ROWS.min(rows - first_row);
        let mut sums = vec![[[0.0; tile::PANEL]; tile::ROWS]; panels.len() / cols];
        for first_col in (0..cols).step_by(tile::COLS) {
            let n = tile::COLS.min(cols - first_col);
            for (r, tile) in tile[..n_rows].iter_mut().enumerate() {
                w.widen((first_row + r) * cols + first_col, &mut tile[..n]);
            }
            for (panel, sums) in panels.chunks_exact(cols).zip(&mut sums) {
                tile::multiply(isa, &tile, &panel[first_col..][..n], sums);
            }
        }
        for (t, y) in y.iter_mut().enumerate() {
            for (y, sums) in y[first_row..].iter_mut().zip(&sums[t / tile::PANEL]) {
                *y = sums[t % tile::PANEL];
            }
        }
    }
}

/// y = x Wᵀ for one token or two: row after row, so that the processor sees one stream, each row widened once for both.
///
/// `w` is rows of as many values as each `x` has; each `y` has as many values as there are rows.
pub(crate) fn rows<const V: usize>(isa: Isa, w: DenseValues<'_>, x: [&[f32]; V], y: [&mut [f32]; V]) {
    assert!(isa.is_available());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => unsafe { rows_avx512(w, x, y) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above says that the CPU has them.
        Isa::Avx2 => unsafe { rows_avx2(w, x, y) },
        // NEON is there wherever the portable code is compiled for 64-bit ARM.
        Isa::Neon => rows_portable::<V, true>(w, x, y),
        _ => rows_portable::<V, false>(w, x, y),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn rows_avx512<const V: usize>(w: DenseValues<'_>, x: [&[f32]; V], y: [&mut [f32]; V]) {
    match w {
        DenseValues::F16(w) => products::<_, V, true>(w, x, y, F16c::new()),
        w => rows_portable::<V, true>(w, x, y),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn rows_avx2<const V: usize>(w: DenseValues<'_>, x: [&[f32]; V], y: [&mut [f32]; V]) {
    match w {
        DenseValues::F16(w) => products::<_, V, true>(w, x, y, F16c::new()),
        w => rows_portable::<V, true>(w, x, y),
    }
}

/// In a form that compilers turn into vectors of every width.
#[inline(always)]
fn rows_portable<const V: usize, const FMA: bool>(w: DenseValues<'_>, x: [&[f32]; V], y: [&mut [f32]; V]) {
    match w {
        DenseValues::F32(w) => products::<_, V, FMA>(w, x, y, Portable),
        DenseValues::F16(w) => products::<_, V, FMA>(w, x, y, Portable),
        DenseValues::Bf16(w) => products::<_, V, FMA>(w, x, y, Portable),
    }
}

/// Values widened at once.
const WIDE: usize = 16;

/// A way to widen elements to f32, exactly.
trait Widen<T>: Copy {
    fn widen(self, w: &[T; WIDE]) -> [f32; WIDE];
}

/// Plain arithmetic.
#[derive(Clone, Copy)]
struct Portable;

impl Widen<f32> for Portable {
    #[inline(always)]
    fn widen(self, w: &[f32; WIDE]) -> [f32; WIDE] {
        *w
    }
}

impl Widen<bf16> for Portable {
    #[inline(always)]
    fn widen(self, w: &[bf16; WIDE]) -> [f32; WIDE] {
        let mut wide = [0.0; WIDE];
        for i in 0..WIDE {
            wide[i] = f32::from_bits(u32::from(w[i].to_bits()) << 16);
        }
        wide
    }
}

impl Widen<f16> for Portable {
    #[inline(always)]
    fn widen(self, w: &[f16; WIDE]) -> [f32; WIDE] {
        let mut wide = [0.0; WIDE];
        for i in 0..WIDE {
            // What is not finite stays so.
            let exponent = if w[i].to_bits() & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
            wide[i] = f32::from_bits(factors::widened(w[i]).to_bits() | exponent);
        }
        wide
    }
}

/// The instruction of that name.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct F16c(());

#[cfg(target_arch = "x86_64")]
impl F16c {
    /// Safe to call only where the instruction is there.
    #[target_feature(enable = "f16c")]
    #[inline]
    fn new() -> Self {
        Self(())
    }
}

#[cfg(target_arch = "x86_64")]
impl Widen<f16> for F16c {
    #[inline(always)]
    fn widen(self, w: &[f16; WIDE]) -> [f32; WIDE] {
        use std::arch::x86_64::*;
        let mut wide = [0.0; WIDE];
        for (w, wide) in w.as_chunks::<8>().0.iter().zip(wide.as_chunks_mut::<8>().0) {
            // SAFETY: the pointer must be valid for reading 16 bytes, at any alignment; it comes from a reference to 8 f16.
            let half = unsafe { _mm_loadu_si128(w.as_ptr().cast()) };
            // SAFETY: the only obligation is the target feature, and a value of this type is made only where it is there.
            let values = unsafe { _mm256_cvtph_ps(half) };
            // SAFETY: the pointer must be valid for writing 32 bytes, at any alignment; it comes from an exclusive reference to 8 f32.
            unsafe { _mm256_storeu_ps(wide.as_mut_ptr(), values) };
        }
        wide
    }
}

#[inline(always)]
fn products<T: Copy + Default, const V: usize, const FMA: bool>(
    w: &[T],
    x: [&[f32]; V],
    y: [&mut [f32]; V],
    widen: impl Widen<T>,
) {
    // Sums in eight registers of AVX2, enough for additions not to wait for one another.
    match V {
        1 => products_by::<T, V, 64, FMA>(w, x, y, widen),
        _ => products_by::<T, V, 32, FMA>(w, x, y, widen),
    }
}

#[inline(always)]
fn products_by<T: Copy + Default, const V: usize, const L: usize, const FMA: bool>(
    w: &[T],
    x: [&[f32]; V],
    y: [&mut [f32]; V],
    widen: impl Widen<T>,
) {
    let cols = x[0].len();
    let whole = cols / L * L;
    let mut x_rest = [[0.0; L]; V];
    for v in 0..V {
        x_rest[v][..cols - whole].copy_from_slice(&x[v][whole..]);
    }
    for (r, w) in w.chunks_exact(cols).enumerate() {
        let mut sums = [[0.0f32; L]; V];
        let (w, w_rest) = w.as_chunks::<L>();
        for (i, w) in w.iter().enumerate() {
            let mut parts = [&[0.0; L]; V];
            for v in 0..V {
                parts[v] = x[v][L * i..].first_chunk().expect("x is as long as a row");
            }
            add::<T, V, L, FMA>(&mut sums, w, parts, widen);
        }
        if !w_rest.is_empty() {
            let mut w = [T::default(); L];
            w[..w_rest.len()].copy_from_slice(w_rest);
            add::<T, V, L, FMA>(&mut sums, &w, x_rest.each_ref(), widen);
        }
        for v in 0..V {
            y[v][r] = total(sums[v]);
        }
    }
}

#[inline(always)]
fn add<T, const V: usize, const L: usize, const FMA: bool>(
    sums: &mut [[f32; L]; V],
    w: &[T; L],
    x: [&[f32; L]; V],
    widen: impl Widen<T>,
) {
    for (i, w) in w.as_chunks::<WIDE>().0.iter().enumerate() {
        let w = widen.widen(w);
        for v in 0..V {
            for j in 0..WIDE {
                let (x, sum) = (x[v][WIDE * i + j], &mut sums[v][WIDE * i + j]);
                *sum = if FMA { w[j].mul_add(x, *sum) } else { w[j] * x + *sum };
            }
        }
    }
}

/// The sum of all, in halves: as many steps as its length has bits.
#[inline(always)]
fn total<const L: usize>(mut sums: [f32; L]) -> f32 {
    let mut half = L / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}
