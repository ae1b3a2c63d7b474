//! Every kernel against the definition in f64, over awkward shapes and every kind of stack.

use bitstack_core::{
    Basis, Block, BlockRef, Coefficients, Level, SPIKE_SIZES, Shape, SignLayout, SignMatrix, SignView, Spike, Spikes,
    SpikesRef, Values, WeightStack, f16, to_strips,
};
use bitstack_cpu::{CpuError, Isa, Kernel, Scratch, Threads};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A kind of stack.
#[derive(Debug, Clone, Copy)]
struct Kind {
    rank: usize,
    /// Every block its own basis; otherwise the first block's.
    own_bases: bool,
    /// Every second block brings coefficients for all planes before it; otherwise none does.
    refitted: bool,
    eight_bit: bool,
    spikes: bool,
}

fn gaussian(rng: &mut StdRng) -> f32 {
    let (a, b): (f32, f32) = (rng.random(), rng.random());
    (-2.0 * (1.0 - a).ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}

fn values(rng: &mut StdRng, n_values: usize, n_vectors: usize, eight_bit: bool) -> Values {
    if eight_bit {
        Values::I8 {
            codes: (0..n_values).map(|_| (gaussian(rng) * 32.0).clamp(-128.0, 127.0) as i8).collect(),
            scales: (0..n_vectors).map(|_| f16::from_f32(rng.random_range(0.5..1.5))).collect(),
        }
    } else {
        Values::F16((0..n_values).map(|_| f16::from_f32(gaussian(rng))).collect())
    }
}

/// A spike for some fifty weights, some places several times.
fn spikes(rng: &mut StdRng, shape: Shape) -> Spikes {
    let sizes: [f16; SPIKE_SIZES] = std::array::from_fn(|_| f16::from_f32(rng.random_range(0.1..10.0)));
    let spike = |_| {
        let (row, col) = (rng.random_range(0..shape.rows()), rng.random_range(0..shape.cols()));
        let size = rng.random_range(1..=SPIKE_SIZES as i8) * if rng.random() { 1 } else { -1 };
        Spike { row, col, size }
    };
    let mut entries: Vec<Spike> = (0..shape.n_elems() / 50 + 3).map(spike).collect();
    for i in 0..entries.len().min(5) {
        entries.push(Spike { size: i as i8 + 1, ..entries[i] });
    }
    Spikes::encode(shape, sizes, &entries).unwrap()
}

fn stack(rng: &mut StdRng, shape: Shape, blocks: usize, kind: Kind) -> WeightStack {
    let (rows, cols, rank) = (shape.rows(), shape.cols(), kind.rank);
    let mut stack = WeightStack::new(shape);
    for number in 1..=blocks {
        let planes = if kind.refitted && number % 2 == 0 { number } else { 1 };
        let signs: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
        let basis = (number == 1 || kind.own_bases)
            .then(|| Basis::new(rank, cols, values(rng, rank * cols, rank, kind.eight_bit)).unwrap());
        let coefficients = match values(rng, rows * planes * rank, planes * rank, kind.eight_bit) {
            // Some blocks bring no codes of their own.
            Values::I8 { scales, .. } if number % 3 == 2 => Values::Scales(scales),
            own => own,
        };
        let coefficients = Coefficients::new(rows, planes, rank, coefficients).unwrap();
        let spikes = (kind.spikes && number == 1).then(|| spikes(rng, shape));
        let signs = SignMatrix::from_f32(rows, cols, &signs).unwrap();
        stack.push(Block { signs, basis, coefficients, spikes }).unwrap();
    }
    stack
}

/// Σ (u v x)² over rows, planes, rank and columns, and over spikes: what |y|² is on average over random signs. Unlike |y|² it is not small
/// by chance. A tolerance that is a part of it has room for sums in f32 of n spikes a row: they are off by at most n 2⁻²⁴ Σ |value u v x|,
/// which is at most n √n 2⁻²⁴ of the spikes' share of this; 10⁻⁴ for n = 141, and here are some twenty.
fn magnitude(level: &Level<'_>, x: &[f32]) -> f64 {
    let (rows, cols) = (level.shape().rows(), level.shape().cols());
    let mut sum = 0.0;
    for p in level.planes() {
        for k in 0..p.basis.rank() {
            let z: f64 = (0..cols).map(|c| (f64::from(p.basis.get(k, c)) * f64::from(x[c])).powi(2)).sum();
            let u: f64 = (0..rows).map(|r| f64::from(p.coefficients.get(r, p.plane, k)).powi(2)).sum();
            sum += u * z;
        }
    }
    if let Some(spikes) = level.spikes() {
        for (r, c, value) in (0..spikes.list.n_tiles()).flat_map(|tile| spikes.list.entries(tile)) {
            sum += (f64::from(value * spikes.row_unit(r) * spikes.basis.get(0, c)) * f64::from(x[c])).powi(2);
        }
    }
    sum
}

/// The signs of each block in strips.
fn in_strips(stack: &WeightStack) -> Vec<Vec<u8>> {
    let (rows, cols) = (stack.shape().rows(), stack.shape().cols());
    let arranged = |block: &Block| {
        let mut bytes = block.signs.as_bytes().to_vec();
        to_strips(rows, cols, &mut bytes).unwrap();
        bytes
    };
    stack.blocks().iter().map(arranged).collect()
}

/// The stack at a level, with other bytes for its signs.
fn level_in_strips<'a>(stack: &'a WeightStack, strips: &'a [Vec<u8>], level: u32) -> Level<'a> {
    let (rows, cols) = (stack.shape().rows(), stack.shape().cols());
    let blocks = stack.blocks().iter().zip(strips).take(level as usize).map(|(block, bytes)| BlockRef {
        signs: SignView::with_layout(rows, cols, SignLayout::Strips, bytes).unwrap(),
        ..block.view()
    });
    Level::new(stack.shape(), blocks).unwrap()
}

/// Applies every kernel on one thread and on the pool, to signs in every layout, and compares with the definition.
fn check(stack: &WeightStack, level: u32, x: &[f32], tolerance: f64, what: &str) {
    let results = check_level(&stack.level(level).unwrap(), x, tolerance, what);
    let strips = in_strips(stack);
    let in_strips = level_in_strips(stack, &strips, level);
    for (isa, y) in results {
        let mut other = vec![f32::NAN; y.len()];
        let kernel = Kernel::with_isa(isa).unwrap();
        kernel.apply(&in_strips, x, &mut other, Threads::Pool, &mut Scratch::default()).unwrap();
        let tokens = x.len() / in_strips.shape().cols();
        assert!(
            y.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits()),
            "{isa}, {tokens} tokens, {what}: strips"
        );
    }
}

