//! A model that changes its size while it writes, as a user meets it: keys on a terminal, and a limit on the process's memory.
#![cfg(target_os = "linux")]
#![expect(clippy::print_stdout, reason = "a test that is skipped says so")]

use bitstack_bench::synthetic::{self, ModelShape};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// 182 million weights with 8 blocks each: 23 to 188 MB. Its tokenizer is that of the built-in model; its text is noise.
fn large_stack() -> &'static Path {
    static STACK: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = STACK.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let shape = ModelShape {
            hidden_size: 1024,
            intermediate_size: 4096,
            n_layers: 12,
            n_heads: 16,
            n_kv_heads: 4,
            vocab_size: 512,
            tied: true,
        };
        let mut draft = synthetic::draft(&shape, 8, 1, dir.path(), &()).unwrap();
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/tiny-llama/tokenizer.json");
        draft.push_file("tokenizer.json", &fs::read(tokenizer).unwrap()).unwrap();
        let n_weights = 1 + 7 * shape.n_layers as u32;
        let order: Vec<u32> = (0..8).flat_map(|_| 0..n_weights).collect();
        let path = dir.path().join("large.bitstack");
        let mut file = fs::File::create(&path).unwrap();
        draft.finish(&order, &mut file, &mut |_, _| {}).unwrap();
        (dir, path)
    });
    path
}

/// A process that does not outlive the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn plus_and_minus_change_the_size_while_text_is_written() {
    if Command::new("script").arg("--version").output().is_err() {
        println!("skipped: a terminal to type on needs script(1) of util-linux");
        return;
    }
    let command = format!(
        "{} generate {} --prompt The --max-tokens 400 --temperature 1 --seed 1",
        env!("CARGO_BIN_EXE_bitstack"),
        large_stack().display()
    );
    // A terminal of its own: what is typed comes through the pipe, what it shows goes to the other.
    let mut child = Process(
        Command::new("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let mut keyboard = child.0.stdin.take().unwrap();
    let mut screen = child.0.stdout.take().unwrap();
    let (shows, seen) = mpsc::channel();
    thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(n @ 1..) = screen.read(&mut piece) {
            let _ = shows.send(piece[..n].to_vec());
        }
    });
    let mut shown = Vec::new();
    let answers = |shown: &[u8]| String::from_utf8_lossy(shown).matches("bits per stacked weight]").count();
    // Each key is pressed when the one before is answered, and the first when there is text, however slow the machine.
    for (answered, key) in ["-", "-", "+"].iter().enumerate() {
        while !(shown.windows(3).any(|w| w == b"The") && answers(&shown) == answered) {
            shown.extend(
                seen.recv_timeout(Duration::from_secs(120)).expect("the text goes on until the keys are answered"),
            );
        }
        keyboard.write_all(key.as_bytes()).unwrap();
    }
    shown.extend(seen.iter().flatten());
    assert!(child.0.wait().unwrap().success());
    let shown = String::from_utf8_lossy(&shown);
    // Each key answers with the new size, in MB: down, down, up.
    let said: Vec<f64> = shown
        .lines()
        .filter(|l| l.contains("bits per stacked weight]"))
        .filter_map(|l| l.split_once('[')?.1.split(' ').next()?.parse().ok())
        .collect();
    assert!(said.len() >= 3, "{shown}");
    assert!(said[0] > said[1] && said[1] < said[2] && said[2] == said[0], "{said:?}");
    // The text was written at more than one size.
    let last = shown.lines().rev().find(|l| l.contains("tokens/s")).unwrap();
    assert!(last.contains(" to ") && last.contains("MB resident"), "{last}");
    assert!(!shown.contains("error"), "{shown}");
}

#[test]
fn a_signal_that_ends_the_command_leaves_the_terminal_as_it_was() {
    if Command::new("script").arg("--version").output().is_err() {
        println!("skipped: a terminal needs script(1) of util-linux");
        return;
    }
    for signal in ["TERM", "INT", "HUP"] {
        let command = format!(
            "stty -a; timeout --foreground --signal {signal} 2 {} generate {} --prompt The --max-tokens 8000; echo status $?; stty -a",
            env!("CARGO_BIN_EXE_bitstack"),
            large_stack().display()
        );
        let script = ["--quiet", "--command", &command, "/dev/null"];
        let output = Command::new("script").args(script).stdin(Stdio::null()).output().unwrap();
        let shown = String::from_utf8_lossy(&output.stdout);
        assert!(shown.contains("The") && shown.contains("status 124"), "{shown}");
        for mode in ["icanon", "echo", "isig"] {
            let set = shown.split([' ', '\r', '\n']).filter(|word| *word == mode).count();
            assert_eq!(set, 2, "{mode} after {signal}: {shown}");
        }
    }
}

