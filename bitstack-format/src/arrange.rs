//! From the header to a catalog in which every tensor is in its place.

use crate::catalog::{
    BlockParts, Catalog, FactorParts, Stored, check_model_name, check_name, check_weight_name, part_name,
};
use crate::constants::{
    ALIGNMENT, BASE_DTYPES, BASIS, COEFFICIENTS, FACTOR_DTYPES, FILE_PREFIX, PAD_PREFIX, SCALE_SUFFIX, SIGNS, SPIKES,
};
use crate::header::{Header, HeaderTensor, WeightRecord};
use crate::tensor::wrong;
use crate::write::{alignment, pad_bytes, pad_name};
use crate::{BlockKind, Dtype, FormatError, Limits, TensorInfo, WeightInfo, order};
use bitstack_core::{BlockLayout, FactorType, Shape, SpikesRef};
use bitstack_pack::row_bytes;
use std::collections::HashSet;

/// Puts the tensors of a header in their places, each of which must hold exactly the tensor that belongs there.
pub(crate) fn arrange(header: Header, data_bytes: u64, limits: &Limits) -> Result<(Catalog, Vec<u32>), FormatError> {
    let mut weights = Vec::new();
    let mut n_blocks = Vec::new();
    for record in header.weights()? {
        let n = required(record.n_blocks, "n_blocks", &record.name)?;
        n_blocks.push(usize::try_from(n).unwrap_or(usize::MAX));
        weights.push(weight_info(record)?);
    }
    order::check(&header.order, &n_blocks)?;
    let counts = order::counts(&header.order, n_blocks.len());
    if let Some(w) = (0..n_blocks.len()).find(|&w| counts[w] != n_blocks[w]) {
        let (name, n, count) = (&weights[w].name, n_blocks[w], counts[w]);
        let reason = format!("weight {name} has n_blocks {n}, and {count} blocks in the load order");
        return Err(FormatError::Metadata { field: "weights", reason });
    }

    let mut catalog = Catalog::default();
    catalog.provenance = header.provenance;
    for HeaderTensor { info, offset_bytes, hash } in header.tensors {
        let end = offset_bytes.checked_add(info.len_bytes).and_then(|end| end.checked_add(data_bytes));
        if end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(wrong(&info.name, "the second data offset", offset_bytes, "within a file of 2^63 - 1 bytes"));
        }
        if info.len_bytes > limits.tensor_bytes {
            let (what, value) = (format!("tensor {}", info.name), info.len_bytes);
            return Err(FormatError::LimitExceeded { what, value, limit: limits.tensor_bytes });
        }
        catalog.add(Stored { info, offset_bytes: data_bytes + offset_bytes, hash })?;
    }

    let mut places = Places { tensors: &catalog.tensors, next: 0, n_pads: 0 };
    let mut files = Vec::new();
    while places.peek().is_some_and(|t| t.name.starts_with(FILE_PREFIX)) {
        files.push(places.take_bytes()?);
    }
    let first_block = part_name(&weights[header.order[0] as usize].name, 1, SIGNS);
    let names: HashSet<&str> = weights.iter().map(|w| w.name.as_str()).collect();
    let mut base = Vec::new();
    while let Some(info) = places.peek().filter(|t| t.name != first_block) {
        check_model_name("tensor", &info.name)?;
        places.check_dtype(info, BASE_DTYPES)?;
        if names.contains(info.name.as_str()) {
            return Err(FormatError::Duplicate { name: info.name.clone() });
        }
        base.push(places.take(ALIGNMENT)?);
    }
    drop(names);
    let mut blocks = vec![Vec::new(); weights.len()];
    for (w, block) in order::blocks(&header.order) {
        let weight: &mut WeightInfo = &mut weights[w];
        let (layout, parts) = places.take_block(weight, block)?;
        weight.check_next(&layout).map_err(|source| FormatError::Block {
            weight: weight.name.clone(),
            block,
            source,
        })?;
        weight.blocks.push(layout);
        blocks[w].push(parts);
    }
    if let Some(info) = places.tensors.get(places.next) {
        let found = info.info.name.clone();
        return Err(FormatError::UnexpectedTensor { expected: "no more".to_owned(), found });
    }

    for i in files {
        catalog.add_file(i)?;
    }
    catalog.base = base;
    catalog.weights = weights;
    catalog.blocks = blocks;
    Ok((catalog, header.order))
}

