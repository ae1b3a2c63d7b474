//! Values of the metadata.

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// A number of any type.
    Number(Number),
    /// True or false.
    Bool(bool),
    /// A text.
    Text(String),
    /// An array of numbers of one type, or of booleans, which are numbers 0 and 1 there.
    Numbers(Numbers),
    /// An array of texts.
    Texts(Strings),
}

/// A number, widened.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Number {
    /// Of an unsigned type.
    Unsigned(u64),
    /// Of a signed type.
    Signed(i64),
    /// Of a floating type.
    Float(f64),
}

impl Number {
    /// The number, where it is whole and not negative.
    pub fn as_u64(self) -> Option<u64> {
        match self {
            Self::Unsigned(n) => Some(n),
            Self::Signed(n) => u64::try_from(n).ok(),
            Self::Float(_) => None,
        }
    }

    /// The number, rounded where it has more than 53 bits.
    pub fn as_f64(self) -> f64 {
        match self {
            Self::Unsigned(n) => n as f64,
            Self::Signed(n) => n as f64,
            Self::Float(x) => x,
        }
    }
}

impl Value {
    /// The number, where it is one, whole, and not negative.
    pub fn as_u64(&self) -> Option<u64> {
        if let Self::Number(n) = self { n.as_u64() } else { None }
    }

    /// The number, where it is one.
    pub fn as_f64(&self) -> Option<f64> {
        if let Self::Number(n) = self { Some(n.as_f64()) } else { None }
    }

    /// The truth value, where it is one.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = self { Some(*value) } else { None }
    }

    /// The text, where it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// The texts, where it is an array of them.
    pub fn as_texts(&self) -> Option<&Strings> {
        if let Self::Texts(texts) = self { Some(texts) } else { None }
    }

    /// The numbers, where it is an array of them.
    pub fn as_numbers(&self) -> Option<&Numbers> {
        if let Self::Numbers(numbers) = self { Some(numbers) } else { None }
    }
}

/// The types that numbers are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl Scalar {
    /// The type of this number in a file.
    pub(crate) fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// The number that these bytes are, which are as many as [`bytes`](Self::bytes) says.
    pub(crate) fn number(self, bytes: &[u8]) -> Number {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(wide);
        match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => Number::Unsigned(bits),
            Self::Bool => Number::Unsigned(u64::from(bits != 0)),
            Self::I8 => Number::Signed(i64::from(bits as i8)),
            Self::I16 => Number::Signed(i64::from(bits as i16)),
            Self::I32 => Number::Signed(i64::from(bits as i32)),
            Self::I64 => Number::Signed(bits as i64),
            Self::F32 => Number::Float(f64::from(f32::from_bits(bits as u32))),
            Self::F64 => Number::Float(f64::from_bits(bits)),
        }
    }
}

/// An array of numbers, kept as the file has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbers {
    pub(crate) scalar: Scalar,
    pub(crate) bytes: Vec<u8>,
}

impl Numbers {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.scalar.bytes()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Number> + '_ {
        self.bytes.chunks_exact(self.scalar.bytes()).map(|bytes| self.scalar.number(bytes))
    }
}

/// An array of texts in one piece of memory.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Strings {
    pub(crate) text: String,
    pub(crate) ends: Vec<usize>,
}

impl Strings {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Text `index`, where there is one.
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)?;
        let begin = if index == 0 { 0 } else { self.ends[index - 1] };
        Some(&self.text[begin..end])
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.len()).map(|index| self.get(index).expect("it is one of those there are"))
    }
}
