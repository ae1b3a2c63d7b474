//! Sums over 16-bit codes of z, behind a safe interface: AVX2 and above, NEON.

#[cfg(target_arch = "x86_64")]
use super::avx2;
#[cfg(target_arch = "aarch64")]
use super::neon;
use crate::Isa;

/// Rows summed together.
pub(crate) const ROWS: usize = 2;

/// Columns of a run: a register of signs of one row.
pub(crate) const RUN_COLS: usize = 256;

/// The most columns whose sums fit in 32 bits: 2 · 32639 · MAX_COLS / 8 < 2^31.
pub(crate) const MAX_COLS: usize = 1 << 17;

/// The largest code, 127 · 256 + 127.
const LARGEST: f32 = 32639.0;

/// The smallest maximum whose inverse is safely finite.
const SMALLEST_MAX: f32 = 1e-30;

/// Codes of 256 columns, 256 · high + low: `[j][i]` is that of column 8i + j.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(crate) struct Run {
    pub(super) high: [[i8; 32]; 8],
    pub(super) low: [[i8; 32]; 8],
}

/// What a step of the codes is worth, by lane (columns 32L..32L + 32 of each run), and the sum of all codes in a lane.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Lanes {
    steps: [f32; 8],
    totals: [i32; 8],
}

/// Whether there are kernels for `isa` here.
pub(crate) fn has(isa: Isa) -> bool {
    isa != Isa::Scalar && isa.is_available()
}

/// Makes the codes of `z`, padded with zeros to whole runs. `None` when they cannot represent it: a value is not finite, or all are tiny and
/// not zero.
pub(crate) fn encode(z: &[f32], runs: &mut [Run]) -> Option<Lanes> {
    assert!(z.len() == RUN_COLS * runs.len() && z.len() <= MAX_COLS);
    let mut largest = [0.0f32; 8];
    let mut finite = true;
    for z in z.as_chunks::<RUN_COLS>().0 {
        for (largest, z) in largest.iter_mut().zip(z.as_chunks::<32>().0) {
            for &z in z {
                finite &= z.is_finite();
                *largest = largest.max(z.abs());
            }
        }
    }
    let max = largest.iter().copied().fold(0.0, f32::max);
    if !finite || (max > 0.0 && max < SMALLEST_MAX) {
        return None;
    }
    // Lanes far below the largest may count as zero: they are lost in the sum.
    let inverses = largest.map(|m| if m >= SMALLEST_MAX { LARGEST / m } else { 0.0 });
    let mut lanes = Lanes { steps: largest.map(|m| m / LARGEST), totals: [0; 8] };
    for (run, z) in runs.iter_mut().zip(z.as_chunks::<RUN_COLS>().0) {
        for i in 0..32 {
            for j in 0..8 {
                // Rounded to the nearest integer by adding 1.5 · 2^23, whose last bit is worth 1.
                let code = (z[8 * i + j] * inverses[i / 4] + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
                lanes.totals[i / 4] += code;
                (run.high[j][i], run.low[j][i]) = (((code + 128) >> 8) as i8, code as i8);
            }
        }
    }
    Some(lanes)
}

/// Σ ± z for each row; past the end of the signs z is zero. From `ahead` on, as many bytes as are read are brought into the second-level
/// cache, where the CPU does not do so by itself.
pub(crate) fn signed_sums(isa: Isa, rows: [&[u8]; ROWS], runs: &[Run], lanes: &Lanes, ahead: *const u8) -> [f32; ROWS] {
    assert!(has(isa) && rows.iter().all(|r| r.len().div_ceil(RUN_COLS / 8) == runs.len()));
    let sums = match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => unsafe { avx2::sums(rows, runs, ahead) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
        Isa::Neon => unsafe { neon::sums(rows, runs) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the only obligation is the target features, and the assertion above holds only if the CPU has them.
        Isa::NeonDotprod => unsafe { neon::sums_dotprod(rows, runs) },
        _ => unreachable!("{isa} has no kernels here: {ahead:?}"),
    };
    sums.map(|sums| {
        let mut parts = [0.0; 8];
        for i in 0..8 {
            parts[i] = (2 * sums[i] - lanes.totals[i]) as f32 * lanes.steps[i];
        }
        ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Σ ± code in each lane, one bit at a time, then as [`signed_sums`].
    fn defined(bits: &[u8], runs: &[Run], lanes: &Lanes) -> f32 {
        let mut sums = [0i64; 8];
        for (run, bits) in runs.iter().zip(bits.chunks(RUN_COLS / 8)) {
            for i in 0..32 {
                for j in 0..8 {
                    let code = 256 * i64::from(run.high[j][i]) + i64::from(run.low[j][i]);
                    // Beyond the signs z is zero.
                    sums[i / 4] += if bits.get(i).is_some_and(|b| b >> j & 1 == 1) { code } else { -code };
                }
            }
        }
        let parts: [f32; 8] = std::array::from_fn(|i| sums[i] as f32 * lanes.steps[i]);
        ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]))
    }

    #[test]
    fn every_instruction_set_gives_the_sums_of_the_codes_exactly() {
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        // Sums that stay within one block of 16-bit sums, that fill it and that exceed it; the last row ends inside a run.
        for n_bytes in [1, 32, 15 * 32, 15 * 32 + 1, 40 * 32 - 3] {
            let n_runs = usize::div_ceil(n_bytes, RUN_COLS / 8);
            // All as large as codes can be, of either sign and of alternating ones, and random.
            for kind in 0..4 {
                let mut z: Vec<f32> = (0..n_runs * RUN_COLS)
                    .map(|i| [1.0, -1.0, (i % 2) as f32 * 2.0 - 1.0, random() as f32 - 8_388_608.0][kind])
                    .collect();
                z[8 * n_bytes..].fill(0.0);
                let mut runs = vec![Run::default(); n_runs];
                let lanes = encode(&z, &mut runs).unwrap();
                let random_row: Vec<u8> = (0..n_bytes).map(|_| random() as u8).collect();
                for rows in [[vec![0xff; n_bytes], vec![0; n_bytes]], [vec![0x55; n_bytes], random_row]] {
                    let rows = rows.each_ref().map(Vec::as_slice);
                    let expected = rows.map(|bits| defined(bits, &runs, &lanes));
                    for isa in Isa::available().filter(|&isa| has(isa)) {
                        let sums = signed_sums(isa, rows, &runs, &lanes, rows[0].as_ptr());
                        assert_eq!(
                            sums.map(f32::to_bits),
                            expected.map(f32::to_bits),
                            "{isa}, {n_bytes} bytes, {kind}"
                        );
                    }
                }
            }
        }
    }
}
