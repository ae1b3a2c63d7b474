//! How fast a model decodes on this machine, beside how fast the machine reads the same memory.

use std::time::{Duration, Instant};

use bitstack_engine::sample::Sampler;
use bitstack_engine::{ElasticModel, EngineError, KvCache, Pass, SamplingOptions, Threads, Workspace};
use bitstack_format::ReadAt;
use bitstack_runtime::Snapshot;
use bitstack_sort::LoadOrder;

use crate::machine::{self, PIECE_BYTES};
use crate::statistics::{median, quantile};

/// One measured size.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Decoding {
    /// Resident weights: what a token has to read.
    pub resident_bytes: u64,
    /// Keys and values at the end.
    pub cache_bytes: u64,
    /// Seconds of every token after the first.
    pub token_seconds: Vec<f64>,
    /// Bytes per second at which the same blocks are read by a plain loop on the same threads; the best of three passes.
    pub read_bytes_per_second: f64,
}

impl Decoding {
    /// The median over tokens, in seconds.
    pub fn median_seconds(&self) -> f64 {
        median(&self.token_seconds)
    }

    /// The time of the slowest token, in seconds.
    pub fn slowest_seconds(&self) -> f64 {
        quantile(&self.token_seconds, 1.0)
    }

    /// Resident bytes over the median time of a token.
    pub fn bytes_per_second(&self) -> f64 {
        self.resident_bytes as f64 / self.median_seconds()
    }

    /// Decoding's bytes per second over those of a plain read.
    pub fn ratio(&self) -> f64 {
        self.bytes_per_second() / self.read_bytes_per_second
    }
}

/// Decodes `tokens` tokens one by one, the likeliest each time, on the current rayon pool, at the largest size within `budget_bytes`.
///
/// # Errors
/// A budget below the smallest size; a file that cannot be read; more tokens than the model's limit; logits that are not finite.
pub fn decoding<S: ReadAt + Send + Sync + 'static>(
    model: &ElasticModel<S>,
    budget_bytes: u64,
    tokens: usize,
) -> Result<Decoding, EngineError> {
    model.elastic().set_budget(budget_bytes)?;
    model.elastic().wait()?;
    let snapshot = model.elastic().snapshot();
    let mut text = Text::new(model, tokens)?;
    let token_seconds = (0..tokens).map(|_| Ok(text.token()?.seconds)).collect::<Result<Vec<f64>, EngineError>>()?;
    Ok(Decoding {
        resident_bytes: snapshot.resident_bytes(),
        cache_bytes: text.cache.len_bytes(),
        // The first one also fills buffers.
        token_seconds: token_seconds[1.min(tokens)..].to_vec(),
        read_bytes_per_second: read_speed(&snapshot)?,
    })
}

/// Resident bytes with the first blocks of the load order, as many as `level` blocks of every weight: the model's size at that level where
/// the order goes level by level.
pub fn bytes_at_level(order: &LoadOrder, level: usize) -> u64 {
    let bytes = order.cumulative_bytes();
    bytes[(order.n_weights() * level).min(bytes.len() - 1)]
}

/// A token decoded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Token {
    /// The time it took.
    pub seconds: f64,
    /// Resident weights of the snapshot it was decoded with.
    pub resident_bytes: u64,
}

/// Tokens decoded while the model changes its size.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Resizing {
    /// At the smaller size, with nothing going on.
    pub small: Vec<Token>,
    /// From the call that raised the budget until all was loaded.
    pub growing: Vec<Token>,
    /// At the larger size, with nothing going on.
    pub large: Vec<Token>,
    /// The first of each round after the call that lowered the budget and gave the memory back; the call is part of its time.
    pub shrinking: Vec<Token>,
    /// Those that follow.
    pub shrunk: Vec<Token>,
    /// How often the model grew and shrank.
    pub rounds: usize,
}

/// What tokens took in a part of [`Resizing`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Phase {
    /// The median of their seconds.
    pub median_seconds: f64,
    /// The seconds of the slowest.
    pub slowest_seconds: f64,
    /// Times what each would have taken at rest at its size ([`Resizing::of_rest`]): the median, 90 and 99 in a hundred, the slowest.
    pub of_rest: [f64; 4],
}

