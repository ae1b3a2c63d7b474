//! Which instructions the running CPU has, beyond those that `bitstack_pack::Isa` asks for: the one place of this crate where it is asked.
//!
//! This module and `kernel` belong together: kernels are chosen by [`Isa`], and whether AMX is there is known only once one of them has run.

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
use std::fmt;
use std::sync::OnceLock;

/// A set of instructions that the kernels are written for. Of those of one architecture, a later one includes the earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Portable Rust, on every architecture.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI, GFNI and VBMI as well: Intel since Ice Lake, AMD since Zen 4.
    Avx512Vnni,
    /// That, with AMX tiles and products of bytes: Intel Xeon since Sapphire Rapids. Only on Linux, where the process asks for permission
    /// when the CPU is asked, and only if a product made with it, once, comes out as it should.
    Amx,
    /// 64-bit ARM with NEON: all but the smallest.
    Neon,
}

impl Isa {
    /// Every set there is, whether or not this CPU has it; those of an architecture lowest first.
    pub const ALL: [Self; 6] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Amx, Self::Neon];

    /// The highest set that the running CPU and operating system support.
    pub fn detect() -> Self {
        *Self::supported().last().expect("Scalar is always there")
    }

    /// The sets that the running CPU has, lowest first. Never empty: [`Isa::Scalar`] is always there.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::supported().iter().copied()
    }

    /// Whether the running CPU has this set.
    pub fn is_available(self) -> bool {
        Self::supported().contains(&self)
    }

    /// What the CPU says, asked once. Each set is there only if those below it are.
    fn supported() -> &'static [Self] {
        type Ask = fn() -> bool;
        static SUPPORTED: OnceLock<&[Isa]> = OnceLock::new();
        SUPPORTED.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            let (sets, is_there): (&[Self], &[Ask]) = (
                &[Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Amx],
                &[
                    || {
                        bitstack_pack::Isa::Avx2.is_available()
                            && is_x86_feature_detected!("fma")
                            && is_x86_feature_detected!("f16c")
                    },
                    || {
                        bitstack_pack::Isa::Avx512.is_available()
                            && is_x86_feature_detected!("avx512bw")
                            && is_x86_feature_detected!("avx512dq")
                            && is_x86_feature_detected!("avx512vl")
                    },
                    || {
                        is_x86_feature_detected!("avx512vnni")
                            && is_x86_feature_detected!("avx512vbmi")
                            && is_x86_feature_detected!("gfni")
                    },
                    crate::kernel::amx::is_usable,
                ],
            );
            #[cfg(target_arch = "aarch64")]
            let (sets, is_there): (&[Self], &[Ask]) =
                (&[Self::Scalar, Self::Neon], &[|| is_aarch64_feature_detected!("neon")]);
            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            let (sets, is_there): (&[Self], &[Ask]) = (&[Self::Scalar], &[]);
            &sets[..1 + is_there.iter().take_while(|is_there| is_there()).count()]
        })
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Amx => "amx",
            Self::Neon => "neon",
        })
    }
}
