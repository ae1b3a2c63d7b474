//! Stacks of every kind, written and then broken.
//!
//! A description becomes a draft, the draft a file; the file shows what went in, whole and at every length. Then bytes are changed, cut out, put
//! in and cut off. Unless the header's hash is set right afterwards, nothing that can still be read may differ from what went in.
#![no_main]

use arbitrary::Arbitrary;
use bitstack_core::{Basis, Block, Coefficients, SPIKE_SIZES, Shape, SignMatrix, Spike, Spikes, Values, f16};
use bitstack_format::{BlockSource, Draft, Dtype, FormatError, StackFile};
use bitstack_fuzz::{exercise, seal};
use libfuzzer_sys::fuzz_target;
use std::collections::HashSet;

#[derive(Debug, Arbitrary)]
struct Input {
    weights: Vec<Weight>,
    base: Vec<(String, u8, Vec<u8>)>,
    files: Vec<(String, Vec<u8>)>,
    provenance: Vec<(String, String)>,
    /// Which weight comes next in the load order.
    order: Vec<u8>,
    breaks: Vec<Break>,
    seal: bool,
    /// By weight, the words of its spikes.
    spikes: Vec<Vec<u16>>,
}

#[derive(Debug, Arbitrary)]
struct Weight {
    name: String,
    rows: u8,
    cols: u8,
    rank: u8,
    blocks: Vec<Kind>,
}

#[derive(Debug, Arbitrary)]
struct Kind {
    basis: Option<bool>,
    eight_bit: bool,
    refitted: bool,
    seed: u16,
}

#[derive(Debug, Arbitrary)]
enum Break {
    Xor { at: u32, with: u8 },
    Cut { at: u32, n: u8 },
    Insert { at: u32, bytes: Vec<u8> },
    Truncate { at: u32 },
    Replace { from: u8, to: u8, nth: u8 },
    Swap { a: u32, b: u32, n: u8 },
}

/// Small numbers that look random, exact in f16.
fn numbers(seed: u16) -> impl FnMut() -> u16 {
    let mut state = u32::from(seed) + 1;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as u16
    }
}

fn values(next: &mut impl FnMut() -> u16, eight_bit: bool, n: usize, vectors: usize) -> Values {
    let half = |next: &mut dyn FnMut() -> u16| f16::from_f32(f32::from(next() % 512) / 64.0 - 4.0);
    if eight_bit {
        Values::I8 { codes: (0..n).map(|_| next() as i8).collect(), scales: (0..vectors).map(|_| half(next)).collect() }
    } else {
        Values::F16((0..n).map(|_| half(next)).collect())
    }
}

fn block(shape: Shape, rank: usize, number: usize, kind: &Kind) -> Block {
    let (rows, cols) = (shape.rows(), shape.cols());
    let mut next = numbers(kind.seed);
    let planes = if kind.refitted { number } else { 1 };
    let basis = kind.basis.or(if number == 1 { Some(false) } else { None });
    let signs: Vec<f32> = (0..rows * cols).map(|_| f32::from(next()) - 32768.0).collect();
    Block {
        signs: SignMatrix::from_f32(rows, cols, &signs).expect("as many values"),
        basis: basis.map(|eight| {
            Basis::new(rank, cols, values(&mut next, eight, rank * cols, rank)).expect("finite values, as many")
        }),
        coefficients: {
            let vectors = planes * rank;
            let values = values(&mut next, kind.eight_bit, rows * vectors, vectors);
            Coefficients::new(rows, planes, rank, values).expect("finite values, as many")
        },
        spikes: None,
    }
}

/// Words as they are, where they are a list of spikes; else each of them as an entry somewhere, and the first ones as sizes too.
fn spikes(shape: Shape, words: &[u16]) -> Spikes {
    Spikes::new(shape, words.to_vec()).unwrap_or_else(|_| {
        let size = |i: usize| f16::from_bits(words.get(i).copied().unwrap_or(0) & 0x7bff);
        let entry = |&word: &u16| {
            let (row, col) = (usize::from(word) % shape.rows(), usize::from(word >> 4) % shape.cols());
            let size = 1 + (word >> 10) as i8 % SPIKE_SIZES as i8;
            Spike { row, col, size: if word & 8 == 0 { size } else { -size } }
        };
        let entries: Vec<Spike> = words.iter().take(64).map(entry).collect();
        Spikes::encode(shape, std::array::from_fn(size), &entries).expect("finite sizes, entries within the weight")
    })
}

