//! The command as a user meets it: what it prints, where, and with which exit status.
#![expect(clippy::print_stdout, reason = "a test that is skipped says so")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::{fs, str};

/// The built-in model's directory.
fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/tiny-llama")
}

fn text() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/text.txt")
}

fn bitstack<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bitstack")).args(arguments).output().unwrap()
}

/// Runs a line of arguments; `{}` stands for the paths, in turn.
fn line(arguments: &str, paths: &[&Path]) -> Output {
    let mut paths = paths.iter();
    bitstack(arguments.split(' ').filter(|a| !a.is_empty()).map(|a| match a {
        "{}" => paths.next().unwrap().as_os_str().to_owned(),
        other => other.into(),
    }))
}

fn stdout(output: &Output) -> &str {
    str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    str::from_utf8(&output.stderr).unwrap()
}

/// A failure: this status, nothing on stdout, and one line on stderr that has all of these words.
#[track_caller]
fn fails(output: &Output, status: i32, words: &[&str]) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(status), "{message}");
    assert_eq!(stdout(output), "");
    let errors: Vec<&str> = message.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{message}");
    assert!(message.lines().count() <= 4, "{message}");
    for word in words {
        assert!(message.contains(word), "no '{word}' in: {message}");
    }
}

#[track_caller]
fn succeeds(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
}

/// `compress` has written its file; whether it is near to its model is not what is tested: fewer blocks than usual are faster.
#[track_caller]
fn is_written(output: &Output) {
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}", stderr(output));
}

/// The built-in model, compressed once for all tests: 4 blocks, calibrated on the text.
fn stack() -> &'static Path {
    static STACK: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = STACK.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.bitstack");
        let output = line(
            "compress {} -o {} --blocks 4 --samples 4 --seq-len 128 --calibration {} --quiet",
            &[&model(), &path, &text()],
        );
        is_written(&output);
        assert!(stdout(&output).starts_with("resident bytes"), "results are printed");
        assert!(stderr(&output).lines().all(|l| l.starts_with("warning: ")), "quiet is quiet: {}", stderr(&output));
        (dir, path)
    });
    path
}

/// A copy of the model's directory in which one file is changed.
fn changed_model(file: &str, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(model()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join(file);
    match change(fs::read(&path).unwrap()) {
        Some(bytes) => fs::write(path, bytes).unwrap(),
        None => fs::remove_file(path).unwrap(),
    }
    dir
}

fn json(output: &Output) -> serde_json::Value {
    succeeds(output);
    serde_json::from_str(stdout(output)).unwrap()
}

#[test]
fn plans_never_exceed_the_budget_and_a_larger_budget_never_gives_less() {
    let inspect = json(&line("inspect {} --json", &[stack()]));
    let (least, most) = (inspect["minimum_bytes"].as_u64().unwrap(), inspect["total_bytes"].as_u64().unwrap());
    let mut last = 0;
    for i in 0..=12 {
        let budget = least + (most - least) * i / 12;
        let plan = json(&line(&format!("plan {{}} --memory {budget} --json"), &[stack()]));
        let resident = plan["resident_bytes"].as_u64().unwrap();
        assert!(resident <= budget && resident >= last);
        last = resident;
    }
    assert_eq!(last, most);
    let below = least - 1;
    fails(&line(&format!("plan {{}} --memory {below}"), &[stack()]), 2, &[&below.to_string(), &least.to_string()]);
}

/// The table of `--timings` has a line for each part, in their order, and one for all of them, whose time is theirs.
#[test]
fn timings_have_a_line_for_every_part_and_add_up() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("timed.bitstack");
    let arguments = "-q compress {} -o {} --calibration {} --samples 2 --seq-len 16 --blocks 2 --timings";
    let output = line(arguments, &[&model(), &file, &text()]);
    is_written(&output);
    // Two blocks are far from the model, which is said behind the table.
    let rows: Vec<&str> = stderr(&output).lines().skip(1).take_while(|row| !row.starts_with("warning")).collect();
    let names: Vec<&str> = rows.iter().map(|row| row[..14].trim()).collect();
    let expected = [
        "opening",
        "text",
        "importance",
        "calibration",
        "gram matrices",
        "decomposition",
        "sensitivity",
        "check",
        "quality",
        "writing",
        "all",
    ];
    assert_eq!(names, expected);
    let seconds: Vec<f64> =
        rows.iter().map(|row| row[14..].split_whitespace().next().unwrap().parse().unwrap()).collect();
    // Each is rounded to a tenth.
    let (all, parts) = seconds.split_last().unwrap();
    assert!((all - parts.iter().sum::<f64>()).abs() <= 0.05 * seconds.len() as f64, "{rows:?}");
}

