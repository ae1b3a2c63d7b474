//! Owned and borrowed sign matrices: the safe interface, with every check of shapes and lengths.

#[cfg(feature = "bitvec")]
use bitvec::{order::Lsb0, slice::BitSlice};

use crate::layout::n_values;
use crate::{Level, PackError, kernel, packed_len, row_bytes};

/// An owned `rows x cols` matrix of signs, one bit each: 1 = +1, 0 = -1.
///
/// Row-major; each row is padded to whole bytes with zero bits, in [`BIT_ORDER`](crate::BIT_ORDER).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SignMatrix {
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

/// A borrowed `rows x cols` matrix of signs, laid out as a [`SignMatrix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SignView<'a> {
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

/// Packs the signs of `values` (row-major, `rows * cols` of them) into `bytes`, of [`packed_len`], all of which is
/// overwritten.
///
/// An element is +1 where `value >= 0.0` and -1 elsewhere. So the sign of zero, of either kind, is +1, and that of a NaN
/// is -1 whatever its sign bit.
///
/// # Errors
/// [`PackError::Length`] when `values` or `bytes` have another length, [`PackError::TooLarge`] when no slice could have the
/// right one. `bytes` is untouched then.
pub fn pack_into(rows: usize, cols: usize, values: &[f32], bytes: &mut [u8]) -> Result<(), PackError> {
    pack_into_at(Level::detect(), rows, cols, values, bytes)
}

/// [`pack_into`] with the instructions of `level`, for tests and benchmarks. Panics when this CPU lacks them.
#[doc(hidden)]
pub fn pack_into_at(level: Level, rows: usize, cols: usize, values: &[f32], bytes: &mut [u8]) -> Result<(), PackError> {
    check_len("values", rows, cols, n_values(rows, cols)?, values.len())?;
    check_len("bytes", rows, cols, packed_len(rows, cols)?, bytes.len())?;
    if cols.is_multiple_of(8) {
        // No row has a tail: the matrix is one run.
        kernel::pack(level, bytes, values);
    } else {
        for (bytes, values) in bytes.chunks_exact_mut(row_bytes(cols)).zip(values.chunks_exact(cols)) {
            kernel::pack(level, bytes, values);
        }
    }
    Ok(())
}

fn check_len(what: &'static str, rows: usize, cols: usize, expected: usize, actual: usize) -> Result<(), PackError> {
    if actual == expected { Ok(()) } else { Err(PackError::Length { what, rows, cols, expected, actual }) }
}

impl SignMatrix {
    /// Packs the signs of `values` (row-major, `rows * cols` of them).
    ///
    /// An element is +1 where `value >= 0.0` and -1 elsewhere. So the sign of zero, of either kind, is +1, and that of a
    /// NaN is -1 whatever its sign bit.
    ///
    /// # Errors
    /// [`PackError::Length`] when `values` has another length, [`PackError::TooLarge`] when no slice could have the right
    /// one.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<Self, PackError> {
        // Before the allocation, whose size the shape alone decides.
        check_len("values", rows, cols, n_values(rows, cols)?, values.len())?;
        let mut bytes = vec![0; packed_len(rows, cols)?];
        pack_into(rows, cols, values, &mut bytes)?;
        Ok(Self { rows, cols, bytes })
    }

    /// Takes packed bytes, in [`BIT_ORDER`](crate::BIT_ORDER), rows padded to whole bytes with zero bits.
    ///
    /// # Errors
    /// Those of [`SignView::new`].
    pub fn from_bytes(rows: usize, cols: usize, bytes: Vec<u8>) -> Result<Self, PackError> {
        SignView::new(rows, cols, &bytes)?;
        Ok(Self { rows, cols, bytes })
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The packed bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The packed bytes, taken out.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The same matrix, borrowed.
    pub fn view(&self) -> SignView<'_> {
        SignView { rows: self.rows, cols: self.cols, bytes: &self.bytes }
    }
}

impl<'a> SignView<'a> {
    /// Borrows packed bytes, in [`BIT_ORDER`](crate::BIT_ORDER), rows padded to whole bytes with zero bits.
    ///
    /// # Errors
    /// [`PackError::Length`] when `bytes` is not of [`packed_len`], [`PackError::TooLarge`] when nothing could be, and
    /// [`PackError::TailBits`] when a bit is set beyond the last column of a row: equal matrices have equal bytes.
    pub fn new(rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self, PackError> {
        check_len("bytes", rows, cols, packed_len(rows, cols)?, bytes.len())?;
        if !cols.is_multiple_of(8) {
            let stray = !0u8 << (cols % 8);
            if let Some(row) = bytes.chunks_exact(row_bytes(cols)).position(|r| r[r.len() - 1] & stray != 0) {
                return Err(PackError::TailBits { row, cols });
            }
        }
        Ok(Self { rows, cols, bytes })
    }

    /// Rows of the matrix.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// The packed bytes.
    pub fn as_bytes(self) -> &'a [u8] {
        self.bytes
    }

