//! What is written is what is read: by this crate, by the `safetensors` crate, and by Python's `safetensors` where it is installed.

mod samples;

use bitstack_core::{BlockRef, CoreError, FactorType, Shape, SpikesRef, WeightStack, f16};
use bitstack_format::{BlockSource, Draft, Dtype, FormatError, StackFile, Verify};
use bitstack_io::safetensors::MAX_HEADER_BYTES;
use bitstack_io::{Existing, in_one_line, write_atomically};
use proptest::prelude::*;
use safetensors::SafeTensors;
use samples::{Like, Numbers, block};
use std::io::Write as _;

fn check_sample(source: &dyn BlockSource) {
    let weights = samples::weights();
    assert_eq!(source.weights().len(), weights.len());
    for (w, (name, shape, rank, blocks)) in weights.iter().enumerate() {
        let info = &source.weights()[w];
        assert_eq!((info.name.as_str(), info.shape, info.rank, info.method.as_str()), (*name, *shape, *rank, "avd"));
        assert_eq!(source.weight_index(name), Some(w));
        assert_eq!(info.n_blocks(), blocks.len());
        let mut stack = WeightStack::new(*shape);
        for (i, block) in blocks.iter().enumerate() {
            let read = source.read_block(w, i + 1).unwrap();
            assert_eq!(&read, block);
            assert_eq!(info.blocks[i], block.view().layout().unwrap());
            assert_eq!(source.block_sizes()[w][i], info.blocks[i].bytes().unwrap());
            stack.push(read).unwrap();
        }
    }
    assert_eq!(source.files().iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["config.json", "tokenizer.json"]);
    assert_eq!(source.read_file("config.json").unwrap(), samples::CONFIG);
    assert_eq!(source.read_file("tokenizer.json").unwrap(), samples::TOKENIZER);
    let bias = source.read_tensor("layers.0.q_proj.bias").unwrap();
    assert_eq!((bias.dtype, &bias.shape[..], bias.data[1]), (Dtype::BF16, &[3, 1][..], 0x3f));
    assert_eq!(source.base_tensors().iter().map(|t| t.len_bytes).collect::<Vec<_>>(), [12, 6]);
    assert_eq!(source.base_bytes(), 18);
    assert_eq!(source.provenance()["source"], "a sample \"model\"\n");
    assert_eq!(source.provenance()["options"], "--blocks 3");
    assert!(matches!(source.read_tensor("nothing"), Err(FormatError::NoSuch { what: "tensor", .. })));
    assert!(matches!(source.read_file("nothing"), Err(FormatError::NoSuch { what: "file", .. })));
    assert!(matches!(source.read_block(2, 1), Err(FormatError::NoSuchWeight { weight: 2, n_weights: 2 })));
    assert!(matches!(source.read_block(1, 3), Err(FormatError::NoSuchBlock { block: 3, n_blocks: 2, .. })));
    assert!(matches!(source.read_block(1, 0), Err(FormatError::NoSuchBlock { block: 0, .. })));
}

#[test]
fn a_draft_and_its_file_show_what_was_put_in() {
    check_sample(&samples::draft());
    let file = StackFile::open(samples::file()).unwrap();
    check_sample(&file);
    assert_eq!(file.order(), samples::ORDER);
    assert_eq!(file.missing(), None);
    assert!(file.verify(&mut |_, _| {}).unwrap().is_whole());
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let draft = samples::draft();
    let mut again = Vec::new();
    let n = draft.finish(&samples::ORDER, &mut again, &mut |_, _| {}).unwrap();
    assert_eq!(n, again.len() as u64);
    assert_eq!(again, samples::file());
}

