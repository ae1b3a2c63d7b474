//! Every kernel, run on the CPU under the address and undefined-behaviour sanitizers, against [`Level`] in f64.
//!
//! `shim/driver.cpp` holds the kernel sources and a shim for what they need of a GPU; it is compiled here with g++ and spoken to
//! through pipes. What this covers: all arithmetic, indices, tails, barriers and the layout of memory and parameters. What it does not:
//! the instructions themselves, timing, and memory shared between warps without a barrier in an order that the three tried do not show.
#![expect(clippy::print_stdout, reason = "tests say what they find")]

mod device;
mod oracle;

use crate::plan::{
    BatchParameters, Launch, Limits, ReconstructParameters, Size, batch_launch, reconstruct_launch, spikes_launch,
};
use bitstack_core::{BlockRef, Level, SpikesRef, f16};
use device::{Fused, Kind, Numbers, SMALL, Shim, size};
use oracle::{ADDITIVE, Kinds, SHARED, check_fused, gauss, inputs, spike_sums, stack};
use rand::{SeedableRng, rngs::StdRng};

/// The orders in which the threads of a block get their turn: first come first served, last come first served, at random.
const ORDERS: [u64; 3] = [0, 1, 7];

#[test]
fn fused_products_of_one_shared_basis_are_the_definition() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(1);
    // Rows: one, a whole tile, one more; columns: inside a byte, a unit, a chunk, two, nine chunks for eight warps.
    let shapes = [(1, 1), (16, 128), (17, 7), (33, 600), (15, 512), (50, 1030), (20, 4100)];
    for (i, shape) in shapes.into_iter().enumerate() {
        for planes in [1, 2, 3, 5] {
            for tokens in [1, 3, 4] {
                let kinds =
                    Kinds { eight_bit: planes == 3, refitted: planes != 2, spikes: (planes - 1) * 20, ..SHARED };
                let stacks = [stack(&mut rng, shape, 1, planes, kinds)];
                let x = inputs(&mut rng, [Kind::F32, Kind::F16, Kind::Bf16][i % 3], tokens * shape.1);
                let case = Fused { stacks: &stacks, tokens, y: Kind::F32, limits: SMALL, own: true };
                let y = shim.fused(&case, &x, ORDERS[(i + planes) % 3]);
                check_fused(
                    &stacks[0],
                    &x,
                    tokens,
                    &y[0],
                    Kind::F32,
                    &format!("{shape:?}, {planes} planes, {tokens} tokens"),
                );
            }
        }
    }
}

#[test]
fn fused_products_of_any_rank_and_batch_are_the_definition() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(2);
    for rank in [1, 2, 3, 4, 5, 16, 17] {
        for tokens in 1..=17 {
            if ![1, 2, 4, 16].contains(&rank) && ![1, 2, 5, 17].contains(&tokens) {
                continue;
            }
            let shape = [(33, 600), (17, 130), (5, 1100)][tokens % 3];
            let kinds = Kinds {
                own_bases: tokens % 2 == 0,
                refitted: tokens % 3 == 0,
                eight_bit: tokens % 5 == 0,
                spikes: tokens % 4 * 20,
            };
            let stacks = [stack(&mut rng, shape, rank, 1 + tokens % 4, kinds)];
            let (x_kind, y) =
                ([Kind::F32, Kind::F16, Kind::Bf16][tokens % 3], [Kind::F16, Kind::F32, Kind::Bf16][rank % 3]);
            let x = inputs(&mut rng, x_kind, tokens * shape.1);
            let own = rank == 1 && tokens <= 4 && size(&stacks[0]).bases == 1;
            let case = Fused { stacks: &stacks, tokens, y, limits: SMALL, own };
            let out = shim.fused(&case, &x, ORDERS[tokens % 3]);
            check_fused(
                &stacks[0],
                &x,
                tokens,
                &out[0],
                y,
                &format!("{shape:?}, rank {rank}, {tokens} tokens, {kinds:?}"),
            );
        }
    }
}

#[test]
fn the_order_of_threads_does_not_change_a_bit() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(3);
    for (rank, kinds, own) in [(1, Kinds { spikes: 1500, ..SHARED }, true), (4, ADDITIVE, false)] {
        let stacks = [stack(&mut rng, (70, 1300), rank, 3, kinds)];
        let x = inputs(&mut rng, Kind::F16, 2 * 1300);
        let case = Fused { stacks: &stacks, tokens: 2, y: Kind::F32, limits: SMALL, own };
        let results = ORDERS.map(|order| shim.fused(&case, &x, order));
        assert_eq!(results[0], results[1]);
        assert_eq!(results[0], results[2]);
        // Nor does the number of multiprocessors.
        let many = Fused { limits: Limits { multiprocessors: 100, ..SMALL }, ..case };
        assert_eq!(results[0], shim.fused(&many, &x, 0));
    }
}

