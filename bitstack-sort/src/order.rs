//! The load order, and its prefixes.

use crate::{Sizes, SortError};

/// All blocks of all weights in the order in which they are loaded.
///
/// Stored as one weight index per entry: blocks of one weight are in stacking order, so the n-th entry that names a weight
/// is its block n. The first entries are the first blocks of all weights, in any order. With the bytes of every prefix at
/// hand, a plan is a binary search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOrder {
    n_weights: usize,
    weights: Vec<u32>,
    /// Resident bytes with the first `i` entries loaded; one more than there are entries, strictly rising.
    cumulative_bytes: Vec<u64>,
}

/// A block of one of several weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockId {
    /// The weight, from 0.
    pub weight: usize,
    /// The number of the block, from 1: the level at which it is the last.
    pub block: usize,
}

/// What is resident within a budget: a prefix of a [`LoadOrder`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Length of the prefix: the number of resident blocks of all weights together.
    pub n_blocks: usize,
    /// Bytes of these blocks and of what is always resident. At most the budget.
    pub resident_bytes: u64,
    /// Per weight the number of its resident blocks, at least 1.
    pub levels: Vec<u32>,
}

impl LoadOrder {
    /// Takes the weight index of every entry, as [`weights`](Self::weights) gives them, and checks that they are a load
    /// order of these sizes. Use it for an order read from a file, or made by a method of your own.
    ///
    /// # Errors
    /// [`SortError::UnknownWeight`], [`SortError::SurplusBlock`], [`SortError::MissingBlocks`], and
    /// [`SortError::FurtherBlockTooEarly`] if not all first blocks come first.
    pub fn from_weights(weights: &[u32], sizes: &Sizes) -> Result<Self, SortError> {
        let n_weights = sizes.n_weights();
        let mut levels = vec![0; n_weights];
        let mut cumulative_bytes = Vec::with_capacity(sizes.n_blocks() + 1);
        let mut resident_bytes = sizes.base_bytes();
        cumulative_bytes.push(resident_bytes);
        for (position, &weight) in weights.iter().enumerate() {
            let index = weight as usize;
            let Some(blocks) = sizes.blocks(index) else {
                return Err(SortError::UnknownWeight { position, weight, n_weights });
            };
            let block = levels[index];
            let Some(bytes) = blocks.get(block) else {
                return Err(SortError::SurplusBlock { position, weight: index, n_blocks: blocks.len() });
            };
            if block > 0 && position < n_weights {
                return Err(SortError::FurtherBlockTooEarly { position, weight: index, n_weights });
            }
            levels[index] += 1;
            // No overflow: each block is counted once, and the sizes were summed when they were made.
            resident_bytes += bytes;
            cumulative_bytes.push(resident_bytes);
        }
        for (weight, (blocks, &found)) in sizes.weights().zip(&levels).enumerate() {
            if found != blocks.len() {
                return Err(SortError::MissingBlocks { weight, expected: blocks.len(), found });
            }
        }
        Ok(Self { n_weights, weights: weights.to_vec(), cumulative_bytes })
    }

    /// The first `n_blocks` blocks as they are, the others in the order that `rest` has them: what another order would do from here.
    ///
    /// # Errors
    /// [`SortError::NoPlanOfLength`] as [`plan_of_len`](Self::plan_of_len); those of [`from_weights`](Self::from_weights) when one of the two
    /// is not of these sizes.
    pub fn continued(&self, n_blocks: usize, rest: &Self, sizes: &Sizes) -> Result<Self, SortError> {
        let mut ahead = self.plan_of_len(n_blocks)?.levels;
        let mut weights = self.weights[..n_blocks].to_vec();
        for &weight in &rest.weights {
            match ahead.get_mut(weight as usize) {
                Some(blocks) if *blocks > 0 => *blocks -= 1,
                _ => weights.push(weight),
            }
        }
        Self::from_weights(&weights, sizes)
    }

    /// The weight index of every entry: all there is to store.
    pub fn weights(&self) -> &[u32] {
        &self.weights
    }

