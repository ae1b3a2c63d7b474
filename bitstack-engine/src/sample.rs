//! Writing text, token by token.

use std::ops::ControlFlow;

use bitstack_model::{ModelConfig, Progress, TextStream, Tokenizer};
use rayon::prelude::*;

use crate::device::{Cpu, Device, Weight};
use crate::stop::StopStrings;
use crate::{Decoder, EngineError, KvCache, Pass, Workspace};
use bitstack_core::Threads;

pub use crate::sampler::{Sampler, SamplingOptions};

/// How a text is continued.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct GenerateOptions {
    /// Most tokens to choose.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: SamplingOptions,
    /// The text ends before any of these, however many tokens it spans. One that is the text of a special token ends it at that token, which
    /// has no text of its own.
    pub stop: Vec<String>,
    /// Tokens that end the text, beside the model's own.
    pub end_tokens: Vec<u32>,
}

impl GenerateOptions {
    /// Up to `max_tokens` tokens, without stop strings.
    pub fn new(max_tokens: usize, sampling: SamplingOptions) -> Self {
        Self { max_tokens, sampling, stop: Vec::new(), end_tokens: Vec::new() }
    }

    /// Ends before any of these texts.
    pub fn stop(mut self, stop: Vec<String>) -> Self {
        self.stop = stop;
        self
    }

    /// Ends at these tokens too.
    pub fn end_tokens(mut self, tokens: Vec<u32>) -> Self {
        self.end_tokens = tokens;
        self
    }
}

/// Tokens of a prompt that are run at once: enough for the fastest products, and what a pass works in does not grow with the prompt.
pub const PIECE: usize = 256;

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The model chose one of its end tokens.
    EndToken,
    /// The text came to a stop string.
    StopString,
    /// As many tokens as were asked for.
    MaxTokens,
    /// The model's last position, or the last that the cache has room for.
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
    /// Their text, up to a stop string.
    pub text: String,
    /// Why there are no more.
    pub stop: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt whose keys and values were there already.
    pub cached_tokens: usize,
}

/// Continues a prompt, given in tokens ([`Tokenizer::encode`]).
///
/// `on_text` is given the text as it comes, in pieces of whole characters, and may stop the generation. Products spread
/// over the current rayon pool.
///
/// # Errors
/// An empty prompt, one longer than the model's limit, tokens outside the vocabulary, options out of range.
pub fn generate<L: Weight<D>, D: Device>(
    model: &Decoder<L, D>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation, EngineError> {
    let mut text = Continuation::new(model.config(), tokenizer, prompt, options)?;
    text.run(model, on_text)?;
    Ok(text.finish())
}

/// Tokens with their keys and values: what a text can be continued from without running it again.
#[derive(Debug)]
pub struct Past<D: Device = Cpu> {
    cache: KvCache<D>,
    tokens: Vec<u32>,
    workspace: Workspace<D>,
}

impl<D: Device> Past<D> {
    /// Nothing yet, with room for `positions` tokens. Memory grows as they come.
    ///
    /// # Errors
    /// [`EngineError::ContextFull`] when that is more than the model's limit.
    pub fn new(config: &ModelConfig, positions: usize) -> Result<Self, EngineError> {
        Ok(Self { cache: KvCache::new(config, positions)?, tokens: Vec::new(), workspace: Workspace::default() })
    }

    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens there is room for.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Forgets all tokens behind those that `prompt` begins with too; at least one token of the prompt is left to run.
    fn keep_common(&mut self, prompt: &[u32]) {
        let common = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let kept = common.min(prompt.len().saturating_sub(1));
        self.tokens.truncate(kept);
        self.cache.truncate(kept);
    }
}

/// A text in the making: the tokens so far, their keys and values, and the next token's chooser.
///
/// Every step may run another decoder over the same model's shape, such as the same stack at another level.
pub struct Continuation<'t, D: Device = Cpu> {
    past: Past<D>,
    sampler: Sampler,
    stream: TextStream<'t>,
    stop: StopStrings,
    max_tokens: usize,
    end_tokens: Vec<u32>,
    /// Tokens that are chosen and not yet run: those of the prompt at first.
    pending: Vec<u32>,
    result: Generation,
    ended: bool,
}

