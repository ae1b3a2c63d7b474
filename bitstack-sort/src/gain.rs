//! The order by closed-form errors: most error removed per byte first.

use crate::{LoadOrder, Scores, Sizes, SortError, Sorter};

/// Most error removed per byte first.
///
/// `errors` of block b is the error of the weight at level b, that is with blocks 1 to b loaded: for instance
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
/// What is known of the differences between weights may be uncertain, or not hold where errors are too large to add up. With a `trust` t
/// below 1 the gain per byte of a block is taken for gᵗ · ḡ¹⁻ᵗ, g being what the errors say and ḡ the geometric mean, over bytes, of the
/// same block of all weights: at 0 all weights go up level by level.
#[derive(Debug, Clone, PartialEq)]
pub struct GainPerByte {
    /// One error per block, shaped like the sizes. Finite.
    pub errors: Scores,
    /// How far the differences between weights are believed, from 0 to 1.
    pub trust: f64,
}

impl GainPerByte {
    /// Errors that are fully believed.
    pub fn new(errors: Scores) -> Self {
        Self { errors, trust: 1.0 }
    }

    /// How far the differences between weights are believed.
    pub fn trust(self, trust: f64) -> Self {
        Self { trust, ..self }
    }
}

impl Sorter for GainPerByte {
    fn order(&self, sizes: &Sizes) -> Result<LoadOrder, SortError> {
        self.errors.check_shape(sizes)?;
        if !(0.0..=1.0).contains(&self.trust) {
            return Err(SortError::Trust { value: self.trust });
        }
        for (weight, errors) in self.errors.weights().enumerate() {
            if let Some((level, &value)) = (1..).zip(errors).find(|(_, error)| !error.is_finite()) {
                return Err(SortError::NonFiniteError { weight, level, value });
            }
        }
        let curves = || self.errors.weights().zip(sizes.weights());
        let typical = if self.trust < 1.0 { typical_gains(curves()) } else { Vec::new() };
        let mut segments: Vec<(u32, Segment)> = Vec::new();
        for (weight, (errors, bytes)) in (0..).zip(curves()) {
            let segments_of = if self.trust < 1.0 {
                hull(&tempered(errors, bytes, &typical, self.trust), bytes)
            } else {
                hull(errors, bytes)
            };
            segments.extend(segments_of.into_iter().map(|segment| (weight, segment)));
        }
        // Stable, and slopes never fall along a hull: the segments of one weight stay in order.
        segments.sort_by(|a, b| a.1.slope.total_cmp(&b.1.slope).then(a.0.cmp(&b.0)));
        let mut weights: Vec<u32> = (0..sizes.n_weights() as u32).collect();
        for (weight, segment) in segments {
            weights.extend(std::iter::repeat_n(weight, segment.n_blocks));
        }
        LoadOrder::from_weights(&weights, sizes)
    }
}

/// The logarithm of what a byte of block `b` gains; none if it gains nothing.
fn log_gain(errors: &[f64], bytes: &[u64], b: usize) -> Option<f64> {
    let gain = (errors[b - 1] - errors[b]).min(f64::MAX);
    (gain > 0.0).then(|| gain.ln() - (bytes[b] as f64).ln())
}

/// Per block, the mean over the bytes of all weights of the logarithm of what a byte of it gains, where it gains anything.
fn typical_gains<'a>(curves: impl Iterator<Item = (&'a [f64], &'a [u64])>) -> Vec<f64> {
    let mut sums: Vec<(f64, f64)> = Vec::new();
    for (errors, bytes) in curves {
        sums.resize(sums.len().max(errors.len()), (0.0, 0.0));
        for (b, sum) in sums.iter_mut().enumerate().take(errors.len()).skip(1) {
            if let Some(log) = log_gain(errors, bytes, b) {
                *sum = (sum.0 + log * bytes[b] as f64, sum.1 + bytes[b] as f64);
            }
        }
    }
    sums.into_iter().map(|(sum, bytes)| if bytes > 0.0 { sum / bytes } else { 0.0 }).collect()
}

