//! Files that must open for ever, and show for ever what they show now.

mod samples;

use bitstack_core::{Block, FactorType, Shape, Spike, Spikes, ValuesRef, f16};
use bitstack_format::{BlockSource, Draft, Dtype, StackFile};
use bitstack_io::{Existing, FileError, write_atomically};
use samples::{Like, Numbers};

/// A golden file: its bytes, their hash, and the hash of everything that it shows.
struct Golden {
    name: &'static str,
    bytes: &'static [u8],
    bytes_blake3: &'static str,
    contents_blake3: &'static str,
    /// What made it.
    make: fn() -> Vec<u8>,
}

const GOLDEN: [Golden; 6] = [
    // Two weights with every kind of block, unstacked tensors, companion files, provenance.
    Golden {
        name: "v1.bitstack",
        bytes: include_bytes!("golden/v1.bitstack"),
        bytes_blake3: "945182af2239b9bfb223c2719af809bdb55808610f714481266d4f4724774100",
        contents_blake3: "feb672ed9bc71f7aae675962e13eed22ab6918369fb197a46009fe6e80fc21e5",
        make: samples::file_without_spikes,
    },
    // One weight of 1 x 1 and nothing else: the listing in FORMAT.md.
    Golden {
        name: "v1-smallest.bitstack",
        bytes: include_bytes!("golden/v1-smallest.bitstack"),
        bytes_blake3: "82ed533144b70fcb5338b34e351a294a20149c8bc2d227db88740a5132ba7271",
        contents_blake3: "9a5482d970225103fbad974ac7302a6a9baaa323ad0e2a4cd2ed6b635b5d4dcc",
        make: samples::smallest,
    },
    // Eight refitted planes on one basis, in 8 bits and in halves, as nested codes make them; every type and an odd shape of unstacked
    // tensors; names that are not ASCII.
    Golden {
        name: "v1-refitted.bitstack",
        bytes: include_bytes!("golden/v1-refitted.bitstack"),
        bytes_blake3: "eeca41301ed4aacf7f15fda256cdaff7c873eb053b76f744acda413c18fb5200",
        contents_blake3: "f150381cc2419d1da2d0a6bb03b2fc6c6225b3b5c2a1eee78b02f6fc102c5c2f",
        make: refitted,
    },
    // Coefficients that are scales alone, of the codes of the first block, as nested codes make them now: refitted, additive, with bases of
    // their own, at rank 1 and 2.
    Golden {
        name: "v1-scales.bitstack",
        bytes: include_bytes!("golden/v1-scales.bitstack"),
        bytes_blake3: "2015c7b1088d1406179f73f0a74d4b557ce3db3f5c48461145e36b420cdb0c9c",
        contents_blake3: "ae90a8cc4f24bcaf8efa786d3c2e1f2b96cfcd2d0ead9e7622e92c4d9e17d1d3",
        make: scales,
    },
    // Spikes beside 8-bit factors and beside halves: in several tiles, across gaps, twice at one place; and a list without entries.
    Golden {
        name: "v1-spikes.bitstack",
        bytes: include_bytes!("golden/v1-spikes.bitstack"),
        bytes_blake3: "19f62529409bc2005dd47c978296bff55a3beef6aadf957f7a52645f868ad996",
        contents_blake3: "0499e69c89376ebf29f54a22d24998e0caa864335d813b95288e4becc97228c6",
        make: spikes,
    },
    // The first, cut in the middle of its last block.
    Golden {
        name: "v1-cut.bitstack",
        bytes: include_bytes!("golden/v1-cut.bitstack"),
        bytes_blake3: "9809132aeaf4e588005896e19c9fbd1b3723a31ba8973976dbdde145e7cd991f",
        contents_blake3: "9e4584d7dc94c6318d75650d6006937a8ff50ff7e6be70a58fcaad7ee85c4385",
        make: cut,
    },
];

