//! Spikes: the few weights that stand far outside the magnitudes of a stack, kept in a list beside block 1.

use crate::{CoreError, Shape};
use half::f16;

/// Rows of a tile: the entries of so many rows are together.
pub const SPIKE_ROWS: usize = 64;
/// Sizes that an entry can have, besides its sign.
pub const SPIKE_SIZES: usize = 15;
/// Most columns that an entry can lie behind the one before it.
const MOST_GAP: usize = 31;

/// One spike: `sign · sizes[size - 1]` at a place of the weight, in units of the envelope there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spike {
    /// The row.
    pub row: usize,
    /// The column.
    pub col: usize,
    /// The number of its size, 1 to [`SPIKE_SIZES`], negative for a negative value.
    pub size: i8,
}

/// A sparse matrix P, `rows x cols`, that is added to a weight at every level. Its values are in units of the envelope that the first
/// column of block 1's coefficients and the first row of its basis make: P\[r, c\] = U₁\[r\] · V₁\[c\] · Σ of the entries at (r, c).
///
/// In memory and in a file it is a list of 16-bit words:
///
/// | words | contents |
/// | --- | --- |
/// | 15 | the sizes, f16, finite and not negative |
/// | 2 per tile of 64 rows | the number of entries up to the end of the tile, u32, low word first |
/// | 1 per entry | tile after tile, by columns: bits 0 to 5 the row in its tile, 6 to 10 the columns that it lies behind the entry before (the first of a tile: behind column 0), 11 to 14 the number of its size, 15 the sign (1 = negative) |
///
/// The number 0 is a size of nothing: such an entry only bridges a gap of more than 31 columns. A place may have several entries, whose
/// values add up: so few sizes reach far and are exact enough.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spikes {
    shape: Shape,
    words: Vec<u16>,
}

/// Borrowed [`Spikes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpikesRef<'a> {
    shape: Shape,
    words: &'a [u16],
}

impl Spikes {
    /// Takes the words of a list, and checks every one.
    ///
    /// # Errors
    /// As [`SpikesRef::new`] and [`SpikesRef::check`].
    pub fn new(shape: Shape, words: Vec<u16>) -> Result<Self, CoreError> {
        SpikesRef::new(shape, &words)?.check()?;
        Ok(Self { shape, words })
    }

    /// Makes a list of some entries, in any order.
    ///
    /// # Errors
    /// [`CoreError::SpikeSize`] for a size that is negative or not finite, [`CoreError::SpikePlace`] for an entry outside the weight or
    /// with a number that no size has, [`CoreError::Mismatch`] for more entries than a u32 counts.
    pub fn encode(shape: Shape, sizes: [f16; SPIKE_SIZES], entries: &[Spike]) -> Result<Self, CoreError> {
        for (index, e) in entries.iter().enumerate() {
            if e.row >= shape.rows()
                || e.col >= shape.cols()
                || !(1..=SPIKE_SIZES as u8).contains(&e.size.unsigned_abs())
            {
                return Err(CoreError::SpikePlace { index, shape });
            }
        }
        let mut sorted = entries.to_vec();
        sorted.sort_by_key(|e| (e.row / SPIKE_ROWS, e.col, e.row));
        let n_tiles = shape.rows().div_ceil(SPIKE_ROWS);
        let mut words: Vec<u16> = sizes.iter().map(|s| s.to_bits()).collect();
        let first = SPIKE_SIZES + 2 * n_tiles;
        words.resize(first, 0);
        let mut rest = &sorted[..];
        for tile in 0..n_tiles {
            let here = rest.partition_point(|e| e.row / SPIKE_ROWS <= tile);
            let mut col = 0;
            for e in &rest[..here] {
                while e.col - col > MOST_GAP {
                    words.push((MOST_GAP << 6) as u16);
                    col += MOST_GAP;
                }
                let code = u16::from(e.size.unsigned_abs()) | if e.size < 0 { 16 } else { 0 };
                words.push((e.row % SPIKE_ROWS) as u16 | ((e.col - col) << 6) as u16 | code << 11);
                col = e.col;
            }
            rest = &rest[here..];
            let end = words.len() - first;
            let Ok(end) = u32::try_from(end) else {
                let what = "the number of spikes of a weight, at most";
                return Err(CoreError::Mismatch { what, expected: u32::MAX as usize, actual: end });
            };
            words[SPIKE_SIZES + 2 * tile] = end as u16;
            words[SPIKE_SIZES + 2 * tile + 1] = (end >> 16) as u16;
        }
        Self::new(shape, words)
    }

