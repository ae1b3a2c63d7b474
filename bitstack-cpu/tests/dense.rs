//! Dense products against the definition in f64: every instruction set, every type, over awkward shapes.

use bitstack_cpu::{CpuError, DenseValues, Isa, Kernel, Threads};
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

type Product = fn(&Kernel, DenseValues<'_>, usize, &[f32], &mut [f32], Threads) -> Result<(), CpuError>;

/// For a few tokens, and for many: both are right for any number.
const PRODUCTS: [Product; 2] = [Kernel::apply_dense, Kernel::apply_dense_to_many];

/// Calls `check` with `w` stored in each type, and with what was stored, in f64.
fn in_each_type(w: &[f32], check: impl Fn(&str, DenseValues<'_>, &[f64])) {
    let wide = |values: &mut dyn Iterator<Item = f32>| values.map(f64::from).collect::<Vec<_>>();
    check("f32", DenseValues::F32(w), &wide(&mut w.iter().copied()));
    let f16s: Vec<f16> = w.iter().map(|&w| f16::from_f32(w)).collect();
    check("f16", DenseValues::F16(&f16s), &wide(&mut f16s.iter().map(|w| w.to_f32())));
    let bf16s: Vec<bf16> = w.iter().map(|&w| bf16::from_f32(w)).collect();
    check("bf16", DenseValues::Bf16(&bf16s), &wide(&mut bf16s.iter().map(|w| w.to_f32())));
}

#[test]
fn dense_products_equal_the_definition_on_any_number_of_threads() {
    let mut rng = StdRng::seed_from_u64(1);
    // The last is more than one task.
    for (rows, cols) in [(1, 1), (3, 15), (5, 16), (2, 63), (7, 64), (4, 129), (1, 1031), (301, 577)] {
        for tokens in (0..=9).chain([40]) {
            // Down to f16's subnormals.
            let w: Vec<f32> =
                (0..rows * cols).map(|i| rng.random_range(-1.0f32..1.0) * 10f32.powi(-(i as i32 % 7))).collect();
            let x: Vec<f32> = (0..tokens * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
            in_each_type(&w, |name, values, exact| {
                let kernels = || Isa::available().filter_map(Kernel::with_isa);
                for (kernel, product) in kernels().flat_map(|kernel| PRODUCTS.map(|product| (kernel, product))) {
                    let mut y = vec![f32::NAN; tokens * rows];
                    product(&kernel, values, cols, &x, &mut y, Threads::One).unwrap();
                    for (y, x) in y.chunks(rows).zip(x.chunks(cols)) {
                        for (y, w) in y.iter().zip(exact.chunks(cols)) {
                            let products = || w.iter().zip(x).map(|(w, x)| w * f64::from(*x));
                            // No element of the sum is rounded more often than it takes to add up all of them one by one.
                            let bound = (cols + 1) as f64 * 2f64.powi(-24) * products().map(f64::abs).sum::<f64>();
                            let error = (f64::from(*y) - products().sum::<f64>()).abs();
                            assert!(error <= bound, "{name}, {rows} x {cols}, {tokens} tokens, {}", kernel.isa());
                        }
                    }
                    let mut pooled = vec![f32::NAN; tokens * rows];
                    product(&kernel, values, cols, &x, &mut pooled, Threads::Pool).unwrap();
                    assert!(y.iter().zip(&pooled).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}: pool");
                }
            });
        }
    }
}

#[test]
fn what_is_not_finite_stays_so_and_in_its_row() {
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        for at in [0, 70] {
            let mut w = vec![0.5; 3 * 71];
            w[71 + at] = bad;
            in_each_type(&w, |name, values, _| {
                let kernels = || Isa::available().filter_map(Kernel::with_isa);
                for (kernel, product) in kernels().flat_map(|kernel| PRODUCTS.map(|product| (kernel, product))) {
                    let mut y = [0.0; 3];
                    product(&kernel, values, 71, &[1.0; 71], &mut y, Threads::One).unwrap();
                    assert!(y[0] == 35.5 && y[2] == 35.5, "{name}, {}: {y:?}", kernel.isa());
                    assert!(y[1] == bad || (y[1].is_nan() && bad.is_nan()), "{name}, {}: {y:?}", kernel.isa());
                }
            });
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused_and_nothing_is_written() {
    let apply = |w: usize, cols: usize, x: usize, y: usize| {
        let (w, x) = (vec![1.0; w], vec![1.0; x]);
        let [few, many] = PRODUCTS.map(|product| {
            let mut y = vec![7.0; y];
            let result = product(&Kernel::detect(), DenseValues::F32(&w), cols, &x, &mut y, Threads::One);
            assert!(result.is_ok() || y.iter().all(|y| *y == 7.0));
            result
        });
        assert_eq!(few, many);
        few
    };
    assert_eq!(apply(6, 3, 3, 2), Ok(()));
    assert_eq!(apply(0, 3, 3, 0), Ok(()));
    assert_eq!(apply(6, 0, 0, 2), Err(CpuError::PartialRow { cols: 0, len: 6 }));
    assert_eq!(apply(7, 3, 3, 2), Err(CpuError::PartialRow { cols: 3, len: 7 }));
    assert_eq!(apply(6, 3, 4, 2), Err(CpuError::PartialToken { cols: 3, len: 4 }));
    assert_eq!(apply(6, 3, 6, 2), Err(CpuError::OutputLength { tokens: 2, rows: 2, expected: 4, actual: 2 }));
}
