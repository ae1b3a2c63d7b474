//! Nested codes through the public interface.

use bitstack_core::{ActivationStats, Collect, FactorType, Scales};
use bitstack_decomp::{DecompError, DecomposeOptions, Decomposition, Nested, Threads, blocks, decompose};
use ndarray::{Array1, Array2, ArrayView2, array};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn gaussian(rng: &mut StdRng) -> f64 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// W: Gaussian with lognormal rows and columns. H: a random rotation of a spectrum over three decades, channels of lognormal size.
fn synthetic(rows: usize, cols: usize) -> (Array2<f32>, Array2<f64>) {
    let rng = &mut StdRng::seed_from_u64(0);
    let a: Vec<f64> = (0..rows).map(|_| (0.3 * gaussian(rng)).exp()).collect();
    let b: Vec<f64> = (0..cols).map(|_| (0.4 * gaussian(rng)).exp()).collect();
    let w = Array2::from_shape_fn((rows, cols), |(r, c)| (gaussian(rng) * a[r] * b[c]) as f32);
    let q = faer::Mat::<f64>::from_fn(cols, cols, |_, _| gaussian(rng)).qr().compute_Q();
    let d: Vec<f64> = (0..cols).map(|_| (0.8 * gaussian(rng)).exp()).collect();
    let root =
        Array2::from_shape_fn((cols, cols), |(i, j)| d[i] * q[(i, j)] * 10f64.powf(-1.5 * j as f64 / cols as f64));
    (w, root.dot(&root.t()))
}

fn scales(gram: &Array2<f64>) -> Scales {
    let mut stats = ActivationStats::new(gram.ncols(), Collect::Diagonal);
    let roots = gram.diag().mapv(|h| h.max(0.0).sqrt() as f32);
    stats.update(roots.view().insert_axis(ndarray::Axis(0))).unwrap();
    Scales::rms(&stats).unwrap()
}

fn difference(w: &Array2<f32>, d: &Decomposition, level: u32) -> Array2<f64> {
    let rebuilt = Array2::from_shape_vec(w.dim(), d.stack.level(level).unwrap().reconstruct()).unwrap();
    w.mapv(f64::from) - rebuilt.mapv(f64::from)
}

fn trace(r: &Array2<f64>, gram: &Array2<f64>) -> f64 {
    (r.dot(gram) * r).sum()
}

fn output_errors(d: &Decomposition) -> Vec<f64> {
    d.errors.iter().map(|e| e.output.unwrap().relative_error.powi(2)).collect()
}

#[test]
fn reported_errors_are_those_of_the_stored_blocks() {
    let (w, h) = synthetic(70, 48);
    let s = scales(&h);
    // 70 rows: one whole tile and a part of one. 8 blocks of which 6 are joint.
    let options = DecomposeOptions::nested(8, Nested::default().diagonal(0.1)).scales(&s).gram(h.view());
    let d = decompose(w.view(), &options).unwrap();
    let s = Array1::from_iter(s.as_slice().iter().map(|s| f64::from(*s)));
    let scaled = |r: &Array2<f64>| (r * &s).mapv(|x| x * x).sum();
    let whole = w.mapv(f64::from);
    for (b, error) in (1..).zip(&d.errors) {
        let r = difference(&w, &d, b);
        let output = error.output.unwrap();
        // The stated errors are sums in f32 of 48 terms, over lanes; the last levels lose digits in x − x_b: 1e-3 covers them.
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-3 * b;
        assert!(close(error.squared_error, scaled(&r)), "level {b}: {} and {}", error.squared_error, scaled(&r));
        assert!(close(error.relative_error, (scaled(&r) / scaled(&whole)).sqrt()), "level {b}");
        assert!(
            close(output.squared_error, trace(&r, &h)),
            "level {b}: {} and {}",
            output.squared_error,
            trace(&r, &h)
        );
        assert!(close(output.relative_error, (trace(&r, &h) / trace(&whole, &h)).sqrt()), "level {b}");
    }
}

