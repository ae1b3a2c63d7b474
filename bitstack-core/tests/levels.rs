//! What a level is: the definition, element by element, against the crate's arithmetic, over every kind of stack.

use bitstack_core::{
    Basis, Block, BlockRef, Coefficients, CoreError, FactorType, Level, SPIKE_ROWS, SPIKE_SIZES, Shape, SignMatrix,
    Spike, Spikes, Values, ValuesRef, WeightStack, f16,
};
use proptest::prelude::*;

/// Small numbers that are exact in f16, from a seed: the arithmetic must then be exact in f32, so `==` is the right comparison.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    fn small(&mut self) -> f32 {
        (self.next() % 17) as f32 / 8.0 - 1.0
    }

    fn halves(&mut self, n: usize) -> Vec<f16> {
        (0..n).map(|_| f16::from_f32(self.small())).collect()
    }

    fn values(&mut self, n_values: usize, n_vectors: usize, factor: FactorType) -> Values {
        match factor {
            FactorType::I8 => {
                let codes = (0..n_values).map(|_| (self.next() % 9) as i8 - 4).collect();
                let scale = |i: u64| f16::from_f32([0.5, 0.25, 1.0][(i % 3) as usize]);
                Values::I8 { codes, scales: (0..n_vectors).map(|_| scale(self.next())).collect() }
            }
            FactorType::F16 => Values::F16(self.halves(n_values)),
            FactorType::Scales => Values::Scales(self.halves(n_vectors)),
        }
    }

    fn block(&mut self, shape: Shape, rank: usize, planes: usize, with_basis: bool, factor: FactorType) -> Block {
        let (rows, cols) = (shape.rows(), shape.cols());
        let signs: Vec<f32> = (0..rows * cols).map(|_| self.small()).collect();
        Block {
            signs: SignMatrix::from_f32(rows, cols, &signs).unwrap(),
            basis: with_basis.then(|| {
                let own = if factor == FactorType::Scales { FactorType::F16 } else { factor };
                Basis::new(rank, cols, self.values(rank * cols, rank, own)).unwrap()
            }),
            coefficients: Coefficients::new(
                rows,
                planes,
                rank,
                self.values(rows * planes * rank, planes * rank, factor),
            )
            .unwrap(),
            spikes: None,
        }
    }

    fn spikes(&mut self, shape: Shape) -> Spikes {
        let sizes = std::array::from_fn(|i| f16::from_f32((i + 1) as f32 / 8.0));
        let n = self.next() as usize % 9;
        let entry = |_| Spike {
            row: self.next() as usize % shape.rows(),
            col: self.next() as usize % shape.cols(),
            size: [1, -1][self.next() as usize % 2] * (1 + self.next() as usize % SPIKE_SIZES) as i8,
        };
        let entries: Vec<Spike> = (0..n).map(entry).collect();
        Spikes::encode(shape, sizes, &entries).unwrap()
    }
}

