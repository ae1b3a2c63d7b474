//! Speed of the CPU's kernels, as ratios within one run.
//!
//! Times depend on the machine and on who else uses it, so every measurement of a product is taken in turn with a plain read of the same
//! memory and a dense product of the same shape, round after round, and what is reported are medians over the rounds.

use std::hint::black_box;
use std::time::{Duration, Instant};

use bitstack_core::{
    Basis, BasisRef, BlockRef, Coefficients, CoefficientsRef, CoreError, Level, SPIKE_SIZES, Shape, SignLayout,
    SignView, Spike, Spikes, Values, f16,
};
use bitstack_cpu::{DenseValues, Isa, Kernel, Scratch, Threads};
use memmap2::MmapMut;

use crate::machine::{self, PIECE_BYTES};
use crate::random::SplitMix;
use crate::statistics::median;

/// What to measure: one product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Rows of the weight.
    pub rows: usize,
    /// Columns of the weight.
    pub cols: usize,
    /// Planes.
    pub level: usize,
    /// Columns of the factors. 1: one basis for all planes and refitted coefficients in 8 bits, as nested codes have them. Above: a basis
    /// for each plane, in f16, as the published method has them.
    pub rank: usize,
    /// Spikes, at random places, for every thousand weights.
    pub spikes: usize,
    /// Tokens multiplied at once.
    pub tokens: usize,
    /// The instructions.
    pub isa: Isa,
    /// On one thread or on the pool.
    pub threads: Threads,
}

impl Case {
    /// What `bitstack bench kernels` measures of a weight of this shape: levels, spikes, instructions, ranks and numbers of tokens that say most.
    pub fn table(rows: usize, cols: usize) -> Vec<Self> {
        let best = Isa::detect();
        let case = Self { rows, cols, level: 1, rank: 1, spikes: 0, tokens: 1, isa: best, threads: Threads::One };
        let mut cases = Vec::new();
        for threads in [Threads::One, Threads::Pool] {
            cases.extend([1, 2, 4, 8].map(|level| Self { level, threads, ..case }));
            cases.push(Self { level: 4, spikes: 4, threads, ..case });
        }
        cases.extend(Isa::available().filter(|isa| *isa != best).map(|isa| Self { level: 4, isa, ..case }));
        cases.extend([1, 4].map(|level| Self { level, rank: 16, ..case }));
        for threads in [Threads::One, Threads::Pool] {
            cases.extend([4, 16, 64, 256].map(|tokens| Self { level: 4, tokens, threads, ..case }));
        }
        cases
    }

    /// Threads that the product runs on: one, or those of the current pool.
    pub fn n_threads(&self) -> usize {
        if self.threads == Threads::One { 1 } else { rayon::current_num_threads() }
    }
}

/// A case measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measurement {
    /// What was measured.
    pub case: Case,
    /// Seconds of one product.
    pub seconds: f64,
    /// Bytes of signs, bases, coefficients and spikes read for one product.
    pub compressed_bytes: u64,
    /// `compressed_bytes / seconds`.
    pub bytes_per_second: f64,
    /// Bytes per second of a plain read of the same memory, on as many threads.
    pub plain_read_bytes_per_second: f64,
    /// Seconds of a dense product of the same shape and number of tokens, on as many threads, with a bf16 weight read from memory and
    /// sums in f32: for one token a matvec, for more over tiles widened to f32 in the cache.
    pub dense_seconds: f64,
}

impl Measurement {
    /// The speed of reading compressed bytes over that of a plain read; 1 is the speed of the memory.
    pub fn of_plain_read(&self) -> f64 {
        self.bytes_per_second / self.plain_read_bytes_per_second
    }

    /// How many times faster than the dense product.
    pub fn of_dense(&self) -> f64 {
        self.dense_seconds / self.seconds
    }
}

/// Memory that measurements run over: random signs, and dense weights in bf16, each larger than the caches.
#[derive(Debug)]
pub struct Pool {
    signs: MmapMut,
    dense: MmapMut,
}

impl Pool {
    /// Takes twice `bytes` of memory, in huge pages where the system has them, and fills it. 512 MiB is larger than most caches.
    ///
    /// # Errors
    /// When the system has not as much memory.
    pub fn new(bytes: usize) -> std::io::Result<Self> {
        let mut random = SplitMix(0);
        let mut filled = |mask: u64, bits: u64| {
            let mut memory = MmapMut::map_anon(bytes.next_multiple_of(8).max(8))?;
            #[cfg(target_os = "linux")]
            // Advice only: where it is refused, pages are small.
            let _ = memory.advise(memmap2::Advice::HugePage);
            for word in memory.as_chunks_mut::<8>().0 {
                *word = (random.next() & mask | bits).to_ne_bytes();
            }
            Ok::<_, std::io::Error>(memory)
        };
        let signs = filled(!0, 0)?;
        // ± 0.5 to 1.
        let dense = filled(0x807f_807f_807f_807f, 0x3f00_3f00_3f00_3f00)?;
        Ok(Self { signs, dense })
    }