/// Applies every kernel on one thread and on the pool, and compares with the definition. Returns the products.
fn check_level(level: &Level<'_>, x: &[f32], tolerance: f64, what: &str) -> Vec<(Isa, Vec<f32>)> {
    let (rows, cols) = (level.shape().rows(), level.shape().cols());
    let tokens = x.len() / cols;
    let expected: Vec<f64> = x.chunks(cols).flat_map(|x| level.matvec(x).unwrap()).collect();
    let norm = x.chunks(cols).map(|x| magnitude(level, x)).sum::<f64>().sqrt();
    let mut scratch = Scratch::default();
    let product = |isa| {
        let kernel = Kernel::with_isa(isa).unwrap();
        let mut y = vec![f32::NAN; tokens * rows];
        kernel.apply(level, x, &mut y, Threads::One, &mut scratch).unwrap();
        let error = y.iter().zip(&expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum::<f64>().sqrt();
        assert!(error <= tolerance * norm, "{isa}, {tokens} tokens, {what}: error {error:e} of {norm:e}");
        let mut pooled = vec![f32::NAN; tokens * rows];
        kernel.apply(level, x, &mut pooled, Threads::Pool, &mut scratch).unwrap();
        assert!(y.iter().zip(&pooled).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa}, {tokens} tokens, {what}: pool");
        (isa, y)
    };
    Isa::available().map(product).collect()
}

const KINDS: [Kind; 4] = [
    Kind { rank: 1, own_bases: false, refitted: true, eight_bit: true, spikes: false },
    Kind { rank: 1, own_bases: true, refitted: false, eight_bit: false, spikes: true },
    Kind { rank: 2, own_bases: true, refitted: true, eight_bit: false, spikes: true },
    Kind { rank: 1, own_bases: false, refitted: false, eight_bit: false, spikes: true },
];

#[test]
fn products_equal_the_definition_on_awkward_shapes() {
    let mut rng = StdRng::seed_from_u64(1);
    for rows in [1, 3, 15, 16, 17, 33] {
        for (i, cols) in [1, 7, 8, 9, 63, 64, 65, 511, 512, 513, 1031].into_iter().enumerate() {
            let kind = KINDS[(rows + i) % KINDS.len()];
            let stack = stack(&mut rng, Shape::new(rows, cols).unwrap(), 3, kind);
            for tokens in [1, 2, 5, 17] {
                let x: Vec<f32> = (0..tokens * cols).map(|_| gaussian(&mut rng)).collect();
                check(&stack, 3, &x, 1e-4, &format!("{rows} x {cols}, {kind:?}"));
            }
        }
    }
}

#[test]
fn products_equal_the_definition_at_every_level_rank_and_number_of_tokens() {
    let mut rng = StdRng::seed_from_u64(2);
    for rank in [1, 2, 4, 16] {
        for own_bases in [false, true] {
            let kind = Kind { rank, own_bases, refitted: !own_bases, eight_bit: rank % 4 == 0, spikes: own_bases };
            let stack = stack(&mut rng, Shape::new(33, 213).unwrap(), 9, kind);
            for level in 1..=9 {
                for tokens in [level, level + 8, if level == 4 { 64 } else { 1 }, if level == 9 { 131 } else { 2 }] {
                    let x: Vec<f32> = (0..tokens * 213).map(|_| gaussian(&mut rng)).collect();
                    check(&stack, level, &x, 1e-4, &format!("level {level}, {kind:?}"));
                }
            }
        }
    }
}

#[test]
fn spikes_are_added_in_every_tile_whatever_the_number_of_tokens_and_the_kind() {
    let mut rng = StdRng::seed_from_u64(9);
    for (i, (rows, cols)) in [(1, 700), (63, 40), (64, 9), (65, 130), (129, 333), (300, 65)].into_iter().enumerate() {
        for kind in [KINDS[0], KINDS[i % 3 + 1]].map(|kind| Kind { spikes: true, ..kind }) {
            let stack = stack(&mut rng, Shape::new(rows, cols).unwrap(), 4, kind);
            // 70: a batch of 64, whose W is rebuilt where that pays, and another.
            for tokens in [0, 1, 2, 3, 5, 8, 17, 70] {
                let x: Vec<f32> = (0..tokens * cols).map(|_| gaussian(&mut rng)).collect();
                for level in [1, 4] {
                    check(&stack, level, &x, 1e-4, &format!("{rows} x {cols}, level {level}, {kind:?}"));
                }
            }
        }
    }
}

#[test]
fn entries_outside_the_weight_in_lists_that_nobody_checked_add_nothing() {
    let mut rng = StdRng::seed_from_u64(10);
    let shape = Shape::new(70, 40).unwrap();
    let stack = stack(&mut rng, shape, 2, Kind { spikes: true, ..KINDS[0] });
    let mut words = stack.blocks()[0].spikes.as_ref().unwrap().view().words().to_vec();
    for word in &mut words[SpikesRef::least_words(shape)..] {
        *word = rng.random();
    }
    let list = SpikesRef::new(shape, &words).unwrap();
    list.check().unwrap_err();
    let mut blocks: Vec<BlockRef<'_>> = stack.blocks().iter().map(Block::view).collect();
    blocks[0].spikes = Some(list);
    let level = Level::new(shape, blocks).unwrap();
    for tokens in [1, 3, 20] {
        let x: Vec<f32> = (0..tokens * 40).map(|_| gaussian(&mut rng)).collect();
        check_level(&level, &x, 1e-4, "entries outside");
    }
}

/// What is promised of one token: relative to the product itself.
fn relative_errors(x: &[f32], cols: usize, kind: Kind, seed: u64) -> Vec<(Isa, f64)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let stack = stack(&mut rng, Shape::new(256, cols).unwrap(), 2, kind);
    let level = stack.level(2).unwrap();
    let expected = level.matvec(x).unwrap();
    let norm = expected.iter().map(|y| y * y).sum::<f64>().sqrt();
    let error = |isa| {
        let mut y = vec![0.0; 256];
        Kernel::with_isa(isa).unwrap().apply(&level, x, &mut y, Threads::One, &mut Scratch::default()).unwrap();
        let error = y.iter().zip(&expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum::<f64>().sqrt();
        (isa, error / norm)
    };
    Isa::available().map(error).collect()
}

#[test]
fn errors_are_within_1e_4_on_gaussian_data_and_5e_4_with_outliers() {
    let mut rng = StdRng::seed_from_u64(3);
    for kind in
        [KINDS[0], KINDS[1], Kind { rank: 16, own_bases: true, refitted: false, eight_bit: false, spikes: false }]
    {
        for cols in [1024, 4096, 14336] {
            let mut x: Vec<f32> = (0..cols).map(|_| gaussian(&mut rng)).collect();
            for (isa, error) in relative_errors(&x, cols, kind, 4) {
                assert!(error < 1e-4, "{isa}, {cols} columns, {kind:?}: {error:e}");
            }
            for i in 0..8 {
                x[(i * 997 + 123) % cols] *= 50.0;
            }
            for (isa, error) in relative_errors(&x, cols, kind, 5) {
                assert!(error < 5e-4, "{isa}, {cols} columns, {kind:?}, outliers: {error:e}");
            }
        }
    }
}

#[test]
fn zero_tiny_and_huge_inputs_keep_their_relative_error() {
    let mut rng = StdRng::seed_from_u64(6);
    let stack = stack(&mut rng, Shape::new(40, 600).unwrap(), 3, KINDS[1]);
    for scale in [0.0, 1e-36, 1e-20, 1e20, 1e33] {
        for tokens in [1, 3, 20] {
            let x: Vec<f32> = (0..tokens * 600).map(|_| scale * gaussian(&mut rng)).collect();
            check(&stack, 3, &x, 1e-4, &format!("inputs of {scale:e}"));
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let mut rng = StdRng::seed_from_u64(7);
    for kind in KINDS {
        let stack = stack(&mut rng, Shape::new(19, 530).unwrap(), 2, kind);
        let level = stack.level(2).unwrap();
        for isa in Isa::available() {
            for tokens in [1, 2, 20] {
                for (bad, at) in [(f32::NAN, 3), (f32::INFINITY, 529), (f32::NEG_INFINITY, 0)] {
                    let mut x: Vec<f32> = (0..tokens * 530).map(|_| gaussian(&mut rng)).collect();
                    let last = (tokens - 1) * 530;
                    x[last + at] = bad;
                    let expected = level.matvec(&x[last..]).unwrap();
                    let mut y = vec![0.0; tokens * 19];
                    let kernel = Kernel::with_isa(isa).unwrap();
                    kernel.apply(&level, &x, &mut y, Threads::One, &mut Scratch::default()).unwrap();
                    let (finite, last) = y.split_at((tokens - 1) * 19);
                    assert!(finite.iter().all(|y| y.is_finite()), "{isa}: other tokens");
                    for (y, expected) in last.iter().zip(expected) {
                        // Planes are added up in another order, or as one weight: infinite may be NaN or the other way round.
                        assert!(expected.is_finite() == y.is_finite(), "{isa}, {tokens} tokens: {y}, not {expected}");
                        assert!(!expected.is_nan() || y.is_nan() || bad.is_infinite(), "{isa}: {y}, not {expected}");
                    }
                }
            }
        }
    }
}

#[test]
fn wrong_lengths_are_rejected_and_no_tokens_are_fine() {
    let mut rng = StdRng::seed_from_u64(8);
    let stack = stack(&mut rng, Shape::new(3, 5).unwrap(), 1, KINDS[0]);
    let level = stack.level(1).unwrap();
    let mut y = [7.0; 6];
    let mut apply =
        |x: &[f32], n: usize| Kernel::detect().apply(&level, x, &mut y[..n], Threads::One, &mut Scratch::default());
    assert_eq!(apply(&[0.0; 7], 3), Err(CpuError::PartialToken { cols: 5, len: 7 }));
    assert_eq!(apply(&[0.0; 10], 5), Err(CpuError::OutputLength { tokens: 2, rows: 3, expected: 6, actual: 5 }));
    assert_eq!(apply(&[], 0), Ok(()));
    assert_eq!(y, [7.0; 6]);
}

#[test]
#[expect(clippy::print_stderr, reason = "says what the tests above did not run")]
fn instructions_that_are_missing_give_no_kernel() {
    for isa in Isa::ALL {
        assert_eq!(Kernel::with_isa(isa).is_some(), isa.is_available());
        assert_eq!(isa.is_available(), Isa::available().any(|i| i == isa));
        if !isa.is_available() {
            eprintln!("skipped: this CPU has no {isa}");
        }
    }
    assert_eq!(Kernel::detect().isa(), Isa::available().last().unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn products_equal_the_definition(
        (rows, cols, blocks, tokens) in (1usize..600, 1usize..700, 1usize..5, 1usize..20),
        (rank, own_bases, refitted) in (1usize..5, any::<bool>(), any::<bool>()),
        (eight_bit, spikes) in (any::<bool>(), any::<bool>()),
        seed: u64,
    ) {
        let mut rng = StdRng::seed_from_u64(seed);
        // The definition takes a while: fewer rows for many columns.
        let rows = rows.min(40_000 / cols).max(1);
        let kind = Kind { rank, own_bases, refitted, eight_bit, spikes };
        let stack = stack(&mut rng, Shape::new(rows, cols).unwrap(), blocks, kind);
        let x: Vec<f32> = (0..tokens * cols).map(|_| gaussian(&mut rng)).collect();
        check(&stack, stack.top_level(), &x, 1e-4, &format!("{rows} x {cols}, {kind:?}"));
    }
}
