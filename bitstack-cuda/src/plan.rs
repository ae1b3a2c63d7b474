//! How a product is cut up: which kernel, how many blocks, how much shared memory. Pure arithmetic, mirrored in `kernels/`.

use crate::layout::{CHUNK_UNITS, MAX_PRODUCTS, PRODUCT_RANK, TILE_ROWS, UNIT_COLS, products_of_rank, tiles, units};
use bytemuck::{Pod, Zeroable};

/// Weights of one launch.
pub(crate) const MAX_WEIGHTS: usize = 4;
/// Warps of a block of the fused kernel.
const WARPS: usize = 8;
/// Chunks under way for each warp.
const STAGES: usize = 4;
/// Bytes of a column of prepared Z, for a chunk.
const RECORD_BYTES: usize = 544;
/// Floats of a row of partial results.
const STAGE_ROW: usize = 17;
/// Rows and tokens of a block of the batch kernel, and the halves of a row of its tiles.
pub(crate) const BATCH_ROWS: usize = 64;
pub(crate) const BATCH_TOKENS: usize = 128;
const BATCH_STRIDE: usize = 72;
/// Rows of a block of the kernel of spikes, its warps, and the tokens of one pass.
const SPIKE_ROWS: usize = bitstack_core::SPIKE_ROWS;
const SPIKE_WARPS: usize = 32;
const SPIKE_TOKENS: usize = 4;
/// Tokens up to which each block prepares Z for itself: beyond, a launch of its own is cheaper than doing it in every block.
const OWN_TOKENS: usize = 4;

/// `FusedWeight` of `fused.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(crate) struct FusedWeight {
    pub(crate) weight: u64,
    pub(crate) y: u64,
    pub(crate) operands: u64,
    pub(crate) unused: u64,
}

/// `FusedParameters` of `fused.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(crate) struct FusedParameters {
    pub(crate) x: u64,
    pub(crate) x_type: u32,
    pub(crate) y_type: u32,
    pub(crate) tokens: u32,
    pub(crate) weights: u32,
    pub(crate) rank_shift: u32,
    pub(crate) pass_tokens: u32,
    pub(crate) columns: u32,
    pub(crate) column_shift: u32,
    pub(crate) chunks: u32,
    pub(crate) passes: u32,
    pub(crate) capacity: u32,
    pub(crate) unused: u32,
    pub(crate) weight: [FusedWeight; MAX_WEIGHTS],
}

/// `ReconstructParameters` of `rebuild.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct ReconstructParameters {
    pub(crate) weight: u64,
    pub(crate) out: u64,
    pub(crate) out_type: u32,
    pub(crate) unused: u32,
}

/// `BatchParameters` of `rebuild.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct BatchParameters {
    pub(crate) weight: u64,
    pub(crate) x: u64,
    pub(crate) y: u64,
    pub(crate) tokens: u32,
    pub(crate) x_type: u32,
    pub(crate) y_type: u32,
    pub(crate) aligned: u32,
}

impl BatchParameters {
    /// What the kernel of spikes takes to add those of the same weight to the same product.
    pub(crate) fn for_spikes(self) -> FusedParameters {
        let Self { weight, x, y, tokens, x_type, y_type, aligned: _ } = self;
        let mut parameters = FusedParameters { x, x_type, y_type, tokens, weights: 1, ..FusedParameters::default() };
        parameters.weight[0] = FusedWeight { weight, y, ..FusedWeight::default() };
        parameters
    }
}

/// What a device can run at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) multiprocessors: usize,
    /// Shared memory of a multiprocessor, bytes.
    pub(crate) shared_per_multiprocessor: usize,
    /// Shared memory a block may ask for, bytes.
    pub(crate) shared_per_block: usize,
}

/// What of a weight matters for the plan: nothing that changes when planes come and go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) rank: usize,
    /// Bases there may be.
    pub(crate) bases: usize,
    /// Whether block 1 has spikes.
    pub(crate) spikes: bool,
}

/// The kernels by name.
pub(crate) const KERNELS: [&str; 9] = [
    "prepare",
    "fused_own",
    "fused_prepared_1",
    "fused_prepared_2",
    "fused_prepared_4",
    "spikes",
    "reconstruct",
    "batch_half",
    "batch_bfloat",
];

