//! Products of sign planes with a matrix, in additions only. Signs that are all new are looked up four columns at a time; of signs that
//! change, only the few that did are added.
//!
//! For a matrix of n columns and planes of 128 rows, q of them, a dense product would be 128·q·n² multiplications and additions. Lookups are a
//! quarter of that in additions. In sweeps 1 to 15 % of the signs change, 5 %, 2 % and 1 % on average in the first three.

use super::lanes::{Aligned, LANES, Lane, SUBS};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Columns whose signs are in a word, the first in the lowest bit.
pub(crate) const WORD: usize = u64::BITS as usize;

/// Most words whose changes are added at once.
pub(crate) const MOST_WORDS: usize = 4;

/// Lanes whose columns have their signs in one word.
const STRIP: usize = WORD / LANES;

/// A square matrix in strips of `WORD` columns, each by rows, with zeros behind the last column: whoever adds up rows of a few columns finds
/// them side by side.
pub(crate) struct Square {
    pub(crate) n: usize,
    lanes: Vec<[Lane; STRIP]>,
}

impl Square {
    pub(crate) fn zeros(n: usize) -> Self {
        Self { n, lanes: vec![[[0.0; LANES]; STRIP]; n * n.div_ceil(WORD)] }
    }

    /// Lanes of a row.
    fn width(&self) -> usize {
        self.n.div_ceil(WORD) * STRIP
    }

    pub(crate) fn get(&self, row: usize, col: usize) -> f32 {
        self.row(row, col / WORD)[col % WORD]
    }

    pub(crate) fn set(&mut self, row: usize, col: usize, value: f32) {
        let at = col / WORD * self.n + row;
        self.lanes[at].as_flattened_mut()[col % WORD] = value;
    }

    /// A row in one strip.
    pub(crate) fn row(&self, row: usize, strip: usize) -> &[f32] {
        self.lanes[strip * self.n + row].as_flattened()
    }

    /// Some rows of a strip, `WORD` columns each.
    pub(crate) fn strip(&self, strip: usize, rows: Range<usize>) -> &[f32] {
        self.lanes[strip * self.n..][rows].as_flattened().as_flattened()
    }

    /// Sixteen columns of a row, or zeros behind the last row.
    fn lane(&self, row: usize, lane: usize) -> Lane {
        if row < self.n { self.lanes[lane / STRIP * self.n + row][lane % STRIP] } else { [0.0; LANES] }
    }
}

/// The signs of `q` planes in some columns: `codes` is `columns x SUBS`; the word of plane i in row l of group s is
/// `words[(s·q + i)·LANES + l]`.
pub(crate) fn words(codes: &[[u8; LANES]], q: usize, words: &mut [u64]) {
    for (s, words) in words.chunks_exact_mut(q * LANES).enumerate() {
        for (i, words) in words.chunks_exact_mut(LANES).enumerate() {
            let mut signs = [0u64; LANES];
            for (k, codes) in codes.iter().skip(s).step_by(SUBS).enumerate() {
                for (signs, code) in signs.iter_mut().zip(codes) {
                    *signs |= u64::from((code >> (q - 1 - i)) & 1) << k;
                }
            }
            words.copy_from_slice(&signs);
        }
    }
}

/// P M for the planes P of a tile, in lanes of columns: `lanes of M x planes`, planes in the order of [`words`].
pub(crate) struct Sums {
    planes: usize,
    lanes: Vec<Lane>,
}

impl Sums {
    pub(crate) fn zeros(planes: usize, matrix: &Square) -> Self {
        Self { planes, lanes: vec![[0.0; LANES]; matrix.width() * planes] }
    }

    /// Adds what the signs of some columns say, `WORD` columns from `first` for each of `words` (`words x planes`), in columns
    /// `range` (in whole lanes).
    pub(crate) fn add(&mut self, matrix: &Square, first: usize, words: &[u64], range: Range<usize>) {
        let lanes = lanes(range);
        pulp::Arch::new().dispatch(Add { sums: self, matrix, first, words, lanes });
    }

