//! How the rows of a tile lie in memory: in lanes, side by side.

/// Rows worked on side by side. Sixteen floats are one AVX-512 register, two AVX ones.
pub(crate) const LANES: usize = 16;
/// One number for each of [`LANES`] rows.
pub(crate) type Lane = [f32; LANES];

/// What is read and written all the time, lane by lane: none of them lies across two lines of the cache.
#[derive(Clone)]
#[repr(align(64))]
pub(crate) struct Aligned<T>(pub(crate) T);

/// Groups of lanes in a tile.
pub(crate) const SUBS: usize = 8;
/// Rows of a tile.
pub(crate) const TILE: usize = SUBS * LANES;