#[test]
#[cfg_attr(miri, ignore = "Miri does not know the system call that renames without replacing")]
fn a_file_on_disk_is_read_by_position() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sample.bitstack");
    let draft = samples::draft();
    write_atomically(&path, Existing::Refuse, |out| draft.finish(&samples::ORDER, out, &mut |_, _| {})).unwrap();
    let file = StackFile::open_path(&path).unwrap();
    check_sample(&file);
    assert_eq!(file.size_bytes(), path.metadata().unwrap().len());
    let error = in_one_line(&StackFile::open_path(dir.path().join("nothing")).unwrap_err());
    assert!(error.starts_with("cannot open ") && error.contains("nothing"), "{error}");
    std::fs::write(&path, b"short").unwrap();
    let error = in_one_line(&StackFile::open_path(&path).unwrap_err());
    assert!(error.contains("sample.bitstack: the header is incomplete"), "{error}");
}

#[test]
fn progress_rises_to_the_size_of_the_file() {
    let mut calls = Vec::new();
    let n = samples::draft()
        .finish(&samples::ORDER, std::io::sink(), &mut |done, total| calls.push((done, total)))
        .unwrap();
    assert!(calls.is_sorted() && calls.iter().all(|&(_, total)| total == n));
    assert_eq!(calls.last(), Some(&(n, n)));
    let mut calls = Vec::new();
    let report =
        StackFile::open(samples::file()).unwrap().verify(&mut |done, total| calls.push((done, total))).unwrap();
    assert!(calls.is_sorted());
    assert_eq!(calls.last(), Some(&(report.bytes, report.bytes)));
}

#[test]
fn every_prefix_is_the_file_that_a_shorter_order_gives() {
    let whole = StackFile::open(samples::file()).unwrap();
    for n in 2..=samples::ORDER.len() {
        let mut prefix = Vec::new();
        whole.write_prefix(n, &mut prefix, &mut |_, _| {}).unwrap();
        let mut direct = Vec::new();
        samples::draft().finish(&samples::ORDER[..n], &mut direct, &mut |_, _| {}).unwrap();
        assert_eq!(prefix, direct);
        let file = StackFile::open(prefix).unwrap();
        assert_eq!(file.order(), &samples::ORDER[..n]);
        assert_eq!(file.missing(), None);
        assert!(file.verify(&mut |_, _| {}).unwrap().is_whole());
    }
    for n in [0, 1, samples::ORDER.len() + 1] {
        let error = whole.write_prefix(n, std::io::sink(), &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, FormatError::Order { .. }), "{n}: {error}");
    }
}

#[test]
fn the_safetensors_crate_opens_the_file_and_shows_every_tensor() {
    let bytes = samples::file();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ours = StackFile::open(&bytes[..]).unwrap();
    let mut resident = 0;
    for (name, view) in tensors.tensors() {
        let tensor = ours.read_tensor(&name).unwrap();
        assert_eq!(tensor.data, view.data(), "{name}");
        assert_eq!(tensor.shape, view.shape(), "{name}");
        assert_eq!(tensor.dtype.name(), view.dtype().to_string(), "{name}");
        // Every element type finds its elements in place, whatever the reader does with them.
        let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let aligned = offset % if name.ends_with("signs") { 64 } else { tensor.dtype.bits() as usize / 8 };
        assert_eq!(aligned, 0, "{name} at {offset}");
        if !name.starts_with("file/") && !name.starts_with("pad.") {
            resident += view.data().len() as u64;
        }
    }
    let accounted = ours.base_bytes() + ours.block_sizes().iter().flatten().sum::<u64>();
    assert_eq!(resident, accounted);
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().as_ref().unwrap();
    assert_eq!((metadata["format"].as_str(), metadata["version"].as_str()), ("bitstack", "1"));
}

