//! Files made to do harm, systematically: every value of the header replaced by every hostile one, every field removed and doubled, every
//! bit flipped, everything swollen as far as the format lets it; and the memory that each of them costs. ATTACKS.md has the list.
//!
//! The rules one at a time, with what is said about each, are in `corrupt.rs`; files cut at every byte in `cut.rs`.

mod samples;

use bitstack_core::Block;
use bitstack_format::{BlockSource, FormatError, Limits, ReadAt, StackFile, Verify};
use bitstack_io::in_one_line;
use peak_alloc::PeakAlloc;
use samples::{Forge, seal};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// The tests of this file take turns, so that what is counted is theirs.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    LazyLock::force(&GOOD);
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `f`; its value, and the most bytes of memory that it had at any time.
fn metered<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let value = f();
    (value, MEMORY.peak_usage() - before)
}

/// The bound that the documentation of [`Limits`] states for opening.
fn opening_bound(header_bytes: usize) -> usize {
    Limits::OPENING_BYTES_PER_HEADER_BYTE as usize * header_bytes + (64 << 10)
}

/// A block, which both ways of reading it must give, or neither.
fn block<S: ReadAt>(file: &StackFile<S>, weight: usize, block: usize) -> Option<Block> {
    let read = file.read_block(weight, block).ok();
    let extent = file.block_extent(weight, block).unwrap();
    // Allocated in halves, so that the bytes begin at an even address.
    let mut halves = vec![0u16; extent.len_bytes().div_ceil(2)];
    let bytes = &mut bytemuck::cast_slice_mut(&mut halves)[..extent.len_bytes()];
    let in_place = file.read_block_bytes(weight, block, Verify::Always, bytes).ok();
    let in_place = in_place.and_then(|()| extent.view(bytes).ok());
    assert_eq!(in_place, read.as_ref().map(Block::view));
    read
}

/// Everything that can be read from a file: what it is called, and its value, unless it cannot be read.
fn contents<S: ReadAt>(file: &StackFile<S>) -> Vec<(String, Option<String>)> {
    let mut all = Vec::new();
    for (w, weight) in file.weights().iter().enumerate() {
        let name = |b| format!("block {b} of weight {} of {:?}, rank {}", weight.name, weight.shape, weight.rank);
        all.extend((1..=weight.n_blocks()).map(|b| (name(b), block(file, w, b).map(|v| format!("{v:?}")))));
    }
    for t in file.base_tensors() {
        all.push((format!("{t:?}"), file.read_tensor(&t.name).ok().map(|v| format!("{:?}", v.data))));
    }
    for t in file.files() {
        all.push((format!("{t:?}"), file.read_file(&t.name).ok().map(|v| format!("{v:?}"))));
    }
    all
}

/// The values of the sample.
static GOOD: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let all = contents(&StackFile::open(samples::file()).unwrap());
    all.into_iter().map(|(_, value)| value.unwrap()).collect()
});

/// Opens a hostile file within the memory stated. If it opens, it may call things by other names, as any file may; every value must be
/// one of the sample's, or an error, which verification tells too.
///
/// Returns whether it opened.
fn survive(what: &str, bytes: &[u8]) -> bool {
    let (result, peak) = metered(|| StackFile::open(bytes));
    let header_bytes = if bytes.len() >= 8 { samples::data_offset_of(bytes).min(bytes.len()) } else { 0 };
    assert!(peak <= opening_bound(header_bytes), "{what}: {peak} bytes of memory for {header_bytes} of header");
    let file = match result {
        Err(error) => {
            let message = in_one_line(&error);
            assert!(
                !message.is_empty() && message.len() < 4000 && !message.chars().any(char::is_control),
                "{what}: {message:?}"
            );
            return false;
        }
        Ok(file) => file,
    };
    let (report, peak) = metered(|| file.verify(&mut |_, _| {}).unwrap());
    assert!(peak <= bytes.len() + (3 << 20), "{what}: {peak} bytes of memory to verify {}", bytes.len());
    for (name, value) in contents(&file) {
        match value {
            Some(value) => assert!(GOOD.contains(&value), "{what}: {name} is {value}"),
            None => assert!(!report.is_whole(), "{what}: {name} is not readable, but verified"),
        }
    }
    true
}