#[test]
fn what_f16_cannot_hold_is_reported_as_an_error() {
    let (w, h) = synthetic(40, 24);
    let small = |rows: &[usize], cols: &[usize], factor: f32| {
        let mut w = w.clone();
        rows.iter().for_each(|r| w.row_mut(*r).mapv_inplace(|x| x * factor));
        cols.iter().for_each(|c| w.column_mut(*c).mapv_inplace(|x| x * factor));
        w
    };
    // Inputs so large in two channels that what vanishes there is most of the output.
    let large = Array2::from_shape_fn((24, 24), |(i, j)| {
        let size = |c: usize| if c < 2 { 1e12 } else { 1.0 };
        h[(i, j)] * size(i) * size(j)
    });
    let cases = [
        (&w * 1e-25, &h, 1.0..=1.0),
        (&w * 1e-13, &h, 0.0..=1.1),
        (small(&[3, 4, 30], &[], 1e-5), &h, 0.0..=0.1),
        (small(&[3, 4, 30], &[0], 1e-9), &h, 0.0..=0.1),
        (small(&[], &[0, 1, 9], 1e-9), &h, 0.0..=0.1),
        (small(&[], &[0, 1], 1e-9), &large, 0.9..=1.1),
    ];
    for (case, (w, h, expected)) in cases.into_iter().enumerate() {
        for factors in [FactorType::I8, FactorType::F16] {
            let options = DecomposeOptions::nested(6, Nested::default().factors(factors)).gram(h.view());
            let d = decompose(w.view(), &options).unwrap();
            let norm = w.mapv(|x| f64::from(x).powi(2)).sum();
            for (b, error) in (1..).zip(&d.errors) {
                let r = difference(&w, &d, b);
                let output = error.output.unwrap();
                let squared = r.mapv(|x| x * x).sum();
                // As above; H here has condition 1e27, of which the sums in f32 see six digits.
                let close = |a: f64, b: f64, whole: f64| (a - b).abs() <= 1e-3 * b + 1e-6 * whole;
                let at = format!("case {case}, {factors:?}, level {b}: {error:?}, {squared:e}, {:e}", trace(&r, h));
                assert!(close(error.squared_error, squared, 0.0), "{at}");
                assert!(close(error.relative_error, (squared / norm).sqrt(), 0.0), "{at}");
                let whole = trace(&w.mapv(f64::from), h);
                assert!(close(output.squared_error, trace(&r, h), whole), "{at}");
                assert!(close(output.relative_error.powi(2), trace(&r, h) / whole, 1.0), "{at}");
            }
            let last = d.errors[5].output.unwrap().relative_error.powi(2);
            assert!(expected.contains(&last), "case {case}, {factors:?}: {last}");
        }
    }
}

#[test]
fn feedback_gains_the_ratio_of_the_diagonal_to_the_pivots() {
    // Columns that say nothing of each other: no gain. The n - 1 pivots of ρ^|i - j| are 1 - ρ², the last is 1.
    let (n, rho) = (40usize, 0.9f64);
    let w = Array2::from_shape_fn((n, n), |(r, c)| if (r + c) % 2 == 0 { 1.0f32 } else { -1.0 });
    let diagonal = Array2::from_shape_fn((n, n), |(i, j)| if i == j { 1.0 + i as f64 } else { 0.0 });
    let mean = (n + 1) as f64 / 2.0;
    let logs: f64 = (1..=n).map(|i| (i as f64).ln()).sum::<f64>() / n as f64;
    let neighbours = Array2::from_shape_fn((n, n), |(i, j)| rho.powi(i.abs_diff(j) as i32));
    let expected = (1.0 - rho * rho).powf(-((n - 1) as f64) / n as f64);
    // The damping of a hundredth of the diagonal takes a little away: 5 % of the pivots of 0.19 here, and 1 % of the others.
    let gain = bitstack_decomp::feedback_gain(w.view(), diagonal.view()).unwrap();
    assert!((gain / (mean / logs.exp()) - 1.0).abs() < 0.02, "{gain}");
    let gain = bitstack_decomp::feedback_gain(w.view(), neighbours.view()).unwrap();
    assert!(gain < expected && gain > 0.8 * expected, "{gain} of {expected}");
    let wrong = Array2::<f64>::zeros((n, n + 1));
    assert!(bitstack_decomp::feedback_gain(w.view(), wrong.view()).is_err());
}

