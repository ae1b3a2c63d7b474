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

/// Rows that lie together in [`SignLayout::Strips`].
pub const STRIP_ROWS: usize = 16;

/// Bytes that lie together in [`SignLayout::Strips`].
pub(crate) const UNIT_BYTES: usize = 4;

/// 4 bytes of each row of a strip: 16 rows x 32 columns.
pub const LINE_BYTES: usize = STRIP_ROWS * UNIT_BYTES;

/// How the bytes of a packed matrix are arranged. Both take the same number of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SignLayout {
    /// Row after row.
    #[default]
    Rows,
    /// In strips of [`STRIP_ROWS`] rows, the last of as many as are left. A strip begins with the first 4 bytes of each of its rows; then
    /// come the next 4 bytes of each, and so on to those that are left at the end of each row, fewer than 4 maybe.
    ///
    /// For kernels that keep rows in the lanes of a register. It is made in memory, by [`to_strips`](crate::to_strips).
    Strips,
}

/// Where byte `byte` of row `row` is in a strip of `rows` rows of `row_bytes` bytes, and how many bytes of the row follow there, itself
/// included.
pub(crate) const fn place_in_strip(rows: usize, row_bytes: usize, row: usize, byte: usize) -> (usize, usize) {
    let unit = byte - byte % UNIT_BYTES;
    let left = row_bytes - unit;
    let width = if left < UNIT_BYTES { left } else { UNIT_BYTES };
    (rows * unit + row * width + byte % UNIT_BYTES, width - byte % UNIT_BYTES)
}

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
