//! Decomposing any small matrix, finite or not, under any scales, Gram matrix and settings, ends in blocks or an error. Blocks make a level at
//! every length, their values are finite, and the error that is reported is that of the weight they rebuild.
#![no_main]

use arbitrary::Arbitrary;
use bitstack_core::{ActivationStats, Collect, FactorType, Scales, WeightStack};
use bitstack_decomp::{DecomposeOptions, Method, Nested, Svd, blocks};
use libfuzzer_sys::fuzz_target;
use ndarray::{Array2, ArrayView2};

#[derive(Debug, Arbitrary)]
struct Input {
    rows: u8,
    cols: u8,
    rank: u8,
    n_blocks: u8,
    weight: Numbers,
    inputs: Option<Numbers>,
    with_scales: bool,
    gram: Option<Numbers>,
    method: How,
    seed: u64,
}

#[derive(Debug, Arbitrary)]
enum How {
    Fast,
    Exact,
    Nested {
        joint: u8,
        sweeps: u8,
        range: f64,
        ratio: f64,
        level_weights: Vec<f64>,
        diagonal: f64,
        damping: f64,
        halves: bool,
    },
    Default,
}

/// Elements of a matrix, taken in a circle.
#[derive(Debug, Arbitrary)]
enum Numbers {
    /// Ordinary ones.
    Small(Vec<i8>),
    /// Of very different sizes.
    Powers(Vec<(bool, i8)>),
    /// Any bits: NaNs, infinities and denormals too.
    Bits(Vec<u32>),
}

impl Numbers {
    fn matrix(&self, rows: usize, cols: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(r, c)| {
            let i = r * cols + c;
            match self {
                Self::Small(v) if !v.is_empty() => f32::from(v[i % v.len()]) / 16.0,
                Self::Powers(v) if !v.is_empty() => {
                    let (minus, power) = v[i % v.len()];
                    if minus { -f32::from(power).exp2() } else { f32::from(power).exp2() }
                }
                Self::Bits(v) if !v.is_empty() => f32::from_bits(v[i % v.len()]),
                _ => 0.0,
            }
        })
    }
}

/// ‖(W − W_b)·diag(s)‖² in f64.
fn squared_error(weight: ArrayView2<'_, f32>, rebuilt: &[f32], scales: &[f32]) -> f64 {
    let elements = weight.iter().zip(rebuilt).enumerate();
    elements.map(|(i, (w, r))| ((f64::from(*w) - f64::from(*r)) * f64::from(scales[i % scales.len()])).powi(2)).sum()
}

fuzz_target!(|input: Input| {
    let (rows, cols) = (usize::from(input.rows % 20), usize::from(input.cols % 40));
    let n_blocks = usize::from(input.n_blocks % 10);
    let rank = usize::from(input.rank % 8);
    let weight = input.weight.matrix(rows, cols);

    let mut stats = ActivationStats::new(cols, Collect::Gram);
    let mut scales = None;
    if let Some(inputs) = &input.inputs {
        if stats.update(inputs.matrix(7, cols).view()).is_err() {
            return;
        }
        scales = Scales::rms(&stats).ok().filter(|_| input.with_scales);
    }
    let gram: Option<Array2<f64>> = match (&input.gram, stats.gram()) {
        (Some(gram), _) => Some(gram.matrix(cols, cols).mapv(f64::from)),
        (None, gram) => gram,
    };

    let nested = matches!(input.method, How::Nested { .. } | How::Default);
    let mut options = match input.method {
        How::Fast => DecomposeOptions::new(rank, n_blocks),
        How::Exact => DecomposeOptions::new(rank, n_blocks).svd(Svd::Exact),
        How::Default => DecomposeOptions::nested(n_blocks, Nested::default()),
        How::Nested { joint, sweeps, range, ratio, level_weights, diagonal, damping, halves } => {
            let nested = Nested::default()
                .joint(usize::from(joint % 10))
                .sweeps(usize::from(sweeps % 4))
                .range(range, ratio)
                .level_weights(&level_weights)
                .diagonal(diagonal)
                .damping(damping)
                .factors(if halves { FactorType::F16 } else { FactorType::I8 });
            DecomposeOptions::new(rank, n_blocks).method(Method::Nested(nested))
        }
    };
    options = options.seed(input.seed);
    let ones = vec![1.0; cols];
    let mut s = &ones[..];
    if let Some(scales) = &scales {
        s = scales.as_slice();
        options = options.scales(scales);
    }
    if let Some(gram) = &gram {
        options = options.gram(gram.view());
    }

    let Ok(steps) = blocks(weight.view(), &options) else { return };
    assert!(weight.iter().all(|w| w.is_finite()), "a weight that is not finite is an error");
    let norm = squared_error(weight.view(), &vec![0.0; rows * cols], s);
    let mut stack: Option<WeightStack> = None;
    for step in steps {
        let Ok(step) = step else { return };
        let shape = step.block.view().layout().expect("a block has a layout").shape;
        let stack = stack.get_or_insert_with(|| WeightStack::new(shape));
        stack.push(step.block).expect("the block fits those before it");
        let error = step.error;
        assert!(error.squared_error >= 0.0 && error.relative_error >= 0.0, "{error:?}");
        assert!(error.squared_error.is_finite() && error.relative_error.is_finite(), "{error:?}");
        if let Some(output) = error.output {
            assert!(output.squared_error >= 0.0 && output.relative_error >= 0.0, "{output:?}");
        }
        let level = stack.top_level();
        let rebuilt = stack.level(level).expect("it has so many").reconstruct();
        assert!(rebuilt.iter().all(|r| r.is_finite()), "level {level} is not finite");
        let actual = squared_error(weight.view(), &rebuilt, s);
        // Sums in f32 of at most 10 planes of rank 8, relative to the weight: far below this.
        let tolerance = 1e-4 * norm.max(actual) + 1e-60;
        assert!(
            (actual.sqrt() - error.squared_error.sqrt()).powi(2) <= tolerance,
            "level {level}, nested {nested}: error {} reported, {actual} found, weight {norm}",
            error.squared_error
        );
    }
});
