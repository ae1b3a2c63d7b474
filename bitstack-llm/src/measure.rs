//! How fast a model decodes on this machine, beside how fast the machine reads the same memory.

use std::time::Instant;

use bitstack_format::ReadAt;
use bitstack_runtime::Snapshot;
use rayon::prelude::*;

use crate::linear::Threads;
use crate::{ElasticModel, KvCache, LlmError, Pass, math};

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

    /// Resident bytes over the median time of a token.
    pub fn bytes_per_second(&self) -> f64 {
        self.resident_bytes as f64 / self.median_seconds()
    }

    /// Decoding's bytes per second over those of a plain read.
    pub fn ratio(&self) -> f64 {
        self.bytes_per_second() / self.read_bytes_per_second
    }
}

/// Decodes `tokens` tokens one by one, the likeliest each time, on the current rayon pool.
///
/// # Errors
/// More tokens than the model's limit; logits that are not finite.
pub fn decoding<S: ReadAt + Send + Sync + 'static>(
    model: &ElasticModel<S>,
    tokens: usize,
) -> Result<Decoding, LlmError> {
    let snapshot = model.elastic().snapshot();
    let mut text = Text::new(model, tokens)?;
    let token_seconds = (0..tokens).map(|_| text.token()).collect::<Result<Vec<f64>, _>>()?;
    Ok(Decoding {
        resident_bytes: snapshot.resident_bytes(),
        cache_bytes: text.cache.len_bytes(),
        // The first one also fills buffers.
        token_seconds: token_seconds[1.min(tokens)..].to_vec(),
        read_bytes_per_second: read_speed(&snapshot)?,
    })
}

/// Tokens decoded while the model changes its size, each in seconds.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Resizing {
    /// At the smaller size, with nothing going on.
    pub small: Vec<f64>,
    /// From the call that raised the budget until all was loaded.
    pub growing: Vec<f64>,
    /// At the larger size, with nothing going on.
    pub large: Vec<f64>,
    /// From the call that lowered the budget, that call included, until the memory was given back.
    pub shrinking: Vec<f64>,
}

impl Resizing {
    /// Medians at rest: at the smaller and at the larger size.
    pub fn median_seconds(&self) -> (f64, f64) {
        (median(&self.small), median(&self.large))
    }

    /// The slowest token while growing, and while shrinking.
    pub fn slowest_seconds(&self) -> (f64, f64) {
        let slowest = |seconds: &[f64]| seconds.iter().copied().fold(0.0, f64::max);
        (slowest(&self.growing), slowest(&self.shrinking))
    }
}

/// Decodes while the budget goes from `low` to `high` bytes and back, `tokens` tokens at each size.
///
/// # Errors
/// Budgets below the smallest size; a file that cannot be read.
pub fn resizing<S: ReadAt + Send + Sync + 'static>(
    model: &ElasticModel<S>,
    low: u64,
    high: u64,
    tokens: usize,
) -> Result<Resizing, LlmError> {
    let elastic = model.elastic();
    let mut text = Text::new(model, 4 * tokens.max(256))?;
    let at_rest = |text: &mut Text<'_, S>| -> Result<Vec<f64>, LlmError> {
        elastic.wait()?;
        text.token()?;
        (0..tokens).map(|_| text.token()).collect()
    };
    elastic.set_budget(low)?;
    let small = at_rest(&mut text)?;
    elastic.set_budget(high)?;
    let mut growing = Vec::new();
    while elastic.status().loading {
        growing.push(text.token()?);
    }
    let large = at_rest(&mut text)?;
    let start = Instant::now();
    elastic.set_budget(low)?;
    let call = start.elapsed().as_secs_f64();
    let mut shrinking = (0..tokens).map(|_| text.token()).collect::<Result<Vec<f64>, _>>()?;
    if let Some(first) = shrinking.first_mut() {
        *first += call;
    }
    Ok(Resizing { small, growing, large, shrinking })
}

/// A text that goes on at whatever size is resident.
struct Text<'m, S> {
    model: &'m ElasticModel<S>,
    cache: KvCache,
    token: u32,
}

impl<'m, S: ReadAt + Send + Sync + 'static> Text<'m, S> {
    fn new(model: &'m ElasticModel<S>, capacity: usize) -> Result<Self, LlmError> {
        let capacity = capacity.min(model.config().max_positions);
        let token = 1 % model.config().vocab_size as u32;
        Ok(Self { model, cache: KvCache::new(model.config(), capacity)?, token })
    }

    /// Decodes one token; its seconds.
    fn token(&mut self) -> Result<f64, LlmError> {
        if self.cache.len() == self.cache.capacity() {
            self.cache.truncate(0);
        }
        let start = Instant::now();
        let snapshot = self.model.elastic().snapshot();
        let mut pass = Pass::new().with_cache(&mut self.cache).with_threads(Threads::Pool);
        let logits = self.model.at(&snapshot)?.forward(&[self.token], &mut pass)?;
        self.token = math::argmax(logits.as_slice().expect("a fresh array")) as u32;
        Ok(start.elapsed().as_secs_f64())
    }
}

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Bytes per second at which all signs of a snapshot are read.
fn read_speed(snapshot: &Snapshot) -> Result<f64, LlmError> {
    let levels = (0..snapshot.levels().len()).map(|weight| snapshot.level(weight)).collect::<Result<Vec<_>, _>>()?;
    // Pieces small enough that threads end together.
    let pieces: Vec<&[u8]> = levels
        .iter()
        .flat_map(|level| level.planes())
        .flat_map(|plane| plane.signs.as_bytes().chunks(1 << 20))
        .collect();
    let bytes: usize = pieces.iter().map(|p| p.len()).sum();
    let pass = || {
        let start = Instant::now();
        let sum = pieces.par_iter().map(|piece| math::checksum(piece)).reduce(|| 0, u64::wrapping_add);
        std::hint::black_box(sum);
        bytes as f64 / start.elapsed().as_secs_f64()
    };
    Ok((0..3).map(|_| pass()).fold(0.0, f64::max))
}
