//! Dense products: of a few tokens, and of many to measure against, as quick as this crate knows to make them.

use half::{bf16, f16};
use rayon::prelude::*;

use super::{factors, tile};
use crate::{DenseValues, Isa, Threads};

/// Rows of a task.
const BLOCK_ROWS: usize = 4 * tile::ROWS;

/// x, laid out for dense products.
pub(crate) struct Product {
    rows: usize,
    cols: usize,
    tokens: usize,
    isa: Isa,
    x: Vec<f32>,
    /// `panels of tokens x columns`.
    panels: Vec<[f32; tile::PANEL]>,
}

impl Product {
    pub(crate) fn new(rows: usize, cols: usize, x: &[f32], isa: Isa) -> Self {
        assert!(isa.is_available() && cols > 0 && x.len().is_multiple_of(cols));
        let tokens = x.len() / cols;
        let mut panels = vec![[0.0; tile::PANEL]; tokens.div_ceil(tile::PANEL) * cols];
        for (t, x) in x.chunks_exact(cols).enumerate() {
            for (panel, &x) in panels[t / tile::PANEL * cols..].iter_mut().zip(x) {
                panel[t % tile::PANEL] = x;
            }
        }
        Self { rows, cols, tokens, isa, x: x.to_vec(), panels }
    }

    /// y = W x, with W in bf16, `rows x cols`; `y` is `blocks of BLOCK_ROWS rows x tokens x rows of the block`.
    pub(crate) fn run(&self, w: &[u16], y: &mut [f32], threads: Threads) {
        assert!(w.len() == self.rows * self.cols && y.len() == self.rows * self.tokens);
        let task = |(y, w): (&mut [f32], &[u16])| match self.tokens {
            1 => rows(self.isa, DenseValues::Bf16(bytemuck::cast_slice(w)), [&self.x], [y]),
            _ => self.block(w, y),
        };
        let (y_len, w_len) = (BLOCK_ROWS * self.tokens, BLOCK_ROWS * self.cols);
        match threads {
            Threads::One => y.chunks_mut(y_len).zip(w.chunks(w_len)).for_each(task),
            Threads::Pool => y.par_chunks_mut(y_len).zip(w.par_chunks(w_len)).for_each(task),
        }
    }

    fn block(&self, w: &[u16], y: &mut [f32]) {
        let rows = w.len() / self.cols;
        let mut tile: tile::Tile = [[0.0; tile::COLS]; tile::ROWS];
        for (first_row, w) in (0..).step_by(tile::ROWS).zip(w.chunks(tile::ROWS * self.cols)) {
            let mut sums = vec![[[0.0; tile::PANEL]; tile::ROWS]; self.tokens.div_ceil(tile::PANEL)];
            for first_col in (0..self.cols).step_by(tile::COLS) {
                let n = tile::COLS.min(self.cols - first_col);
                for (tile, w) in tile.iter_mut().zip(w.chunks_exact(self.cols)) {
                    for (tile, &w) in tile.iter_mut().zip(&w[first_col..][..n]) {
                        *tile = f32::from_bits(u32::from(w) << 16);
                    }
                }
                for (panel, sums) in self.panels.chunks_exact(self.cols).zip(&mut sums) {
                    tile::multiply(self.isa, &tile, &panel[first_col..][..n], sums);
                }
            }
            for (t, y) in y.chunks_exact_mut(rows).enumerate() {
                for (y, sums) in y[first_row..].iter_mut().zip(&sums[t / tile::PANEL]) {
                    *y = sums[t % tile::PANEL];
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dense_products_equal_the_definition() {
        let (rows, cols) = (BLOCK_ROWS + 5, 300);
        for tokens in [1, 2, 40] {
            // Small whole numbers: exact in bf16 and in every order of f32 sums.
            let number = |i: usize| ((i * i + 3 * i) % 7) as f32 - 3.0;
            let x: Vec<f32> = (0..tokens * cols).map(number).collect();
            let w: Vec<f32> = (0..rows * cols).map(|i| number(i + 5)).collect();
            let bf16: Vec<u16> = w.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
            for isa in Isa::available() {
                for threads in [Threads::One, Threads::Pool] {
                    let mut y = vec![f32::NAN; tokens * rows];
                    Product::new(rows, cols, &x, isa).run(&bf16, &mut y, threads);
                    for (first_row, y) in (0..rows).step_by(BLOCK_ROWS).zip(y.chunks(BLOCK_ROWS * tokens)) {
                        let n = y.len() / tokens;
                        for (t, y) in y.chunks_exact(n).enumerate() {
                            for (r, &y) in (first_row..).zip(y) {
                                let expected: f32 =
                                    w[r * cols..][..cols].iter().zip(&x[t * cols..]).map(|(w, x)| w * x).sum();
                                assert_eq!(y, expected, "{isa}, {tokens} tokens, row {r}, token {t}");
                            }
                        }
                    }
                }
            }
        }
    }
}