#[test]
fn inspect_shows_how_many_spikes_a_weight_has_and_their_bytes() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bitstack-format/tests/golden/v1-spikes.bitstack");
    let inspect = json(&line("inspect {} --json", &[&file]));
    let shown = |w: usize| ["spikes", "spike_bytes"].map(|field| inspect["weights"][w][field].as_u64().unwrap());
    // Seven spikes and four entries that bridge gaps, 15 sizes, the ends of three tiles; and a list of one tile without entries.
    assert_eq!([shown(0), shown(1)], [[11, 2 * (11 + 15 + 6)], [0, 2 * (15 + 2)]]);
    let output = line("inspect {}", &[&file]);
    succeeds(&output);
    assert!(stdout(&output).contains("11 entries"), "{}", stdout(&output));
}

/// What `generate` needs beside the weights, as it says itself when it has too little.
fn beside(arguments: &str, file: &Path) -> u64 {
    let output = line(&format!("{arguments} --memory 1"), &[file]);
    fails(&output, 2, &["--memory 1 is too little", "cache", "scratch", "--context"]);
    let numbers: Vec<u64> = stderr(&output).split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
    let [1, needed, least, ..] = numbers[..] else { panic!("{}", stderr(&output)) };
    succeeds(&line(&format!("{arguments} --memory {needed}"), &[file]));
    fails(&line(&format!("{arguments} --memory {}", needed - 1), &[file]), 2, &[&needed.to_string()]);
    needed - least
}

#[test]
fn a_shorter_context_leaves_more_to_the_weights() {
    let arguments = "generate {} --prompt The --max-tokens 100";
    let [all, some] = ["", " --context 20"].map(|rest| beside(&format!("{arguments}{rest}"), stack()));
    assert!(some < all, "{some} of {all}");
    let output = line(&format!("{arguments} --context 20 --temperature 0"), &[stack()]);
    succeeds(&output);
    assert!(stderr(&output).contains("for 20 tokens"), "{}", stderr(&output));
    fails(&line(&format!("{arguments} --context 100000"), &[stack()]), 2, &["--context 100000", "positions"]);
    fails(&line("generate {} --prompt The --context 1", &[stack()]), 2, &["prompt has", "context of 1"]);
}

#[test]
fn a_truncated_file_is_the_plan_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small.bitstack");
    let plan = json(&line("plan {} --memory 200kB --json", &[stack()]));
    succeeds(&line("truncate {} --memory 200kB -o {}", &[stack(), &small]));
    let inspect = json(&line("inspect {} --json", &[&small]));
    assert_eq!(inspect["total_bytes"], plan["resident_bytes"]);
    assert!(stdout(&line("verify {}", &[&small])).contains("all as written"));
    // The same text comes out of the smaller file and out of the plan.
    let arguments = "generate {} --prompt The --max-tokens 20 --seed 3";
    let memory = 200_000 + beside(arguments, stack());
    let [a, b] = [&small, stack()].map(|file| line(&format!("{arguments} --memory {memory}"), &[file]));
    succeeds(&a);
    assert_eq!(stdout(&a), stdout(&b));
    assert!(stderr(&a).contains("tokens/s"));
    fails(&line("truncate {} --memory 200kB -o {}", &[stack(), &small]), 2, &["small.bitstack", "--force"]);
    succeeds(&line("truncate {} --memory 200kB -o {} --force", &[stack(), &small]));
}

