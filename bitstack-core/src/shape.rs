use crate::CoreError;
use std::fmt;

/// The shape of a weight: `rows` output features, `cols` input features; never empty, and its element count fits in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    rows: usize,
    cols: usize,
}

impl Shape {
    /// Checks that there are elements, and that as many `f32` can be addressed.
    pub fn new(rows: usize, cols: usize) -> Result<Self, CoreError> {
        match rows.checked_mul(cols).and_then(|n| n.checked_mul(size_of::<f32>())) {
            Some(bytes) if bytes > 0 && bytes <= isize::MAX as usize => Ok(Self { rows, cols }),
            _ => Err(CoreError::BadShape { rows, cols }),
        }
    }

    /// Output features.
    pub const fn rows(self) -> usize {
        self.rows
    }

    /// Input features.
    pub const fn cols(self) -> usize {
        self.cols
    }

    /// The number of weights.
    pub const fn n_elems(self) -> usize {
        self.rows * self.cols
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.rows, self.cols)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_and_overflowing_shapes_are_rejected() {
        for (rows, cols) in [(0, 1), (1, 0), (usize::MAX, 2), (1 << 32, 1 << 30)] {
            assert_eq!(Shape::new(rows, cols), Err(CoreError::BadShape { rows, cols }));
        }
    }
}
