//! Choosing a token from its logits.
//!
//! In this order, each step skipped where its option says nothing, z being the logits:
//!
//! ```text
//! repetition   z_t ← z_t / r where z_t > 0, else z_t r        for every token t of the prompt or of the text so far
//! frequency    z_t ← z_t − f n_t                              n_t: how often t is in the text so far, the prompt not counted
//! presence     z_t ← z_t − p                                  where n_t > 0
//! temperature  p = softmax(z / T);  T = 0 takes the largest z
//! top-k        only the k largest p
//! top-p        of these the largest p that together have at least the share top_p
//! min-p        of these the ones with p ≥ min_p · max p
//! ```
//!
//! Repetition is the penalty of the CTRL paper (arXiv 1909.05858, section 4.1) as `transformers` applies it, to the prompt too; presence and
//! frequency are those of OpenAI's interface; min-p is that of arXiv 2407.01082.

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use crate::{EngineError, math};
use bitstack_model::ModelError;

/// How a token is chosen from its logits. The default takes the most likely one.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct SamplingOptions {
    /// Logits are divided by this; 0 takes the most likely token.
    pub temperature: f32,
    /// Only this many most likely tokens are candidates; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together have at least this probability are candidates; 1 for all.
    pub top_p: f32,
    /// Only tokens with at least this fraction of the likeliest one's probability are candidates; 0 for all.
    pub min_p: f32,
    /// Positive logits of tokens of the prompt and the text are divided by this, others multiplied; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens that are in the text.
    pub presence_penalty: f32,
    /// Taken from the logits of tokens once for every time that they are in the text.
    pub frequency_penalty: f32,
    /// Seed of the random choice: the same seed, options and logits give the same tokens.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

impl SamplingOptions {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self::default()
    }

    /// Sampling at a temperature from all tokens.
    pub fn with_temperature(temperature: f32, seed: u64) -> Self {
        Self { temperature, seed, ..Self::default() }
    }

    /// Keeps the `top_k` most likely tokens; 0 for all.
    pub fn top_k(mut self, top_k: usize) -> Self {
        self.top_k = top_k;
        self
    }

    /// Keeps the most likely tokens of a total probability of `top_p`.
    pub fn top_p(mut self, top_p: f32) -> Self {
        self.top_p = top_p;
        self
    }

    /// Keeps the tokens of at least `min_p` times the likeliest one's probability.
    pub fn min_p(mut self, min_p: f32) -> Self {
        self.min_p = min_p;
        self
    }

    /// Makes tokens of the prompt and the text less likely.
    pub fn repetition_penalty(mut self, penalty: f32) -> Self {
        self.repetition_penalty = penalty;
        self
    }

    /// Makes tokens of the text less likely, however often they are there.
    pub fn presence_penalty(mut self, penalty: f32) -> Self {
        self.presence_penalty = penalty;
        self
    }

    /// Makes tokens of the text less likely, the more often they are there.
    pub fn frequency_penalty(mut self, penalty: f32) -> Self {
        self.frequency_penalty = penalty;
        self
    }

    /// These options with those that a `generation_config.json` names: `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty`, as
    /// whoever made the model advises. Absent and `null` ones, and ones that are not numbers, stay as they are.
    ///
    /// # Errors
    /// [`ModelError::Json`] when it is no JSON object.
    pub fn advised_by(mut self, generation_config: &str) -> Result<Self, ModelError> {
        let advice: serde_json::Map<String, Value> = serde_json::from_str(generation_config)
            .map_err(|source| ModelError::Json { file: "generation_config.json".to_owned(), source })?;
        let number = |name: &str| advice.get(name).and_then(Value::as_f64).map(|v| v as f32);
        self.temperature = number("temperature").unwrap_or(self.temperature);
        self.top_k = advice.get("top_k").and_then(Value::as_u64).map_or(self.top_k, |k| k as usize);
        self.top_p = number("top_p").unwrap_or(self.top_p);
        self.min_p = number("min_p").unwrap_or(self.min_p);
        self.repetition_penalty = number("repetition_penalty").unwrap_or(self.repetition_penalty);
        Ok(self)
    }

    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// Chooses tokens one after the other.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    rng: StdRng,
    /// How often each token of the prompt and the text is in the text; kept only where something is made of it.
    counts: HashMap<u32, u32>,
    /// Logits after the penalties.
    penalised: Vec<f32>,
}

