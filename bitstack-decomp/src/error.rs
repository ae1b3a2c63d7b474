use bitstack_core::CoreError;

/// Why a weight could not be decomposed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DecompError {
    /// A rank of zero, or above what the weight can have.
    #[error("rank {rank} for a {rows} x {cols} weight; it must be from 1 to {}", rows.min(cols))]
    Rank {
        /// The rank asked for.
        rank: usize,
        /// Rows of the weight.
        rows: usize,
        /// Columns of the weight.
        cols: usize,
    },
    /// Nested codes of another rank than 1.
    #[error("nested codes have rank 1, got {rank}")]
    NestedRank {
        /// The rank asked for.
        rank: usize,
    },
    /// A setting of nested codes out of its range.
    #[error("{setting} of nested codes must be {expected}, got {value}")]
    NestedSetting {
        /// The setting.
        setting: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        value: f64,
    },
    /// No blocks were asked for.
    #[error("a weight needs at least one block, got 0")]
    NoBlocks,
    /// A weight is NaN or infinite.
    #[error("the weight at row {row}, column {col} is {value}")]
    WeightNotFinite {
        /// Its row.
        row: usize,
        /// Its column.
        col: usize,
        /// The value.
        value: f32,
    },
    /// The number of scales is not the number of columns.
    #[error("{len} activation scales for a weight of {cols} columns")]
    ScalesLength {
        /// Scales given.
        len: usize,
        /// Columns of the weight.
        cols: usize,
    },
    /// The Gram matrix is not `cols x cols`.
    #[error("the gram matrix of a weight of {expected} columns is {rows} x {cols}")]
    GramShape {
        /// Rows given.
        rows: usize,
        /// Columns given.
        cols: usize,
        /// Columns of the weight.
        expected: usize,
    },
    /// The Gram matrix has a value that is NaN or infinite.
    #[error("the gram matrix at row {row}, column {col} is {value}")]
    GramNotFinite {
        /// Its row.
        row: usize,
        /// Its column.
        col: usize,
        /// The value.
        value: f64,
    },
    /// The weights are so large that a factor of a block leaves f16's range.
    #[error(
        "block {block} needs a factor of {magnitude:e} in vector {vector}, above the {:e} of f16; divide the weight by a constant",
        half::f16::MAX
    )]
    FactorOverflow {
        /// The number of the block, from 1.
        block: usize,
        /// Which of its vectors, from 0.
        vector: usize,
        /// The largest value of the vector.
        magnitude: f64,
    },
    /// Neither the SVD nor the eigenvalues that stand in for it converged.
    #[error("the singular values of the residual of a {rows} x {cols} weight did not converge at block {block}")]
    SvdFailed {
        /// The number of the block, from 1.
        block: usize,
        /// Rows of the weight.
        rows: usize,
        /// Columns of the weight.
        cols: usize,
    },
    /// The weight is empty, or its parts do not fit together.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// A weight too large for its signs to be addressed.
    #[error(transparent)]
    Pack(#[from] bitstack_pack::PackError),
}
