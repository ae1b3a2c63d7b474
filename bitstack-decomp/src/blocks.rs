//! One way in for all methods.

use crate::{DecompError, DecomposeOptions, Decomposition, Method, Step, avd, nested};
use bitstack_core::{Shape, WeightStack};
use ndarray::ArrayView2;

/// Decomposes a weight, `rows x cols`, into all its blocks.
///
/// # Errors
/// Those of [`blocks`], and of each step of [`Blocks`].
pub fn decompose(weight: ArrayView2<'_, f32>, options: &DecomposeOptions<'_>) -> Result<Decomposition, DecompError> {
    let blocks = blocks(weight, options)?;
    let mut stack = WeightStack::new(Shape::new(weight.nrows(), weight.ncols())?);
    let mut errors = Vec::with_capacity(blocks.len());
    for step in blocks {
        let step = step?;
        stack.push(step.block)?;
        errors.push(step.error);
    }
    Ok(Decomposition { stack, errors })
}

/// Decomposes a weight, `rows x cols`, block after block.
///
/// [`Method::Avd`] computes each block when it is asked for, so one can stop at an error that is low enough. It takes about 4 bytes per
/// weight while it runs, and 4 · cols² more when there is a Gram matrix; [`crate::Svd::Exact`] several times that. [`Method::Nested`]
/// chooses planes jointly and computes all blocks here; it takes about n_blocks / 4 bytes per weight, 12 · cols² for the Gram matrix, and
/// per thread 512 · cols · (2 · joint planes + later planes + 3).
///
/// # Errors
/// When the weight is empty or has values that are not finite, when the rank is 0 or above min(rows, cols) (for nested codes: not 1),
/// when no blocks are asked for, when scales or Gram matrix do not fit the weight, and for settings of nested codes out of range.
pub fn blocks(weight: ArrayView2<'_, f32>, options: &DecomposeOptions<'_>) -> Result<Blocks, DecompError> {
    Ok(Blocks(match &options.method {
        Method::Avd => Inner::Avd(Box::new(avd::blocks(weight, options)?)),
        Method::Nested(nested) => Inner::Nested(nested::steps(weight, options, nested)?.into_iter()),
    }))
}

/// The blocks of a weight, each with the error of the weight up to it. Made by [`blocks`].
///
/// An error ends the iteration: [`DecompError::FactorOverflow`] for weights beyond the range of f16 factors, above about 10⁹;
/// [`DecompError::SvdFailed`].
pub struct Blocks(Inner);

enum Inner {
    Avd(Box<avd::Blocks>),
    Nested(std::vec::IntoIter<Step>),
}

impl Iterator for Blocks {
    type Item = Result<Step, DecompError>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.0 {
            Inner::Avd(blocks) => blocks.next(),
            Inner::Nested(steps) => steps.next().map(Ok),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        match &self.0 {
            Inner::Avd(blocks) => blocks.size_hint(),
            Inner::Nested(steps) => steps.size_hint(),
        }
    }
}

impl ExactSizeIterator for Blocks {}
