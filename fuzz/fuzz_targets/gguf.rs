//! Any bytes, read as a GGUF file: a header or an error, in memory that the file's length bounds. Of a header, every tensor lies in the file, and its
//! elements can be read.
#![no_main]

use bitstack_gguf::{Gguf, Limits, Value};
use libfuzzer_sys::fuzz_target;

/// Elements of a tensor that are looked at.
const MOST_BYTES: u64 = 1 << 16;

fuzz_target!(|input: &[u8]| {
    let gguf = match Gguf::read(input, &Limits::default()) {
        Ok(gguf) => gguf,
        Err(error) => {
            let text = error.to_string();
            assert!(!text.is_empty() && !text.chars().any(char::is_control), "{text:?}");
            return;
        }
    };
    for (key, value) in gguf.metadata() {
        assert!(gguf.get(key).is_some());
        match value {
            Value::Texts(texts) => assert!(texts.iter().count() == texts.len() && texts.get(texts.len()).is_none()),
            Value::Numbers(numbers) => assert_eq!(numbers.iter().count(), numbers.len()),
            _ => {}
        }
    }
    let mut end = 0;
    for tensor in gguf.tensors() {
        assert!(tensor.offset_bytes >= end, "tensors do not overlap");
        end = tensor.offset_bytes + tensor.len_bytes;
        assert!(end <= input.len() as u64 || tensor.len_bytes == 0, "and lie in the file");
        if tensor.len_bytes == 0 || tensor.len_bytes > MOST_BYTES {
            continue;
        }
        let blocks = &input[tensor.offset_bytes as usize..end as usize];
        let n: usize = tensor.shape.iter().product();
        let mut values = vec![0.0; n];
        tensor.kind.dequantize(blocks, &mut values).expect("a tensor is whole blocks");
    }
});