fn refitted() -> Vec<u8> {
    let mut draft = Draft::create_on(Vec::new(), "memory");
    let mut numbers = Numbers(5);
    let mut data = |n: usize| -> Vec<u8> { (0..n).map(|_| numbers.next() as u8).collect() };
    draft.push_base("scalar", Dtype::F32, &[], &data(4)).unwrap();
    draft.push_base("Gewichtung.größe", Dtype::F16, &[1, 2, 1, 3], &data(12)).unwrap();
    draft.push_base("bias", Dtype::BF16, &[65], &data(130)).unwrap();
    draft.push_file("chat_template.jinja", b"{{ \"\xe2\x9c\x93\" }}").unwrap();
    draft.set_provenance("quelle", "ein Modell\u{2713}\\").unwrap();
    for (name, factor) in [("eight.bits", FactorType::I8), ("halves ½", FactorType::F16)] {
        let shape = Shape::new(6, 70).unwrap();
        let w = draft.add_weight(name, shape, 1, "nested").unwrap();
        for number in 1..=8 {
            let basis = (number == 1).then_some(factor);
            let like = Like { planes: number, basis, coefficients: factor, spikes: false };
            draft.push_block(w, samples::block(shape, 1, like, &mut numbers).view()).unwrap();
        }
    }
    let mut bytes = Vec::new();
    draft.finish(&[0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0], &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

fn scales() -> Vec<u8> {
    let mut draft = Draft::create_on(Vec::new(), "memory");
    let mut numbers = Numbers(6);
    for (name, rows, cols, rank) in [("refitted", 6, 70, 1), ("mixed", 5, 9, 2)] {
        let shape = Shape::new(rows, cols).unwrap();
        let w = draft.add_weight(name, shape, rank, "nested").unwrap();
        for number in 1..=4 {
            let like = match (rank, number) {
                (_, 1) => Like { planes: 1, basis: Some(FactorType::I8), coefficients: FactorType::I8, spikes: false },
                (1, _) => Like { planes: number, basis: None, coefficients: FactorType::Scales, spikes: false },
                (_, 2) => Like { planes: 1, basis: None, coefficients: FactorType::Scales, spikes: false },
                (_, 3) => Like { planes: 3, basis: None, coefficients: FactorType::F16, spikes: false },
                (_, _) => {
                    Like { planes: 1, basis: Some(FactorType::F16), coefficients: FactorType::Scales, spikes: false }
                }
            };
            draft.push_block(w, samples::block(shape, rank, like, &mut numbers).view()).unwrap();
        }
    }
    let mut bytes = Vec::new();
    draft.finish(&[0, 1, 0, 1, 1, 0, 0, 1], &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

/// Where the spikes of the weights of [`spikes`] are, in the order of their lists.
const PLACES: [&[Spike]; 2] = [
    &[
        Spike { row: 5, col: 0, size: 1 },
        Spike { row: 7, col: 31, size: -2 },
        Spike { row: 0, col: 63, size: 15 },
        Spike { row: 63, col: 63, size: 3 },
        Spike { row: 64, col: 99, size: -15 },
        Spike { row: 64, col: 99, size: 4 },
        Spike { row: 129, col: 7, size: 8 },
    ],
    &[],
];

fn spikes() -> Vec<u8> {
    let mut draft = Draft::create_on(Vec::new(), "memory");
    let mut numbers = Numbers(7);
    for ((name, rows, cols, factor), places) in
        [("tiles", 130, 100, FactorType::I8), ("none", 3, 5, FactorType::F16)].into_iter().zip(PLACES)
    {
        let shape = Shape::new(rows, cols).unwrap();
        let w = draft.add_weight(name, shape, 1, "nested").unwrap();
        let like = |basis| Like { planes: 1, basis, coefficients: factor, spikes: false };
        let sizes = std::array::from_fn(|i| f16::from_f32(2.0 + 0.5 * i as f32));
        let list = Spikes::encode(shape, sizes, places).unwrap();
        let first = samples::block(shape, 1, like(Some(factor)), &mut numbers);
        draft.push_block(w, Block { spikes: Some(list), ..first }.view()).unwrap();
        draft.push_block(w, samples::block(shape, 1, like(None), &mut numbers).view()).unwrap();
    }
    let mut bytes = Vec::new();
    draft.finish(&[1, 0, 0, 1], &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

fn cut() -> Vec<u8> {
    let mut bytes = samples::file_without_spikes();
    bytes.truncate(bytes.len() - 3);
    bytes
}

/// The hash of everything that a file shows: names, shapes, types and values, each after its length.
fn contents_hash(bytes: &[u8]) -> String {
    let file = StackFile::open(bytes).unwrap();
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    };
    let number = |n: usize| (n as u64).to_le_bytes();
    for (key, value) in file.provenance() {
        add(key.as_bytes());
        add(value.as_bytes());
    }
    for info in file.files() {
        add(info.name.as_bytes());
        add(&file.read_file(&info.name).unwrap());
    }
    for info in file.base_tensors() {
        let tensor = file.read_tensor(&info.name).unwrap();
        add(info.name.as_bytes());
        add(tensor.dtype.name().as_bytes());
        tensor.shape.iter().for_each(|&dim| add(&number(dim)));
        add(&tensor.data);
    }
    file.order().iter().for_each(|&w| add(&number(w as usize)));
    for (w, weight) in file.weights().iter().enumerate() {
        add(weight.name.as_bytes());
        add(weight.method.as_bytes());
        [weight.shape.rows(), weight.shape.cols(), weight.rank].into_iter().for_each(|n| add(&number(n)));
        for b in 1..=weight.n_blocks() {
            let block = file.read_block(w, b).unwrap();
            let block = block.view();
            add(block.signs.as_bytes());
            for factor in [block.basis.map(|v| v.values()), Some(block.coefficients.values())] {
                match factor {
                    None => add(b"shared"),
                    Some(ValuesRef::F16(values)) => values.iter().for_each(|x| add(&x.to_le_bytes())),
                    Some(ValuesRef::I8 { codes, scales }) => {
                        codes.iter().for_each(|x| add(&x.to_le_bytes()));
                        scales.iter().for_each(|x| add(&x.to_le_bytes()));
                    }
                    Some(ValuesRef::Scales(scales)) => scales.iter().for_each(|x| add(&x.to_le_bytes())),
                }
            }
            add(&number(block.coefficients.planes()));
            if let Some(spikes) = block.spikes {
                spikes.words().iter().for_each(|word| add(&word.to_le_bytes()));
            }
        }
    }
    hasher.finalize().to_string()
}

#[test]
fn golden_files_still_open_and_show_what_they_did() {
    for Golden { name, bytes, bytes_blake3, contents_blake3, .. } in GOLDEN {
        assert_eq!(blake3::hash(bytes).to_string(), bytes_blake3, "{name}: the golden file itself has changed");
        let file = StackFile::open(bytes).unwrap();
        let report = file.verify(&mut |_, _| {}).unwrap();
        assert!(report.damaged.is_empty(), "{name}");
        assert_eq!(file.missing().is_some(), name.contains("cut"), "{name}");
        assert_eq!(contents_hash(bytes), contents_blake3, "{name}");
    }
}

/// The hash of the contents is of what was put in, not only of what comes out.
#[test]
fn the_first_golden_file_shows_the_sample() {
    let file = StackFile::open(GOLDEN[0].bytes).unwrap();
    assert_eq!(file.order(), samples::ORDER);
    for (w, (name, shape, rank, blocks)) in samples::weights().into_iter().enumerate() {
        let info = &file.weights()[w];
        assert_eq!((info.name.as_str(), info.shape, info.rank, info.method.as_str()), (name, shape, rank, "avd"));
        for (i, block) in blocks.iter().enumerate() {
            let without = Block { spikes: None, ..block.clone() };
            assert_eq!(file.read_block(w, i + 1).unwrap(), without);
        }
    }
    assert_eq!(file.read_file("config.json").unwrap(), samples::CONFIG);
    assert_eq!(file.read_file("tokenizer.json").unwrap(), samples::TOKENIZER);
    assert_eq!(file.read_tensor("norm.weight").unwrap().data[..4], 1.0f32.to_le_bytes());
    assert_eq!(file.provenance()["options"], "--blocks 3");
}

#[test]
fn the_golden_file_with_spikes_shows_them_where_they_were_put() {
    let golden = GOLDEN.iter().find(|golden| golden.name == "v1-spikes.bitstack").unwrap();
    let file = StackFile::open(golden.bytes).unwrap();
    for (w, places) in PLACES.into_iter().enumerate() {
        let block = file.read_block(w, 1).unwrap();
        let list = block.view().spikes.unwrap();
        let found: Vec<_> = (0..list.n_tiles()).flat_map(|tile| list.entries(tile)).collect();
        let value = |size: i8| f32::from(size.signum()) * (1.5 + 0.5 * f32::from(size.unsigned_abs()));
        let mut expected: Vec<_> = places.iter().map(|e| (e.row, e.col, value(e.size))).collect();
        expected.sort_by_key(|&(row, col, _)| (row / 64, col, row));
        assert_eq!(found, expected);
        assert!(file.read_block(w, 2).unwrap().spikes.is_none());
    }
}

#[test]
fn the_writer_still_writes_the_golden_files() {
    for Golden { name, bytes, make, .. } in GOLDEN {
        assert!(make() == bytes, "{name}");
    }
}

#[test]
#[ignore = "writes golden files that are not there yet, once, and shows their hashes"]
#[expect(clippy::print_stdout, reason = "whoever adds a golden file enters its hashes above")]
fn write_golden() {
    for Golden { name, make, .. } in GOLDEN {
        let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
        let bytes = make();
        match write_atomically(&path, Existing::Refuse, |out| Ok(out.write_all(&bytes)?)) {
            Ok(()) | Err(FileError::Exists { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        println!("{name} {} {}", blake3::hash(&bytes), contents_hash(&bytes));
    }
}
