use bitstack_core::{FactorType, Scales, Threads};
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

/// The same in faer's words.
pub(crate) fn par(threads: Threads) -> Par {
    match threads {
        Threads::One => Par::Seq,
        Threads::Pool => Par::rayon(0),
    }
}

/// How the blocks of a weight are found.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub enum Method {
    /// The absolute-value decomposition of the paper: one residual block after the other.
    #[default]
    Avd,
    /// Nested codes: the sign planes of a weight chosen jointly, rank 1. See [the crate's documentation](crate#nested-codes).
    Nested(Nested),
}

/// Settings of nested codes. The defaults and what else was tried are in [the crate's documentation](crate#nested-codes).
#[derive(Debug, Clone, PartialEq)]
pub struct Nested {
    pub(crate) joint: usize,
    pub(crate) sweeps: usize,
    pub(crate) range: f64,
    pub(crate) ratio: f64,
    pub(crate) level_weights: Vec<f64>,
    pub(crate) diagonal: f64,
    pub(crate) floor: f64,
    pub(crate) damping: f64,
    pub(crate) factors: FactorType,
    /// See [`DecomposeOptions::spikes`].
    pub(crate) spikes: Option<f64>,
    /// The error for which spikes are taken that codes leave.
    pub(crate) left: f64,
}

impl Default for Nested {
    /// [`Nested::around`] level 4.
    fn default() -> Self {
        Self::around(4.0)
    }
}

