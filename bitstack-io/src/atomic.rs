use crate::FileError;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use tempfile::NamedTempFile;

const BUFFER_BYTES: usize = 1 << 20;

/// What to do when the output exists already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Leave it alone and report [`FileError::Exists`].
    Refuse,
    /// Replace it, in one step, once the new contents are complete.
    Replace,
}

/// Creates a file with what `write` writes, all of it or nothing.
///
/// The bytes go to a temporary file beside `path`, through a buffer; when `write` has returned they are made durable and the file
/// takes its name in one step. On any error before that the temporary file is removed and `path` is as it was. Only if the directory cannot be
/// synced after it, which is an error too, the new file has its name already; it may lose it in a power cut.
///
/// - **Two writers** of the same path, in one process or in several: with [`Existing::Replace`] the last to finish wins, with
///   [`Existing::Refuse`] the first, and the others get [`FileError::Exists`]. The file is always one of theirs, never a mixture.
/// - **A reader** that opens `path` meanwhile gets the old file or the new one, whole; one that has the old file open goes on reading
///   the old contents, until it closes it.
/// - **A writer that is killed** may leave its temporary file, `.<name>.*.tmp`. Nothing reads it, and it can be deleted.
///
/// An error of the writer comes back as [`FileError::Failed`], with the path, whatever `write` makes of it. Other errors of `write` come
/// back as they are.
///
/// ```
/// use bitstack_io::{Existing, FileError, write_atomically};
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("out.txt");
/// write_atomically(&path, Existing::Refuse, |out| Ok::<_, FileError>(out.write_all(b"whole")?))?;
/// let again = write_atomically(&path, Existing::Refuse, |out| Ok(out.write_all(b"other")?));
/// assert!(matches!(again, Err(FileError::Exists { .. })));
/// assert_eq!(std::fs::read(&path)?, b"whole");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`FileError::Exists`]; [`FileError::Failed`] with the operation that failed; whatever `write` returns.
pub fn write_atomically<T, E: From<FileError>>(
    path: impl AsRef<Path>,
    existing: Existing,
    write: impl FnOnce(&mut dyn Write) -> Result<T, E>,
) -> Result<T, E> {
    let path = path.as_ref();
    create(&Disk, directory_of(path), path, existing, write)
}