#[test]
fn settings_for_higher_levels_are_better_there_and_worse_below() {
    let (w, h) = synthetic(128, 256);
    let s = scales(&h);
    let at = |level: f64| {
        // The floor is a price for texts unlike this one, and the higher the level the more is paid.
        let options = DecomposeOptions::nested(8, Nested::around(level).floor(0.002)).scales(&s);
        output_errors(&decompose(w.view(), &options.gram(h.view())).unwrap())
    };
    let errors = [2.5, 3.5, 4.25, 6.0].map(at);
    for pair in errors.windows(2) {
        assert!(pair[0][2] < pair[1][2] && pair[0][6] > pair[1][6], "{pair:?}");
    }
    // Beyond the ends and between the steps there are settings too.
    assert_eq!(at(-100.0), errors[0]);
    assert_eq!(at(100.0), errors[3]);
    let nothing = DecomposeOptions::nested(8, Nested::around(f64::NAN));
    assert!(decompose(w.view(), &nothing).is_err());
}

#[test]
fn four_joint_planes_reach_the_figures_of_the_method() {
    // A research prototype of q = 4 with sweeps reached .079, .0120 and .0022 at levels 2 to 4 (2.1, 3.2 and 4.3 bits per weight, here
    // 2.03, 3.03 and 4.03) on a 768 x 512 matrix of this kind.
    let (w, h) = synthetic(128, 512);
    let s = scales(&h);
    let nested = Nested::default().joint(4).range(1.2, 0.5).level_weights(&[0.3, 1.0, 1.0, 1.1]).damping(0.1);
    let d = decompose(w.view(), &DecomposeOptions::nested(4, nested).scales(&s).gram(h.view())).unwrap();
    let e = output_errors(&d);
    assert!(e[1] < 0.079 && e[2] < 0.012 && e[3] < 0.0022, "{e:?}");
    // Greedy planes of the same rank are several times worse from level 3 on.
    let avd = decompose(w.view(), &DecomposeOptions::new(1, 4).scales(&s).gram(h.view())).unwrap();
    let greedy = output_errors(&avd);
    assert!(greedy[2] > 3.0 * e[2] && greedy[3] > 8.0 * e[3], "{greedy:?} {e:?}");
}

#[test]
fn feedback_sweeps_and_the_gram_matrix_each_help() {
    let (w, h) = synthetic(64, 128);
    let s = scales(&h);
    let run = |sweeps: usize, gram: bool| {
        // Without spikes: those that codes leave bring sweeps of their own.
        let options = DecomposeOptions::nested(6, Nested::default().sweeps(sweeps)).spikes(None).scales(&s);
        let options = if gram { options.gram(h.view()) } else { options };
        let d = decompose(w.view(), &options).unwrap();
        (1..=6).map(|b| (trace(&difference(&w, &d, b), &h) / trace(&w.mapv(f64::from), &h)).ln()).sum::<f64>() / 6.0
    };
    // Means of logarithms over the levels. Measured: 0.64 and 0.10 apart.
    let (blind, feedback, swept) = (run(3, false), run(0, true), run(3, true));
    assert!(feedback < blind - 0.3 && swept < feedback - 0.05, "{blind} {feedback} {swept}");
}

#[test]
fn every_level_improves_on_the_one_before() {
    let (w, h) = synthetic(64, 96);
    let s = scales(&h);
    for joint in [1, 3, 8] {
        let options = DecomposeOptions::nested(10, Nested::default().joint(joint)).scales(&s).gram(h.view());
        let e = output_errors(&decompose(w.view(), &options).unwrap());
        assert!(e.windows(2).all(|e| e[1] < e[0]), "{joint} joint planes: {e:?}");
    }
}

