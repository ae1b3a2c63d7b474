//! How good a model is on some text: perplexity, and its distance to a reference model.
//!
//! In every window each token but the first is predicted from those before it. Per window the mean over its predicted
//! tokens is taken of the loss (negative log-likelihood, nats), of the divergence KL(reference ‖ model) (nats), and of the
//! agreement of the most likely token. What is reported is the mean over windows with its standard error: windows are far
//! apart in the text and nearly independent, neighbouring tokens are not.

use bitstack_model::{ModelError, Progress};
use ndarray::{Array2, ArrayView2, Axis, Slice};
use rayon::prelude::*;
use std::ops::Range;

use crate::device::{Cpu, Device, Weight};
use crate::{Decoder, EngineError, Pass, math};

/// A mean over windows and its standard error, which is NaN for a single window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Mean.
    pub mean: f64,
    /// Standard error of the mean: sample standard deviation over the square root of the number of windows.
    pub stderr: f64,
}

impl Estimate {
    /// Of one value per window.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
        Self { mean, stderr: if values.len() > 1 { (variance / n).sqrt() } else { f64::NAN } }
    }
}

/// The result of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Metrics {
    /// exp of the mean loss.
    pub perplexity: f64,
    /// Standard error of the perplexity: that of the mean loss times the perplexity (first order).
    pub perplexity_stderr: f64,
    /// KL(reference ‖ model) per predicted token in nats, where there is a reference.
    pub kl: Option<Estimate>,
    /// Fraction of predicted tokens for which both models find the same token most likely.
    pub top1: Option<Estimate>,
    /// Predicted tokens.
    pub tokens: usize,
}

/// Sums over some predicted tokens; those of one window divided by `tokens` are its means.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Tally {
    /// Σ -log p(token), nats.
    pub loss: f64,
    /// Σ KL(reference ‖ model), nats; 0 without a reference.
    pub kl: f64,
    /// Tokens where both models' most likely token is the same; 0 without a reference.
    pub agree: usize,
    /// Predicted tokens.
    pub tokens: usize,
}

impl Tally {
    /// Scores rows of logits against the tokens that came next.
    ///
    /// `logits` and `reference` are tokens x vocabulary, `next` has one token per row.
    ///
    /// # Numerics
    /// Exponentials in f32, sums in f64: about 1e-7 nats per token. Equal logits give a divergence of exactly 0.
    ///
    /// # Errors
    /// [`EngineError::StateShape`] when the sizes differ, [`EngineError::TokenOutOfRange`].
    pub fn of(
        logits: ArrayView2<'_, f32>,
        reference: Option<ArrayView2<'_, f32>>,
        next: &[u32],
    ) -> Result<Self, EngineError> {
        let (rows, vocab_size) = logits.dim();
        for (what, found) in [("logits", Some(logits)), ("reference logits", reference)] {
            if let Some((found_rows, found_cols)) = found.map(|f| f.dim())
                && (found_rows, found_cols) != (next.len(), vocab_size)
            {
                return Err(EngineError::StateShape {
                    what,
                    found_rows,
                    found_cols,
                    rows: next.len(),
                    cols: vocab_size,
                });
            }
        }
        if let Some(&token) = next.iter().find(|&&t| t as usize >= vocab_size) {
            return Err(EngineError::TokenOutOfRange { token, vocab_size });
        }
        let logits = logits.as_standard_layout();
        let reference = reference.as_ref().map(|r| r.as_standard_layout());
        let mut scores = Self { tokens: rows, ..Self::default() };
        for (r, &token) in next.iter().enumerate() {
            let row = logits.row(r);
            let row = row.as_slice().expect("made standard above");
            let norm = math::log_sum_exp(row);
            scores.loss += norm - f64::from(row[token as usize]);
            if let Some(reference) = &reference {
                let true_row = reference.row(r);
                let true_row = true_row.as_slice().expect("made standard above");
                let true_norm = math::log_sum_exp(true_row);
                scores.kl += math::expected_difference(true_row, row, true_norm as f32) - (true_norm - norm);
                scores.agree += usize::from(math::argmax(row) == math::argmax(true_row));
            }
        }
        Ok(scores)
    }

    fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.kl += other.kl;
        self.agree += other.agree;
        self.tokens += other.tokens;
    }
}

impl Metrics {
    /// From the scores of each window, all windows of the same length.
    ///
    /// # Errors
    /// [`EngineError::NoWindows`] when there are none.
    pub fn of(windows: &[Tally], reference: WithReference) -> Result<Self, EngineError> {
        if windows.is_empty() {
            return Err(EngineError::NoWindows);
        }
        let per_token = |sum: fn(&Tally) -> f64| {
            Estimate::of(&windows.iter().map(|w| sum(w) / w.tokens as f64).collect::<Vec<_>>())
        };
        let loss = per_token(|w| w.loss);
        let compared = reference == WithReference::Yes;
        Ok(Self {
            perplexity: loss.mean.exp(),
            perplexity_stderr: loss.mean.exp() * loss.stderr,
            kl: compared.then(|| per_token(|w| w.kl)),
            top1: compared.then(|| per_token(|w| w.agree as f64)),
            tokens: windows.iter().map(|w| w.tokens).sum(),
        })
    }
}

/// Whether scores were taken against a reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WithReference {
    /// Divergence and agreement mean something.
    Yes,
    /// There is only the loss.
    No,
}

/// Perplexity of a model on windows of text.
///
/// Windows run side by side on the current rayon pool; the result does not depend on the number of threads. `progress` is advanced by
/// every window.
///
/// # Errors
/// No windows, a window of fewer than 2 tokens or longer than the model's limit, a token outside the vocabulary.
pub fn perplexity<L: Weight<D>, D: Device>(
    model: &Decoder<L, D>,
    windows: &[&[u32]],
    progress: &dyn Progress,
) -> Result<Metrics, EngineError> {
    let score = |window: &[u32]| one_window(model, None::<(&Decoder<L, D>, _)>, window);
    Metrics::of(&each_window(windows, score, progress)?, WithReference::No)
}

/// Perplexity of a model, and its divergence from and agreement with a reference, both run on every window.
///
/// # Errors
/// As [`perplexity`], and [`EngineError::DifferentVocabulary`].
pub fn compare<L: Weight<D>, R: Weight<D>, D: Device>(
    model: &Decoder<L, D>,
    reference: &Decoder<R, D>,
    windows: &[&[u32]],
    progress: &dyn Progress,
) -> Result<Metrics, EngineError> {
    same_vocabulary(model, reference)?;
    let score = |window: &[u32]| {
        let states = states(reference, window)?;
        one_window(model, Some((reference, states.view())), window)
    };
    Metrics::of(&each_window(windows, score, progress)?, WithReference::Yes)
}

/// A model with its final hidden states on some windows: it runs once, however many others are compared with it.
///
/// The states take 4 bytes times hidden size per token; logits are made again for each comparison, as those of large vocabularies would take
/// a hundred times as much.
#[derive(Debug)]
pub struct Reference<'a, R, D: Device = Cpu> {
    model: &'a Decoder<R, D>,
    windows: Vec<Vec<u32>>,
    states: Vec<Array2<f32>>,
}

impl<'a, R: Weight<D>, D: Device> Reference<'a, R, D> {
    /// Runs the model on the windows, side by side on the current rayon pool. `progress` is advanced by every window.
    ///
    /// # Errors
    /// As [`perplexity`].
    pub fn new(model: &'a Decoder<R, D>, windows: &[&[u32]], progress: &dyn Progress) -> Result<Self, EngineError> {
        let states = each_window(windows, |window| states(model, window), progress)?;
        Ok(Self { model, windows: windows.iter().map(|w| w.to_vec()).collect(), states })
    }

    /// The windows that it ran on.
    pub fn windows(&self) -> &[Vec<u32>] {
        &self.windows
    }