/// [`write_atomically`] with the temporary file in another directory of the same file system, such as one that is swept up after a
/// process was killed.
///
/// # Errors
/// As [`write_atomically`].
pub fn write_atomically_through<T, E: From<FileError>>(
    dir: impl AsRef<Path>,
    path: impl AsRef<Path>,
    existing: Existing,
    write: impl FnOnce(&mut dyn Write) -> Result<T, E>,
) -> Result<T, E> {
    create(&Disk, dir.as_ref(), path.as_ref(), existing, write)
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// The operations on the file system that creating a file takes; a trait so that tests can let any one of them fail.
trait FileSystem {
    /// A temporary file, which is removed when it is dropped.
    type Temporary: Write;

    fn create_temporary(&self, dir: &Path, prefix: &str) -> io::Result<Self::Temporary>;
    fn sync(&self, file: &Self::Temporary) -> io::Result<()>;
    /// Gives the file its name.
    fn persist(&self, file: Self::Temporary, path: &Path, existing: Existing) -> io::Result<()>;
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// The real one.
struct Disk;

impl FileSystem for Disk {
    type Temporary = NamedTempFile;

    fn create_temporary(&self, dir: &Path, prefix: &str) -> io::Result<NamedTempFile> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(prefix).suffix(".tmp");
        #[cfg(unix)]
        {
            // Temporary files are private by default; this one is to become an ordinary file. The process's mask still applies.
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        }
        builder.tempfile_in(dir)
    }

    fn sync(&self, file: &NamedTempFile) -> io::Result<()> {
        file.as_file().sync_all()
    }

    fn persist(&self, file: NamedTempFile, path: &Path, existing: Existing) -> io::Result<()> {
        let persisted = match existing {
            Existing::Replace => file.persist(path),
            Existing::Refuse => file.persist_noclobber(path),
        };
        persisted.map(drop).map_err(|e| e.error)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        // On other systems there is nothing to call.
        if cfg!(unix) { std::fs::File::open(dir)?.sync_all() } else { Ok(()) }
    }
}

fn create<T, E: From<FileError>, F: FileSystem>(
    files: &F,
    temporary: &Path,
    path: &Path,
    existing: Existing,
    write: impl FnOnce(&mut dyn Write) -> Result<T, E>,
) -> Result<T, E> {
    let failed = |operation, source| FileError::Failed { operation, path: path.to_owned(), source };
    let name = path.file_name().ok_or_else(|| failed("create", io::ErrorKind::InvalidFilename.into()))?;
    if existing == Existing::Refuse && path.symlink_metadata().is_ok() {
        return Err(FileError::Exists { path: path.to_owned() }.into());
    }
    if path.is_dir() {
        return Err(failed("create", io::ErrorKind::IsADirectory.into()).into());
    }
    let prefix = format!(".{}.", name.to_string_lossy());
    let file = files.create_temporary(temporary, &prefix).map_err(|e| failed("create", e))?;

    let mut out = Noting { out: BufWriter::with_capacity(BUFFER_BYTES, file), error: None };
    let written = write(&mut out);
    let flushed = if written.is_ok() { out.flush() } else { Ok(()) };
    let Noting { out, error } = out;
    // Taken apart rather than dropped, which would try to write what is left.
    let (file, _) = out.into_parts();
    let value = match (written, error) {
        (Err(_), Some(error)) => return Err(failed("write", error).into()),
        (written, _) => written?,
    };
    flushed.map_err(|e| failed("write", e))?;
    files.sync(&file).map_err(|e| failed("sync", e))?;
    files.persist(file, path, existing).map_err(|e| match (existing, e.kind()) {
        (Existing::Refuse, io::ErrorKind::AlreadyExists) => FileError::Exists { path: path.to_owned() },
        (Existing::Refuse, _) => failed("create", e),
        (Existing::Replace, _) => failed("replace", e),
    })?;
    // The name is durable only once the directory is.
    files.sync_dir(directory_of(path)).map_err(|e| failed("sync the directory of", e))?;
    Ok(value)
}

/// A writer that keeps the last error, and gives its caller one that reads the same.
struct Noting<W> {
    out: W,
    error: Option<io::Error>,
}

impl<W> Noting<W> {
    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            if error.kind() == io::ErrorKind::Interrupted {
                // To be tried again.
                return error;
            }
            let same = match error.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(error.kind(), error.to_string()),
            };
            self.error = Some(error);
            same
        })
    }
}

