//! A weight as it lies in device memory: the mirror of `kernels/stack.cuh`, which describes the order of the bytes.

use bitstack_core::{BasisRef, BlockRef, CoefficientsRef, Shape, SignView, SpikesRef, ValuesRef};
use bytemuck::{Pod, Zeroable};

/// Rows of a tile of signs.
pub(crate) const TILE_ROWS: usize = 16;
/// Columns of a unit, 16 bytes of a row.
pub(crate) const UNIT_COLS: usize = 128;
/// Units of a chunk.
pub(crate) const CHUNK_UNITS: usize = 4;
/// Products a weight's table has room for.
pub(crate) const MAX_PRODUCTS: usize = 64;
/// Ranks of one product; a plane of higher rank is several.
pub(crate) const PRODUCT_RANK: usize = 16;

/// `Product` of `stack.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
pub(crate) struct Product {
    signs: u64,
    basis: u64,
    basis_scales: u64,
    coefficients: u64,
    coefficient_scales: u64,
    coefficients_stride: u32,
    rank: u32,
    operand: u32,
    first: u32,
    unused: u64,
}

/// `SpikeList` of `stack.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
pub(crate) struct SpikeList {
    words: u64,
    basis: u64,
    basis_scales: u64,
    coefficients: u64,
    coefficient_scales: u64,
    rank: u32,
    unused: u32,
}

/// `Weight` of `stack.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(crate) struct WeightTable {
    rows: u32,
    cols: u32,
    units: u32,
    products: u32,
    product: [Product; MAX_PRODUCTS],
    spikes: SpikeList,
}

const _: () = assert!(size_of::<Product>() == 64 && size_of::<SpikeList>() == 48);
const _: () = assert!(size_of::<WeightTable>() == 16 + 64 * MAX_PRODUCTS + 48);

/// Units of a row.
pub(crate) fn units(cols: usize) -> usize {
    cols.div_ceil(UNIT_COLS)
}

/// Tiles of a column.
pub(crate) fn tiles(rows: usize) -> usize {
    rows.div_ceil(TILE_ROWS)
}

/// Products of a plane.
pub(crate) fn products_of_rank(rank: usize) -> usize {
    rank.div_ceil(PRODUCT_RANK)
}

/// A factor's bytes in the order of the device, and its scales when it has some. No values: the scales multiply those of block 1.
pub(crate) struct PackedFactor {
    pub(crate) values: Vec<u8>,
    pub(crate) scales: Option<Vec<u8>>,
}

/// The signs in tiles.
pub(crate) fn pack_signs(signs: SignView<'_>) -> Vec<u8> {
    let (rows, units) = (signs.rows(), units(signs.cols()));
    let mut bytes = vec![0; tiles(rows) * units * UNIT_COLS / 8 * TILE_ROWS];
    for (tile, bytes) in bytes.chunks_exact_mut(units * 256).enumerate() {
        for r in 0..TILE_ROWS.min(rows - tile * TILE_ROWS) {
            let row = signs.row(tile * TILE_ROWS + r);
            for (chunk, bits) in row.chunks(CHUNK_UNITS * 16).enumerate() {
                let width = CHUNK_UNITS.min(units - chunk * CHUNK_UNITS) * 16;
                bytes[chunk * 1024 + r * width..][..bits.len()].copy_from_slice(bits);
            }
        }
    }
    bytes
}

/// V, each of its rows padded with zeros to whole units.
pub(crate) fn pack_basis(basis: BasisRef<'_>) -> PackedFactor {
    let (rank, cols) = (basis.rank(), basis.cols());
    let padded = units(cols) * UNIT_COLS;
    // A value's place is the same in all types; the source index goes with it.
    let places = move || (0..rank).flat_map(move |k| (0..cols).map(move |c| (k * padded + c, k * cols + c)));
    pack_values(basis.values(), rank * padded, places())
}

/// U as `[plane][product of the plane][tile][row of the tile][rank of the product]`, rows padded with zeros to whole tiles.
pub(crate) fn pack_coefficients(coefficients: CoefficientsRef<'_>) -> PackedFactor {
    let (rows, planes, rank) = (coefficients.rows(), coefficients.planes(), coefficients.rank());
    let padded = tiles(rows) * TILE_ROWS;
    let places = (0..rows * planes * rank).map(move |from| {
        let (row, plane, k) = (from / (planes * rank), from / rank % planes, from % rank);
        let first = k / PRODUCT_RANK * PRODUCT_RANK;
        let width = PRODUCT_RANK.min(rank - first);
        ((plane * rank + first) * padded + row * width + (k - first), from)
    });
    pack_values(coefficients.values(), planes * rank * padded, places)
}

fn pack_values(values: ValuesRef<'_>, len: usize, places: impl Iterator<Item = (usize, usize)>) -> PackedFactor {
    match values {
        ValuesRef::F16(values) => {
            let mut bytes = vec![0; len * 2];
            for (to, from) in places {
                bytes[to * 2..][..2].copy_from_slice(&values[from].to_le_bytes());
            }
            PackedFactor { values: bytes, scales: None }
        }
        ValuesRef::I8 { codes, scales } => {
            let mut bytes = vec![0; len];
            for (to, from) in places {
                bytes[to] = codes[from].cast_unsigned();
            }
            PackedFactor { values: bytes, scales: Some(scales.iter().flat_map(|s| s.to_le_bytes()).collect()) }
        }
        ValuesRef::Scales(scales) => {
            PackedFactor { values: Vec::new(), scales: Some(scales.iter().flat_map(|s| s.to_le_bytes()).collect()) }
        }
    }
}