    /// Adds what a change of signs makes, from the first of `words` to the second, at most [`MOST_WORDS`] per plane; else as [`Sums::add`].
    pub(crate) fn change(&mut self, matrix: &Square, first: usize, words: [&[u64]; 2], range: Range<usize>) {
        let [before, after] = words;
        let planes = self.planes;
        let mut changes = Vec::new();
        let mut ends = Vec::with_capacity(planes);
        for plane in 0..planes {
            for (w, at) in (plane..before.len()).step_by(planes).enumerate() {
                let mut changed = before[at] ^ after[at];
                while changed != 0 {
                    let k = changed.trailing_zeros();
                    // To +1 first, to −1 behind it.
                    changes.push(((w * WORD) as u32 + k) as u16 * 2 + u16::from((after[at] >> k) & 1 == 0));
                    changed &= changed - 1;
                }
            }
            ends.push(changes.len());
        }
        let lanes = lanes(range);
        let columns = first..first + before.len() / planes * WORD;
        let (changes, ends) = (&changes[..], &ends[..]);
        pulp::Arch::new().dispatch(Change { sums: self, matrix, columns, changes, ends, lanes });
    }

    /// Some columns, from a multiple of `LANES`, for group `s` of rows, in lanes of rows: `out` is `columns x q`.
    pub(crate) fn rows(&self, s: usize, q: usize, range: Range<usize>, out: &mut [Lane]) {
        for (from, out) in (range.start / LANES..).zip(out[..range.len() * q].chunks_mut(LANES * q)) {
            for i in 0..q {
                let columns = &self.lanes[from * self.planes + (s * q + i) * LANES..][..LANES];
                for (t, out) in out.chunks_exact_mut(q).enumerate() {
                    out[i] = std::array::from_fn(|l| columns[l][t]);
                }
            }
        }
    }
}

/// The lanes of some columns, which begin with a lane or are none.
fn lanes(columns: Range<usize>) -> Range<usize> {
    columns.start.div_ceil(LANES)..columns.end.div_ceil(LANES)
}

struct Add<'a> {
    sums: &'a mut Sums,
    matrix: &'a Square,
    first: usize,
    words: &'a [u64],
    lanes: Range<usize>,
}

impl WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        /// Columns looked up at once.
        const GROUP: usize = 4;
        let Self { sums, matrix, first, words, lanes } = self;
        let mut table = Aligned([[[0.0f32; LANES]; 1 << GROUP]; WORD / GROUP]);
        let table = &mut table.0;
        for lane in lanes {
            let sums = &mut sums.lanes[lane * sums.planes..][..sums.planes];
            for (w, words) in words.chunks_exact(sums.len()).enumerate() {
                for (g, table) in table.iter_mut().enumerate() {
                    let column = |k: usize| matrix.lane(first + w * WORD + g * GROUP + k, lane);
                    let columns: [Lane; GROUP] = std::array::from_fn(column);
                    for l in 0..LANES {
                        table[0][l] = -(columns[0][l] + columns[1][l] + columns[2][l] + columns[3][l]);
                    }
                    for (k, column) in columns.iter().enumerate() {
                        let (without, with) = table.split_at_mut(1 << k);
                        for (without, with) in without.iter().zip(with) {
                            for l in 0..LANES {
                                with[l] = without[l] + 2.0 * column[l];
                            }
                        }
                    }
                }
                for (sum, word) in sums.iter_mut().zip(words) {
                    // Two sums, so that additions wait less for one another.
                    let mut parts = [*sum, [0.0; LANES]];
                    let mut word = *word;
                    for tables in table.as_chunks::<2>().0 {
                        for (part, table) in parts.iter_mut().zip(tables) {
                            let found = &table[word as usize % (1 << GROUP)];
                            for l in 0..LANES {
                                part[l] += found[l];
                            }
                            word >>= GROUP;
                        }
                    }
                    for l in 0..LANES {
                        sum[l] = parts[0][l] + parts[1][l];
                    }
                }
            }
        }
    }
}

struct Change<'a> {
    sums: &'a mut Sums,
    matrix: &'a Square,
    /// Columns of signs, at most `MOST_WORDS` words.
    columns: Range<usize>,
    changes: &'a [u16],
    ends: &'a [usize],
    lanes: Range<usize>,
}

