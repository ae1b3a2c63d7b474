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
pub const BIT_ORDER: BitOrder = BitOrder::LeastSignificantFirst;

/// Bytes of one packed row: rows are padded to whole bytes.
pub const fn row_bytes(cols: usize) -> usize {
    cols.div_ceil(8)
}

/// Bytes of a packed matrix.
///
/// # Errors
/// [`PackError::TooLarge`] when the number overflows `usize`.
pub const fn packed_len(rows: usize, cols: usize) -> Result<usize, PackError> {
    match rows.checked_mul(row_bytes(cols)) {
        Some(len) if len <= isize::MAX as usize => Ok(len),
        _ => Err(PackError::TooLarge { rows, cols }),
    }
}

/// An owned `rows x cols` matrix of signs, one bit each: 1 = +1, 0 = -1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignMatrix {
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

/// A borrowed `rows x cols` matrix of signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignView<'a> {
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

impl SignMatrix {
    /// Packs the signs of `values` (row-major, `rows * cols` of them). The sign of zero (of either kind) is +1; that of a NaN is its
    /// sign bit's.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<Self, PackError> {
        let len = packed_len(rows, cols)?;
        let expected = rows.checked_mul(cols).ok_or(PackError::TooLarge { rows, cols })?;
        if values.len() != expected {
            return Err(PackError::Length { what: "values", rows, cols, expected, actual: values.len() });
        }
        let mut bytes = vec![0; len];
        if cols > 0 {
            for (row, out) in values.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes(cols))) {
                for (c, &x) in row.iter().enumerate() {
                    out[c / 8] |= u8::from(x >= 0.0) << (c % 8);
                }
            }
        }
        Ok(Self { rows, cols, bytes })
    }

    /// Takes packed bytes, in [`BIT_ORDER`], rows padded to whole bytes with zero bits.
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
    /// Borrows packed bytes, in [`BIT_ORDER`], rows padded to whole bytes with zero bits.
    pub fn new(rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self, PackError> {
        let expected = packed_len(rows, cols)?;
        if bytes.len() != expected {
            return Err(PackError::Length { what: "bytes", rows, cols, expected, actual: bytes.len() });
        }
        if cols % 8 != 0 {
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

    /// The packed bytes of row `row`. Panics when there is no such row.
    pub fn row(self, row: usize) -> &'a [u8] {
        let len = row_bytes(self.cols);
        &self.bytes[row * len..][..len]
    }

    /// The sign at (`row`, `col`) as +1.0 or -1.0. Panics when there is no such element.
    pub fn get(self, row: usize, col: usize) -> f32 {
        assert!(col < self.cols, "column {col} of a sign matrix with {} columns", self.cols);
        if self.row(row)[col / 8] >> (col % 8) & 1 == 1 { 1.0 } else { -1.0 }
    }

    /// Writes row `row` as +1.0 / -1.0 to `out` (`cols` values). Panics when there is no such row or `out` has another length.
    pub fn unpack_row_into(self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "output length of an unpacked row");
        let bytes = self.row(row);
        for (c, o) in out.iter_mut().enumerate() {
            *o = if bytes[c / 8] >> (c % 8) & 1 == 1 { 1.0 } else { -1.0 };
        }
    }

    /// Copies the matrix into an owned one.
    pub fn to_owned(self) -> SignMatrix {
        SignMatrix { rows: self.rows, cols: self.cols, bytes: self.bytes.to_vec() }
    }
}