/// Where, how often and with how much shared memory a kernel runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) kernel: &'static str,
    pub(crate) grid: [usize; 3],
    pub(crate) threads: usize,
    pub(crate) shared_bytes: usize,
}

/// A product of a few tokens: the launch that prepares Z, if any, that of the product, and that which adds spikes, if any. Parameters without
/// addresses.
#[derive(Debug, Clone)]
pub(crate) struct FusedPlan {
    pub(crate) prepare: Option<Launch>,
    pub(crate) product: Launch,
    pub(crate) spikes: Option<Launch>,
    pub(crate) parameters: FusedParameters,
    /// Bytes of prepared operands of each weight, 0 when nothing is prepared.
    pub(crate) operand_bytes: usize,
}

impl FusedPlan {
    /// For 1 to [`MAX_WEIGHTS`] weights with the same number of columns and the same rank, and at least one token.
    pub(crate) fn new(limits: Limits, weights: &[Size], tokens: usize) -> Self {
        let Size { cols, rank, .. } = weights[0];
        let padded_rank = rank.min(PRODUCT_RANK).next_power_of_two();
        let tiles_n = (tokens * padded_rank).div_ceil(4).next_power_of_two().clamp(1, 4);
        let pass_tokens = tokens.min(4 * tiles_n / padded_rank);
        let (passes, columns) = (tokens.div_ceil(pass_tokens), 2 * padded_rank * pass_tokens);
        let chunks = units(cols).div_ceil(CHUNK_UNITS);
        let column_warps = if chunks >= WARPS { WARPS } else { 1 << chunks.ilog2() };
        let record_bytes = RECORD_BYTES * columns;
        let base =
            64 * MAX_PRODUCTS + 2 * WARPS * (columns / 2) * STAGE_ROW * 4 + WARPS * STAGES * (1024 + 32 * padded_rank);
        let own_bytes = base + chunks * record_bytes;
        let own = weights.iter().all(|w| w.rank == 1 && w.bases == 1)
            && tokens <= OWN_TOKENS
            && own_bytes <= limits.shared_per_block;
        let shared_bytes = if own { own_bytes } else { base };
        let capacity = weights.iter().map(|w| w.bases * products_of_rank(w.rank)).max().unwrap_or(1);
        // The driver keeps 1 KiB of every block's shared memory; registers allow two blocks.
        let resident = (limits.shared_per_multiprocessor / (shared_bytes + 1024)).clamp(1, 2);
        let items: usize = weights.iter().map(|w| tiles(w.rows).div_ceil(WARPS / column_warps)).sum();
        let kernel = match (own, tiles_n) {
            (true, _) => "fused_own",
            (false, 1) => "fused_prepared_1",
            (false, 2) => "fused_prepared_2",
            (false, _) => "fused_prepared_4",
        };
        let product = Launch {
            kernel,
            grid: [(limits.multiprocessors * resident).min(items), passes, 1],
            threads: WARPS * 32,
            shared_bytes,
        };
        let prepare = Launch {
            kernel: "prepare",
            grid: [chunks, weights.len() * capacity, passes],
            threads: 128,
            shared_bytes: 0,
        };
        let parameters = FusedParameters {
            tokens: tokens as u32,
            weights: weights.len() as u32,
            rank_shift: padded_rank.ilog2(),
            pass_tokens: pass_tokens as u32,
            columns: columns as u32,
            column_shift: column_warps.ilog2(),
            chunks: chunks as u32,
            passes: passes as u32,
            capacity: capacity as u32,
            ..FusedParameters::default()
        };
        let operand_bytes = if own { 0 } else { capacity * passes * chunks * record_bytes };
        let spikes = spikes_launch(weights, tokens);
        Self { prepare: (!own).then_some(prepare), product, spikes, parameters, operand_bytes }
    }

    /// All launches, in order.
    pub(crate) fn launches(&self) -> impl Iterator<Item = &Launch> {
        self.prepare.iter().chain([&self.product]).chain(&self.spikes)
    }
}