impl Resizing {
    /// Seconds that a token takes at rest with these resident bytes: the medians at the two sizes, and on the line through them.
    pub fn rest_seconds(&self, resident_bytes: u64) -> f64 {
        let at = |tokens: &[Token]| {
            let seconds: Vec<f64> = tokens.iter().map(|token| token.seconds).collect();
            (tokens.first().map_or(f64::NAN, |token| token.resident_bytes as f64), median(&seconds))
        };
        let ((small, seconds_small), (large, seconds_large)) = (at(&self.small), at(&self.large));
        if small == large {
            return seconds_small;
        }
        seconds_small + (resident_bytes as f64 - small) / (large - small) * (seconds_large - seconds_small)
    }

    /// The seconds of each token over those that it would have taken at rest at its size.
    pub fn of_rest(&self, tokens: &[Token]) -> Vec<f64> {
        tokens.iter().map(|token| token.seconds / self.rest_seconds(token.resident_bytes)).collect()
    }

    /// What these tokens, some of `self`, took.
    pub fn phase(&self, tokens: &[Token]) -> Phase {
        let seconds: Vec<f64> = tokens.iter().map(|token| token.seconds).collect();
        let of_rest = self.of_rest(tokens);
        Phase {
            median_seconds: median(&seconds),
            slowest_seconds: quantile(&seconds, 1.0),
            of_rest: [0.5, 0.9, 0.99, 1.0].map(|share| quantile(&of_rest, share)),
        }
    }

    /// Seconds that growing takes while tokens are decoded, mean over the rounds.
    pub fn growing_seconds(&self) -> f64 {
        self.growing.iter().map(|token| token.seconds).sum::<f64>() / self.rounds as f64
    }
}

/// How a model grows and shrinks while it decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Tokens at each size; one at least.
    pub tokens: usize,
    /// How often it grows and shrinks.
    pub rounds: usize,
    /// The time before it grows: what was freed before goes back to the host of a virtual machine some two seconds later, and that holds up
    /// everything that runs.
    pub pause: Duration,
}

impl Default for Schedule {
    /// Three rounds of 64 tokens at each size, five seconds apart.
    fn default() -> Self {
        Self { tokens: 64, rounds: 3, pause: Duration::from_secs(5) }
    }
}

/// Decodes while the model goes from its smallest size to its largest and back.
///
/// # Errors
/// A file that cannot be read.
pub fn resizing<S: ReadAt + Send + Sync + 'static>(
    model: &ElasticModel<S>,
    schedule: Schedule,
) -> Result<Resizing, EngineError> {
    let Schedule { tokens, rounds, pause } = schedule;
    let elastic = model.elastic();
    let (low, high) = (elastic.order().minimum_bytes(), elastic.order().total_bytes());
    // The same positions again and again, so that tokens differ by what is resident only.
    let mut text = Text::new(model, tokens)?;
    let at_rest = |text: &mut Text<'_, S>| -> Result<Vec<Token>, EngineError> {
        elastic.wait()?;
        text.token()?;
        (0..tokens).map(|_| text.token()).collect()
    };
    elastic.set_budget(low)?;
    std::thread::sleep(pause);
    let small = at_rest(&mut text)?;
    let [mut growing, mut large, mut shrinking, mut shrunk] = [const { Vec::new() }; 4];
    for round in 0..rounds {
        if round > 0 {
            std::thread::sleep(pause);
        }
        elastic.set_budget(high)?;
        while elastic.status().loading {
            growing.push(text.token()?);
        }
        large.extend(at_rest(&mut text)?);
        let start = Instant::now();
        elastic.set_budget(low)?;
        let call = start.elapsed().as_secs_f64();
        let mut first = text.token()?;
        first.seconds += call;
        shrinking.push(first);
        for _ in 1..tokens {
            shrunk.push(text.token()?);
        }
    }
    Ok(Resizing { small, growing, large, shrinking, shrunk, rounds })
}

