//! Blocks read as one run of bytes and used where they are.

mod samples;

use bitstack_core::{BlockRef, CoreError, FactorType, Shape, SignLayout};
use bitstack_format::{BlockSource, Draft, FormatError, ReadAt, StackFile, Verify};
use bitstack_io::in_one_line;
use std::sync::{Arc, Mutex};

/// Every block of the sample as (weight, block).
fn blocks(file: &StackFile<Vec<u8>>) -> Vec<(usize, usize)> {
    file.weights().iter().enumerate().flat_map(|(w, info)| (1..=info.n_blocks()).map(move |b| (w, b))).collect()
}

/// `n` bytes that begin at an address which is `phase` more than a multiple of 64.
fn at_phase(buffer: &mut Vec<u8>, n: usize, phase: usize) -> &mut [u8] {
    *buffer = vec![0xa5; n + 128];
    let start = (64 - buffer.as_ptr().addr() % 64) % 64 + phase;
    &mut buffer[start..start + n]
}

#[test]
fn bytes_of_a_block_are_the_block_wherever_they_begin_evenly() {
    let file = StackFile::open(samples::file()).unwrap();
    let mut buffer = Vec::new();
    for (w, b) in blocks(&file) {
        for verify in [Verify::Always, Verify::Never] {
            for phase in [0, 2, 62] {
                let extent = file.block_extent(w, b).unwrap();
                let resident = file.weights()[w].block_bytes(b).unwrap();
                assert!(
                    (resident..resident + 4).contains(&(extent.len_bytes() as u64)),
                    "at most one pad for each factor"
                );
                let bytes = at_phase(&mut buffer, extent.len_bytes(), phase);
                file.read_block_bytes(w, b, verify, bytes).unwrap();
                assert_eq!(
                    extent.view(bytes).unwrap(),
                    file.read_block(w, b).unwrap().view(),
                    "block {b} of weight {w}"
                );
            }
        }
    }
}

#[test]
fn bytes_of_another_length_or_at_an_odd_address_are_rejected() {
    let file = StackFile::open(samples::file()).unwrap();
    let mut buffer = Vec::new();
    for (w, b) in blocks(&file) {
        let extent = file.block_extent(w, b).unwrap();
        for n in [0, extent.len_bytes() - 1, extent.len_bytes() + 1] {
            let error = file.read_block_bytes(w, b, Verify::Always, &mut vec![0; n]).unwrap_err();
            assert!(matches!(error, FormatError::Block { block, source: CoreError::Mismatch { actual, .. }, .. }
                if block == b && actual == n));
            assert!(matches!(extent.view(&vec![0; n]), Err(CoreError::Mismatch { actual, .. }) if actual == n));
        }
        let bytes = at_phase(&mut buffer, extent.len_bytes(), 1);
        // Reading needs no alignment, but to look through spikes does.
        let read = file.read_block_bytes(w, b, Verify::Always, bytes);
        match extent.layout().spike_words {
            0 => read.unwrap(),
            _ => {
                assert!(matches!(read, Err(FormatError::Block { source: CoreError::Mismatch { .. }, .. })), "{read:?}")
            }
        }
        assert!(matches!(extent.view(bytes), Err(CoreError::Mismatch { expected: 2, actual: 1, .. })));
    }
    assert!(matches!(file.block_extent(9, 1), Err(FormatError::NoSuchWeight { weight: 9, .. })));
    assert!(matches!(file.block_extent(0, 0), Err(FormatError::NoSuchBlock { block: 0, .. })));
    assert!(matches!(
        file.read_block_bytes(0, 9, Verify::Never, &mut []),
        Err(FormatError::NoSuchBlock { block: 9, .. })
    ));
}

#[test]
#[cfg_attr(miri, ignore = "hundreds of files under Miri take hours")]
fn a_changed_byte_anywhere_in_a_block_is_noticed_with_verification_and_only_with_it() {
    let good = samples::file();
    let mut forge = samples::Forge::new(&good);
    let file = StackFile::open(good.clone()).unwrap();
    for (w, b) in blocks(&file) {
        let extent = file.block_extent(w, b).unwrap();
        let mut original = vec![0; extent.len_bytes()];
        file.read_block_bytes(w, b, Verify::Never, &mut original).unwrap();
        let signs = format!("{}.block.{b}.signs", file.weights()[w].name);
        let start = forge.tensor(&signs)["data_offsets"][0].as_u64().unwrap() as usize + samples::data_offset(&good);
        let mut n_noticed = 0;
        for at in 0..original.len() {
            let mut bad = good.clone();
            bad[start + at] ^= 1;
            let bad = StackFile::open(bad).unwrap();
            let mut bytes = vec![0; original.len()];
            if let Err(error) = bad.read_block_bytes(w, b, Verify::Always, &mut bytes) {
                let FormatError::Damaged { name } = error else { panic!("{error}") };
                assert!(name.starts_with(&format!("{}.block.{b}.", file.weights()[w].name)), "{name}");
                n_noticed += 1;
            }
            match bad.read_block_bytes(w, b, Verify::Never, &mut bytes) {
                Ok(()) => assert_ne!(bytes, original),
                // Spikes are looked through in any case.
                Err(error) => {
                    assert!(matches!(error, FormatError::Block { .. }), "{error}");
                    assert!(extent.layout().spike_words > 0);
                }
            }
        }
        // Pads within a block are not read for use: they are checked by `verify`.
        assert_eq!(n_noticed as u64, file.weights()[w].block_bytes(b).unwrap());
    }
}

