//! Files that others wrote, and files made to do harm.

mod fixtures;

use bitstack_gguf::{BlockType, Gguf, GgufError, Limits, Number};
use fixtures::{File, values};
use peak_alloc::PeakAlloc;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Written by Python's `gguf` package: for each type, two blocks of random bytes (or 40 floats), and their elements as that package has them.
const FOREIGN: &[u8] = include_bytes!("data/dequantized.gguf");

/// The tests of this file take turns, so that what is counted is theirs.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(file: &[u8]) -> Result<Gguf, GgufError> {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let result = Gguf::read(file, &Limits::default());
    let peak = (MEMORY.peak_usage() - before) as u64;
    let bound = Limits::BYTES_PER_BYTE * file.len() as u64 + (1 << 17);
    assert!(peak <= bound, "{peak} bytes of memory for {} of a file", file.len());
    if let Ok(gguf) = &result {
        let mut end = 0;
        for tensor in gguf.tensors() {
            assert!(tensor.offset_bytes >= end, "tensors do not overlap");
            end = tensor.offset_bytes + tensor.len_bytes;
            let elements: usize = tensor.shape.iter().product();
            assert_eq!(
                elements as u64 / tensor.kind.block_elements() as u64 * tensor.kind.block_bytes() as u64,
                tensor.len_bytes
            );
        }
        assert!(end <= file.len() as u64 || gguf.tensors().is_empty());
    }
    result
}

#[track_caller]
fn refused(file: &[u8], expected: &str) {
    let error = read(file).unwrap_err().to_string();
    assert!(error.contains(expected) && !error.chars().any(char::is_control), "{error}\nexpected: {expected}");
}

#[test]
fn elements_of_every_type_are_those_of_the_python_package() {
    let _turn = alone();
    let gguf = read(FOREIGN).unwrap();
    let bytes = |name: &str| {
        let tensor = gguf.tensors().iter().find(|tensor| tensor.name == name).unwrap();
        (tensor.kind, &FOREIGN[tensor.offset_bytes as usize..][..tensor.len_bytes as usize])
    };
    for kind in BlockType::ALL.iter().filter(|kind| **kind != BlockType::F32) {
        let ((stored, blocks), (floats, expected)) = (bytes(kind.name()), bytes(&format!("{}.values", kind.name())));
        assert_eq!((stored, floats), (*kind, BlockType::F32));
        assert_eq!(values(*kind, blocks), values(BlockType::F32, expected), "{}", kind.name());
    }
}

#[test]
fn metadata_of_every_type_is_read() {
    let _turn = alone();
    let gguf = read(FOREIGN).unwrap();
    let get = |key: &str| gguf.get(key).unwrap();
    assert_eq!((gguf.version(), get("general.architecture").as_str()), (3, Some("none")));
    assert_eq!((get("a.text").as_str(), get("a.bool").as_bool()), (Some("words"), Some(true)));
    assert_eq!((get("a.int").as_f64(), get("a.int").as_u64(), get("a.float").as_f64()), (Some(-7.0), None, Some(1.5)));
    assert_eq!(get("a.large").as_u64(), Some(1 << 40));
    assert_eq!(get("a.texts").as_texts().unwrap().iter().collect::<Vec<_>>(), ["one", "", "three"]);
    let numbers: Vec<Number> = get("a.numbers").as_numbers().unwrap().iter().collect();
    assert_eq!(numbers, [3, -4, 5].map(Number::Signed));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let _turn = alone();
    let file = small().bytes();
    assert!(read(&file).is_ok());
    for cut in 0..file.len() {
        assert!(read(&file[..cut]).is_err(), "{cut}");
    }
}

fn small() -> File {
    let file =
        File::default().u32("a", 3).text("b", "words").texts("c", ["x", "yz"]).i32s("d", &[1, 2]).bool("e", true);
    file.f32_tensor("t", &[2, 3], &[0.5; 6]).tensor("u", &[32], 8, vec![1; 34])
}

#[test]
fn no_byte_of_a_header_makes_a_panic_or_memory_beyond_the_limit() {
    let _turn = alone();
    let file = small().bytes();
    let mut opened = 0;
    for at in 0..file.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff, file[at] ^ 1] {
            let mut changed = file.clone();
            changed[at] = value;
            opened += usize::from(read(&changed).is_ok());
            // The high bytes of lengths and counts.
            let end = (at + 8).min(file.len());
            changed[at..end].fill(value);
            opened += usize::from(read(&changed).is_ok());
        }
    }
    assert!(opened > 50, "{opened}");
}

