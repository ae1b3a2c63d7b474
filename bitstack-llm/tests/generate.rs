//! Tokens to text and text to tokens, choosing tokens, evaluation: everything around the decoder.

use std::ops::ControlFlow;
use std::path::Path;

use bitstack_llm::eval::{Reference, compare, perplexity};
use bitstack_llm::sample::{Sampler, SamplingOptions, StopReason, generate};
use bitstack_llm::{Checkpoint, Decoder, Dense, Elements, Frame, LlmError, Tokenizer};
use serde_json::{Map, json};
use std::sync::Arc;

fn checkpoint() -> Checkpoint {
    Checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/llama")).unwrap()
}

/// A byte-level tokenizer without merges: token `i` is the byte `bytes[i]`.
fn byte_tokenizer(bytes: impl IntoIterator<Item = u8>) -> Tokenizer {
    // Byte-level vocabularies write a byte as itself where it is printable, else as the next character from U+0100 on.
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let others: Vec<u8> = (0..=255).filter(|&b| !printable(b)).collect();
    let name = |b: u8| match others.iter().position(|&o| o == b) {
        Some(i) => char::from_u32(256 + i as u32).unwrap(),
        None => char::from(b),
    };
    let vocab: Map<_, _> = bytes.into_iter().enumerate().map(|(i, b)| (name(b).to_string(), json!(i))).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
        "padding": null, "added_tokens": [], "normalizer": null, "post_processor": null,
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    Tokenizer::from_bytes(tokenizer.to_string().as_bytes()).unwrap()
}

const TEXT: &str = "naïve — 日本語, 🦀🦀 and plain. ";

#[test]
fn a_text_is_encoded_whole_and_decoded_back() {
    let tokenizer = byte_tokenizer(0..=255);
    let tokens = tokenizer.encode(TEXT).unwrap();
    assert_eq!(tokens, TEXT.bytes().map(u32::from).collect::<Vec<_>>(), "truncation in the file is ignored");
    assert_eq!(tokenizer.decode(&tokens).unwrap(), TEXT);
    assert!(matches!(Tokenizer::from_bytes(b"{\"model\": 3}"), Err(LlmError::Tokenizer { .. })));
}

#[test]
fn a_stream_gives_whole_characters_and_loses_nothing() {
    let tokenizer = byte_tokenizer(0..=255);
    let tokens = tokenizer.encode(TEXT).unwrap();
    for prompt in 0..tokens.len() {
        if !TEXT.is_char_boundary(prompt) {
            continue;
        }
        let mut stream = tokenizer.stream(&tokens[..prompt]);
        let mut text = String::new();
        for &token in &tokens[prompt..] {
            let piece = stream.push(token).unwrap();
            assert!(!piece.contains('\u{fffd}'), "{piece:?} after {text:?}");
            text.push_str(&piece);
        }
        assert_eq!(text, TEXT[prompt..]);
        assert_eq!(stream.finish().unwrap(), "");
    }
}

#[test]
fn half_a_character_at_the_end_comes_out_when_the_stream_is_finished() {
    let tokenizer = byte_tokenizer(0..=255);
    let mut stream = tokenizer.stream(&[]);
    assert_eq!(stream.push(u32::from(b'a')).unwrap(), "a");
    assert_eq!(stream.push(0xf0).unwrap(), "");
    assert_eq!(stream.push(0x9f).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    assert_eq!(stream.finish().unwrap(), "");
}

#[test]
fn bytes_that_never_become_text_are_not_held_back_for_ever() {
    let tokenizer = byte_tokenizer(0..=255);
    let mut stream = tokenizer.stream(&[]);
    let shown: usize = (0..100).map(|_| stream.push(0xff).unwrap().chars().count()).sum();
    assert!(shown >= 80, "{shown} of 100");
}

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
        assert!(matches!(sampler.choose(&[f32::NAN; 3]), Err(LlmError::NoFiniteLogit)));
        assert!(matches!(sampler.choose(&[]), Err(LlmError::NoFiniteLogit)));
        assert!(matches!(sampler.choose(&[0.0, f32::INFINITY]), Err(LlmError::NoFiniteLogit)));
    }
}

#[test]
fn a_seed_decides_the_text_and_the_pieces_are_the_text() {
    let model = Decoder::load(&checkpoint()).unwrap();
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
    let checkpoint = checkpoint();
    let tokenizer = byte_tokenizer(32..128);
    let with_ends = |ends: Vec<u32>| {
        let mut config = checkpoint.config().clone();
        config.eos_tokens = ends;
        let frame = Frame::new(config, |v| checkpoint.vector(v)).unwrap();
        Decoder::with_frame(Arc::new(frame), |_, w| checkpoint.weight(w)).unwrap()
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
    assert!(matches!(empty, Err(LlmError::NoTokens)));
}

#[test]
fn evaluation_is_the_same_on_any_number_of_threads() {
    let checkpoint = checkpoint();
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

impl bitstack_llm::Progress for Count {
    fn stage(&self, _name: &str, _total: u64) {}

    fn advance(&self, steps: u64) {
        self.0.fetch_add(steps, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn progress_counts_every_window() {
    let model = Decoder::load(&checkpoint()).unwrap();
    let windows = [&[1_u32, 2, 3][..]; 5];
    let seen = Count::default();
    perplexity(&model, &windows, &seen).unwrap();
    assert_eq!(seen.0.into_inner(), 5);
    assert!(matches!(perplexity(&model, &[], &()), Err(LlmError::NoWindows)));
    assert!(matches!(perplexity(&model, &[&[1]], &()), Err(LlmError::BadSeqLen { .. })));
}
