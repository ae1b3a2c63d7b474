//! Rotary positions, as a config describes them.

use super::fields::{Fields, bad};
use super::limit;
use crate::ModelError;
use serde_json::Value;

/// Frequencies of the rotary position embedding.
///
/// Pair i of the d rotated elements of a head turns by `theta^(-2i / d)` radians per position, which `scaling` changes.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How frequencies are changed for contexts longer than those of the training.
    pub scaling: Option<RopeScaling>,
}

/// A scaling of rotary frequencies, by the names of the `rope_type` of configs.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// `linear`: all frequencies divided by a factor (position interpolation, arXiv 2306.15595).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// `dynamic`: beyond the trained positions the base grows with the length of the sequence (dynamic NTK).
    Dynamic(DynamicScaling),
    /// `yarn` (arXiv 2309.00071).
    Yarn(YarnScaling),
    /// `longrope` (arXiv 2402.13753).
    LongRope(LongRopeScaling),
    /// `llama3`.
    Llama3(Llama3Scaling),
}

/// Parameters of dynamic NTK scaling: a sequence of n > `original_positions` =: L has the base
/// `theta (factor n / L - (factor - 1))^(d / (d - 2))` instead of `theta`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DynamicScaling {
    /// The factor.
    pub factor: f64,
    /// Up to so many positions nothing changes.
    pub original_positions: usize,
}

/// Parameters of YaRN: frequencies that turn more than `beta_fast` times in the trained context are kept, those that turn less than `beta_slow` times
/// are divided by `factor`, those between are interpolated by the number of their pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnScaling {
    /// Long wavelengths are stretched by this factor.
    pub factor: f64,
    /// Context length of the training before the extension.
    pub original_positions: f64,
    /// Turns above which a frequency is kept.
    pub beta_fast: f64,
    /// Turns below which it is stretched in full.
    pub beta_slow: f64,
    /// Whether the pairs at which interpolation begins and ends are rounded outwards to whole numbers.
    pub truncate: bool,
    /// Factor of rotated queries and keys: `attention_factor` of a config, or 0.1 ln(factor) + 1, or the ratio of two such terms with `mscale` and `mscale_all_dim` before
    /// the logarithm.
    pub amplitude: f64,
}

/// Parameters of LongRoPE: frequencies divided by factors of their own, one set for sequences of up to `original_positions`, one for longer ones.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRopeScaling {
    /// Divisors in sequences of up to `original_positions`, one per pair.
    pub short_factors: Vec<f64>,
    /// Divisors in longer sequences.
    pub long_factors: Vec<f64>,
    /// Context length of the training before the extension.
    pub original_positions: usize,
    /// Factor of rotated queries and keys: `attention_factor` of a config, or sqrt(1 + ln(factor) / ln(original_positions)).
    pub amplitude: f64,
}

/// Parameters of the Llama 3.1 scaling of rotary frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Long wavelengths are stretched by this factor.
    pub factor: f64,
    /// Wavelengths above `original_positions / low_freq_factor` are stretched in full.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_positions / high_freq_factor` are left alone.
    pub high_freq_factor: f64,
    /// Context length of the training before the extension.
    pub original_positions: f64,
}

impl RopeConfig {
    /// Factor of rotated queries and keys: 1 but for YaRN and LongRoPE.
    pub fn amplitude(&self) -> f64 {
        match &self.scaling {
            Some(RopeScaling::Yarn(yarn)) => yarn.amplitude,
            Some(RopeScaling::LongRope(long)) => long.amplitude,
            _ => 1.0,
        }
    }

    /// The longest sequence with the first frequencies, where longer ones have others: with dynamic scaling and LongRoPE.
    ///
    /// A pass uses the frequencies of the length that its sequence has at its end. Keys in a cache stay as they were rotated, so a sequence that
    /// grows past this length token by token is not quite the one that is run in one pass; the Hugging Face library does the same.
    pub fn changes_above(&self) -> Option<usize> {
        match &self.scaling {
            Some(RopeScaling::Dynamic(dynamic)) => Some(dynamic.original_positions),
            Some(RopeScaling::LongRope(long)) => Some(long.original_positions),
            _ => None,
        }
    }

    /// Positions for which the scaling is made, of a config that names `max_positions`: configs differ in whether that is the number before
    /// or after the extension.
    pub(super) fn positions(&self, max_positions: usize) -> usize {
        let extended = match &self.scaling {
            Some(RopeScaling::Linear { factor }) => factor * max_positions as f64,
            Some(RopeScaling::Dynamic(dynamic)) => dynamic.factor * max_positions as f64,
            Some(RopeScaling::Yarn(yarn)) => yarn.factor * yarn.original_positions,
            _ => 0.0,
        };
        max_positions.max(extended.min(limit::POSITIONS as f64) as usize)
    }
}

