//! Where the bit of an element lies, and how many bytes a matrix takes.

use crate::PackError;

/// The order of the bits of a row inside a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitOrder {
    /// Column `c` is bit `c % 8` of byte `c / 8`, counted from the least significant.
    LeastSignificantFirst,
    /// Column `c` is bit `7 - c % 8` of byte `c / 8`: the order of the published implementation.
    MostSignificantFirst,
}

/// The order of every packed matrix of this crate.
///
/// A little-endian load of several bytes then has column `c` at bit `c`, which is the order of the lanes in a vector
/// register's mask.
pub const BIT_ORDER: BitOrder = BitOrder::LeastSignificantFirst;

/// Bytes of one packed row: rows are padded to whole bytes.
pub const fn row_bytes(cols: usize) -> usize {
    cols.div_ceil(8)
}

/// Bytes of a packed matrix.
///
/// # Errors
/// [`PackError::TooLarge`] when the number overflows `isize`, the largest size of an allocation.
pub const fn packed_len(rows: usize, cols: usize) -> Result<usize, PackError> {
    match rows.checked_mul(row_bytes(cols)) {
        Some(len) if len <= isize::MAX as usize => Ok(len),
        _ => Err(PackError::TooLarge { rows, cols }),
    }
}

/// Elements of a matrix, when `size_of::<f32>()` times that number still fits in memory.
pub(crate) fn n_values(rows: usize, cols: usize) -> Result<usize, PackError> {
    match rows.checked_mul(cols) {
        Some(n) if n <= isize::MAX as usize / size_of::<f32>() => Ok(n),
        _ => Err(PackError::TooLarge { rows, cols }),
    }
}
