//! The order to compare with: chance.

use crate::{LoadOrder, Sizes, SortError, Sorter};

/// A uniformly random interleaving that keeps the blocks of each weight in order, after the first block of each in weight
/// order: the random order of the paper's ablation (arXiv 2410.23918).
///
/// The same seed and sizes give the same order on every machine and in every version of this crate: the list of weight
/// indices (each as often as it has blocks beyond the first, ascending) is shuffled by Fisher and Yates from the end, with
/// Lemire's unbiased bounded integers on splitmix64 started from the seed. Only the numbers of blocks are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Random {
    /// Start of the generator.
    pub seed: u64,
}

impl Sorter for Random {
    fn order(&self, sizes: &Sizes) -> Result<LoadOrder, SortError> {
        let mut weights: Vec<u32> = (0..sizes.n_weights() as u32).collect();
        for (weight, blocks) in sizes.weights().enumerate() {
            weights.extend(std::iter::repeat_n(weight as u32, blocks.len() - 1));
        }
        // Shuffling the indices of a multiset makes all its distinct arrangements equally likely.
        let further = &mut weights[sizes.n_weights()..];
        let mut random = SplitMix64(self.seed);
        for last in (1..further.len()).rev() {
            further.swap(last, random.below(last as u64 + 1) as usize);
        }
        LoadOrder::from_weights(&weights, sizes)
    }
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`, for a bound of at least 1. Lemire, "Fast random integer generation in an interval" (2019).
    fn below(&mut self, bound: u64) -> u64 {
        let reject_below = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= reject_below {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn generator_is_splitmix64() {
        // The published outputs for the seed 1234567.
        let mut random = SplitMix64(1_234_567);
        let outputs = [(); 3].map(|()| random.next());
        assert_eq!(outputs, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn bounded_integers_are_unbiased() {
        // Scaling 2^64 values to 3·2^62 without rejection, every third result would come twice as often as the others.
        let mut random = SplitMix64(1);
        let n_multiples = (0..3000).filter(|_| random.below(3 << 62).is_multiple_of(3)).count();
        // 1000 expected with a standard deviation of 26, against 1500 with the bias.
        assert!((870..=1130).contains(&n_multiples), "{n_multiples} of 3000 are multiples of 3");
    }

    #[test]
    fn every_interleaving_is_equally_likely() {
        // 2, 2 and 1 blocks beyond the first: 5! / (2! 2! 1!) = 30 arrangements.
        let sizes = Sizes::new(0, [vec![1; 3], vec![1; 3], vec![1; 2]]).unwrap();
        let mut counts: HashMap<Vec<u32>, u32> = HashMap::new();
        for seed in 0..30_000 {
            let order = Random { seed }.order(&sizes).unwrap();
            assert_eq!(order.weights()[..3], [0, 1, 2]);
            *counts.entry(order.weights()[3..].to_vec()).or_default() += 1;
        }
        assert_eq!(counts.len(), 30);
        // 1000 expected of each, with a standard deviation of 31; five of those, as there are 30 counts.
        for (arrangement, count) in counts {
            assert!((845..=1155).contains(&count), "{arrangement:?} came {count} times");
        }
    }

    #[test]
    fn seed_gives_the_same_order_for_ever() {
        let sizes = Sizes::new(0, [vec![1; 4], vec![1; 4], vec![1; 4]]).unwrap();
        let order = |seed| Random { seed }.order(&sizes).unwrap();
        // Computed from the documentation by a separate program.
        assert_eq!(order(42).weights(), [0, 1, 2, 1, 2, 1, 1, 0, 0, 2, 0, 2]);
        assert_ne!(order(42), order(43));
    }
}
