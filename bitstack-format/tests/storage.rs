//! Storage that fails: no half-made file, no panic, and an error that names operation and file.
//!
//! Not under Miri: these are the system's files and processes, over and over, and no memory of ours.
#![cfg(not(miri))]

mod samples;

use bitstack_format::{BlockSource, Draft, FormatError, ReadAt, StackFile, WriteAt};
use bitstack_io::{Existing, FileError, in_one_line, write_atomically};
use std::cell::Cell;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Lets `left` operations pass and fails all after; writes at most `step` bytes at once.
struct Failing<W> {
    inner: W,
    left: usize,
    step: usize,
}

impl<W: Write> Failing<W> {
    fn pass(&mut self) -> io::Result<()> {
        self.left = self.left.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
        Ok(())
    }
}

impl<W: Write> Write for Failing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pass()?;
        self.inner.write(&bytes[..bytes.len().min(self.step)])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.pass()?;
        self.inner.flush()
    }
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn a_write_that_fails_at_any_operation_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.bitstack");
    let draft = samples::draft();
    let mut n_failures = 0;
    for left in 0.. {
        let result = write_atomically(&path, Existing::Refuse, |inner| {
            draft.finish(&samples::ORDER, Failing { inner, left, step: 100 }, &mut |_, _| {})
        });
        match result {
            Err(FormatError::Write { .. }) => {
                assert_eq!(entries(dir.path()), 0, "after {left} operations");
                n_failures += 1;
            }
            Err(error) => panic!("after {left} operations: {error}"),
            Ok(_) => break,
        }
    }
    // A header of more than 1,000 bytes goes out in pieces of 100, and each tensor takes at least one operation.
    assert!(n_failures > 30, "{n_failures}");
    assert_eq!(std::fs::read(&path).unwrap(), samples::file());
    assert_eq!(entries(dir.path()), 1);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_reads_as_such() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let error = samples::draft().finish(&samples::ORDER, full, &mut |_, _| {}).unwrap_err();
    assert!(in_one_line(&error).contains("No space left on device"), "{error}");
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Draft::create_in(dir.path().join("nothing")),
        Err(FormatError::File { operation: "create a scratch file in", .. })
    ));
}

/// A source of which all reads after the first `left` fail.
#[derive(Debug)]
struct Unreadable {
    bytes: Vec<u8>,
    left: Cell<usize>,
}

impl ReadAt for Unreadable {
    fn size_bytes(&self) -> io::Result<u64> {
        self.bytes.size_bytes()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.left.set(self.left.get().checked_sub(1).ok_or_else(|| io::Error::other("bad sector"))?);
        self.bytes.read_exact_at(buf, offset_bytes)
    }
}

#[test]
fn a_read_that_fails_is_reported_by_name() {
    let bytes = samples::file();
    let open = |left| StackFile::open(Unreadable { bytes: bytes.clone(), left: Cell::new(left) });
    for left in 0..2 {
        let error = open(left).unwrap_err();
        assert_eq!(in_one_line(&error), "cannot read the header: bad sector");
    }
    let file = open(2).unwrap();
    let error = file.read_block(0, 1).unwrap_err();
    assert_eq!(in_one_line(&error), "cannot read tensor layers.0.q_proj.weight.block.1.signs: bad sector");
    let error = file.write_prefix(2, io::sink(), &mut |_, _| {}).unwrap_err();
    assert_eq!(in_one_line(&error), "cannot read tensor file/config.json: bad sector");
    let report = file.verify(&mut |_, _| {}).unwrap();
    assert_eq!(report.damaged.len(), report.n_tensors);
    // After n good reads something is reported, until there are enough for everything.
    let mut left = 2;
    while !open(left).unwrap().verify(&mut |_, _| {}).unwrap().is_whole() {
        left += 1;
    }
    assert_eq!(left, 2 + report.n_tensors);
}

/// Scratch storage whose n-th operation fails, write or read; writes leave half of their bytes.
#[derive(Debug, Default)]
struct Scratch {
    bytes: Vec<u8>,
    done: AtomicUsize,
    failing: Option<usize>,
}

