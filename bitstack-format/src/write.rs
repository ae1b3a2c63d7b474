//! Writing a file in load order from a catalog: the same for a draft and for a prefix of another file.

use crate::catalog::Catalog;
use crate::constants::{ALIGNMENT, PAD_PREFIX};
use crate::header::{self, WeightRecord};
use crate::{Dtype, FormatError, ReadAt, TensorInfo, order};
use std::io::Write;

/// The alignment of a tensor in the file: that of its elements, so that every reader can view it in place; [`ALIGNMENT`] for
/// unstacked tensors and for the first tensor of a block.
pub(crate) const fn alignment(dtype: Dtype, leads: bool) -> u64 {
    if leads { ALIGNMENT } else { dtype.bits() / 8 }
}

/// Bytes of the pad before a tensor that could begin at `offset_bytes`.
pub(crate) const fn pad_bytes(offset_bytes: u64, alignment: u64) -> u64 {
    (alignment - offset_bytes % alignment) % alignment
}

/// The name of a pad, the pads before it being `n`.
pub(crate) fn pad_name(n: usize) -> String {
    format!("{PAD_PREFIX}{n}")
}

/// A tensor of the file to be: one of the catalog, or a pad.
enum Piece {
    Stored(usize),
    Pad(TensorInfo),
}

/// Writes the files, the unstacked tensors and the blocks of `order`. Every byte is compared with its hash on the way.
pub(crate) fn write_stack(
    catalog: &Catalog,
    source: &(impl ReadAt + ?Sized),
    order: &[u32],
    mut out: impl Write,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, FormatError> {
    let available: Vec<usize> = catalog.blocks.iter().map(Vec::len).collect();
    order::check(order, &available)?;

    let mut pieces = Vec::new();
    // From the start of the data, which is aligned itself.
    let mut offset_bytes = 0;
    let mut n_pads = 0;
    let mut place = |i: usize, alignment: u64| -> Result<(), FormatError> {
        let pad = pad_bytes(offset_bytes, alignment);
        if pad > 0 {
            pieces.push(Piece::Pad(TensorInfo::new(pad_name(n_pads), Dtype::U8, vec![pad as usize])?));
            n_pads += 1;
        }
        offset_bytes += pad + catalog.tensors[i].info.len_bytes;
        pieces.push(Piece::Stored(i));
        Ok(())
    };
    for &(_, i) in &catalog.files {
        place(i, 1)?;
    }
    for &i in &catalog.base {
        place(i, ALIGNMENT)?;
    }
    for (weight, block) in order::blocks(order) {
        let parts = catalog.block_parts(weight, block)?;
        for i in parts.tensors() {
            place(i, alignment(catalog.tensors[i].info.dtype, i == parts.signs))?;
        }
    }

    let counts = order::counts(order, catalog.weights.len());
    let weights: Vec<WeightRecord<'_>> =
        catalog.weights.iter().zip(counts).map(|(w, n)| WeightRecord::new(w, n)).collect();
    let tensors = pieces.iter().map(|piece| match piece {
        Piece::Stored(i) => (&catalog.tensors[*i].info, catalog.tensors[*i].hash),
        Piece::Pad(info) => (info, *blake3::hash(&[0; ALIGNMENT as usize][..info.len_bytes as usize]).as_bytes()),
    });
    let header = header::build(&catalog.provenance, &weights, order, tensors)?;

    let total = header.len() as u64 + offset_bytes;
    out.write_all(&header)?;
    let mut done = header.len() as u64;
    progress(done, total);
    let mut buffer = Vec::new();
    for piece in &pieces {
        match piece {
            Piece::Pad(info) => {
                out.write_all(&[0; ALIGNMENT as usize][..info.len_bytes as usize])?;
                done += info.len_bytes;
            }
            Piece::Stored(i) => catalog.stream(source, *i, &mut buffer, |bytes| {
                out.write_all(bytes)?;
                done += bytes.len() as u64;
                progress(done, total);
                Ok(())
            })?,
        }
    }
    out.flush()?;
    Ok(done)
}
