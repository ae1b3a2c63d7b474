use std::fmt;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident $name:literal $bits:literal,)*) => {
        /// The element types of tensors, by their safetensors names.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Dtype {
            $($(#[$doc])* $variant,)*
        }

        impl Dtype {
            /// Every type, for lookups.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The name in a safetensors header.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Bits of one element.
            pub const fn bits(self) -> u64 {
                match self {
                    $(Self::$variant => $bits,)*
                }
            }
        }
    };
}

dtypes! {
    /// Booleans, a byte each.
    Bool "BOOL" 8,
    /// Floats of 4 bits.
    F4 "F4" 4,
    /// Floats of 6 bits, 2 of them for the exponent.
    F6E2M3 "F6_E2M3" 6,
    /// Floats of 6 bits, 3 of them for the exponent.
    F6E3M2 "F6_E3M2" 6,
    /// Unsigned bytes.
    U8 "U8" 8,
    /// Signed bytes.
    I8 "I8" 8,
    /// Floats of 8 bits, 5 of them for the exponent.
    F8E5M2 "F8_E5M2" 8,
    /// Floats of 8 bits, 4 of them for the exponent.
    F8E4M3 "F8_E4M3" 8,
    /// Powers of two in 8 bits.
    F8E8M0 "F8_E8M0" 8,
    /// `F8_E4M3` with one zero and no infinities.
    F8E4M3Fnuz "F8_E4M3FNUZ" 8,
    /// `F8_E5M2` with one zero and no infinities.
    F8E5M2Fnuz "F8_E5M2FNUZ" 8,
    /// Signed words of 16 bits.
    I16 "I16" 16,
    /// Unsigned words of 16 bits.
    U16 "U16" 16,
    /// IEEE half precision.
    F16 "F16" 16,
    /// Brain float: the upper half of an `F32`.
    BF16 "BF16" 16,
    /// Signed words of 32 bits.
    I32 "I32" 32,
    /// Unsigned words of 32 bits.
    U32 "U32" 32,
    /// IEEE single precision.
    F32 "F32" 32,
    /// Complex numbers of two `F32`.
    C64 "C64" 64,
    /// IEEE double precision.
    F64 "F64" 64,
    /// Signed words of 64 bits.
    I64 "I64" 64,
    /// Unsigned words of 64 bits.
    U64 "U64" 64,
}

impl Dtype {
    /// The type of this name in a safetensors header.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|dtype| dtype.name() == name)
    }

    /// Bytes of a tensor of this shape; `None` when they are no whole number, or more than a `u64` counts.
    ///
    /// ```
    /// use bitstack_io::Dtype;
    /// assert_eq!(Dtype::F16.bytes_of(&[2, 3]), Some(12));
    /// assert_eq!(Dtype::F4.bytes_of(&[3]), None);
    /// assert_eq!(Dtype::U8.bytes_of(&[1 << 40, 1 << 40]), None);
    /// ```
    pub fn bytes_of(self, shape: &[usize]) -> Option<u64> {
        let bits = shape.iter().try_fold(u128::from(self.bits()), |n, &dim| n.checked_mul(dim as u128))?;
        if bits.is_multiple_of(8) { u64::try_from(bits / 8).ok() } else { None }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
