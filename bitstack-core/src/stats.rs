use crate::CoreError;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, Axis, Slice};

/// Rows of H whose products are held at a time. What is computed above the diagonal is thrown away: with 512, products of 576 and 1536 channels
/// take 1.35 and 1.2 times as long.
const PANEL: usize = 192;

/// How much to keep of the inputs of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Collect {
    /// The diagonal of H only: `cols` numbers.
    Diagonal,
    /// All of H: `cols x cols` numbers, and one matrix product per sequence.
    Gram,
}

/// Statistics of the inputs of a weight, streamed: one sequence of activations at a time, none of them kept.
///
/// H = XᵀX / tokens is the input Gram matrix; with it the squared error of a weight's outputs is tr((W−W_b) H (W−W_b)ᵀ) per token.
///
/// ```
/// use bitstack_core::{ActivationStats, Collect};
/// use ndarray::array;
/// let mut stats = ActivationStats::new(2, Collect::Gram);
/// stats.update(array![[1.0, 2.0], [3.0, 0.0]].view())?; // tokens x cols
/// assert_eq!(stats.gram().unwrap(), array![[5.0, 1.0], [1.0, 2.0]]);
/// # Ok::<(), bitstack_core::CoreError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct ActivationStats {
    cols: usize,
    tokens: u64,
    sequences: u64,
    sum_square: Vec<f64>,
    sum_norm: Vec<f64>,
    gram: Option<Array2<f64>>,
}

impl ActivationStats {
    /// Nothing seen yet, for inputs of `cols` channels.
    pub fn new(cols: usize, collect: Collect) -> Self {
        let gram = (collect == Collect::Gram).then(|| Array2::zeros((cols, cols)));
        Self { cols, tokens: 0, sequences: 0, sum_square: vec![0.0; cols], sum_norm: vec![0.0; cols], gram }
    }

    /// Adds one sequence of inputs, `tokens x cols`; one without tokens adds nothing. Products are summed in f32 within a sequence, in f64 over sequences.
    ///
    /// # Errors
    /// [`CoreError::Mismatch`] for another number of columns, [`CoreError::NotFinite`] for a value that is not finite or whose
    /// square is not; nothing is added then.
    pub fn update(&mut self, x: ArrayView2<'_, f32>) -> Result<(), CoreError> {
        if x.ncols() != self.cols {
            let what = "columns of the activations";
            return Err(CoreError::Mismatch { what, expected: self.cols, actual: x.ncols() });
        }
        if x.nrows() == 0 {
            return Ok(());
        }
        let mut squares = vec![0.0f64; self.cols];
        for row in x.rows() {
            for (s, &x) in squares.iter_mut().zip(row) {
                *s += f64::from(x) * f64::from(x);
            }
        }
        // The diagonal bounds the other products, and f32 must hold them.
        if let Some(index) =
            squares.iter().position(|s| s.partial_cmp(&f64::from(f32::MAX)) != Some(std::cmp::Ordering::Less))
        {
            return Err(CoreError::NotFinite { what: "squared activations", index });
        }
        if let Some(gram) = &mut self.gram {
            // Rows of the lower triangle, some at a time: the products take little memory beside the sums.
            for first in (0..self.cols).step_by(PANEL) {
                let end = self.cols.min(first + PANEL);
                let (rows, cols) = (Slice::from(first..end), Slice::from(..end));
                let (left, right) = (x.slice_axis(Axis(1), rows), x.slice_axis(Axis(1), cols));
                let mut product = Array2::<f32>::zeros((end - first, end));
                general_mat_mul(1.0, &left.t(), &right, 0.0, &mut product);
                let mut sums = gram.slice_axis_mut(Axis(0), rows);
                sums.slice_axis_mut(Axis(1), cols).zip_mut_with(&product, |g, &p| *g += f64::from(p));
            }
        }
        for (c, square) in squares.into_iter().enumerate() {
            self.sum_square[c] += square;
            self.sum_norm[c] += square.sqrt();
        }
        self.tokens += x.nrows() as u64;
        self.sequences += 1;
        Ok(())
    }