#[test]
fn eval_measures_every_size_and_draws_it() {
    let dir = tempfile::tempdir().unwrap();
    let picture = dir.path().join("curve.svg");
    let output = line(
        "eval {} --text {} --steps 3 --samples 4 --seq-len 128 --reference {} --json --plot {}",
        &[stack(), &text(), &model(), &picture],
    );
    let rows = json(&output);
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 3);
    for row in rows {
        for key in [
            "budget_bytes",
            "resident_bytes",
            "bits_per_weight",
            "perplexity",
            "perplexity_stderr",
            "kl",
            "top1",
            "tokens",
        ] {
            assert!(row[key].is_number(), "{key} of {row}");
        }
        assert_eq!(row["tokens"], 4 * 127);
    }
    assert!(rows[0]["kl"].as_f64() > rows[2]["kl"].as_f64());
    assert!(fs::read_to_string(&picture).unwrap().contains("KL divergence"));

    // The uncompressed model does not diverge from itself.
    let same =
        json(&line("eval {} --text {} --samples 2 --seq-len 64 --reference {} --json", &[&model(), &text(), &model()]));
    assert_eq!(same[0]["kl"], 0.0);
    assert_eq!(same[0]["top1"], 1.0);
}

#[test]
fn a_file_cut_anywhere_after_the_smallest_model_is_used_with_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let whole = fs::read(stack()).unwrap();
    let cut = dir.path().join("cut.bitstack");
    fs::write(&cut, &whole[..whole.len() * 2 / 3]).unwrap();
    let output = line("generate {} --prompt The --max-tokens 5", &[&cut]);
    succeeds(&output);
    assert!(stderr(&output).contains("warning: ") && stderr(&output).contains("missing"), "{}", stderr(&output));
    let verify = line("verify {}", &[&cut]);
    assert_eq!(verify.status.code(), Some(1));
    assert!(stdout(&verify).lines().all(|l| l.starts_with("missing: ")));
    fs::write(&cut, &whole[..100]).unwrap();
    fails(&line("inspect {}", &[&cut]), 1, &["cut.bitstack", "header"]);
}

#[test]
fn a_damaged_block_is_named_and_what_comes_before_it_still_works() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = fs::read(stack()).unwrap();
    let at = bytes.len() - 40;
    bytes[at] ^= 1;
    let damaged = dir.path().join("damaged.bitstack");
    fs::write(&damaged, bytes).unwrap();
    let verify = line("verify {}", &[&damaged]);
    assert_eq!(verify.status.code(), Some(1));
    let name = stdout(&verify).split(' ').nth(1).unwrap().trim_end_matches(':').to_owned();
    assert!(name.contains(".block."), "{name}");
    fails(&line("generate {} --prompt The", &[&damaged]), 1, &["damaged.bitstack", &name]);
    succeeds(&line("generate {} --prompt The --max-tokens 5 --memory 300kB", &[&damaged]));
}

