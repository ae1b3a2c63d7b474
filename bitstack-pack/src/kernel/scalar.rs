//! The kernels in portable Rust: the specification of the others.
//!
//! The inner loops run over exactly eight values, so that the compiler unrolls them and uses what vectors the target has
//! by default.

use crate::layout::{LINE_BYTES, UNIT_BYTES};

const SIGN: u32 = 1 << 31;

pub(super) fn pack(bytes: &mut [u8], values: &[f32]) {
    let (eights, rest) = values.as_chunks::<8>();
    let mut bytes = bytes.iter_mut();
    for (eight, byte) in eights.iter().zip(&mut bytes) {
        *byte = pack_eight(eight);
    }
    if let Some(byte) = bytes.next() {
        // A negative pad gives zero bits.
        let mut eight = [-1.0; 8];
        eight[..rest.len()].copy_from_slice(rest);
        *byte = pack_eight(&eight);
    }
}

fn pack_eight(values: &[f32; 8]) -> u8 {
    let mut byte = 0;
    for (j, &value) in values.iter().enumerate() {
        byte |= u8::from(value >= 0.0) << j;
    }
    byte
}

pub(super) fn unpack(bytes: &[u8], values: &mut [f32]) {
    map(bytes, values, |_, flip| f32::from_bits(1.0f32.to_bits() | flip));
}

pub(super) fn apply(bytes: &[u8], values: &mut [f32]) {
    map(bytes, values, |value, flip| f32::from_bits(value.to_bits() ^ flip));
}

/// Replaces each value by `f` of it and of `SIGN` where its bit is 0, of zero where it is 1.
#[inline(always)]
fn map(bytes: &[u8], values: &mut [f32], f: impl Fn(f32, u32) -> f32) {
    let (eights, rest) = values.as_chunks_mut::<8>();
    for (eight, &byte) in eights.iter_mut().zip(bytes) {
        for (j, value) in eight.iter_mut().enumerate() {
            *value = f(*value, if byte & 1 << j == 0 { SIGN } else { 0 });
        }
    }
    if let Some(&byte) = bytes.get(eights.len()) {
        for (j, value) in rest.iter_mut().enumerate() {
            *value = f(*value, if byte & 1 << j == 0 { SIGN } else { 0 });
        }
    }
}

pub(super) fn lines(rows: &[u8], row_bytes: usize, lines: &mut [[u8; LINE_BYTES]]) {
    for (i, line) in lines.iter_mut().enumerate() {
        for (row, unit) in line.as_chunks_mut::<UNIT_BYTES>().0.iter_mut().enumerate() {
            unit.copy_from_slice(&rows[row * row_bytes + UNIT_BYTES * i..][..UNIT_BYTES]);
        }
    }
}