fn required<T>(value: Option<T>, field: &'static str, weight: &str) -> Result<T, FormatError> {
    let reason = || format!("weight {weight} has no {field}");
    value.ok_or_else(|| FormatError::Metadata { field: "weights", reason: reason() })
}

fn weight_info(record: WeightRecord<'_>) -> Result<WeightInfo, FormatError> {
    let name = record.name.into_owned();
    check_weight_name(&name)?;
    let [rows, cols, rank] = [(record.rows, "rows"), (record.cols, "cols"), (record.rank, "rank")]
        .map(|(value, field)| required(value, field, &name));
    let (rows, cols, rank) = (rows?, cols?, rank?);
    let too_large =
        || FormatError::Metadata { field: "weights", reason: format!("weight {name}: {rows} x {cols}, rank {rank}") };
    let [Ok(rows_), Ok(cols_), Ok(rank_)] = [rows, cols, rank].map(usize::try_from) else {
        return Err(too_large());
    };
    let shape = Shape::new(rows_, cols_).map_err(|_| too_large())?;
    if rank == 0 {
        return Err(too_large());
    }
    let method = required(record.method, "method", &name)?.into_owned();
    check_name("method", &method)?;
    Ok(WeightInfo { name, shape, rank: rank_, method, kind: BlockKind::Sign, blocks: Vec::new() })
}

/// Walks over the tensors of a header in their order.
struct Places<'a> {
    tensors: &'a [Stored],
    next: usize,
    n_pads: usize,
}

