//! Dense products to measure against, as quick as this crate knows to make them.

use rayon::prelude::*;

use crate::{Isa, Threads};

/// Rows of a task.
const BLOCK_ROWS: usize = 64;

/// x, laid out for dense products.
pub(crate) struct Product {
    rows: usize,
    cols: usize,
    tokens: usize,
    isa: Isa,
    x: Vec<f32>,
}

impl Product {
    pub(crate) fn new(rows: usize, cols: usize, x: &[f32], isa: Isa) -> Self {
        assert!(isa.is_available() && cols > 0 && x.len().is_multiple_of(cols));
        Self { rows, cols, tokens: x.len() / cols, isa, x: x.to_vec() }
    }

    /// y = W x, with W in bf16, `rows x cols`; `y` is `tokens x rows`.
    pub(crate) fn run(&self, w: &[u16], y: &mut [f32], threads: Threads) {
        assert!(w.len() == self.rows * self.cols && y.len() == self.rows * self.tokens);
        let tasks = |t: usize, y: &mut [f32]| {
            let x = &self.x[t * self.cols..][..self.cols];
            let task = |(y, w): (&mut [f32], &[u16])| matvec(self.isa, w, x, y);
            match threads {
                Threads::One => y.chunks_mut(BLOCK_ROWS).zip(w.chunks(BLOCK_ROWS * self.cols)).for_each(task),
                Threads::Pool => y.par_chunks_mut(BLOCK_ROWS).zip(w.par_chunks(BLOCK_ROWS * self.cols)).for_each(task),
            }
        };
        for (t, y) in y.chunks_exact_mut(self.rows).enumerate() {
            tasks(t, y);
        }
    }
}

/// Row after row, so that the processor sees one stream.
fn matvec(isa: Isa, w: &[u16], x: &[f32], y: &mut [f32]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and `Product::new` has asserted that the CPU has them.
        Isa::Avx512 | Isa::Avx512Vnni => unsafe { matvec_avx512(w, x, y) },
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