impl<W: Write> Write for Noting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.out.write(bytes);
        self.note(result)
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let result = self.out.write_all(bytes);
        self.note(result)
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.out.flush();
        self.note(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    /// What happens to the n-th operation.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Fault {
        /// It fails for good.
        Error,
        /// It is interrupted, once; whoever asked has to ask again.
        Interrupted,
        /// It writes one byte only. Nothing happens to what is not a write.
        Short,
        /// It writes nothing and says so.
        Nothing,
    }

    /// A disk whose n-th operation goes wrong.
    struct Faulty {
        fault: Fault,
        left: Rc<Cell<Option<usize>>>,
    }

    struct FaultyFile {
        file: NamedTempFile,
        fault: Fault,
        left: Rc<Cell<Option<usize>>>,
    }

    /// Counts an operation; whether it is the one.
    fn is_due(left: &Cell<Option<usize>>) -> bool {
        let due = left.get() == Some(0);
        left.set(left.get().and_then(|n| n.checked_sub(1)));
        due
    }

    fn due(left: &Cell<Option<usize>>, fault: Fault) -> io::Result<()> {
        if is_due(left) && fault == Fault::Error { Err(io::Error::other("pulled out")) } else { Ok(()) }
    }

    impl Write for FaultyFile {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if !is_due(&self.left) {
                // At most so many at once, so that there are several writes.
                return self.file.write(&bytes[..bytes.len().min(BUFFER_BYTES / 2)]);
            }
            match self.fault {
                Fault::Error => Err(io::Error::other("pulled out")),
                Fault::Interrupted => Err(io::ErrorKind::Interrupted.into()),
                Fault::Short => self.file.write(&bytes[..1]),
                Fault::Nothing => Ok(0),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            due(&self.left, self.fault)?;
            self.file.flush()
        }
    }

    impl FileSystem for Faulty {
        type Temporary = FaultyFile;

        fn create_temporary(&self, dir: &Path, prefix: &str) -> io::Result<FaultyFile> {
            due(&self.left, self.fault)?;
            let (fault, left) = (self.fault, Rc::clone(&self.left));
            Ok(FaultyFile { file: Disk.create_temporary(dir, prefix)?, fault, left })
        }

        fn sync(&self, file: &FaultyFile) -> io::Result<()> {
            due(&self.left, self.fault)?;
            Disk.sync(&file.file)
        }

        fn persist(&self, file: FaultyFile, path: &Path, existing: Existing) -> io::Result<()> {
            due(&self.left, self.fault)?;
            Disk.persist(file.file, path, existing)
        }

        fn sync_dir(&self, dir: &Path) -> io::Result<()> {
            due(&self.left, self.fault)?;
            Disk.sync_dir(dir)
        }
    }

    /// Lets every operation go wrong in turn; returns what was reported, in the order of the operations.
    fn with_every_fault(fault: Fault, existing: Existing) -> Vec<&'static str> {
        let contents: Vec<u8> = (0..3 * BUFFER_BYTES + 5).map(|i| (i % 251) as u8).collect();
        let mut operations = Vec::new();
        for n in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("out.bitstack");
            if existing == Existing::Replace {
                std::fs::write(&path, "old").unwrap();
            }
            let left = Rc::new(Cell::new(Some(n)));
            let files = Faulty { fault, left: Rc::clone(&left) };
            let result = create(&files, dir.path(), &path, existing, |out| {
                contents.chunks(100_000).try_for_each(|part| out.write_all(part)).map_err(FileError::from)
            });
            let names: Vec<_> = dir.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
            match result {
                Ok(()) => assert_eq!(std::fs::read(&path).unwrap(), contents, "operation {n}"),
                Err(FileError::Failed { operation, path: named, .. }) => {
                    assert_eq!(named, path, "operation {n}");
                    operations.push(operation);
                    match (operation, existing) {
                        // The last step: the file is in its place, and that it may not stay there is said.
                        ("sync the directory of", _) => assert_eq!(std::fs::read(&path).unwrap(), contents),
                        (_, Existing::Replace) => assert_eq!(std::fs::read(&path).unwrap(), b"old", "operation {n}"),
                        (_, Existing::Refuse) => assert_eq!(names.len(), 0, "operation {n}: {names:?}"),
                    }
                }
                Err(error) => panic!("operation {n}: {error}"),
            }
            assert!(names.iter().all(|name| name == "out.bitstack"), "operation {n}: {names:?}");
            if left.get().is_some() {
                break;
            }
        }
        operations
    }

    #[test]
    #[cfg_attr(miri, ignore = "megabytes under Miri take hours")]
    fn whichever_operation_fails_there_is_no_half_made_file_and_the_error_names_it() {
        for (existing, name) in [(Existing::Refuse, "create"), (Existing::Replace, "replace")] {
            let operations = with_every_fault(Fault::Error, existing);
            let n = operations.len();
            assert_eq!(operations[0], "create");
            assert!(n > 8 && operations[1..n - 3].iter().all(|o| *o == "write"), "{operations:?}");
            assert_eq!(operations[n - 3..], ["sync", name, "sync the directory of"]);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "megabytes under Miri take hours")]
    fn interrupted_and_short_writes_are_taken_up_again() {
        for fault in [Fault::Interrupted, Fault::Short] {
            assert!(with_every_fault(fault, Existing::Refuse).is_empty(), "{fault:?}");
            assert!(with_every_fault(fault, Existing::Replace).is_empty(), "{fault:?}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "megabytes under Miri take hours")]
    fn a_write_of_nothing_is_an_error() {
        let operations = with_every_fault(Fault::Nothing, Existing::Replace);
        assert!(!operations.is_empty() && operations.iter().all(|o| *o == "write"), "{operations:?}");
    }
}
