//! Absolute-value decomposition beside nested codes: the error of a weight's outputs at every level, and the bits it takes, on a
//! synthetic weight with correlated inputs.
//!
//!     cargo run --release -p bitstack-decomp --example nested [ROWS COLS]

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use bitstack_core::{ActivationStats, Collect, Scales};
use bitstack_decomp::{DecomposeOptions, Nested, Threads, decompose};
use ndarray::{Array2, Axis};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::time::Instant;

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
        faer::Mat::<f64>::from_fn(cols, cols, |i, j| d[i] * q[(i, j)] * 10f64.powf(-1.5 * j as f64 / cols as f64));
    let h = &root * root.transpose();
    (w, Array2::from_shape_fn((cols, cols), |(i, j)| h[(i, j)]))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let sizes: Vec<usize> = std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let (rows, cols) = if let [rows, cols] = sizes[..] { (rows, cols) } else { (768, 512) };
    let (w, h) = synthetic(rows, cols);
    let mut stats = ActivationStats::new(cols, Collect::Diagonal);
    stats.update(h.diag().mapv(|h| h.sqrt() as f32).view().insert_axis(Axis(0)))?;
    let scales = Scales::rms(&stats)?;

    let default = Nested::default();
    let blind = DecomposeOptions::nested(8, default.clone());
    let settings = [
        ("avd, rank 1", DecomposeOptions::new(1, 8)),
        ("nested, without H", blind.clone()),
        ("nested, feedback only", DecomposeOptions::nested(8, default.clone().sweeps(0))),
        ("nested", blind),
        ("nested, around level 2.5", DecomposeOptions::nested(8, Nested::around(2.5))),
        ("nested, around level 6", DecomposeOptions::nested(8, Nested::around(6.0))),
        (
            "nested, 4 joint",
            DecomposeOptions::nested(
                8,
                default.clone().joint(4).range(1.2, 0.5).level_weights(&[0.3, 1.0, 1.0, 1.1]).damping(0.1),
            ),
        ),
        ("nested, wide range", DecomposeOptions::nested(8, Nested::around(6.0).range(1.97, 0.5))),
    ];
    println!("output error relative to the output (squares), at bits per weight");
    for (name, options) in settings {
        let options = options.scales(&scales).threads(Threads::Pool);
        // The blind one is measured with H all the same.
        let start = Instant::now();
        let d = if name == "nested, without H" {
            decompose(w.view(), &options)?
        } else {
            decompose(w.view(), &options.gram(h.view()))?
        };
        let rate = w.len() as f64 / start.elapsed().as_secs_f64();
        print!("{name:25}");
        for level in 1..=8 {
            let error = match d.errors[level as usize - 1].output {
                Some(output) => output.relative_error.powi(2),
                None => {
                    let whole = w.mapv(f64::from);
                    let rebuilt = Array2::from_shape_vec((rows, cols), d.stack.level(level)?.reconstruct())?;
                    let r = &whole - &rebuilt.mapv(f64::from);
                    (r.dot(&h) * r).sum() / (whole.dot(&h) * whole).sum()
                }
            };
            print!("  {:.2}: {error:.5}", d.stack.bytes(level) as f64 * 8.0 / w.len() as f64);
        }
        println!("  {:.2} M weights/s", rate / 1e6);
    }
    Ok(())
}
