//! Windows of text for calibration and evaluation.
//!
//! A text is read whole, or in stretches where it is long ([`Excerpt`]), encoded, and cut into windows of equal length that do not overlap; what is left at the end is not
//! used. Of `total` windows, `n` evenly spaced ones are the windows `floor(i * total / n)`.

use crate::{ModelConfig, ModelError};
use bitstack_io::ReadAt;
use std::io;

/// As much of a text as is used: of a longer one, stretches that are spread over it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Excerpt {
    /// The text, or its stretches one after the other.
    pub text: String,
    /// Bytes of the text that it is from.
    pub total_bytes: u64,
}

impl Excerpt {
    /// Bytes of the longest text that is used whole: 16 MiB, some four million tokens.
    pub const MOST_BYTES: u64 = 16 << 20;
    /// Bytes of a stretch: so long that hardly a window has its beginning in one and its end in the next.
    const STRETCH: u64 = 256 << 10;
    /// A stretch begins behind the first end of a line in so many bytes.
    const LINE: usize = 4 << 10;

    /// Reads UTF-8 text: all of it, or of more than [`MOST_BYTES`](Self::MOST_BYTES) 64 stretches of a quarter of a MiB. Of N stretches,
    /// number i begins i/N of the way from the text's beginning, behind an end of line where there is one soon. Memory does not
    /// depend on the length of the text.
    ///
    /// # Errors
    /// What the source says; [`io::ErrorKind::InvalidData`] for what is read and is not UTF-8, with its place.
    pub fn read<S: ReadAt + ?Sized>(source: &S) -> io::Result<Self> {
        let total_bytes = source.size_bytes()?;
        if total_bytes <= Self::MOST_BYTES {
            let mut bytes = vec![0; total_bytes as usize];
            source.read_exact_at(&mut bytes, 0)?;
            let text = String::from_utf8(bytes).map_err(|error| not_text(error.utf8_error().valid_up_to() as u64))?;
            return Ok(Self { text, total_bytes });
        }
        let n = Self::MOST_BYTES / Self::STRETCH;
        let mut text = String::with_capacity(Self::MOST_BYTES as usize);
        let mut bytes = vec![0; Self::STRETCH as usize];
        for i in 0..n {
            let at = (u128::from(total_bytes) * u128::from(i) / u128::from(n)) as u64;
            source.read_exact_at(&mut bytes, at)?;
            let line = bytes[..Self::LINE].iter().position(|b| *b == b'\n').map(|end| end + 1);
            // Half a character at either end belongs to what is left out.
            let character = || (0..4).find(|i| bytes[*i] as i8 >= -0x40).unwrap_or(0);
            let start = if i == 0 { 0 } else { line.unwrap_or_else(character) };
            match str::from_utf8(&bytes[start..]) {
                Ok(stretch) => text.push_str(stretch),
                Err(error) if error.error_len().is_none() => {
                    text.push_str(str::from_utf8(&bytes[start..start + error.valid_up_to()]).unwrap_or_default());
                }
                Err(error) => return Err(not_text(at + (start + error.valid_up_to()) as u64)),
            }
        }
        Ok(Self { text, total_bytes })
    }

    /// Whether the text is longer than what is here.
    pub fn is_partial(&self) -> bool {
        self.total_bytes > Self::MOST_BYTES
    }
}

fn not_text(at: u64) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("byte {at} is not UTF-8 text"))
}

/// Window length where none is asked for: 512, or the model's limit if that is lower.
pub fn default_seq_len(config: &ModelConfig) -> usize {
    config.max_positions.min(512)
}

/// Tokens cut into windows of equal length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows<'a> {
    tokens: &'a [u32],
    seq_len: usize,
}

impl<'a> Windows<'a> {
    /// Cuts `tokens` into windows of `seq_len`, of which there is at least one.
    ///
    /// # Errors
    /// A length below 2 or above `max_positions` (the model's limit), no tokens, or fewer than one window.
    pub fn new(tokens: &'a [u32], seq_len: usize, max_positions: usize) -> Result<Self, ModelError> {
        if seq_len < 2 || seq_len > max_positions {
            return Err(ModelError::BadSeqLen { seq_len, limit: max_positions });
        }
        if tokens.is_empty() {
            return Err(ModelError::EmptyText);
        }
        if tokens.len() < seq_len {
            return Err(ModelError::TextTooShort { tokens: tokens.len(), seq_len });
        }
        Ok(Self { tokens: &tokens[..tokens.len() / seq_len * seq_len], seq_len })
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.tokens.len() / self.seq_len
    }

    /// Whether there are none: only in a half of a single window.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens in a window.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// The first half of the windows (rounded down) and the rest: to calibrate on one and choose an order on the other.
    pub fn halves(&self) -> (Self, Self) {
        self.split_at(self.len() / 2)
    }

    /// The first `count` windows (or all, if there are fewer) and the rest.
    pub fn split_at(&self, count: usize) -> (Self, Self) {
        let (first, second) = self.tokens.split_at(count.min(self.len()) * self.seq_len);
        (Self { tokens: first, ..*self }, Self { tokens: second, ..*self })
    }

