//! Files that appear whole or not at all.
//!
//! Not under Miri: these are the system's files, and no memory of ours.
#![cfg(not(miri))]

use bitstack_io::{Existing, FileError, ReadAt, write_atomically};
use std::io;
use std::path::Path;

/// The errors of a caller.
#[derive(Debug)]
enum Theirs {
    Mine,
    File(FileError),
}

impl From<FileError> for Theirs {
    fn from(error: FileError) -> Self {
        Self::File(error)
    }
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn an_existing_file_is_kept_or_replaced_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    std::fs::write(&path, "old").unwrap();
    let open = std::fs::File::open(&path).unwrap();
    let error = write_atomically(&path, Existing::Refuse, |_| -> Result<(), _> { panic!("nothing is to be written") });
    assert!(matches!(error, Err(FileError::Exists { path: p }) if p == path));
    // Made by someone else meanwhile: noticed at the end.
    let late = dir.path().join("late");
    let error = write_atomically(&late, Existing::Refuse, |out| {
        std::fs::write(&late, "other").unwrap();
        Ok(out.write_all(b"ours")?)
    });
    assert!(matches!(error, Err(FileError::Exists { .. })), "{error:?}");
    assert_eq!(std::fs::read(&late).unwrap(), b"other");

    let failed = write_atomically(&path, Existing::Replace, |out| {
        out.write_all(b"half").unwrap();
        Err::<(), _>(Theirs::Mine)
    });
    assert!(matches!(failed, Err(Theirs::Mine)));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    write_atomically(&path, Existing::Replace, |out| Ok::<_, FileError>(out.write_all(b"new")?)).unwrap();
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
        let Err(FileError::Failed { operation: "create", path: named, .. }) = result else { panic!("{result:?}") };
        assert_eq!(named, path);
    }
}

#[test]
#[cfg(unix)]
fn a_new_file_has_the_permissions_of_any_other() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let (ours, other) = (dir.path().join("ours"), dir.path().join("other"));
    write_atomically(&ours, Existing::Refuse, |out| Ok::<_, FileError>(out.write_all(b"x")?)).unwrap();
    std::fs::write(&other, b"x").unwrap();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode();
    assert_eq!(mode(&ours), mode(&other));
}

#[test]
#[cfg(target_os = "linux")]
fn an_error_of_the_writer_has_the_path_whatever_the_caller_makes_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let result = write_atomically(&path, Existing::Refuse, |out| {
        // An error of its own is no error of the writer.
        out.write_all(b"x").map_err(|_| Theirs::Mine)?;
        Err::<(), _>(io::Error::other("theirs")).map_err(|_| Theirs::Mine)
    });
    assert!(matches!(result, Err(Theirs::Mine)));
    assert_eq!(entries(dir.path()), 0);
    let result = write_atomically("/proc/self/out", Existing::Refuse, |_| Ok::<_, Theirs>(()));
    assert!(matches!(result, Err(Theirs::File(FileError::Failed { operation: "create", .. }))), "{result:?}");
}
