//! The loops, per instruction set, behind one dispatch point.

pub(crate) mod scalar;