#[test]
#[cfg_attr(miri, ignore = "Miri starts no processes")]
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn pythons_safetensors_opens_the_file_and_shows_every_tensor() {
    const SCRIPT: &str = "import sys\nfrom safetensors import safe_open\nwith safe_open(sys.argv[1], 'np') as f:\n  for name in sorted(f.keys()):\n    try: print(name, f.get_slice(name).get_dtype(), list(f.get_slice(name).get_shape()))\n    except Exception as e: sys.exit(str(e))\n";
    let has = std::process::Command::new("python3").args(["-c", "import safetensors, numpy"]).output();
    if !has.is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: python3 with safetensors and numpy is not installed");
        return;
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&samples::file()).unwrap();
    let output = std::process::Command::new("python3").args(["-c", SCRIPT]).arg(file.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed = String::from_utf8(output.stdout).unwrap();
    let bytes = samples::file();
    let mut expected: Vec<String> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .iter()
        .map(|(name, view)| format!("{name} {} {:?}", view.dtype(), view.shape()))
        .collect();
    expected.sort();
    assert_eq!(listed.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn what_does_not_fit_a_draft_is_rejected_and_changes_nothing() {
    let mut draft = samples::draft();
    let is_name = |r: Result<(), FormatError>| assert!(matches!(r, Err(FormatError::Name { .. })), "{r:?}");
    for name in ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "tab\t", &"x".repeat(256)] {
        is_name(draft.push_file(name, b"x"));
    }
    for name in ["", "file/x", "pad.0", "__metadata__", "a\u{1b}[2J", &"x".repeat(1025)] {
        is_name(draft.push_base(name, Dtype::F32, &[1], &[0; 4]));
        is_name(draft.add_weight(name, Shape::new(1, 1).unwrap(), 1, "avd").map(drop));
    }
    is_name(draft.set_provenance("", "x"));
    let is_duplicate = |r: Result<(), FormatError>| assert!(matches!(r, Err(FormatError::Duplicate { .. })), "{r:?}");
    is_duplicate(draft.push_file("config.json", b"x"));
    is_duplicate(draft.push_base("norm.weight", Dtype::F32, &[1], &[0; 4]));
    is_duplicate(draft.push_base("lm_head.weight", Dtype::F32, &[1], &[0; 4]));
    is_duplicate(draft.add_weight("lm_head.weight", Shape::new(1, 1).unwrap(), 1, "avd").map(drop));
    is_duplicate(draft.add_weight("norm.weight", Shape::new(1, 1).unwrap(), 1, "avd").map(drop));
    let is_tensor = |r: Result<(), FormatError>| assert!(matches!(r, Err(FormatError::Tensor { .. })), "{r:?}");
    is_tensor(draft.push_file("empty", b""));
    is_tensor(draft.push_base("x", Dtype::U8, &[1], &[0]));
    is_tensor(draft.push_base("x", Dtype::F32, &[0], &[]));
    is_tensor(draft.push_base("x", Dtype::F32, &[2], &[0; 4]));
    is_tensor(draft.push_base("x", Dtype::F32, &[usize::MAX, 2], &[0; 4]));
    is_tensor(draft.push_base("x", Dtype::F32, &[1; 9], &[0; 4]));
    is_tensor(draft.add_weight("x", Shape::new(1, 1).unwrap(), 0, "avd").map(drop));

    let (q, shape, numbers) = (0, samples::weights()[0].1, &mut Numbers(7));
    let like = Like { planes: 1, basis: Some(FactorType::F16), coefficients: FactorType::F16, spikes: false };
    let other_shape = block(Shape::new(3, 8).unwrap(), 2, like, numbers);
    let other_rank = block(shape, 1, like, numbers);
    let other_planes = block(shape, 2, Like { planes: 3, ..like }, numbers);
    let other_basis = bitstack_core::Block { basis: other_shape.basis.clone(), ..block(shape, 2, like, numbers) };
    let late_spikes = block(shape, 2, Like { spikes: true, ..like }, numbers);
    for wrong in [other_shape, other_rank, other_planes, other_basis, late_spikes] {
        let error = draft.push_block(q, wrong.view()).unwrap_err();
        assert!(matches!(error, FormatError::Block { block: 4, .. }), "{error}");
    }
    let fresh = draft.add_weight("fresh", shape, 2, "avd").unwrap();
    let no_basis = block(shape, 2, Like { basis: None, ..like }, numbers);
    assert!(matches!(draft.push_block(fresh, no_basis.view()), Err(FormatError::Block { block: 1, .. })));
    let only_scales = block(shape, 2, Like { coefficients: FactorType::Scales, ..like }, numbers);
    assert!(matches!(draft.push_block(fresh, only_scales.view()), Err(FormatError::Block { block: 1, .. })));
    let other_spikes = bitstack_core::Block {
        spikes: Some(samples::spikes(Shape::new(8, 9).unwrap(), numbers)),
        ..block(shape, 2, like, numbers)
    };
    assert!(matches!(draft.push_block(fresh, other_spikes.view()), Err(FormatError::Block { block: 1, .. })));
    // Words of which nobody looked at the entries: one in row 3 of 3.
    let spikes = samples::spikes(shape, &mut Numbers(0));
    let mut words = spikes.view().words()[..17].to_vec();
    words.push(3);
    words[15] = 1;
    let unchecked = block(shape, 2, like, numbers);
    let unchecked = BlockRef { spikes: Some(SpikesRef::new(shape, &words).unwrap()), ..unchecked.view() };
    let error = draft.push_block(fresh, unchecked).unwrap_err();
    assert!(matches!(error, FormatError::Block { block: 1, source: CoreError::SpikePlace { index: 0, .. }, .. }));
    assert!(matches!(draft.push_block(9, no_basis.view()), Err(FormatError::NoSuchWeight { weight: 9, .. })));
    // A weight without blocks cannot be in an order, and one without mention is no model.
    let error = draft.finish(&samples::ORDER, std::io::sink(), &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, FormatError::Order { position: 2, .. }), "{error}");
}

