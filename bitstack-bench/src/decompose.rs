//! How fast weights are decomposed, on one thread: the fast decomposition beside full singular value decompositions, and nested codes.

use crate::synthetic::ModelShape;
use bitstack_decomp::{DecompError, DecomposeOptions, Nested, Svd, blocks, decompose, feedback_gain};
use bitstack_model::Progress;
use ndarray::{Array2, Axis};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::time::Instant;

/// Blocks per weight of nested codes where a whole model is measured.
pub const MODEL_BLOCKS: usize = 8;

/// Rows of the smaller one of two weights that are decomposed to know a rate.
const ROWS: usize = 256;

/// A chain of blocks of one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Chain {
    /// Seconds per block.
    pub seconds: f64,
    /// The relative error after each block.
    pub errors: Vec<f64>,
}

impl Chain {
    fn measure(
        weight: &Array2<f32>,
        options: DecomposeOptions<'_>,
        progress: &dyn Progress,
    ) -> Result<Self, DecompError> {
        let mut chain = Self { seconds: 0.0, errors: Vec::new() };
        let mut steps = blocks(weight.view(), &options)?;
        loop {
            let start = Instant::now();
            let Some(step) = steps.next() else { break };
            chain.seconds += start.elapsed().as_secs_f64();
            chain.errors.push(step?.error.relative_error);
            progress.advance(1);
        }
        chain.seconds /= chain.errors.len() as f64;
        Ok(chain)
    }
}

/// One weight decomposed in three ways.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Rows, and columns, of the weight.
    pub size: usize,
    /// The published method with full singular value decompositions.
    pub exact: Chain,
    /// The published method with the block Krylov method.
    pub fast: Chain,
    /// Weights per second of nested codes, under a Gram matrix.
    pub nested_weights_per_second: f64,
}

impl Comparison {
    /// Decomposes a random weight of `size` rows and columns into `n_blocks` blocks, of this rank where the method has ranks.
    ///
    /// # Errors
    /// Options that [`DecomposeOptions`] does not allow.
    pub fn measure(size: usize, rank: usize, n_blocks: usize, progress: &dyn Progress) -> Result<Self, DecompError> {
        let weight = random_weight(size, size);
        progress.stage("decompose (blocks)", 2 * n_blocks as u64);
        let chain = |svd| Chain::measure(&weight, DecomposeOptions::new(rank, n_blocks).svd(svd), progress);
        let (fast, exact) = (chain(Svd::Fast)?, chain(Svd::Exact)?);
        progress.stage("nested codes (weights)", 1);
        let gram = gram_of_neighbours(size);
        let options = DecomposeOptions::nested(n_blocks, Nested::default()).gram(gram.view());
        let start = Instant::now();
        decompose(weight.view(), &options)?;
        let nested_weights_per_second = weight.len() as f64 / start.elapsed().as_secs_f64();
        progress.advance(1);
        Ok(Self { size, exact, fast, nested_weights_per_second })
    }

    /// How many times faster than full decompositions the fast one is.
    pub fn ratio(&self) -> f64 {
        self.exact.seconds / self.fast.seconds
    }

    /// Weights per second of the fast decomposition, one block each.
    pub fn fast_weights_per_second(&self) -> f64 {
        (self.size * self.size) as f64 / self.fast.seconds
    }

    /// By how much, in parts of a hundred, the fast decomposition's error is above that of full ones, after each block.
    pub fn excess_percent(&self) -> impl Iterator<Item = f64> {
        let pairs = self.exact.errors.iter().zip(&self.fast.errors);
        pairs.map(|(exact, fast)| if *exact > 0.0 { (fast / exact - 1.0) * 100.0 } else { 0.0 })
    }
}

/// The weights of one input width in a model, and the rates of nested codes on them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Width {
    /// The input width.
    pub cols: usize,
    /// Matrices of that width.
    pub matrices: usize,
    /// Rows of all of them.
    pub rows: usize,
    /// Seconds that each matrix takes whatever its rows: factors of H, and the pattern.
    pub seconds_per_matrix: f64,
    /// Weights per second beyond that.
    pub weights_per_second: f64,
}

