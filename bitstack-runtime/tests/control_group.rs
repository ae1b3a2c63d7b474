//! A model under a real limit: a process of its own in a control group whose limit is lowered below the model's size while it works.
//!
//! Needs Linux, root and a memory controller; says what is missing otherwise.

#![cfg(target_os = "linux")]
#![expect(clippy::print_stdout, reason = "the two processes talk over stdout, and a test says what it skips")]

mod stacks;

use bitstack_format::StackFile;
use bitstack_runtime::{Elastic, Options, Policy, Sensors, Watcher};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Of the model, of what the policy keeps free, and of the first and the lowest limit. The rest is the process's own.
const MODEL_BYTES: u64 = 96 * MIB;
const RESERVE_BYTES: u64 = 24 * MIB;
const HIGH_BYTES: u64 = 256 * MIB;
const LOW_BYTES: u64 = 64 * MIB;
const GROUP: &str = "BITSTACK_TEST_GROUP";
const MODEL: &str = "BITSTACK_TEST_MODEL";

/// A control group below the one that memory is limited by at the top, removed at the end.
struct Group {
    dir: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl Group {
    fn create() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("not root".to_owned());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| e.to_string())?;
        let mount = |kind: &str, option: &str| {
            let line = mounts
                .lines()
                .find(|l| l.split_once(" - ").is_some_and(|(_, m)| m.starts_with(kind) && m.contains(option)))?;
            Some(PathBuf::from(line.split(' ').nth(4)?))
        };
        let name = format!("bitstack-test-{}", std::process::id());
        let (dir, limit, usage) = if let Some(top) = mount("cgroup ", "memory") {
            (top.join(name), "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else if let Some(top) = mount("cgroup2 ", "")
            .filter(|top| fs::read_to_string(top.join("cgroup.subtree_control")).is_ok_and(|c| c.contains("memory")))
        {
            (top.join(name), "memory.max", "memory.current")
        } else {
            return Err("no memory controller at the top of a mounted hierarchy".to_owned());
        };
        fs::create_dir(&dir).map_err(|e| format!("cannot create {}: {e}", dir.display()))?;
        Ok(Self { dir, limit, usage })
    }

    /// Sets the limit. Version 1 refuses one that memory in use is above, so this waits until the process made way.
    fn set_limit(&self, bytes: u64, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while let Err(error) = fs::write(self.dir.join(self.limit), bytes.to_string()) {
            let usage = fs::read_to_string(self.dir.join(self.usage)).unwrap_or_default();
            assert!(Instant::now() < deadline, "limit of {bytes} bytes: {error}; in use {usage}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Empty a moment after its last process has ended.
        for _ in 0..100 {
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        println!("cannot remove {}", self.dir.display());
    }
}

/// A running child, ended with the test however that ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts one of the ignored tests below in a process of its own.
fn start(test: &str, group: &Group, model: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--ignored", "--nocapture"])
        .env(GROUP, &group.dir)
        .env(MODEL, model)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What the child says after each pass: resident bytes, and passes so far.
fn wait_for(lines: &Receiver<(u64, u64)>, what: &str, is_it: impl Fn(u64) -> bool) -> (u64, u64) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut last = (0, 0);
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) if is_it(line.0) => return line,
            Ok(line) => last = line,
            Err(RecvTimeoutError::Timeout) => panic!("{what}: not within 30 s; last {last:?}"),
            Err(RecvTimeoutError::Disconnected) => {
                panic!("{what}: the process has ended, perhaps killed; last {last:?}")
            }
        }
    }
}

#[test]
fn model_shrinks_before_the_system_kills_and_grows_when_the_limit_is_raised() {
    let group = match Group::create() {
        Ok(group) => group,
        Err(reason) => {
            println!("skipped: a control group with a limit needs root and a memory controller: {reason}");
            return;
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.bitstack");
    // Six weights of sixteen blocks of 1 MiB and a little.
    fs::write(&path, stacks::stack(&[(2048, 4096); 6], 16)).unwrap();
    let order = StackFile::open_path(&path).unwrap().load_order().unwrap();
    let (minimum, total) = (order.minimum_bytes(), order.total_bytes());
    assert!(total > MODEL_BYTES && minimum < MODEL_BYTES / 8);

    group.set_limit(HIGH_BYTES, Duration::ZERO);
    let mut child = Running(start("model_that_works_until_its_input_ends", &group, &path));
    let stdout = BufReader::new(child.0.stdout.take().unwrap());
    let (send, lines) = channel();
    std::thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            let words: Vec<u64> = line.split(' ').map_while(|word| word.parse().ok()).collect();
            if let [resident, passes] = words[..] {
                let _ = send.send((resident, passes));
            }
        }
    });