#[test]
fn bad_model_directories_are_named_with_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.bitstack");
    let nowhere = dir.path().join("nowhere");
    let compress = |model: &Path| line("compress {} -o {} --blocks 1 --samples 1 --seq-len 32", &[model, &out]);
    fails(&compress(&nowhere), 1, &["nowhere", "config.json"]);

    let config = |from: &'static str, to: &'static str| {
        changed_model("config.json", move |bytes| {
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.contains(from));
            Some(text.replace(from, to).into_bytes())
        })
    };
    fails(&compress(config("\"llama\"", "\"gpt2\"").path()), 1, &["gpt2", "Llama"]);
    fails(&compress(config("\"hidden_size\": 128", "\"hidden_size\": 0").path()), 1, &["config.json", "hidden_size"]);
    fails(&compress(config("\"hidden_size\": 128", "\"hidden_size\": 64").path()), 1, &["shape", "128", "64"]);
    fails(&compress(config("{", "[").path()), 1, &["config.json", "JSON"]);
    fails(
        &compress(config("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3").path()),
        1,
        &["model.layers.2", "missing"],
    );
    fails(&compress(changed_model("config.json", |_| None).path()), 1, &["config.json"]);
    fails(&compress(changed_model("model.safetensors", |_| None).path()), 1, &["model.safetensors"]);
    fails(
        &compress(changed_model("model.safetensors", |b| Some(b[..b.len() - 7].to_vec())).path()),
        1,
        &["model.safetensors"],
    );
    let nan = changed_model("model.safetensors", |mut bytes| {
        let n = bytes.len();
        bytes[n - 2..].copy_from_slice(&0x7fc0_u16.to_le_bytes()); // a bf16 NaN
        Some(bytes)
    });
    fails(&compress(nan.path()), 1, &["NaN", "tensor"]);
    assert!(!out.exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn bad_texts_are_named_with_both_lengths() {
    let dir = tempfile::tempdir().unwrap();
    let (empty, short, binary) = (dir.path().join("empty"), dir.path().join("short"), dir.path().join("binary"));
    fs::write(&empty, "").unwrap();
    fs::write(&short, "Too short.").unwrap();
    fs::write(&binary, [0xff, 0xfe, 0]).unwrap();
    let eval = |text: &Path| line("eval {} --text {}", &[stack(), text]);
    fails(&eval(&empty), 1, &["empty"]);
    fails(&eval(&short), 1, &["short", "512"]);
    fails(&eval(&binary), 1, &["binary", "UTF-8"]);
    fails(&eval(&dir.path().join("none")), 1, &["none", "No such file"]);
    let out = dir.path().join("out.bitstack");
    fails(&line("compress {} -o {} --calibration {}", &[&model(), &out, &short]), 1, &["tokens", "512"]);
    assert!(!out.exists());
}

#[test]
fn outputs_that_cannot_be_written_are_refused_before_any_work() {
    let exists = stack();
    let started = std::time::Instant::now();
    fails(&line("compress {} -o {}", &[&model(), exists]), 2, &["tiny.bitstack exists", "--force"]);
    fails(&line("compress {} -o {}", &[&model(), Path::new("/nowhere/at/all.bitstack")]), 2, &["/nowhere/at"]);
    // Nothing was calibrated: a line of progress comes every five seconds, and none came; the whole work takes longer.
    assert!(started.elapsed().as_secs() < 5);
}

#[test]
fn wrong_usage_has_status_2_and_says_what_is_right() {
    for (arguments, words) in [
        ("plan {} --memory 4XB", &["4XB", "GiB"][..]),
        ("plan {}", &["--memory"]),
        ("eval {} --text x --steps 0", &["--steps"]),
        ("eval {} --text x --memory 1GB --steps 3", &["--steps", "--memory"]),
        ("compress {} -o x --method magic", &["magic", "avd"]),
        ("compress {}", &["--output"]),
        ("compress {} -o x --spikes", &["--spikes", "--method avd"]),
        ("bench decode {} --levels 0", &["--levels", "1..=16"]),
        ("bench load {} --rounds 0", &["--rounds", "1..=1000"]),
        ("frobnicate {}", &["frobnicate"]),
    ] {
        let output = line(arguments, &[stack()]);
        assert_eq!(output.status.code(), Some(2), "{arguments}");
        for word in words {
            assert!(stderr(&output).contains(word), "{arguments}: {}", stderr(&output));
        }
    }
    let help = bitstack(["--help"]);
    succeeds(&help);
    for command in [
        "compress", "inspect", "verify", "plan", "truncate", "eval", "generate", "chat", "import", "export", "bench",
        "demo",
    ] {
        assert!(stdout(&help).contains(command));
    }
}

#[test]
fn sizes_may_be_left_to_the_system_and_the_first_text_need_not_wait_for_the_last_block() {
    for rest in ["--memory auto", "--progressive", "--memory AUTO --progressive"] {
        let output = line(&format!("generate {{}} --prompt Once --max-tokens 8 {rest}"), &[stack()]);
        succeeds(&output);
        assert!(stdout(&output).starts_with("Once"));
        assert!(stderr(&output).contains("resident") && stderr(&output).contains("tokens/s"), "{}", stderr(&output));
    }
    fails(&line("generate {} --prompt Once --memory auto", &[&model()]), 2, &["one size", "compress"]);
}

#[test]
fn the_same_seed_gives_the_same_text_and_greedy_needs_none() {
    let generate = |rest: &str| {
        let output = line(&format!("generate {{}} --prompt Once --max-tokens 16 {rest}"), &[stack()]);
        succeeds(&output);
        stdout(&output).to_owned()
    };
    assert_eq!(generate("--seed 5"), generate("--seed 5"));
    assert_ne!(generate("--seed 5"), generate("--seed 6"));
    assert_eq!(generate("--temperature 0 --seed 5"), generate("--temperature 0 --seed 6"));
    assert_eq!(generate("--top-k 1 --seed 5"), generate("--temperature 0"));
    assert!(generate("").starts_with("Once"));
}

#[test]
fn blocks_go_out_to_the_published_layout_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let [made, out, back, again] = ["made.bitstack", "out", "back.bitstack", "again"].map(|name| dir.path().join(name));
    let compress = "compress {} -o {} --method avd --blocks 3 --keep-embeddings --samples 2 --seq-len 64 --order random --calibration {}";
    is_written(&line(compress, &[&model(), &made, &text()]));
    succeeds(&line("export {} --as reference -o {}", &[&made, &out]));
    let import = line("import {} -o {}", &[&out, &back]);
    succeeds(&import);
    assert!(stderr(&import).contains("42 blocks of 14 weights"), "{}", stderr(&import));
    succeeds(&line("verify {}", &[&back]));
    let inspect = |file: &Path| json(&line("inspect {} --json", &[file]));
    for field in ["order", "minimum_bytes", "total_bytes"] {
        assert_eq!(inspect(&back)[field], inspect(&made)[field], "{field}");
    }
    succeeds(&line("export {} --as reference -o {} --quiet", &[&back, &again]));
    for file in ["model.safetensors", "compression_config.json", "config.json", "tokenizer.json"] {
        assert_eq!(fs::read(out.join(file)).unwrap(), fs::read(again.join(file)).unwrap(), "{file}");
    }

    fails(&line("import {} -o {}", &[&out, &back]), 2, &["back.bitstack exists", "--force"]);
    fails(&line("export {} --as reference -o {}", &[&made, &out]), 2, &["out exists", "--force"]);
    succeeds(&line("export {} --as reference -o {} --force", &[&made, &out]));
    fails(&line("export {} -o {} --force", &[&made, dir.path()]), 1, &["not replaced", "remove it yourself"]);
    let other = dir.path().join("other");
    fails(&line("import {} -o {}", &[&model(), &other]), 1, &["vt_0", "missing"]);
    fails(&line("export {} --as reference -o {}", &[stack(), &other]), 1, &["model.embed_tokens", "--keep-embeddings"]);
    assert!(!other.exists());
}

