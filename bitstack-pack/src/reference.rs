//! The layout of the published implementation of BitStack (arXiv 2410.23918), for its checkpoints.
//!
//! The bits of the whole matrix, row-major, follow each other without any padding between rows; the first is the most
//! significant of the first byte; 1 = +1; zero bits fill the last byte. So with `cols` a multiple of eight the two
//! layouts differ by the order of the bits in each byte only, and otherwise most rows start inside a byte.

use crate::layout::n_values;
use crate::{PackError, SignMatrix, SignView, packed_len, row_bytes};

impl SignMatrix {
    /// Converts a `rows x cols` matrix from the flat layout of the published implementation: row-major without padding
    /// between rows, most significant bit first, 1 = +1, `(rows * cols).div_ceil(8)` bytes, the last filled with zero bits.
    ///
    /// # Errors
    /// [`PackError::Length`] when `bytes` has another length, [`PackError::TooLarge`] when the matrix cannot exist, and
    /// [`PackError::TailBits`] (of the last row) when a fill bit is set.
    pub fn from_reference_bytes(rows: usize, cols: usize, bytes: &[u8]) -> Result<Self, PackError> {
        let n = n_values(rows, cols)?;
        let (expected, actual) = (row_bytes(n), bytes.len());
        if actual != expected {
            return Err(PackError::Length { what: "bytes", rows, cols, expected, actual });
        }
        if let Some(&last) = bytes.last()
            && !n.is_multiple_of(8)
            && last & (!0 >> (n % 8)) != 0
        {
            return Err(PackError::TailBits { row: rows - 1, cols });
        }
        if cols.is_multiple_of(8) {
            return Self::from_bytes(rows, cols, bytes.iter().map(|byte| byte.reverse_bits()).collect());
        }
        // At most eight times the length just checked: a row of one column takes a byte.
        let mut packed = vec![0; packed_len(rows, cols)?];
        for (row, out) in packed.chunks_exact_mut(row_bytes(cols)).enumerate() {
            let (first, shift) = (row * cols / 8, row * cols % 8);
            for (out, at) in out.iter_mut().zip(first..) {
                let pair = [bytes[at], bytes.get(at + 1).copied().unwrap_or(0)];
                *out = (u16::from_be_bytes(pair) << shift >> 8) as u8;
                *out = out.reverse_bits();
            }
            // The last byte has read on into the next row.
            out[cols / 8] &= !(!0 << (cols % 8));
        }
        Self::from_bytes(rows, cols, packed)
    }
}

impl SignView<'_> {
    /// Converts to the flat layout of the published implementation; see [`SignMatrix::from_reference_bytes`].
    pub fn to_reference_bytes(self) -> Vec<u8> {
        let (rows, cols, bytes) = (self.rows(), self.cols(), self.as_rows());
        if cols.is_multiple_of(8) {
            return bytes.iter().map(|byte| byte.reverse_bits()).collect();
        }
        // `rows * cols` bits, without forming that product: it may exceed `usize` where the bytes do not.
        let len = rows / 8 * cols + (rows % 8 * (cols / 8) + (rows % 8 * (cols % 8)).div_ceil(8));
        let mut flat = vec![0; len];
        let (mut first, mut shift) = (0, 0);
        for row in bytes.chunks_exact(row_bytes(cols)) {
            for (byte, at) in row.iter().zip(first..) {
                let [high, low] = (u16::from(byte.reverse_bits()) << 8 >> shift).to_be_bytes();
                flat[at] |= high;
                // Past the end only the zero bits of the row's tail remain.
                if let Some(next) = flat.get_mut(at + 1) {
                    *next |= low;
                }
            }
            first += cols / 8 + (shift + cols % 8) / 8;
            shift = (shift + cols % 8) % 8;
        }
        flat
    }
}