/// A list of spikes: its words as they are.
pub(crate) fn pack_spikes(spikes: SpikesRef<'_>) -> Vec<u8> {
    spikes.words().iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Where a factor lies on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FactorAddress {
    /// `None`: those of block 1.
    pub(crate) values: Option<u64>,
    pub(crate) scales: Option<u64>,
}

impl FactorAddress {
    /// Bytes of a value.
    fn value_bytes(self) -> u64 {
        if self.scales.is_some() { 1 } else { 2 }
    }

    fn scales_from(self, index: usize) -> u64 {
        self.scales.map_or(0, |address| address + 2 * index as u64)
    }
}

/// Where the parts of a block lie on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockAddress {
    pub(crate) signs: u64,
    pub(crate) basis: Option<FactorAddress>,
    pub(crate) coefficients: FactorAddress,
    /// Planes the coefficients are for: 1, or the number of the block.
    pub(crate) planes: usize,
    pub(crate) spikes: Option<u64>,
}

/// The table of a weight with these blocks, by the rule of [`bitstack_core::Level`]: a plane without a basis takes the one before, and
/// refitted coefficients replace all earlier ones. The caller has checked that the parts fit, and that there are at most [`MAX_PRODUCTS`].
pub(crate) fn weight_table(shape: Shape, rank: usize, blocks: &[BlockAddress]) -> WeightTable {
    let (rows, cols) = (shape.rows(), shape.cols());
    let padded_rows = (tiles(rows) * TILE_ROWS) as u64;
    let padded_cols = (units(cols) * UNIT_COLS) as u64;
    let per_plane = products_of_rank(rank);
    let mut table = WeightTable {
        rows: rows as u32,
        cols: cols as u32,
        units: units(cols) as u32,
        products: (blocks.len() * per_plane) as u32,
        product: [Product::default(); MAX_PRODUCTS],
        spikes: SpikeList::default(),
    };
    // A list is in units of its own block's factors, whatever later blocks bring.
    if let Some(first) = blocks.first()
        && let (Some(words), Some(basis)) = (first.spikes, first.basis)
    {
        table.spikes = SpikeList {
            words,
            basis: basis.values.unwrap_or(0),
            basis_scales: basis.scales_from(0),
            coefficients: first.coefficients.values.unwrap_or(0),
            coefficient_scales: first.coefficients.scales_from(0),
            rank: PRODUCT_RANK.min(rank) as u32,
            unused: 0,
        };
    }
    let (mut basis, mut operands) = (None, 0);
    for (plane, block) in blocks.iter().enumerate() {
        basis = block.basis.or(basis);
        let Some(basis) = basis else { continue };
        operands += if block.basis.is_some() { per_plane } else { 0 };
        // Refitted coefficients of a later block, or else its own.
        let refitted = blocks[plane..].iter().rfind(|later| later.planes > 1);
        let (u, u_plane) = refitted.map_or((block.coefficients, 0), |later| (later.coefficients, plane));
        // Scales alone go with the codes of block 1, which has one plane.
        let (values, values_plane) = match u.values {
            Some(values) => (values, u_plane),
            None => (blocks[0].coefficients.values.unwrap_or(0), 0),
        };
        for part in 0..per_plane {
            let first = part * PRODUCT_RANK;
            let width = PRODUCT_RANK.min(rank - first);
            table.product[plane * per_plane + part] = Product {
                signs: block.signs,
                basis: basis.values.unwrap_or(0) + first as u64 * padded_cols * basis.value_bytes(),
                basis_scales: basis.scales_from(first),
                coefficients: values + (values_plane * rank + first) as u64 * padded_rows * u.value_bytes(),
                coefficient_scales: u.scales_from(u_plane * rank + first),
                coefficients_stride: (TILE_ROWS * width) as u32 * u.value_bytes() as u32,
                rank: width as u32,
                operand: (operands - per_plane + part) as u32,
                first: u32::from(block.basis.is_some()),
                unused: 0,
            };
        }
    }
    table
}

/// The bytes a block takes on the device, padding included.
pub(crate) fn device_bytes(block: &BlockRef<'_>) -> usize {
    let (rows, cols) = (block.signs.rows(), block.signs.cols());
    let (padded_rows, padded_cols) = (tiles(rows) * TILE_ROWS, units(cols) * UNIT_COLS);
    let bytes = |values: ValuesRef<'_>, len: usize| match values {
        ValuesRef::F16(_) => 2 * len,
        ValuesRef::I8 { scales, .. } => len + 2 * scales.len(),
        ValuesRef::Scales(scales) => 2 * scales.len(),
    };
    let vectors = block.coefficients.planes() * block.coefficients.rank();
    padded_rows * padded_cols / 8
        + block.basis.map_or(0, |v| bytes(v.values(), v.rank() * padded_cols))
        + bytes(block.coefficients.values(), padded_rows * vectors)
        + block.spikes.map_or(0, |s| size_of_val(s.words()))
}
