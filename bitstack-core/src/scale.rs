use crate::{ActivationStats, CoreError};
use ndarray::{Array2, ArrayView2};

/// A scale below this share of the geometric mean is raised to it. Quiet and dead channels (s = 0) stay divisible, and still weigh
/// almost nothing: at most 10⁻⁶ of an ordinary one in a squared error.
const FLOOR: f64 = 1e-3;

/// Activation scales s, one per input channel: which columns of W matter more (arXiv 2410.23918, section 3.2).
///
/// W·diag(s) is decomposed instead of W, and the basis divided by s afterwards. That is exact, because signs ignore positive scales, so
/// nothing else of a model changes. Scales are normalised to geometric mean 1 over the live channels and floored at 10⁻³, so that V
/// stays well inside f16's range.
#[derive(Debug, Clone, PartialEq)]
pub struct Scales {
    values: Vec<f32>,
}

impl Scales {
    /// All ones: no scaling.
    pub fn none(cols: usize) -> Self {
        Self { values: vec![1.0; cols] }
    }

    /// s_c = sqrt(H_cc), the root mean square of each input channel: the scale for which the error of W·diag(s) is that of W under the
    /// diagonal of H (our own derivation).
    ///
    /// # Errors
    /// [`CoreError::NotFinite`] when an activation was not finite or too large to square.
    pub fn rms(stats: &ActivationStats) -> Result<Self, CoreError> {
        Self::normalised(stats.mean_square().into_iter().map(f64::sqrt).collect())
    }

    /// The scale of the published implementation: the l2 norm of each channel over a sequence, averaged over sequences, + 10⁻³. For
    /// comparison with it; a multiple of [`Scales::rms`] when all sequences are alike.
    ///
    /// # Errors
    /// As [`Scales::rms`].
    pub fn reference(stats: &ActivationStats) -> Result<Self, CoreError> {
        Self::normalised(stats.mean_sequence_norm().into_iter().map(|s| s + 1e-3).collect())
    }

    /// Scales that are known already, one per input channel, in any unit. What is not positive counts as a dead channel.
    ///
    /// ```
    /// use bitstack_core::Scales;
    /// assert_eq!(Scales::from_slice(&[20.0, 5.0])?.as_slice(), [2.0, 0.5]);
    /// # Ok::<(), bitstack_core::CoreError>(())
    /// ```
    ///
    /// # Errors
    /// [`CoreError::NotFinite`].
    pub fn from_slice(scales: &[f32]) -> Result<Self, CoreError> {
        Self::normalised(scales.iter().map(|s| f64::from(*s)).collect())
    }

    fn normalised(raw: Vec<f64>) -> Result<Self, CoreError> {
        if let Some(index) = raw.iter().position(|s| !s.is_finite()) {
            return Err(CoreError::NotFinite { what: "activation scales", index });
        }
        let live: Vec<f64> = raw.iter().filter(|s| **s > 0.0).map(|s| s.ln()).collect();
        let mean = (live.iter().sum::<f64>() / live.len().max(1) as f64).exp();
        Ok(Self { values: raw.iter().map(|s| (s / mean).max(FLOOR) as f32).collect() })
    }

    /// The scales, all positive.
    pub fn as_slice(&self) -> &[f32] {
        &self.values
    }

    /// W·diag(s), for W `rows x cols`.
    ///
    /// # Errors
    /// [`CoreError::Mismatch`] when W has another number of columns.
    pub fn apply(&self, weight: ArrayView2<'_, f32>) -> Result<Array2<f32>, CoreError> {
        if weight.ncols() != self.values.len() {
            let what = "columns of the weight to scale";
            return Err(CoreError::Mismatch { what, expected: self.values.len(), actual: weight.ncols() });
        }
        Ok(&weight * &ndarray::aview1(&self.values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Collect;
    use ndarray::array;

    fn stats(sequences: &[Array2<f32>]) -> ActivationStats {
        let mut stats = ActivationStats::new(sequences[0].ncols(), Collect::Diagonal);
        sequences.iter().for_each(|x| stats.update(x.view()).unwrap());
        stats
    }

    #[test]
    fn scales_have_geometric_mean_one() {
        let s = Scales::rms(&stats(&[array![[1.0, 4.0, 2.0], [1.0, -4.0, 2.0]]])).unwrap();
        assert!(s.as_slice().iter().zip([0.5, 2.0, 1.0]).all(|(s, e)| (s - e).abs() < 1e-6), "{s:?}");
    }

    #[test]
    fn dead_channels_are_floored_and_do_not_move_the_others() {
        let s = Scales::rms(&stats(&[array![[1.0, 0.0, 4.0]]])).unwrap();
        assert_eq!(s.as_slice(), [0.5, 1e-3, 2.0]);
        assert_eq!(Scales::rms(&stats(&[array![[0.0, 0.0]]])).unwrap().as_slice(), [1e-3, 1e-3]);
        assert_eq!(Scales::rms(&ActivationStats::new(2, Collect::Diagonal)).unwrap().as_slice(), [1e-3, 1e-3]);
    }

    #[test]
    fn reference_scale_averages_norms_over_sequences() {
        // Norms over each sequence: (5, 1) and (1, 3); their means + 0.001: 3.001 and 2.001.
        let s = Scales::reference(&stats(&[array![[3.0, 1.0], [4.0, 0.0]], array![[1.0, 3.0]]])).unwrap();
        assert!((s.as_slice()[0] / s.as_slice()[1] - 3.001 / 2.001).abs() < 1e-6);
    }

    #[test]
    fn scaling_multiplies_columns() {
        let s = Scales { values: vec![2.0, 0.5] };
        assert_eq!(s.apply(array![[1.0, 2.0], [3.0, 4.0]].view()).unwrap(), array![[2.0, 1.0], [6.0, 2.0]]);
        assert!(s.apply(array![[1.0]].view()).is_err());
    }
}
