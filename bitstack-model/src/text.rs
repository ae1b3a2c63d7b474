//! Windows of text for calibration and evaluation.
//!
//! A text is encoded as a whole and cut into windows of equal length that do not overlap; what is left at the end is not
//! used. Of `total` windows, `n` evenly spaced ones are the windows `floor(i * total / n)`.

use crate::{ModelConfig, ModelError};

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
