//! Under construction.
#![forbid(unsafe_code)]

mod nested;

pub use nested::{Nested, NestedError, NestedStep, nested_blocks};