/// W_b[r, c] straight from the definition in the crate's documentation.
fn definition(blocks: &[BlockRef<'_>], r: usize, c: usize) -> f64 {
    let mut sum = 0.0;
    for i in 0..blocks.len() {
        let basis = blocks[..=i].iter().rev().find_map(|b| b.basis).unwrap();
        // The last block that has coefficients for plane i.
        let (u, plane) = (i..blocks.len())
            .rev()
            .find_map(|j| match blocks[j].coefficients {
                u if j == i => Some((u, u.planes() - 1)),
                u if u.planes() > 1 => Some((u, i)),
                _ => None,
            })
            .unwrap();
        for k in 0..u.rank() {
            let u = match u.values() {
                ValuesRef::Scales(scales) => scales[plane * u.rank() + k].to_f64() * first(blocks, r, k),
                _ => f64::from(u.get(r, plane, k)),
            };
            sum += f64::from(blocks[i].signs.get(r, c)) * u * f64::from(basis.get(k, c));
        }
    }
    sum + spike(blocks[0], r, c)
}

/// P[r, c] from the words of the list, as its documentation has them.
fn spike(block: BlockRef<'_>, r: usize, c: usize) -> f64 {
    let (Some(spikes), Some(basis)) = (block.spikes, block.basis) else { return 0.0 };
    let words = spikes.words();
    let n_tiles = spikes.shape().rows().div_ceil(SPIKE_ROWS);
    let end = |tile: usize| {
        usize::from(words[SPIKE_SIZES + 2 * tile]) + (usize::from(words[SPIKE_SIZES + 2 * tile + 1]) << 16)
    };
    let tile = r / SPIKE_ROWS;
    let (mut col, mut sum) = (0, 0.0);
    for i in if tile == 0 { 0 } else { end(tile - 1) }..end(tile) {
        let word = words[SPIKE_SIZES + 2 * n_tiles + i];
        let (row, gap, size) = (word & 63, (word >> 6) & 31, (word >> 11) & 15);
        col += usize::from(gap);
        if (usize::from(row), col) == (r % SPIKE_ROWS, c) && size > 0 {
            sum += f16::from_bits(words[usize::from(size) - 1]).to_f64() * if word >> 15 == 1 { -1.0 } else { 1.0 };
        }
    }
    sum * f64::from(block.coefficients.get(r, 0, 0)) * f64::from(basis.get(0, c))
}

/// What scales multiply.
fn first(blocks: &[BlockRef<'_>], r: usize, k: usize) -> f64 {
    let u = blocks[0].coefficients;
    let ValuesRef::I8 { codes, .. } = u.values() else { panic!("scales need codes") };
    f64::from(codes[r * u.rank() + k])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

    #[test]
    fn every_level_of_every_kind_of_stack_is_its_definition(
        rows in prop_oneof![1usize..7, 60usize..70], cols in prop_oneof![1usize..20, 30usize..80], rank in 1usize..4, seed: u64,
        with_spikes: bool, kinds in prop::collection::vec((any::<bool>(), any::<bool>(), 0usize..3), 1..6),
    ) {
        let shape = Shape::new(rows, cols).unwrap();
        let mut numbers = Numbers(seed);
        let mut stack = WeightStack::new(shape);
        for (i, &(refitted, with_basis, factor)) in kinds.iter().enumerate() {
            use FactorType::{F16, I8, Scales};
            let codes = i > 0 && kinds[0].2 == 1;
            let factor = [F16, I8, if codes { Scales } else { F16 }][factor];
            let planes = if refitted { i + 1 } else { 1 };
            let mut block = numbers.block(shape, rank, planes, with_basis || i == 0, factor);
            block.spikes = (with_spikes && i == 0).then(|| numbers.spikes(shape));
            stack.push(block).unwrap();
        }
        let x: Vec<f32> = (0..cols).map(|_| numbers.small()).collect();
        for level in 1..=stack.top_level() {
            let blocks: Vec<_> = stack.blocks()[..level as usize].iter().map(Block::view).collect();
            let expected: Vec<f64> = (0..rows * cols).map(|i| definition(&blocks, i / cols, i % cols)).collect();
            let at = stack.level(level).unwrap();
            prop_assert_eq!(at.reconstruct().into_iter().map(f64::from).collect::<Vec<_>>(), expected.clone());
            let mut last_row = vec![f32::NAN; cols];
            at.reconstruct_rows(rows - 1, &mut last_row).unwrap();
            prop_assert_eq!(&last_row[..], &at.reconstruct()[(rows - 1) * cols..]);
            last_row.fill(f32::NAN);
            at.reconstruct_row(rows - 1, &mut vec![f32::NAN; cols], &mut last_row).unwrap();
            prop_assert_eq!(&last_row[..], &at.reconstruct()[(rows - 1) * cols..]);
            let y: Vec<f64> = expected.chunks(cols).map(|w| w.iter().zip(&x).map(|(w, &x)| w * f64::from(x)).sum()).collect();
            for (a, e) in at.matvec(&x).unwrap().into_iter().zip(y) {
                // The sums run in another order: a few units of f64 rounding on values below 20 · 6 · 4.
                prop_assert!((a - e).abs() <= 1e-11, "{a} against {e}");
            }
            let bytes: u64 = blocks.iter().map(|b| b.layout().unwrap().bytes().unwrap()).sum();
            prop_assert_eq!(stack.bytes(level), bytes);
        }
    }
}

#[test]
fn blocks_that_do_not_fit_are_rejected_and_leave_the_stack_as_it_was() {
    let shape = Shape::new(3, 5).unwrap();
    let mut numbers = Numbers(1);
    let mut stack = WeightStack::new(shape);
    assert_eq!(stack.push(numbers.block(shape, 2, 1, false, FactorType::F16)), Err(CoreError::NoBasis));
    assert_eq!(
        stack.push(numbers.block(shape, 2, 2, true, FactorType::F16)),
        Err(CoreError::Planes { block: 1, planes: 2 })
    );
    stack.push(numbers.block(shape, 2, 1, true, FactorType::F16)).unwrap();
    let other = Shape::new(3, 6).unwrap();
    let late = Block { spikes: Some(numbers.spikes(shape)), ..numbers.block(shape, 2, 1, false, FactorType::F16) };
    assert_eq!(stack.push(late), Err(CoreError::SpikesLate { block: 2 }));
    for bad in [
        numbers.block(other, 2, 1, true, FactorType::F16),
        numbers.block(Shape::new(4, 5).unwrap(), 2, 1, true, FactorType::F16),
        numbers.block(shape, 3, 1, true, FactorType::F16),
        Block {
            basis: numbers.block(other, 2, 1, true, FactorType::F16).basis,
            ..numbers.block(shape, 2, 1, true, FactorType::F16)
        },
        Block {
            coefficients: numbers.block(shape, 3, 1, true, FactorType::F16).coefficients,
            ..numbers.block(shape, 2, 1, true, FactorType::F16)
        },
    ] {
        assert!(matches!(stack.push(bad), Err(CoreError::Mismatch { .. })));
    }
    assert_eq!(
        stack.push(numbers.block(shape, 2, 3, true, FactorType::F16)),
        Err(CoreError::Planes { block: 2, planes: 3 })
    );
    assert_eq!((stack.blocks().len(), stack.rank()), (1, Some(2)));
}

#[test]
fn levels_that_do_not_exist_are_errors() {
    let shape = Shape::new(1, 1).unwrap();
    let mut stack = WeightStack::new(shape);
    assert_eq!(stack.level(1).err(), Some(CoreError::NoSuchLevel { level: 1, blocks: 0 }));
    stack.push(Numbers(1).block(shape, 1, 1, true, FactorType::F16)).unwrap();
    assert_eq!(stack.level(0).err(), Some(CoreError::NoSuchLevel { level: 0, blocks: 1 }));
    assert_eq!(stack.level(2).err(), Some(CoreError::NoSuchLevel { level: 2, blocks: 1 }));
    assert!(Level::new(shape, []).is_err());
    let level = stack.level(1).unwrap();
    assert!(level.reconstruct_rows(1, &mut [0.0]).is_err());
    assert!(level.reconstruct_row(1, &mut [0.0], &mut [0.0]).is_err());
    assert!(level.matvec(&[]).is_err());
}
