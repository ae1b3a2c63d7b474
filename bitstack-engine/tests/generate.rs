//! Choosing tokens, evaluation: everything around the decoder.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use std::ops::ControlFlow;

use bitstack_engine::eval::{Reference, compare, perplexity};
use bitstack_engine::sample::{Continuation, GenerateOptions, Past, Sampler, SamplingOptions, StopReason, generate};
use bitstack_engine::{Decoder, EngineError, Frame};
use bitstack_model::{Dense, Elements, ModelError};
use fixtures::{byte_tokenizer, checkpoint};
use std::sync::Arc;

#[test]
fn samples_follow_the_softmax() {
    let logits: Vec<f32> = [0.5_f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln() + 7.0).collect();
    let count = |options: SamplingOptions, draws: usize| {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = [0_usize; 4];
        (0..draws).for_each(|_| counts[sampler.choose(&logits).unwrap() as usize] += 1);
        counts
    };
    let draws = 20_000;
    let check = |options, expected: [f64; 4]| {
        for (found, p) in count(options, draws).into_iter().zip(expected) {
            // Five standard deviations of a binomial; the seed is fixed.
            let tolerance = 5.0 * (draws as f64 * p * (1.0 - p)).sqrt();
            assert!((found as f64 - draws as f64 * p).abs() <= tolerance, "{found} of {draws}, expected {p}");
        }
    };
    let at_one = SamplingOptions::with_temperature(1.0, 11);
    check(at_one, [0.5, 0.3, 0.15, 0.05]);
    check(at_one.top_k(2), [0.625, 0.375, 0.0, 0.0]);
    check(at_one.top_p(0.75), [0.625, 0.375, 0.0, 0.0]);
    check(at_one.min_p(0.29), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]);
    check(at_one.min_p(0.5), [0.625, 0.375, 0.0, 0.0]);
    check(at_one.top_k(3).min_p(0.61), [1.0, 0.0, 0.0, 0.0]);
    check(at_one.top_p(0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]);
    // At half the temperature probabilities are squared: .25, .09, .0225, .0025 of .365.
    check(SamplingOptions::with_temperature(0.5, 11), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]);
    assert_eq!(count(SamplingOptions::greedy(), 10), [10, 0, 0, 0]);
    assert_eq!(count(at_one.top_k(1), 10), [10, 0, 0, 0]);
    assert_eq!(count(at_one.top_p(1e-9), 10), [10, 0, 0, 0]);
}

#[test]
fn unusable_options_and_logits_are_errors() {
    for (options, name) in [
        (SamplingOptions::with_temperature(-1.0, 0), "temperature"),
        (SamplingOptions::with_temperature(f32::NAN, 0), "temperature"),
        (SamplingOptions::greedy().top_p(0.0), "top-p"),
        (SamplingOptions::greedy().top_p(1.5), "top-p"),
        (SamplingOptions::greedy().min_p(-0.1), "min-p"),
        (SamplingOptions::greedy().min_p(f32::NAN), "min-p"),
        (SamplingOptions::greedy().repetition_penalty(0.0), "repetition-penalty"),
        (SamplingOptions::greedy().repetition_penalty(f32::INFINITY), "repetition-penalty"),
        (SamplingOptions::greedy().presence_penalty(2.1), "presence-penalty"),
        (SamplingOptions::greedy().frequency_penalty(f32::NAN), "frequency-penalty"),
    ] {
        assert!(Sampler::new(options).unwrap_err().to_string().contains(name));
    }
    for options in [SamplingOptions::greedy(), SamplingOptions::with_temperature(1.0, 1)] {
        let mut sampler = Sampler::new(options).unwrap();
        assert_eq!(sampler.choose(&[f32::NAN, 1.0, f32::NEG_INFINITY]).unwrap(), 1);
        assert!(matches!(sampler.choose(&[f32::NAN; 3]), Err(EngineError::NoFiniteLogit)));
        assert!(matches!(sampler.choose(&[]), Err(EngineError::NoFiniteLogit)));
        assert!(matches!(sampler.choose(&[0.0, f32::INFINITY]), Err(EngineError::NoFiniteLogit)));
    }
}

