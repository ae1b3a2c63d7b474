//! Rotary frequencies: what each kind of scaling makes of them.

use bitstack_model::RopeConfig;
use bitstack_model::config::{Llama3Scaling, RopeScaling, YarnScaling};
use std::borrow::Cow;
use std::f64::consts::PI;

/// How the pairs of elements of a head turn from position to position.
#[derive(Debug, Clone)]
pub struct Frequencies {
    /// Radians per position of each pair, in sequences that are not longer than `long` says.
    pub(crate) first: Vec<f32>,
    /// Factor of what is rotated.
    amplitude: f32,
    /// Above so many positions, those of this config.
    long: Option<(usize, RopeConfig)>,
}

impl Frequencies {
    /// Those of a config, for heads of which `dim` elements are rotated.
    pub(crate) fn new(config: &RopeConfig, dim: usize) -> Self {
        let long = config.changes_above().map(|positions| (positions, config.clone()));
        Self { first: inverse_frequencies(config, dim, 0), amplitude: config.amplitude() as f32, long }
    }

    /// Radians per position of each pair in a sequence of `len` positions, in f32 whatever the type of the weights, as the Hugging Face library
    /// computes and keeps them; `None` for those of all sequences that are short enough.
    pub(crate) fn of_long(&self, len: usize) -> Option<Vec<f32>> {
        let (_, config) = self.long.as_ref().filter(|(positions, _)| len > *positions)?;
        Some(inverse_frequencies(config, 2 * self.first.len(), len))
    }

    /// Those of a sequence of any length.
    pub(crate) fn of(&self, len: usize) -> Cow<'_, [f32]> {
        self.of_long(len).map_or(Cow::Borrowed(&self.first), Cow::Owned)
    }

    /// Cosine and sine of a pair of elements at one position, times the amplitude. The angle is rounded to f32 as in the reference implementation,
    /// where that rounding is part of what the model was trained with.
    pub(crate) fn angle(&self, position: usize, inverse_frequency: f32) -> (f32, f32) {
        let (sin, cos) = f64::from(position as f32 * inverse_frequency).sin_cos();
        (cos as f32 * self.amplitude, sin as f32 * self.amplitude)
    }
}

/// Radians per position of each of `dim / 2` pairs, in a sequence of `len` positions: theta^(-2i / dim), scaled. The formulas are those of the papers that
/// [`RopeScaling`] names, as the Hugging Face library has them.
fn inverse_frequencies(config: &RopeConfig, dim: usize, len: usize) -> Vec<f32> {
    let size = dim as f64;
    let theta = match config.scaling {
        Some(RopeScaling::Dynamic(dynamic)) if len > dynamic.original_positions => {
            let stretch = dynamic.factor * len as f64 / dynamic.original_positions as f64 - (dynamic.factor - 1.0);
            config.theta * stretch.powf(size / (size - 2.0))
        }
        _ => config.theta,
    };
    let scaled = |i: usize| {
        let frequency = theta.powf(-((2 * i) as f64) / size);
        match &config.scaling {
            None | Some(RopeScaling::Dynamic(_)) => frequency,
            Some(RopeScaling::Linear { factor }) => frequency / factor,
            Some(RopeScaling::Yarn(yarn)) => {
                let stretched = yarn_share(yarn, theta, size, i as f64);
                frequency * (1.0 - stretched + stretched / yarn.factor)
            }
            Some(RopeScaling::LongRope(long)) => {
                let factors = if len > long.original_positions { &long.long_factors } else { &long.short_factors };
                frequency / factors.get(i).copied().unwrap_or(1.0)
            }
            Some(RopeScaling::Llama3(llama3)) => frequency * llama3_share(llama3, frequency),
        }
    };
    (0..dim / 2).map(|i| scaled(i) as f32).collect()
}