    /// The same as [`compare`], to the last bit.
    ///
    /// # Errors
    /// As [`compare`].
    pub fn compare<L: Weight<D>>(
        &self,
        model: &Decoder<L, D>,
        progress: &dyn Progress,
    ) -> Result<Metrics, EngineError> {
        same_vocabulary(model, self.model)?;
        let windows: Vec<(&[u32], &Array2<f32>)> = self.windows.iter().map(|w| &w[..]).zip(&self.states).collect();
        let score =
            |(window, states): (&[u32], &Array2<f32>)| one_window(model, Some((self.model, states.view())), window);
        Metrics::of(&each_window(&windows, score, progress)?, WithReference::Yes)
    }
}

fn same_vocabulary<L: Weight<D>, R: Weight<D>, D: Device>(
    model: &Decoder<L, D>,
    reference: &Decoder<R, D>,
) -> Result<(), EngineError> {
    let (model, reference) = (model.config().vocab_size, reference.config().vocab_size);
    if model == reference { Ok(()) } else { Err(EngineError::DifferentVocabulary { model, reference }) }
}

/// What `of_one` says of each window, side by side.
fn each_window<W: Copy + Sync, T: Send>(
    windows: &[W],
    of_one: impl Fn(W) -> Result<T, EngineError> + Sync,
    progress: &dyn Progress,
) -> Result<Vec<T>, EngineError> {
    let of_one = |window: &W| {
        let found = of_one(*window)?;
        progress.advance(1);
        Ok(found)
    };
    windows.par_iter().with_max_len(1).map(of_one).collect()
}

/// The tokens of a window that predict another, and those that they predict.
fn predicted<'w, L: Weight<D>, D: Device>(
    model: &Decoder<L, D>,
    window: &'w [u32],
) -> Result<(&'w [u32], &'w [u32]), EngineError> {
    let Some((_, next)) = window.split_first().filter(|(_, next)| !next.is_empty()) else {
        let limit = model.config().max_positions;
        return Err(ModelError::BadSeqLen { seq_len: window.len(), limit }.into());
    };
    // The last token predicts nothing, so it is not run.
    Ok((&window[..next.len()], next))
}

/// The final hidden states of a window.
fn states<L: Weight<D>, D: Device>(model: &Decoder<L, D>, window: &[u32]) -> Result<Array2<f32>, EngineError> {
    model.hidden(predicted(model, window)?.0, &mut Pass::new())
}

