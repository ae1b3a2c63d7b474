//! Portable loops over eight columns, one packed byte, at a time, in a form that compilers turn into vectors.

/// Σ ± z over one row: `bits` packed, `z` zero-padded to eight values a byte. Eight running sums, added up in a fixed order.
pub(crate) fn signed_sum(bits: &[u8], z: &[f32]) -> f32 {
    debug_assert_eq!(z.len(), 8 * bits.len());
    let mut sums = [0.0f32; 8];
    for (&byte, z) in bits.iter().zip(z.as_chunks::<8>().0) {
        for i in 0..8 {
            sums[i] += flipped(byte, i, z[i]);
        }
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// `x` with its sign flipped where bit `i` of `byte` is 0.
pub(super) fn flipped(byte: u8, i: usize, x: f32) -> f32 {
    f32::from_bits(x.to_bits() ^ ((u32::from(!byte) >> i) & 1) << 31)
}
