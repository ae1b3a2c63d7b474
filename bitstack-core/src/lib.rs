//! Stacks of sign blocks (under construction).
#![forbid(unsafe_code)]