    let (_, passes_whole) = wait_for(&lines, "the whole model", |resident| resident == total);
    // Below its size in steps of half the reserve, each as soon as the system lets us.
    let mut limit = HIGH_BYTES;
    while limit > LOW_BYTES {
        limit -= RESERVE_BYTES / 2;
        group.set_limit(limit, Duration::from_secs(20));
        while lines.try_recv().is_ok() {}
        wait_for(&lines, "a pass under a lower limit", |_| true);
    }
    let (small, passes_low) = wait_for(&lines, "a smaller model", |resident| resident + RESERVE_BYTES / 2 < limit);
    assert!(small < total * 3 / 4 && small >= minimum, "{small} of {total} bytes under a limit of {limit}");
    assert!(passes_low > passes_whole + 10, "output goes on: {passes_whole}, {passes_low} passes");

    group.set_limit(HIGH_BYTES, Duration::ZERO);
    wait_for(&lines, "the whole model again", |resident| resident == total);

    // Somebody else in the group takes what does not fit beside the model: the system would kill one of the two.
    let mut other = Running(start("neighbour_that_takes_memory", &group, &path));
    wait_for(&lines, "a smaller model beside the neighbour", |resident| resident < total * 3 / 4);
    drop(other.0.stdin.take());
    assert!(other.0.wait().unwrap().success(), "the neighbour was killed");
    wait_for(&lines, "the whole model after the neighbour", |resident| resident == total);
    drop(child.0.stdin.take());
    assert!(child.0.wait().unwrap().success());
}

/// The process that is watched.
#[test]
#[ignore = "run by the first test, in a process of its own"]
fn model_that_works_until_its_input_ends() {
    let (Some(group), Some(path)) = (std::env::var_os(GROUP), std::env::var_os(MODEL)) else {
        println!("skipped: this is another test's process");
        return;
    };
    fs::write(Path::new(&group).join("cgroup.procs"), std::process::id().to_string()).unwrap();
    let reading = Sensors::detect().read();
    assert_eq!(reading.limit_bytes, Some(HIGH_BYTES), "the limit is seen from inside");

    let policy = Policy {
        reserve_bytes: RESERVE_BYTES,
        hold: Duration::from_millis(500),
        pause: Duration::from_millis(100),
        ..Policy::new(HIGH_BYTES)
    };
    let file = StackFile::open_path(path).unwrap();
    let order = file.load_order().unwrap();
    let budget = policy.first_budget(&reading, order.minimum_bytes()..=order.total_bytes());
    let model = Elastic::open(file, budget, Options::default()).unwrap();
    let _watcher = Watcher::start(&model, policy).unwrap();

    let ended = std::thread::spawn(|| std::io::stdin().read_to_end(&mut Vec::new()));
    let x: Vec<f32> = (0..4096).map(|c| (c as f32).cos()).collect();
    for pass in 1u64.. {
        if ended.is_finished() {
            break;
        }
        let snapshot = model.snapshot();
        let mut rows = vec![0.0f32; 8 * x.len()];
        for weight in 0..snapshot.levels().len() {
            snapshot.level(weight).unwrap().reconstruct_rows(pass as usize % 2000, &mut rows).unwrap();
            assert!(
                rows.chunks_exact(x.len()).all(|row| row.iter().zip(&x).map(|(w, x)| w * x).sum::<f32>().is_finite())
            );
        }
        println!("{} {pass}", snapshot.resident_bytes());
        drop(snapshot);
        std::thread::sleep(Duration::from_millis(5));
    }
    model.wait().unwrap();
}

/// Takes memory step by step, and holds it until its input ends.
#[test]
#[ignore = "run by the first test, in a process of its own"]
fn neighbour_that_takes_memory() {
    let Some(group) = std::env::var_os(GROUP) else {
        println!("skipped: this is another test's process");
        return;
    };
    fs::write(Path::new(&group).join("cgroup.procs"), std::process::id().to_string()).unwrap();
    let mut taken = Vec::new();
    for _ in 0..(HIGH_BYTES - MODEL_BYTES / 2) / (4 * MIB) {
        taken.push(vec![1u8; 4 * MIB as usize]);
        std::thread::sleep(Duration::from_millis(50));
    }
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    assert!(taken.iter().all(|part| part.ends_with(&[1])));
}
