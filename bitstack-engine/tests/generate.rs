//! Choosing tokens, evaluation: everything around the decoder.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use std::ops::ControlFlow;

use bitstack_engine::eval::{Reference, compare, perplexity};
use bitstack_engine::sample::{Sampler, SamplingOptions, StopReason, generate};
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
        let made = generate(&model, &tokenizer, "Once", 60, sampling, &mut on_text).unwrap();
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
        generate(model, &tokenizer, "Once", max_tokens, SamplingOptions::greedy(), &mut on_text).unwrap()
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
    let empty = generate(&endless, &tokenizer, "", 5, SamplingOptions::greedy(), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(empty, Err(EngineError::NoTokens)));
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
