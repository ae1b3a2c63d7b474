//! Owned and borrowed sign matrices: the safe interface, with every check of shapes and lengths.

use std::borrow::Cow;

#[cfg(feature = "bitvec")]
use bitvec::{order::Lsb0, slice::BitSlice, vec::BitVec};

use crate::layout::{LINE_BYTES, UNIT_BYTES, n_values, place_in_strip};
use crate::{Isa, PackError, STRIP_ROWS, SignLayout, kernel, packed_len, row_bytes};

/// An owned `rows x cols` matrix of signs, one bit each: 1 = +1, 0 = -1.
///
/// Row-major; each row is padded to whole bytes with zero bits, in [`BIT_ORDER`](crate::BIT_ORDER).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SignMatrix {
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

/// A borrowed `rows x cols` matrix of signs, laid out as a [`SignMatrix`] unless it is said to be in another [`SignLayout`]. Views are equal
/// when the matrices are and the layouts too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SignView<'a> {
    rows: usize,
    cols: usize,
    layout: SignLayout,
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
    pack_into_at(Isa::detect(), rows, cols, values, bytes)
}

/// [`pack_into`] with the instructions of `isa`, for tests and benchmarks. Panics when this CPU lacks them.
#[doc(hidden)]
pub fn pack_into_at(isa: Isa, rows: usize, cols: usize, values: &[f32], bytes: &mut [u8]) -> Result<(), PackError> {
    check_len("values", rows, cols, n_values(rows, cols)?, values.len())?;
    check_len("bytes", rows, cols, packed_len(rows, cols)?, bytes.len())?;
    if cols.is_multiple_of(8) {
        // No row has a tail: the matrix is one run.
        kernel::pack(isa, bytes, values);
    } else {
        for (bytes, values) in bytes.chunks_exact_mut(row_bytes(cols)).zip(values.chunks_exact(cols)) {
            kernel::pack(isa, bytes, values);
        }
    }
    Ok(())
}

/// Rearranges the bytes of a packed matrix from [`SignLayout::Rows`] to [`SignLayout::Strips`], in place. It takes a buffer of one strip
/// meanwhile, and about as long as copying the bytes. Whole strips, sixteen rows each, are a matrix of their own in both layouts, which
/// may be arranged before the rest is there.
///
/// # Errors
/// [`PackError::Length`] when `bytes` is not of [`packed_len`], [`PackError::TooLarge`] when nothing could be; nothing is changed then.
pub fn to_strips(rows: usize, cols: usize, bytes: &mut [u8]) -> Result<(), PackError> {
    to_strips_at(Isa::detect(), rows, cols, bytes)
}

