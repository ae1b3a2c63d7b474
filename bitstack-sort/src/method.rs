//! What a method is, and the two that the paper sorts by measured scores.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::{LoadOrder, Scores, Sizes, SortError};

/// A way to put the blocks of all weights in one order.
pub trait Sorter {
    /// The load order of the blocks that `sizes` describes: the first block of every weight, then all others, the blocks
    /// of one weight in stacking order.
    ///
    /// # Errors
    /// What the method has to go by does not belong to these sizes, or is unusable.
    fn order(&self, sizes: &Sizes) -> Result<LoadOrder, SortError>;
}

/// Levels in lockstep, inside a level by score: "Average" of the paper (arXiv 2410.23918, section 3, and its ablation
/// of the sorting).
///
/// Block b of every weight comes before block b + 1 of any, so no weight is ahead of another by more than one block as
/// long as the other has blocks left. The first blocks come in weight order, as in the published code, where a model
/// starts with one block of everything; their scores are not read.
///
/// `scores` of block b is a loss, such as the perplexity on a small set, of the model in which this weight is at level b and
/// every other weight at level b − 1. **Lower is more important** and is loaded earlier; ties go to the
/// smaller weight index.
///
/// # NaN
/// The rule of the published code: a NaN score becomes the score of the same weight at the next level, plus the maximum
/// score of its own level (of the scores that are numbers, 0 if there is none). That sorts it behind its level as long as
/// scores are positive. Levels are treated from the last to the first, so the next level's score may be a replaced one.
/// A NaN with no next level becomes +∞: last in its level. (The published code gives up there. It also takes a maximum of
/// 0 whenever the level's first score is NaN, an accident of Python's `max` that is not repeated.)
#[derive(Debug, Clone, PartialEq)]
pub struct Balanced {
    /// One loss per block, shaped like the sizes.
    pub scores: Scores,
}

impl Sorter for Balanced {
    fn order(&self, sizes: &Sizes) -> Result<LoadOrder, SortError> {
        self.scores.check_shape(sizes)?;
        let scores = self.scores.resolved();
        let mut entries: Vec<(usize, f64, usize)> = Vec::with_capacity(sizes.n_blocks());
        for (weight, row) in scores.weights().enumerate() {
            for (block, &score) in row.iter().enumerate() {
                entries.push((block, if block == 0 { 0.0 } else { score }, weight));
            }
        }
        entries.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
        let weights: Vec<u32> = entries.iter().map(|&(_, _, weight)| weight as u32).collect();
        LoadOrder::from_weights(&weights, sizes)
    }
}

/// Always the best-scored of the weights' next blocks, after the first block of each: the greedy order of the paper's
/// ablation (arXiv 2410.23918). Any weight may run ahead of the others.
///
/// `scores` are those of [`Balanced`]: lower comes earlier, ties go to the smaller weight index, NaN follows the same
/// rule, the scores of first blocks are not read and first blocks come in weight order.
#[derive(Debug, Clone, PartialEq)]
pub struct Greedy {
    /// One loss per block, shaped like the sizes.
    pub scores: Scores,
}

impl Sorter for Greedy {
    fn order(&self, sizes: &Sizes) -> Result<LoadOrder, SortError> {
        self.scores.check_shape(sizes)?;
        let scores = self.scores.resolved();
        let candidate = |weight: usize, block: usize| {
            scores.blocks(weight)?.get(block).map(|&score| Reverse((TotalScore(score), weight, block)))
        };
        let mut weights: Vec<u32> = (0..sizes.n_weights() as u32).collect();
        let mut next: BinaryHeap<_> = (0..sizes.n_weights()).filter_map(|weight| candidate(weight, 1)).collect();
        while let Some(Reverse((_, weight, block))) = next.pop() {
            weights.push(weight as u32);
            next.extend(candidate(weight, block + 1));
        }
        LoadOrder::from_weights(&weights, sizes)
    }
}