/// Values that a field should not have, or not here.
fn hostile_values() -> Vec<Value> {
    let mut values = vec![
        Value::Null,
        json!(true),
        json!(0),
        json!(1),
        json!(-1),
        json!(2.5),
        json!(1e300),
        json!(i64::MIN),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(1u64 << 32),
        json!(1u64 << 63),
        json!(""),
        json!("0"),
        json!("F64"),
        json!("file/../../etc/passwd"),
        json!("/etc/passwd"),
        json!("C:\\windows"),
        json!("pad.0"),
        json!("__metadata__"),
        json!("\u{0}"),
        json!("\u{1b}]0;x\u{7}"),
        json!("\u{202e}gnp.exe"),
        json!("x".repeat(5000)),
        json!([]),
        json!([0]),
        json!([0, 0]),
        json!([u64::MAX, u64::MAX]),
        json!({}),
        json!({"name": "x", "kind": "sign"}),
    ];
    values.extend([20, 100, 200].map(deep));
    values
}

/// A list of lists of lists.
fn deep(depth: usize) -> Value {
    (0..depth).fold(json!([]), |inner, _| json!([inner]))
}

/// Every place in a value, as a JSON pointer, the whole first.
fn places(value: &Value) -> Vec<String> {
    let mut all = vec![String::new()];
    let escaped = |key: &str| key.replace('~', "~0").replace('/', "~1");
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(k, v)| (escaped(k), v)).collect(),
        Value::Array(list) => list.iter().enumerate().map(|(i, v)| (i.to_string(), v)).collect(),
        _ => Vec::new(),
    };
    for (key, child) in children {
        all.extend(places(child).into_iter().map(|place| format!("/{key}{place}")));
    }
    all
}

/// Calls `check` with every way to replace, remove or double one place of a value.
fn every_change(value: &Value, mut check: impl FnMut(&str, Value)) {
    for place in places(value) {
        for hostile in hostile_values() {
            let mut changed = value.clone();
            *changed.pointer_mut(&place).unwrap() = hostile.clone();
            let shown: String = hostile.to_string().chars().take(60).collect();
            check(&format!("{place} = {shown}"), changed);
        }
        let Some((parent, key)) = place.rsplit_once('/') else { continue };
        let mut without = value.clone();
        let mut doubled = value.clone();
        match (without.pointer_mut(parent).unwrap(), doubled.pointer_mut(parent).unwrap()) {
            (Value::Object(without), Value::Object(doubled)) => {
                let key = key.replace("~1", "/").replace("~0", "~");
                let removed = without.shift_remove(&key).unwrap();
                doubled.insert(format!("{key} "), removed);
            }
            (Value::Array(without), Value::Array(doubled)) => {
                let removed = without.remove(key.parse().unwrap());
                doubled.push(removed);
            }
            _ => unreachable!("a place has a parent that holds it"),
        }
        check(&format!("{place} removed"), without);
        check(&format!("{place} twice"), doubled);
    }
}

#[test]
#[cfg_attr(miri, ignore = "thousands of files under Miri take hours")]
fn no_value_of_the_metadata_makes_a_panic_or_another_model() {
    let _turn = alone();
    let file = samples::file();
    let (mut n, mut n_opened) = (0, 0);
    let mut attack = |what: &str, forge: &Forge| {
        n += 1;
        n_opened += usize::from(survive(what, &forge.bytes()));
    };
    let forge = || Forge::new(&file);
    every_change(&forge().weights, |what, weights| attack(&format!("weights{what}"), &Forge { weights, ..forge() }));
    every_change(&forge().order, |what, order| attack(&format!("order{what}"), &Forge { order, ..forge() }));
    every_change(&Value::Object(forge().metadata), |what, metadata| {
        if let Value::Object(metadata) = metadata {
            attack(&format!("metadata{what}"), &Forge { metadata, ..forge() });
        }
    });
    // What may be changed without harm: names of methods, provenance, fields that nobody knows.
    assert!(n > 1000 && n_opened > 20 && n_opened < n / 4, "{n_opened} of {n} opened");
}