fuzz_target!(|input: Input| {
    let mut draft = Draft::create_on(Vec::new(), "memory");
    // Names are the input's: whatever the draft accepts must come out of the file.
    let mut n_files = 0;
    for (name, contents) in input.files.iter().take(4) {
        n_files += usize::from(draft.push_file(name, contents).is_ok());
    }
    let mut n_base = 0;
    for (name, dtype, data) in input.base.iter().take(4) {
        let dtype = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I8][usize::from(dtype % 4)];
        let n = data.len() / (dtype.bits() / 8) as usize;
        let data = &data[..n * (dtype.bits() / 8) as usize];
        n_base += usize::from(draft.push_base(name, dtype, &[n], data).is_ok());
    }
    for (key, value) in input.provenance.iter().take(4) {
        let _ = draft.set_provenance(key, value);
    }
    let mut blocks: Vec<Vec<Block>> = Vec::new();
    for weight in input.weights.iter().take(4) {
        let shape = Shape::new(usize::from(weight.rows % 12) + 1, usize::from(weight.cols % 40) + 1).expect("small");
        let rank = usize::from(weight.rank % 3) + 1;
        if draft.add_weight(&weight.name, shape, rank, "fuzz").is_err() {
            continue;
        }
        let w = blocks.len();
        blocks.push(Vec::new());
        for kind in weight.blocks.iter().take(5) {
            let mut block = block(shape, rank, blocks[w].len() + 1, kind);
            if blocks[w].is_empty() {
                block.spikes = input.spikes.get(w).map(|words| spikes(shape, words));
            }
            match draft.push_block(w, block.view()) {
                Ok(()) => blocks[w].push(block),
                // A name of an unstacked tensor or a weight may be that of a part of the block.
                Err(FormatError::Duplicate { .. } | FormatError::Name { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }

    let mut left: Vec<usize> = blocks.iter().map(Vec::len).collect();
    let mut order: Vec<u32> = (0..blocks.len() as u32).collect();
    left.iter_mut().for_each(|n| *n = n.saturating_sub(1));
    for next in &input.order {
        let w = usize::from(*next) % left.len().max(1);
        if left.get(w).is_some_and(|&n| n > 0) {
            left[w] -= 1;
            order.push(w as u32);
        }
    }
    let mut bytes = Vec::new();
    let written = draft.finish(&order, &mut bytes, &mut |_, _| {});
    if blocks.is_empty() || blocks.iter().any(Vec::is_empty) {
        assert!(matches!(written, Err(FormatError::Order { .. })));
        return;
    }
    assert_eq!(written.expect("a draft with a first block of everything"), bytes.len() as u64);

    // What went in comes out.
    let file = StackFile::open(&bytes[..]).expect("what was written opens");
    assert!(file.verify(&mut |_, _| {}).expect("it is small").is_whole());
    assert_eq!((file.files().len(), file.base_tensors().len()), (n_files, n_base));
    assert_eq!(file.order(), order);
    assert_eq!(file.provenance(), draft.provenance());
    for (w, blocks) in blocks.iter().enumerate() {
        for b in 1..=file.weights()[w].n_blocks() {
            assert_eq!(file.read_block(w, b).expect("it is whole"), blocks[b - 1]);
        }
    }
    let good: HashSet<String> = exercise(&bytes).into_iter().collect();

    // Broken.
    let pristine = bytes.clone();
    for b in input.breaks.iter().take(8) {
        let n_bytes = bytes.len();
        if n_bytes == 0 {
            break;
        }
        let place = |at: u32| at as usize % n_bytes;
        match b {
            Break::Xor { at, with } => bytes[place(*at)] ^= with,
            Break::Cut { at, n } => drop(bytes.drain(place(*at)..n_bytes.min(place(*at) + usize::from(*n)))),
            Break::Insert { at, bytes: inserted } => {
                bytes.splice(place(*at)..place(*at), inserted.iter().take(64).copied());
            }
            Break::Truncate { at } => bytes.truncate(place(*at)),
            Break::Replace { from, to, nth } => {
                let found = bytes.iter().enumerate().filter(|(_, b)| *b == from).nth(usize::from(*nth)).map(|(i, _)| i);
                if let Some(i) = found {
                    bytes[i] = *to;
                }
            }
            Break::Swap { a, b, n } => {
                let (a, b) = (place(*a), place(*b));
                for i in 0..usize::from(*n) {
                    if a + i < n_bytes && b + i < n_bytes {
                        bytes.swap(a + i, b + i);
                    }
                }
            }
        }
    }
    if input.seal {
        if let Some(sealed) = seal(&bytes) {
            exercise(&sealed);
        }
    } else {
        for value in exercise(&bytes) {
            assert!(good.contains(&value), "{value} never went in; {} bytes of {}", bytes.len(), pristine.len());
        }
    }
});