    /// The same list, borrowed.
    pub fn view(&self) -> SpikesRef<'_> {
        SpikesRef { shape: self.shape, words: &self.words }
    }
}

impl<'a> SpikesRef<'a> {
    /// Borrows the words of a list. Looks at the sizes and at where tiles end, not at the entries: whoever has them from outside also
    /// calls [`SpikesRef::check`].
    ///
    /// # Errors
    /// [`CoreError::Mismatch`] when the words are not as many as the tiles say, or a tile ends before it begins;
    /// [`CoreError::SpikeSize`] for a size that is negative or not finite.
    pub fn new(shape: Shape, words: &'a [u16]) -> Result<Self, CoreError> {
        let list = Self { shape, words };
        let head = list.head();
        if words.len() < head {
            return Err(CoreError::Mismatch {
                what: "words of a list of spikes, at least",
                expected: head,
                actual: words.len(),
            });
        }
        for (index, size) in words[..SPIKE_SIZES].iter().enumerate() {
            let size = f16::from_bits(*size);
            if !size.is_finite() || size.is_sign_negative() {
                return Err(CoreError::SpikeSize { index, value: size.to_f32() });
            }
        }
        let mut before = 0;
        for tile in 0..list.n_tiles() {
            let end = list.end(tile);
            if end < before {
                return Err(CoreError::Mismatch {
                    what: "spikes up to the end of a tile, at least",
                    expected: before,
                    actual: end,
                });
            }
            before = end;
        }
        if words.len() - head != before {
            return Err(CoreError::Mismatch {
                what: "entries of a list of spikes",
                expected: before,
                actual: words.len() - head,
            });
        }
        Ok(list)
    }

    /// Looks at every entry.
    ///
    /// # Errors
    /// [`CoreError::SpikePlace`] for one outside the weight.
    pub fn check(self) -> Result<(), CoreError> {
        let (rows, cols) = (self.shape.rows(), self.shape.cols());
        let mut index = 0;
        for tile in 0..self.n_tiles() {
            let mut col = 0;
            for word in self.tile(tile) {
                col += usize::from(word >> 6) % (MOST_GAP + 1);
                if col >= cols || tile * SPIKE_ROWS + usize::from(*word) % SPIKE_ROWS >= rows {
                    return Err(CoreError::SpikePlace { index, shape: self.shape });
                }
                index += 1;
            }
        }
        Ok(())
    }

    /// The fewest words that a list for this weight has: one without entries.
    pub fn least_words(shape: Shape) -> usize {
        SPIKE_SIZES + 2 * shape.rows().div_ceil(SPIKE_ROWS)
    }

    fn head(self) -> usize {
        Self::least_words(self.shape)
    }

    fn end(self, tile: usize) -> usize {
        let at = SPIKE_SIZES + 2 * tile;
        usize::from(self.words[at]) | usize::from(self.words[at + 1]) << 16
    }

    /// The weight's shape.
    pub fn shape(self) -> Shape {
        self.shape
    }