impl WithSimd for Change<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { sums, matrix, columns, changes, ends, lanes } = self;
        let mut both = Aligned([[0.0f32; LANES]; 2 * MOST_WORDS * WORD]);
        let both = &mut both.0;
        for lane in lanes {
            for (column, [up, down]) in columns.clone().zip(both.as_chunks_mut::<2>().0) {
                *up = matrix.lane(column, lane).map(|x| 2.0 * x);
                *down = up.map(|x| -x);
            }
            let mut start = 0;
            for (sum, end) in sums.lanes[lane * sums.planes..][..sums.planes].iter_mut().zip(ends) {
                let mut total = *sum;
                for change in &changes[start..*end] {
                    let column = &both[usize::from(*change) % (2 * MOST_WORDS * WORD)];
                    for l in 0..LANES {
                        total[l] += column[l];
                    }
                }
                *sum = total;
                start = *end;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    const Q: usize = 3;

    fn codes(rng: &mut StdRng, columns: usize) -> Vec<[u8; LANES]> {
        (0..columns * SUBS).map(|_| std::array::from_fn(|_| rng.random_range(0..1 << Q))).collect()
    }

    fn all_words(codes: &[[u8; LANES]]) -> Vec<u64> {
        let mut out = Vec::new();
        for codes in codes.chunks(WORD * SUBS) {
            let mut block = vec![0; SUBS * Q * LANES];
            words(codes, Q, &mut block);
            out.extend(block);
        }
        out
    }

    /// Σ of P M over columns `first..` of P, in columns `range`, through [`Sums::rows`] against the definition. Integers: every sum is exact.
    fn check(sums: &Sums, matrix: &Square, first: usize, codes: &[[u8; LANES]], range: Range<usize>) {
        for s in 0..SUBS {
            let mut got = vec![[0.0; LANES]; range.len() * Q];
            sums.rows(s, Q, range.clone(), &mut got);
            for (j, got) in range.clone().zip(got.chunks_exact(Q)) {
                for (i, got) in got.iter().enumerate() {
                    for (l, got) in got.iter().enumerate() {
                        let sign = |code: u8| if (code >> (Q - 1 - i)) & 1 == 1 { 1.0 } else { -1.0 };
                        let signs = codes.iter().skip(s).step_by(SUBS).map(|codes| sign(codes[l]));
                        let sum: f32 = signs.enumerate().map(|(k, sign)| sign * matrix.get(first + k, j)).sum();
                        assert_eq!(*got, sum, "column {j}, plane {i}, row {l} of group {s}");
                    }
                }
            }
        }
    }

    #[test]
    fn sums_are_the_product_of_signs_and_matrix_for_any_number_of_columns() {
        let rng = &mut StdRng::seed_from_u64(0);
        for n in [1, 5, 16, 63, 64, 130, 333] {
            let mut matrix = Square::zeros(n);
            (0..n * n).for_each(|at| matrix.set(at / n, at % n, rng.random_range(-9..10) as f32));
            let before = codes(rng, n);
            let mut sums = Sums::zeros(SUBS * Q * LANES, &matrix);
            sums.add(&matrix, 0, &all_words(&before), 0..n);
            check(&sums, &matrix, 0, &before, 0..n);

            // Columns from the middle, sums for those behind them only.
            let (first, m) = (n / 3, (n - n / 3).min(WORD));
            let from = (first + m).next_multiple_of(LANES).min(n);
            let mut part = Sums::zeros(SUBS * Q * LANES, &matrix);
            part.add(&matrix, first, &all_words(&before[first * SUBS..][..m * SUBS]), from..n);
            check(&part, &matrix, first, &before[first * SUBS..][..m * SUBS], from..n);
            assert!(part.lanes[..from / LANES * part.planes].iter().all(|lane| *lane == [0.0; LANES]));
        }
    }

    #[test]
    fn a_change_of_signs_leads_to_the_sums_of_the_new_ones() {
        let rng = &mut StdRng::seed_from_u64(1);
        for n in [7, 64, 200, 333] {
            let mut matrix = Square::zeros(n);
            (0..n * n).for_each(|at| matrix.set(at / n, at % n, rng.random_range(-9..10) as f32));
            let before = codes(rng, n);
            let mut after = before.clone();
            let (first, m) = (n / 5, (n - n / 5).min(MOST_WORDS * WORD));
            after[first * SUBS..][..m * SUBS].copy_from_slice(&codes(rng, m));
            let mut sums = Sums::zeros(SUBS * Q * LANES, &matrix);
            sums.add(&matrix, 0, &all_words(&before), 0..n);
            let of = |codes: &[[u8; LANES]]| all_words(&codes[first * SUBS..][..m * SUBS]);
            sums.change(&matrix, first, [&of(&before), &of(&after)], 0..n);
            check(&sums, &matrix, 0, &after, 0..n);
        }
    }
}
