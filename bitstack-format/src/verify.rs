//! Comparing everything that is there with its hashes.

use crate::catalog::Catalog;
use crate::constants::PAD_PREFIX;
use crate::{FormatError, ReadAt, order};
use bitstack_io::in_one_line;

/// What [`StackFile::verify`](crate::StackFile::verify) found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Tensors that were read and compared.
    pub n_tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// What is damaged, in the order of the file.
    pub damaged: Vec<Damage>,
    /// Tensors that the file ends before, in the order of the file.
    pub missing: Vec<String>,
}

/// A damaged tensor or block.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damage {
    /// The name of the tensor; of its signs for a block whose tensors are whole but not a valid block.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Report {
    /// Whether nothing is damaged or missing.
    pub fn is_whole(&self) -> bool {
        self.damaged.is_empty() && self.missing.is_empty()
    }
}

/// Reads the first `n_whole` tensors of the catalog, those of the blocks of `order` as blocks. The rest is reported as missing.
pub(crate) fn verify(
    catalog: &Catalog,
    source: &(impl ReadAt + ?Sized),
    order: &[u32],
    n_whole: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report, FormatError> {
    let tensors = &catalog.tensors[..n_whole];
    let total: u64 = tensors.iter().map(|t| t.info.len_bytes).sum();
    let mut done = 0;
    let mut damaged: Vec<(usize, String)> = Vec::new();
    let mut in_block = vec![false; tensors.len()];
    let mut buffer = Vec::new();
    // Blocks are read as they would be for use, which checks their values too.
    for (weight, block) in order::blocks(order) {
        let parts = catalog.block_parts(weight, block)?;
        match catalog.load_block(source, weight, block) {
            Ok(_) => {}
            Err(error @ FormatError::Block { .. }) => damaged.push((parts.signs, in_one_line(&error))),
            Err(FormatError::Damaged { .. } | FormatError::Read { .. }) => {
                // More than one part may be damaged.
                for i in parts.tensors() {
                    match catalog.stream(source, i, &mut buffer, |_| Ok(())) {
                        Ok(()) => {}
                        Err(error) => damaged.push((i, in_one_line(&error))),
                    }
                }
            }
            Err(error) => return Err(error),
        }
        for i in parts.tensors() {
            in_block[i] = true;
            done += tensors[i].info.len_bytes;
        }
        progress(done, total);
    }
    for i in (0..tensors.len()).filter(|&i| !in_block[i]) {
        let is_pad = tensors[i].info.name.starts_with(PAD_PREFIX);
        let mut is_zero = true;
        let checked = catalog.stream(source, i, &mut buffer, |bytes| {
            is_zero &= !is_pad || bytes.iter().all(|&b| b == 0);
            done += bytes.len() as u64;
            progress(done, total);
            Ok(())
        });
        match checked {
            Ok(()) if is_zero => {}
            Ok(()) => damaged.push((i, format!("tensor {} is not zero", tensors[i].info.name))),
            Err(error) => damaged.push((i, in_one_line(&error))),
        }
    }
    damaged.sort();
    Ok(Report {
        n_tensors: tensors.len(),
        bytes: total,
        damaged: damaged.into_iter().map(|(i, reason)| Damage { name: tensors[i].info.name.clone(), reason }).collect(),
        missing: catalog.tensors[n_whole..].iter().map(|t| t.info.name.clone()).collect(),
    })
}