    /// All words, as they are stored.
    pub fn words(self) -> &'a [u16] {
        self.words
    }

    /// The number of entries, those that only bridge a gap included.
    pub fn n_entries(self) -> usize {
        self.words.len() - self.head()
    }

    /// The number of tiles of [`SPIKE_ROWS`] rows.
    pub fn n_tiles(self) -> usize {
        self.shape.rows().div_ceil(SPIKE_ROWS)
    }

    /// The words of the entries of a tile. Panics when there is no such tile.
    pub fn tile(self, tile: usize) -> &'a [u16] {
        let start = if tile == 0 { 0 } else { self.end(tile - 1) };
        &self.words[self.head()..][start..self.end(tile)]
    }

    /// The value of each of the 32 codes in the upper five bits of an entry.
    pub fn values(self) -> [f32; 32] {
        std::array::from_fn(|code| match code % 16 {
            0 => 0.0,
            size => {
                let value = f16::from_bits(self.words[size - 1]).to_f32();
                if code < 16 { value } else { -value }
            }
        })
    }

    /// The entries of a tile that have a value: row of the weight, column, value in units of the envelope. Entries outside the weight,
    /// which [`SpikesRef::check`] would have named, are left out.
    pub fn entries(self, tile: usize) -> impl Iterator<Item = (usize, usize, f32)> + use<'a> {
        let values = self.values();
        let (rows, cols) = (self.shape.rows(), self.shape.cols());
        let mut col = 0;
        self.tile(tile).iter().filter_map(move |word| {
            col += usize::from(word >> 6) % (MOST_GAP + 1);
            let row = tile * SPIKE_ROWS + usize::from(*word) % SPIKE_ROWS;
            let value = values[usize::from(word >> 11)];
            (value != 0.0 && row < rows && col < cols).then_some((row, col, value))
        })
    }

    /// A copy that owns its words.
    pub fn to_owned(self) -> Spikes {
        Spikes { shape: self.shape, words: self.words.to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes() -> [f16; SPIKE_SIZES] {
        std::array::from_fn(|i| f16::from_f32(1.5f32.powi(i as i32)))
    }

    #[test]
    fn a_list_gives_back_its_entries_across_gaps_and_tiles() {
        let shape = Shape::new(200, 5000).unwrap();
        let spike = |row, col, size| Spike { row, col, size };
        let entries = [
            spike(199, 4999, -15),
            spike(0, 0, 1),
            spike(63, 31, 2),
            spike(5, 63, -3),
            spike(64, 32, 4),
            spike(64, 32, -1), // twice at one place
            spike(1, 4000, 7),
        ];
        let list = Spikes::encode(shape, sizes(), &entries).unwrap();
        let found: Vec<_> = (0..4).flat_map(|tile| list.view().entries(tile)).collect();
        let value = |size: i8| f32::from(size.signum()) * sizes()[usize::from(size.unsigned_abs()) - 1].to_f32();
        let mut expected: Vec<_> = entries.iter().map(|e| (e.row, e.col, value(e.size))).collect();
        expected.sort_by_key(|e| (e.0 / SPIKE_ROWS, e.1, e.0));
        assert_eq!(found, expected);
        // A gap of 31 needs no bridge; from column 63 to 4000 are 3937 columns, 126 bridges and 31 more; to 4999, in the last tile, 161.
        assert_eq!(list.view().n_entries(), entries.len() + 1 + 1 + 126 + 161);
        assert_eq!(Spikes::new(shape, list.view().words().to_vec()), Ok(list));
    }

    #[test]
    fn lists_that_lie_are_rejected_and_name_the_place() {
        let shape = Shape::new(70, 40).unwrap();
        let good =
            Spikes::encode(shape, sizes(), &[Spike { row: 69, col: 39, size: 1 }]).unwrap().view().words().to_vec();
        let with = |at: usize, word: u16| {
            let mut words = good.clone();
            words[at] = word;
            Spikes::new(shape, words)
        };
        assert!(matches!(with(3, f16::INFINITY.to_bits()), Err(CoreError::SpikeSize { index: 3, .. })));
        assert!(matches!(with(0, f16::from_f32(-1.0).to_bits()), Err(CoreError::SpikeSize { index: 0, .. })));
        assert!(matches!(with(SPIKE_SIZES, 3), Err(CoreError::Mismatch { .. }))); // tile 0 ends behind tile 1
        assert!(matches!(with(SPIKE_SIZES + 2, 9), Err(CoreError::Mismatch { .. }))); // more entries than there are
        let last = good.len() - 1;
        assert!(matches!(with(last, good[last] + 1), Err(CoreError::SpikePlace { index: 1, .. }))); // row 70
        assert!(matches!(with(last, good[last] + (1 << 6)), Err(CoreError::SpikePlace { index: 1, .. }))); // column 40
        assert!(matches!(Spikes::new(shape, good[..18].to_vec()), Err(CoreError::Mismatch { .. })));
        for (row, col, size) in [(70, 0, 1), (0, 40, 1), (0, 0, 0), (0, 0, 16), (0, 0, i8::MIN)] {
            let error = Spikes::encode(shape, sizes(), &[Spike { row, col, size }]);
            assert_eq!(error, Err(CoreError::SpikePlace { index: 0, shape }));
        }
    }
}