    /// Statistics with a Gram matrix H = XᵀX / tokens that is known already, `cols x cols`, from another program for example; of `tokens`
    /// tokens, which count as one sequence. Its lower triangle is read.
    ///
    /// ```
    /// use bitstack_core::ActivationStats;
    /// use ndarray::array;
    /// let mut stats = ActivationStats::from_gram(array![[5.0, 1.0], [1.0, 2.0]].view(), 30)?;
    /// stats.merge(&ActivationStats::from_gram(array![[1.0, 1.0], [1.0, 6.0]].view(), 10)?)?;
    /// assert_eq!(stats.gram().unwrap(), array![[4.0, 1.0], [1.0, 3.0]]);
    /// # Ok::<(), bitstack_core::CoreError>(())
    /// ```
    ///
    /// # Errors
    /// [`CoreError::Mismatch`] when H is not square, [`CoreError::NotFinite`] for an element that is not finite, or negative and on the
    /// diagonal.
    pub fn from_gram(gram: ArrayView2<'_, f64>, tokens: u64) -> Result<Self, CoreError> {
        if gram.nrows() != gram.ncols() {
            let what = "columns of the Gram matrix";
            return Err(CoreError::Mismatch { what, expected: gram.nrows(), actual: gram.ncols() });
        }
        if let Some(index) = gram.iter().position(|h| !h.is_finite()) {
            return Err(CoreError::NotFinite { what: "the Gram matrix", index });
        }
        let diagonal: Vec<f64> = gram.diag().to_vec();
        Ok(Self { gram: Some(gram.mapv(|h| h * tokens as f64)), ..Self::from_mean_square(&diagonal, tokens)? })
    }

    /// As [`from_gram`](Self::from_gram), with the diagonal of H only: the mean square of each channel.
    ///
    /// # Errors
    /// [`CoreError::NotFinite`] for a mean square that is negative or not finite.
    pub fn from_mean_square(mean_square: &[f64], tokens: u64) -> Result<Self, CoreError> {
        if let Some(index) = mean_square.iter().position(|h| !(h.is_finite() && *h >= 0.0)) {
            return Err(CoreError::NotFinite { what: "the diagonal of the Gram matrix", index });
        }
        let sum_square: Vec<f64> = mean_square.iter().map(|h| h * tokens as f64).collect();
        let sum_norm = sum_square.iter().map(|s| s.sqrt()).collect();
        Ok(Self { cols: mean_square.len(), tokens, sequences: 1, sum_square, sum_norm, gram: None })
    }

    /// Adds what was seen elsewhere: the statistics of all tokens of both.
    ///
    /// # Errors
    /// [`CoreError::Mismatch`] for another number of columns, or when only one of the two has a Gram matrix; nothing is added then.
    pub fn merge(&mut self, other: &Self) -> Result<(), CoreError> {
        if other.cols != self.cols {
            return Err(CoreError::Mismatch {
                what: "columns of the statistics",
                expected: self.cols,
                actual: other.cols,
            });
        }
        match (&mut self.gram, &other.gram) {
            (Some(gram), Some(other)) => *gram += other,
            (None, None) => {}
            _ => return Err(CoreError::Mismatch { what: "statistics with a Gram matrix", expected: 2, actual: 1 }),
        }
        let add = |sums: &mut [f64], others: &[f64]| sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
        add(&mut self.sum_square, &other.sum_square);
        add(&mut self.sum_norm, &other.sum_norm);
        self.tokens += other.tokens;
        self.sequences += other.sequences;
        Ok(())
    }

    /// Input channels.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Whether all of H is collected.
    pub fn has_gram(&self) -> bool {
        self.gram.is_some()
    }

    /// The diagonal of H: the mean square of each channel; zeros when nothing was seen.
    pub fn mean_square(&self) -> Vec<f64> {
        self.sum_square.iter().map(|s| s / self.tokens.max(1) as f64).collect()
    }