#[test]
fn blocks_share_one_basis_and_the_rows_of_the_first() {
    let (w, h) = synthetic(20, 33);
    for (factors, joint) in [(FactorType::I8, 3), (FactorType::F16, 3), (FactorType::I8, 8)] {
        let nested = Nested::default().joint(joint).factors(factors);
        let steps = blocks(w.view(), &DecomposeOptions::nested(5, nested).spikes(None).gram(h.view())).unwrap();
        assert_eq!(steps.len(), 5);
        for (i, step) in steps.enumerate() {
            let block = step.unwrap().block;
            let layout = block.view().layout().unwrap();
            assert_eq!((layout.rank, layout.planes, layout.basis.is_some()), (1, i + 1, i == 0));
            let eight_bit = factors == FactorType::I8;
            assert_eq!(layout.coefficients, if eight_bit && i > 0 { FactorType::Scales } else { factors });
            // One bit per weight, rows padded to bytes; the envelope once; and for each plane up to this one a scale.
            if eight_bit {
                let more = if i == 0 { 20 + 33 + 4 } else { 2 * (i as u64 + 1) };
                assert_eq!(layout.bytes(), Some(20 * 5 + more));
            }
        }
    }
}

#[test]
fn rows_of_very_different_size_get_f16_coefficients() {
    let (mut w, h) = synthetic(64, 32);
    w.row_mut(5).mapv_inplace(|x| x * 1e3);
    let d = decompose(w.view(), &DecomposeOptions::nested(4, Nested::default()).gram(h.view())).unwrap();
    assert_eq!(d.stack.blocks()[3].view().layout().unwrap().coefficients, FactorType::F16);
    // So the small rows are as good as before: their own relative error at level 4 stays near 1 %.
    let r = difference(&w, &d, 4);
    let (row, whole) =
        (r.row(0).to_owned().insert_axis(ndarray::Axis(0)), w.row(0).mapv(f64::from).insert_axis(ndarray::Axis(0)));
    assert!(trace(&row, &h) < 0.03 * trace(&whole, &h));
}

#[test]
fn threads_do_not_change_the_blocks() {
    let (w, h) = synthetic(200, 70);
    let s = scales(&h);
    let run = |threads, n_threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        let options = DecomposeOptions::nested(7, Nested::default()).scales(&s).gram(h.view()).threads(threads);
        pool.install(|| decompose(w.view(), &options).unwrap())
    };
    let one = run(Threads::One, 1);
    for threads in [1, 2, 5] {
        let many = run(Threads::Pool, threads);
        assert!(one.stack == many.stack && one.errors == many.errors, "{threads} threads");
    }
}

#[test]
fn row_views_and_transposed_weights_are_read_where_they_lie() {
    let (w, h) = synthetic(24, 40);
    let options = DecomposeOptions::nested(3, Nested::default()).gram(h.view());
    let transposed = w.t().as_standard_layout().to_owned();
    let a = decompose(w.view(), &options).unwrap();
    let b = decompose(transposed.t(), &options).unwrap();
    assert!(a.stack == b.stack);
}

#[test]
fn singular_tiny_and_false_gram_matrices_still_give_a_weight() {
    let (w, h) = synthetic(40, 64);
    let x = Array2::from_shape_fn((3, 64), |(t, c)| ((t * 31 + c * 17) % 13) as f64 - 6.0);
    let few_tokens = x.t().dot(&x) / 3.0;
    let mut indefinite = Array2::from_elem((64, 64), 2.0);
    indefinite.diag_mut().fill(1.0);
    let grams = [few_tokens, Array2::zeros((64, 64)), &h * 1e-200, &h * 1e200, indefinite, -h];
    for (i, gram) in grams.iter().enumerate() {
        let d = decompose(w.view(), &DecomposeOptions::nested(4, Nested::default()).gram(gram.view())).unwrap();
        for (b, e) in d.errors.iter().enumerate() {
            let output = e.output.unwrap();
            assert!(e.relative_error.is_finite() && output.squared_error.is_finite(), "gram {i}, level {b}: {e:?}");
            assert!(output.relative_error.is_finite(), "gram {i}, level {b}: {e:?}");
        }
        // The weight itself is approximated, not only what H sees of it. Noise may be shaped, so no more than that is asked, and nothing
        // of the last two, which no inputs have.
        let rebuilt = d.errors[3].squared_error / w.mapv(|x| f64::from(x).powi(2)).sum();
        assert!(rebuilt < 1.0 || i >= 4, "gram {i}: {rebuilt}");
    }
    // With three tokens, three directions matter and the outputs are nearly exact.
    let d = decompose(w.view(), &DecomposeOptions::nested(4, Nested::default()).gram(grams[0].view())).unwrap();
    assert!(output_errors(&d)[3] < 1e-3, "{:?}", output_errors(&d));
}