impl Width {
    /// From two decompositions, of some rows and of four times as many.
    fn measure(cols: usize, matrices: usize, rows: usize, progress: &dyn Progress) -> Result<Self, DecompError> {
        let gram = gram_of_neighbours(cols);
        let options = DecomposeOptions::nested(MODEL_BLOCKS, Nested::default()).gram(gram.view());
        let weight = random_weight(4 * ROWS, cols);
        let start = Instant::now();
        feedback_gain(weight.view(), gram.view())?;
        let gain = start.elapsed().as_secs_f64();
        progress.advance(1);
        let mut seconds = [0.0; 2];
        for (seconds, rows) in seconds.iter_mut().zip([ROWS, 4 * ROWS]) {
            let start = Instant::now();
            decompose(weight.view().split_at(Axis(0), rows).0, &options)?;
            *seconds = start.elapsed().as_secs_f64();
            progress.advance(1);
        }
        let more = (seconds[1] - seconds[0]).max(f64::MIN_POSITIVE);
        Ok(Self {
            cols,
            matrices,
            rows,
            seconds_per_matrix: gain + (seconds[0] - more / 3.0).max(0.0),
            weights_per_second: (3 * ROWS * cols) as f64 / more,
        })
    }

    /// Number of weights.
    pub fn n_weights(&self) -> usize {
        self.rows * self.cols
    }

    /// Seconds that one thread takes for all of them.
    pub fn seconds(&self) -> f64 {
        self.matrices as f64 * self.seconds_per_matrix + self.n_weights() as f64 / self.weights_per_second
    }
}

/// The rates of nested codes, [`MODEL_BLOCKS`] blocks with a Gram matrix, on the layers and the head of a model: for weights as wide as the
/// residual stream, and as wide as the feed-forward part.
///
/// # Errors
/// A shape that is no weight's.
pub fn model(shape: &ModelShape, progress: &dyn Progress) -> Result<[Width; 2], DecompError> {
    let kv_rows = shape.hidden_size / shape.n_heads * shape.n_kv_heads;
    let rows = 2 * shape.hidden_size + 2 * kv_rows + 2 * shape.intermediate_size;
    progress.stage("nested codes (parts)", 6);
    Ok([
        Width::measure(shape.hidden_size, 6 * shape.n_layers + 1, rows * shape.n_layers + shape.vocab_size, progress)?,
        Width::measure(shape.intermediate_size, shape.n_layers, shape.hidden_size * shape.n_layers, progress)?,
    ])
}

/// Gaussian entries, columns of log-normal size: the spread of a trained weight times its activation scales.
fn random_weight(rows: usize, cols: usize) -> Array2<f32> {
    let mut rng = StdRng::seed_from_u64(1);
    // Box and Muller's transform of two uniform numbers.
    let mut gauss = move || {
        let (a, b): (f64, f64) = (rng.random(), rng.random());
        ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    };
    let columns: Vec<f32> = (0..cols).map(|_| gauss().exp()).collect();
    Array2::from_shape_fn((rows, cols), |(_, c)| gauss() * columns[c])
}

/// A Gram matrix of neighbours that resemble each other: 0.9^|i − j|.
fn gram_of_neighbours(cols: usize) -> Array2<f64> {
    let powers: Vec<f64> = (0..cols).map(|i| 0.9f64.powi(i as i32)).collect();
    Array2::from_shape_fn((cols, cols), |(i, j)| powers[i.abs_diff(j)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_decomposition_is_as_good_as_the_exact_one_on_the_weight_measured() {
        let comparison = Comparison::measure(96, 4, 3, &()).unwrap();
        assert_eq!((comparison.exact.errors.len(), comparison.fast.errors.len()), (3, 3));
        assert!(comparison.excess_percent().all(|excess| excess.abs() < 1.0), "{comparison:?}");
        assert!(comparison.ratio() > 0.0 && comparison.nested_weights_per_second > 0.0);
    }

    #[test]
    fn the_widths_of_a_model_hold_all_weights_of_its_layers_and_its_head() {
        let shape = ModelShape {
            hidden_size: 32,
            intermediate_size: 48,
            n_layers: 3,
            n_heads: 4,
            n_kv_heads: 2,
            vocab_size: 100,
            tied: true,
        };
        let widths = model(&shape, &()).unwrap();
        // q, o: 32 x 32; k, v: 16 x 32; gate, up: 48 x 32; down: 32 x 48; head: 100 x 32.
        let layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32;
        assert_eq!(widths.iter().map(Width::n_weights).sum::<usize>(), 3 * layer + 100 * 32);
        assert_eq!(widths.map(|width| width.matrices), [6 * 3 + 1, 3]);
        assert!(widths.iter().all(|width| width.seconds() > 0.0));
    }
}
