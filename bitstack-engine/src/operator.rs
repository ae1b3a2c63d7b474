//! Weights at a level.

use bitstack_core::Level;
use bitstack_cpu::Kernel;
use bitstack_model::Dense;

/// A weight at a level, multiplied by as it is stored.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are planes, and a box would be an allocation for each product"
)]
pub enum Operator<'a> {
    /// Blocks.
    Planes {
        /// Those that are resident.
        level: Level<'a>,
        /// How to multiply by them.
        kernel: Kernel,
    },
    /// A weight that was not stacked.
    Kept(&'a Dense),
}

impl Operator<'_> {
    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Planes { level, .. } => [level.shape().rows(), level.shape().cols()],
            Self::Kept(dense) => dense.shape(),
        }
    }

    /// Copies row `row` into `out`, which has as many elements as there are columns; `work` grows to that length where a row is rebuilt.
    ///
    /// # Panics
    /// When there is no such row, or `out` is not as long.
    pub fn row_into(&self, row: usize, work: &mut Vec<f32>, out: &mut [f32]) {
        match self {
            Self::Kept(dense) => dense.row_into(row, out),
            Self::Planes { level, .. } => {
                work.resize(out.len(), 0.0);
                level.reconstruct_row(row, work, out).expect("a row of the weight's own length");
            }
        }
    }
}
