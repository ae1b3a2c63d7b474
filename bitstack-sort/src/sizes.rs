//! What every block costs.

use crate::SortError;
use crate::ragged::Ragged;

/// More blocks than this cannot be numbered: an order stores weight indices and a plan stores levels as `u32`.
const MAX_BLOCKS: usize = u32::MAX as usize;

/// The bytes of every block of every weight, and of what is resident at any size.
///
/// Weights may have different numbers of blocks and blocks of different sizes. Every weight has at least one block, every
/// block at least one byte, and the sum of all fits in a `u64`: checked once here, so nothing later can overflow.
#[derive(Debug, Clone, PartialEq)]
pub struct Sizes {
    base_bytes: u64,
    minimum_bytes: u64,
    total_bytes: u64,
    blocks: Ragged<u64>,
}

impl Sizes {
    /// Takes the bytes that are always resident (norms, biases, anything not stacked), and per weight the bytes of its
    /// blocks in the order in which they are stacked.
    ///
    /// # Errors
    /// [`SortError::NoBlocks`], [`SortError::EmptyBlock`], [`SortError::SizeOverflow`] and, beyond 2³² − 1 blocks in all,
    /// [`SortError::TooManyBlocks`].
    pub fn new<W: AsRef<[u64]>>(base_bytes: u64, weights: impl IntoIterator<Item = W>) -> Result<Self, SortError> {
        let blocks = Ragged::new(weights);
        let mut minimum_bytes = base_bytes;
        let mut total_bytes = base_bytes;
        let mut n_blocks = 0;
        for (weight, row) in blocks.rows().enumerate() {
            if row.is_empty() {
                return Err(SortError::NoBlocks { weight });
            }
            n_blocks += row.len();
            if n_blocks > MAX_BLOCKS {
                return Err(SortError::TooManyBlocks { weight, limit: MAX_BLOCKS });
            }
            for (block, &bytes) in (1..).zip(row) {
                if bytes == 0 {
                    return Err(SortError::EmptyBlock { weight, block });
                }
                total_bytes = total_bytes.checked_add(bytes).ok_or(SortError::SizeOverflow { weight, block })?;
            }
            // A part of the total just checked.
            minimum_bytes += row[0];
        }
        Ok(Self { base_bytes, minimum_bytes, total_bytes, blocks })
    }

    /// Bytes that are resident whatever the budget.
    pub fn base_bytes(&self) -> u64 {
        self.base_bytes
    }

    /// Bytes of the smallest usable model: the base and the first block of every weight.
    pub fn minimum_bytes(&self) -> u64 {
        self.minimum_bytes
    }

    /// Bytes of the base and all blocks.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Number of weights.
    pub fn n_weights(&self) -> usize {
        self.blocks.n_rows()
    }

    /// Number of blocks of all weights together.
    pub fn n_blocks(&self) -> usize {
        self.blocks.n_values()
    }

    /// Bytes of each block of one weight; `None` if there is no such weight.
    pub fn blocks(&self, weight: usize) -> Option<&[u64]> {
        self.blocks.row(weight)
    }

    /// The same, weight by weight.
    pub fn weights(&self) -> impl Iterator<Item = &[u64]> {
        self.blocks.rows()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_count_the_base_and_the_first_blocks() {
        let sizes = Sizes::new(7, [vec![10, 1, 1], vec![20]]).unwrap();
        assert_eq!((sizes.base_bytes(), sizes.minimum_bytes(), sizes.total_bytes()), (7, 37, 39));
        assert_eq!((sizes.n_weights(), sizes.n_blocks()), (2, 4));
        assert_eq!(sizes.blocks(0), Some(&[10, 1, 1][..]));
        assert_eq!(sizes.blocks(2), None);
        assert_eq!(sizes.blocks(usize::MAX), None);
    }

    #[test]
    fn sums_beyond_64_bits_are_rejected() {
        let of = |base, weights: &[Vec<u64>]| Sizes::new(base, weights);
        assert_eq!(of(1, &[vec![2], vec![3, u64::MAX - 5]]), Err(SortError::SizeOverflow { weight: 1, block: 2 }));
        assert_eq!(of(1, &[vec![2], vec![2, u64::MAX - 5]]).unwrap().total_bytes(), u64::MAX);
        assert_eq!(of(u64::MAX, &[vec![1]]), Err(SortError::SizeOverflow { weight: 0, block: 1 }));
    }

    #[test]
    fn weights_without_blocks_and_blocks_without_bytes_are_rejected() {
        assert_eq!(Sizes::new(0, [vec![1], vec![]]), Err(SortError::NoBlocks { weight: 1 }));
        assert_eq!(Sizes::new(0, [vec![1, 0]]), Err(SortError::EmptyBlock { weight: 0, block: 2 }));
    }
}