impl Sampler {
    /// # Errors
    /// [`EngineError::BadSampling`]: a temperature that is negative or not finite, a `top_p` outside (0, 1], a `min_p` outside [0, 1], a repetition
    /// penalty that is not above 0, another penalty outside [-2, 2].
    pub fn new(options: SamplingOptions) -> Result<Self, EngineError> {
        let penalty = |v: f32| (-2.0..=2.0).contains(&v);
        let SamplingOptions { temperature, top_p, min_p, repetition_penalty, .. } = options;
        for (option, value, is_good, expected) in [
            ("temperature", temperature, temperature >= 0.0 && temperature.is_finite(), "a number of 0 or more"),
            ("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "a number above 0 and at most 1"),
            ("min-p", min_p, (0.0..=1.0).contains(&min_p), "a number from 0 to 1"),
            (
                "repetition-penalty",
                repetition_penalty,
                repetition_penalty > 0.0 && repetition_penalty.is_finite(),
                "a number above 0; 1 is no penalty",
            ),
            (
                "presence-penalty",
                options.presence_penalty,
                penalty(options.presence_penalty),
                "a number from -2 to 2; 0 is no penalty",
            ),
            (
                "frequency-penalty",
                options.frequency_penalty,
                penalty(options.frequency_penalty),
                "a number from -2 to 2; 0 is no penalty",
            ),
        ] {
            if !is_good {
                return Err(EngineError::BadSampling { option, value: value.into(), expected });
            }
        }
        let rng = StdRng::seed_from_u64(options.seed);
        Ok(Self { options, rng, counts: HashMap::new(), penalised: Vec::new() })
    }

    /// Tells of the prompt, whose tokens the repetition penalty is for as well.
    pub fn read(&mut self, prompt: &[u32]) {
        if self.options.penalises() {
            prompt.iter().for_each(|token| _ = self.counts.entry(*token).or_default());
        }
    }

    /// A token for these logits, which is of the text from now on.
    ///
    /// # Errors
    /// [`EngineError::NoFiniteLogit`].
    pub fn choose(&mut self, logits: &[f32]) -> Result<u32, EngineError> {
        if !self.options.penalises() {
            return self.sample(logits);
        }
        let mut penalised = std::mem::take(&mut self.penalised);
        penalised.clear();
        penalised.extend_from_slice(logits);
        let SamplingOptions { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.options;
        for (&token, &count) in &self.counts {
            let Some(z) = penalised.get_mut(token as usize) else { continue };
            *z = if *z > 0.0 { *z / repetition_penalty } else { *z * repetition_penalty };
            *z -= frequency_penalty * count as f32 + if count > 0 { presence_penalty } else { 0.0 };
        }
        let token = self.sample(&penalised);
        self.penalised = penalised;
        let token = token?;
        *self.counts.entry(token).or_default() += 1;
        Ok(token)
    }

    fn sample(&mut self, logits: &[f32]) -> Result<u32, EngineError> {
        let best = math::argmax(logits);
        let top = logits.get(best).copied().filter(|v| v.is_finite()).ok_or(EngineError::NoFiniteLogit)?;
        if self.options.temperature == 0.0 {
            return Ok(best as u32);
        }
        let inverse = 1.0 / f64::from(self.options.temperature);
        let mut candidates: Vec<(u32, f64)> = logits
            .iter()
            .enumerate()
            .filter(|(_, v)| !v.is_nan())
            .map(|(i, &v)| (i as u32, (f64::from(v - top) * inverse).exp()))
            .collect();
        // Where all tokens stay candidates their order does not matter; sorting a large vocabulary takes longer than running a small model.
        if self.options.top_k > 0 || self.options.top_p < 1.0 {
            // Most likely first, the lower token of equals first, so that the choice is the same everywhere.
            candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        }
        if self.options.top_k > 0 {
            candidates.truncate(self.options.top_k);
        }
        let mut kept: f64 = candidates.iter().map(|c| c.1).sum();
        if self.options.top_p < 1.0 {
            let enough = f64::from(self.options.top_p) * kept;
            kept = 0.0;
            let nucleus = candidates.iter().position(|c| {
                kept += c.1;
                kept >= enough
            });
            candidates.truncate(nucleus.map_or(candidates.len(), |last| last + 1));
        }
        if self.options.min_p > 0.0 {
            // The likeliest token's weight is 1.
            candidates.retain(|c| c.1 >= f64::from(self.options.min_p));
            kept = candidates.iter().map(|c| c.1).sum();
        }
        let mut point = self.rng.random::<f64>() * kept;
        for &(token, weight) in &candidates {
            point -= weight;
            if point < 0.0 {
                return Ok(token);
            }
        }
        // Reached only where rounding leaves the point at the very end.
        Ok(candidates.last().map_or(best as u32, |c| c.0))
    }
}
