//! The decompose API in somebody else's program: a small classifier with its own ndarray weights, shrunk to any size.
//!
//! You will learn: how to collect activation statistics where your model runs, how scaling by them lowers the error that matters, and
//! that nothing else of the model changes.
//!
//! `cargo run --release -p bitstack-examples --example 03-own-model` prints the agreement with the full model, with and without scaling.

use bitstack_core::{ActivationStats, Collect, Scales};
use bitstack_decomp::{DecomposeOptions, decompose};
use ndarray::{Array1, Array2};
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Our model: one hidden layer. It knows nothing of BitStack.
struct Classifier {
    hidden: Array2<f32>,
    output: Array2<f32>,
}

impl Classifier {
    fn classify(&self, inputs: &Array2<f32>) -> Vec<usize> {
        let scores = inputs.dot(&self.hidden.t()).mapv(|x| x.max(0.0)).dot(&self.output.t());
        scores
            .rows()
            .into_iter()
            .map(|r| (0..r.len()).fold(0, |best, i| if r[i] > r[best] { i } else { best }))
            .collect()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut rng = StdRng::seed_from_u64(3);
    let mut random = |rows, cols| Array2::from_shape_fn((rows, cols), |_| rng.random::<f32>() - rng.random::<f32>());
    let model = Classifier { hidden: random(256, 128), output: random(10, 256) };
    // Inputs whose features differ in size by a factor of a hundred, as features do.
    let sizes = Array1::from_shape_fn(128, |c| 10f32.powf(2.0 * c as f32 / 127.0 - 1.0));
    let (calibration, test) = (random(512, 128) * &sizes, random(2000, 128) * &sizes);

    let mut stats = ActivationStats::new(128, Collect::Gram);
    stats.update(calibration.view())?;
    let (scales, gram) = (Scales::rms(&stats)?, stats.gram().expect("it was collected"));

    let answers = model.classify(&test);
    println!("blocks  output error  agreement    output error, scaled  agreement");
    for blocks in 1..=5 {
        let options = DecomposeOptions::new(1, blocks).gram(gram.view());
        let mut row = Vec::new();
        for options in [options.clone(), options.clone().scales(&scales)] {
            let result = decompose(model.hidden.view(), &options)?;
            let hidden =
                Array2::from_shape_vec((256, 128), result.stack.level(result.stack.top_level())?.reconstruct())?;
            let small = Classifier { hidden, output: model.output.clone() };
            let same = small.classify(&test).iter().zip(&answers).filter(|(a, b)| a == b).count();
            let error = result.errors[blocks - 1].output.expect("the Gram matrix was given").relative_error.powi(2);
            row.push((error, same as f64 / answers.len() as f64));
        }
        println!("{blocks:6}  {:12.4}  {:9.3}    {:20.4}  {:9.3}", row[0].0, row[0].1, row[1].0, row[1].1);
        assert!(row[1].0 < row[0].0, "scaling lowers the error of the outputs");
    }
    Ok(())
}
