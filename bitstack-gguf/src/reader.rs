//! A header from front to back, in pieces, never further than its limit and never more than the file has.

use crate::GgufError;
use crate::value::{Number, Numbers, Scalar, Strings, Value};
use bitstack_io::ReadAt;
use bitstack_io::hostile::printable;

/// The most bytes of a key, and of a tensor's name.
const NAME_BYTES: u64 = 65_535;

/// Bytes that are read at once where little is asked for.
const PIECE_BYTES: usize = 64 << 10;

pub(crate) struct Reader<'s, S: ?Sized> {
    source: &'s S,
    /// The first byte that the header may not have.
    end: u64,
    file_bytes: u64,
    limit: u64,
    /// Where the next byte is.
    at: u64,
    piece: Vec<u8>,
    piece_at: u64,
}

impl<'s, S: ReadAt + ?Sized> Reader<'s, S> {
    pub(crate) fn new(source: &'s S, limit: u64) -> Result<Self, GgufError> {
        let file_bytes = source.size_bytes()?;
        Ok(Self { source, end: file_bytes.min(limit), file_bytes, limit, at: 0, piece: Vec::new(), piece_at: 0 })
    }

    /// Where the next byte is.
    pub(crate) fn offset(&self) -> u64 {
        self.at
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Makes sure that `n` more bytes are there and allowed; nothing is allocated for a length that did not come through here.
    pub(crate) fn need(&self, n: u64, what: &dyn Fn() -> String) -> Result<usize, GgufError> {
        let left = self.file_bytes - self.at;
        if n > left {
            return Err(GgufError::Cut { what: what(), needed: n, left });
        }
        if n > self.end - self.at {
            return Err(GgufError::TooLong { limit: self.limit });
        }
        usize::try_from(n).map_err(|_| GgufError::TooLong { limit: self.limit })
    }

    /// As [`need`](Self::need), of `n` things of so many bytes each at least.
    pub(crate) fn need_each(&self, n: u64, bytes: u64, what: &dyn Fn() -> String) -> Result<usize, GgufError> {
        self.need(n.saturating_mul(bytes), what)?;
        usize::try_from(n).map_err(|_| GgufError::TooLong { limit: self.limit })
    }

    /// Fills `out` with the next bytes, which are there.
    fn fill(&mut self, out: &mut [u8]) -> Result<(), GgufError> {
        if out.len() >= PIECE_BYTES {
            self.source.read_exact_at(out, self.at)?;
            self.at += out.len() as u64;
            return Ok(());
        }
        let within = |reader: &Self| {
            let from = usize::try_from(reader.at.checked_sub(reader.piece_at)?).ok()?;
            (from.checked_add(out.len())? <= reader.piece.len()).then_some(from)
        };
        let from = match within(self) {
            Some(from) => from,
            None => {
                let n = (self.file_bytes - self.at).min(PIECE_BYTES as u64) as usize;
                self.piece.resize(n, 0);
                self.source.read_exact_at(&mut self.piece, self.at)?;
                self.piece_at = self.at;
                0
            }
        };
        out.copy_from_slice(&self.piece[from..from + out.len()]);
        self.at += out.len() as u64;
        Ok(())
    }

    /// The next bytes.
    fn bytes<const N: usize>(&mut self, what: &dyn Fn() -> String) -> Result<[u8; N], GgufError> {
        self.need(N as u64, what)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn u32(&mut self, what: &dyn Fn() -> String) -> Result<u32, GgufError> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &dyn Fn() -> String) -> Result<u64, GgufError> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    /// A text of at most `limit` bytes, after its length.
    fn text(&mut self, limit: u64, what: &dyn Fn() -> String) -> Result<String, GgufError> {
        let n = self.u64(what)?;
        if n > limit {
            return Err(GgufError::Text { what: what(), limit });
        }
        let mut bytes = vec![0; self.need(n, what)?];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| GgufError::Text { what: what(), limit })
    }

    /// A key or the name of a tensor.
    pub(crate) fn name(&mut self, what: &'static str) -> Result<String, GgufError> {
        self.text(NAME_BYTES, &|| what.to_owned())
    }

    /// The value of a key.
    pub(crate) fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        const TEXT: u32 = 8;
        const ARRAY: u32 = 9;
        let what = || printable(key);
        let kind = self.u32(&what)?;
        if kind == TEXT {
            return Ok(Value::Text(self.text(self.limit, &what)?));
        }
        if kind != ARRAY {
            let scalar = Scalar::from_id(kind).ok_or_else(|| GgufError::ValueType { key: what(), found: kind })?;
            let mut bytes = [0; 8];
            self.need(scalar.bytes() as u64, &what)?;
            self.fill(&mut bytes[..scalar.bytes()])?;
            let number = scalar.number(&bytes[..scalar.bytes()]);
            return Ok(match scalar {
                Scalar::Bool => Value::Bool(number != Number::Unsigned(0)),
                _ => Value::Number(number),
            });
        }
        let kind = self.u32(&what)?;
        let n = self.u64(&what)?;
        if kind == TEXT {
            return self.texts(n, &what).map(Value::Texts);
        }
        let scalar = Scalar::from_id(kind).ok_or_else(|| GgufError::ValueType { key: what(), found: kind })?;
        let n = self.need_each(n, scalar.bytes() as u64, &what)?;
        let mut bytes = vec![0; n * scalar.bytes()];
        self.fill(&mut bytes)?;
        Ok(Value::Numbers(Numbers { scalar, bytes }))
    }

    fn texts(&mut self, n: u64, what: &dyn Fn() -> String) -> Result<Strings, GgufError> {
        let n = self.need_each(n, 8, what)?;
        let mut strings = Strings { text: String::new(), ends: Vec::with_capacity(n) };
        let mut bytes = Vec::new();
        for _ in 0..n {
            let len = self.u64(what)?;
            bytes.resize(self.need(len, what)?, 0);
            self.fill(&mut bytes)?;
            let text = std::str::from_utf8(&bytes);
            strings.text.push_str(text.map_err(|_| GgufError::Text { what: what(), limit: self.limit })?);
            strings.ends.push(strings.text.len());
        }
        Ok(strings)
    }
}
