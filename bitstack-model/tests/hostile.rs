//! Checkpoints and tokenizers made to do harm: every value of every JSON file replaced by every hostile one, cut anywhere, swollen as far as
//! it goes. Opening gives a model or an error that names the file: never a panic, never memory beyond the stated limit, never other weights.

#[path = "fixtures/mod.rs"]
mod fixtures;
#[path = "fixtures/hostile.rs"]
mod hostile;

use bitstack_model::{Checkpoint, CheckpointLimits, ModelError, Tokenizer};
use fixtures::told;
use hostile::{MODEL, config, directory, every_change, safetensors_file, tensors};
use peak_alloc::PeakAlloc;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "a.safetensors";

/// The tests of this file take turns, so that what is counted is theirs.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `f`; its value, and the most bytes of memory that it had at any time.
fn metered<T>(f: impl FnOnce() -> T) -> (T, u64) {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let value = f();
    (value, (MEMORY.peak_usage() - before) as u64)
}

fn index() -> Value {
    let map: serde_json::Map<String, Value> = tensors().into_iter().map(|(name, _, _)| (name, json!(SHARD))).collect();
    json!({"metadata": {"total_size": 1}, "weight_map": map})
}

fn split(file: &[u8]) -> (Value, &[u8]) {
    let end = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    (serde_json::from_slice(&file[8..end]).unwrap(), &file[end..])
}

fn join(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Opens and loads within the memory stated; the error, if there is one, is fit to be shown. Whether it loaded.
fn survive(what: &str, dir: &Path) -> bool {
    let mut read_bytes = 0;
    for entry in dir.read_dir().unwrap() {
        read_bytes += entry.unwrap().metadata().unwrap().len();
    }
    let (result, peak) = metered(|| Checkpoint::open(dir));
    let bound = CheckpointLimits::OPENING_BYTES_PER_BYTE * read_bytes + (1 << 20);
    assert!(peak <= bound, "{what}: {peak} bytes of memory for {read_bytes} of files");
    let result = result.and_then(|checkpoint| {
        assert!(checkpoint.stored_bytes() <= read_bytes);
        let config = checkpoint.config();
        config.weights().iter().try_for_each(|weight| checkpoint.weight(weight).map(drop))?;
        config.other_tensors().iter().try_for_each(|vector| checkpoint.vector(vector).map(drop))
    });
    match result {
        Ok(()) => true,
        Err(error) => {
            let message = told(&error);
            assert!(!message.is_empty() && !message.chars().any(char::is_control), "{what}: {message:?}");
            false
        }
    }
}

#[test]
fn the_model_itself_loads() {
    let _turn = alone();
    let config = config().to_string();
    let single = directory(&[("config.json", config.as_bytes()), (MODEL, &safetensors_file())]);
    assert!(survive("as it is", single.path()));
    let index = index().to_string();
    let sharded =
        directory(&[("config.json", config.as_bytes()), (INDEX, index.as_bytes()), (SHARD, &safetensors_file())]);
    assert!(survive("sharded", sharded.path()));
}

#[test]
fn no_value_of_a_config_makes_a_panic() {
    let _turn = alone();
    let dir = directory(&[(MODEL, &safetensors_file())]);
    let (mut n, mut n_loaded) = (0, 0);
    for (what, changed) in every_change(&config()) {
        fs::write(dir.path().join("config.json"), changed.to_string()).unwrap();
        n += 1;
        n_loaded += usize::from(survive(&format!("config.json{what}"), dir.path()));
    }
    assert!(n > 500 && n_loaded > 20 && n_loaded < n / 2, "{n_loaded} of {n} loaded");
    fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    for (what, changed) in every_change(&json!({"eos_token_id": [1, 2], "temperature": 0.5})) {
        fs::write(dir.path().join("generation_config.json"), changed.to_string()).unwrap();
        survive(&format!("generation_config.json{what}"), dir.path());
    }
}

#[test]
fn no_value_of_an_index_makes_a_panic_or_leads_out_of_the_directory() {
    let _turn = alone();
    let config = config().to_string();
    let outer = directory(&[(SHARD, &safetensors_file())]);
    let dir = outer.path().join("model");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("config.json"), &config).unwrap();
    fs::write(dir.join(SHARD), safetensors_file()).unwrap();
    for (what, changed) in every_change(&index()) {
        fs::write(dir.join(INDEX), changed.to_string()).unwrap();
        survive(&format!("index{what}"), &dir);
    }
    // A shard with every tensor lies right outside, and must not be found.
    let absolute = outer.path().join(SHARD).display().to_string();
    for shard in ["../a.safetensors", "./../a.safetensors", "model/../../a.safetensors", "..", ".", "", "/", &absolute]
    {
        let mut index = index();
        index["weight_map"].as_object_mut().unwrap().values_mut().for_each(|s| *s = json!(shard));
        fs::write(dir.join(INDEX), index.to_string()).unwrap();
        let error = Checkpoint::open(&dir).unwrap_err();
        assert!(error.to_string().contains("not a plain file name"), "{shard:?}: {error}");
        assert!(matches!(&error, ModelError::BadCheckpoint { path, .. } if path.ends_with(INDEX)));
    }
}