/// A score in the order of `f64::total_cmp`.
#[derive(Debug, Clone, Copy)]
struct TotalScore(f64);

impl Ord for TotalScore {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for TotalScore {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for TotalScore {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for TotalScore {}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f64 = f64::NAN;

    fn uniform(scores: &[Vec<f64>]) -> Sizes {
        Sizes::new(0, scores.iter().map(|row| vec![1; row.len()])).unwrap()
    }

    #[track_caller]
    fn check_balanced(scores: &[Vec<f64>], expected: &[u32]) {
        let order = Balanced { scores: Scores::new(scores) }.order(&uniform(scores)).unwrap();
        assert_eq!(order.weights(), expected);
    }

    #[track_caller]
    fn check_greedy(scores: &[Vec<f64>], expected: &[u32]) {
        let order = Greedy { scores: Scores::new(scores) }.order(&uniform(scores)).unwrap();
        assert_eq!(order.weights(), expected);
    }

    #[test]
    fn balanced_sorts_each_level_by_ascending_score() {
        // The scores of the first blocks would say 2, 1, 0 and are not read.
        check_balanced(&[vec![9.0, 3.0, 1.0], vec![8.0, 1.0, 2.0], vec![7.0, 2.0, 0.5]], &[0, 1, 2, 1, 2, 0, 2, 0, 1]);
    }

    #[test]
    fn balanced_goes_on_with_the_weights_that_have_blocks_left() {
        check_balanced(&[vec![0.0], vec![0.0, 2.0, 1.0], vec![0.0, 1.0]], &[0, 1, 2, 2, 1, 1]);
    }

    #[test]
    fn equal_scores_go_to_the_smaller_weight_index() {
        let scores = [vec![0.0, 0.0, 5.0], vec![0.0, -0.0, 5.0], vec![0.0, 0.0, 5.0]];
        check_balanced(&scores, &[0, 1, 2, 0, 1, 2, 0, 1, 2]);
        check_greedy(&scores, &[0, 1, 2, 0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn nan_is_sorted_by_the_next_level_behind_the_numbers() {
        // Level 2: weights 0 and 2 become 5 + 9 and 4 + 9, behind 8 and 9.
        check_balanced(
            &[vec![NAN, NAN, 5.0], vec![NAN, 8.0, 6.0], vec![NAN, NAN, 4.0], vec![NAN, 9.0, 7.0]],
            &[0, 1, 2, 3, 1, 3, 2, 0, 2, 0, 1, 3],
        );
    }

    #[test]
    fn nan_in_the_last_level_comes_last_and_all_nan_keeps_weight_order() {
        check_balanced(&[vec![0.0, NAN], vec![0.0, f64::MAX], vec![0.0, 1.0]], &[0, 1, 2, 2, 1, 0]);
        check_balanced(&[vec![NAN, NAN], vec![NAN, NAN]], &[0, 1, 0, 1]);
        check_greedy(&[vec![NAN, NAN], vec![NAN, NAN]], &[0, 1, 0, 1]);
    }

    #[test]
    fn greedy_lets_a_weight_run_ahead() {
        check_greedy(
            &[vec![0.0, 4.0, 3.0, 2.0], vec![0.0, 5.0, 1.0], vec![0.0, 3.5, 6.0]],
            &[0, 1, 2, 2, 0, 0, 0, 1, 1, 2],
        );
    }

    #[test]
    fn scores_for_other_sizes_are_rejected() {
        let sizes = Sizes::new(0, [vec![1, 1]]).unwrap();
        let scores = Scores::new([vec![1.0]]);
        let expected = Err(SortError::ScoredBlocks { weight: 0, expected: 2, found: 1 });
        assert_eq!(Balanced { scores: scores.clone() }.order(&sizes), expected);
        assert_eq!(Greedy { scores }.order(&sizes), expected);
    }
}
