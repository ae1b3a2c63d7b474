//! Any bytes, read as a `tokenizer.json`: a tokenizer or an error. A tokenizer turns text into tokens, tokens into text, or says why not.
//!
//! The input is a text up to the first zero byte, then the file.
#![no_main]

use bitstack_model::Tokenizer;
use libfuzzer_sys::fuzz_target;

// Some files make the library behind it panic, which is caught and an error. The fuzzer's own hook would end the process before; a panic that
// is not caught still does.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |input: &[u8]| {
    let mut parts = input.splitn(2, |&b| b == 0);
    let text = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let Ok(tokenizer) = Tokenizer::from_bytes(parts.next().unwrap_or_default()) else { return };
    let mut tokens = tokenizer.encode(&text).unwrap_or_default();
    let _ = tokenizer.decode(&tokens);
    tokens.extend([0, 1, u32::MAX]);
    let _ = tokenizer.decode(&tokens);
    let mut stream = tokenizer.stream(&tokens[..1]);
    for &token in &tokens {
        let _ = stream.push(token);
    }
    let _ = stream.finish();
});
