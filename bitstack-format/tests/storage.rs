//! Storage that fails: no half-made file, no panic, and an error that names operation and file.

mod samples;

use bitstack_format::{BlockSource, Existing, FormatError, ReadAt, StackFile, write_atomically};
use std::cell::Cell;
use std::io::{self, Write};
use std::path::Path;

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
            Err(error @ FormatError::File { operation: "write", .. }) => {
                assert!(error.to_string().contains("out.bitstack"), "{error}");
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
    assert!(error.to_string().contains("No space left on device"), "{error}");
}

#[test]
fn an_existing_file_is_kept_or_replaced_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    std::fs::write(&path, "old").unwrap();
    let open = std::fs::File::open(&path).unwrap();
    let error = write_atomically(&path, Existing::Refuse, |_| -> Result<(), _> { panic!("nothing is to be written") });
    assert!(matches!(error, Err(FormatError::Exists { path: p }) if p == path));
    // Made by someone else meanwhile: noticed at the end.
    let late = dir.path().join("late");
    let error = write_atomically(&late, Existing::Refuse, |out| {
        std::fs::write(&late, "other").unwrap();
        Ok(out.write_all(b"ours")?)
    });
    assert!(matches!(error, Err(FormatError::Exists { .. })), "{error:?}");
    assert_eq!(std::fs::read(&late).unwrap(), b"other");

    let failed = write_atomically(&path, Existing::Replace, |out| {
        out.write_all(b"half")?;
        Err::<(), _>(FormatError::Missing { name: "x".to_owned() })
    });
    assert!(matches!(failed, Err(FormatError::Missing { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    write_atomically(&path, Existing::Replace, |out| Ok(out.write_all(b"new")?)).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert_eq!(entries(dir.path()), 2);
    // Who had it open goes on reading what was there.
    let mut old = [0; 3];
    open.read_exact_at(&mut old, 0).unwrap();
    assert_eq!(&old, b"old");
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().join("no/such/dir/out"), dir.path().to_owned()] {
        let result = write_atomically(&path, Existing::Replace, |out| Ok(out.write_all(b"x")?));
        let Err(FormatError::File { operation: "create", path: named, .. }) = result else { panic!("{result:?}") };
        assert_eq!(named, path);
    }
    assert!(matches!(
        bitstack_format::Draft::create_in(dir.path().join("nothing")),
        Err(FormatError::File { operation: "create a scratch file in", .. })
    ));
}

#[test]
#[cfg(unix)]
fn a_new_file_has_the_permissions_of_any_other() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let (ours, other) = (dir.path().join("ours"), dir.path().join("other"));
    write_atomically(&ours, Existing::Refuse, |out| Ok(out.write_all(b"x")?)).unwrap();
    std::fs::write(&other, b"x").unwrap();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode();
    assert_eq!(mode(&ours), mode(&other));
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
        assert_eq!(error.to_string(), "cannot read the header: bad sector");
    }
    let file = open(2).unwrap();
    let error = file.read_block(0, 1).unwrap_err();
    assert_eq!(error.to_string(), "cannot read tensor layers.0.q_proj.weight.block.1.signs: bad sector");
    let error = file.write_prefix(2, io::sink(), &mut |_, _| {}).unwrap_err();
    assert_eq!(error.to_string(), "cannot read tensor file/config.json: bad sector");
    let report = file.verify(&mut |_, _| {}).unwrap();
    assert_eq!(report.damaged.len(), report.n_tensors);
    // After n good reads something is reported, until there are enough for everything.
    let mut left = 2;
    while !open(left).unwrap().verify(&mut |_, _| {}).unwrap().is_whole() {
        left += 1;
    }
    assert_eq!(left, 2 + report.n_tensors);
}