#[test]
fn weights_with_one_input_can_share_a_launch() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(4);
    for (rank, kinds, own) in [(1, SHARED, true), (2, ADDITIVE, false), (1, ADDITIVE, false)] {
        let planes_and_rows = [(3, 65), (1, 17), (4, 33), (2, 1)];
        // One launch adds the spikes of those that have some, of several tiles and of one.
        let stacks = planes_and_rows.map(|(planes, rows)| {
            let kinds = Kinds { spikes: if planes % 2 == 0 { 0 } else { rows }, ..kinds };
            stack(&mut rng, (rows, 700), rank, planes, kinds)
        });
        let x = inputs(&mut rng, Kind::F32, 2 * 700);
        for multiprocessors in [1, 3] {
            let limits = Limits { multiprocessors, ..SMALL };
            let y = shim.fused(&Fused { stacks: &stacks, tokens: 2, y: Kind::F32, limits, own }, &x, ORDERS[rank]);
            for (stack, y) in stacks.iter().zip(&y) {
                check_fused(stack, &x, 2, y, Kind::F32, &format!("rank {rank}, {} rows", stack.shape().rows()));
            }
        }
    }
}

#[test]
fn fused_products_are_within_a_thousandth_even_with_outliers() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(5);
    for (rank, kinds, own) in [(1, SHARED, true), (16, ADDITIVE, false)] {
        let stacks = [stack(&mut rng, (48, 4096), rank, 2, kinds)];
        for outliers in [0, 8] {
            let mut x: Vec<f32> = (0..4096).map(|_| gauss(&mut rng)).collect();
            (0..outliers).for_each(|i| x[i * 499] *= 50.0);
            let x = Numbers::new(Kind::F32, &x);
            let case = Fused { stacks: &stacks, tokens: 1, y: Kind::F32, limits: SMALL, own };
            let y = shim.fused(&case, &x, 0);
            let error = check_fused(&stacks[0], &x, 1, &y[0], Kind::F32, "4096 columns");
            println!("rank {rank}, {outliers} outliers: relative error {error:.1e}");
            assert!(error <= 1e-3);
        }
    }
}

#[test]
fn inputs_that_are_not_finite_do_not_go_unnoticed() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(6);
    let stacks = [stack(&mut rng, (18, 600), 1, 2, Kinds { spikes: 30, ..SHARED })];
    for (bad, at) in [(f32::NAN, 3), (f32::INFINITY, 599), (f32::NEG_INFINITY, 512)] {
        let mut x = vec![1.0; 2 * 600];
        x[600 + at] = bad;
        let x = Numbers::new(Kind::F32, &x);
        let y = shim.fused(&Fused { stacks: &stacks, tokens: 2, y: Kind::F32, limits: SMALL, own: true }, &x, 0);
        assert!(y[0][..18].iter().all(|y| y.is_finite()));
        assert!(y[0][18..].iter().all(|y| y.is_nan()));
    }
    // Nothing comes of nothing, and next to nothing of next to nothing: 600 terms below 20, 30 spikes below 1000.
    for small in [0.0, f32::from_bits(1), 1e-37] {
        let x = Numbers::new(Kind::F32, &vec![small; 600]);
        let y = shim.fused(&Fused { stacks: &stacks, tokens: 1, y: Kind::F32, limits: SMALL, own: true }, &x, 0);
        assert!(y[0].iter().all(|&y| y.abs() <= 5e4 * small));
    }
}