    /// The packed bytes of row `row`, [`row_bytes`] of them.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(self, row: usize) -> &'a [u8] {
        // Not left to the slice: `row * len` may wrap around to a row that exists.
        assert!(row < self.rows, "row {row} of a sign matrix with {} rows", self.rows);
        let len = row_bytes(self.cols);
        &self.bytes[row * len..][..len]
    }

    /// Row `row` as a slice of `cols` bits, true = +1.
    ///
    /// # Panics
    /// When there is no such row.
    #[cfg(feature = "bitvec")]
    pub fn row_bits(self, row: usize) -> &'a BitSlice<u8, Lsb0> {
        &BitSlice::from_slice(self.row(row))[..self.cols]
    }

    /// The sign at (`row`, `col`) as +1.0 or -1.0.
    ///
    /// # Panics
    /// When there is no such element.
    pub fn get(self, row: usize, col: usize) -> f32 {
        assert!(col < self.cols, "column {col} of a sign matrix with {} columns", self.cols);
        if self.row(row)[col / 8] >> (col % 8) & 1 == 1 { 1.0 } else { -1.0 }
    }

    /// The whole matrix as +1.0 / -1.0, row-major.
    ///
    /// # Errors
    /// [`PackError::TooLarge`] when `rows * cols` values do not fit in the address space; they take 32 times the memory of
    /// the bits.
    pub fn unpack(self) -> Result<Vec<f32>, PackError> {
        let mut values = vec![0.0; n_values(self.rows, self.cols)?];
        self.unpack_into(&mut values)?;
        Ok(values)
    }

    /// Overwrites `out` with the whole matrix as +1.0 / -1.0, row-major.
    ///
    /// # Errors
    /// [`PackError::Length`] when `out` is not of length `rows * cols`, [`PackError::TooLarge`] when no slice could be.
    pub fn unpack_into(self, out: &mut [f32]) -> Result<(), PackError> {
        self.unpack_into_at(Level::detect(), out)
    }

    /// [`Self::unpack_into`] with the instructions of `level`. Panics when this CPU lacks them.
    #[doc(hidden)]
    pub fn unpack_into_at(self, level: Level, out: &mut [f32]) -> Result<(), PackError> {
        check_len("values", self.rows, self.cols, n_values(self.rows, self.cols)?, out.len())?;
        if self.cols.is_multiple_of(8) {
            kernel::unpack(level, self.bytes, out);
        } else {
            for (bytes, out) in self.bytes.chunks_exact(row_bytes(self.cols)).zip(out.chunks_exact_mut(self.cols)) {
                kernel::unpack(level, bytes, out);
            }
        }
        Ok(())
    }

    /// Overwrites `out` (`cols` values) with row `row` as +1.0 / -1.0.
    ///
    /// # Panics
    /// When there is no such row or `out` has another length.
    pub fn unpack_row_into(self, row: usize, out: &mut [f32]) {
        self.unpack_row_into_at(Level::detect(), row, out);
    }

    /// [`Self::unpack_row_into`] with the instructions of `level`. Panics when this CPU lacks them.
    #[doc(hidden)]
    pub fn unpack_row_into_at(self, level: Level, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "output length of an unpacked row");
        kernel::unpack(level, self.row(row), out);
    }

    /// Multiplies `values` (`cols` of them) by the signs of row `row`, in place.
    ///
    /// Exact for every value: it flips the sign bit where the sign is -1, of zeros, infinities and NaNs as well.
    ///
    /// # Panics
    /// When there is no such row or `values` has another length.
    pub fn apply_row(self, row: usize, values: &mut [f32]) {
        self.apply_row_at(Level::detect(), row, values);
    }

    /// [`Self::apply_row`] with the instructions of `level`. Panics when this CPU lacks them.
    #[doc(hidden)]
    pub fn apply_row_at(self, level: Level, row: usize, values: &mut [f32]) {
        assert_eq!(values.len(), self.cols, "number of values that a row of signs is applied to");
        kernel::apply(level, self.row(row), values);
    }

    /// Copies the matrix into an owned one.
    pub fn to_owned(self) -> SignMatrix {
        SignMatrix { rows: self.rows, cols: self.cols, bytes: self.bytes.to_vec() }
    }
}