fn one_window<L: Weight<D>, R: Weight<D>, D: Device>(
    model: &Decoder<L, D>,
    reference: Option<(&Decoder<R, D>, ArrayView2<'_, f32>)>,
    window: &[u32],
) -> Result<Tally, EngineError> {
    let hidden = states(model, window)?;
    score_hidden(model, hidden.view(), reference, predicted(model, window)?.1)
}

/// Scores final hidden states (tokens x hidden) of a model against the tokens that came next, and against a reference's.
///
/// # Errors
/// States or tokens of the wrong number, a token outside the vocabulary.
pub fn score_hidden<L: Weight<D>, R: Weight<D>, D: Device>(
    model: &Decoder<L, D>,
    hidden: ArrayView2<'_, f32>,
    reference: Option<(&Decoder<R, D>, ArrayView2<'_, f32>)>,
    next: &[u32],
) -> Result<Tally, EngineError> {
    let mut pass = Pass::new();
    let mut scores = Tally::default();
    for rows in parts(next.len(), model.config().vocab_size) {
        let part = |hidden: &ArrayView2<'_, f32>| hidden.slice_axis(Axis(0), Slice::from(rows.clone())).to_owned();
        let logits = model.logits(part(&hidden).view(), &mut pass)?;
        let true_logits = reference.as_ref().map(|(r, h)| r.logits(part(h).view(), &mut pass)).transpose()?;
        scores.add(Tally::of(logits.view(), true_logits.as_ref().map(|l| l.view()), &next[rows])?);
    }
    Ok(scores)
}

/// [`score_hidden`], against a reference's logits (tokens x vocabulary).
///
/// # Errors
/// As [`score_hidden`].
pub fn score_against<L: Weight<D>, D: Device>(
    model: &Decoder<L, D>,
    hidden: ArrayView2<'_, f32>,
    reference: ArrayView2<'_, f32>,
    next: &[u32],
) -> Result<Tally, EngineError> {
    let mut pass = Pass::new();
    let mut scores = Tally::default();
    for rows in parts(next.len(), model.config().vocab_size) {
        let part = Slice::from(rows.clone());
        let logits = model.logits(hidden.slice_axis(Axis(0), part), &mut pass)?;
        scores.add(Tally::of(logits.view(), Some(reference.slice_axis(Axis(0), part)), &next[rows])?);
    }
    Ok(scores)
}

/// Rows whose logits are made at a time: 32 MiB at most.
fn parts(rows: usize, vocab_size: usize) -> impl Iterator<Item = Range<usize>> {
    let step = ((1 << 23) / vocab_size).max(1);
    (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    /// Against the definition, term by term in f64.
    #[test]
    fn scores_follow_their_definitions() {
        let make =
            |seed: usize| Array2::from_shape_fn((5, 300), |(r, c)| ((r * 91 + c * 57 + seed * 13) % 97) as f32 / 11.0);
        let (model, reference) = (make(1), make(2));
        let next = [3, 299, 0, 17, 255];
        let found = Tally::of(model.view(), Some(reference.view()), &next).unwrap();
        let log_p = |x: &Array2<f32>, r: usize| {
            let norm = x.row(r).iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
            x.row(r).iter().map(|&v| f64::from(v) - norm).collect::<Vec<_>>()
        };
        let (mut loss, mut kl) = (0.0, 0.0);
        for r in 0..5 {
            let (p, q) = (log_p(&reference, r), log_p(&model, r));
            loss -= q[next[r] as usize];
            kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        }
        assert!((found.loss - loss).abs() < 1e-5, "{} and {loss}", found.loss);
        assert!((found.kl - kl).abs() < 1e-5, "{} and {kl}", found.kl);
        assert_eq!(found.tokens, 5);
    }

    #[test]
    fn equal_logits_diverge_by_exactly_nothing() {
        let x = Array2::from_shape_fn((4, 1000), |(r, c)| ((r * 7919 + c * 104_729) % 1013) as f32 / 31.0);
        let scores = Tally::of(x.view(), Some(x.view()), &[1, 2, 3, 4]).unwrap();
        assert_eq!((scores.kl, scores.agree), (0.0, 4));
    }

    #[test]
    fn standard_errors_are_over_windows() {
        let window = |loss| Tally { loss, kl: loss / 10.0, agree: 1, tokens: 2 };
        let metrics = Metrics::of(&[window(2.0), window(4.0), window(6.0)], WithReference::Yes).unwrap();
        // Means 1, 2, 3: mean 2, sample deviation 1.
        assert!((metrics.perplexity - 2.0_f64.exp()).abs() < 1e-12);
        assert!((metrics.perplexity_stderr - 2.0_f64.exp() / 3.0_f64.sqrt()).abs() < 1e-12);
        assert!((metrics.kl.unwrap().mean - 0.2).abs() < 1e-12);
        assert_eq!(metrics.top1.unwrap(), Estimate { mean: 0.5, stderr: 0.0 });
        assert_eq!(metrics.tokens, 6);
        let single = Metrics::of(&[window(2.0)], WithReference::No).unwrap();
        assert!(single.perplexity_stderr.is_nan() && single.kl.is_none());
        assert!(matches!(Metrics::of(&[], WithReference::No), Err(EngineError::NoWindows)));
    }

    #[test]
    fn sizes_that_do_not_fit_are_rejected() {
        let x = array![[0.0, 1.0], [2.0, 3.0]];
        assert!(matches!(Tally::of(x.view(), None, &[0]), Err(EngineError::StateShape { .. })));
        let narrow = array![[0.0], [1.0]];
        assert!(matches!(Tally::of(x.view(), Some(narrow.view()), &[0, 1]), Err(EngineError::StateShape { .. })));
        assert!(matches!(Tally::of(x.view(), None, &[0, 2]), Err(EngineError::TokenOutOfRange { token: 2, .. })));
    }
}