#[test]
fn a_block_whose_name_is_taken_leaves_the_draft_as_it_was() {
    let mut draft = Draft::create_on(Vec::new(), "memory");
    let shape = Shape::new(2, 8).unwrap();
    // Taken by another tensor, which no real model has.
    draft.push_base("w.block.1.u", Dtype::F32, &[1], &[0; 4]).unwrap();
    let w = draft.add_weight("w", shape, 1, "avd").unwrap();
    let like = Like { planes: 1, basis: Some(FactorType::F16), coefficients: FactorType::F16, spikes: false };
    let block = block(shape, 1, like, &mut Numbers(3));
    for _ in 0..2 {
        let error = draft.push_block(w, block.view()).unwrap_err();
        assert!(matches!(&error, FormatError::Duplicate { name } if name == "w.block.1.u"), "{error}");
        assert_eq!(draft.weights()[w].n_blocks(), 0);
    }
}

#[test]
fn a_weight_whose_parts_could_not_be_read_is_rejected() {
    let shape = Shape::new(2, 3).unwrap();
    let mut draft = Draft::create_on(Vec::new(), "memory");
    // Its parts would be named as pads are.
    assert!(matches!(draft.add_weight("pad", shape, 1, "avd"), Err(FormatError::Name { what: "weight", .. })));
    // The longest of its parts' names, with `.block.1.u_scale`, may have 1024 bytes.
    let like = Like { planes: 1, basis: Some(FactorType::I8), coefficients: FactorType::I8, spikes: false };
    let block = block(shape, 1, like, &mut Numbers(3));
    for (len, fits) in [(1008, true), (1009, false), (1024, false)] {
        let w = draft.add_weight(&"x".repeat(len), shape, 1, "avd").unwrap();
        match draft.push_block(w, block.view()) {
            Ok(()) => assert!(fits, "{len}"),
            Err(FormatError::Name { what: "tensor", .. }) => assert!(!fits, "{len}"),
            Err(error) => panic!("{len}: {error}"),
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "megabytes under Miri take hours")]
fn a_header_that_no_reader_would_take_is_not_written() {
    let mut draft = samples::draft();
    draft.set_provenance("much", &"x".repeat(MAX_HEADER_BYTES as usize)).unwrap();
    let mut out = Vec::new();
    let error = draft.finish(&samples::ORDER, &mut out, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, FormatError::LimitExceeded { limit: MAX_HEADER_BYTES, .. }), "{error}");
    assert_eq!(out.len(), 0);
}

