//! The order by closed-form errors: most error removed per byte first.

use crate::{LoadOrder, Method, Scores, Sizes, SortError};

/// Most error removed per byte first.
///
/// `errors` of block b (from 0) is the error of the weight with blocks 0..=b loaded, that is at level b + 1: for instance
/// tr((W − W_b) H (W − W_b)ᵀ) times the sensitivity of the model's loss to it. Errors of different weights must be in one
/// unit, and are taken to add up. There is none for level 0, because the first block of every weight is always loaded
/// (they come first, in weight order).
///
/// The lower convex hull of each weight's points (bytes, error) from level 1 up is a chain of segments, each steeper than
/// the one after it; all segments of all weights are merged by slope, ties to the smaller weight index. So wherever a
/// segment with a gain ends, the prefix has the least total error of all models of no more bytes: the greedy solution of
/// the fractional knapsack, which is exact there. In between, a prefix ends inside a segment, whose blocks stay together.
///
/// A block that removes little, or even adds error, but opens the way to one that removes much, thus shares a segment with
/// it. Blocks after a weight's least error have segments that rise; these come after all that fall, so the order is
/// complete, but their prefixes are worse than shorter ones.
///
/// Errors add up only where they are small. Up to the level `lockstep`, therefore, no weight is a level ahead of another: block b
/// of every weight comes before block b + 1 of any, and the slopes only order the blocks of a level. The merge starts there. A weight that
/// matters far more than the others may go `ahead` with the last of these steps: its next blocks then come with it, as one segment.
#[derive(Debug, Clone, PartialEq)]
pub struct GainPerByte {
    /// One error per block, shaped like the sizes. Finite.
    pub errors: Scores,
    /// The level up to which all weights go together; 0 and 1 mean that only the first blocks do.
    pub lockstep: usize,
    /// Per weight, further blocks that go with the last block of the lockstep; none for weights beyond its end.
    pub ahead: Vec<usize>,
}

impl GainPerByte {
    /// No lockstep beyond the first blocks.
    pub fn new(errors: Scores) -> Self {
        Self { errors, lockstep: 1, ahead: Vec::new() }
    }

    /// All weights go together up to this level.
    pub fn lockstep(self, level: usize) -> Self {
        Self { lockstep: level, ..self }
    }

    /// Lets weights go ahead with the last step of the lockstep, each by its number of blocks.
    pub fn ahead(self, ahead: Vec<usize>) -> Self {
        Self { ahead, ..self }
    }

    /// The level up to which a weight of so many blocks is in lockstep.
    fn end(&self, weight: u32, n_blocks: usize) -> usize {
        let ahead = self.ahead.get(weight as usize).copied().unwrap_or(0);
        let level = self.lockstep.max(1);
        if level > 1 { level.saturating_add(ahead).min(n_blocks) } else { 1 }
    }
}