#[test]
fn counts_that_lie_are_not_allocated_for() {
    let _turn = alone();
    for shift in [8, 20, 31, 32, 40, 61, 63] {
        let n = 1u64 << shift;
        for kind in [0, 4, 7, 8, 12] {
            refused(&File::default().array("a", kind, n, &[0; 16]).bytes(), "a needs");
        }
        refused(&File::default().raw("a", 8, &n.to_le_bytes()).bytes(), "a ");
        let mut head = small().bytes();
        head[8..16].copy_from_slice(&n.to_le_bytes());
        refused(&head, "a table of");
        head[16..24].copy_from_slice(&n.to_le_bytes());
        refused(&head, "metadata of");
    }
    let error = Gguf::read(FOREIGN, &Limits::default().header_bytes(100)).unwrap_err();
    assert!(matches!(error, GgufError::TooLong { limit: 100 }), "{error}");
}

#[test]
fn full_arrays_take_a_small_multiple_of_their_bytes() {
    let _turn = alone();
    let n = 100_000;
    let empty = vec![""; n];
    assert!(read(&File::default().texts("a", empty).bytes()).is_ok());
    let many = (0..n / 10).fold(File::default(), |file, i| file.bool(&format!("{i:x}"), true));
    assert!(read(&many.bytes()).is_ok());
    let many = (0..n / 10).fold(File::default(), |file, i| file.tensor(&format!("{i:x}"), &[0, 1], 0, Vec::new()));
    assert!(read(&many.bytes()).is_ok());
}

#[test]
fn every_rule_that_is_broken_is_named() {
    let _turn = alone();
    refused(b"PK\x03\x04", "this is no GGUF file");
    refused(b"GGUF\x01\0\0\0", "GGUF version 1");
    refused(b"GGUF\0\0\0\x03", "big-endian");
    let file = File::default;
    refused(&file().u32("a", 1).u32("a", 1).bytes(), "a stands twice");
    refused(&file().f32_tensor("t", &[1], &[0.0]).f32_tensor("t", &[1], &[0.0]).bytes(), "tensor t stands twice");
    refused(&file().raw("a", 13, &[0; 8]).bytes(), "a is of type 13");
    refused(&file().array("a", 9, 0, &[0; 16]).bytes(), "array of arrays");
    refused(&file().u32("general.alignment", 33).bytes(), "general.alignment");
    refused(
        &file().tensor("t", &[32], 23, vec![0; 99]).bytes(),
        "tensor t is of type IQ4_XS; the types that are read are F32",
    );
    refused(&file().tensor("t", &[32], 999, vec![0; 99]).bytes(), "type number 999");
    refused(
        &file().tensor("t", &[2, 31], 8, vec![0; 99]).bytes(),
        "[2, 31] of Q8_0: a row is one or more whole blocks",
    );
    refused(&file().tensor("t", &[], 0, vec![0; 99]).bytes(), "1 to 4 dimensions");
    refused(&file().tensor("t", &[1; 5], 0, vec![0; 99]).bytes(), "1 to 4 dimensions");
    refused(&file().tensor("t", &[1 << 40, 1 << 40], 0, vec![0; 99]).bytes(), "not addressable");
    refused(&file().f32_tensor("t", &[9], &[0.0; 8]).bytes(), "the file is cut or damaged");
    let overlapping = file().f32_tensor("t", &[9], &[0.0; 8]).f32_tensor("u", &[9], &[0.0; 9]);
    refused(&overlapping.bytes(), "overlaps");
    refused(&file().text("\u{1b}]0;x\u{7}", "").raw("a", 77, &[0; 8]).bytes(), "type 77");
    let mut crooked = file().f32_tensor("t", &[8], &[0.0; 8]);
    crooked.alignment = 8;
    assert!(read(&crooked.clone().f32_tensor("u", &[1], &[0.0]).bytes()).is_ok());
    refused(&crooked.tensor("x", &[1], 0, vec![0; 8]).f32_tensor("u", &[1], &[0.0]).bytes(), "not aligned");
}

#[test]
fn blocks_and_elements_must_belong_together() {
    for (kind, bytes, elements) in [(BlockType::Q8_0, 33, 32), (BlockType::Q8_0, 34, 31), (BlockType::F32, 4, 2)] {
        let error = kind.dequantize(&vec![0; bytes], &mut vec![0.0; elements]).unwrap_err().to_string();
        assert!(error.contains(kind.name()) && error.contains(&bytes.to_string()), "{error}");
    }
}
