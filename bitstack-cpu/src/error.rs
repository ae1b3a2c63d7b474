/// What can be wrong with the arguments of a product.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// A dense weight is not whole rows.
    #[error("the weight has {len} values, which is not a whole number of rows of {cols}")]
    PartialRow {
        /// Columns of the weight.
        cols: usize,
        /// The number of values.
        len: usize,
    },
    /// The input is not whole tokens.
    #[error("x has {len} values, which is not a whole number of tokens of {cols}")]
    PartialToken {
        /// Columns of the weight.
        cols: usize,
        /// The length of x.
        len: usize,
    },
    /// The output has another length than tokens times rows.
    #[error("y must have {expected} values ({tokens} tokens of {rows}), got {actual}")]
    OutputLength {
        /// Tokens in x.
        tokens: usize,
        /// Rows of the weight.
        rows: usize,
        /// `tokens * rows`.
        expected: usize,
        /// The length of y.
        actual: usize,
    },
}