impl<'t, D: Device> Continuation<'t, D> {
    /// A continuation of `prompt`; nothing is run yet.
    ///
    /// # Errors
    /// An empty prompt, options out of range.
    pub fn new(
        config: &ModelConfig,
        tokenizer: &'t Tokenizer,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> Result<Self, EngineError> {
        let positions = prompt.len().saturating_add(options.max_tokens).min(config.max_positions);
        Self::after(Past::new(config, positions)?, config, tokenizer, prompt, options)
    }

    /// A continuation of `prompt`, of which only the tokens are run that `past` does not begin with. The rest of `past` is forgotten.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn after(
        mut past: Past<D>,
        config: &ModelConfig,
        tokenizer: &'t Tokenizer,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> Result<Self, EngineError> {
        let mut sampler = Sampler::new(options.sampling)?;
        let stop = StopStrings::new(&options.stop)?;
        if prompt.is_empty() {
            return Err(EngineError::NoTokens);
        }
        sampler.read(prompt);
        past.keep_common(prompt);
        let mut end_tokens = config.eos_tokens.clone();
        end_tokens.extend(&options.end_tokens);
        end_tokens.extend(options.stop.iter().filter_map(|text| tokenizer.special_token_id(text)));
        Ok(Self {
            sampler,
            stream: tokenizer.stream(prompt),
            stop,
            max_tokens: options.max_tokens,
            end_tokens,
            pending: prompt[past.tokens.len()..].to_vec(),
            result: Generation {
                tokens: Vec::new(),
                text: String::new(),
                stop: StopReason::MaxTokens,
                prompt_tokens: prompt.len(),
                cached_tokens: past.tokens.len(),
            },
            past,
            ended: options.max_tokens == 0,
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
            let workspace = std::mem::take(&mut self.past.workspace);
            let pass = Pass::new().in_workspace(workspace).with_cache(&mut self.past.cache);
            let mut pass = pass.with_length(self.result.prompt_tokens).with_threads(Threads::Pool);
            let done = model.advance(&self.pending[..PIECE], &mut pass);
            self.past.workspace = pass.into_workspace();
            done
        })?;
        self.past.tokens.extend(self.pending.drain(..PIECE));
        Ok(true)
    }

    /// Runs the pending tokens, chooses one more, and gives the text it adds, in whole characters: often none, as a character may
    /// take several tokens, and what may begin a stop string is held back. `None` once there is no more.
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
            let workspace = std::mem::take(&mut self.past.workspace);
            let pass = Pass::new().in_workspace(workspace).with_cache(&mut self.past.cache);
            let mut pass = pass.with_length(self.result.prompt_tokens).with_threads(Threads::Pool);
            let token = self.sampler.choose(model.last_logits(&self.pending, &mut pass)?);
            self.past.workspace = pass.into_workspace();
            token
        })?;
        self.past.tokens.append(&mut self.pending);
        let new = if self.end_tokens.contains(&token) {
            self.result.stop = StopReason::EndToken;
            self.ended = true;
            String::new()
        } else {
            self.result.tokens.push(token);
            self.pending.push(token);
            if self.result.tokens.len() == self.max_tokens {
                self.ended = true;
            } else if self.past.tokens.len() == self.past.capacity() {
                self.result.stop = StopReason::ContextFull;
                self.ended = true;
            }
            self.stream.push(token)?
        };
        let (mut text, found) = self.stop.push(&new);
        if found {
            self.result.stop = StopReason::StopString;
            self.ended = true;
        } else if self.ended {
            let (last, found) = self.stop.push(&self.stream.finish()?);
            text.push_str(&last);
            if found {
                self.result.stop = StopReason::StopString;
            } else {
                text.push_str(&self.stop.finish());
            }
        }
        self.result.text.push_str(&text);
        Ok(Some(text))
    }

    /// Steps to the end of the text, or until `on_text` stops it, which is given every piece that is not empty.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn run<L: Weight<D>>(
        &mut self,
        model: &Decoder<L, D>,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        while let Some(piece) = self.step(model)? {
            if !piece.is_empty() && on_text(&piece).is_break() {
                self.stop();
            }
        }
        Ok(())
    }

    /// Ends the text here.
    pub fn stop(&mut self) {
        self.result.stop = StopReason::Stopped;
        self.ended = true;
    }

    /// Bytes of the keys and values so far.
    pub fn cache_bytes(&self) -> u64 {
        self.past.cache.len_bytes()
    }

    /// What has been generated.
    pub fn finish(self) -> Generation {
        self.result
    }

    /// What has been generated, and what a longer text can be continued from.
    pub fn into_past(self) -> (Generation, Past<D>) {
        (self.result, self.past)
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