/// The curve with gains drawn towards the typical ones. A block that gains nothing still gains nothing.
fn tempered(errors: &[f64], bytes: &[u64], typical: &[f64], trust: f64) -> Vec<f64> {
    /// Tempered gains are of any unit: kept this far from overflow.
    const LARGEST: f64 = 500.0;
    let mut error = 0.0;
    (0..errors.len())
        .map(|b| {
            if b > 0
                && let Some(log) = log_gain(errors, bytes, b)
            {
                error -= (trust * log + (1.0 - trust) * typical[b]).min(LARGEST).exp() * bytes[b] as f64;
            }
            error
        })
        .collect()
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
    fn without_trust_weights_go_level_by_level() {
        let errors = [vec![14.0, 6.0, 2.0, 0.0], vec![18.0, 17.0, 16.9, 16.8], vec![3.0, 0.0]];
        let sizes = Sizes::new(0, [vec![1; 4], vec![1; 4], vec![1; 2]]).unwrap();
        let order =
            |trust| GainPerByte::new(Scores::new(&errors)).trust(trust).order(&sizes).unwrap().weights()[3..].to_vec();
        assert_eq!(order(1.0), [0, 0, 2, 0, 1, 1, 1]);
        assert_eq!(order(0.0), [0, 1, 2, 0, 1, 0, 1]);
    }

    #[test]
    fn trust_is_an_exponent_of_what_a_weight_gains_over_the_others() {
        // Slopes of 16 and 1, then of 4 and 1/4: the second of weight 0 is before the first of weight 1 until 4ᵗ 1¹⁻ᵗ = 1ᵗ 4¹⁻ᵗ, at t = 1/2.
        let errors = [vec![20.0, 4.0, 0.0], vec![1.25, 0.25, 0.0]];
        let sizes = Sizes::new(0, [vec![1; 3], vec![1; 3]]).unwrap();
        let order =
            |trust| GainPerByte::new(Scores::new(&errors)).trust(trust).order(&sizes).unwrap().weights()[2..].to_vec();
        assert_eq!(order(0.51), [0, 0, 1, 1]);
        assert_eq!(order(0.49), [0, 1, 0, 1]);
    }

    #[test]
    fn blocks_without_gain_come_last_at_any_trust() {
        let errors = [vec![1.0, 1.0, 1.5], vec![8.0, 4.0, 3.9]];
        let sizes = Sizes::new(0, [vec![1; 3], vec![1; 3]]).unwrap();
        for trust in [0.0, 0.5, 0.9] {
            let order = GainPerByte::new(Scores::new(&errors)).trust(trust).order(&sizes).unwrap();
            assert_eq!(order.weights(), [0, 1, 1, 1, 0, 0]);
        }
    }

    #[test]
    fn trust_outside_its_range_is_rejected() {
        let sizes = Sizes::new(0, [vec![1]]).unwrap();
        for value in [-0.1, 1.1, f64::INFINITY] {
            let order = GainPerByte::new(Scores::new([vec![1.0]])).trust(value).order(&sizes);
            assert_eq!(order, Err(SortError::Trust { value }));
        }
        let order = GainPerByte::new(Scores::new([vec![1.0]])).trust(f64::NAN).order(&sizes);
        assert!(matches!(order, Err(SortError::Trust { .. })));
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
        let errors = [vec![0.0, -1.0, -2.0], vec![huge, -huge, huge]];
        let bytes = [vec![1; 3], vec![1; 3]];
        check_order(&errors, &bytes, &[0, 1, 1, 0, 0, 1]);
        let half = GainPerByte::new(Scores::new(&errors)).trust(0.5).order(&Sizes::new(0, &bytes).unwrap()).unwrap();
        assert_eq!(half.weights()[2], 1);
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
