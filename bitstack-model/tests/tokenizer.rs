//! Tokens to text and text to tokens.

#[path = "fixtures/mod.rs"]
mod fixtures;

use bitstack_model::{ModelError, Tokenizer};
use fixtures::{byte_tokenizer, tokenizer_kinds};

const TEXT: &str = "naïve — 日本語, 🦀🦀 and plain. ";

#[test]
fn a_text_is_encoded_whole_and_decoded_back() {
    let tokenizer = byte_tokenizer(0..=255);
    let tokens = tokenizer.encode(TEXT).unwrap();
    assert_eq!(tokens, TEXT.bytes().map(u32::from).collect::<Vec<_>>(), "truncation in the file is ignored");
    assert_eq!(tokenizer.decode(&tokens).unwrap(), TEXT);
    assert!(matches!(Tokenizer::from_bytes(b"{\"model\": 3}"), Err(ModelError::Tokenizer { .. })));
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
    assert_eq!(shown, 99, "all but the last, which may be the beginning of a character for all the stream knows");
}

#[test]
fn a_stream_of_any_tokens_gives_the_text_of_all_at_once_for_every_kind_of_tokenizer_and_every_cut() {
    for (kind, tokenizer, n) in tokenizer_kinds() {
        let mut random = Lcg(7);
        for round in 0..150 {
            // Some texts are mostly characters of several bytes, some any bytes at all.
            let spelled: Vec<u32> = match kind {
                "byte-level" => TEXT.bytes().map(u32::from).collect(),
                "byte fallback" => TEXT.bytes().map(|b| n - 256 + u32::from(b)).collect(),
                _ => (0..n).collect(),
            };
            let tokens: Vec<u32> = (0..1 + random.below(60) as usize)
                .flat_map(|_| match random.below(if round % 2 == 0 { 2 } else { 4 }) {
                    0 => vec![random.below(n + 3)],
                    _ => {
                        let at = random.below(spelled.len() as u32) as usize;
                        spelled[at..(at + 1 + random.below(6) as usize).min(spelled.len())].to_vec()
                    }
                })
                .collect();
            let whole = tokenizer.decode(&tokens).unwrap();
            for cut in 0..=tokens.len().min(24) {
                let prompt = tokenizer.decode(&tokens[..cut]).unwrap();
                let mut stream = tokenizer.stream(&tokens[..cut]);
                let mut text: String = tokens[cut..].iter().map(|t| stream.push(*t).unwrap()).collect();
                text += &stream.finish().unwrap();
                let shared: usize =
                    prompt.chars().zip(whole.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
                assert_eq!(text, whole[shared..], "{kind}: {tokens:?} cut at {cut}");
            }
        }
    }
}

#[test]
fn a_run_of_byte_tokens_longer_than_any_context_is_read_as_one() {
    let (_, tokenizer, n) = tokenizer_kinds().swap_remove(1);
    let long = "中ж😀אعㅏé".repeat(20);
    let bytes: Vec<u32> = long.bytes().map(|b| n - 256 + u32::from(b)).collect();
    for cut in [0, 1, 2, 30, bytes.len() - 1] {
        let mut stream = tokenizer.stream(&bytes[..cut]);
        let text: String = bytes[cut..].iter().map(|t| stream.push(*t).unwrap()).collect();
        assert_eq!(text, "", "a later byte may change how all of them read");
        // Where the prompt ends inside a character, none of its run could be read before.
        let shown = if long.is_char_boundary(cut) { cut } else { 0 };
        assert_eq!(stream.finish().unwrap(), long[shown..]);
    }
}

/// A text long enough for several pieces, without a regular beat.
fn long_text() -> String {
    let mut random = Lcg(3);
    let words = ["the", "naïve", "日本語", "🦀🦀", "a", "\n\n", "  ", "AA", "é", ".", "<s>", "don't"];
    let mut text = String::new();
    while text.len() < 1300 << 10 {
        text += words[random.below(words.len() as u32) as usize];
        text += [" ", "", " ", "\n"][random.below(4) as usize];
    }
    text
}

#[test]
fn a_long_text_has_the_tokens_that_it_has_in_one_piece() {
    let text = long_text();
    // A part of a megabyte is encoded at once.
    let (front, back) = (text.floor_char_boundary(1 << 20), text.floor_char_boundary(text.len() - (1 << 20)));
    for (kind, tokenizer, _) in tokenizer_kinds() {
        let whole = tokenizer.encode(&text).unwrap();
        let first = tokenizer.encode(&text[..front]).unwrap();
        let shared = whole.iter().zip(&first).take_while(|(a, b)| a == b).count();
        assert!(first.len() - shared < 8, "{kind}: {shared} of the first {} tokens", first.len());
        let last = tokenizer.encode(&text[back..]).unwrap();
        let shared = whole.iter().rev().zip(last.iter().rev()).take_while(|(a, b)| a == b).count();
        assert!(last.len() - shared < 8, "{kind}: {shared} of the last {} tokens", last.len());
        let again = tokenizer.decode(&whole).unwrap();
        if kind == "byte-level" {
            assert!(again == text, "{kind}");
        }
        if kind == "byte fallback" {
            assert_eq!((whole[0], whole[whole.len() - 1]), (1, 2), "begin and end tokens, once");
            assert_eq!(whole.iter().filter(|t| **t == 1).count(), 1 + text.matches("<s>").count());
            let plain = |text: &str| text.replace("<s>", "").replace(' ', "");
            assert!(plain(&again) == plain(&text), "{kind}");
        }
    }
}

/// Numbers without a pattern (Knuth's linear congruential generator).
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((self.0 >> 33) * u64::from(n)) >> 31) as u32
    }
}
