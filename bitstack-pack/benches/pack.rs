//! GB/s of packing, unpacking and applying signs, with every instruction set this CPU has, beside a plain copy of the same values.
//!
//! `cargo bench -p bitstack-pack`. Bytes are those of the `f32` values. The copy reads and writes them, packing only reads
//! them, unpacking only writes them, applying does both in place. The three shapes are 256 KiB (fits in a second~isa
//! cache), 64 MiB (does not fit in most), and the latter with rows that end inside a byte.

use std::hint::black_box;
use std::time::Duration;

use bitstack_pack::{Isa, SignMatrix, pack_into_at};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const SHAPES: [(usize, usize); 3] = [(256, 256), (4096, 4096), (4096, 4095)];

/// A fixed mixture of signs and magnitudes, whose period is prime so that misplaced rows do not look right.
fn painted(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * i + 3 * i) % 251) as f32 - 125.0).collect()
}

fn sign(x: f32) -> f32 {
    if x >= 0.0 { 1.0 } else { -1.0 }
}

fn bench(c: &mut Criterion) {
    for (rows, cols) in SHAPES {
        let shape = format!("{rows}x{cols}");
        let values = painted(rows * cols);
        let signs = SignMatrix::from_f32(rows, cols, &values).expect("the length is rows * cols");
        let view = signs.view();
        let expected: Vec<f32> = values.iter().copied().map(sign).collect();
        let mut bytes = vec![0xa5; signs.as_bytes().len()];
        let mut out = vec![f32::NAN; values.len()];

        let mut run = |op: &str, isa: &str, f: &mut dyn FnMut(&mut [u8], &mut [f32])| {
            let mut group = c.benchmark_group(format!("pack/{op}/{isa}"));
            group
                .sample_size(20)
                .warm_up_time(Duration::from_millis(300))
                .measurement_time(Duration::from_millis(1200));
            group.throughput(Throughput::Bytes(size_of_val(values.as_slice()) as u64));
            group.bench_function(BenchmarkId::from_parameter(&shape), |b| b.iter(|| f(&mut bytes, &mut out)));
            group.finish();
        };

        run("copy", "memcpy", &mut |_, out| out.copy_from_slice(black_box(&values)));
        for isa in Isa::available() {
            let name = isa.to_string();

            let pack =
                |bytes: &mut [u8]| pack_into_at(isa, rows, cols, black_box(&values), bytes).expect("lengths fit");
            let mut packed = vec![0x5a; signs.as_bytes().len()];
            pack(&mut packed);
            assert!(view.as_bytes() == packed && view.unpack().expect("fits") == expected, "{name} pack");
            run("pack", &name, &mut |bytes, _| pack(bytes));

            let unpack = |out: &mut [f32]| black_box(view).unpack_into_at(isa, out).expect("lengths fit");
            let mut unpacked = vec![f32::NAN; values.len()];
            unpack(&mut unpacked);
            assert!(unpacked == expected, "{name} unpack");
            run("unpack", &name, &mut |_, out| unpack(out));

            let apply = |out: &mut [f32]| {
                for (row, values) in out.chunks_exact_mut(cols).enumerate() {
                    black_box(view).apply_row_at(isa, row, values);
                }
            };
            unpacked.copy_from_slice(&values);
            apply(&mut unpacked);
            assert!(unpacked.iter().zip(&values).all(|(a, v)| *a == v.abs()), "{name} apply");
            run("apply", &name, &mut |_, out| apply(out));
        }
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