impl<'a> Places<'a> {
    /// The next tensor that is not a pad.
    fn peek(&self) -> Option<&'a TensorInfo> {
        let mut rest = self.tensors[self.next..].iter().map(|t| &t.info);
        rest.next().and_then(|info| if info.name.starts_with(PAD_PREFIX) { rest.next() } else { Some(info) })
    }

    /// Takes the next tensor, which must be there, and the pad before it when its alignment needs one.
    fn take(&mut self, alignment: u64) -> Result<usize, FormatError> {
        let stored = &self.tensors[self.next];
        let pad = pad_bytes(stored.offset_bytes, alignment);
        let is_pad = stored.info.name.starts_with(PAD_PREFIX);
        if pad > 0 {
            self.check_name(&stored.info, &pad_name(self.n_pads))?;
            self.check_dtype(&stored.info, &[Dtype::U8])?;
            self.check_shape(&stored.info, &[pad as usize])?;
            self.n_pads += 1;
            self.next += 1;
        } else if is_pad {
            let expected = self.peek().map_or("no pad", |info| &info.name).to_owned();
            return Err(FormatError::UnexpectedTensor { expected, found: stored.info.name.clone() });
        }
        let i = self.next;
        self.next += 1;
        Ok(i)
    }

    /// Takes the next tensor, a list of bytes at any offset.
    fn take_bytes(&mut self) -> Result<usize, FormatError> {
        let i = self.take(1)?;
        let info = &self.tensors[i].info;
        self.check_dtype(info, &[Dtype::U8])?;
        if info.shape.len() != 1 {
            return Err(wrong(&info.name, "shape", format!("{:?}", info.shape), "one dimension"));
        }
        Ok(i)
    }

    /// Takes part of a block.
    fn take_part(&mut self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Result<usize, FormatError> {
        let found = || "the end of the header".to_owned();
        let info =
            self.peek().ok_or_else(|| FormatError::UnexpectedTensor { expected: name.to_owned(), found: found() })?;
        self.check_name(info, name)?;
        self.check_dtype(info, dtypes)?;
        self.check_shape(info, shape)?;
        self.take(alignment(info.dtype, name.ends_with(SIGNS)))
    }

    /// Takes a factor, stored as F16 or as I8 with scales.
    fn take_factor(
        &mut self,
        name: &str,
        shape: &[usize],
        scales_shape: &[usize],
    ) -> Result<(FactorType, FactorParts), FormatError> {
        let values = self.take_part(name, FACTOR_DTYPES, shape)?;
        if self.tensors[values].info.dtype == Dtype::F16 {
            return Ok((FactorType::F16, FactorParts { values, scales: None, only_scales: false }));
        }
        let scales = self.take_part(&format!("{name}{SCALE_SUFFIX}"), &[Dtype::F16], scales_shape)?;
        Ok((FactorType::I8, FactorParts { values, scales: Some(scales), only_scales: false }))
    }

    /// Takes a list of spikes, as long as the tensor says, and long enough to say where its tiles end.
    fn take_spikes(&mut self, info: &TensorInfo, shape: Shape) -> Result<usize, FormatError> {
        let least = SpikesRef::least_words(shape);
        if info.shape.len() != 1 || info.shape[0] < least {
            let expected = format!("one dimension of at least {least}");
            return Err(wrong(&info.name, "shape", format!("{:?}", info.shape), expected));
        }
        self.take_part(&info.name, &[Dtype::U16], &info.shape)
    }

    fn take_block(&mut self, weight: &WeightInfo, block: usize) -> Result<(BlockLayout, BlockParts), FormatError> {
        let (rows, cols, rank) = (weight.shape.rows(), weight.shape.cols(), weight.rank);
        let part = |part| part_name(&weight.name, block, part);
        let signs = self.take_part(&part(SIGNS), &[Dtype::U8], &[rows, row_bytes(cols)])?;
        let mut basis = None;
        if self.peek().is_some_and(|info| info.name == part(BASIS)) {
            basis = Some(self.take_factor(&part(BASIS), &[rank, cols], &[rank])?);
        }
        // The planes are what the tensor says; that they are 1 or the number of the block is checked with the weight.
        let planes_at = |dim: usize| self.peek().and_then(|info| info.shape.get(dim).copied()).unwrap_or(1);
        let scales = format!("{}{SCALE_SUFFIX}", part(COEFFICIENTS));
        let (planes, coefficients) = if self.peek().is_some_and(|info| info.name == scales) {
            let planes = planes_at(0);
            let values = self.take_part(&scales, &[Dtype::F16], &[planes, rank])?;
            (planes, (FactorType::Scales, FactorParts { values, scales: None, only_scales: true }))
        } else {
            let planes = planes_at(1);
            (planes, self.take_factor(&part(COEFFICIENTS), &[rows, planes, rank], &[planes, rank])?)
        };
        let spikes = match self.peek() {
            Some(info) if info.name == part(SPIKES) => Some(self.take_spikes(info, weight.shape)?),
            _ => None,
        };
        let layout = BlockLayout {
            shape: weight.shape,
            rank,
            planes,
            basis: basis.map(|(factor, _)| factor),
            coefficients: coefficients.0,
            // That only block 1 has them is checked with the weight.
            spike_words: spikes.map_or(0, |i| self.tensors[i].info.shape[0]),
        };
        let (basis, coefficients) = (basis.map(|(_, parts)| parts), coefficients.1);
        Ok((layout, BlockParts { signs, basis, coefficients, spikes }))
    }

    fn check_name(&self, info: &TensorInfo, expected: &str) -> Result<(), FormatError> {
        if info.name == expected {
            return Ok(());
        }
        Err(FormatError::UnexpectedTensor { expected: expected.to_owned(), found: info.name.clone() })
    }

    fn check_dtype(&self, info: &TensorInfo, allowed: &[Dtype]) -> Result<(), FormatError> {
        if allowed.contains(&info.dtype) {
            return Ok(());
        }
        let names: Vec<&str> = allowed.iter().map(|d| d.name()).collect();
        Err(wrong(&info.name, "dtype", info.dtype, names.join(" or ")))
    }

    fn check_shape(&self, info: &TensorInfo, expected: &[usize]) -> Result<(), FormatError> {
        if info.shape == expected {
            return Ok(());
        }
        Err(wrong(&info.name, "shape", format!("{:?}", info.shape), format!("{expected:?}")))
    }
}
