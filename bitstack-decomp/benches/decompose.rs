//! Time per block of absolute-value decomposition and time of nested codes (all eight blocks), on one thread. `decomp/avd/exact` is the full thin SVD that the fast way replaces.

use bitstack_decomp::{DecomposeOptions, Nested, Svd, decompose};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::hint::black_box;
use std::time::Duration;

/// Sums of uniform values, in columns of different size.
fn weight(n: usize) -> Array2<f32> {
    let rng = &mut StdRng::seed_from_u64(1);
    Array2::from_shape_fn((n, n), |(_, c)| {
        (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * (1 + c % 7) as f32
    })
}

/// Four blocks, so that three of them start warm.
fn fast(c: &mut Criterion) {
    let mut group = c.benchmark_group("decomp/avd/fast");
    for n in [512, 1024, 2048] {
        let w = weight(n);
        for rank in [1, 4, 16] {
            group.throughput(Throughput::Elements(4 * w.len() as u64));
            group.bench_with_input(BenchmarkId::new(format!("rank{rank}"), n), &w, |b, w| {
                b.iter(|| decompose(black_box(w.view()), &DecomposeOptions::new(rank, 4)));
            });
        }
    }
}

fn exact(c: &mut Criterion) {
    let mut group = c.benchmark_group("decomp/avd/exact");
    for n in [256, 512] {
        let w = weight(n);
        group.throughput(Throughput::Elements(w.len() as u64));
        group.bench_with_input(BenchmarkId::new("rank16", n), &w, |b, w| {
            b.iter(|| decompose(black_box(w.view()), &DecomposeOptions::new(16, 1).svd(Svd::Exact)));
        });
    }
}

/// What the closed-form error of the outputs adds.
fn gram(c: &mut Criterion) {
    let mut group = c.benchmark_group("decomp/avd/gram");
    for n in [512, 1024] {
        let (w, h) = (weight(n), Array2::eye(n));
        group.throughput(Throughput::Elements(4 * w.len() as u64));
        group.bench_with_input(BenchmarkId::new("rank16", n), &w, |b, w| {
            b.iter(|| decompose(black_box(w.view()), &DecomposeOptions::new(16, 4).gram(h.view())));
        });
    }
}

/// All blocks of a weight. The time does not depend on what H is.
fn nested(c: &mut Criterion) {
    let mut group = c.benchmark_group("decomp/nested/gram");
    for n in [512, 1024] {
        let (w, h) = (weight(n), Array2::eye(n));
        group.throughput(Throughput::Elements(w.len() as u64));
        group.bench_with_input(BenchmarkId::new("eight_blocks", n), &w, |b, w| {
            b.iter(|| decompose(black_box(w.view()), &DecomposeOptions::nested(8, Nested::default()).gram(h.view())));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(2));
    targets = fast, exact, gram, nested
}
criterion_main!(benches);
