//! The block formats of ggml, and their elements as f32.
//!
//! A row is cut into blocks of 32 or 256 elements. Each block has a scale in half precision, perhaps a minimum, and codes of a few bits;
//! in the formats with a K, groups of 16 or 32 elements have small scales (and minima) of their own, which are multiples of the block's.

use crate::GgufError;
use half::f16;

macro_rules! block_types {
    ($($(#[$doc:meta])* $variant:ident $id:literal $bits:literal: $elements:literal elements, $bytes:literal bytes, $read:expr;)*) => {
        /// The type of a tensor's elements: how a block of them is stored.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[allow(non_camel_case_types, reason = "the field's names")]
        pub enum BlockType {
            $($(#[$doc])* $variant,)*
        }

        impl BlockType {
            /// Every type, for lookups.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }

            /// The type of this number in a file.
            pub const fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$variant),)* _ => None }
            }

            /// Bits of an element's code, scales not counted; of the significand, of floats.
            pub const fn code_bits(self) -> u32 {
                match self { $(Self::$variant => $bits,)* }
            }

            /// Elements of a block.
            pub const fn block_elements(self) -> usize {
                match self { $(Self::$variant => $elements,)* }
            }

            /// Bytes of a block.
            pub const fn block_bytes(self) -> usize {
                match self { $(Self::$variant => $bytes,)* }
            }

            /// The elements of whole blocks, as f32: products and sums in f32, in the order in which ggml forms them.
            ///
            /// # Errors
            /// [`GgufError::Length`] where `blocks` are not as many as `out` has room for.
            pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) -> Result<(), GgufError> {
                let n_blocks = blocks.len() / self.block_bytes();
                if blocks.len() % self.block_bytes() != 0 || n_blocks.checked_mul(self.block_elements()) != Some(out.len()) {
                    return Err(GgufError::Length { kind: self.name(), bytes: blocks.len(), elements: out.len() });
                }
                match self {
                    $(Self::$variant => {
                        let (blocks, []) = blocks.as_chunks::<$bytes>() else { unreachable!("the length was checked") };
                        let (outs, []) = out.as_chunks_mut::<$elements>() else { unreachable!("the length was checked") };
                        let read: fn(&[u8; $bytes], &mut [f32; $elements]) = $read;
                        blocks.iter().zip(outs).for_each(|(block, out)| read(block, out));
                    })*
                }
                Ok(())
            }
        }
    };
}

block_types! {
    /// IEEE single precision.
    F32 0 24: 1 elements, 4 bytes, |b, out| out[0] = f32::from_le_bytes(*b);
    /// IEEE half precision.
    F16 1 11: 1 elements, 2 bytes, |b, out| out[0] = f16::from_le_bytes(*b).to_f32();
    /// 4 bits about 8, a scale for 32.
    Q4_0 2 4: 32 elements, 18 bytes, |b, out| {
        let d = half(b, 0);
        codes(&b[2..18], 0, 0, |code| d * (code as f32 - 8.0), out);
    };
    /// 4 bits, a scale and a minimum for 32.
    Q4_1 3 4: 32 elements, 20 bytes, |b, out| {
        let (d, m) = (half(b, 0), half(b, 2));
        codes(&b[4..20], 0, 0, |code| d * code as f32 + m, out);
    };
    /// 5 bits about 16, a scale for 32.
    Q5_0 6 5: 32 elements, 22 bytes, |b, out| {
        let d = half(b, 0);
        codes(&b[6..22], word(b, 2), 16, |code| d * (code as f32 - 16.0), out);
    };
    /// 5 bits, a scale and a minimum for 32.
    Q5_1 7 5: 32 elements, 24 bytes, |b, out| {
        let (d, m) = (half(b, 0), half(b, 2));
        codes(&b[8..24], word(b, 4), 16, |code| d * code as f32 + m, out);
    };
    /// Signed bytes, a scale for 32.
    Q8_0 8 8: 32 elements, 34 bytes, |b, out| {
        let d = half(b, 0);
        out.iter_mut().zip(&b[2..]).for_each(|(out, &code)| *out = d * f32::from(code as i8));
    };
    /// 2 bits; scale and minimum of 4 bits for 16.
    Q2_K 10 2: 256 elements, 84 bytes, q2_k;
    /// 3 bits; scale of 6 bits for 16.
    Q3_K 11 3: 256 elements, 110 bytes, q3_k;
    /// 4 bits; scale and minimum of 6 bits for 32.
    Q4_K 12 4: 256 elements, 144 bytes, |b, out| {
        scaled_groups(b, |i, group| u32::from(b[16 + i / 2 * 32 + group] >> (4 * (i % 2)) & 15), out);
    };
    /// 5 bits; scale and minimum of 6 bits for 32.
    Q5_K 13 5: 256 elements, 176 bytes, |b, out| {
        let high = |i: usize, j: usize| u32::from(b[16 + j] >> i & 1) << 4;
        scaled_groups(b, |i, j| u32::from(b[48 + i / 2 * 32 + j] >> (4 * (i % 2)) & 15) | high(i, j), out);
    };
    /// 6 bits about 32; scale of 8 bits for 16.
    Q6_K 14 6: 256 elements, 210 bytes, q6_k;
    /// Brain float: the upper half of an F32.
    BF16 30 8: 1 elements, 2 bytes, |b, out| out[0] = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
}

