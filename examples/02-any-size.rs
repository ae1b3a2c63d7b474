//! One file, three budgets: what is loaded at each, and how good it is.
//!
//! You will learn: how blocks of several weights are ordered by gain per byte, written to one file, and how a budget becomes a plan.
//!
//! `cargo run --release -p bitstack-examples --example 02-any-size` prints, for three budgets, the level of each weight and the error.

use bitstack_decomp::{DecomposeOptions, decompose};
use bitstack_format::{BlockSource, Draft, StackFile};
use bitstack_io::{Existing, write_atomically};
use bitstack_sort::{GainPerByte, Scores, Sizes, Sorter};
use ndarray::Array2;
use rand::{RngExt, SeedableRng, rngs::StdRng};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("three.bitstack");
    let mut rng = StdRng::seed_from_u64(7);

    // Three weights; errors in the second hurt a hundred times as much.
    let weights: Vec<(&str, f64, Array2<f32>)> = [("first", 1.0), ("second", 100.0), ("third", 1.0)]
        .map(|(name, sensitivity)| {
            (name, sensitivity, Array2::from_shape_fn((128, 192), |_| rng.random::<f32>() - rng.random::<f32>()))
        })
        .to_vec();

    // Compress: blocks go to a draft as they come, their order is decided afterwards.
    let mut draft = Draft::create_in(directory.path())?;
    let mut errors = Vec::new();
    for (name, sensitivity, weight) in &weights {
        let result = decompose(weight.view(), &DecomposeOptions::new(2, 8))?;
        draft.push_stack(name, &result.stack, "avd")?;
        errors.push(result.errors.iter().map(|e| sensitivity * e.squared_error).collect::<Vec<f64>>());
    }
    let sizes = Sizes::new(draft.base_bytes(), draft.block_sizes())?;
    let order = GainPerByte::new(Scores::new(errors)).order(&sizes)?;
    write_atomically(&path, Existing::Refuse, |out| draft.finish(order.weights(), out, &mut |_, _| {}))?;

    // Use: open the file, plan for a budget, read only the blocks in the plan.
    let file = StackFile::open_path(&path)?;
    let order = file.load_order()?;
    println!("  budget  resident  levels       weighted squared error");
    let mut last = f64::INFINITY;
    for budget in [15_000, 30_000, 60_000] {
        let plan = order.plan(budget)?;
        let mut error = 0.0;
        for (w, (_, sensitivity, weight)) in weights.iter().enumerate() {
            let stack = file.read_stack(w, plan.levels[w])?;
            let level = stack.level(plan.levels[w])?;
            let distance = |(a, b): (&f32, f32)| f64::from(a - b).powi(2);
            error += sensitivity * weight.iter().zip(level.reconstruct()).map(distance).sum::<f64>();
        }
        println!("{budget:8}  {:8}  {:?}    {error:14.1}", plan.resident_bytes, plan.levels);
        assert!(plan.resident_bytes <= budget && error < last);
        assert!(plan.levels[1] >= plan.levels[0], "the sensitive weight comes first");
        last = error;
    }
    Ok(())
}
