use bitstack_core::Scales;
use faer::Par;
use ndarray::ArrayView2;

/// How the best rank-k fit of |R| is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Svd {
    /// Block Krylov iteration, warm-started from the block before: after 1, 4 and 8 blocks within 0.2 % of the exact error on the
    /// matrices it was tuned on, in about a fiftieth of the time at 2048 x 2048. Matrices so small that it would not save anything take the exact way.
    #[default]
    Fast,
    /// A full thin SVD per block.
    Exact,
}

/// Threads used inside one decomposition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Parallelism {
    /// One thread: right when the caller decomposes several weights at a time.
    #[default]
    Seq,
    /// The current rayon pool. The split of sums over threads may change the last bits of a factor.
    Rayon,
}

impl Parallelism {
    pub(crate) fn par(self) -> Par {
        match self {
            Self::Seq => Par::Seq,
            Self::Rayon => Par::rayon(0),
        }
    }
}

/// What to decompose into, and how. The lifetime is that of the inputs that belong to one weight, its scales and its Gram matrix;
/// options without them are cloned and completed for each weight:
///
/// ```
/// use bitstack_core::Scales;
/// use bitstack_decomp::DecomposeOptions;
/// let options = DecomposeOptions::new(16, 8).seed(42);
/// for cols in [64, 128] {
///     let scales = Scales::none(cols);
///     let of_one_weight = options.clone().scales(&scales);
/// }
/// ```
#[derive(Debug, Clone)]
pub struct DecomposeOptions<'a> {
    pub(crate) rank: usize,
    pub(crate) n_blocks: usize,
    pub(crate) seed: u64,
    pub(crate) svd: Svd,
    pub(crate) parallelism: Parallelism,
    pub(crate) scales: Option<&'a Scales>,
    pub(crate) gram: Option<ArrayView2<'a, f64>>,
}

impl<'a> DecomposeOptions<'a> {
    /// `n_blocks` blocks of rank `rank` (the paper: 16 of rank 16), without scales, by [`Svd::Fast`] from seed 0 on one thread.
    pub fn new(rank: usize, n_blocks: usize) -> Self {
        Self {
            rank,
            n_blocks,
            seed: 0,
            svd: Svd::default(),
            parallelism: Parallelism::default(),
            scales: None,
            gram: None,
        }
    }

    /// The seed of the random start of [`Svd::Fast`]. The same input, options and seed give the same blocks.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// How the rank-k fit is found.
    pub fn svd(self, svd: Svd) -> Self {
        Self { svd, ..self }
    }

    /// Threads used inside this decomposition.
    pub fn parallelism(self, parallelism: Parallelism) -> Self {
        Self { parallelism, ..self }
    }

    /// Activation scales s, one per column: W·diag(s) is decomposed, and the basis divided by s.
    pub fn scales<'b>(self, scales: &'b Scales) -> DecomposeOptions<'b>
    where
        'a: 'b,
    {
        DecomposeOptions { scales: Some(scales), ..self.shorten() }
    }

    /// The input Gram matrix H, `cols x cols`, for [`crate::LevelError::output`]. It is measured with, not optimised for. Each block
    /// then costs another `rows · cols²` floating-point operations, more than the block itself on a large weight.
    pub fn gram<'b>(self, gram: ArrayView2<'b, f64>) -> DecomposeOptions<'b>
    where
        'a: 'b,
    {
        DecomposeOptions { gram: Some(gram), ..self.shorten() }
    }

    /// Array views are invariant in their lifetime, so the compiler does not do this by itself.
    fn shorten<'b>(self) -> DecomposeOptions<'b>
    where
        'a: 'b,
    {
        DecomposeOptions {
            rank: self.rank,
            n_blocks: self.n_blocks,
            seed: self.seed,
            svd: self.svd,
            parallelism: self.parallelism,
            scales: self.scales,
            gram: self.gram.map(ArrayView2::reborrow),
        }
    }
}
