//! Random numbers for weights that nobody looks at: quickly made, the same for the same seed.

use bitstack_pack::row_bytes;

/// The generator of Steele, Lea and Flood (2014): eight random bytes in a few instructions.
pub(crate) struct SplitMix(pub(crate) u64);

impl SplitMix {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Random signs in packed rows of `cols`; the bits that pad a row stay 0.
    pub(crate) fn signs(&mut self, bytes: &mut [u8], cols: usize) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
        if !cols.is_multiple_of(8) {
            for row in bytes.chunks_exact_mut(row_bytes(cols)) {
                *row.last_mut().expect("rows are not empty") &= (1 << (cols % 8)) - 1;
            }
        }
    }

    /// Nearly gaussian, variance 1: the sum of twelve uniform numbers of 16 bits, less its mean.
    #[cfg(feature = "cuda")]
    pub(crate) fn gauss(&mut self) -> f32 {
        let sum = |bits: u64| (0..4).map(|i| (bits >> (16 * i) & 0xffff) as f32).sum::<f32>();
        (sum(self.next()) + sum(self.next()) + sum(self.next())) / 65536.0 - 6.0
    }
}
