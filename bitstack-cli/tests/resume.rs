//! `compress` survives being killed: the same command goes on, and writes the bytes of a run that was left alone.
#![expect(clippy::print_stdout, reason = "counts that a reader of the test's output wants to see")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use std::{fs, str, thread};

fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo").join(name)
}

/// Some seconds of work: every phase is long enough to be hit.
const OPTIONS: &str = "--blocks 4 --samples 4 --seq-len 128";

/// `compress` of a model into `out` with `options`, without calibration text if `text` is `None`.
fn command(model: &Path, text: Option<&Path>, out: &Path, options: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitstack"));
    command.arg("compress").arg(model).arg("-o").arg(out).args(options.split(' ').filter(|o| !o.is_empty()));
    if let Some(text) = text {
        command.arg("--calibration").arg(text);
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn ordinary(out: &Path) -> Command {
    command(&demo("tiny-llama"), Some(&demo("text.txt")), out, OPTIONS)
}

/// What comes out without interruption, and how long it takes.
fn uninterrupted() -> &'static (Vec<u8>, Duration) {
    static RUN: OnceLock<(Vec<u8>, Duration)> = OnceLock::new();
    RUN.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("whole.bitstack");
        let started = Instant::now();
        succeeds(&ordinary(&out).output().unwrap());
        let took = started.elapsed();
        assert_eq!(names(dir.path()), ["whole.bitstack"], "the journal is gone");
        (fs::read(out).unwrap(), took)
    })
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The file is written; with as few blocks it may be far from its model, which is status 3.
#[track_caller]
fn succeeds(output: &Output) {
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}", stderr(output));
}

#[track_caller]
fn fails(output: &Output, status: i32, words: &[&str]) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(status), "{message}");
    assert_eq!(message.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{message}");
    for word in words {
        assert!(message.contains(word), "no '{word}' in: {message}");
    }
}

fn stderr(output: &Output) -> &str {
    str::from_utf8(&output.stderr).unwrap()
}

/// Starts the command and waits until its journal has a file of this name.
fn start_until(mut command: Command, out: &Path, unit: &str) -> Child {
    let mut child = command.spawn().unwrap();
    let path = journal(out).join(unit);
    while !path.exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before there was {}", path.display());
        thread::sleep(Duration::from_millis(1));
    }
    child
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn journal(out: &Path) -> PathBuf {
    PathBuf::from(format!("{}.partial", out.display()))
}

/// xorshift64*: where to kill, the same in every run of the test, on the scale of this machine.
fn random(state: &mut u64) -> f64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
}

/// Set BITSTACK_KILLS to kill more often.
#[test]
fn a_run_killed_at_random_moments_ends_with_the_same_bytes() {
    let n_kills: usize = std::env::var("BITSTACK_KILLS").map_or(6, |n| n.parse().expect("BITSTACK_KILLS is a number"));
    let (bytes, took) = uninterrupted();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny.bitstack");
    let (mut kills, mut runs, mut with_work, mut state) = (0, 0, 0, 0x9e37_79b9_7f4a_7c15);
    while kills < n_kills {
        runs += 1;
        loop {
            let mut child = ordinary(&out).spawn().unwrap();
            let delay = took.mul_f64(random(&mut state));
            let started = Instant::now();
            while kills < n_kills && started.elapsed() < delay && child.try_wait().unwrap().is_none() {
                thread::sleep(Duration::from_millis(1));
            }
            if kills < n_kills && child.try_wait().unwrap().is_none() {
                kill(child);
                kills += 1;
                with_work += usize::from(journal(&out).join("weight.0000").exists());
                // Killed on its way out, when all was done: the same command would say that the output exists.
                if out.exists() && !journal(&out).exists() {
                    break;
                }
                continue;
            }
            succeeds(&child.wait_with_output().unwrap());
            break;
        }
        assert!(fs::read(&out).unwrap() == *bytes, "other bytes after {kills} kills in {runs} runs");
        assert_eq!(names(dir.path()), ["tiny.bitstack"]);
        fs::remove_file(&out).unwrap();
    }
    println!("{kills} kills, {with_work} of them with finished weights, in {runs} runs of {:.1} s", took.as_secs_f64());
    assert!(with_work > 0);
}

#[test]
fn a_resumed_run_says_what_is_there_and_makes_no_finished_weight_again() {
    let (bytes, _) = uninterrupted();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny.bitstack");
    kill(start_until(ordinary(&out), &out, "weight.0003"));
    let path = journal(&out).join("weight.0003");
    let made = path.metadata().unwrap().modified().unwrap();
    let there = names(&journal(&out)).iter().filter(|n| n.starts_with("weight.")).count();

    // Until the next layer, so that the journal is still there.
    kill(start_until(ordinary(&out), &out, "weight.0010"));
    assert_eq!(path.metadata().unwrap().modified().unwrap(), made);
    let output = ordinary(&out).output().unwrap();
    succeeds(&output);
    let line = stderr(&output).lines().find(|l| l.starts_with("resuming: ")).unwrap();
    let number: usize = line.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(number > there && line.ends_with(" of 16 weights are there"), "{there}: {line}");
    assert!(fs::read(&out).unwrap() == *bytes);
}

