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

/// `w += ± m` for a run of columns that starts at a byte: `m` and `w` zero-padded to eight values a byte.
pub(crate) fn add_signed(bits: &[u8], m: &[f32], w: &mut [f32]) {
    debug_assert!(m.len() == 8 * bits.len() && w.len() == m.len());
    for ((&byte, m), w) in bits.iter().zip(m.as_chunks::<8>().0).zip(w.as_chunks_mut::<8>().0) {
        for i in 0..8 {
            w[i] += flipped(byte, i, m[i]);
        }
    }
}

/// `x` with its sign flipped where bit `i` of `byte` is 0.
fn flipped(byte: u8, i: usize, x: f32) -> f32 {
    f32::from_bits(x.to_bits() ^ ((u32::from(!byte) >> i) & 1) << 31)
}

/// `Σ_c w[c] x[c][t]` for 16 tokens.
pub(crate) fn products(w: &[f32], x: &[[f32; 16]]) -> [f32; 16] {
    debug_assert_eq!(w.len(), x.len());
    let mut sums = [0.0f32; 16];
    for (&w, x) in w.iter().zip(x) {
        for t in 0..16 {
            sums[t] += w * x[t];
        }
    }
    sums
}
