//! A file cut anywhere is a smaller model, or says precisely how many bytes are missing for one.

mod samples;

use bitstack_format::{BlockSource, FormatError, StackFile};
use safetensors::SafeTensors;

/// The end of every block in the load order, found by another reader of safetensors.
fn block_ends(bytes: &[u8]) -> Vec<usize> {
    let tensors = SafeTensors::deserialize(bytes).unwrap();
    let weights = samples::weights();
    let mut counts = vec![0; weights.len()];
    let end_of = |&w: &u32| {
        counts[w as usize] += 1;
        let prefix = format!("{}.block.{}.", weights[w as usize].0, counts[w as usize]);
        let ends = tensors
            .tensors()
            .into_iter()
            .filter(|(name, _)| name.starts_with(&prefix))
            .map(|(_, view)| view.data().as_ptr() as usize + view.data().len() - bytes.as_ptr() as usize);
        ends.max().unwrap()
    };
    samples::ORDER.iter().map(end_of).collect()
}

#[test]
fn a_file_cut_at_any_byte_opens_with_its_whole_blocks_or_says_what_it_needs() {
    let bytes = samples::file();
    let ends = block_ends(&bytes);
    assert!(ends.is_sorted());
    assert_eq!(ends.last(), Some(&bytes.len()));
    let data = samples::data_offset(&bytes);
    let smallest = ends[samples::weights().len() - 1];
    for cut in (0..=bytes.len()).step_by(if cfg!(miri) { 499 } else { 1 }) {
        let result = StackFile::open(&bytes[..cut]);
        if cut < data {
            let expected = if cut < 8 { 8 } else { data as u64 };
            let Err(FormatError::HeaderCut { needed, have }) = result else { panic!("{cut}: {result:?}") };
            assert_eq!((needed, have), (expected, cut as u64));
        } else if cut < smallest {
            let Err(FormatError::CutTooShort { needed, have, first_missing }) = result else {
                panic!("{cut}: {result:?}")
            };
            assert_eq!((needed, have), (smallest as u64, cut as u64));
            assert!(!first_missing.starts_with("pad."), "{cut}: {first_missing}");
        } else {
            check_prefix(&bytes, cut, &result.unwrap(), &ends);
        }
    }
}

fn check_prefix(bytes: &[u8], cut: usize, file: &StackFile<&[u8]>, ends: &[usize]) {
    let n_blocks = ends.iter().filter(|&&end| end <= cut).count();
    assert_eq!(file.order(), &samples::ORDER[..n_blocks], "{cut}");
    let sizes: usize = file.block_sizes().iter().map(Vec::len).sum();
    assert_eq!(sizes, n_blocks);
    let weights = samples::weights();
    for (w, (name, _, _, blocks)) in weights.iter().enumerate() {
        let present = file.weights()[w].n_blocks();
        for (i, block) in blocks.iter().enumerate() {
            match file.read_block(w, i + 1) {
                Ok(read) => assert!(i < present && read == *block, "{cut}"),
                Err(FormatError::NoSuchBlock { .. }) => assert!(i >= present, "{cut}"),
                Err(error) => panic!("{cut}, block {} of {name}: {error}", i + 1),
            }
        }
    }
    let report = file.verify(&mut |_, _| {}).unwrap();
    assert_eq!(report.damaged, [], "{cut}");
    let Some(missing) = file.missing() else {
        assert_eq!((cut, &report.missing[..]), (bytes.len(), &[][..]));
        return;
    };
    assert_eq!(missing.n_blocks, ends.len() - n_blocks, "{cut}");
    assert_eq!(missing.bytes, (bytes.len() - cut) as u64);
    assert!(report.missing.contains(&missing.first));
    assert!(missing.to_string().contains(&missing.first));
    let error = file.read_tensor(&missing.first).unwrap_err();
    assert!(matches!(&error, FormatError::Missing { name } if *name == missing.first), "{error}");
    // What was cut off can be left off cleanly.
    let mut clean = Vec::new();
    file.write_prefix(n_blocks, &mut clean, &mut |_, _| {}).unwrap();
    assert!(SafeTensors::deserialize(&clean).is_ok());
}

#[test]
fn bytes_after_the_data_are_rejected() {
    let mut bytes = samples::file();
    let expected = bytes.len() as u64;
    bytes.push(0);
    let error = StackFile::open(bytes).unwrap_err();
    assert!(matches!(error, FormatError::TrailingBytes { expected: e, actual } if e == expected && actual == e + 1));
}