/// The rotary tables of a model.
#[derive(Debug, Clone)]
pub(super) struct Ropes {
    pub(super) tables: Vec<RopeConfig>,
    /// Which table a layer without a window has, and one with a window.
    pub(super) full: usize,
    pub(super) sliding: usize,
}

const MAX_THETA: f64 = 1e12;
const MAX_FACTOR: f64 = 1e6;
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

impl Fields<'_> {
    /// The rotary tables, for `dim` rotated elements of a head.
    ///
    /// As in the Hugging Face library (5.24), `rope_scaling` goes before `rope_parameters`, as a whole; `rope_theta`, `partial_rotary_factor` and
    /// `original_max_position_embeddings` may stand beside them. With `layer_types` they may hold a set for each type of layer.
    pub(super) fn ropes(&self, dim: usize) -> Result<Ropes, ModelError> {
        let outer_theta = self.number("rope_theta", 10_000.0, 0.0, MAX_THETA)?;
        let outer_part = self.number("partial_rotary_factor", 1.0, 0.0, 1.0)?;
        let is_set = |field: &str| self.get(field).is_some_and(|v| v.as_object().is_none_or(|o| !o.is_empty()));
        let (scaling, parameters) = (is_set("rope_scaling"), is_set("rope_parameters"));
        let field = if scaling { "rope_scaling" } else { "rope_parameters" };
        if !scaling && !parameters {
            let plain = RopeConfig { theta: outer_theta, scaling: None };
            return Ok(Ropes { tables: vec![plain], full: 0, sliding: 0 });
        }
        let whole = self.object(field)?;
        if scaling && parameters {
            // Whatever else these say would be forgotten.
            let other = self.object("rope_parameters")?;
            for (name, default) in [("rope_theta", outer_theta), ("partial_rotary_factor", outer_part)] {
                let number = |fields: &Fields<'_>| fields.number(name, default, 0.0, MAX_THETA);
                let (used, forgotten) = (number(&whole)?, number(&other)?);
                if used != forgotten {
                    let expected =
                        format!("the {forgotten} of rope_parameters beside rope_scaling; write it into both");
                    return Err(bad(name, used, expected));
                }
            }
        }
        let types = [FULL, SLIDING];
        if types.iter().all(|kind| whole.get(kind).is_none()) {
            let table = self.rope(&whole, field, outer_theta, dim, true)?;
            return Ok(Ropes { tables: vec![table], full: 0, sliding: 0 });
        }
        if self.get("layer_types").is_none() {
            return Err(self.bad(field, "one set of parameters, as there are no layer_types"));
        }
        let mut tables = Vec::new();
        let mut places = [0; 2];
        for (kind, place) in types.into_iter().zip(&mut places) {
            if whole.get(kind).is_some() {
                *place = tables.len();
                tables.push(self.rope(&whole.object(kind)?, field, outer_theta, dim, false)?);
            }
        }
        whole.check_known(field, |_, _| false)?;
        Ok(Ropes { tables, full: places[0], sliding: places[1] })
    }

    /// One table, from its parameters. `is_whole`: they are those of all layers.
    fn rope(
        &self,
        inner: &Fields<'_>,
        field: &'static str,
        theta: f64,
        dim: usize,
        is_whole: bool,
    ) -> Result<RopeConfig, ModelError> {
        let theta = inner.number("rope_theta", theta, 0.0, MAX_THETA)?;
        let part = inner.number("partial_rotary_factor", 1.0, 0.0, 1.0)?;
        if part != 1.0 && !is_whole {
            return Err(inner.bad("partial_rotary_factor", "one for all layers"));
        }
        // What the makers of old checkpoints wrote down.
        inner.get("finetuned");
        let (kind, old) = (inner.get("rope_type"), inner.get("type"));
        let kind = kind.or(old).map(|v| v.as_str().ok_or_else(|| inner.bad("rope_type", "text"))).transpose()?;
        let max_positions = self.dimension("max_position_embeddings", limit::POSITIONS)?;
        // In a set for all layers the number beside it wins.
        let outer = self.get("original_max_position_embeddings").filter(|_| is_whole);
        inner.know(&["original_max_position_embeddings"]);
        let original = |default: usize| match outer {
            Some(_) => self.dimension("original_max_position_embeddings", limit::POSITIONS),
            None if inner.get("original_max_position_embeddings").is_none() => Ok(default),
            None => inner.dimension("original_max_position_embeddings", limit::POSITIONS),
        };
        let factor = || inner.required_number("factor", MAX_FACTOR);
        let scaling = match kind {
            None if inner.get("factor").is_some() => {
                let expected = "a set with a rope_type: without one the factor would count for nothing";
                return Err(self.bad(field, expected));
            }
            None | Some("default") => {
                original(max_positions)?;
                None
            }
            Some("linear") => Some(RopeScaling::Linear { factor: factor()? }),
            Some("dynamic") if dim <= 2 => return Err(bad("rope_type", "dynamic", "another for heads of 2 elements")),
            Some("dynamic") => {
                // Older checkpoints repeat the number; what counts is that beside it.
                original(max_positions)?;
                let dynamic = DynamicScaling { factor: factor()?, original_positions: max_positions };
                Some(RopeScaling::Dynamic(dynamic))
            }
            Some("yarn") => Some(RopeScaling::Yarn(yarn(inner, max_positions, original(max_positions)?)?)),
            Some("longrope") => {
                let original_positions = original(max_positions)?;
                let factors = |field| inner.numbers(field, dim / 2, MAX_FACTOR);
                let (short_factors, long_factors) = (factors("short_factor")?, factors("long_factor")?);
                let ratio = max_positions as f64 / original_positions as f64;
                let factor = inner.number("factor", ratio, 0.0, MAX_FACTOR)?;
                let default = match original_positions {
                    1 => 1.0,
                    n if factor > 1.0 => (1.0 + factor.ln() / (n as f64).ln()).sqrt(),
                    _ => 1.0,
                };
                let amplitude = inner.number("attention_factor", default, 0.0, MAX_FACTOR)?;
                let long = LongRopeScaling { short_factors, long_factors, original_positions, amplitude };
                Some(RopeScaling::LongRope(long))
            }
            Some("llama3") => {
                let llama3 = Llama3Scaling {
                    factor: factor()?,
                    low_freq_factor: inner.required_number("low_freq_factor", MAX_FACTOR)?,
                    high_freq_factor: inner.required_number("high_freq_factor", MAX_FACTOR)?,
                    original_positions: original(max_positions)? as f64,
                };
                if llama3.high_freq_factor <= llama3.low_freq_factor {
                    let expected = format!("more than low_freq_factor ({})", llama3.low_freq_factor);
                    return Err(inner.bad("high_freq_factor", expected));
                }
                Some(RopeScaling::Llama3(llama3))
            }
            Some(other) => {
                let expected = "\"default\", \"linear\", \"dynamic\", \"yarn\", \"longrope\" or \"llama3\"";
                return Err(bad("rope_type", Value::from(other), expected));
            }
        };
        inner.check_known(field, |_, _| false)?;
        Ok(RopeConfig { theta, scaling })
    }

    /// `partial_rotary_factor`: which part of a head's elements is rotated, from among the rotary parameters or beside them.
    pub(super) fn partial_rotary_factor(&self) -> Result<f64, ModelError> {
        let beside = self.number("partial_rotary_factor", 1.0, 0.0, 1.0)?;
        for field in ["rope_scaling", "rope_parameters"] {
            if self.get(field).is_some_and(|v| v.get("partial_rotary_factor").is_some_and(|v| !v.is_null())) {
                return self.object(field)?.number("partial_rotary_factor", beside, 0.0, 1.0);
            }
        }
        Ok(beside)
    }
}

