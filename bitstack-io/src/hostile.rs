//! What every reader of files from strangers needs.

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// The most dimensions of a tensor. Weights have two.
pub const MAX_DIMS: usize = 8;

/// Of text in error messages, in characters.
const MAX_SHOWN: usize = 200;

/// Text from a file, fit for an error message: short, and without characters that a terminal obeys.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).take(MAX_SHOWN).collect()
}

/// Turns the numbers that Python writes and JSON does not know, `NaN`, `Infinity` and `-Infinity`, into `null` and the largest numbers.
pub fn plain_json(text: &[u8]) -> Vec<u8> {
    let words: [(&[u8], &[u8]); 2] = [(b"NaN", b"null"), (b"Infinity", b"1.7976931348623157e308")];
    let mut plain = Vec::with_capacity(text.len());
    let (mut at, mut in_string) = (0, false);
    while at < text.len() {
        let word = words.iter().find(|(word, _)| !in_string && text[at..].starts_with(word));
        if let Some((word, number)) = word {
            plain.extend_from_slice(number);
            at += word.len();
            continue;
        }
        match text[at] {
            b'"' => in_string = !in_string,
            b'\\' => {
                plain.push(b'\\');
                at += 1;
            }
            _ => {}
        }
        plain.extend(text.get(at));
        at += 1;
    }
    plain
}

/// Reads the value of a field of an object into `slot`, unless the field has been there before.
///
/// # Errors
/// A field that stands twice; a value of another type.
pub fn read_once<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
    slot: &mut Option<T>,
    field: &'static str,
    object: &mut A,
) -> Result<(), A::Error> {
    if slot.is_some() {
        return Err(A::Error::duplicate_field(field));
    }
    *slot = Some(object.next_value()?);
    Ok(())
}

/// A shape of at most [`MAX_DIMS`] dimensions: a long list of ones would make memory out of little text.
#[derive(Debug, Clone, Copy, Default)]
pub struct Dims {
    dims: [u64; MAX_DIMS],
    n: usize,
}

impl Dims {
    /// The dimensions, outermost first.
    pub fn as_slice(&self) -> &[u64] {
        &self.dims[..self.n]
    }
}

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DimsVisitor;
        impl<'de> Visitor<'de> for DimsVisitor {
            type Value = Dims;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a shape of at most {MAX_DIMS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dims, A::Error> {
                let mut dims = Dims::default();
                while let Some(dim) = seq.next_element()? {
                    *dims.dims.get_mut(dims.n).ok_or_else(|| A::Error::invalid_length(dims.n + 1, &self))? = dim;
                    dims.n += 1;
                }
                Ok(dims)
            }
        }
        deserializer.deserialize_seq(DimsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_only_python_knows_become_json_and_strings_stay() {
        let text = br#"{"NaN \" NaN": NaN, "x": [Infinity, -Infinity, 1.5]}"#;
        let expected = br#"{"NaN \" NaN": null, "x": [1.7976931348623157e308, -1.7976931348623157e308, 1.5]}"#;
        assert_eq!(String::from_utf8(plain_json(text)), String::from_utf8(expected.to_vec()));
        assert_eq!(plain_json(br#""\"#), br#""\"#, "text that ends in the middle of a string stays as it is");
    }
}
