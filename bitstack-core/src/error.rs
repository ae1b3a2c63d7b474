//! What can go wrong. This module and `shape` belong together: a shape that is none is one of these errors, and others show a shape.

use crate::Shape;

/// What can be wrong with shapes, blocks and statistics.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CoreError {
    /// A shape with no elements, or too many to address.
    #[error("a {rows} x {cols} weight is empty or does not fit in memory")]
    BadShape {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// Something has another size than its place demands.
    #[error("{what} must be {expected}, got {actual}")]
    Mismatch {
        /// What is counted, with its place.
        what: &'static str,
        /// The size demanded.
        expected: usize,
        /// The size given.
        actual: usize,
    },
    /// The first block of a stack must bring a basis.
    #[error("the first block of a stack has no basis")]
    NoBasis,
    /// A basis that is made of scales only.
    #[error("a basis must have values of its own, not only scales")]
    ScalesOfBasis,
    /// Coefficients that are made of scales only, and block 1 has no codes that they could multiply.
    #[error(
        "block {block} has only scales of coefficients, and there is no block 1 with 8-bit ones for them to multiply"
    )]
    NoCodes {
        /// The number of the block, counted from 1.
        block: usize,
    },
    /// A block brings coefficients for a number of planes that is neither 1 nor its own number.
    #[error("block {block} brings coefficients for {planes} planes; it must be 1 (additive) or {block} (refitted)")]
    Planes {
        /// The number of the block, counted from 1.
        block: usize,
        /// The planes it has coefficients for.
        planes: usize,
    },
    /// A level above the number of blocks, or below 1.
    #[error("level {level} of a stack of {blocks} blocks")]
    NoSuchLevel {
        /// The level asked for.
        level: u32,
        /// The blocks there are.
        blocks: usize,
    },
    /// A value that must be finite is not.
    #[error("{what} has a value that is not finite at index {index}")]
    NotFinite {
        /// What was looked at.
        what: &'static str,
        /// The flat index of the first such value.
        index: usize,
    },
    /// A size in a list of spikes is negative or not finite.
    #[error("size {index} of a list of spikes is {value}; sizes are finite and not negative")]
    SpikeSize {
        /// Which size, from 0.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// An entry of a list of spikes lies outside the weight, or has a size that there is not.
    #[error("entry {index} of a list of spikes has no place in a {shape} weight, or no size")]
    SpikePlace {
        /// Which entry, from 0.
        index: usize,
        /// The shape of the weight.
        shape: Shape,
    },
    /// A block after the first has a list of spikes.
    #[error("block {block} has a list of spikes; only block 1 has one")]
    SpikesLate {
        /// The number of the block, counted from 1.
        block: usize,
    },
    /// A sign matrix is not what it should be.
    #[error("signs of a {shape} weight")]
    Signs {
        /// The shape of the weight.
        shape: Shape,
        /// What is wrong.
        source: bitstack_pack::PackError,
    },
}
