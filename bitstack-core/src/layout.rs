//! What blocks are made of, without their contents, and how many bytes that takes.

use crate::Shape;

/// How the values of a basis or of coefficients are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FactorType {
    /// IEEE half precision.
    F16,
    /// Signed bytes, with one f16 scale per vector: value = scale · code.
    I8,
    /// One f16 scale per vector and nothing else, for coefficients only: value = scale · code, with the codes of block 1, which are of
    /// 8 bits.
    Scales,
}

impl FactorType {
    /// Bytes of `n_values` values in `n_vectors` vectors, `None` on overflow.
    pub(crate) fn bytes(self, n_values: u64, n_vectors: u64) -> Option<u64> {
        match self {
            Self::F16 => n_values.checked_mul(2),
            Self::I8 => n_vectors.checked_mul(2)?.checked_add(n_values),
            Self::Scales => n_vectors.checked_mul(2),
        }
    }
}

/// What a block is made of, without its contents: enough to say how many bytes it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockLayout {
    /// The weight's shape.
    pub shape: Shape,
    /// Columns of the factors.
    pub rank: usize,
    /// Planes the block brings coefficients for: 1 when additive, the block's number when refitted.
    pub planes: usize,
    /// The stored type of the basis, `None` when it is shared with an earlier block.
    pub basis: Option<FactorType>,
    /// The stored type of the coefficients.
    pub coefficients: FactorType,
    /// 16-bit words of the list of spikes; 0 when there is none.
    pub spike_words: usize,
}

impl BlockLayout {
    /// The paper's block: additive, its own basis, both factors in f16. Its bytes are those of Table 6 of arXiv 2410.23918.
    ///
    /// ```
    /// use bitstack_core::{BlockLayout, Shape};
    /// let block = BlockLayout::paper(Shape::new(4096, 4096)?, 16);
    /// assert_eq!(block.bytes(), Some(2_359_296)); // 2.25 MiB
    /// # Ok::<(), bitstack_core::CoreError>(())
    /// ```
    pub const fn paper(shape: Shape, rank: usize) -> Self {
        Self { shape, rank, planes: 1, basis: Some(FactorType::F16), coefficients: FactorType::F16, spike_words: 0 }
    }

    /// Bytes of all tensors of the block: packed signs, basis, coefficients and their scales, spikes. `None` when that overflows `u64`.
    pub fn bytes(&self) -> Option<u64> {
        let [rows, cols, rank, planes] =
            [self.shape.rows(), self.shape.cols(), self.rank, self.planes].map(|n| n as u64);
        let signs = rows.checked_mul(cols.div_ceil(8))?;
        let basis = match self.basis {
            Some(t) => t.bytes(rank.checked_mul(cols)?, rank)?,
            None => 0,
        };
        let vectors = planes.checked_mul(rank)?;
        let coefficients = self.coefficients.bytes(rows.checked_mul(vectors)?, vectors)?;
        let spikes = (self.spike_words as u64).checked_mul(2)?;
        signs.checked_add(basis)?.checked_add(coefficients)?.checked_add(spikes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_paper_block_are_those_of_table_6() {
        // MiB at k = 16, as printed in Table 6 with two decimals (29.125 rounded up).
        for (rows, cols, mib) in [
            (4096, 4096, 2.25),
            (11008, 4096, 5.84),
            (1024, 4096, 0.66),
            (14336, 4096, 7.56),
            (8192, 8192, 8.50),
            (28672, 8192, 29.13),
        ] {
            let bytes = BlockLayout::paper(Shape::new(rows, cols).unwrap(), 16).bytes().unwrap();
            assert!((bytes as f64 / f64::from(1 << 20) - mib).abs() <= 0.005, "{rows} x {cols}: {bytes}");
        }
    }

    #[test]
    fn eight_bit_factors_cost_one_byte_a_value_and_one_half_a_vector() {
        let shape = Shape::new(10, 20).unwrap();
        let block = BlockLayout {
            shape,
            rank: 2,
            planes: 3,
            basis: Some(FactorType::I8),
            coefficients: FactorType::I8,
            spike_words: 0,
        };
        assert_eq!(block.bytes(), Some(10 * 3 + (2 * 20 + 2 * 2) + (10 * 3 * 2 + 3 * 2 * 2)));
        assert_eq!(BlockLayout { spike_words: 7, ..block }.bytes(), Some(block.bytes().unwrap() + 14));
        assert_eq!(BlockLayout { basis: None, ..block }.bytes(), Some(10 * 3 + (10 * 3 * 2 + 3 * 2 * 2)));
    }

    #[test]
    fn bytes_that_overflow_are_none() {
        let shape = Shape::new(1, 1).unwrap();
        assert_eq!(BlockLayout::paper(shape, usize::MAX).bytes(), None);
    }
}
