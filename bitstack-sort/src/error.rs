//! Everything that can be wrong with sizes, scores, an order or a budget.

/// Why sizes, scores, an order or a budget were refused. Weights and positions count from 0, blocks from 1.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SortError {
    /// The budget does not hold the smallest usable model.
    #[error(
        "a budget of {budget_bytes} bytes is below the minimum of {minimum_bytes} bytes \
         (what is always resident and the first block of every weight)"
    )]
    BudgetBelowMinimum {
        /// The budget asked for.
        budget_bytes: u64,
        /// The smallest budget that works.
        minimum_bytes: u64,
    },
    /// A plan of so many blocks does not exist for this order.
    #[error(
        "a plan of {n_blocks} blocks does not exist: the smallest has {min_blocks} blocks, the largest {max_blocks}"
    )]
    NoPlanOfLength {
        /// The number of blocks asked for.
        n_blocks: usize,
        /// The number of weights: each has its first block in every plan.
        min_blocks: usize,
        /// The number of all blocks.
        max_blocks: usize,
    },
    /// The sizes add up to more than a `u64` holds.
    #[error("sizes overflow: the bytes up to block {block} of weight {weight} do not fit in 64 bits")]
    SizeOverflow {
        /// The weight at which the sum overflows.
        weight: usize,
        /// The block at which the sum overflows.
        block: usize,
    },
    /// A weight without blocks can never be resident.
    #[error("weight {weight} has no blocks: every weight needs at least one")]
    NoBlocks {
        /// The weight in question.
        weight: usize,
    },
    /// A block without bytes.
    #[error("block {block} of weight {weight} has a size of 0 bytes")]
    EmptyBlock {
        /// The weight in question.
        weight: usize,
        /// The block in question.
        block: usize,
    },
    /// More blocks than an order can number.
    #[error("more than {limit} blocks in all (reached in weight {weight})")]
    TooManyBlocks {
        /// The weight at which the limit was passed.
        weight: usize,
        /// The largest number of blocks of all weights together.
        limit: usize,
    },
    /// Scores for another number of weights.
    #[error("scores are for {found} weights, sizes for {expected}")]
    ScoredWeights {
        /// Weights in the sizes.
        expected: usize,
        /// Weights in the scores.
        found: usize,
    },
    /// Scores for another number of blocks.
    #[error("weight {weight} has {found} scores for its {expected} blocks")]
    ScoredBlocks {
        /// The weight in question.
        weight: usize,
        /// Its blocks in the sizes.
        expected: usize,
        /// Its scores.
        found: usize,
    },
    /// An error of [`GainPerByte`](crate::GainPerByte) is NaN or infinite.
    #[error("the error of weight {weight} with {level} blocks is {value}, which is not finite")]
    NonFiniteError {
        /// The weight in question.
        weight: usize,
        /// The number of its blocks loaded.
        level: u32,
        /// The value given.
        value: f64,
    },
    /// The trust of [`GainPerByte`](crate::GainPerByte) is out of its range.
    #[error("the trust in errors is {value}, which is not from 0 to 1")]
    Trust {
        /// The value given.
        value: f64,
    },
    /// An order names a weight that does not exist.
    #[error("entry {position} of the load order names weight {weight}, but there are {n_weights} weights")]
    UnknownWeight {
        /// Index in the order.
        position: usize,
        /// The weight named there.
        weight: u32,
        /// The number of weights.
        n_weights: usize,
    },
    /// An order names a weight more often than it has blocks.
    #[error("entry {position} of the load order names weight {weight} again, but it has {n_blocks} blocks only")]
    SurplusBlock {
        /// Index in the order.
        position: usize,
        /// The weight named there.
        weight: usize,
        /// The blocks this weight has.
        n_blocks: usize,
    },
    /// An order names a weight less often than it has blocks.
    #[error("the load order has {found} of the {expected} blocks of weight {weight}")]
    MissingBlocks {
        /// The weight in question.
        weight: usize,
        /// The blocks this weight has.
        expected: usize,
        /// How often the order names it.
        found: usize,
    },
    /// An order has a second block before some weight's first.
    #[error(
        "entry {position} of the load order is a further block of weight {weight}: \
         the first blocks of all {n_weights} weights come first"
    )]
    FurtherBlockTooEarly {
        /// Index in the order.
        position: usize,
        /// The weight named there.
        weight: usize,
        /// The number of weights.
        n_weights: usize,
    },
}
