//! Drafts that take in files of single weights write what a draft of pushed blocks writes.

mod samples;

use bitstack_format::{BlockSource, Draft, FormatError};
use bitstack_io::{Existing, write_atomically};
use std::path::Path;

/// The blocks of one weight of the sample, in a file.
fn part(dir: &Path, weight: usize) -> std::path::PathBuf {
    let whole = samples::draft();
    let info = &whole.weights()[weight];
    let mut draft = Draft::create_in(dir).unwrap();
    draft.add_weight(&info.name, info.shape, info.rank, &info.method).unwrap();
    for block in 1..=info.n_blocks() {
        draft.push_block(0, whole.read_block(weight, block).unwrap().view()).unwrap();
    }
    draft.set_provenance("of", "a part").unwrap();
    let path = dir.join(format!("{weight}.bitstack"));
    let order = vec![0; info.n_blocks()];
    write_atomically(&path, Existing::Replace, |out| draft.finish(&order, out, &mut |_, _| {})).unwrap();
    path
}

/// The sample without its blocks.
fn empty(dir: &Path) -> Draft {
    let whole = samples::draft();
    let mut draft = Draft::create_in(dir).unwrap();
    for (key, value) in whole.provenance() {
        draft.set_provenance(key, value).unwrap();
    }
    for file in whole.files() {
        draft.push_file(&file.name, &whole.read_file(&file.name).unwrap()).unwrap();
    }
    for tensor in whole.base_tensors() {
        let data = whole.read_tensor(&tensor.name).unwrap().data;
        draft.push_base(&tensor.name, tensor.dtype, &tensor.shape, &data).unwrap();
    }
    for w in whole.weights() {
        draft.add_weight(&w.name, w.shape, w.rank, &w.method).unwrap();
    }
    draft
}

fn written(draft: &Draft) -> Vec<u8> {
    let mut bytes = Vec::new();
    draft.finish(&samples::ORDER, &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

#[test]
fn files_of_single_weights_make_the_same_file_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let whole = samples::draft();
    let mut draft = empty(dir.path());
    for weight in (0..whole.weights().len()).rev() {
        draft.add_blocks_of(part(dir.path(), weight)).unwrap();
    }
    assert!(written(&draft) == samples::file());
    assert_eq!(draft.weights(), whole.weights());
    assert_eq!(draft.read_block(0, 1).unwrap(), whole.read_block(0, 1).unwrap());
}

#[test]
fn files_of_other_weights_are_refused_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = part(dir.path(), 0);
    let reason = |draft: &mut Draft| match draft.add_blocks_of(&path).unwrap_err() {
        FormatError::At { path: named, source } if named == path => *source,
        other => panic!("{other}"),
    };
    let info = samples::draft().weights()[0].clone();
    let mut none = Draft::create_in(&dir).unwrap();
    assert!(matches!(reason(&mut none), FormatError::NoSuch { what: "weight", name } if name == info.name));
    let mut other = Draft::create_in(&dir).unwrap();
    other.add_weight(&info.name, info.shape, info.rank, "another").unwrap();
    assert!(matches!(reason(&mut other), FormatError::Tensor { what: "the method", .. }));

    let mut draft = empty(dir.path());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let error = draft.add_blocks_of(&path).unwrap_err();
    assert!(error.to_string().contains("0.bitstack"), "{error}");
    assert_eq!(draft.weights()[0].n_blocks(), 0);
    std::fs::write(&path, &bytes).unwrap();
    draft.add_blocks_of(&path).unwrap();
    assert!(matches!(reason(&mut draft), FormatError::Duplicate { name } if name == info.name));

    // Damage is found when a block is read.
    let mut damaged = bytes;
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&path, damaged).unwrap();
    let last = draft.weights()[0].n_blocks();
    assert!(matches!(draft.read_block(0, last), Err(FormatError::Damaged { .. })));
}