#[test]
fn a_dense_export_says_what_the_stack_says() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    succeeds(&line("export {} --memory 200kB --dtype f32 --shard-size 1MB -o {}", &[stack(), &out]));
    assert!(out.join("model.safetensors.index.json").exists());
    succeeds(&line("generate {} --prompt The --max-tokens 20", &[&out]));
    // Two kernels, so the last bits of logits differ; sampled texts may, where two tokens are as likely.
    let same = "eval {} --memory 200kB --reference {} --text {} --samples 1 --json";
    let kl = json(&line(same, &[stack(), &out, &text()]))[0]["kl"].as_f64().unwrap();
    assert!(kl.abs() < 1e-6, "{kl}");

    let small = dir.path().join("small");
    fails(&line("export {} --memory 10kB -o {}", &[stack(), &small]), 2, &["10000", "smallest size"]);
    fails(&line("export {} --as reference --dtype f32 -o {}", &[stack(), &small]), 2, &["--dtype", "--as hf"]);
    assert!(!small.exists());
}

#[test]
fn a_full_disk_keeps_what_is_done_and_room_lets_it_go_on() {
    if !is_root() {
        println!("skipped: mounting a small file system needs Linux and root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mount = |options: &str| {
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir.path()).status();
        status.is_ok_and(|s| s.success())
    };
    if !mount("size=256k") {
        println!("skipped: a small file system cannot be mounted here");
        return;
    }
    let out = dir.path().join("out.bitstack");
    let options = "--blocks 8 --samples 1 --seq-len 32 --order random";
    let compress = |out: &Path| line(&format!("compress {{}} -o {{}} {options}"), &[&model(), out]);
    let full = compress(&out);
    let left = fs::read_dir(dir.path()).unwrap().count();
    let remounted = mount("remount,size=8m");
    let resumed = compress(&out);
    let bytes = fs::read(&out);
    let after = fs::read_dir(dir.path()).unwrap().count();
    Command::new("umount").arg(dir.path()).status().unwrap();

    fails(&full, 1, &["cannot write", "out.bitstack.partial", "No space left", "the same command goes on"]);
    assert_eq!(left, 1, "the journal, and no output");
    assert!(remounted);
    is_written(&resumed);
    assert!(stderr(&resumed).contains("resuming: "), "{}", stderr(&resumed));
    assert_eq!(after, 1, "the output, and no journal");
    let other = tempfile::tempdir().unwrap();
    let whole = other.path().join("out.bitstack");
    is_written(&compress(&whole));
    assert!(bytes.unwrap() == fs::read(whole).unwrap());
}

