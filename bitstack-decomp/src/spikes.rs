//! Spikes: which weights go to the list beside block 1, and as which sizes.

use crate::DecompError;
use bitstack_core::{SPIKE_SIZES, Shape, Spike, Spikes, f16};
use ndarray::ArrayView2;

/// Bits of an entry of the list.
const ENTRY_BITS: f64 = 16.0;

/// Most entries per weight of those found beforehand, and of those that codes leave: more would cost more time than they save bytes.
/// A list of 4 in a thousand takes a tenth of the time of four planes.
const MOST_SHARE: f64 = 0.004;
pub(crate) const MOST_LEFT: f64 = 0.003;

/// The smallest size, in normalised weights.
const LEAST: f64 = 0.25;

/// An entry that is wrong by no more than this is good enough: planes see to the rest.
const GOOD: f64 = 0.6;

/// Most entries at one place.
const MOST_AT_ONE: usize = 64;

/// How planes see a normalised weight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reach {
    /// From here on, an error begins that no plane mends.
    pub(crate) clear: f64,
    /// What is left of a spike to the planes.
    pub(crate) rest: f64,
    /// The squared error of a weight inside, at the level that the weight is made for.
    pub(crate) error: f64,
}

/// An envelope a vᵀ: magnitudes of rows, and one over those of columns (0 for a column of zeros).
#[derive(Clone, Copy)]
pub(crate) struct Envelope<'a> {
    pub(crate) rows: &'a [f64],
    pub(crate) inverse_cols: &'a [f32],
}

impl Envelope<'_> {
    /// One over the magnitude of a row; 0 for a row of zeros.
    fn inverse(&self, row: usize) -> f64 {
        if self.rows[row] > 0.0 { 1.0 / self.rows[row] } else { 0.0 }
    }

    pub(crate) fn normal(&self, weight: ArrayView2<'_, f32>, row: usize, col: usize) -> f64 {
        f64::from(weight[[row, col]]) * self.inverse(row) * f64::from(self.inverse_cols[col])
    }
}

/// What an entry has to take away, in means of the errors' weights, where codes leave the squared error `error`.
///
/// A bit per weight more would divide the error by four. So a bit is well spent where it takes ln 4 / n of the error of n weights, and an
/// entry of 16 bits where it takes 16 · ln 4 times the mean error of a weight (our own derivation).
pub(crate) fn price(error: f64) -> f64 {
    ENTRY_BITS * 4.0f64.ln() * error
}

/// The weights that are worth an entry, by rows: where a² D (|x| − clear)² is above the price. D are the errors' weights of the columns:
/// under error feedback the pivots of H̃.
pub(crate) fn find(
    weight: ArrayView2<'_, f32>,
    envelope: Envelope<'_>,
    column_weights: &[f64],
    reach: Reach,
) -> Vec<(usize, usize)> {
    let (rows, cols) = weight.dim();
    let row_mean = envelope.rows.iter().map(|a| a * a).sum::<f64>() / rows as f64;
    let col_mean = column_weights.iter().sum::<f64>() / cols as f64;
    if row_mean.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater)
        || col_mean.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater)
    {
        return Vec::new();
    }
    let price = price(reach.error);
    // How far beyond the planes' reach a weight of an average row must be, column by column.
    let beyond: Vec<f32> = column_weights.iter().map(|d| (price * col_mean / d.max(1e-30)).sqrt() as f32).collect();
    let mut found = Vec::new();
    for (r, row) in weight.rows().into_iter().enumerate() {
        let inverse = envelope.inverse(r) as f32;
        let of_row = (row_mean.sqrt() * envelope.inverse(r)) as f32;
        for (c, w) in row.iter().enumerate() {
            let over = w.abs() * inverse * envelope.inverse_cols[c] - reach.clear as f32;
            if over > 0.0 && over > beyond[c] * of_row {
                let gain = f64::from(over).powi(2) * column_weights[c] * envelope.rows[r].powi(2);
                found.push((gain, r, c));
            }
        }
    }
    let most = (MOST_SHARE * (rows * cols) as f64).ceil() as usize;
    if found.len() > most {
        found.select_nth_unstable_by(most, |a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        found.truncate(most);
        found.sort_unstable_by_key(|f| (f.1, f.2));
    }
    found.into_iter().map(|(_, r, c)| (r, c)).collect()
}