#[test]
fn a_seed_decides_the_text_and_the_pieces_are_the_text() {
    let model = Decoder::load(&checkpoint("llama")).unwrap();
    let tokenizer = byte_tokenizer(32..128);
    let run = |seed, temperature| {
        let mut pieces = String::new();
        let mut on_text = |text: &str| {
            pieces.push_str(text);
            ControlFlow::Continue(())
        };
        let sampling = SamplingOptions::with_temperature(temperature, seed);
        let options = GenerateOptions::new(60, sampling);
        let made = generate(&model, &tokenizer, &tokenizer.encode("Once").unwrap(), &options, &mut on_text).unwrap();
        assert_eq!(made.text, pieces);
        assert_eq!(made.prompt_tokens, 4);
        made
    };
    assert_eq!(run(1, 2.0), run(1, 2.0));
    assert_ne!(run(1, 2.0).tokens, run(2, 2.0).tokens);
    assert_eq!(run(1, 0.0), run(2, 0.0));
}

#[test]
fn generation_says_why_it_stopped() {
    let checkpoint = checkpoint("llama");
    let tokenizer = byte_tokenizer(32..128);
    let with_ends = |ends: Vec<u32>| {
        let mut config = checkpoint.config().clone();
        config.eos_tokens = ends;
        let frame = Frame::new(config, |v| Ok::<_, EngineError>(checkpoint.vector(v)?)).unwrap();
        Decoder::with_frame(Arc::new(frame), |_, w| Ok::<_, EngineError>(checkpoint.weight(w)?)).unwrap()
    };
    let run = |model: &Decoder<Dense>, max_tokens, stop_after: usize| {
        let mut pieces = 0;
        let mut on_text = |_: &str| {
            pieces += 1;
            if pieces == stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let options = GenerateOptions::new(max_tokens, SamplingOptions::greedy());
        generate(model, &tokenizer, &tokenizer.encode("Once").unwrap(), &options, &mut on_text).unwrap()
    };
    let endless = with_ends(Vec::new());
    let made = run(&endless, 5, usize::MAX);
    assert_eq!((made.stop, made.tokens.len()), (StopReason::MaxTokens, 5));
    assert!(run(&endless, 0, usize::MAX).tokens.is_empty());
    let made = run(&endless, usize::MAX, usize::MAX);
    // 256 positions hold the prompt and 252 tokens; the one after is chosen but cannot be continued.
    assert_eq!((made.stop, made.tokens.len()), (StopReason::ContextFull, 253));
    let made = run(&endless, 50, 3);
    assert_eq!((made.stop, made.tokens.len()), (StopReason::Stopped, 3));
    let ends = with_ends(vec![made.tokens[2]]);
    let made = run(&ends, 50, usize::MAX);
    assert_eq!(made.stop, StopReason::EndToken);
    assert!(made.tokens.len() <= 2);
    let options = GenerateOptions::new(5, SamplingOptions::greedy());
    let empty = generate(&endless, &tokenizer, &[], &options, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(empty, Err(EngineError::NoTokens)));
}

#[test]
fn a_text_ends_before_a_stop_string_and_what_came_before_is_given_out() {
    let model = Decoder::load(&checkpoint("llama")).unwrap();
    let tokenizer = byte_tokenizer(32..128);
    let prompt = tokenizer.encode("Once").unwrap();
    let run = |options: &GenerateOptions| {
        let mut pieces = String::new();
        let mut on_text = |text: &str| {
            pieces.push_str(text);
            ControlFlow::Continue(())
        };
        let made = generate(&model, &tokenizer, &prompt, options, &mut on_text).unwrap();
        assert_eq!(made.text, pieces);
        made
    };
    let options = GenerateOptions::new(40, SamplingOptions::with_temperature(1.0, 3));
    let whole = run(&options);
    // A token is a byte here, so every stop string of more than one spans tokens.
    for len in [1, 2, 5] {
        let stop = &whole.text[20..20 + len];
        let at = whole.text.find(stop).unwrap();
        let made = run(&options.clone().stop(vec!["never in it".to_owned(), stop.to_owned()]));
        assert_eq!((made.text.as_str(), made.stop), (&whole.text[..at], StopReason::StopString));
        assert_eq!(made.tokens, whole.tokens[..at + len]);
    }
    let made = run(&options.clone().stop(vec!["never in it".to_owned()]));
    assert_eq!((made.text, made.stop), (whole.text.clone(), StopReason::MaxTokens));
    let made = run(&options.clone().end_tokens(vec![whole.tokens[10]]));
    let at = whole.tokens.iter().position(|t| *t == whole.tokens[10]).unwrap();
    assert_eq!((&made.tokens[..], made.stop), (&whole.tokens[..at], StopReason::EndToken));
}

#[test]
fn a_longer_text_runs_only_the_tokens_that_are_new_and_says_the_same() {
    let model = Decoder::load(&checkpoint("llama")).unwrap();
    let (tokenizer, config) = (byte_tokenizer(32..128), model.config());
    let options = GenerateOptions::new(12, SamplingOptions::greedy());
    let write = |past, prompt: &[u32]| {
        let mut text = Continuation::after(past, config, &tokenizer, prompt, &options).unwrap();
        text.run(&model, &mut |_| ControlFlow::Continue(())).unwrap();
        text.into_past()
    };
    let nothing = || Past::new(config, 100).unwrap();
    let first = tokenizer.encode("Once upon").unwrap();
    let (one, past) = write(nothing(), &first);
    // The last token is chosen, but not run.
    assert_eq!((one.cached_tokens, past.tokens().len()), (0, 9 + 11));
    let second = [&first[..], &one.tokens, &tokenizer.encode(" and on").unwrap()].concat();
    let (two, past) = write(past, &second);
    assert_eq!(two.cached_tokens, 9 + 11);
    assert_eq!(two.text, write(nothing(), &second).0.text);
    // A prompt that goes another way keeps what is common; one that was run already runs its last token again.
    let other = tokenizer.encode("Once or twice").unwrap();
    let (three, past) = write(past, &other);
    assert_eq!((three.cached_tokens, &three.text), (5, &write(nothing(), &other).0.text));
    let (four, _) = write(past, &other);
    assert_eq!((four.cached_tokens, four.text), (12, three.text));
}

#[test]
fn penalties_follow_their_formulas() {
    // Logits of tokens 0 to 4; the prompt is 0, 3, and the text so far 1, 1, 2, which the sampler has chosen itself.
    let logits = [2.0, 1.5, 1.0, -1.0, 1.2];
    let chosen = |options: SamplingOptions, logits: &[f32]| {
        let mut sampler = Sampler::new(options).unwrap();
        sampler.read(&[0, 3]);
        for forced in [1_usize, 1, 2] {
            let sure: Vec<f32> = (0..5).map(|i| if i == forced { 90.0 } else { 0.0 }).collect();
            assert_eq!(sampler.choose(&sure).unwrap(), forced as u32);
        }
        sampler.choose(logits).unwrap()
    };
    let greedy = SamplingOptions::greedy();
    assert_eq!(chosen(greedy, &logits), 0);
    // 2 / 2, 1.5 / 2, 1 / 2, -1 * 2 against 1.2.
    assert_eq!(chosen(greedy.repetition_penalty(2.0), &logits), 4);
    // Token 0 is in the prompt only: 2 / 1.1 stays ahead.
    assert_eq!(chosen(greedy.repetition_penalty(1.1), &logits), 0);
    // A penalty multiplies negative logits: -1 becomes -2, below -1.5.
    assert_eq!(chosen(greedy.repetition_penalty(2.0), &[-9.0, -9.0, -9.0, -1.0, -1.5]), 4);
    // Presence and frequency leave the prompt alone.
    assert_eq!(chosen(greedy.presence_penalty(2.0).frequency_penalty(2.0), &logits), 0);
    let level = [0.0, 2.0, 1.9, 0.0, 0.0];
    assert_eq!(chosen(greedy, &level), 1);
    assert_eq!(chosen(greedy.presence_penalty(1.0), &level), 1);
    // 2 - 2 * 0.2 = 1.6 against 1.9 - 0.2 = 1.7.
    assert_eq!(chosen(greedy.frequency_penalty(0.2), &level), 2);
    // 2 - 0.08 * 2 = 1.84 against 1.9 - 0.08 = 1.82; presence takes the same of both.
    assert_eq!(chosen(greedy.frequency_penalty(0.08).presence_penalty(2.0), &[-5.0, 2.0, 1.9, -5.0, -5.0]), 1);
}

#[test]
fn advice_of_a_generation_config_is_taken_where_it_is_a_number() {
    let none = SamplingOptions::with_temperature(0.8, 7);
    assert_eq!(none.advised_by(r#"{"eos_token_id": 2, "temperature": null, "top_k": "many"}"#).unwrap(), none);
    let advised = none.advised_by(r#"{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}"#);
    assert_eq!(
        advised.unwrap(),
        SamplingOptions::with_temperature(0.6, 7).top_k(20).top_p(0.95).repetition_penalty(1.05)
    );
    assert!(none.advised_by("[]").is_err());
}

#[test]
fn evaluation_is_the_same_on_any_number_of_threads() {
    let checkpoint = checkpoint("llama");
    let reference = Decoder::load(&checkpoint).unwrap();
    let mut model = reference.clone();
    let gate = model.weight_mut(5);
    let [rows, cols] = gate.shape();
    let halved = gate.elements().clone().into_f32().into_iter().map(|v| v * 0.5).collect();
    *gate = Dense::new(rows, cols, Elements::F32(halved)).unwrap();

    let tokens: Vec<u32> = (0..7 * 33).map(|i| (i * i * 31 + i * 7) as u32 % 96).collect();
    let windows: Vec<&[u32]> = tokens.chunks_exact(33).collect();
    let with_threads = |n| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        pool.install(|| compare(&model, &reference, &windows, &()).unwrap())
    };
    let metrics = with_threads(1);
    assert_eq!(metrics, with_threads(3));
    assert_eq!(metrics.tokens, 7 * 32);
    let (kl, top1) = (metrics.kl.unwrap(), metrics.top1.unwrap());
    assert!(kl.mean > 1e-4 && kl.stderr > 0.0 && kl.stderr < kl.mean, "{kl:?}");
    assert!(top1.mean > 0.2 && top1.mean < 1.0, "{top1:?}");
    assert_eq!(perplexity(&model, &windows, &()).unwrap().perplexity, metrics.perplexity);

    let once = Reference::new(&reference, &windows, &()).unwrap();
    for _ in 0..2 {
        assert_eq!(once.compare(&model, &()).unwrap(), metrics);
    }

    let same = compare(&reference, &reference, &windows, &()).unwrap();
    assert_eq!((same.kl.unwrap().mean, same.top1.unwrap().mean), (0.0, 1.0));
}

/// Counts the steps it is told of.
#[derive(Default)]
struct Count(std::sync::atomic::AtomicU64);

impl bitstack_model::Progress for Count {
    fn stage(&self, _name: &str, _total: u64) {}

    fn advance(&self, steps: u64) {
        self.0.fetch_add(steps, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn progress_counts_every_window() {
    let model = Decoder::load(&checkpoint("llama")).unwrap();
    let windows = [&[1_u32, 2, 3][..]; 5];
    let seen = Count::default();
    perplexity(&model, &windows, &seen).unwrap();
    assert_eq!(seen.0.into_inner(), 5);
    assert!(matches!(perplexity(&model, &[], &()), Err(EngineError::NoWindows)));
    assert!(matches!(perplexity(&model, &[&[1]], &()), Err(EngineError::Model(ModelError::BadSeqLen { .. }))));
}
