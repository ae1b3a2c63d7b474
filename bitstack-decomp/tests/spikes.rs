//! Weights far outside the others, through the public interface of nested codes.

use bitstack_decomp::{DecomposeOptions, Decomposition, Nested, Threads, decompose};
use ndarray::{Array2, ArrayView2};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const ROWS: usize = 150;
const COLS: usize = 96;

fn gaussian(rng: &mut StdRng) -> f64 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// A Gaussian weight, and H of correlated inputs.
fn plain() -> (Array2<f32>, Array2<f64>) {
    let rng = &mut StdRng::seed_from_u64(3);
    let w = Array2::from_shape_fn((ROWS, COLS), |_| gaussian(rng) as f32);
    let mix = Array2::from_shape_fn((COLS, COLS), |(i, j)| gaussian(rng) * 0.93f64.powi(j as i32) + f64::from(i == j));
    (w, mix.dot(&mix.t()))
}

fn nested(w: &Array2<f32>, h: ArrayView2<'_, f64>, options: DecomposeOptions<'_>) -> Decomposition {
    decompose(w.view(), &options.gram(h)).unwrap()
}

fn options() -> DecomposeOptions<'static> {
    DecomposeOptions::nested(8, Nested::default())
}

fn rebuilt(d: &Decomposition, level: u32) -> Array2<f32> {
    Array2::from_shape_vec((ROWS, COLS), d.stack.level(level).unwrap().reconstruct()).unwrap()
}

fn output_error(w: &Array2<f32>, d: &Decomposition, h: &Array2<f64>, level: u32) -> f64 {
    let e = w.mapv(f64::from) - rebuilt(d, level).mapv(f64::from);
    (e.dot(h) * &e).sum()
}

#[test]
fn reported_errors_are_those_of_the_stored_blocks_and_their_spikes() {
    let (mut w, h) = plain();
    for (at, factor) in [((3, 7), 12.0), ((70, 95), -25.0), ((149, 0), 8.0), ((149, 1), 40.0)] {
        w[at] = factor;
    }
    for gram in [true, false] {
        let d = if gram { nested(&w, h.view(), options()) } else { decompose(w.view(), &options()).unwrap() };
        assert!(d.stack.blocks()[0].spikes.is_some());
        for (level, error) in (1..).zip(&d.errors) {
            let e = w.mapv(f64::from) - rebuilt(&d, level).mapv(f64::from);
            // Sums in f32 of 96 terms; the last levels lose digits in x − x_b: 1e-3 covers them.
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-3 * b;
            assert!(close(error.squared_error, e.mapv(|e| e * e).sum()), "level {level}, H {gram}");
            if let Some(output) = error.output {
                let whole = w.mapv(f64::from);
                assert!(close(output.squared_error, (e.dot(&h) * &e).sum()), "level {level}");
                let relative = (e.dot(&h) * &e).sum() / (whole.dot(&h) * &whole).sum();
                assert!(close(output.relative_error.powi(2), relative), "level {level}");
            }
        }
    }
}

#[test]
fn a_weight_ten_thousand_times_the_rest_costs_the_rest_little() {
    let (w, h) = plain();
    let before = nested(&w, h.view(), options());
    for (row, col) in [(0, 0), (77, 50), (149, 95)] {
        let mut spiked = w.clone();
        spiked[[row, col]] = 1e4;
        let with = nested(&spiked, h.view(), options());
        let without = nested(&spiked, h.view(), options().spikes(None));
        for level in [2, 4, 6] {
            let base = output_error(&w, &before, &h, level);
            let (with, without) = (output_error(&spiked, &with, &h, level), output_error(&spiked, &without, &h, level));
            assert!(with < 2.0 * base, "({row}, {col}), level {level}: {with}, {base} without the spike");
            assert!(without > 10.0 * with, "({row}, {col}), level {level}: {without} without a list, {with} with one");
        }
    }
}

#[test]
fn rows_and_columns_a_hundred_times_the_rest_are_the_envelopes_and_not_the_lists() {
    let (w, h) = plain();
    let n_entries = |d: &Decomposition| d.stack.blocks()[0].spikes.as_ref().map_or(0, |list| list.view().n_entries());
    let before = nested(&w, h.view(), options());
    let mut row = w.clone();
    row.row_mut(5).mapv_inplace(|x| 100.0 * x);
    let mut col = w.clone();
    col.column_mut(9).mapv_inplace(|x| 100.0 * x);
    for (what, scaled) in [("row", row), ("column", col)] {
        let d = nested(&scaled, h.view(), options());
        // The list is not the place for them: at most one weight in a hundred more.
        assert!(n_entries(&d) <= n_entries(&before) + ROWS * COLS / 100, "{what}: {}", n_entries(&d));
        for level in [2, 4, 6] {
            let relative = |w: &Array2<f32>, d: &Decomposition| {
                let whole = w.mapv(f64::from);
                output_error(w, d, &h, level) / (whole.dot(&h) * &whole).sum()
            };
            assert!(relative(&scaled, &d) < 2.0 * relative(&w, &before), "{what}, level {level}");
        }
    }
}

#[test]
fn inputs_hundreds_of_times_the_rest_do_not_spoil_a_weight_with_spikes() {
    // The super weights of trained models: a large weight meets a massive input.
    let (mut w, mut h) = plain();
    w[[10, 20]] = 22.0;
    w[[11, 20]] = -30.0;
    h.row_mut(20).mapv_inplace(|x| 300.0 * x);
    h.column_mut(20).mapv_inplace(|x| 300.0 * x);
    let relative = |d: &Decomposition, level: u32| d.errors[level as usize - 1].output.unwrap().relative_error.powi(2);
    let with = nested(&w, h.view(), options());
    let without = nested(&w, h.view(), options().spikes(None));
    for level in [2, 4, 6, 8] {
        let (with, without) = (relative(&with, level), relative(&without, level));
        assert!(with < 0.5 * without, "level {level}: {with}, {without} without a list");
    }
    assert!(relative(&with, 8) < 0.05 * relative(&without, 8), "{} {}", relative(&with, 8), relative(&without, 8));
}

#[test]
fn threads_do_not_change_the_spikes() {
    let (mut w, h) = plain();
    w[[100, 3]] = 50.0;
    let d = [Threads::One, Threads::Pool].map(|p| nested(&w, h.view(), options().threads(p)));
    assert_eq!(d[0].stack, d[1].stack);
    assert_eq!(d[0].errors, d[1].errors);
}