#[test]
#[cfg_attr(miri, ignore = "thousands of files under Miri take hours")]
fn no_value_of_the_tensors_makes_a_panic_or_another_model() {
    let _turn = alone();
    let file = samples::file();
    let mut n = 0;
    // The first of each kind: a file, a pad, an unstacked tensor, every part of a block; and the last of all.
    let kinds = [
        "file/config.json",
        "pad.0",
        "norm.weight",
        "block.1.signs",
        "block.1.v",
        "v_scale",
        "u_scale",
        "block.1.spikes",
        "block.3.u",
    ];
    for kind in kinds {
        let forge = Forge::new(&file);
        let at = forge.tensors.iter().position(|(name, _)| name.ends_with(kind)).unwrap();
        every_change(&forge.tensors[at].1, |what, tensor| {
            for lay_out in [false, true] {
                let mut forge = Forge::new(&file);
                forge.tensors[at].1 = tensor.clone();
                // With the tensors after it moved to fit, where that can be.
                if lay_out && !forge.try_lay_out() {
                    continue;
                }
                n += 1;
                survive(&format!("{kind}{what}"), &forge.bytes());
            }
        });
        for name in hostile_values().iter().filter_map(Value::as_str) {
            let mut forge = Forge::new(&file);
            forge.tensors[at].0 = name.to_owned();
            n += 1;
            survive(&format!("{kind} is called {name:?}"), &forge.bytes());
        }
    }
    for i in 0..Forge::new(&file).tensors.len() {
        let forge = |change: &dyn Fn(&mut Forge)| {
            let mut forge = Forge::new(&file);
            change(&mut forge);
            forge.bytes()
        };
        assert!(!survive("a tensor is missing", &forge(&|f| drop(f.tensors.remove(i)))));
        assert!(!survive("a tensor stands twice", &forge(&|f| f.tensors.insert(i, f.tensors[i].clone()))));
        if i > 0 {
            assert!(!survive("two tensors are swapped", &forge(&|f| f.tensors.swap(i, i - 1))));
        }
    }
    assert!(n > 1500, "{n}");
}

#[test]
#[cfg_attr(miri, ignore = "thousands of files under Miri take hours")]
fn no_byte_of_the_header_makes_a_panic_or_another_model() {
    let _turn = alone();
    let file = samples::file();
    let data = samples::data_offset(&file);
    // The hash of the header is set right each time, so that what is behind it is reached.
    for at in 8..data {
        for byte in
            [0, b'"', b'\\', b'{', b'}', b'[', b',', b'9', b'-', 0x7f, 0x80, 0xff, file[at] ^ 1, file[at] ^ 0x20]
        {
            let mut header = file[8..data].to_vec();
            header[at - 8] = byte;
            survive(&format!("byte {at} is {byte:#x}"), &samples::seal_bytes(&header, &file[data..]));
        }
    }
}

#[test]
fn every_flipped_bit_is_found_and_none_gives_another_model() {
    let _turn = alone();
    let whole = samples::file();
    let good = contents(&StackFile::open(&whole[..]).unwrap());
    let data = samples::data_offset(&whole);
    let mut bytes = whole.clone();
    for at in (0..whole.len()).step_by(if cfg!(miri) { 499 } else { 1 }) {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            match StackFile::open(&bytes[..]) {
                Err(_) => assert!(at < data, "byte {at} of the data, bit {bit}: opening reads the header only"),
                Ok(file) => {
                    assert!(at >= data, "byte {at} of the header, bit {bit}, was not noticed");
                    let report = file.verify(&mut |_, _| {}).unwrap();
                    assert_eq!(report.damaged.len(), 1, "byte {at}, bit {bit}");
                    let shown = contents(&file);
                    let lost: Vec<_> = shown.iter().zip(&good).filter(|(a, b)| a != b).map(|(a, _)| a).collect();
                    // A flipped bit of a pad harms nothing that is shown.
                    assert_eq!(shown.len(), good.len());
                    assert!(lost.len() <= 1 && lost.iter().all(|(_, v)| v.is_none()), "byte {at}, bit {bit}: {lost:?}");
                }
            }
            bytes[at] ^= 1 << bit;
        }
    }
}