#[test]
fn no_value_of_a_tensor_header_makes_a_panic() {
    let _turn = alone();
    let config = config().to_string();
    let file = safetensors_file();
    let (header, data) = split(&file);
    let dir = directory(&[("config.json", config.as_bytes())]);
    let mut n = 0;
    for (what, changed) in every_change(&header) {
        fs::write(dir.path().join(MODEL), join(&changed.to_string(), data)).unwrap();
        survive(&format!("header{what}"), dir.path());
        n += 1;
    }
    assert!(n > 2000, "{n}");
    // Doubled names, with the same and with other contents.
    let text = header.to_string();
    let (name, tensor) = header.as_object().unwrap().iter().next().unwrap();
    for tensor in [tensor.clone(), json!({"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]})] {
        fs::write(dir.path().join(MODEL), join(&format!("{},\"{name}\":{tensor}}}", &text[..text.len() - 1]), data))
            .unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("tensor {name} stands twice")) && error.contains(MODEL), "{error}");
    }
}

#[test]
fn no_byte_of_a_tensor_header_makes_a_panic() {
    let _turn = alone();
    let config = config().to_string();
    let file = safetensors_file();
    let dir = directory(&[("config.json", config.as_bytes())]);
    let end = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    for at in 0..end {
        for byte in [b'"', b'9', 0x80] {
            let mut bytes = file.clone();
            bytes[at] = byte;
            fs::write(dir.path().join(MODEL), bytes).unwrap();
            survive(&format!("byte {at} is {byte:#x}"), dir.path());
        }
    }
}

#[test]
fn a_file_cut_at_any_byte_is_named() {
    let _turn = alone();
    let (config, index) = (config().to_string(), index().to_string());
    let file = safetensors_file();
    let dir = directory(&[("config.json", config.as_bytes()), (INDEX, index.as_bytes()), (SHARD, &file)]);
    for (name, bytes) in [("config.json", config.as_bytes()), (INDEX, index.as_bytes()), (SHARD, &file[..])] {
        let steps = if name == SHARD { 1 } else { 3 };
        for cut in (0..bytes.len()).step_by(steps) {
            fs::write(dir.path().join(name), &bytes[..cut]).unwrap();
            let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(name), "{name} of {cut} bytes: {error}");
        }
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    fs::remove_file(dir.path().join(SHARD)).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(&error, ModelError::Io { path, .. } if path.ends_with(SHARD)), "{error}");
}

#[test]
#[cfg(unix)]
fn what_is_not_a_regular_file_is_refused_and_not_waited_for() {
    let _turn = alone();
    let config = config().to_string();
    for name in ["config.json", MODEL, "generation_config.json"] {
        let dir = directory(&[("config.json", config.as_bytes()), (MODEL, &safetensors_file())]);
        let path = dir.path().join(name);
        let _ = fs::remove_file(&path);
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let error = told(&Checkpoint::open(dir.path()).unwrap_err());
        assert!(error.contains(name) && error.contains("not a regular file"), "{error}");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        let error = told(&Checkpoint::open(dir.path()).unwrap_err());
        assert!(error.contains(name) && error.contains("not a regular file"), "{error}");
    }
}