    /// Measures a case for about `time`. `None` when this CPU lacks its instructions, or the pool is smaller than one weight.
    ///
    /// # Errors
    /// When the shape is none.
    ///
    /// # Panics
    /// When `cols` is not a multiple of 8.
    pub fn measure(&self, case: Case, time: Duration) -> Result<Option<Measurement>, CoreError> {
        assert!(case.cols.is_multiple_of(8), "{} columns are not whole bytes", case.cols);
        match case.threads {
            Threads::One => self.run(case, time),
            // From a thread of the pool, as a model calls it: from another, each call would wait to be taken over.
            Threads::Pool => rayon::scope(|_| self.run(case, time)),
        }
    }

    fn run(&self, case: Case, time: Duration) -> Result<Option<Measurement>, CoreError> {
        let shape = Shape::new(case.rows, case.cols)?;
        let Some(kernel) = Kernel::with_isa(case.isa) else { return Ok(None) };
        let plane_bytes = case.rows * (case.cols / 8);
        let factors = Factors::new(case)?;
        let planes = self.signs.chunks_exact(plane_bytes * case.level);
        let lists = match case.spikes {
            0 => Vec::new(),
            n => (0..planes.len()).map(|seed| spikes(shape, n, seed as u64)).collect::<Result<_, _>>()?,
        };
        let mut weights = Vec::new();
        for (i, planes) in planes.enumerate() {
            // Random signs are as random in any layout.
            weights.push(factors.level(shape, kernel.layout(), planes.chunks_exact(plane_bytes), lists.get(i))?);
        }
        if weights.is_empty() || self.dense.len() < 2 * shape.n_elems() {
            return Ok(None);
        }
        let x: Vec<f32> = (0..case.tokens * case.cols).map(|i| ((i * i + 3 * i) % 251) as f32 / 125.0 - 1.0).collect();
        let mut y = vec![0.0; case.tokens * case.rows];
        let mut scratch = Scratch::default();

        let mut rounds: [Vec<f64>; 3] = Default::default();
        let mut next = 0;
        let began = Instant::now();
        while rounds[0].len() < 3 || began.elapsed() < time {
            // About 64 MiB of signs a round, further on in the pool each time.
            let n = ((64 << 20) / (plane_bytes * case.level * case.tokens)).clamp(1, weights.len());
            let used: Vec<usize> = (next..next + n).map(|i| i % weights.len()).collect();
            next += n;
            let timer = Instant::now();
            for &i in &used {
                let done = kernel.apply(&weights[i], &x, &mut y, case.threads, &mut scratch);
                debug_assert_eq!(done, Ok(()));
                black_box(&y);
            }
            rounds[0].push(timer.elapsed().as_secs_f64() / n as f64);

            let timer = Instant::now();
            let start = (used[0] * plane_bytes * case.level).next_multiple_of(64);
            let bytes = &self.signs[start.min(self.signs.len() - 64)..];
            let bytes = &bytes[..bytes.len().min(64 << 20)];
            let pieces: Vec<&[u8]> = bytes.chunks(PIECE_BYTES).collect();
            machine::read(&pieces, case.threads);
            rounds[1].push(bytes.len() as f64 / timer.elapsed().as_secs_f64());

            let n = if case.tokens == 1 { 2 } else { 1 };
            let timer = Instant::now();
            for i in 0..n {
                let weights = self.dense.len() / (2 * shape.n_elems());
                let at = (next + i) % weights * 2 * shape.n_elems();
                let weight = &self.dense[at..][..2 * shape.n_elems()];
                let weight = DenseValues::Bf16(bytemuck::cast_slice(weight));
                let done = match case.tokens {
                    1 => kernel.apply_dense(weight, case.cols, &x, &mut y, case.threads),
                    _ => kernel.apply_dense_to_many(weight, case.cols, &x, &mut y, case.threads),
                };
                debug_assert_eq!(done, Ok(()));
                black_box(&y);
            }
            rounds[2].push(timer.elapsed().as_secs_f64() / n as f64);
        }
        let [seconds, plain_read_bytes_per_second, dense_seconds] = rounds.map(|times| median(&times));
        let list_bytes = lists.first().map_or(0, |list| 2 * list.view().words().len());
        let compressed_bytes = (plane_bytes * case.level + list_bytes) as u64 + factors.bytes();
        let bytes_per_second = compressed_bytes as f64 / seconds;
        Ok(Some(Measurement {
            case,
            seconds,
            compressed_bytes,
            bytes_per_second,
            plain_read_bytes_per_second,
            dense_seconds,
        }))
    }
}