/// An entry of the list: its column, the number of its size with its sign, its value in normalised weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) col: usize,
    pub(crate) size: i8,
    pub(crate) value: f32,
}

/// Entries by rows.
#[derive(Debug, Clone)]
pub(crate) struct List {
    sizes: [f16; SPIKE_SIZES],
    /// The sizes in normalised weights.
    values: [f64; SPIKE_SIZES],
    entries: Vec<Entry>,
    /// Where the entries of each row begin, and those of the last end.
    starts: Vec<usize>,
}

impl List {
    /// `places` of a weight of `rows` rows, by rows; what a `normal` weight there has beyond `rest` goes to the list. `unit`: what a size of 1
    /// is in normalised weights.
    pub(crate) fn new(
        rows: usize,
        places: &[(usize, usize)],
        normal: impl Fn(usize, usize) -> f64,
        rest: f64,
        unit: f64,
    ) -> Self {
        let wanted = |(r, c): (usize, usize)| {
            let x = normal(r, c);
            x.signum() * (x.abs() - rest)
        };
        let largest = places.iter().map(|place| wanted(*place).abs()).fold(0.0, f64::max);
        // The smallest is about what the least spike needs; what an entry is wrong by is left to the planes, or to another entry.
        let ratio = (largest / LEAST).max(1.0).powf(1.0 / (SPIKE_SIZES - 1) as f64).clamp(1.1, 1.6);
        let sizes: [f16; SPIKE_SIZES] =
            std::array::from_fn(|i| f16::from_f64((LEAST * ratio.powi(i as i32) / unit).min(f16::MAX.to_f64())));
        let values = sizes.map(|size| size.to_f64() * unit);
        let mut list =
            Self { sizes, values, entries: Vec::with_capacity(places.len()), starts: Vec::with_capacity(rows + 1) };
        let mut places = places.iter().copied().peekable();
        for r in 0..rows {
            list.starts.push(list.entries.len());
            while let Some(place) = places.next_if(|place| place.0 == r) {
                let mut left = wanted(place);
                for _ in 0..MOST_AT_ONE {
                    let Some((size, value)) = list.nearest(left) else { break };
                    left -= f64::from(value);
                    list.entries.push(Entry { col: place.1, size, value });
                    if left.abs() < GOOD {
                        break;
                    }
                }
            }
        }
        list.starts.push(list.entries.len());
        list
    }

    /// The size nearest to a value, with its sign, and what it is; none where nothing is nearer.
    pub(crate) fn nearest(&self, value: f64) -> Option<(i8, f32)> {
        let distance = |v: f64| (v - value.abs()).abs();
        let (i, size) = self.values.iter().enumerate().min_by(|a, b| distance(*a.1).total_cmp(&distance(*b.1)))?;
        let number = (i + 1) as i8;
        (distance(*size) < value.abs())
            .then(|| (if value < 0.0 { -number } else { number }, size.copysign(value) as f32))
    }

    /// Puts further entries beside those that are there.
    pub(crate) fn extend(&mut self, more: &[(usize, Entry)]) {
        let rows = self.starts.len() - 1;
        let mut by_row: Vec<Vec<Entry>> = (0..rows).map(|row| self.row(row).to_vec()).collect();
        more.iter().for_each(|(row, entry)| by_row[*row].push(*entry));
        self.starts = std::iter::once(0)
            .chain(by_row.iter().scan(0, |n, row| {
                *n += row.len();
                Some(*n)
            }))
            .collect();
        self.entries = by_row.into_iter().flatten().collect();
    }

    /// The entries of a row.
    pub(crate) fn row(&self, row: usize) -> &[Entry] {
        &self.entries[self.starts[row]..self.starts[row + 1]]
    }

    /// As it is stored; `None` without entries.
    pub(crate) fn stored(&self, shape: Shape) -> Result<Option<Spikes>, DecompError> {
        if self.entries.is_empty() {
            return Ok(None);
        }
        let of_row = |row| self.row(row).iter().map(move |e| Spike { row, col: e.col, size: e.size });
        let entries: Vec<Spike> = (0..self.starts.len() - 1).flat_map(of_row).collect();
        Ok(Some(Spikes::encode(shape, self.sizes, &entries)?))
    }
}
