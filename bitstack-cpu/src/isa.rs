//! Which instructions the running CPU has: the one place it is asked.

use std::fmt;
use std::sync::OnceLock;

/// A set of instructions that the kernels are written for. A higher one includes the lower ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust, on every architecture.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI, GFNI and VBMI as well: Intel since Ice Lake, AMD since Zen 4.
    Avx512Vnni,
}

impl Isa {
    /// Every set there is, lowest first, whether or not this CPU has it.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Vnni];

    /// The highest set that the running CPU and operating system support. The CPU is asked once.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            {
                let avx2 = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c");
                let avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl");
                let vnni = is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("gfni");
                match (avx2, avx512, vnni) {
                    (true, true, true) => Self::Avx512Vnni,
                    (true, true, false) => Self::Avx512,
                    (true, false, _) => Self::Avx2,
                    (false, ..) => Self::Scalar,
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Scalar
        })
    }

    /// The sets that the running CPU has, lowest first. Never empty: [`Isa::Scalar`] is always there.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Whether the running CPU has this set.
    pub fn is_available(self) -> bool {
        self <= Self::detect()
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
        })
    }
}