#[test]
fn products_no_inputs_can_have_leave_the_errors_true() {
    // Found by fuzzing: sums over such a matrix overflowed, and the blocks were others than the ones whose errors were told.
    let w = Array2::from_elem((3, 5), 5.3125f32);
    let gram = Array2::from_shape_fn((5, 5), |(i, j)| if (i + j) % 2 == 0 { 2f64.powi(-127) } else { 0.25 });
    for n_blocks in [1, 3] {
        let d = decompose(w.view(), &DecomposeOptions::nested(n_blocks, Nested::default()).gram(gram.view())).unwrap();
        for (b, error) in (1..).zip(&d.errors) {
            let actual = difference(&w, &d, b).mapv(|x| x * x).sum();
            let norm = w.mapv(|x| f64::from(x).powi(2)).sum();
            // As in `reported_errors_are_those_of_the_stored_blocks`.
            assert!(
                (actual.sqrt() - error.squared_error.sqrt()).abs() < 1e-3 * norm.sqrt(),
                "{b}: {error:?}, {actual}"
            );
            assert!(error.output.unwrap().squared_error.is_finite(), "{b}: {error:?}");
        }
    }
}

#[test]
fn dead_channels_constant_rows_and_zeros_are_handled() {
    let (mut w, mut h) = synthetic(70, 48);
    w.row_mut(3).fill(0.0);
    w.row_mut(4).fill(0.25);
    w.column_mut(7).fill(0.0);
    for c in [7, 11] {
        h.row_mut(c).fill(0.0);
        h.column_mut(c).fill(0.0);
    }
    let s = scales(&h);
    for gram in [true, false] {
        let options = DecomposeOptions::nested(8, Nested::default()).scales(&s);
        let options = if gram { options.gram(h.view()) } else { options };
        let d = decompose(w.view(), &options).unwrap();
        let rebuilt = d.stack.level(8).unwrap().reconstruct();
        assert!(rebuilt[3 * 48..4 * 48].iter().all(|x| *x == 0.0), "a row of zeros stays one");
        assert!((0..70).all(|r| rebuilt[r * 48 + 7] == 0.0), "a column of zeros stays one");
        // A column that no input reaches is still a rounded copy of itself.
        let dead: f32 = (0..70).map(|r| (rebuilt[r * 48 + 11] - w[[r, 11]]).powi(2)).sum();
        assert!(dead < 0.05 * w.column(11).iter().map(|x| x * x).sum::<f32>(), "{dead}");
        assert!(d.errors[7].relative_error < 0.1, "{:?}", d.errors[7]);
    }
}

#[test]
fn a_weight_of_zeros_gives_zeros_and_no_error() {
    let d = decompose(Array2::zeros((5, 9)).view(), &DecomposeOptions::nested(3, Nested::default())).unwrap();
    for (level, error) in (1..=3).zip(&d.errors) {
        assert!(d.stack.level(level).unwrap().reconstruct().iter().all(|x| *x == 0.0));
        assert_eq!((error.squared_error, error.relative_error), (0.0, 0.0));
    }
}

#[test]
fn shapes_of_one_row_one_column_and_one_element_work() {
    for (rows, cols) in [(1, 1), (1, 40), (40, 1), (65, 3)] {
        let (w, h) = synthetic(rows, cols);
        let d = decompose(w.view(), &DecomposeOptions::nested(9, Nested::default()).gram(h.view())).unwrap();
        let output = d.errors[8].output.unwrap().relative_error.powi(2);
        assert!(output < 1e-3, "{rows} x {cols}: {output}");
    }
}