/// The built-in model's stack with this as its note about its quality, or with none.
fn with_quality(path: &Path, note: Option<&str>) {
    use bitstack_format::{BlockSource, Draft, StackFile};
    let file = StackFile::open_path(stack()).unwrap();
    let mut draft = Draft::create_in(path.parent().unwrap()).unwrap();
    for info in file.files() {
        draft.push_file(&info.name, &file.read_file(&info.name).unwrap()).unwrap();
    }
    for info in file.base_tensors() {
        let tensor = file.read_tensor(&info.name).unwrap();
        draft.push_base(&info.name, tensor.dtype, &tensor.shape, &tensor.data).unwrap();
    }
    for w in file.weights() {
        draft.add_weight(&w.name, w.shape, w.rank, &w.method).unwrap();
    }
    draft.add_blocks_of(stack()).unwrap();
    if let Some(note) = note {
        draft.set_provenance("quality", note).unwrap();
    }
    draft.finish(file.order(), fs::File::create(path).unwrap(), &mut |_, _| {}).unwrap();
}

#[test]
fn a_file_knows_how_good_it_is_at_every_size() {
    let inspect = json(&line("inspect {} --json", &[stack()]));
    let quality = &inspect["quality"];
    let sizes = quality["sizes"].as_array().unwrap();
    assert!(sizes.len() > 8 && quality["tokens"].as_u64() > Some(0), "{quality}");
    assert_eq!(sizes[0]["resident_bytes"], inspect["minimum_bytes"]);
    assert_eq!(sizes[sizes.len() - 1]["resident_bytes"], inspect["total_bytes"]);
    assert!(sizes.iter().all(|s| s["interpolated"] == false));
    let kl = |size: &serde_json::Value| size["kl"].as_f64().unwrap();
    assert!(kl(&sizes[0]) > kl(&sizes[sizes.len() - 1]));
    assert!(inspect["provenance"].get("quality").is_none() && inspect["provenance"].get("model").is_some());
    let text = line("inspect {}", &[stack()]);
    for size in sizes {
        assert!(stdout(&text).contains(&format!("{:.6}", kl(size))), "{size}");
    }

    let bytes = |i: usize| sizes[i]["resident_bytes"].as_u64().unwrap();
    let plan = |memory: u64| json(&line(&format!("plan {{}} --memory {memory} --json"), &[stack()]))["quality"].clone();
    let measured = plan(bytes(3));
    assert_eq!((&measured["kl"], &measured["interpolated"]), (&sizes[3]["kl"], &false.into()));
    let between = plan(bytes(3).midpoint(bytes(4)));
    assert_eq!(between["interpolated"], true);
    assert!(kl(&between) <= kl(&sizes[3]).max(kl(&sizes[4])) && kl(&between) >= kl(&sizes[3]).min(kl(&sizes[4])));
    let text = line(&format!("plan {{}} --memory {}", bytes(3)), &[stack()]);
    assert!(stdout(&text).contains("to the original, top-1 agreement"), "{}", stdout(&text));

    // A smaller file knows its own size, which was not measured.
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small.bitstack");
    let memory = bytes(3).midpoint(bytes(4));
    let truncate = line(&format!("truncate {{}} --memory {memory} -o {{}}"), &[stack(), &small]);
    succeeds(&truncate);
    assert!(stderr(&truncate).contains("KL about "), "{}", stderr(&truncate));
    let cut = json(&line("inspect {} --json", &[&small]));
    let cut_sizes = cut["quality"]["sizes"].as_array().unwrap();
    assert_eq!(cut_sizes[..4], sizes[..4]);
    assert_eq!(cut_sizes[4]["kl"], between["kl"]);
    assert_eq!((cut_sizes.len(), &cut_sizes[4]["interpolated"]), (5, &true.into()));
}