impl BlockType {
    /// Whether the elements are floats and not codes.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// The name of a type by its number, also of one that is not read here.
    pub fn name_of(id: u32) -> String {
        const OTHERS: [(u32, &str); 21] = [
            (9, "Q8_1"),
            (15, "Q8_K"),
            (16, "IQ2_XXS"),
            (17, "IQ2_XS"),
            (18, "IQ3_XXS"),
            (19, "IQ1_S"),
            (20, "IQ4_NL"),
            (21, "IQ3_S"),
            (22, "IQ2_S"),
            (23, "IQ4_XS"),
            (24, "I8"),
            (25, "I16"),
            (26, "I32"),
            (27, "I64"),
            (28, "F64"),
            (29, "IQ1_M"),
            (34, "TQ1_0"),
            (35, "TQ2_0"),
            (39, "MXFP4"),
            (4, "Q4_2"),
            (5, "Q4_3"),
        ];
        let other = || OTHERS.iter().find(|(other, _)| *other == id).map(|(_, name)| (*name).to_owned());
        Self::from_id(id).map(|kind| kind.name().to_owned()).or_else(other).unwrap_or_else(|| format!("number {id}"))
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// 32 codes: element j in the low half of byte j, element j + 16 in the high half; bit j of `high` stands for `high_value`.
#[inline]
fn codes(bytes: &[u8], high: u32, high_value: u32, value: impl Fn(u32) -> f32, out: &mut [f32; 32]) {
    for (j, &byte) in bytes.iter().enumerate() {
        let high = |bit: usize| (high >> bit & 1) * high_value;
        out[j] = value(u32::from(byte & 15) | high(j));
        out[j + 16] = value(u32::from(byte >> 4) | high(j + 16));
    }
}

/// Q4_K and Q5_K: 8 groups of 32 elements. In front are scale and minimum of the block, then 8 scales and 8 minima of 6 bits in 12 bytes:
/// the first 4 of each in the low 6 bits of bytes 0 to 7; of the others 4 bits in bytes 8 to 11 and 2 in the high bits of bytes 0 to 7.
#[inline]
fn scaled_groups(block: &[u8], code: impl Fn(usize, usize) -> u32, out: &mut [f32; 256]) {
    let (d, min) = (half(block, 0), half(block, 2));
    let s = &block[4..16];
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = if i < 4 {
            (s[i] & 63, s[i + 4] & 63)
        } else {
            (s[i + 4] & 15 | s[i - 4] >> 6 << 4, s[i + 4] >> 4 | s[i] >> 6 << 4)
        };
        let (scale, minimum) = (d * f32::from(scale), min * f32::from(minimum));
        for (j, out) in out.iter_mut().enumerate() {
            *out = scale * code(i, j) as f32 - minimum;
        }
    }
}

/// 16 bytes of scales (low half) and minima (high half), 64 bytes of codes, scale and minimum of the block. Of each half of the elements,
/// byte j of 32 holds elements j, j + 32, j + 64 and j + 96.
fn q2_k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (d, min) = (half(b, 80), half(b, 82));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let (scale, minimum) = (d * f32::from(b[group] & 15), min * f32::from(b[group] >> 4));
        let (first, shift) = (16 + group / 8 * 32 + group % 2 * 16, group % 8 / 2 * 2);
        for (out, byte) in out.iter_mut().zip(&b[first..first + 16]) {
            *out = scale * f32::from(byte >> shift & 3) - minimum;
        }
    }
}

/// 32 bytes of high bits, 64 of low ones as in [`q2_k`], 12 of scales about 32, and the block's scale. A high bit that is not set
/// stands for -4. Of the scales, the low 4 bits are in bytes 0 to 7 and the high 2 in bytes 8 to 11.
fn q3_k(b: &[u8; 110], out: &mut [f32; 256]) {
    let d = half(b, 108);
    let s = &b[96..108];
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let low = s[group % 8] >> (group / 8 * 4) & 15;
        let high = s[8 + group % 4] >> (group / 4 * 2) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        let (half_of, within) = (group / 8, group % 2 * 16);
        let shift = group % 8 / 2;
        for (j, out) in out.iter_mut().enumerate() {
            let code = b[32 + half_of * 32 + within + j] >> (2 * shift) & 3;
            let bit = b[within + j] >> (half_of * 4 + shift) & 1;
            *out = scale * (f32::from(code) - if bit == 1 { 0.0 } else { 4.0 });
        }
    }
}

/// 128 bytes of low halves, 64 of pairs of high bits, 16 scales, the block's scale. Of each half of the elements, byte j of 64 holds the low
/// bits of elements j and j + 64, and byte j of 32 the high bits of elements j, j + 32, j + 64 and j + 96.
fn q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let d = half(b, 208);
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(b[192 + group] as i8);
        let (half_of, within) = (group / 8, group % 8 * 16);
        for (j, out) in out.iter_mut().enumerate() {
            let element = within + j;
            let low = b[half_of * 64 + element % 64] >> (element / 64 * 4) & 15;
            let high = b[128 + half_of * 32 + element % 32] >> (element / 32 * 2) & 3;
            *out = scale * (f32::from(low | high << 4) - 32.0);
        }
    }
}