    /// The entries, each with the number of its block.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = BlockId> {
        let mut levels = vec![0; self.n_weights];
        self.weights.iter().map(move |&weight| {
            let weight = weight as usize;
            levels[weight] += 1;
            BlockId { weight, block: levels[weight] }
        })
    }

    /// Number of weights.
    pub fn n_weights(&self) -> usize {
        self.n_weights
    }

    /// Number of blocks of all weights together.
    pub fn n_blocks(&self) -> usize {
        self.weights.len()
    }

    /// Resident bytes of every prefix: entry `i` is with the first `i` blocks loaded, entry 0 the bytes that are always
    /// resident. Strictly rising, one entry more than there are blocks.
    pub fn cumulative_bytes(&self) -> &[u64] {
        &self.cumulative_bytes
    }

    /// The smallest budget that has a plan: what is always resident and the first block of every weight.
    pub fn minimum_bytes(&self) -> u64 {
        self.cumulative_bytes[self.n_weights]
    }

    /// Bytes with everything loaded. A larger budget gives nothing more.
    pub fn total_bytes(&self) -> u64 {
        self.cumulative_bytes[self.weights.len()]
    }

    /// The longest prefix that fits in `budget_bytes`. A larger budget never gives less of any weight.
    ///
    /// # Errors
    /// [`SortError::BudgetBelowMinimum`] if the budget is below [`minimum_bytes`](Self::minimum_bytes).
    pub fn plan(&self, budget_bytes: u64) -> Result<Plan, SortError> {
        let n_fitting = self.cumulative_bytes.partition_point(|&bytes| bytes <= budget_bytes);
        match n_fitting.checked_sub(1) {
            Some(n_blocks) if n_blocks >= self.n_weights => Ok(self.prefix(n_blocks)),
            _ => Err(SortError::BudgetBelowMinimum { budget_bytes, minimum_bytes: self.minimum_bytes() }),
        }
    }

    /// The plan of the first `n_blocks` blocks, for instance of those that a cut file still has.
    ///
    /// # Errors
    /// [`SortError::NoPlanOfLength`] unless `n_blocks` is at least [`n_weights`](Self::n_weights) and at most
    /// [`n_blocks`](Self::n_blocks).
    pub fn plan_of_len(&self, n_blocks: usize) -> Result<Plan, SortError> {
        if n_blocks < self.n_weights || n_blocks > self.weights.len() {
            return Err(SortError::NoPlanOfLength {
                n_blocks,
                min_blocks: self.n_weights,
                max_blocks: self.weights.len(),
            });
        }
        Ok(self.prefix(n_blocks))
    }

    fn prefix(&self, n_blocks: usize) -> Plan {
        let mut levels = vec![0; self.n_weights];
        for &weight in &self.weights[..n_blocks] {
            levels[weight as usize] += 1;
        }
        Plan { n_blocks, resident_bytes: self.cumulative_bytes[n_blocks], levels }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes() -> Sizes {
        Sizes::new(100, [vec![10, 1, 2], vec![20, 3]]).unwrap()
    }

    fn order() -> LoadOrder {
        LoadOrder::from_weights(&[1, 0, 0, 1, 0], &sizes()).unwrap()
    }

    #[test]
    fn blocks_are_counted_per_weight() {
        let blocks: Vec<_> = order().iter().map(|id| (id.weight, id.block)).collect();
        assert_eq!(blocks, [(1, 1), (0, 1), (0, 2), (1, 2), (0, 3)]);
        assert_eq!(order().iter().len(), 5);
    }

    #[test]
    fn prefixes_are_summed_in_order() {
        assert_eq!(order().cumulative_bytes(), [100, 120, 130, 131, 134, 136]);
        assert_eq!((order().minimum_bytes(), order().total_bytes()), (130, 136));
    }

    #[test]
    fn plan_is_the_longest_prefix_that_fits() {
        let check = |budget, n_blocks, resident_bytes, levels: &[u32]| {
            let expected = Plan { n_blocks, resident_bytes, levels: levels.to_vec() };
            assert_eq!(order().plan(budget), Ok(expected.clone()), "budget {budget}");
            assert_eq!(order().plan_of_len(n_blocks), Ok(expected));
        };
        check(130, 2, 130, &[1, 1]);
        check(131, 3, 131, &[2, 1]);
        check(133, 3, 131, &[2, 1]);
        check(134, 4, 134, &[2, 2]);
        check(136, 5, 136, &[3, 2]);
        check(u64::MAX, 5, 136, &[3, 2]);
    }

    #[test]
    fn budget_below_the_minimum_is_rejected_with_the_minimum() {
        for budget_bytes in [0, 99, 100, 120, 129] {
            let expected = SortError::BudgetBelowMinimum { budget_bytes, minimum_bytes: 130 };
            assert_eq!(order().plan(budget_bytes), Err(expected));
        }
        let message = order().plan(129).unwrap_err().to_string();
        assert!(message.contains("129 bytes") && message.contains("130 bytes"), "{message}");
    }

    #[test]
    fn plan_of_a_length_that_does_not_exist_is_rejected() {
        for n_blocks in [0, 1, 6, usize::MAX] {
            let expected = SortError::NoPlanOfLength { n_blocks, min_blocks: 2, max_blocks: 5 };
            assert_eq!(order().plan_of_len(n_blocks), Err(expected));
        }
    }

    #[test]
    fn sequences_that_are_no_load_order_are_rejected() {
        let check = |weights: &[u32], expected| assert_eq!(LoadOrder::from_weights(weights, &sizes()), Err(expected));
        check(&[0, 2], SortError::UnknownWeight { position: 1, weight: 2, n_weights: 2 });
        check(&[0, u32::MAX], SortError::UnknownWeight { position: 1, weight: u32::MAX, n_weights: 2 });
        check(&[0, 1, 1, 1, 0], SortError::SurplusBlock { position: 3, weight: 1, n_blocks: 2 });
        check(&[0, 1, 0, 1], SortError::MissingBlocks { weight: 0, expected: 3, found: 2 });
        check(&[], SortError::MissingBlocks { weight: 0, expected: 3, found: 0 });
        check(&[0, 0, 1, 1, 0], SortError::FurtherBlockTooEarly { position: 1, weight: 0, n_weights: 2 });
    }

    #[test]
    fn an_order_is_continued_by_what_another_has_left() {
        let rest = LoadOrder::from_weights(&[0, 1, 1, 0, 0], &sizes()).unwrap();
        let check = |n_blocks, expected: &[u32]| {
            let continued = order().continued(n_blocks, &rest, &sizes()).unwrap();
            assert_eq!(continued, LoadOrder::from_weights(expected, &sizes()).unwrap());
        };
        check(2, &[1, 0, 1, 0, 0]);
        check(3, &[1, 0, 0, 1, 0]);
        check(5, &[1, 0, 0, 1, 0]);
        let short = order().continued(1, &rest, &sizes());
        assert_eq!(short, Err(SortError::NoPlanOfLength { n_blocks: 1, min_blocks: 2, max_blocks: 5 }));
        let more = Sizes::new(0, [vec![1; 3], vec![1; 3]]).unwrap();
        let other = LoadOrder::from_weights(&[0, 1, 0, 0, 1, 1], &more).unwrap();
        let surplus = SortError::SurplusBlock { position: 5, weight: 1, n_blocks: 2 };
        assert_eq!(order().continued(5, &other, &sizes()), Err(surplus));
    }

    #[test]
    fn model_without_weights_has_one_plan() {
        let order = LoadOrder::from_weights(&[], &Sizes::new(5, [[0; 0]; 0]).unwrap()).unwrap();
        assert_eq!(order.plan(5), Ok(Plan { n_blocks: 0, resident_bytes: 5, levels: vec![] }));
        assert_eq!(order.plan(4), Err(SortError::BudgetBelowMinimum { budget_bytes: 4, minimum_bytes: 5 }));
    }
}