#[test]
fn compress_ends_with_the_curve_as_text_or_json() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("again.bitstack");
    let options = "--blocks 4 --samples 4 --seq-len 128 --calibration {} --quiet --json";
    let made = line(&format!("compress {{}} -o {{}} {options}"), &[&model(), &out, &text()]);
    is_written(&made);
    let made: serde_json::Value = serde_json::from_str(stdout(&made)).unwrap();
    let inspect = json(&line("inspect {} --json", &[stack()]));
    for field in ["quality", "minimum_bytes", "total_bytes", "file_bytes"] {
        assert_eq!(made[field], inspect[field], "{field}");
    }
    assert!(fs::read(&out).unwrap() == fs::read(stack()).unwrap(), "the same input gives the same bytes");
}

#[test]
fn a_file_that_is_far_from_its_model_is_written_with_status_3() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("far.bitstack");
    // One bit per weight.
    let compress = "compress {} -o {} --blocks 1 --samples 2 --seq-len 64 --order random --calibration {}";
    let made = line(&format!("{compress} --quiet"), &[&model(), &out, &text()]);
    assert_eq!(made.status.code(), Some(3), "{}", stderr(&made));
    assert!(stdout(&made).starts_with("resident bytes"));
    let warning = stderr(&made);
    assert_eq!(warning.lines().count(), 1, "{warning}");
    for word in ["warning: ", "far.bitstack", "far from the original", "KL ", "cost most", "model.", " %)"] {
        assert!(warning.contains(word), "no '{word}' in: {warning}");
    }
    succeeds(&line("verify {}", &[&out]));
    let inspect = json(&line("inspect {} --json", &[&out]));
    assert_eq!(inspect["quality"]["far"], true);
    assert_eq!(inspect["quality"]["costliest"].as_array().unwrap().len(), 3);
    assert!(stdout(&line("inspect {}", &[&out])).contains("far from the original"));
    let help = bitstack(["--help"]);
    assert!(stdout(&help).contains("3 written, but far from the original"));
}