/// How much of pair `i` is stretched: 0 for pairs that turn often in the trained context, 1 for those that turn seldom, between them a ramp.
fn yarn_share(yarn: &YarnScaling, theta: f64, dim: f64, i: f64) -> f64 {
    // The pair, as a real number, that turns so often.
    let pair_of = |turns: f64| dim * (yarn.original_positions / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (pair_of(yarn.beta_fast), pair_of(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(dim - 1.0));
    // No ramp at all: the library makes a very steep one.
    let width = if low == high { 1e-3 } else { high - low };
    ((i - low) / width).clamp(0.0, 1.0)
}

/// Factor of a frequency: 1 for short wavelengths, `1 / factor` for long ones, between them interpolated.
fn llama3_share(scaling: &Llama3Scaling, frequency: f64) -> f64 {
    let turns = scaling.original_positions / (2.0 * PI / frequency);
    let range = scaling.high_freq_factor - scaling.low_freq_factor;
    let kept = ((turns - scaling.low_freq_factor) / range).clamp(0.0, 1.0);
    kept + (1.0 - kept) / scaling.factor
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitstack_model::config::{DynamicScaling, LongRopeScaling};

    fn scaled(scaling: RopeScaling) -> RopeConfig {
        RopeConfig { theta: 1e4, scaling: Some(scaling) }
    }

    const YARN: YarnScaling = YarnScaling {
        factor: 4.0,
        original_positions: 128.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        amplitude: 1.5,
    };

    #[test]
    fn yarn_keeps_fast_frequencies_and_stretches_slow_ones() {
        let plain = inverse_frequencies(&RopeConfig { theta: 1e4, scaling: None }, 64, 0);
        let yarn = inverse_frequencies(&scaled(RopeScaling::Yarn(YARN)), 64, 0);
        // By hand: pairs 0 and 1 turn at most 128 / 2π times, so that the ramp begins at floor(32 ln(128 / 64π) / ln 1e4) = -2, that is 0, and ends
        // at ceil(32 ln(128 / 2π) / ln 1e4) = 11.
        assert_eq!(yarn[0], plain[0]);
        let share = 5.0 / 11.0;
        assert!((f64::from(yarn[5] / plain[5]) - (1.0 - share + share / 4.0)).abs() < 1e-6);
        assert!(yarn[11..].iter().zip(&plain[11..]).all(|(y, p)| (y / p - 0.25).abs() < 1e-6));
        // Two pairs that turn as often as each other make no ramp, and nothing that is not a number.
        let steep = YarnScaling { beta_fast: 1.0, truncate: false, ..YARN };
        assert!(inverse_frequencies(&scaled(RopeScaling::Yarn(steep)), 64, 0).iter().all(|f| f.is_finite()));
    }

    #[test]
    fn frequencies_change_with_the_length_where_the_scaling_says_so() {
        let dynamic = DynamicScaling { factor: 2.0, original_positions: 100 };
        let frequencies = Frequencies::new(&scaled(RopeScaling::Dynamic(dynamic)), 8);
        let plain = Frequencies::new(&RopeConfig { theta: 1e4, scaling: None }, 8);
        assert_eq!(frequencies.of(100), plain.of(1000));
        // theta (2 · 150 / 100 - 1)^(8 / 6).
        let grown = RopeConfig { theta: 1e4 * 2f64.powf(8.0 / 6.0), scaling: None };
        assert_eq!(frequencies.of(150), inverse_frequencies(&grown, 8, 0));
        let (short_factors, long_factors) = (vec![1.0, 1.0], vec![2.0, 4.0]);
        let long = LongRopeScaling { short_factors, long_factors, original_positions: 16, amplitude: 1.25 };
        let frequencies = Frequencies::new(&scaled(RopeScaling::LongRope(long)), 4);
        assert_eq!((&frequencies.of(16)[..], &frequencies.of(17)[..]), (&[1.0, 0.01][..], &[0.5, 0.0025][..]));
        assert_eq!(frequencies.angle(0, 1.0), (1.25, 0.0));
    }
}