impl Scratch {
    fn pass(&self) -> io::Result<()> {
        let n = self.done.fetch_add(1, Ordering::Relaxed);
        if Some(n) == self.failing { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl ReadAt for Scratch {
    fn size_bytes(&self) -> io::Result<u64> {
        self.bytes.size_bytes()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.pass()?;
        self.bytes.read_exact_at(buf, offset_bytes)
    }
}

impl WriteAt for Scratch {
    fn write_all_at(&mut self, buf: &[u8], offset_bytes: u64) -> io::Result<()> {
        if let Err(error) = self.pass() {
            self.bytes.write_all_at(&buf[..buf.len() / 2], offset_bytes)?;
            return Err(error);
        }
        self.bytes.write_all_at(buf, offset_bytes)
    }
}

#[test]
fn a_draft_whose_scratch_file_fails_at_any_operation_says_so_and_can_be_taken_up_again() {
    let good = samples::file();
    let mut n_failures = 0;
    for failing in 0.. {
        let mut draft = Draft::create_on(Scratch { failing: Some(failing), ..Scratch::default() }, "scratch/place");
        let mut failed = false;
        // Whatever fails is done once more; the storage has recovered by then.
        let mut attempt = |draft: &mut Draft, step: &dyn Fn(&mut Draft) -> Result<(), FormatError>| {
            step(draft).or_else(|error| {
                failed = true;
                let message = in_one_line(&error);
                assert!(message.contains("scratch file in scratch/place"), "{message}");
                step(draft)
            })
        };
        samples::fill(&mut draft, &mut attempt);
        let mut bytes = Vec::new();
        let result = draft.finish(&samples::ORDER, &mut bytes, &mut |_, _| {});
        if let Err(error) = result {
            failed = true;
            let message = in_one_line(&error);
            assert!(message.starts_with("cannot read tensor ") && message.contains("scratch/place"), "{message}");
            bytes.clear();
            draft.finish(&samples::ORDER, &mut bytes, &mut |_, _| {}).unwrap();
        }
        assert_eq!(bytes, good, "operation {failing}");
        if !failed {
            break;
        }
        n_failures += 1;
    }
    // Each tensor but the pads is written once and read once.
    let n_tensors = StackFile::open(good).unwrap().verify(&mut |_, _| {}).unwrap().n_tensors;
    assert!(n_failures > n_tensors && n_failures < 2 * n_tensors, "{n_failures} of {n_tensors} tensors");
}

#[test]
fn an_error_about_a_file_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.bitstack");
    let bytes = samples::file();
    std::fs::write(&path, &bytes).unwrap();
    let file = StackFile::open_path(&path).unwrap();
    // The file shrinks while it is open.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(1000).unwrap();
    let named = |error: FormatError| {
        let message = in_one_line(&error);
        assert!(message.contains("model.bitstack") && message.starts_with("cannot read tensor "), "{message}");
        assert!(matches!(error, FormatError::Read { .. }));
    };
    named(file.read_block(0, 3).unwrap_err());
    named(file.read_tensor("norm.weight").unwrap_err());
    named(file.write_prefix(5, io::sink(), &mut |_, _| {}).unwrap_err());
    let report = file.verify(&mut |_, _| {}).unwrap();
    assert!(report.damaged.len() > 20, "{report:?}");
    for missing in [dir.path().join("no-such-file"), dir.path().to_owned()] {
        let error = StackFile::open_path(&missing).unwrap_err();
        assert!(matches!(&error, FormatError::File { operation: "open", path, .. } if *path == missing), "{error}");
    }
    let Err(FormatError::At { path: named, source }) = StackFile::open_path(&path) else { panic!() };
    assert!(named == path && matches!(*source, FormatError::HeaderCut { .. }));
}

#[test]
#[cfg(unix)]
fn what_is_not_a_regular_file_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe.bitstack");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for path in [pipe, PathBuf::from("/dev/zero")] {
        let error = in_one_line(&StackFile::open_path(&path).unwrap_err());
        assert!(error.starts_with("cannot open ") && error.contains("not a regular file"), "{error}");
    }
}