/// The launch that adds spikes to the products of some weights with the same tokens; none where no weight has any.
pub(crate) fn spikes_launch(weights: &[Size], tokens: usize) -> Option<Launch> {
    let rows = weights.iter().filter(|w| w.spikes).map(|w| w.rows).max()?;
    Some(Launch {
        kernel: "spikes",
        grid: [rows.div_ceil(SPIKE_ROWS), weights.len(), tokens.div_ceil(SPIKE_TOKENS).min(65535)],
        threads: SPIKE_WARPS * 32,
        shared_bytes: SPIKE_WARPS * (SPIKE_TOKENS * SPIKE_ROWS * 4 + 2 * 4),
    })
}

/// The launch that writes W out.
pub(crate) fn reconstruct_launch(rows: usize, cols: usize) -> Launch {
    let shared_bytes = TILE_ROWS * UNIT_COLS * 4;
    Launch { kernel: "reconstruct", grid: [tiles(rows), units(cols), 1], threads: 128, shared_bytes }
}

/// The launch of a product with many tokens.
pub(crate) fn batch_launch(kernel: &'static str, rows: usize, tokens: usize) -> Launch {
    let shared_bytes = (BATCH_ROWS + BATCH_TOKENS) * BATCH_STRIDE * 2 + 64 * MAX_PRODUCTS;
    Launch { kernel, grid: [rows.div_ceil(BATCH_ROWS), tokens.div_ceil(BATCH_TOKENS), 1], threads: 256, shared_bytes }
}

const _: () = assert!(BATCH_ROWS.is_multiple_of(TILE_ROWS) && UNIT_COLS.is_multiple_of(64));
const _: () = assert!(SPIKE_ROWS == 64 && SPIKE_ROWS.is_multiple_of(TILE_ROWS));
const _: () = assert!(size_of::<FusedParameters>() == 56 + 32 * MAX_WEIGHTS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plan_fits_the_smallest_device_and_covers_all_tokens() {
        // Compute capability 8.6: 99 KiB a block, 100 KiB a multiprocessor.
        let limits = Limits { multiprocessors: 28, shared_per_multiprocessor: 100 << 10, shared_per_block: 99 << 10 };
        for cols in [1, 128, 129, 512, 896, 4096, 14336, 28672, 65535 * 128] {
            for rank in [1, 2, 3, 4, 7, 8, 16, 17, 64] {
                for (tokens, bases) in (1..=20).chain([257, 65535]).flat_map(|t| [(t, 1), (t, 16)]) {
                    let weights = [Size { rows: 1000, cols, rank, bases, spikes: true }; 3];
                    let plan = FusedPlan::new(limits, &weights, tokens);
                    let p = &plan.parameters;
                    assert!(plan.product.shared_bytes <= limits.shared_per_block, "{plan:?}");
                    assert!((p.pass_tokens * p.passes) as usize >= tokens && p.passes as usize <= tokens, "{plan:?}");
                    assert!(p.columns <= 32 && 1 << p.column_shift <= p.chunks.min(8), "{plan:?}");
                    assert_eq!(plan.spikes.as_ref().map(|s| s.grid), Some([16, 3, tokens.div_ceil(4)]));
                    for launch in plan.launches() {
                        assert!(KERNELS.contains(&launch.kernel));
                        assert!(launch.grid.iter().all(|&n| n > 0) && launch.grid[1..].iter().all(|&n| n <= 65535));
                    }
                    // A tile of B for each 8 columns, as many as the kernel's name says.
                    let tiles: u32 = plan.product.kernel.rsplit('_').next().unwrap().parse().unwrap_or(1);
                    assert!(p.columns <= 8 * tiles && 2 * p.columns > 8 * (tiles - 1), "{plan:?}");
                }
            }
        }
        // These ask for no more than every launch may have.
        let tall = [Size { rows: 1000, cols: 64, rank: 1, bases: 1, spikes: true }];
        let spikes = spikes_launch(&tall, 1 << 23).unwrap();
        assert_eq!(spikes.grid, [16, 1, 65535]);
        for launch in [spikes, batch_launch("batch_half", 1000, 1000), reconstruct_launch(1000, 1000)] {
            assert!(launch.shared_bytes <= 48 << 10);
        }
        assert_eq!(spikes_launch(&[Size { spikes: false, ..tall[0] }], 1), None);
    }
}
