//! Which instructions the running CPU has: the one place it is asked.

use std::fmt;
use std::sync::OnceLock;

/// A set of vector instructions that the kernels are written for. A higher set includes the lower ones.
///
/// Everything in this crate uses [`Isa::detect`] by itself, and every set gives the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust, on every architecture.
    Scalar,
    /// x86-64 with AVX2: 8 values at a time.
    Avx2,
    /// x86-64 with AVX-512F: 16 values at a time, masks instead of a scalar tail.
    Avx512,
}

impl Isa {
    /// Every set there is, lowest first, whether or not this CPU has it.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// The highest set that the running CPU and operating system support. The CPU is asked once.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                return if is_x86_feature_detected!("avx512f") { Self::Avx512 } else { Self::Avx2 };
            }
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
        })
    }
}