impl Nested {
    /// The settings for a weight that will be used around this level, two levels more or less: all levels share one code, and what is
    /// gained at one is lost at another. Between the settings that did best around levels 2.5, 3.5, 4.25 and 6 it interpolates.
    pub fn around(level: f64) -> Self {
        /// Level, range, ratio, weights of the levels.
        type Anchor = (f64, f64, f64, [f64; Nested::MAX_JOINT]);
        const ANCHORS: [Anchor; 4] = [
            (2.5, 1.15, 0.56, [0.5, 2.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5]),
            (3.5, 1.15, 0.56, [0.3, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]),
            (4.25, 1.3, 0.53, [0.3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
            (6.0, 1.4, 0.51, [0.05, 0.35, 1.0, 2.0, 3.0, 3.0, 2.0, 2.0]),
        ];
        /// The list is made for this level at least: weights that are used below it are at last used above it too, and what no plane
        /// reaches is left at every level.
        const LISTED: f64 = 4.0;
        /// See [`Nested::floor`]: at this level and below. On a layer and two parts of the embedding of SmolLM2-135M, weights made for level 4.5, a
        /// floor of .15 in place of .002 costs .02 to .06 bits at levels 2 to 5 and gains .15 and .3 at 8 and 9 on a text unlike the
        /// calibration: what feedback moves far is beyond the reach of later planes.
        const FLOOR: f64 = 0.02;
        /// See `left`: at this level and below, that of level 5.5. A quarter of it gains .07 bits at level 9 of weights made for level 6, and costs .01
        /// at levels below 4. Without such spikes the divergence of a model of 135 million parameters with all its blocks was twice as large.
        const LEFT: f64 = 4.0 / 2048.0;
        let level = level.clamp(ANCHORS[0].0, ANCHORS[ANCHORS.len() - 1].0);
        let next = ANCHORS.iter().position(|anchor| level <= anchor.0).unwrap_or(0).max(1);
        let (below, above) = (ANCHORS[next - 1], ANCHORS[next]);
        let share = (level - below.0) / (above.0 - below.0);
        let between = |a: f64, b: f64| a + share * (b - a);
        let beyond = (level - LISTED).max(0.0);
        let weight = |b: usize| below.3[b].powf(1.0 - share) * above.3[b].powf(share);
        Self {
            joint: Self::MAX_JOINT,
            sweeps: 3,
            range: between(below.1, above.1),
            ratio: between(below.2, above.2),
            level_weights: (0..Self::MAX_JOINT).map(weight).collect(),
            diagonal: 0.1,
            floor: FLOOR * 5f64.powf(0.5 * beyond),
            damping: 0.01,
            factors: FactorType::I8,
            spikes: Some(4.0 * 0.25f64.powf(LISTED + beyond)),
            left: LEFT * 0.5f64.powf(beyond),
        }
    }

    /// Most planes that can be chosen jointly: 2^8 codes are searched exhaustively.
    pub const MAX_JOINT: usize = 8;

    /// Planes chosen jointly, 1 to [`Nested::MAX_JOINT`]; later planes are found one at a time. Fewer make the lower levels better.
    pub fn joint(self, joint: usize) -> Self {
        Self { joint, ..self }
    }

    /// Rounds of coordinate descent over the codes. Each costs about `4 · planes · cols` floating-point operations per weight, and
    /// without a Gram matrix much less.
    pub fn sweeps(self, sweeps: usize) -> Self {
        Self { sweeps, ..self }
    }

    /// Where the level values start from: the magnitude of the first plane, in standard deviations of the weights, and the ratio of the
    /// magnitude of each plane to the one before. All planes together reach `range · (1 + ratio + ratio² + ..)`. A larger range makes
    /// the upper levels better and the lower ones worse; a ratio above 1/2 gives lower levels the freedom to differ from the upper.
    pub fn range(self, range: f64, ratio: f64) -> Self {
        Self { range, ratio, ..self }
    }

    /// How much each level counts, the first first: what is minimised is Π_b error_b^weight_b. Levels beyond the list take its last
    /// weight.
    pub fn level_weights(self, weights: &[f64]) -> Self {
        Self { level_weights: weights.to_vec(), ..self }
    }

    /// Share of the diagonal of the Gram matrix that is added to it, for Gram matrices of few tokens.
    pub fn diagonal(self, share: f64) -> Self {
        Self { diagonal: share, ..self }
    }

    /// Share of the mean diagonal of the Gram matrix, in normalised columns, that is added to every element of the diagonal: a limit to how
    /// far weights move whose inputs were hardly there in the calibration.
    pub fn floor(self, share: f64) -> Self {
        Self { floor: share, ..self }
    }

    /// Share of the diagonal that is added, beyond [`Nested::diagonal`], for the error feedback only.
    pub fn damping(self, share: f64) -> Self {
        Self { damping: share, ..self }
    }

    /// How basis and rows are stored. [`FactorType::I8`] still gives f16 where 8 bits would be too coarse: where the smallest value that
    /// is not zero is below 1/16 of the largest.
    pub fn factors(self, factors: FactorType) -> Self {
        Self { factors, ..self }
    }

    pub(crate) fn level_weight(&self, b: usize) -> f64 {
        self.level_weights.get(b).or(self.level_weights.last()).copied().unwrap_or(1.0)
    }
}

/// What to decompose into, and how. The lifetime is that of the inputs that belong to one weight, its scales and its Gram matrix;
/// options without them are cloned and completed for each weight:
///
/// ```
/// use bitstack_core::{FactorType, Scales, Threads};
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
    pub(crate) method: Method,
    pub(crate) threads: Threads,
    pub(crate) spikes: Option<f64>,
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
            method: Method::default(),
            threads: Threads::default(),
            spikes: None,
            scales: None,
            gram: None,
        }
    }

    /// `n_blocks` blocks of nested codes, which have rank 1. They need no seed.
    pub fn nested(n_blocks: usize, nested: Nested) -> Self {
        let spikes = nested.spikes;
        Self::new(1, n_blocks).method(Method::Nested(nested)).spikes(spikes)
    }

    /// How the blocks are found.
    pub fn method(self, method: Method) -> Self {
        Self { method, ..self }
    }

    /// Weights far outside the envelope go to a list beside block 1 ([`bitstack_core::Spikes`]), where that pays. The number is the squared
    /// error that the planes leave of an ordinary weight at the level that counts, in units of its mean square: the smaller, the more
    /// entries pay, up to 7 weights in a thousand. `None`: no list. [`DecomposeOptions::nested`] sets it from [`Nested::around`]. The published
    /// method knows of no list: [`Method::Avd`] makes one only where this is set.
    pub fn spikes(self, error: Option<f64>) -> Self {
        Self { spikes: error, ..self }
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
    pub fn threads(self, threads: Threads) -> Self {
        Self { threads, ..self }
    }

    /// Activation scales s, one per column: W·diag(s) is decomposed, and the basis divided by s.
    pub fn scales<'b>(self, scales: &'b Scales) -> DecomposeOptions<'b>
    where
        'a: 'b,
    {
        DecomposeOptions { scales: Some(scales), ..self.shorten() }
    }

    /// The input Gram matrix H, `cols x cols`, for [`crate::LevelReport::output`]. [`Method::Avd`] measures with it and does not optimise
    /// for it; each block then costs another `rows · cols²` floating-point operations, more than the block itself on a large weight.
    /// [`Method::Nested`] minimises the error under it: without, it has to take the columns for independent.
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
            method: self.method,
            threads: self.threads,
            spikes: self.spikes,
            scales: self.scales,
            gram: self.gram.map(ArrayView2::reborrow),
        }
    }
}