#[test]
fn reconstructed_weights_are_those_of_the_reference() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(7);
    for (i, (rank, shape)) in
        [(1, (1, 1)), (2, (67, 7)), (4, (133, 600)), (16, (15, 129)), (17, (16, 1030)), (1, (20, 513))]
            .into_iter()
            .enumerate()
    {
        let kinds =
            Kinds { own_bases: i % 2 == 1, refitted: i % 2 == 0, eight_bit: i == 2, spikes: [0, 300, 80][i % 3] };
        let planes = 1 + i % 4;
        let stack = stack(&mut rng, shape, rank, planes, kinds);
        let expected = stack.level(stack.top_level()).unwrap().reconstruct();
        for kind in [Kind::F32, Kind::F16, Kind::Bf16] {
            let (weight, out) = (shim.weight(&stack), shim.allocate(expected.len() * kind.bytes()));
            let parameters = ReconstructParameters { weight, out, out_type: kind as u32, unused: 0 };
            shim.launch(reconstruct_launch(shape.0, shape.1), ORDERS[i % 3], &parameters);
            let w = kind.read(&shim.download(out, expected.len() * kind.bytes()));
            // Both are f32 sums of rank · planes terms in the same order; contracted multiply-adds round once less. Then come the spikes of
            // a place, which only one of them adds up first: at most all of them, where there is but one place.
            let size = f64::from(expected.iter().fold(0.0f32, |a, b| a.max(b.abs())));
            let at_a_place = if stack.shape().n_elems() < 1000 { kinds.spikes } else { 8.min(kinds.spikes) };
            let terms = (rank * planes + at_a_place) as f64 * size * f64::from(f32::EPSILON);
            for (w, &e) in w.iter().zip(&expected) {
                let bound = 4.0 * terms + kind.rounding() * f64::from(e.abs()) + 2f64.powi(-24);
                assert!((f64::from(*w) - f64::from(e)).abs() <= bound, "{shape:?}, rank {rank}, {kind:?}: {w} for {e}");
            }
        }
    }
}

#[test]
fn batch_products_are_the_definition() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(8);
    let cases = [
        (1, (1, 1), 1),
        (2, (17, 7), 17),
        (1, (65, 200), 129),
        (16, (70, 64), 16),
        (17, (16, 136), 5),
        (4, (64, 513), 128),
    ];
    for (i, (rank, shape, tokens)) in cases.into_iter().enumerate() {
        let kinds = Kinds { own_bases: i % 2 == 1, refitted: i % 2 == 0, eight_bit: i == 3, spikes: i % 3 * 40 };
        let planes = 1 + i % 4;
        let stack = stack(&mut rng, shape, rank, planes, kinds);
        let level = stack.level(stack.top_level()).unwrap();
        let w = level.reconstruct();
        for (kind, kernel) in [(Kind::F16, "batch_half"), (Kind::Bf16, "batch_bfloat")] {
            let x = inputs(&mut rng, kind, tokens * shape.1);
            let y_kind = [Kind::F32, Kind::F16, Kind::Bf16][i % 3];
            let y_bytes = tokens * shape.0 * y_kind.bytes();
            let (weight, x_address, y) = (shim.weight(&stack), shim.upload(&x.bytes), shim.allocate(y_bytes));
            let parameters = BatchParameters {
                weight,
                x: x_address,
                y,
                tokens: tokens as u32,
                x_type: kind as u32,
                y_type: y_kind as u32,
                aligned: u32::from(shape.1.is_multiple_of(8)),
            };
            shim.launch(batch_launch(kernel, shape.0, tokens), ORDERS[i % 3], &parameters);
            if let Some(launch) = spikes_launch(&[size(&stack)], tokens) {
                shim.launch(launch, ORDERS[i % 3], &parameters.for_spikes());
            }
            let y = y_kind.read(&shim.download(y, y_bytes));
            for token in 0..tokens {
                let x = &x.values[token * shape.1..][..shape.1];
                let (expected, spikes) = (level.matvec(x).unwrap(), spike_sums(&level, x));
                for r in 0..shape.0 {
                    // W is rounded to the type of x, then everything is f32; y is rounded, and once more with the spikes, which its
                    // product, and W there, are without.
                    let sum: f64 = w[r * shape.1..][..shape.1].iter().zip(x).map(|(w, x)| f64::from(w * x).abs()).sum();
                    let sum = sum + spikes[r].size;
                    let steps: f64 = x.iter().map(|&x| f64::from(x.abs()) * 2f64.powi(-24)).sum();
                    let f32_sums = (shape.1 + rank * planes) as f64 * f64::from(f32::EPSILON);
                    let bound = (kind.rounding() + f32_sums * 8.0) * sum
                        + steps
                        + spikes[r].bound
                        + y_kind.rounding() * (2.0 * expected[r].abs() + spikes[r].size) * 1.01
                        + 2f64.powi(-24);
                    let error = (f64::from(y[token * shape.0 + r]) - expected[r]).abs();
                    assert!(error <= bound, "{shape:?}, rank {rank}, token {token}, row {r}: {error:e} > {bound:e}");
                }
            }
        }
    }
}