/// A text that goes on at whatever size is resident.
struct Text<'m, S> {
    model: &'m ElasticModel<S>,
    cache: KvCache,
    workspace: Workspace,
    sampler: Sampler,
    token: u32,
}

impl<'m, S: ReadAt + Send + Sync + 'static> Text<'m, S> {
    fn new(model: &'m ElasticModel<S>, capacity: usize) -> Result<Self, EngineError> {
        let capacity = capacity.clamp(1, model.config().max_positions);
        let token = 1 % model.config().vocab_size as u32;
        let sampler = Sampler::new(SamplingOptions::greedy())?;
        Ok(Self {
            model,
            cache: KvCache::new(model.config(), capacity)?,
            workspace: Workspace::default(),
            sampler,
            token,
        })
    }

    /// Decodes one token.
    fn token(&mut self) -> Result<Token, EngineError> {
        if self.cache.len() == self.cache.capacity() {
            self.cache.truncate(0);
        }
        let start = Instant::now();
        let snapshot = self.model.elastic().snapshot();
        let model = self.model.at(&snapshot)?;
        // As a generation does it.
        self.token = rayon::scope(|_| {
            let workspace = std::mem::take(&mut self.workspace);
            let pass = Pass::new().in_workspace(workspace).with_cache(&mut self.cache);
            let mut pass = pass.with_threads(Threads::Pool);
            let token = self.sampler.choose(model.last_logits(&[self.token], &mut pass)?);
            self.workspace = pass.into_workspace();
            token
        })?;
        Ok(Token { seconds: start.elapsed().as_secs_f64(), resident_bytes: snapshot.resident_bytes() })
    }
}

/// Bytes per second at which all signs of a snapshot are read.
fn read_speed(snapshot: &Snapshot) -> Result<f64, EngineError> {
    let levels = (0..snapshot.levels().len()).map(|weight| snapshot.level(weight)).collect::<Result<Vec<_>, _>>()?;
    let pieces: Vec<&[u8]> = levels
        .iter()
        .flat_map(|level| level.planes())
        .flat_map(|plane| plane.signs.as_bytes().chunks(PIECE_BYTES))
        .collect();
    let bytes: usize = pieces.iter().map(|p| p.len()).sum();
    let pass = || {
        let start = Instant::now();
        machine::read(&pieces, Threads::Pool);
        bytes as f64 / start.elapsed().as_secs_f64()
    };
    Ok((0..3).map(|_| pass()).fold(0.0, f64::max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_compared_with_those_at_rest_of_their_own_size() {
        let tokens = |resident_bytes, seconds: &[f64]| -> Vec<Token> {
            seconds.iter().map(|&seconds| Token { seconds, resident_bytes }).collect()
        };
        let mut all = Resizing {
            small: tokens(100, &[2.0, 1.0, 1.0]),
            growing: [tokens(100, &[1.5]), tokens(200, &[2.0]), tokens(300, &[3.0])].concat(),
            large: tokens(300, &[3.0, 3.0, 9.0]),
            shrinking: tokens(100, &[1.0, 4.0]),
            shrunk: tokens(100, &[1.0]),
            rounds: 2,
        };
        assert_eq!([100, 200, 300].map(|bytes| all.rest_seconds(bytes)), [1.0, 2.0, 3.0]);
        assert_eq!(all.of_rest(&all.growing), [1.5, 1.0, 1.0]);
        assert_eq!(all.of_rest(&all.shrinking), [1.0, 4.0]);
        assert_eq!(all.growing_seconds(), 6.5 / 2.0);
        let growing = all.phase(&all.growing);
        assert_eq!((growing.median_seconds, growing.slowest_seconds), (2.0, 3.0));
        assert_eq!(growing.of_rest, [1.0, 1.5, 1.5, 1.5]);
        // A model of one size only.
        all.large = all.small.clone();
        assert_eq!(all.of_rest(&all.small), [2.0, 1.0, 1.0]);
    }
}