/// Bases and coefficients that all weights of a measurement share: they are a few parts in a hundred of the bytes.
struct Factors {
    bases: Vec<Basis>,
    coefficients: Vec<Coefficients>,
}

impl Factors {
    fn new(case: Case) -> Result<Self, CoreError> {
        let Case { rows, cols, level, rank, .. } = case;
        let values = |n: usize| (0..n).map(|i| ((i * i + 7 * i) % 241) as i8);
        let halves = |n| Values::F16(values(n).map(|v| f16::from_f32(f32::from(v) / 64.0)).collect());
        if rank == 1 {
            let eight_bit = |n, vectors| Values::I8 { codes: values(n).collect(), scales: vec![f16::ONE; vectors] };
            let bases = vec![Basis::new(1, cols, halves(cols))?];
            let coefficients = (1..=level)
                .map(|planes| Coefficients::new(rows, planes, 1, eight_bit(rows * planes, planes)))
                .collect::<Result<_, _>>()?;
            return Ok(Self { bases, coefficients });
        }
        Ok(Self {
            bases: (0..level).map(|_| Basis::new(rank, cols, halves(rank * cols))).collect::<Result<_, _>>()?,
            coefficients: (0..level)
                .map(|_| Coefficients::new(rows, 1, rank, halves(rows * rank)))
                .collect::<Result<_, _>>()?,
        })
    }

    fn level<'a>(
        &'a self,
        shape: Shape,
        layout: SignLayout,
        planes: impl Iterator<Item = &'a [u8]>,
        spikes: Option<&'a Spikes>,
    ) -> Result<Level<'a>, CoreError> {
        let blocks = planes.zip(&self.coefficients).enumerate().map(|(i, (plane, coefficients))| {
            let signs = SignView::with_layout(shape.rows(), shape.cols(), layout, plane)
                .map_err(|source| CoreError::Signs { shape, source })?;
            let basis: Option<BasisRef<'_>> = self.bases.get(i).map(Basis::view);
            let coefficients: CoefficientsRef<'_> = coefficients.view();
            let spikes = spikes.filter(|_| i == 0).map(Spikes::view);
            Ok(BlockRef { signs, basis, coefficients, spikes })
        });
        Level::new(shape, blocks.collect::<Result<Vec<_>, CoreError>>()?)
    }

    /// Bytes that a product reads: all bases, and the coefficients that are valid at the level.
    fn bytes(&self) -> u64 {
        let bytes = |v: bitstack_core::ValuesRef<'_>| match v {
            bitstack_core::ValuesRef::F16(v) => 2 * v.len() as u64,
            bitstack_core::ValuesRef::I8 { codes, scales } => (codes.len() + 2 * scales.len()) as u64,
            bitstack_core::ValuesRef::Scales(scales) => 2 * scales.len() as u64,
        };
        let bases: u64 = self.bases.iter().map(|v| bytes(v.view().values())).sum();
        let refitted = self.coefficients.last().is_some_and(|u| u.view().planes() > 1);
        let valid = if refitted { self.coefficients.len() - 1 } else { 0 };
        bases + self.coefficients[valid..].iter().map(|u| bytes(u.view().values())).sum::<u64>()
    }
}

/// A list of `per_thousand` spikes for every thousand weights.
fn spikes(shape: Shape, per_thousand: usize, seed: u64) -> Result<Spikes, CoreError> {
    let mut random = SplitMix(seed);
    let mut below = |n: usize| (random.next() >> 32) as usize % n;
    let entries: Vec<Spike> = (0..shape.n_elems() * per_thousand / 1000)
        .map(|_| {
            let size = 1 + below(SPIKE_SIZES) as i8;
            Spike { row: below(shape.rows()), col: below(shape.cols()), size: if below(2) == 0 { size } else { -size } }
        })
        .collect();
    Spikes::encode(shape, std::array::from_fn(|i| f16::from_f32(1.0 + i as f32)), &entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_of_the_table_is_measured_against_both_yardsticks() {
        let pool = Pool::new(1 << 20).unwrap();
        for case in Case::table(64, 128) {
            let measured = pool.measure(case, Duration::ZERO).unwrap().unwrap();
            assert!(
                measured.seconds > 0.0 && measured.of_plain_read() > 0.0 && measured.of_dense() > 0.0,
                "{measured:?}"
            );
            assert!(measured.compressed_bytes > (64 * 128 / 8 * case.level) as u64, "{measured:?}");
        }
        let too_large = Case::table(4096, 4096)[0];
        assert_eq!(pool.measure(too_large, Duration::ZERO).unwrap(), None);
    }
}