#[test]
fn spikes_are_added_to_what_y_was_for_any_number_of_tiles_entries_and_tokens() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(9);
    // Few entries far apart, so with bridges; more than the 1024 of a step, in one tile and in three of odd height; all at one place.
    let cases = [((130, 3000), 9, 1), ((64, 500), 1500, 4), ((150, 700), 3500, 9), ((1, 1), 1100, 1)];
    for (i, (shape, n, tokens)) in cases.into_iter().enumerate() {
        let kinds = Kinds { eight_bit: i == 1, spikes: n, ..SHARED };
        // At level 2 the coefficients of plane 1 are those of block 2; those of the spikes are not.
        let stack = stack(&mut rng, shape, 1 + i % 2, 2, kinds);
        let x = inputs(&mut rng, [Kind::F32, Kind::F16, Kind::Bf16][i % 3], tokens * shape.1);
        let before = inputs(&mut rng, Kind::F32, tokens * shape.0);
        let launch = spikes_launch(&[size(&stack)], tokens).unwrap();
        // Fewer passes than the tokens need: some blocks do several.
        let launch = Launch { grid: [launch.grid[0], 1, launch.grid[2].min(2)], ..launch };
        let (weight, x_address) = (shim.weight(&stack), shim.upload(&x.bytes));
        let mut results = Vec::new();
        for order in ORDERS {
            let y = shim.upload(&before.bytes);
            let (tokens, x_type) = (tokens as u32, x.kind as u32);
            let parameters = BatchParameters { weight, x: x_address, y, tokens, x_type, y_type: 0, aligned: 0 };
            shim.launch(launch, order, &parameters.for_spikes());
            results.push(Kind::F32.read(&shim.download(y, before.bytes.len())));
        }
        assert!(
            results[0] == results[1] && results[0] == results[2],
            "{shape:?}: the order of threads changes the sums"
        );
        let level = stack.level(2).unwrap();
        for token in 0..tokens {
            for (r, sum) in spike_sums(&level, &x.values[token * shape.1..][..shape.1]).iter().enumerate() {
                let (before, y) = (before.values[token * shape.0 + r], results[0][token * shape.0 + r]);
                let error = (f64::from(y) - f64::from(before) - sum.exact).abs();
                // The last addition rounds y, too.
                let bound = sum.bound + f64::from(f32::EPSILON) * f64::from(before.abs());
                assert!(error <= bound, "{shape:?}, token {token}, row {r}: {error:e} > {bound:e}");
            }
        }
    }
}

#[test]
fn entries_outside_the_weight_add_nothing_and_touch_no_memory() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(10);
    let (rows, cols) = (70, 40);
    let stack = stack(&mut rng, (rows, cols), 1, 1, SHARED);
    // 15 sizes of 1 to 15; 40 entries of size 15 in each of two tiles, rows 0, 7, 14, .. of 64, every second 7 columns on: most of them are
    // beyond the columns, some beyond those of a unit, and in the second tile, which has 6 rows, most are beyond the rows.
    let mut words: Vec<u16> = (1..=15u8).map(|i| f16::from_f32(f32::from(i)).to_bits()).collect();
    words.extend([40, 0, 80, 0]);
    words.extend((0..80).map(|i| (i * 7 % 64) | ((i % 2 * 7) << 6) | (15 << 11)));
    let list = SpikesRef::new(stack.shape(), &words).unwrap();
    assert!(list.check().is_err() && (0..2).all(|tile| list.entries(tile).count() > 0));
    let block = BlockRef { spikes: Some(list), ..stack.blocks()[0].view() };
    let level = Level::new(stack.shape(), [block]).unwrap();

    let x = inputs(&mut rng, Kind::F32, cols);
    let (weight, x_address, y) =
        (shim.weight_of(stack.shape(), [block]), shim.upload(&x.bytes), shim.upload(&[0; 4 * 70]));
    let parameters = BatchParameters { weight, x: x_address, y, tokens: 1, x_type: 0, y_type: 0, aligned: 0 };
    let launch = spikes_launch(&[Size { spikes: true, ..size(&stack) }], 1).unwrap();
    shim.launch(launch, 0, &parameters.for_spikes());
    let y = Kind::F32.read(&shim.download(y, 4 * rows));
    for (sum, y) in spike_sums(&level, &x.values).iter().zip(y) {
        assert!((f64::from(y) - sum.exact).abs() <= sum.bound, "{y} for {}", sum.exact);
    }

    let out = shim.allocate(4 * rows * cols);
    shim.launch(reconstruct_launch(rows, cols), 0, &ReconstructParameters { weight, out, out_type: 0, unused: 0 });
    let w = Kind::F32.read(&shim.download(out, 4 * rows * cols));
    let expected = level.reconstruct();
    // No two entries share a place: sums of two terms, of about 100 at most.
    assert!(w.iter().zip(&expected).all(|(w, e)| (w - e).abs() <= 4.0 * f32::EPSILON * 100.0));
}