/// One of several files of the same length that differ in a large companion file, and say which they are.
fn variant(i: usize) -> Vec<u8> {
    let mut draft = Draft::create_on(Vec::new(), "memory");
    samples::fill(&mut draft, &mut |draft, step| step(draft));
    draft.set_provenance("variant", &i.to_string()).unwrap();
    // Several buffers of contents, so that there is time to be interrupted.
    let large: Vec<u8> = (0..4 << 20).map(|k| ((k * 31 + i) % 251) as u8).collect();
    draft.push_file("large.bin", &large).unwrap();
    let mut bytes = Vec::new();
    draft.finish(&samples::ORDER, &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

const N_VARIANTS: usize = 3;
const CHILD: &str = "BITSTACK_STORAGE_TEST_CHILD";

/// What the other processes of the tests below do: it is no test of its own, and passes unless it is asked to be one of them.
#[test]
fn child_process() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let [i, existing, times, path] = order.splitn(4, ' ').collect::<Vec<_>>()[..] else { panic!("{order}") };
    let bytes = variant(i.parse().unwrap());
    let existing = if existing == "replace" { Existing::Replace } else { Existing::Refuse };
    for _ in 0..times.parse().unwrap() {
        match write_atomically(path, existing, |out| Ok(bytes.chunks(1000).try_for_each(|part| out.write_all(part))?)) {
            Ok(()) => {}
            Err(FileError::Exists { .. }) if existing == Existing::Refuse => std::process::exit(3),
            Err(error) => panic!("{error}"),
        }
    }
}

fn spawn(i: usize, existing: &str, times: usize, path: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child_process"]).env(CHILD, format!("{i} {existing} {times} {}", path.display()));
    command.stdout(Stdio::null()).spawn().unwrap()
}

/// Which variant a file is; panics when it is none of them, whole.
fn identify(bytes: &[u8], variants: &[Vec<u8>]) -> usize {
    let found = variants.iter().position(|v| v == bytes);
    found.unwrap_or_else(|| panic!("{} bytes that nobody wrote", bytes.len()))
}

#[test]
fn of_several_processes_that_write_one_file_the_last_wins_and_a_reader_sees_whole_files_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.bitstack");
    let variants: Vec<_> = (0..N_VARIANTS).map(variant).collect();
    std::fs::write(&path, &variants[0]).unwrap();
    let mut children: Vec<_> = (0..N_VARIANTS).map(|i| spawn(i, "replace", 10, &path)).collect();
    let mut seen = [0; N_VARIANTS];
    loop {
        let running = children.iter_mut().any(|c| c.try_wait().unwrap().is_none());
        // Opened before it is replaced, read after: the same file all along.
        let file = StackFile::open_path(&path).unwrap();
        let i: usize = file.provenance()["variant"].parse().unwrap();
        assert!(file.verify(&mut |_, _| {}).unwrap().is_whole());
        let large = file.read_file("large.bin").unwrap();
        assert!(large[..251].iter().enumerate().all(|(k, &b)| usize::from(b) == (k * 31 + i) % 251));
        seen[i] += 1;
        if !running {
            break;
        }
    }
    assert!(children.iter_mut().all(|c| c.wait().unwrap().success()));
    identify(&std::fs::read(&path).unwrap(), &variants);
    assert_eq!(entries(dir.path()), 1, "no temporary file is left; read {seen:?}");
}

#[test]
fn of_several_processes_that_may_not_replace_exactly_one_writes() {
    let variants: Vec<_> = (0..N_VARIANTS).map(variant).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.bitstack");
    let children: Vec<_> = (0..N_VARIANTS).map(|i| spawn(i, "refuse", 1, &path)).collect();
    let codes: Vec<_> = children.into_iter().map(|mut c| c.wait().unwrap().code()).collect();
    let written = identify(&std::fs::read(&path).unwrap(), &variants);
    for (i, code) in codes.into_iter().enumerate() {
        assert_eq!(code, Some(if i == written { 0 } else { 3 }), "process {i}, written by {written}");
    }
    assert_eq!(entries(dir.path()), 1);
}

#[test]
fn a_writer_that_is_killed_leaves_the_old_file_or_a_new_one() {
    let variants: Vec<_> = (0..N_VARIANTS).map(variant).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.bitstack");
    std::fs::write(&path, &variants[0]).unwrap();
    let temporary = || -> Vec<String> {
        let names = dir.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "model.bitstack").collect()
    };
    // Killed at several places of the writing; only kills that leave something behind were in the middle of it.
    let mut n_left = 0;
    for round in 0..100 {
        let mut child = spawn(1 + round % 2, "replace", 1_000_000, &path);
        while temporary().is_empty() {
            assert!(child.try_wait().unwrap().is_none(), "the process ended by itself");
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_micros(300 * round as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        identify(&std::fs::read(&path).unwrap(), &variants);
        for name in temporary() {
            assert!(name.starts_with(".model.bitstack.") && name.ends_with(".tmp"), "{name}");
            std::fs::remove_file(dir.path().join(name)).unwrap();
            n_left += 1;
        }
        if n_left == 8 {
            return;
        }
    }
    panic!("of 100 processes only {n_left} were killed while they wrote");
}
