//! Weights as files store them.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::Range;

/// Elements of a matrix, kept in the type they were stored in. All three widen to f32 exactly.
#[derive(Debug, Clone, PartialEq)]
pub enum Elements {
    /// 32-bit.
    F32(Vec<f32>),
    /// IEEE half precision.
    F16(Vec<f16>),
    /// The upper half of an f32.
    Bf16(Vec<bf16>),
}

impl Elements {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in memory.
    pub fn len_bytes(&self) -> usize {
        self.len() * if matches!(self, Self::F32(_)) { 4 } else { 2 }
    }

    /// All elements as f32, without a copy where they are f32 already.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(v) => v,
            wide => {
                let mut out = vec![0.0; wide.len()];
                wide.widen(0..wide.len(), &mut out);
                out
            }
        }
    }

    /// Writes the elements in `range` to `out` as f32.
    ///
    /// # Panics
    /// When there are no such elements, or `out` has another length.
    pub fn widen(&self, range: Range<usize>, out: &mut [f32]) {
        match self {
            Self::F32(v) => out.copy_from_slice(&v[range]),
            Self::F16(v) => v[range].convert_to_f32_slice(out),
            Self::Bf16(v) => {
                assert_eq!(out.len(), range.len(), "out has as many elements as the range");
                for (wide, narrow) in out.iter_mut().zip(&v[range]) {
                    *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
                }
            }
        }
    }
}

/// An ordinary matrix, row-major, as it is stored: a large model takes no more memory than its file.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    rows: usize,
    cols: usize,
    elements: Elements,
}

impl Dense {
    /// A matrix from its elements in row-major order; `None` when their number is not `rows * cols`.
    pub fn new(rows: usize, cols: usize, elements: Elements) -> Option<Self> {
        (rows.checked_mul(cols) == Some(elements.len())).then_some(Self { rows, cols, elements })
    }

    /// Rows and columns: output and input features of a weight.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Copies row `row` into `out`, which has as many elements as there are columns.
    ///
    /// # Panics
    /// When there is no such row, or `out` is not as long.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        self.elements.widen(row * self.cols..(row + 1) * self.cols, out);
    }

    /// The elements, row-major.
    pub fn elements(&self) -> &Elements {
        &self.elements
    }

    /// The elements, taken out.
    pub fn into_elements(self) -> Elements {
        self.elements
    }

    /// The same matrix stored as f32: twice the memory of a 16-bit one, and nothing left to widen on every use.
    pub fn widened(self) -> Self {
        Self { elements: Elements::F32(self.elements.into_f32()), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_of_the_wrong_number_of_elements_is_rejected() {
        assert!(Dense::new(2, 3, Elements::F32(vec![0.0; 5])).is_none());
        assert!(Dense::new(usize::MAX, 2, Elements::F32(Vec::new())).is_none());
    }
}
