//! Choosing tokens, and writing text with them.

use std::ops::ControlFlow;

use bitstack_model::{ModelConfig, Progress, TextStream, Tokenizer};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;

use crate::device::{Cpu, Device, Weight};
use crate::{Decoder, EngineError, KvCache, Pass, Workspace, math};
use bitstack_core::Threads;

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
    /// Seed of the random choice: the same seed, options and logits give the same tokens.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
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
}

/// Tokens of a prompt that are run at once: enough for the fastest products, and what a pass works in does not grow with the prompt.
pub const PIECE: usize = 256;

/// Chooses tokens one after the other.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    rng: StdRng,
}

impl Sampler {
    /// # Errors
    /// [`EngineError::BadSampling`]: a temperature that is negative or not finite, a `top_p` outside (0, 1].
    pub fn new(options: SamplingOptions) -> Result<Self, EngineError> {
        let bad = |option, value: f32, expected| EngineError::BadSampling { option, value: value.into(), expected };
        if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
            return Err(bad("temperature", options.temperature, "a number of 0 or more"));
        }
        if !(options.top_p > 0.0 && options.top_p <= 1.0) {
            return Err(bad("top-p", options.top_p, "a number above 0 and at most 1"));
        }
        Ok(Self { options, rng: StdRng::seed_from_u64(options.seed) })
    }

    /// A token for these logits.
    ///
    /// # Errors
    /// [`EngineError::NoFiniteLogit`].
    pub fn choose(&mut self, logits: &[f32]) -> Result<u32, EngineError> {
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

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The model chose one of its end tokens.
    EndToken,
    /// As many tokens as were asked for.
    MaxTokens,
    /// The model's last position.
    ContextFull,
    /// The caller asked to stop.
    Stopped,
}

/// A generated text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Generation {
    /// Tokens chosen, a final end token left out.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Why there are no more.
    pub stop: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
}

/// Continues a prompt by up to `max_tokens` tokens.
///
/// `on_text` is given the text as it comes, in pieces of whole characters, and may stop the generation. Products spread
/// over the current rayon pool.
///
/// # Errors
/// An empty prompt, one longer than the model's limit, tokens outside the vocabulary, options out of range.
pub fn generate<L: Weight<D>, D: Device>(
    model: &Decoder<L, D>,
    tokenizer: &Tokenizer,
    prompt: &str,
    max_tokens: usize,
    sampling: SamplingOptions,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation, EngineError> {
    let mut text = Continuation::new(model.config(), tokenizer, prompt, max_tokens, sampling)?;
    while let Some(piece) = text.step(model)? {
        if !piece.is_empty() && on_text(&piece).is_break() {
            return Ok(text.stopped());
        }
    }
    Ok(text.finish())
}

/// A text in the making: the tokens so far, their keys and values, and the next token's chooser.
///
/// Every step may run another decoder over the same model's shape, such as the same stack at another level.
pub struct Continuation<'t, D: Device = Cpu> {
    cache: KvCache<D>,
    workspace: Workspace<D>,
    sampler: Sampler,
    stream: TextStream<'t>,
    max_tokens: usize,
    max_positions: usize,
    eos_tokens: Vec<u32>,
    /// Tokens that are chosen and not yet run: the prompt at first.
    pending: Vec<u32>,
    result: Generation,
    ended: bool,
}

impl<'t, D: Device> Continuation<'t, D> {
    /// A continuation of `prompt` of up to `max_tokens` tokens; nothing is run yet.
    ///
    /// # Errors
    /// An empty prompt, one longer than the model's limit, options out of range.
    pub fn new(
        config: &ModelConfig,
        tokenizer: &'t Tokenizer,
        prompt: &str,
        max_tokens: usize,
        sampling: SamplingOptions,
    ) -> Result<Self, EngineError> {
        let sampler = Sampler::new(sampling)?;
        let pending = tokenizer.encode(prompt)?;
        let positions = pending.len().saturating_add(max_tokens).min(config.max_positions);
        if pending.is_empty() {
            return Err(EngineError::NoTokens);
        }
        Ok(Self {
            cache: KvCache::new(config, positions)?,
            workspace: Workspace::default(),
            sampler,
            stream: tokenizer.stream(&pending),
            max_tokens,
            max_positions: config.max_positions,
            eos_tokens: config.eos_tokens.clone(),
            result: Generation {
                tokens: Vec::new(),
                text: String::new(),
                stop: StopReason::MaxTokens,
                prompt_tokens: pending.len(),
            },
            pending,
            ended: max_tokens == 0,
        })
    }

