//! Products with spikes: portable loops, compiled for each instruction set.

use bitstack_core::{BasisRef, LevelSpikes, SPIKE_ROWS};

use super::factors;
use crate::Isa;

/// Where there is more than one token, so many lie side by side.
const LANES: usize = 8;

/// The length of z for `tokens` tokens of `cols` columns.
pub(crate) fn z_len(tokens: usize, cols: usize) -> usize {
    if tokens == 1 { cols } else { tokens.next_multiple_of(LANES) * cols }
}

/// Spikes with what they are multiplied by.
pub(crate) struct Spiked<'a> {
    spikes: LevelSpikes<'a>,
    /// The values of the codes of entries.
    values: [f32; 32],
    /// z = v ⊙ x, v the first row of block 1's basis: `cols` values of one token; of more, for every [`LANES`] of
    /// them, `cols x LANES`.
    z: &'a [f32],
}

impl<'a> Spiked<'a> {
    /// Makes z. `row` has space for `cols` values, and z for [`z_len`].
    pub(crate) fn new(isa: Isa, spikes: LevelSpikes<'a>, x: &[f32], row: &mut [f32], z: &'a mut [f32]) -> Self {
        spread(isa, spikes.basis, x, row, z);
        Self { spikes, values: spikes.list.values(), z }
    }

    /// `y[t, r] += u[r] Σ_entries value z[t, c]` for `rows` rows from `first_row` on, which begins a tile. `y` is `tokens x rows`; entries
    /// in columns beyond the weight are left out.
    pub(crate) fn add(&self, isa: Isa, first_row: usize, rows: usize, y: &mut [f32]) {
        assert!(first_row.is_multiple_of(SPIKE_ROWS));
        let cols = self.spikes.list.shape().cols();
        for (tile, first) in (first_row / SPIKE_ROWS..).zip((0..rows).step_by(SPIKE_ROWS)) {
            let n = SPIKE_ROWS.min(rows - first);
            let mut units = [0.0; SPIKE_ROWS];
            factors::first_coefficients(self.spikes.coefficients, first_row + first, &mut units[..n]);
            let entries = self.spikes.list.tile(tile);
            if y.len() == rows {
                let sums = sums_of(isa, entries, &self.values, self.z.as_chunks().0);
                for ((y, [sum]), unit) in y[first..].iter_mut().zip(&sums).zip(&units[..n]) {
                    *y += unit * sum;
                }
                continue;
            }
            for (z, y) in self.z.as_chunks().0.chunks_exact(cols).zip(y.chunks_mut(LANES * rows)) {
                let sums = sums_of::<LANES>(isa, entries, &self.values, z);
                for (t, y) in y.chunks_exact_mut(rows).enumerate() {
                    for ((y, sums), unit) in y[first..].iter_mut().zip(&sums).zip(&units[..n]) {
                        *y += unit * sums[t];
                    }
                }
            }
        }
    }
}

fn spread(isa: Isa, basis: BasisRef<'_>, x: &[f32], row: &mut [f32], z: &mut [f32]) {
    let cols = row.len();
    if x.len() == cols {
        return factors::products(isa, basis, 0, x, z);
    }
    for (x, z) in x.chunks(LANES * cols).zip(z.as_chunks_mut::<LANES>().0.chunks_exact_mut(cols)) {
        z.fill([0.0; LANES]);
        for (t, x) in x.chunks_exact(cols).enumerate() {
            factors::products(isa, basis, 0, x, row);
            for (z, &value) in z.iter_mut().zip(&*row) {
                z[t] = value;
            }
        }
    }
}

/// The sums of value times z over the entries of each row of a tile, for `L` tokens.
fn sums_of<const L: usize>(isa: Isa, entries: &[u16], values: &[f32; 32], z: &[[f32; L]]) -> [[f32; L]; SPIKE_ROWS] {
    assert!(isa.is_available());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features; the assertion above says that the CPU has those of `isa`, and the sets above
        // AVX2 include its.
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => unsafe { sums_avx2(entries, values, z) },
        _ => sums_portable(entries, values, z),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn sums_avx2<const L: usize>(entries: &[u16], values: &[f32; 32], z: &[[f32; L]]) -> [[f32; L]; SPIKE_ROWS] {
    sums_portable(entries, values, z)
}

#[inline(always)]
fn sums_portable<const L: usize>(entries: &[u16], values: &[f32; 32], z: &[[f32; L]]) -> [[f32; L]; SPIKE_ROWS] {
    let mut sums = [[0.0; L]; SPIKE_ROWS];
    let mut col = 0;
    let mut add = |&entry: &u16| {
        col += usize::from(entry >> 6) % 32;
        // Columns only grow: when one is beyond the weight, so are those of all entries after it.
        let z = z.get(col)?;
        let value = values[usize::from(entry >> 11)];
        for (sum, z) in sums[usize::from(entry) % SPIKE_ROWS].iter_mut().zip(z) {
            *sum += value * z;
        }
        Some(())
    };
    // Eight at a time, which compilers write out: an eighth faster.
    let (eights, rest) = entries.as_chunks::<8>();
    let _ = eights
        .iter()
        .try_for_each(|entries| entries.iter().try_for_each(&mut add))
        .and_then(|()| rest.iter().try_for_each(add));
    sums
}