#[test]
fn a_journal_of_something_else_is_refused_with_the_difference() {
    let (bytes, _) = uninterrupted();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny.bitstack");
    kill(start_until(ordinary(&out), &out, "weight.0001"));
    // A unit that was being written when the process was killed is swept away.
    let units = || names(&journal(&out)).into_iter().filter(|n| !n.ends_with(".tmp")).collect::<Vec<_>>();
    let before = units();

    let (model, text) = (demo("tiny-llama"), demo("text.txt"));
    let other = |options: &str| command(&model, Some(&text), &out, options).output().unwrap();
    fails(&other(&format!("{OPTIONS} --seed 7")), 2, &["tiny.bitstack.partial", "seed: 0 there, 7 now", "--restart"]);
    fails(&other("--blocks 4 --samples 5 --seq-len 128"), 2, &["samples: 4 there, 5 now"]);
    fails(&other(&format!("{OPTIONS} --method avd")), 2, &["method: nested there, avd now"]);
    let own_text = command(&model, None, &out, OPTIONS).output().unwrap();
    fails(&own_text, 2, &["calibration text", "the model's own now"]);

    let changed = dir.path().join("tiny-llama");
    fs::create_dir(&changed).unwrap();
    for name in names(&model) {
        fs::copy(model.join(&name), changed.join(&name)).unwrap();
    }
    let weights = changed.join("model.safetensors");
    let mut contents = fs::read(&weights).unwrap();
    let at = contents.len() / 2;
    contents[at] ^= 1;
    fs::write(&weights, contents).unwrap();
    let changed = command(&changed, Some(&text), &out, OPTIONS).output().unwrap();
    fails(&changed, 2, &["differs in model.layers.", ".weight: "]);

    // Nothing of the journal was lost on the way, and what another run left can be thrown away.
    assert_eq!(units(), before);
    let output = command(&model, Some(&text), &out, &format!("{OPTIONS} --restart")).output().unwrap();
    succeeds(&output);
    assert!(!stderr(&output).contains("resuming"), "{}", stderr(&output));
    assert!(fs::read(&out).unwrap() == *bytes);
}

#[test]
fn a_second_process_with_the_same_output_is_refused_while_the_first_is_at_work() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny.bitstack");
    // No text, and windows that take the model long to write.
    let first = start_until(command(&demo("tiny-llama"), None, &out, ""), &out, "lock");
    let second = ordinary(&out).output().unwrap();
    let restart = command(&demo("tiny-llama"), Some(&demo("text.txt")), &out, "--restart").output().unwrap();
    kill(first);
    fails(&second, 1, &["another process", "tiny.bitstack.partial/lock is locked"]);
    fails(&restart, 1, &["another process", "tiny.bitstack.partial/lock is locked"]);
    // The lock is gone with its holder.
    succeeds(&ordinary(&out).output().unwrap());
}

/// The last moments: the output has its name, and the journal is not gone yet.
#[test]
fn a_run_killed_between_the_output_and_the_end_is_found_complete() {
    let (bytes, _) = uninterrupted();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny.bitstack");
    kill(start_until(ordinary(&out), &out, "order"));
    fs::write(&out, bytes).unwrap();
    let record = journal(&out).join("journal.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    let mut write = |hash: &blake3::Hash| {
        json["output"] = serde_json::json!({ "bytes": bytes.len(), "blake3": hash.to_hex().as_str() });
        fs::write(&record, json.to_string()).unwrap();
    };
    // An output that is not the one of the journal is left alone.
    write(&blake3::hash(b"other"));
    fails(&ordinary(&out).output().unwrap(), 2, &["tiny.bitstack exists", "--force"]);
    write(&blake3::hash(bytes));
    let output = ordinary(&out).output().unwrap();
    succeeds(&output);
    assert!(stderr(&output).contains("complete already"));
    assert!(output.stdout.starts_with(b"resident bytes"), "it says how good it is all the same");
    assert_eq!(names(dir.path()), ["tiny.bitstack"]);
    assert!(fs::read(&out).unwrap() == *bytes);
}

#[test]
#[cfg(target_os = "linux")]
fn an_interrupted_run_says_how_to_go_on() {
    // A program that is started with interrupts ignored, as a shell starts one in the background, leaves it at that.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    if ignored.is_some_and(|signals| signals & 0b10 != 0) {
        println!("skipped: interrupts are ignored here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny.bitstack");
    let child = start_until(ordinary(&out), &out, "weight.0000");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(stderr(&output).contains("tiny.bitstack.partial"), "{}", stderr(&output));
    assert!(stderr(&output).contains("the same command goes on from here"), "{}", stderr(&output));
    let output = ordinary(&out).output().unwrap();
    succeeds(&output);
    assert!(stderr(&output).contains("resuming: "));
}

#[test]
fn an_option_that_no_weight_can_have_leaves_no_journal() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.bitstack");
    for (options, words) in [("--method avd --rank 129", "rank 129 for a 512 x 128 weight"), ("--seq-len 513", "513")] {
        let output = command(&demo("tiny-llama"), Some(&demo("text.txt")), &out, options).output().unwrap();
        fails(&output, 1, &[words]);
        assert!(names(dir.path()).is_empty(), "{options}: {:?}", names(dir.path()));
    }
}

#[test]
fn a_text_with_few_windows_to_calibrate_on_gets_a_remark() {
    let dir = tempfile::tempdir().unwrap();
    let (short, out) = (dir.path().join("short.txt"), dir.path().join("out.bitstack"));
    fs::write(&short, &fs::read(demo("text.txt")).unwrap()[..1200]).unwrap();
    let output = command(&demo("tiny-llama"), Some(&short), &out, OPTIONS).output().unwrap();
    succeeds(&output);
    assert!(stderr(&output).contains("of the 4 windows of 128 tokens to calibrate on"), "{}", stderr(&output));
    let output =
        command(&demo("tiny-llama"), Some(&demo("text.txt")), &out, &format!("{OPTIONS} --force")).output().unwrap();
    assert!(!stderr(&output).contains("to calibrate on"), "{}", stderr(&output));
}
