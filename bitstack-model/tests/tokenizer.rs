//! Tokens to text and text to tokens.

#[path = "fixtures/mod.rs"]
mod fixtures;

use bitstack_model::{ModelError, Tokenizer};
use fixtures::byte_tokenizer;

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
    assert!(shown >= 80, "{shown} of 100");
}