fn any_like(block: usize) -> impl Strategy<Value = Like> {
    let factor = || prop_oneof![Just(FactorType::F16), Just(FactorType::I8)];
    (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), factor(), factor()).prop_map(
        move |(refitted, shared, only_scales, spikes, v, u)| Like {
            planes: if refitted { block } else { 1 },
            basis: (block == 1 || !shared).then_some(v),
            coefficients: if block > 1 && only_scales { FactorType::Scales } else { u },
            spikes: block == 1 && spikes,
        },
    )
}

fn any_weight() -> impl Strategy<Value = (usize, usize, usize, Vec<Like>)> {
    let likes = (1usize..5).prop_flat_map(|n| (1..=n).map(any_like).collect::<Vec<_>>()).prop_map(|mut likes| {
        // Scales need codes to multiply.
        if likes.iter().any(|like| like.coefficients == FactorType::Scales) {
            likes[0].coefficients = FactorType::I8;
        }
        likes
    });
    (1usize..12, 1usize..40, 1usize..4, likes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 64 }))]

    #[test]
    fn any_stack_comes_back(weights in prop::collection::vec(any_weight(), 1..5), seed: u32, base in 0usize..200) {
        let mut numbers = Numbers(seed);
        let mut draft = Draft::create_on(Vec::new(), "memory");
        if base > 0 {
            draft.push_base("base", Dtype::F16, &[base], &vec![7; 2 * base]).unwrap();
        }
        let mut stacks = Vec::new();
        for (w, (rows, cols, rank, likes)) in weights.iter().enumerate() {
            let shape = Shape::new(*rows, *cols).unwrap();
            let index = draft.add_weight(&format!("w{w}"), shape, *rank, "nested").unwrap();
            let blocks: Vec<_> = likes.iter().map(|&like| block(shape, *rank, like, &mut numbers)).collect();
            for b in &blocks {
                draft.push_block(index, b.view()).unwrap();
            }
            stacks.push(blocks);
        }
        // Every first block, then the rest in an order that depends on the seed.
        let mut order: Vec<u32> = (0..stacks.len() as u32).collect();
        let mut rest: Vec<u32> =
            stacks.iter().zip(0u32..).flat_map(|(b, w)| std::iter::repeat_n(w, b.len() - 1)).collect();
        while !rest.is_empty() {
            order.push(rest.swap_remove(numbers.next() as usize % rest.len()));
        }
        let mut bytes = Vec::new();
        draft.finish(&order, &mut bytes, &mut |_, _| {}).unwrap();
        SafeTensors::deserialize(&bytes).unwrap();
        let file = StackFile::open(bytes).unwrap();
        prop_assert_eq!(file.order(), &order[..]);
        for (w, blocks) in stacks.iter().enumerate() {
            for (i, b) in blocks.iter().enumerate() {
                prop_assert_eq!(&file.read_block(w, i + 1).unwrap(), b);
                prop_assert_eq!(&draft.read_block(w, i + 1).unwrap(), b);
                let extent = file.block_extent(w, i + 1).unwrap();
                // Halves, so that it begins at an even address.
                let mut halves = vec![f16::ZERO; extent.len_bytes().div_ceil(2)];
                let in_place = &mut bytemuck::cast_slice_mut::<_, u8>(&mut halves)[..extent.len_bytes()];
                file.read_block_bytes(w, i + 1, Verify::Always, in_place).unwrap();
                prop_assert_eq!(extent.view(in_place).unwrap(), b.view());
            }
        }
        let report = file.verify(&mut |_, _| {}).unwrap();
        prop_assert!(report.is_whole());
    }
}