/// [`to_strips`] with the instructions of `isa`, for tests. Panics when this CPU lacks them.
#[doc(hidden)]
pub fn to_strips_at(isa: Isa, rows: usize, cols: usize, bytes: &mut [u8]) -> Result<(), PackError> {
    check_len("bytes", rows, cols, packed_len(rows, cols)?, bytes.len())?;
    let len = row_bytes(cols);
    let mut buffer = vec![0; STRIP_ROWS.min(rows) * len];
    for strip in bytes.chunks_mut((STRIP_ROWS * len).max(1)) {
        let rows = strip.len() / len;
        let buffer = &mut buffer[..strip.len()];
        buffer.copy_from_slice(strip);
        let whole = if rows == STRIP_ROWS { len / UNIT_BYTES } else { 0 };
        if whole > 0 {
            kernel::lines(isa, buffer, len, &mut strip.as_chunks_mut().0[..whole]);
        }
        for (row, from) in buffer.chunks_exact(len).enumerate() {
            for (i, unit) in from.chunks(UNIT_BYTES).enumerate().skip(whole) {
                strip[place_in_strip(rows, len, row, UNIT_BYTES * i).0..][..unit.len()].copy_from_slice(unit);
            }
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
        SignView { rows: self.rows, cols: self.cols, layout: SignLayout::Rows, bytes: &self.bytes }
    }
}

impl<'a> SignView<'a> {
    /// Borrows packed bytes, in [`BIT_ORDER`](crate::BIT_ORDER), rows padded to whole bytes with zero bits.
    ///
    /// # Errors
    /// [`PackError::Length`] when `bytes` is not of [`packed_len`], [`PackError::TooLarge`] when nothing could be, and
    /// [`PackError::TailBits`] when a bit is set beyond the last column of a row: equal matrices have equal bytes.
    pub fn new(rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self, PackError> {
        Self::with_layout(rows, cols, SignLayout::Rows, bytes)
    }

    /// Borrows packed bytes in the given layout.
    ///
    /// # Errors
    /// Those of [`SignView::new`].
    pub fn with_layout(rows: usize, cols: usize, layout: SignLayout, bytes: &'a [u8]) -> Result<Self, PackError> {
        check_len("bytes", rows, cols, packed_len(rows, cols)?, bytes.len())?;
        let view = Self { rows, cols, layout, bytes };
        if !cols.is_multiple_of(8) {
            let stray = !0u8 << (cols % 8);
            if let Some(row) = (0..rows).find(|&r| bytes[view.place(r, cols / 8).0] & stray != 0) {
                return Err(PackError::TailBits { row, cols });
            }
        }
        Ok(view)
    }

    /// How the bytes are arranged.
    pub fn layout(self) -> SignLayout {
        self.layout
    }

    /// Where byte `byte` of row `row` is, and how many bytes of the row follow there, itself included. Both exist.
    fn place(self, row: usize, byte: usize) -> (usize, usize) {
        let len = row_bytes(self.cols);
        match self.layout {
            SignLayout::Rows => (row * len + byte, len - byte),
            SignLayout::Strips => {
                let first_row = row / STRIP_ROWS * STRIP_ROWS;
                let (at, n) = place_in_strip(STRIP_ROWS.min(self.rows - first_row), len, row - first_row, byte);
                (first_row * len + at, n)
            }
        }
    }

    /// Rows of the matrix.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// The packed bytes, in the view's [`layout`](Self::layout).
    pub fn as_bytes(self) -> &'a [u8] {
        self.bytes
    }

    /// The packed bytes in [`SignLayout::Rows`]; rearranged where they are in another.
    pub fn as_rows(self) -> Cow<'a, [u8]> {
        match self.layout {
            SignLayout::Rows => Cow::Borrowed(self.bytes),
            SignLayout::Strips => {
                let mut bytes = vec![0; self.bytes.len()];
                for (row, out) in bytes.chunks_exact_mut(row_bytes(self.cols).max(1)).enumerate() {
                    self.copy_row(row, 0, out);
                }
                Cow::Owned(bytes)
            }
        }
    }

    /// The packed bytes of row `row`, [`row_bytes`] of them; put together where they do not lie together.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(self, row: usize) -> Cow<'a, [u8]> {
        // Not left to the slice: `row * len` may wrap around to a row that exists.
        assert!(row < self.rows, "row {row} of a sign matrix with {} rows", self.rows);
        let len = row_bytes(self.cols);
        match self.layout {
            SignLayout::Rows => Cow::Borrowed(&self.bytes[row * len..][..len]),
            SignLayout::Strips => {
                let mut bytes = vec![0; len];
                self.copy_row(row, 0, &mut bytes);
                Cow::Owned(bytes)
            }
        }
    }

    /// Overwrites `out` with bytes of row `row`, from `first_byte` on.
    ///
    /// # Panics
    /// When there is no such row, or it has not so many bytes.
    pub fn copy_row(self, row: usize, first_byte: usize, mut out: &mut [u8]) {
        assert!(row < self.rows, "row {row} of a sign matrix with {} rows", self.rows);
        let len = row_bytes(self.cols);
        assert!(first_byte <= len && out.len() <= len - first_byte, "bytes of a row of {} columns", self.cols);
        let mut byte = first_byte;
        while !out.is_empty() {
            let (at, n) = self.place(row, byte);
            let (some, rest) = out.split_at_mut(n.min(out.len()));
            some.copy_from_slice(&self.bytes[at..][..some.len()]);
            (byte, out) = (byte + some.len(), rest);
        }
    }

    /// Row `row` as `cols` bits, true = +1.
    ///
    /// # Panics
    /// When there is no such row.
    #[cfg(feature = "bitvec")]
    pub fn row_bits(self, row: usize) -> Cow<'a, BitSlice<u8, Lsb0>> {
        match self.row(row) {
            Cow::Borrowed(bytes) => Cow::Borrowed(&BitSlice::from_slice(bytes)[..self.cols]),
            Cow::Owned(bytes) => {
                let mut bits = BitVec::from_vec(bytes);
                bits.truncate(self.cols);
                Cow::Owned(bits)
            }
        }
    }

    /// The lines of strip `strip` as they lie in memory: item `i` is bytes `4i..4i + 4` of each of its [`STRIP_ROWS`] rows. A last one that is
    /// not whole is not among them. `None` when the matrix is in another layout or the strip has fewer rows.
    ///
    /// # Panics
    /// When there is no such strip.
    #[inline]
    pub fn strip_lines(self, strip: usize) -> Option<&'a [[u8; LINE_BYTES]]> {
        let bytes = self.strip_bytes(strip);
        let whole = self.layout == SignLayout::Strips && bytes.len() == STRIP_ROWS * row_bytes(self.cols);
        whole.then_some(bytes.as_chunks().0)
    }

    /// Overwrites `lines` with those of strip `strip` from line `first_line` on: item `i` is bytes `4 (first_line + i)..` of each of its rows.
    /// Bytes beyond the matrix are zero.
    ///
    /// # Panics
    /// When there is no such strip.
    pub fn copy_lines(self, strip: usize, first_line: usize, lines: &mut [[u8; LINE_BYTES]]) {
        self.copy_lines_at(Isa::detect(), strip, first_line, lines);
    }

    /// [`Self::copy_lines`] with the instructions of `isa`. Panics when this CPU lacks them.
    #[doc(hidden)]
    pub fn copy_lines_at(self, isa: Isa, strip: usize, first_line: usize, lines: &mut [[u8; LINE_BYTES]]) {
        let (len, bytes) = (row_bytes(self.cols), self.strip_bytes(strip));
        let mut done = 0;
        if bytes.len() == STRIP_ROWS * len {
            // Lines without bytes beyond the matrix.
            done = (len / UNIT_BYTES).saturating_sub(first_line).min(lines.len());
            let whole = &mut lines[..done];
            match self.layout {
                _ if whole.is_empty() => {}
                SignLayout::Rows => kernel::lines(isa, &bytes[UNIT_BYTES * first_line..], len, whole),
                SignLayout::Strips => whole.copy_from_slice(&bytes.as_chunks().0[first_line..][..done]),
            }
        }
        let rows = STRIP_ROWS * strip..self.rows.min(STRIP_ROWS * (strip + 1));
        for (line, i) in lines[done..].iter_mut().zip(first_line + done..) {
            line.fill(0);
            let first_byte = i.saturating_mul(UNIT_BYTES).min(len);
            let n = UNIT_BYTES.min(len - first_byte);
            for (row, unit) in rows.clone().zip(line.as_chunks_mut::<UNIT_BYTES>().0) {
                self.copy_row(row, first_byte, &mut unit[..n]);
            }
        }
    }

    /// All bytes of a strip: the same ones in either layout.
    #[inline]
    fn strip_bytes(self, strip: usize) -> &'a [u8] {
        let n_strips = self.rows.div_ceil(STRIP_ROWS);
        assert!(strip < n_strips, "strip {strip} of a sign matrix with {n_strips} strips");
        let len = row_bytes(self.cols);
        let rows = STRIP_ROWS.min(self.rows - STRIP_ROWS * strip);
        &self.bytes[STRIP_ROWS * strip * len..][..rows * len]
    }

    /// The sign at (`row`, `col`) as +1.0 or -1.0.
    ///
    /// # Panics
    /// When there is no such element.
    pub fn get(self, row: usize, col: usize) -> f32 {
        assert!(col < self.cols, "column {col} of a sign matrix with {} columns", self.cols);
        assert!(row < self.rows, "row {row} of a sign matrix with {} rows", self.rows);
        if self.bytes[self.place(row, col / 8).0] >> (col % 8) & 1 == 1 { 1.0 } else { -1.0 }
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
        self.unpack_into_at(Isa::detect(), out)
    }

    /// [`Self::unpack_into`] with the instructions of `isa`. Panics when this CPU lacks them.
    #[doc(hidden)]
    pub fn unpack_into_at(self, isa: Isa, out: &mut [f32]) -> Result<(), PackError> {
        check_len("values", self.rows, self.cols, n_values(self.rows, self.cols)?, out.len())?;
        let bytes = self.as_rows();
        if self.cols.is_multiple_of(8) {
            kernel::unpack(isa, &bytes, out);
        } else {
            for (bytes, out) in bytes.chunks_exact(row_bytes(self.cols)).zip(out.chunks_exact_mut(self.cols)) {
                kernel::unpack(isa, bytes, out);
            }
        }
        Ok(())
    }

    /// Overwrites `out` (`cols` values) with row `row` as +1.0 / -1.0.
    ///
    /// # Panics
    /// When there is no such row or `out` has another length.
    pub fn unpack_row_into(self, row: usize, out: &mut [f32]) {
        self.unpack_row_into_at(Isa::detect(), row, out);
    }

    /// [`Self::unpack_row_into`] with the instructions of `isa`. Panics when this CPU lacks them.
    #[doc(hidden)]
    pub fn unpack_row_into_at(self, isa: Isa, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "output length of an unpacked row");
        self.with_row(row, out, |bytes, out| kernel::unpack(isa, bytes, out));
    }

    /// Multiplies `values` (`cols` of them) by the signs of row `row`, in place.
    ///
    /// Exact for every value: it flips the sign bit where the sign is -1, of zeros, infinities and NaNs as well.
    ///
    /// # Panics
    /// When there is no such row or `values` has another length.
    pub fn apply_row(self, row: usize, values: &mut [f32]) {
        self.apply_row_at(Isa::detect(), row, values);
    }

    /// [`Self::apply_row`] with the instructions of `isa`. Panics when this CPU lacks them.
    #[doc(hidden)]
    pub fn apply_row_at(self, isa: Isa, row: usize, values: &mut [f32]) {
        assert_eq!(values.len(), self.cols, "number of values that a row of signs is applied to");
        self.with_row(row, values, |bytes, values| kernel::apply(isa, bytes, values));
    }

    /// Calls `work` for the bytes of row `row` with the values of the same columns, a piece at a time: the row may not lie together.
    fn with_row(self, row: usize, values: &mut [f32], mut work: impl FnMut(&[u8], &mut [f32])) {
        const PIECE: usize = 512;
        let mut piece = [0; PIECE];
        for (i, values) in values.chunks_mut(8 * PIECE).enumerate() {
            let bytes = &mut piece[..row_bytes(values.len())];
            self.copy_row(row, i * PIECE, bytes);
            work(bytes, values);
        }
    }

    /// Copies the matrix into an owned one.
    pub fn to_owned(self) -> SignMatrix {
        SignMatrix { rows: self.rows, cols: self.cols, bytes: self.as_rows().into_owned() }
    }
}
