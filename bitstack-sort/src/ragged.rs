//! Rows of unequal length in one flat allocation: one row per weight, one value per block.

use std::iter::once;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ragged<T> {
    /// Row `i` is `values[ends[i]..ends[i + 1]]`; `ends[0]` is 0.
    ends: Vec<usize>,
    values: Vec<T>,
}

impl<T: Copy> Ragged<T> {
    pub(crate) fn new<R: AsRef<[T]>>(rows: impl IntoIterator<Item = R>) -> Self {
        let mut values = Vec::new();
        let ends = once(0)
            .chain(rows.into_iter().map(|row| {
                values.extend_from_slice(row.as_ref());
                values.len()
            }))
            .collect();
        Self { ends, values }
    }

    pub(crate) fn n_rows(&self) -> usize {
        self.ends.len() - 1
    }

    pub(crate) fn n_values(&self) -> usize {
        self.values.len()
    }

    pub(crate) fn row(&self, row: usize) -> Option<&[T]> {
        let end = *self.ends.get(row.checked_add(1)?)?;
        Some(&self.values[self.ends[row]..end])
    }

    pub(crate) fn get(&self, row: usize, column: usize) -> Option<T> {
        self.row(row)?.get(column).copied()
    }

    pub(crate) fn set(&mut self, row: usize, column: usize, value: T) {
        let start = self.ends[row];
        self.values[start..self.ends[row + 1]][column] = value;
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = &[T]> {
        self.ends.windows(2).map(|ends| &self.values[ends[0]..ends[1]])
    }
}
