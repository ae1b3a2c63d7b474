//! Numbers per block, and what to do with those that are not numbers.

use crate::ragged::Ragged;
use crate::{Sizes, SortError};

/// One number per block of every weight. What it means, the [`Sorter`](crate::Sorter) that reads it says.
///
/// The shape must be that of the [`Sizes`] it is used with, which is checked there.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    values: Ragged<f64>,
}

impl Scores {
    /// Takes per weight one number for each of its blocks, in stacking order.
    pub fn new<W: AsRef<[f64]>>(weights: impl IntoIterator<Item = W>) -> Self {
        Self { values: Ragged::new(weights) }
    }

    /// Number of weights.
    pub fn n_weights(&self) -> usize {
        self.values.n_rows()
    }

    /// The numbers of one weight; `None` if there is no such weight.
    pub fn blocks(&self, weight: usize) -> Option<&[f64]> {
        self.values.row(weight)
    }

    /// The same, weight by weight.
    pub fn weights(&self) -> impl Iterator<Item = &[f64]> {
        self.values.rows()
    }

    pub(crate) fn check_shape(&self, sizes: &Sizes) -> Result<(), SortError> {
        if self.n_weights() != sizes.n_weights() {
            return Err(SortError::ScoredWeights { expected: sizes.n_weights(), found: self.n_weights() });
        }
        for (weight, (scores, blocks)) in self.weights().zip(sizes.weights()).enumerate() {
            if scores.len() != blocks.len() {
                return Err(SortError::ScoredBlocks { weight, expected: blocks.len(), found: scores.len() });
            }
        }
        Ok(())
    }

    /// The scores with every NaN replaced by the rule on [`Balanced`](crate::Balanced), and −0 by 0, so that
    /// `total_cmp` sees exactly the ties that `==` sees.
    pub(crate) fn resolved(&self) -> Self {
        let mut values = self.values.clone();
        let n_levels = self.weights().map(<[f64]>::len).max().unwrap_or(0);
        // From the last level down: the next level's score may itself be a replaced one.
        for block in (0..n_levels).rev() {
            // f64::max passes NaN over.
            let level_max = self.weights().filter_map(|row| row.get(block).copied()).fold(f64::NAN, f64::max);
            let level_max = if level_max.is_nan() { 0.0 } else { level_max };
            for weight in 0..self.n_weights() {
                let Some(score) = values.get(weight, block) else { continue };
                let score = if score.is_nan() {
                    let next = values.get(weight, block + 1).unwrap_or(f64::INFINITY);
                    let sum = next + level_max;
                    // Opposite infinities: nothing good is known, so last.
                    if sum.is_nan() { f64::INFINITY } else { sum }
                } else {
                    score
                };
                values.set(weight, block, score + 0.0);
            }
        }
        Self { values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;

    #[track_caller]
    fn check(scores: &[Vec<f64>], expected: &[Vec<f64>]) {
        assert_eq!(Scores::new(scores).resolved(), Scores::new(expected));
    }

    #[test]
    fn nan_takes_the_next_score_plus_the_maximum_of_its_level() {
        check(
            &[vec![1.0, NAN, 5.0], vec![2.0, 30.0, 6.0], vec![3.0, 40.0, 7.0]],
            &[vec![1.0, 45.0, 5.0], vec![2.0, 30.0, 6.0], vec![3.0, 40.0, 7.0]],
        );
    }

    #[test]
    fn nan_after_nan_adds_up_from_the_last_level_down() {
        check(&[vec![NAN, NAN, 5.0], vec![100.0, 30.0, 6.0]], &[vec![135.0, 35.0, 5.0], vec![100.0, 30.0, 6.0]]);
    }

    #[test]
    fn level_of_nothing_but_nan_has_the_maximum_zero() {
        check(&[vec![NAN, 5.0], vec![NAN, 4.0]], &[vec![5.0, 5.0], vec![4.0, 4.0]]);
    }

    #[test]
    fn nan_without_a_next_level_is_infinite() {
        check(&[vec![1.0, NAN], vec![1.0, 2.0, 3.0]], &[vec![1.0, INF], vec![1.0, 2.0, 3.0]]);
        check(&[vec![NAN, NAN], vec![NAN, NAN]], &[vec![INF, INF], vec![INF, INF]]);
        check(&[vec![NAN], vec![-INF]], &[vec![INF], vec![-INF]]);
    }

    #[test]
    fn scores_of_another_shape_are_rejected() {
        let sizes = Sizes::new(0, [vec![1, 1], vec![1]]).unwrap();
        let check = |scores: &[Vec<f64>]| Scores::new(scores).check_shape(&sizes);
        assert_eq!(check(&[vec![0.0, 0.0], vec![0.0]]), Ok(()));
        assert_eq!(check(&[vec![0.0, 0.0]]), Err(SortError::ScoredWeights { expected: 2, found: 1 }));
        assert_eq!(
            check(&[vec![0.0, 0.0], vec![0.0, 0.0]]),
            Err(SortError::ScoredBlocks { weight: 1, expected: 1, found: 2 })
        );
    }
}