#[test]
fn opening_takes_no_more_memory_than_a_stated_multiple_of_the_files() {
    let _turn = alone();
    let config = config().to_string();
    let n = 2 << 20;
    let list = |item: &str| vec![item; n / (item.len() + 1)].join(",");
    let numbered = |n: usize, item: &dyn Fn(usize) -> String| (0..n).map(item).collect::<Vec<_>>().join(",");
    let tensor = |i: usize| format!(r#""{i:x}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{}]}}"#, i + 1);
    let empty = |i: usize| format!(r#""{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let headers = [
        ("tensors", format!("{{{}}}", numbered(n / 52, &tensor)), n / 52),
        ("empty tensors", format!("{{{}}}", numbered(n / 52, &empty)), 0),
        ("dimensions", format!(r#"{{"a":{{"dtype":"U8","shape":[{}],"data_offsets":[0,1]}}}}"#, list("1")), 1),
        ("metadata", format!(r#"{{"__metadata__":{{{}}}}}"#, numbered(n / 12, &|i| format!("\"{i:x}\":\"\""))), 0),
        ("depth", format!(r#"{{"__metadata__":{}"#, "[".repeat(n)), 0),
        ("one name", format!(r#"{{"{}":0}}"#, "x".repeat(n)), 0),
        ("no tensors", format!("{{{}}}", numbered(n / 12, &|i| format!("\"{i:x}\":{{}}"))), 0),
    ];
    for (what, header, n_data) in headers {
        let model = join(&header, &vec![0; n_data]);
        let dir = directory(&[("config.json", config.as_bytes()), (MODEL, &model)]);
        assert!(!survive(what, dir.path()));
        let limits = CheckpointLimits { header_bytes: 1 << 16, ..CheckpointLimits::default() };
        let (error, peak) = metered(|| Checkpoint::open_with(dir.path(), &limits).unwrap_err().to_string());
        assert!(
            error.contains("the limit is 65536") && error.contains(MODEL) && peak < 1 << 17,
            "{what}: {error}, {peak}"
        );
    }
    let n = 900_000;
    let list = |item: &str| vec![item; n / (item.len() + 1)].join(",");
    let jsons = [
        format!("[{}]", list("[]")),
        format!("[{}]", list("0")),
        format!(r#"{{"eos_token_id":[{}]}}"#, list("1")),
        format!("{{{}}}", numbered(n / 8, &|i| format!("\"{i:x}\":[]"))),
        format!(r#"{{"weight_map":{{{}}}}}"#, numbered(n / 12, &|i| format!("\"{i:x}\":\"\""))),
        format!(r#"{{"weight_map":{{{}}}}}"#, numbered(n / 16, &|i| format!("\"{i:x}\":\"{i:x}\""))),
        "[".repeat(n),
    ];
    for (i, text) in jsons.iter().enumerate() {
        for name in ["config.json", "generation_config.json", INDEX] {
            let dir = directory(&[("config.json", config.as_bytes()), (name, text.as_bytes())]);
            assert!(!survive(&format!("{name} {i}"), dir.path()));
            let limits =
                CheckpointLimits { config_bytes: 1 << 16, index_bytes: 1 << 16, ..CheckpointLimits::default() };
            let (error, peak) = metered(|| Checkpoint::open_with(dir.path(), &limits).unwrap_err());
            assert!(matches!(&error, ModelError::FileTooLarge { path, .. } if path.ends_with(name)), "{error}");
            assert!(peak < 1 << 18, "{name} {i}: {peak}");
        }
    }
}

#[test]
fn a_header_of_any_claimed_length_is_not_allocated_for_before_it_is_there() {
    let _turn = alone();
    let config = config().to_string();
    for shift in 12..64 {
        let dir = directory(&[("config.json", config.as_bytes()), (MODEL, &(1u64 << shift).to_le_bytes())]);
        let (error, peak) = metered(|| Checkpoint::open(dir.path()).unwrap_err().to_string());
        assert!(error.contains(MODEL) && peak < 1 << 16, "{error}, {peak} bytes");
    }
}

#[test]
fn the_limits_on_tensors_and_companions_are_kept() {
    let _turn = alone();
    let config = config().to_string();
    let dir = directory(&[
        ("config.json", config.as_bytes()),
        (MODEL, &safetensors_file()),
        ("tokenizer.json", &[b' '; 100]),
    ]);
    // The embedding is 5 x 4 in F16.
    let limits = CheckpointLimits { tensor_bytes: 39, ..CheckpointLimits::default() };
    let error = Checkpoint::open_with(dir.path(), &limits).unwrap_err().to_string();
    assert!(error.contains("model.embed_tokens.weight has 40 bytes; the limit is 39"), "{error}");
    let limits = CheckpointLimits { companion_bytes: 99, ..CheckpointLimits::default() };
    let checkpoint = Checkpoint::open_with(dir.path(), &limits).unwrap();
    let error = checkpoint.companion("tokenizer.json").unwrap_err();
    assert!(matches!(error, ModelError::FileTooLarge { bytes: 100, limit: 99, .. }), "{error}");
}

/// Small tokenizers of each kind.
fn tokenizers() -> Vec<Value> {
    let whole = |model: Value| {
        json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
            "added_tokens": [{"id": 5, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": "_"}]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\d|[^\\d]+"}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}]},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": model,
        })
    };
    vec![
        whole(
            json!({"type": "BPE", "dropout": null, "unk_token": "a", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": true, "ignore_merges": false, "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4},
            "merges": [["a", "b"], ["ab", "c"]]}),
        ),
        whole(
            json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {"a": 0, "##b": 1, "c": 2}}),
        ),
        whole(
            json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": [["a", 0.0], ["b", -1.0], ["ab", -0.5]]}),
        ),
        whole(json!({"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "b": 1}})),
    ]
}

fn use_tokenizer(bytes: &[u8]) -> bool {
    let Ok(tokenizer) = Tokenizer::from_bytes(bytes) else { return false };
    for text in ["", "abc ab12 <s> \u{e9}\u{1f600}", "\u{0}"] {
        let tokens = tokenizer.encode(text).unwrap_or_default();
        let _ = tokenizer.decode(&tokens);
        let mut stream = tokenizer.stream(&[0, u32::MAX]);
        for token in tokens.into_iter().chain([0, 1, u32::MAX]) {
            let _ = stream.push(token);
        }
        let _ = stream.finish();
    }
    true
}

#[test]
fn no_value_of_a_tokenizer_makes_a_panic() {
    let _turn = alone();
    let mut n_used = 0;
    for tokenizer in tokenizers() {
        assert!(
            use_tokenizer(tokenizer.to_string().as_bytes()),
            "{:?}",
            Tokenizer::from_bytes(tokenizer.to_string().as_bytes()).err()
        );
        for (what, changed) in every_change(&tokenizer) {
            let text = changed.to_string();
            let used = std::panic::catch_unwind(|| use_tokenizer(text.as_bytes()));
            n_used += usize::from(used.unwrap_or_else(|_| panic!("tokenizer {}{what}", tokenizer["model"]["type"])));
        }
        let text = tokenizer.to_string();
        for cut in 0..text.len() {
            assert!(Tokenizer::from_bytes(&text.as_bytes()[..cut]).is_err());
        }
    }
    assert!(n_used > 500, "{n_used}");
}

#[test]
fn a_config_that_claims_all_experts_there_may_be_takes_no_more_than_is_stated() {
    let _turn = alone();
    let directory = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixtures::data("mixtral").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["num_hidden_layers"] = json!(1024);
    let mut open = |n_experts: usize| {
        config["num_local_experts"] = json!(n_experts);
        fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        fixtures::write_tensors(directory.path(), safetensors::Dtype::BF16, []);
        metered(|| told(&Checkpoint::open(directory.path()).unwrap_err()))
    };
    let (message, peak) = open(32);
    assert!(message.contains("model.embed_tokens.weight") && peak <= 64 << 20, "{peak} bytes: {message}");
    let (message, peak) = open(33);
    assert!(message.contains("num_local_experts") && peak <= 1 << 20, "{peak} bytes: {message}");
}
