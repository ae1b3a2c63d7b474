//! Every kernel against the definition in f64, over awkward shapes and every kind of stack.

use bitstack_core::{Basis, Block, Coefficients, Level, Shape, SignMatrix, Values, WeightStack, f16};
use bitstack_cpu::{Isa, Kernel, Scratch, Threads};
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

fn stack(rng: &mut StdRng, shape: Shape, blocks: usize, kind: Kind) -> WeightStack {
    let (rows, cols, rank) = (shape.rows(), shape.cols(), kind.rank);
    let mut stack = WeightStack::new(shape);
    for number in 1..=blocks {
        let planes = if kind.refitted && number % 2 == 0 { number } else { 1 };
        let signs: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
        let basis = (number == 1 || kind.own_bases)
            .then(|| Basis::new(rank, cols, values(rng, rank * cols, rank, kind.eight_bit)).unwrap());
        let coefficients = values(rng, rows * planes * rank, planes * rank, kind.eight_bit);
        let coefficients = Coefficients::new(rows, planes, rank, coefficients).unwrap();
        stack.push(Block { signs: SignMatrix::from_f32(rows, cols, &signs).unwrap(), basis, coefficients }).unwrap();
    }
    stack
}

/// Σ (u v x)² over rows, planes, rank and columns: what |y|² is on average over random signs. Unlike |y|² it is not small by chance.
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
    sum
}

/// Applies every kernel on one thread and on the pool, and compares with the definition.
fn check(stack: &WeightStack, level: usize, x: &[f32], tolerance: f64, what: &str) {
    let level = stack.level(level).unwrap();
    let (rows, cols) = (level.shape().rows(), level.shape().cols());
    let tokens = x.len() / cols;
    let expected: Vec<f64> = x.chunks(cols).flat_map(|x| level.matvec(x).unwrap()).collect();
    let norm = x.chunks(cols).map(|x| magnitude(&level, x)).sum::<f64>().sqrt();
    let mut scratch = Scratch::default();
    for isa in Isa::available() {
        let kernel = Kernel::with_isa(isa).unwrap();
        let mut y = vec![f32::NAN; tokens * rows];
        kernel.apply(&level, x, &mut y, Threads::One, &mut scratch).unwrap();
        let error = y.iter().zip(&expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum::<f64>().sqrt();
        assert!(error <= tolerance * norm, "{isa}, {tokens} tokens, {what}: error {error:e} of {norm:e}");
        let mut pooled = vec![f32::NAN; tokens * rows];
        kernel.apply(&level, x, &mut pooled, Threads::Pool, &mut scratch).unwrap();
        assert!(y.iter().zip(&pooled).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa}, {tokens} tokens, {what}: pool");
    }
}

const KINDS: [Kind; 4] = [
    Kind { rank: 1, own_bases: false, refitted: true, eight_bit: true },
    Kind { rank: 1, own_bases: true, refitted: false, eight_bit: false },
    Kind { rank: 2, own_bases: true, refitted: true, eight_bit: false },
    Kind { rank: 1, own_bases: false, refitted: false, eight_bit: false },
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