    /// The l2 norm of each channel over a sequence, averaged over sequences; zeros when nothing was seen.
    pub fn mean_sequence_norm(&self) -> Vec<f64> {
        self.sum_norm.iter().map(|s| s / self.sequences.max(1) as f64).collect()
    }

    /// H = XᵀX / tokens, exactly symmetric, `cols x cols`; `None` when only the diagonal is collected.
    pub fn gram(&self) -> Option<Array2<f64>> {
        self.gram.clone().map(|sums| symmetric(sums, self.tokens))
    }

    /// [`ActivationStats::gram`] without a copy of it: from here on, only the diagonal is there and collected.
    pub fn take_gram(&mut self) -> Option<Array2<f64>> {
        self.gram.take().map(|sums| symmetric(sums, self.tokens))
    }
}

/// The mean over tokens, from sums of which the lower triangle counts.
fn symmetric(mut sums: Array2<f64>, tokens: u64) -> Array2<f64> {
    const TILE: usize = 64;
    let n = sums.nrows();
    let tokens = tokens.max(1) as f64;
    for rows in (0..n).step_by(TILE) {
        for cols in (0..=rows).step_by(TILE) {
            for i in rows..n.min(rows + TILE) {
                for j in cols..(cols + TILE).min(i + 1) {
                    let mean = sums[[i, j]] / tokens;
                    sums[[i, j]] = mean;
                    sums[[j, i]] = mean;
                }
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn streaming_equals_one_pass_and_gram_carries_the_diagonal() {
        let x = Array2::from_shape_fn((11, 5), |(t, c)| ((t * 7 + c * 3) % 13) as f32 - 6.0);
        let mut whole = ActivationStats::new(5, Collect::Gram);
        whole.update(x.view()).unwrap();
        let mut parts = ActivationStats::new(5, Collect::Gram);
        let (first, second) = x.view().split_at(Axis(0), 4);
        parts.update(first).unwrap();
        parts.update(second).unwrap();
        // Small integers: every sum is exact.
        assert_eq!(whole.gram(), parts.gram());
        assert_eq!(whole.gram().unwrap().diag().to_vec(), whole.mean_square());
        assert_eq!(whole.gram().unwrap(), x.mapv(f64::from).t().dot(&x.mapv(f64::from)) / 11.0);
        assert_eq!((parts.tokens(), parts.cols()), (11, 5));
    }

    #[test]
    #[cfg_attr(miri, ignore = "a million products, minutes under Miri")]
    fn a_gram_matrix_of_several_panels_and_tiles_is_whole_and_symmetric() {
        let x = Array2::from_shape_fn((7, PANEL + 70), |(t, c)| ((t * 5 + c * 3) % 11) as f32 - 5.0);
        let mut stats = ActivationStats::new(x.ncols(), Collect::Gram);
        stats.update(x.view()).unwrap();
        let expected = x.mapv(f64::from).t().dot(&x.mapv(f64::from)) / 7.0;
        assert_eq!(stats.gram().unwrap(), expected);
        assert_eq!(stats.take_gram().unwrap(), expected);
        assert_eq!((stats.gram(), stats.mean_square()), (None, expected.diag().to_vec()));
    }

    #[test]
    fn activations_that_are_not_finite_are_rejected_and_change_nothing() {
        let mut stats = ActivationStats::new(2, Collect::Gram);
        for bad in [f32::NAN, f32::INFINITY, 1e30] {
            let error = stats.update(array![[1.0, bad]].view()).unwrap_err();
            assert_eq!(error, CoreError::NotFinite { what: "squared activations", index: 1 });
        }
        assert_eq!(stats, ActivationStats::new(2, Collect::Gram));
        assert!(matches!(stats.update(array![[1.0]].view()), Err(CoreError::Mismatch { expected: 2, actual: 1, .. })));
    }
}