#[test]
fn a_weight_of_signs_times_magnitudes_is_exact_after_one_plane() {
    let w = Array2::from_shape_fn((9, 21), |(r, c)| {
        (if (r * 5 + c * 3) % 7 < 3 { 1.0 } else { -1.0 }) * (1 + r % 3) as f32 * (1 + c % 4) as f32
    });
    let d = decompose(w.view(), &DecomposeOptions::nested(1, Nested::default().factors(FactorType::F16))).unwrap();
    // Basis and coefficients are rounded to f16, 11 bits.
    assert!(d.errors[0].relative_error < 1e-3, "{:?}", d.errors[0]);
}

#[test]
fn sizes_of_weights_do_not_matter_within_the_range_of_f16() {
    let (w, h) = synthetic(32, 48);
    let error = |factor: f32| {
        let d =
            decompose((&w * factor).view(), &DecomposeOptions::nested(4, Nested::default()).gram(h.view())).unwrap();
        d.errors[3].output.unwrap().relative_error.powi(2)
    };
    let one = error(1.0);
    for factor in [1e-6, 1e-3, 1e3, 1e6] {
        // Other roundings of the factors, so other codes here and there.
        assert!((error(factor) / one).ln().abs() < 0.2, "{factor}: {} and {one}", error(factor));
    }
    let options = DecomposeOptions::nested(4, Nested::default());
    let too_large = decompose((&w * 1e12).view(), &options).unwrap_err();
    assert!(matches!(too_large, DecompError::FactorOverflow { block: 1, .. }), "{too_large}");
}

#[test]
fn wrong_input_is_rejected_by_name() {
    let (w, h) = synthetic(4, 6);
    let nested = |n: Nested| DecomposeOptions::nested(2, n);
    let error = |w: ArrayView2<'_, f32>, o: &DecomposeOptions<'_>| decompose(w, o).unwrap_err();
    let default = nested(Nested::default());

    let mut bad = w.clone();
    bad[[1, 2]] = f32::NAN;
    assert!(matches!(error(bad.view(), &default), DecompError::WeightNotFinite { row: 1, col: 2, .. }));
    let mut bad = h.clone();
    bad[[3, 4]] = f64::NAN;
    assert!(matches!(
        error(w.view(), &default.clone().gram(bad.view())),
        DecompError::GramNotFinite { row: 3, col: 4, .. }
    ));
    let narrow = array![[1.0]];
    assert!(matches!(
        error(w.view(), &default.clone().gram(narrow.view())),
        DecompError::GramShape { expected: 6, .. }
    ));
    let s = Scales::none(5);
    assert!(matches!(error(w.view(), &default.clone().scales(&s)), DecompError::ScalesLength { len: 5, cols: 6 }));
    assert!(matches!(error(Array2::zeros((0, 6)).view(), &default), DecompError::Core(_)));
    assert_eq!(error(w.view(), &DecomposeOptions::nested(0, Nested::default())), DecompError::NoBlocks);

    let method = bitstack_decomp::Method::Nested(Nested::default());
    let rank = DecomposeOptions::new(2, 2).method(method);
    assert_eq!(error(w.view(), &rank), DecompError::NestedRank { rank: 2 });
    for bad in [
        Nested::default().joint(0),
        Nested::default().joint(9),
        Nested::default().range(f64::NAN, 0.5),
        Nested::default().range(1.0, 1.0),
        Nested::default().level_weights(&[1.0, 0.0]),
        Nested::default().diagonal(-1.0),
        Nested::default().damping(f64::INFINITY),
    ] {
        assert!(matches!(error(w.view(), &nested(bad)), DecompError::NestedSetting { .. }));
    }
    assert_eq!(
        error(w.view(), &nested(Nested::default().joint(9))).to_string(),
        "the number of joint planes of nested codes must be from 1 to 8, got 9"
    );
}