/// Headers that make as much as they can of their bytes, about `n` of them.
fn swollen(n: usize) -> Vec<(&'static str, Vec<u8>)> {
    let file = samples::file();
    let forge = || Forge::new(&file);
    let text = |text: String| seal(&text, &[]);
    let list = |item: &str| vec![item; n / (item.len() + 1)].join(",");
    let with_metadata = |field: &str| forge().text().replacen("\"weights\":", &format!("{field},\"weights\":"), 1);
    // In the metadata quotes take a backslash each.
    let with_weights = |list: &str| {
        let mut forge = forge();
        forge.weights = json!("WEIGHTS");
        forge.text().replacen("\\\"WEIGHTS\\\"", &list.replace('"', "\\\""), 1)
    };
    let numbered = |n: usize, item: &dyn Fn(usize) -> String| (0..n).map(item).collect::<Vec<_>>().join(",");
    vec![
        ("provenance of nothing", text(with_metadata(&numbered(n / 12, &|i| format!("\"{i:x}\":\"\""))))),
        ("provenance kept", text(with_metadata(&numbered(n / 22, &|i| format!("\"provenance.{i:x}\":\"\""))))),
        (
            "an order of zeros",
            text(Forge { order: json!("ORDER"), ..forge() }.text().replacen(
                "\\\"ORDER\\\"",
                &format!("[{}]", list("0")),
                1,
            )),
        ),
        ("weights of two fields", text(with_weights(&format!("[{}]", list(r#"{"name":"","kind":""}"#))))),
        ("weights without fields", text(with_weights(&format!("[{}]", list(r#"{}"#))))),
        (
            "weights of all fields",
            text(with_weights(&format!(
                "[{}]",
                list(r#"{"name":"a","kind":"sign","rows":1,"cols":1,"rank":1,"method":"a","n_blocks":1}"#)
            ))),
        ),
        ("tensors", {
            // The hashes must be as many, or they are not looked at further.
            let n = n / 120;
            let tensors =
                numbered(n, &|i| format!(r#""{i:x}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1));
            let mut forge = forge();
            forge.metadata["blake3"] = json!("0".repeat(64 * n));
            forge.tensors.clear();
            let start = forge.text();
            text(format!("{},{tensors}}}", &start[..start.len() - 1]))
        }),
        (
            "a tensor of many dimensions",
            text(forge().text().replacen("\"shape\":[", &format!("\"shape\":[{},", list("1")), 1)),
        ),
        ("one long name", text(forge().text().replacen("file/config.json", &"x".repeat(n), 1))),
        ("one long key", text(with_metadata(&format!("\"{}\":\"\"", "\\u0001".repeat(n / 6))))),
        ("deep", text(forge().text().replacen("\"shape\":", &format!("\"shape\":{}", "[".repeat(n)), 1))),
        ("deep metadata", text(with_metadata(&format!("\"x\":{}", "{\"x\":".repeat(n / 5))))),
        ("deep weights", text(with_weights(&"[".repeat(n)))),
        ("escapes", text(with_metadata(&format!("\"x\":\"{}\"", "\\ud83d\\ude00".repeat(n / 12))))),
        ("spaces", text(format!("{}{}", forge().text(), " ".repeat(n)))),
    ]
}

#[test]
#[cfg_attr(miri, ignore = "megabytes under Miri take hours")]
fn opening_takes_no_more_memory_than_a_stated_multiple_of_the_header() {
    let _turn = alone();
    for (what, bytes) in swollen(4 << 20) {
        let (result, peak) = metered(|| StackFile::open(&bytes[..]).map(drop));
        let factor = peak as f64 / bytes.len() as f64;

        assert!(peak <= opening_bound(bytes.len()), "{what}: {factor:.1} bytes of memory per byte of header");
        assert!(result.is_err() || what == "spaces" || what == "escapes" || what.contains("provenance"), "{what}");
        // A caller who expects nothing of the kind has none of it.
        let limits = Limits { header_bytes: 1 << 16, ..Limits::default() };
        let (result, peak) = metered(|| StackFile::open_with(&bytes[..], &limits).map(drop));
        assert!(matches!(result, Err(FormatError::LimitExceeded { value, .. }) if value > 1 << 20), "{what}");
        assert!(peak < 1 << 10, "{what}: {peak} bytes of memory beyond the limit");
    }
}

#[test]
fn a_header_of_any_claimed_length_is_not_allocated_for_before_it_is_there() {
    let _turn = alone();
    let file = samples::file();
    for length in
        (0..64).map(|shift| 1u64 << shift).chain([99_999_992, 100_000_000, u64::MAX, u64::MAX - 7, i64::MAX as u64])
    {
        let mut bytes = file.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        let (result, peak) = metered(|| StackFile::open(&bytes[..]).map(drop));
        assert!(result.is_err() && peak < 2 * file.len(), "length {length}: {peak} bytes of memory");
    }
}

#[test]
#[cfg_attr(miri, ignore = "megabytes under Miri take hours")]
fn reading_and_copying_take_one_block_and_a_buffer() {
    let _turn = alone();
    let mut draft = bitstack_format::Draft::create_on(Vec::new(), "memory");
    let mut numbers = samples::Numbers(7);
    let shape = bitstack_core::Shape::new(512, 1024).unwrap();
    let w = draft.add_weight("w", shape, 4, "avd").unwrap();
    let like = samples::Like {
        planes: 1,
        basis: Some(bitstack_core::FactorType::F16),
        coefficients: bitstack_core::FactorType::F16,
        spikes: false,
    };
    for _ in 0..16 {
        draft.push_block(w, samples::block(shape, 4, like, &mut numbers).view()).unwrap();
    }
    draft.push_file("tokenizer.json", &vec![b' '; 8 << 20]).unwrap();
    let mut bytes = Vec::new();
    draft.finish(&[0; 16], &mut bytes, &mut |_, _| {}).unwrap();
    let file = StackFile::open(&bytes[..]).unwrap();
    let block_bytes = file.block_sizes()[0][0] as usize;
    assert_eq!(block_bytes, 512 * 128 + 4 * 1024 * 2 + 512 * 4 * 2);
    let buffer = (1 << 20) + (64 << 10);

    let (read, peak) = metered(|| file.read_block(0, 16).map(drop));
    assert!(read.is_ok() && peak <= block_bytes + 4096, "{peak} bytes of memory for a block of {block_bytes}");
    let (report, peak) = metered(|| file.verify(&mut |_, _| {}).unwrap());
    assert!(report.is_whole() && peak <= block_bytes + buffer, "{peak} bytes of memory to verify {}", bytes.len());
    let (written, peak) = metered(|| file.write_prefix(16, std::io::sink(), &mut |_, _| {}));
    assert!(written.is_ok() && peak <= buffer, "{peak} bytes of memory to copy {}", bytes.len());
}

/// The catalogue names the tests that hold us to it.
#[test]
fn every_test_that_the_catalogue_names_exists() {
    let sources = [
        include_str!("attacks.rs"),
        include_str!("corrupt.rs"),
        include_str!("cut.rs"),
        include_str!("storage.rs"),
        include_str!("../../bitstack-io/src/atomic.rs"),
    ];
    let is_name = |s: &&str| s.contains('_') && s.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    let names: Vec<&str> = include_str!("../ATTACKS.md").split('`').skip(1).step_by(2).filter(is_name).collect();
    assert!(names.len() > 30, "{names:?}");
    for name in names {
        assert!(sources.iter().any(|source| source.contains(&format!("fn {name}()"))), "there is no test {name}");
    }
}
