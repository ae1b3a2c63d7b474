/// What can be wrong with a sign matrix given by a caller or read from a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// `rows x cols` overflows the address space.
    #[error("a {rows} x {cols} sign matrix does not fit in memory")]
    TooLarge {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// A buffer does not have the length that the shape demands.
    #[error("a {rows} x {cols} sign matrix needs {expected} {what}, got {actual}")]
    Length {
        /// What is counted: `bytes` or `values`.
        what: &'static str,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// The length that the shape demands.
        expected: usize,
        /// The length given.
        actual: usize,
    },
    /// The unused bits at the end of a row are not zero.
    #[error("row {row} of a sign matrix with {cols} columns has bits set beyond its last column")]
    TailBits {
        /// The first row with such bits.
        row: usize,
        /// Columns of the matrix.
        cols: usize,
    },
}