impl Method for GainPerByte {
    fn order(&self, sizes: &Sizes) -> Result<LoadOrder, SortError> {
        self.errors.check_shape(sizes)?;
        for (weight, errors) in self.errors.weights().enumerate() {
            if let Some(block) = errors.iter().position(|error| !error.is_finite()) {
                return Err(SortError::NonFiniteError { weight, level: block + 1, value: errors[block] });
            }
        }
        let curves = || (0..).zip(self.errors.weights().zip(sizes.weights()));
        let mut weights: Vec<u32> = (0..sizes.n_weights() as u32).collect();
        let lockstep = self.lockstep.max(1);
        for block in 1..lockstep.min(sizes.n_blocks()) {
            let mut level: Vec<(u32, usize, f64)> = curves()
                .filter(|(_, (errors, _))| block < errors.len())
                .map(|(weight, (errors, bytes))| {
                    let last = if block + 1 == lockstep { self.end(weight, errors.len()) - 1 } else { block };
                    let bytes: u64 = bytes[block..=last].iter().sum();
                    (weight, last + 1 - block, (errors[last] - errors[block - 1]) / bytes as f64 + 0.0)
                })
                .collect();
            level.sort_by(|a, b| a.2.total_cmp(&b.2));
            level.into_iter().for_each(|(weight, n_blocks, _)| weights.extend(std::iter::repeat_n(weight, n_blocks)));
        }
        let mut segments: Vec<(u32, Segment)> = Vec::new();
        for (weight, (errors, bytes)) in curves() {
            let above = self.end(weight, errors.len()) - 1..;
            segments.extend(hull(&errors[above.clone()], &bytes[above]).into_iter().map(|segment| (weight, segment)));
        }
        // Stable, and slopes never fall along a hull: the segments of one weight stay in order.
        segments.sort_by(|a, b| a.1.slope.total_cmp(&b.1.slope).then(a.0.cmp(&b.0)));
        for (weight, segment) in segments {
            weights.extend(std::iter::repeat_n(weight, segment.n_blocks));
        }
        LoadOrder::from_weights(&weights, sizes)
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Segment {
    n_blocks: usize,
    /// Change of the error per byte; may be infinite when a difference of errors overflows, never NaN or −0.
    slope: f64,
}

/// The lower convex hull of the points (bytes up to block b, `errors[b]`), from block 0 to the last.
fn hull(errors: &[f64], bytes: &[u64]) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    // Bytes counted from the end of the first block. The sum was checked when the sizes were made.
    let mut position = 0;
    // Start of each segment in `segments`, and the end of the last: (bytes, error).
    let mut vertices: Vec<(u64, f64)> = vec![(position, errors[0])];
    for block in 1..errors.len() {
        position += bytes[block];
        let mut n_blocks = 1;
        let slope = loop {
            let (start, error) = vertices[vertices.len() - 1];
            // At least one byte, so finite or infinite but not NaN; and + 0.0 turns −0 into 0.
            let slope = (errors[block] - error) / (position - start) as f64 + 0.0;
            match segments.pop_if(|last| last.slope > slope) {
                Some(last) => {
                    n_blocks += last.n_blocks;
                    vertices.pop();
                }
                None => break slope,
            }
        };
        segments.push(Segment { n_blocks, slope });
        vertices.push((position, errors[block]));
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_hull(errors: &[f64], bytes: &[u64], expected: &[(usize, f64)]) {
        let segments: Vec<_> = hull(errors, bytes).iter().map(|s| (s.n_blocks, s.slope)).collect();
        assert_eq!(segments, expected);
    }

    #[test]
    fn convex_curve_has_a_segment_per_block() {
        check_hull(&[8.0, 4.0, 2.0, 1.0], &[9, 1, 1, 1], &[(1, -4.0), (1, -2.0), (1, -1.0)]);
    }

    #[test]
    fn concave_curve_is_one_segment() {
        check_hull(&[8.0, 7.5, 6.0, 2.0], &[9, 1, 1, 1], &[(3, -2.0)]);
    }

    #[test]
    fn block_that_adds_error_shares_a_segment_with_the_one_that_repays_it() {
        check_hull(&[8.0, 9.0, 2.0, 1.0], &[9, 1, 1, 1], &[(2, -3.0), (1, -1.0)]);
    }

    #[test]
    fn error_that_rises_at_the_end_has_rising_segments() {
        check_hull(&[8.0, 2.0, 5.0, 4.0, 9.0], &[9, 1, 1, 1, 1], &[(1, -6.0), (2, 1.0), (1, 5.0)]);
    }

    #[test]
    fn slopes_are_per_byte() {
        check_hull(&[8.0, 4.0, 2.0], &[9, 4, 1], &[(2, -6.0 / 5.0)]);
    }

    #[test]
    fn weight_of_one_block_has_no_segments() {
        check_hull(&[8.0], &[9], &[]);
    }

    #[test]
    fn lockstep_levels_are_ordered_by_slope_and_finished_one_by_one() {
        // Slopes: weight 0 -8, -4, -2; weight 1 -1, -16, -1 (one segment of two without lockstep); weight 2 has two blocks.
        let errors = [vec![14.0, 6.0, 2.0, 0.0], vec![18.0, 17.0, 1.0, 0.0], vec![3.0, 0.0]];
        let sizes = Sizes::new(0, [vec![1; 4], vec![1; 4], vec![1; 2]]).unwrap();
        let order = |level| {
            GainPerByte::new(Scores::new(&errors)).lockstep(level).order(&sizes).unwrap().weights()[3..].to_vec()
        };
        assert_eq!(order(1), [1, 1, 0, 0, 2, 0, 1]);
        assert_eq!(order(0), order(1));
        assert_eq!(order(2), [0, 2, 1, 1, 0, 0, 1]);
        assert_eq!(order(3), [0, 2, 1, 1, 0, 0, 1]);
        assert_eq!(order(99), [0, 2, 1, 1, 0, 0, 1]);
    }

    #[test]
    fn weights_ahead_take_further_blocks_with_the_last_step_of_the_lockstep() {
        // Slopes of that step: weight 0 -8, with two blocks (8 + 4) / 2 = -6; weight 1 -7; weight 2 has no more to take.
        let errors = [vec![14.0, 6.0, 2.0, 0.0], vec![18.0, 11.0, 1.0, 0.0], vec![3.0, 0.0]];
        let sizes = Sizes::new(0, [vec![1; 4], vec![1; 4], vec![1; 2]]).unwrap();
        let order = |level: usize, ahead: &[usize]| {
            let method = GainPerByte::new(Scores::new(&errors)).lockstep(level).ahead(ahead.to_vec());
            method.order(&sizes).unwrap().weights()[3..].to_vec()
        };
        assert_eq!(order(2, &[]), [0, 1, 2, 1, 0, 0, 1]);
        assert_eq!(order(2, &[1, 0, 7]), [1, 0, 0, 2, 1, 0, 1]);
        assert_eq!(order(2, &[1]), order(2, &[1, 0, 7]));
        // Without a lockstep there is no step to go with.
        assert_eq!(order(1, &[1, 0, 7]), order(1, &[]));
    }

    #[track_caller]
    fn check_order(errors: &[Vec<f64>], bytes: &[Vec<u64>], expected: &[u32]) {
        let sizes = Sizes::new(0, bytes).unwrap();
        let order = GainPerByte::new(Scores::new(errors)).order(&sizes).unwrap();
        assert_eq!(order.weights(), expected);
    }

    #[test]
    fn segments_are_merged_by_slope_and_stay_together() {
        // Slopes: weight 0 has -1 over two blocks; weight 1 has -2, then -0.5.
        check_order(&[vec![4.0, 5.0, 2.0], vec![4.0, 2.0, 1.5]], &[vec![1; 3], vec![1; 3]], &[0, 1, 1, 0, 0, 1]);
    }

    #[test]
    fn equal_slopes_go_to_the_smaller_weight_index() {
        check_order(&[vec![4.0, 2.0, 0.0], vec![8.0, 4.0]], &[vec![1; 3], vec![2; 2]], &[0, 1, 0, 0, 1]);
    }

    #[test]
    fn negative_zero_is_no_gain() {
        check_order(&[vec![1.0, 1.0], vec![0.0, -0.0]], &[vec![1; 2], vec![1; 2]], &[0, 1, 0, 1]);
    }

    #[test]
    fn blocks_without_gain_come_last() {
        check_order(&[vec![1.0, 1.0, 1.5], vec![8.0, 4.0, 3.9]], &[vec![1; 3], vec![1; 3]], &[0, 1, 1, 1, 0, 0]);
    }

    #[test]
    fn differences_too_large_for_f64_still_give_an_order() {
        let huge = f64::MAX;
        check_order(&[vec![0.0, -1.0, -2.0], vec![huge, -huge, huge]], &[vec![1; 3], vec![1; 3]], &[0, 1, 1, 0, 0, 1]);
    }

    #[test]
    fn errors_that_are_not_finite_are_rejected() {
        let sizes = Sizes::new(0, [vec![1], vec![1, 1]]).unwrap();
        let order = |value| GainPerByte::new(Scores::new([vec![1.0], vec![1.0, value]])).order(&sizes);
        let infinite = SortError::NonFiniteError { weight: 1, level: 2, value: f64::INFINITY };
        assert_eq!(order(f64::INFINITY), Err(infinite));
        assert!(matches!(order(f64::NAN), Err(SortError::NonFiniteError { weight: 1, level: 2, .. })));
    }
}
