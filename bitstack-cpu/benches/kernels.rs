//! Products at level 4 of rank-1 stacks, beside faer's dense f32 product of the same shape (but on 64-bit ARM).
//!
//! `cargo bench -p bitstack-cpu`. 4096 x 4096, one thread and the pool, every instruction set this CPU has; elements per second are weights
//! times tokens. The weight is the same in every round, so one token reads it from the last cache where that is large enough;
//! `bitstack bench kernels` streams weights from memory and compares with a plain read.

use std::hint::black_box;
use std::time::Duration;

use bitstack_core::{
    Basis, Block, BlockRef, Coefficients, Level, Shape, SignMatrix, SignView, Values, WeightStack, f16,
};
use bitstack_cpu::{Isa, Kernel, Scratch, Threads};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
#[cfg(not(target_arch = "aarch64"))]
use faer::{Accum, Mat, Par, linalg::matmul::matmul};

const ROWS: usize = 4096;
const COLS: usize = 4096;
const LEVEL: usize = 4;

fn numbers(n: usize) -> impl Iterator<Item = f32> {
    (0..n).map(|i| ((i * i + 3 * i) % 251) as f32 / 125.0 - 1.0)
}

fn stack() -> WeightStack {
    let mut stack = WeightStack::new(Shape::new(ROWS, COLS).expect("not empty"));
    let values = |n: usize, vectors: usize| Values::I8 {
        codes: numbers(n).map(|x| (x * 100.0) as i8).collect(),
        scales: vec![f16::from_f32(0.01); vectors],
    };
    for planes in 1..=LEVEL {
        let signs: Vec<f32> = numbers(ROWS * COLS + planes).skip(planes).collect();
        let block = Block {
            signs: SignMatrix::from_f32(ROWS, COLS, &signs).expect("the length is rows * cols"),
            basis: (planes == 1).then(|| Basis::new(1, COLS, values(COLS, 1)).expect("the length is cols")),
            coefficients: Coefficients::new(ROWS, planes, 1, values(ROWS * planes, planes)).expect("the lengths fit"),
            spikes: None,
        };
        stack.push(block).expect("the blocks fit");
    }
    stack
}

fn bench(c: &mut Criterion) {
    let stack = stack();
    // Signs as a model in memory has them; which ones they are does not matter to the time.
    let level_in = |layout| {
        let blocks = stack.blocks().iter().map(|block| {
            let bytes = block.signs.as_bytes();
            let signs = SignView::with_layout(ROWS, COLS, layout, bytes).expect("the bytes fit every layout");
            BlockRef { signs, ..block.view() }
        });
        Level::new(stack.shape(), blocks).expect("the blocks fit")
    };
    #[cfg(not(target_arch = "aarch64"))]
    let dense = Mat::from_fn(ROWS, COLS, |r, c| ((r * 7 + c * 3) % 251) as f32 / 125.0 - 1.0);
    for tokens in [1, 4, 16, 64] {
        let mut group = c.benchmark_group(format!("kernels/{tokens}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(1500));
        group.throughput(Throughput::Elements((ROWS * COLS * tokens) as u64));
        let x: Vec<f32> = numbers(tokens * COLS).collect();
        let mut y = vec![0.0; tokens * ROWS];
        for threads in [Threads::One, Threads::Pool] {
            for isa in Isa::available() {
                let kernel = Kernel::with_isa(isa).expect("it is available");
                let level = level_in(kernel.layout());
                let mut scratch = Scratch::default();
                group.bench_function(BenchmarkId::new(isa.to_string(), format!("{threads:?}")), |b| {
                    b.iter(|| kernel.apply(&level, black_box(&x), &mut y, threads, &mut scratch).expect("lengths fit"));
                });
            }
            #[cfg(not(target_arch = "aarch64"))]
            {
                let tokens_as_columns = Mat::from_fn(COLS, tokens, |c, t| x[t * COLS + c]);
                let mut product = Mat::zeros(ROWS, tokens);
                let par = if threads == Threads::One { Par::Seq } else { Par::rayon(0) };
                group.bench_function(BenchmarkId::new("faer-f32", format!("{threads:?}")), |b| {
                    b.iter(|| matmul(&mut product, Accum::Replace, black_box(&dense), &tokens_as_columns, 1.0f32, par));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