/// A memory cgroup (version 1 or 2) of its own, removed at the end.
struct Group {
    path: PathBuf,
    limit: &'static str,
}

impl Group {
    fn new() -> Result<Self, String> {
        let name = format!("bitstack-test-{}", std::process::id());
        let mut reasons = Vec::new();
        for (root, limit) in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")] {
            let group = Self { path: Path::new(root).join(&name), limit };
            match fs::create_dir(&group.path).and_then(|()| fs::read_to_string(group.path.join(limit))) {
                Ok(_) => return Ok(group),
                Err(e) => reasons.push(format!("{root}: {e}")),
            }
        }
        Err(reasons.join("; "))
    }

    /// The kernel refuses a limit that it cannot reach by writing out pages: tried until the process has shrunk.
    fn set_limit(&self, bytes: u64, patience: Duration) -> std::io::Result<()> {
        let start = Instant::now();
        loop {
            match fs::write(self.path.join(self.limit), bytes.to_string()) {
                Err(_) if start.elapsed() < patience => thread::sleep(Duration::from_millis(20)),
                other => return other,
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Resident bytes of a process.
fn resident(pid: u32) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    Some(statm.split(' ').nth(1)?.parse::<u64>().ok()? * 4096)
}

#[test]
fn under_a_falling_limit_the_text_goes_on_and_under_a_rising_one_the_model_grows() {
    let group = match Group::new() {
        Ok(group) => group,
        Err(reason) => {
            println!("skipped: no memory cgroup can be made here: {reason}");
            return;
        }
    };
    group.set_limit(400_000_000, Duration::ZERO).unwrap();
    let text = group.path.join("cgroup.procs");
    // The shell moves itself into the group and becomes the command.
    let shell = format!(
        "echo $$ > {} && exec {} generate {} --prompt The --max-tokens 8000 --memory auto",
        text.display(),
        env!("CARGO_BIN_EXE_bitstack"),
        large_stack().display()
    );
    let mut child =
        Process(Command::new("sh").args(["-c", &shell]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let pid = child.0.id();
    let written = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let mut output = child.0.stdout.take().unwrap();
    let counter = written.clone();
    thread::spawn(move || {
        let mut buffer = [0; 256];
        while let Ok(n @ 1..) = output.read(&mut buffer) {
            counter.fetch_add(n as u64, std::sync::atomic::Ordering::Relaxed);
        }
    });
    let wait_until = |what: &str, seconds: u64, condition: &dyn Fn(u64) -> bool| {
        let start = Instant::now();
        loop {
            let now = resident(pid).unwrap_or(0);
            if condition(now) {
                return now;
            }
            assert!(start.elapsed() < Duration::from_secs(seconds), "{what}: {now} bytes resident");
            thread::sleep(Duration::from_millis(50));
        }
    };
    let tokens = || written.load(std::sync::atomic::Ordering::Relaxed);

    wait_until("the whole model is in", 60, &|bytes| bytes > 180_000_000 && tokens() > 0);
    for limit in [220_000_000, 190_000_000, 160_000_000, 130_000_000] {
        let before = tokens();
        group.set_limit(limit, Duration::from_secs(30)).unwrap_or_else(|e| panic!("limit {limit}: {e}"));
        // Half of the least reserve is 32 MiB: with less to spare the model shrinks.
        wait_until("well below the limit", 30, &|bytes| bytes < limit - 30_000_000);
        wait_until("the text goes on", 30, &|_| tokens() > before + 3);
        assert!(child.0.try_wait().unwrap().is_none(), "the process has ended under a limit of {limit}");
    }
    let small = resident(pid).unwrap();
    group.set_limit(400_000_000, Duration::ZERO).unwrap();
    wait_until("it grows again", 90, &|bytes| bytes > small + 30_000_000);
    assert!(child.0.try_wait().unwrap().is_none());
}
