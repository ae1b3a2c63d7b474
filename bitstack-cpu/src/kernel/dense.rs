//! Dense products to measure against, as quick as this crate knows to make them.

use rayon::prelude::*;

use super::tile;
use crate::{Isa, Threads};

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
            1 => matvec(self.isa, w, &self.x, y),
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

/// Row after row, so that the processor sees one stream.
fn matvec(isa: Isa, w: &[u16], x: &[f32], y: &mut [f32]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and `Product::new` has asserted that the CPU has them.
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => unsafe { matvec_avx512(w, x, y) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and `Product::new` has asserted that the CPU has them.
        Isa::Avx2 => unsafe { matvec_avx2(w, x, y) },
        _ => matvec_portable(w, x, y),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn matvec_avx512(w: &[u16], x: &[f32], y: &mut [f32]) {
    matvec_portable(w, x, y);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn matvec_avx2(w: &[u16], x: &[f32], y: &mut [f32]) {
    matvec_portable(w, x, y);
}

/// In a form that compilers turn into vectors of every width.
#[inline(always)]
fn matvec_portable(w: &[u16], x: &[f32], y: &mut [f32]) {
    for (y, w) in y.iter_mut().zip(w.chunks_exact(x.len())) {
        let mut sums = [0.0f32; 64];
        let (runs, tail) = w.as_chunks::<64>();
        let (x_runs, x_tail) = x.as_chunks::<64>();
        for (w, x) in runs.iter().zip(x_runs) {
            for i in 0..64 {
                sums[i] = f32::from_bits(u32::from(w[i]) << 16).mul_add(x[i], sums[i]);
            }
        }
        let tail: f32 = tail.iter().zip(x_tail).map(|(&w, x)| f32::from_bits(u32::from(w) << 16) * x).sum();
        *y = sums.iter().sum::<f32>() + tail;
    }
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