#[test]
fn a_source_that_ends_within_a_block_is_an_error_that_names_it() {
    /// Says that it is whole, and is not.
    struct Shrunk(Vec<u8>, usize);
    impl ReadAt for Shrunk {
        fn size_bytes(&self) -> std::io::Result<u64> {
            self.0.size_bytes()
        }
        fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> std::io::Result<()> {
            self.0[..self.1].read_exact_at(buf, offset_bytes)
        }
    }
    let bytes = samples::file();
    let len = bytes.len();
    let file = StackFile::open(Shrunk(bytes, len - 1)).unwrap();
    let mut buffer = vec![0; file.block_extent(0, 3).unwrap().len_bytes()];
    for (verify, expected) in [
        (Verify::Never, "block 3 of weight layers.0.q_proj.weight"),
        (Verify::Always, "layers.0.q_proj.weight.block.3.u"),
    ] {
        let error = file.read_block_bytes(0, 3, verify, &mut buffer).unwrap_err();
        assert!(matches!(error, FormatError::Read { .. }) && in_one_line(&error).contains(expected), "{error}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "megabytes under Miri take hours")]
fn a_large_block_is_read_by_pieces_with_a_call_after_each() {
    /// Remembers how many bytes each read wanted.
    struct Watched(Vec<u8>, Mutex<Vec<usize>>);
    impl ReadAt for Watched {
        fn size_bytes(&self) -> std::io::Result<u64> {
            self.0.size_bytes()
        }
        fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> std::io::Result<()> {
            self.1.lock().unwrap().push(buf.len());
            self.0.read_exact_at(buf, offset_bytes)
        }
    }
    // Signs of 280 KiB, and spikes.
    let shape = Shape::new(1120, 2048).unwrap();
    let like = samples::Like { planes: 1, basis: Some(FactorType::F16), coefficients: FactorType::F16, spikes: true };
    let block = samples::block(shape, 1, like, &mut samples::Numbers(1));
    let mut draft = Draft::create_on(Vec::new(), "memory");
    let w = draft.add_weight("w", shape, 1, "sample").unwrap();
    draft.push_block(w, block.view()).unwrap();
    let mut bytes = Vec::new();
    draft.finish(&[0], &mut bytes, &mut |_, _| {}).unwrap();

    let source = Arc::new(Watched(bytes, Mutex::default()));
    let file = StackFile::open(source.clone()).unwrap();
    let extent = file.block_extent(0, 1).unwrap();
    let (len, signs) = (extent.len_bytes(), [256 << 10, 24 << 10]);
    // As it is, at once; in strips, and what is not signs after them. With hashes tensor by tensor: signs, basis, coefficients, spikes.
    let hashed = [&signs[..], &[2 * 2048, 2 * 1120, 2 * extent.layout().spike_words]].concat();
    for (layout, verify, expected) in [
        (SignLayout::Rows, Verify::Never, vec![256 << 10, len - (256 << 10)]),
        (SignLayout::Rows, Verify::Always, hashed.clone()),
        (SignLayout::Strips, Verify::Never, [&signs[..], &[len - (280 << 10)]].concat()),
        (SignLayout::Strips, Verify::Always, hashed),
    ] {
        source.1.lock().unwrap().clear();
        let mut buffer = Vec::new();
        let buffer = at_phase(&mut buffer, extent.len_bytes(), 0);
        let mut n_reads = Vec::new();
        let mut after_piece = || n_reads.push(source.1.lock().unwrap().len());
        file.read_block_bytes_in(0, 1, layout, verify, buffer, &mut after_piece).unwrap();
        assert_eq!(*source.1.lock().unwrap(), expected, "{layout:?}, {verify:?}");
        assert_eq!(n_reads, (1..=expected.len()).collect::<Vec<_>>());
        let view = extent.view_in(layout, buffer).unwrap();
        assert_eq!(view.signs.layout(), layout);
        assert_eq!(BlockRef { signs: block.view().signs, ..view }, block.view());
        assert_eq!(view.signs.to_owned(), block.signs, "{layout:?}, {verify:?}");
    }
}