    /// Runs the next piece of a long prompt; false once so few tokens are left that [`step`](Self::step) runs them. Between pieces the
    /// decoder may change, and the caller may stop.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn run_piece<L: Weight<D>>(&mut self, model: &Decoder<L, D>) -> Result<bool, EngineError> {
        if self.ended || self.pending.len() <= PIECE {
            return Ok(false);
        }
        rayon::scope(|_| {
            let workspace = std::mem::take(&mut self.workspace);
            let pass = Pass::new().in_workspace(workspace).with_cache(&mut self.cache);
            let mut pass = pass.with_length(self.result.prompt_tokens).with_threads(Threads::Pool);
            let done = model.advance(&self.pending[..PIECE], &mut pass);
            self.workspace = pass.into_workspace();
            done
        })?;
        self.pending.drain(..PIECE);
        Ok(true)
    }

    /// Runs the pending tokens, chooses one more, and gives the text it adds, in whole characters: often none, as a character may
    /// take several tokens. `None` once there is no more.
    ///
    /// # Errors
    /// Tokens outside the vocabulary; a prompt longer than the model's limit; logits that are not finite.
    pub fn step<L: Weight<D>>(&mut self, model: &Decoder<L, D>) -> Result<Option<String>, EngineError> {
        if self.ended {
            return Ok(None);
        }
        while self.run_piece(model)? {}
        // In a thread of the pool: from another, each product would wait to be taken over.
        let token = rayon::scope(|_| {
            let workspace = std::mem::take(&mut self.workspace);
            let pass = Pass::new().in_workspace(workspace).with_cache(&mut self.cache);
            let mut pass = pass.with_length(self.result.prompt_tokens).with_threads(Threads::Pool);
            let token = self.sampler.choose(model.last_logits(&self.pending, &mut pass)?);
            self.workspace = pass.into_workspace();
            token
        })?;
        let text = if self.eos_tokens.contains(&token) {
            self.result.stop = StopReason::EndToken;
            self.ended = true;
            self.stream.finish()?
        } else {
            self.result.tokens.push(token);
            self.pending = vec![token];
            let mut text = self.stream.push(token)?;
            if self.result.tokens.len() == self.max_tokens {
                self.ended = true;
            } else if self.result.prompt_tokens + self.result.tokens.len() > self.max_positions {
                self.result.stop = StopReason::ContextFull;
                self.ended = true;
            }
            if self.ended {
                text.push_str(&self.stream.finish()?);
            }
            text
        };
        self.result.text.push_str(&text);
        Ok(Some(text))
    }

    /// Bytes of the keys and values so far.
    pub fn cache_bytes(&self) -> u64 {
        self.cache.len_bytes()
    }

    /// What has been generated.
    pub fn finish(self) -> Generation {
        self.result
    }

    /// What had been generated when the caller stopped it.
    pub fn stopped(mut self) -> Generation {
        self.result.stop = StopReason::Stopped;
        self.result
    }
}

/// Windows of `len` tokens of the model's own, side by side: each begins with one of `starts` and goes on with samples, the first with the seed of
/// `sampling` and each further one with the next. End tokens do not end them. `progress` advances by `len - 1` steps, each a token of every window.
///
/// All weights are read once per step, whatever the number of windows. Products are summed in an order that may depend on that number, so
/// the tokens of a window may too; they do not depend on threads.
///
/// # Errors
/// More tokens than the model's limit, starts outside the vocabulary, options out of range, logits that are not finite.
pub fn windows<L: Weight<D>, D: Device>(
    model: &Decoder<L, D>,
    starts: &[u32],
    len: usize,
    sampling: SamplingOptions,
    progress: &dyn Progress,
) -> Result<Vec<Vec<u32>>, EngineError> {
    let sampler = |i: u64| Sampler::new(SamplingOptions { seed: sampling.seed.wrapping_add(i), ..sampling });
    let mut samplers = (0..starts.len() as u64).map(sampler).collect::<Result<Vec<_>, _>>()?;
    let cache = |_| KvCache::new(model.config(), len);
    let mut caches = (0..starts.len()).map(cache).collect::<Result<Vec<_>, _>>()?;
    let mut windows: Vec<Vec<u32>> = starts.iter().map(|start| vec![*start]).collect();
    // In a thread of the pool, as above.
    rayon::scope(|_| {
        let mut pass = Pass::new().with_caches(&mut caches).with_threads(Threads::Pool);
        let mut last = starts.to_vec();
        for _ in 1..len {
            let rows = model.last_logits(&last, &mut pass)?.par_chunks_exact(model.config().vocab_size);
            let chosen = samplers.par_iter_mut().zip(rows).with_max_len(1).map(|(sampler, row)| sampler.choose(row));
            last = chosen.collect::<Result<Vec<_>, _>>()?;
            windows.iter_mut().zip(&last).for_each(|(window, token)| window.push(*token));
            progress.advance(1);
        }
        Ok(windows)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitstack_model::{Checkpoint, Dense};

    fn model() -> Decoder<Dense> {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../bitstack-model/tests/data/qwen3");
        Decoder::load(&Checkpoint::open(dir).unwrap()).unwrap()
    }

    #[test]
    fn windows_do_not_depend_on_the_number_of_threads() {
        // So many and so long that products, attention and the choice of tokens all are shared out.
        let (model, starts) = (model(), Vec::from_iter(0..64));
        let [one, three] = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| windows(&model, &starts, 80, SamplingOptions::with_temperature(1.0, 5), &()).unwrap())
        });
        assert!(one == three);
        assert!(one.iter().zip(starts).all(|(window, start)| window.len() == 80 && window[0] == start));
    }

    #[test]
    fn each_window_has_a_seed_of_its_own() {
        let sample = |starts: &[u32], seed| {
            windows(&model(), starts, 40, SamplingOptions::with_temperature(1.0, seed), &()).unwrap()
        };
        let three = sample(&[7; 3], 5);
        assert!(three[0] != three[1] && three[1] != three[2] && three[0] != three[2]);
        // Of so small a model, logits differ by less than decides a choice, whether a window is alone or not.
        assert_eq!(sample(&[7], 6)[0], three[1]);
        assert_eq!(sample(&[7], 7)[0], three[2]);
    }

    #[test]
    fn windows_beyond_the_model_or_its_vocabulary_are_errors() {
        let limit = model().config().max_positions;
        let error = windows(&model(), &[1, 2], limit + 1, SamplingOptions::greedy(), &()).unwrap_err();
        assert!(matches!(error, EngineError::ContextFull { needed, limit: l } if needed == limit + 1 && l == limit));
        let error = windows(&model(), &[1, 96], 4, SamplingOptions::greedy(), &()).unwrap_err();
        assert!(matches!(error, EngineError::TokenOutOfRange { token: 96, .. }));
        assert!(windows(&model(), &[], 4, SamplingOptions::greedy(), &()).is_err());
    }
}