    /// All windows, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [u32]> + use<'a> {
        self.tokens.chunks_exact(self.seq_len)
    }

    /// `count` evenly spaced windows, or all where there are no more than that.
    pub fn evenly_spaced(&self, count: usize) -> Vec<&'a [u32]> {
        let total = self.len();
        let count = count.min(total);
        (0..count)
            .map(|i| {
                let start = (i as u128 * total as u128 / count as u128) as usize * self.seq_len;
                &self.tokens[start..start + self.seq_len]
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evenly_spaced_windows_follow_the_floor_rule() {
        let tokens: Vec<u32> = (0..107).collect();
        let windows = Windows::new(&tokens, 10, 10).unwrap();
        assert_eq!(windows.len(), 10);
        let starts = |count| windows.evenly_spaced(count).iter().map(|w| w[0] / 10).collect::<Vec<_>>();
        assert_eq!(starts(3), [0, 3, 6]);
        assert_eq!(starts(4), [0, 2, 5, 7]);
        assert_eq!(starts(10), (0..10).collect::<Vec<_>>());
        assert_eq!(starts(64).len(), 10);
        assert_eq!(windows.iter().last().unwrap(), (90..100).collect::<Vec<u32>>());
    }

    #[test]
    fn halves_share_no_window_and_lose_none() {
        let tokens: Vec<u32> = (0..70).collect();
        let (first, second) = Windows::new(&tokens, 10, 512).unwrap().halves();
        assert_eq!((first.len(), second.len()), (3, 4));
        assert_eq!(second.iter().next().unwrap()[0], 30);
        let (none, one) = Windows::new(&tokens, 70, 512).unwrap().halves();
        assert!(none.is_empty() && none.evenly_spaced(4).is_empty());
        assert_eq!(one.len(), 1);
    }

    /// A text of numbered lines, as long as it is asked to be, of which nothing is in memory.
    struct Lines(u64);

    impl Lines {
        const LINE: u64 = 33;
    }

    impl ReadAt for Lines {
        fn size_bytes(&self) -> io::Result<u64> {
            Ok(self.0)
        }

        fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
            let line = |n: u64| format!("{n:>24} é日\u{301}\n");
            let width = Self::LINE;
            assert_eq!(line(1).len() as u64, width);
            let mut text = String::new();
            for n in at / width..(at + buf.len() as u64).div_ceil(width) {
                text += &line(n);
            }
            buf.copy_from_slice(&text.as_bytes()[(at % width) as usize..][..buf.len()]);
            Ok(())
        }
    }

    #[test]
    fn an_excerpt_of_a_text_of_any_length_is_spread_over_it_and_begins_with_lines() {
        let whole = Excerpt::read(&Lines(1 << 20)).unwrap();
        assert!(!whole.is_partial());
        assert_eq!(whole.text.len(), 1 << 20);
        let total_bytes = 1 << 40;
        let part = Excerpt::read(&Lines(total_bytes)).unwrap();
        assert!(part.is_partial());
        assert_eq!(part.total_bytes, total_bytes);
        let (len, most) = (part.text.len() as u64, Excerpt::MOST_BYTES);
        assert!(len <= most && len > most - 64 * 64, "{len}: a stretch loses less than two lines");
        let numbers: Vec<u64> = part
            .text
            .lines()
            .filter(|line| line.len() == 32)
            .filter_map(|line| line.get(..24)?.trim().parse().ok())
            .collect();
        assert_eq!(numbers[0], 0);
        let jumps: Vec<u64> = numbers.windows(2).map(|n| n[1] - n[0]).filter(|jump| *jump > 2).collect();
        assert_eq!(jumps.len(), 63);
        let spread = total_bytes / 64 / Lines::LINE;
        assert!(jumps.iter().all(|jump| jump.abs_diff(spread) < spread / 100));
    }

    #[test]
    fn text_that_is_not_utf8_is_an_error_with_its_place() {
        let mut text = vec![b'a'; 17 << 20];
        text[5] = 0xff;
        let message = |text: &[u8]| Excerpt::read(text).unwrap_err().to_string();
        assert!(message(&text).contains("byte 5 is not"), "{}", message(&text));
        assert!(message(&text[..100]).contains("byte 5 is not"));
        assert!(
            message(&"aé".as_bytes()[..2]).contains("byte 1 is not"),
            "half a character at the end of a whole text"
        );
    }

    #[test]
    fn unusable_lengths_are_rejected_with_both_numbers() {
        let tokens = [0; 100];
        let message = |tokens: &[u32], len| Windows::new(tokens, len, 128).unwrap_err().to_string();
        assert!(message(&tokens, 101).contains("100 tokens, fewer than one window of 101"));
        assert!(message(&tokens, 129).contains("129") && message(&tokens, 129).contains("128"));
        assert!(message(&tokens, 1).contains("from 2 to 128"));
        assert!(message(&[], 10).contains("empty"));
    }
}