#[test]
fn where_the_model_is_noise_it_is_said_unless_quiet() {
    let dir = tempfile::tempdir().unwrap();
    let [file, small] = ["said.bitstack", "small.bitstack"].map(|name| dir.path().join(name));
    let inspect = json(&line("inspect {} --json", &[stack()]));
    let [least, most] = ["minimum_bytes", "total_bytes"].map(|field| inspect[field].as_u64().unwrap());
    let note = format!(
        r#"{{"tokens":7,"sizes":[{{"resident_bytes":{least},"kl":5.25,"top1":0.125}},{{"resident_bytes":{most},"kl":0.0015,"top1":0.5}}],"costliest":[]}}"#
    );
    with_quality(&file, Some(&note));
    for command in ["plan {}", "truncate {} -o {} --force", "generate {} --prompt The --max-tokens 3"] {
        let beside = if command.starts_with("generate") { beside(command, &file) } else { 0 };
        let run = |weights: u64, rest: &str| {
            let memory = weights + beside;
            let output = line(&format!("{command} --memory {memory} {rest}"), &[&file, &small]);
            succeeds(&output);
            output
        };
        let noise = run(least, "");
        let warnings: Vec<&str> = stderr(&noise).lines().filter(|l| l.starts_with("warning: ")).collect();
        assert_eq!(warnings.len(), 1, "{command}: {}", stderr(&noise));
        assert!(warnings[0].contains("noise: KL 5.25") && warnings[0].contains("; 0.0015 with "), "{}", warnings[0]);
        assert_eq!(stderr(&run(least, "--quiet")), "", "{command}");
        let whole = run(most, "");
        assert!(!stderr(&whole).contains("noise"), "{}", stderr(&whole));
        let said = format!("{}{}", stdout(&whole), stderr(&whole));
        assert!(said.contains("KL 0.0015") && said.contains("top-1") && said.contains("0.500"), "{command}: {said}");
        let between = run(least.midpoint(most), "");
        let said = format!("{}{}", stdout(&between), stderr(&between));
        assert!(said.contains("about") || said.contains("interpolated"), "{command}: {said}");
    }
}

#[test]
fn a_file_that_says_nothing_of_its_quality_or_nonsense_works_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let [file, small] = ["silent.bitstack", "small.bitstack"].map(|name| dir.path().join(name));
    // Sizes below what any model has; no number, and no end of bytes.
    let below = r#"{"tokens":1,"sizes":[{"resident_bytes":0,"kl":1,"top1":0}],"costliest":[]}"#;
    let beyond = r#"{"tokens":18446744073709551615,"sizes":[{"resident_bytes":300000,"kl":null,"top1":0},{"resident_bytes":18446744073709551615,"kl":null,"top1":1}],"costliest":[{"weight":0,"share":1}]}"#;
    for (note, is_read) in [(None, false), (Some("nonsense"), false), (Some(below), false), (Some(beyond), true)] {
        with_quality(&file, note);
        let inspect = json(&line("inspect {} --json", &[&file]));
        assert_eq!(inspect["quality"].is_object(), is_read, "{note:?}");
        assert_eq!(inspect["provenance"].get("quality").is_some(), note.is_some() && !is_read, "{note:?}");
        for command in [
            "inspect {}",
            "verify {}",
            "plan {} --memory 200kB",
            "plan {} --memory 310kB --json",
            "truncate {} --memory 310kB -o {} --force",
            "generate {} --prompt The --max-tokens 3",
            "eval {} --text {} --samples 1 --seq-len 32",
        ] {
            let second = if command.starts_with("eval") { text() } else { small.clone() };
            succeeds(&line(command, &[&file, &second]));
        }
        let plan = json(&line("plan {} --memory 200kB --json", &[&file]));
        assert!(plan["quality"].is_null(), "{note:?}: {plan}");
    }
}

fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|s| s.lines().any(|l| l.starts_with("Uid:\t0")))
}