fn yarn(inner: &Fields<'_>, max_positions: usize, original_positions: usize) -> Result<YarnScaling, ModelError> {
    let original_positions = original_positions as f64;
    // A factor of null stands for the ratio of the lengths.
    let factor = match inner.is_null("factor") {
        true => max_positions as f64 / original_positions,
        false => inner.required_number("factor", MAX_FACTOR)?,
    };
    // Zero counts as absent.
    let or_default = |field, default| match inner.get(field).and_then(Value::as_f64) {
        Some(0.0) => Ok(default),
        _ => inner.number(field, default, 0.0, MAX_FACTOR),
    };
    let term = |scale: f64| if factor > 1.0 { 0.1 * scale * factor.ln() + 1.0 } else { 1.0 };
    let (mscale, mscale_all) = (or_default("mscale", 0.0)?, or_default("mscale_all_dim", 0.0)?);
    let default = if mscale > 0.0 && mscale_all > 0.0 { term(mscale) / term(mscale_all) } else { term(1.0) };
    Ok(YarnScaling {
        factor,
        original_positions,
        beta_fast: or_default("beta_fast", 32.0)?,
        beta_slow: or_default("beta_slow", 1.0)?,
        truncate: inner.get("truncate").is_none() || inner.flag("truncate")?,
        amplitude: inner.number("attention_factor", default, 0.0, MAX_FACTOR)?,
    })
}
