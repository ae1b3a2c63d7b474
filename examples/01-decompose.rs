//! A matrix becomes a stack of sign blocks; every further block makes it better.
//!
//! You will learn: the decompose API, what a block costs, and how the error falls with the rank and the number of blocks.
//!
//! `cargo run --release -p bitstack-examples --example 01-decompose` prints a table like
//! ```text
//! rank  blocks  bits per weight  relative error
//!    1       1            1.104           0.590
//!    1       2            2.208           0.345
//! ```

use bitstack_decomp::{DecomposeOptions, decompose};
use ndarray::Array2;
use rand::{RngExt, SeedableRng, rngs::StdRng};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut rng = StdRng::seed_from_u64(1);
    // Nearly Gaussian entries, and columns of very different sizes, as trained weights have.
    let columns: Vec<f32> = (0..384).map(|_| (4.0f32 * rng.random::<f32>() - 2.0).exp2()).collect();
    let weight =
        Array2::from_shape_fn((256, 384), |(_, c)| columns[c] * (0..6).map(|_| rng.random::<f32>() - 0.5).sum::<f32>());

    println!("rank  blocks  bits per weight  relative error");
    for rank in [1, 4, 16] {
        let result = decompose(weight.view(), &DecomposeOptions::new(rank, 6))?;
        for (level, error) in (1..).zip(&result.errors) {
            let bits = result.stack.bytes(level) as f64 * 8.0 / weight.len() as f64;
            println!("{rank:4}  {level:6}  {bits:15.3}  {:14.3}", error.relative_error);
        }
        // Each block fits what the ones before left over, so the error never rises.
        assert!(result.errors.windows(2).all(|e| e[1].relative_error <= e[0].relative_error));

        // Any prefix of the stack is a complete matrix, and its error is the one reported.
        let level = result.stack.level(3)?;
        let rebuilt = Array2::from_shape_vec((256, 384), level.reconstruct())?;
        let norm = |m: &Array2<f32>| m.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let error = norm(&(&weight - &rebuilt)) / norm(&weight);
        assert!((error - result.errors[2].relative_error).abs() < 1e-5);
    }
    Ok(())
}
