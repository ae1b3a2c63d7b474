use crate::{Existing, FileError};
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Creates a directory with the files that `write` puts into it, all of them or nothing.
///
/// `write` gets an empty temporary directory beside `path`. When it has returned, its files are made durable and the directory takes its
/// name. On any error the temporary directory is removed and `path` is as it was. With [`Existing::Replace`] a directory that is there
/// is moved aside first and removed last, with all that is in it; a process that is killed in between leaves it as `.<name>.*.old`.
///
/// # Errors
/// [`FileError::Exists`]; [`FileError::Failed`] with the operation that failed; whatever `write` returns.
pub fn write_directory_atomically<T, E: From<FileError>>(
    path: impl AsRef<Path>,
    existing: Existing,
    write: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    let path = path.as_ref();
    let failed = |operation, source| FileError::Failed { operation, path: path.to_owned(), source };
    let name = path.file_name().ok_or_else(|| failed("create", io::ErrorKind::InvalidFilename.into()))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let is_there = path.symlink_metadata().is_ok();
    if is_there && existing == Existing::Refuse {
        return Err(FileError::Exists { path: path.to_owned() }.into());
    }
    if is_there && !path.is_dir() {
        return Err(failed("replace", io::ErrorKind::NotADirectory.into()).into());
    }
    let beside = |suffix| {
        let prefix = format!(".{}.", name.to_string_lossy());
        tempfile::Builder::new().prefix(&prefix).suffix(suffix).tempdir_in(parent).map_err(|e| failed("create", e))
    };
    let new = beside(".tmp")?;
    let value = write(new.path())?;
    sync(new.path()).map_err(|e| failed("sync", e))?;
    if is_there {
        let old = beside(".old")?;
        let moved = old.path().join("replaced");
        fs::rename(path, &moved).map_err(|e| failed("replace", e))?;
        if let Err(source) = fs::rename(new.path(), path) {
            if let Err(source) = fs::rename(&moved, path) {
                // Rather a stray directory than a lost one.
                let _ = old.keep();
                return Err(failed("put back", source).into());
            }
            return Err(failed("replace", source).into());
        }
        // What is left of the old one is not worth failing for: the new one is in its place.
        drop(old);
    } else {
        fs::rename(new.path(), path).map_err(|e| failed("create", e))?;
    }
    // It has another name now, and nothing is left to be removed.
    let _ = new.keep();
    #[cfg(unix)]
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|e| failed("sync the directory of", e))?;
    Ok(value)
}

/// Makes the files of a directory durable, and then their names.
fn sync(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        // Some systems sync only what is open for writing.
        File::options().write(true).open(entry?.path())?.sync_all()?;
    }
    #[cfg(unix)]
    File::open(dir)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(dir: &Path, text: &str) -> Result<(), FileError> {
        Ok(fs::write(dir.join("file"), text)?)
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_directory_is_written_whole_or_not_at_all() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("out");
        let read = || fs::read_to_string(out.join("file")).unwrap();
        write_directory_atomically(&out, Existing::Refuse, |dir| put(dir, "first")).unwrap();
        assert_eq!(read(), "first");
        let refused = write_directory_atomically(&out, Existing::Refuse, |dir| put(dir, "second"));
        assert!(matches!(refused, Err(FileError::Exists { .. })));
        let failed = write_directory_atomically(&out, Existing::Replace, |dir| {
            put(dir, "half")?;
            Err::<(), FileError>(io::Error::other("no more").into())
        });
        assert!(matches!(failed, Err(FileError::Write { .. })));
        assert_eq!((read().as_str(), names(home.path())), ("first", vec!["out".to_owned()]));
        write_directory_atomically(&out, Existing::Replace, |dir| put(dir, "second")).unwrap();
        assert_eq!((read().as_str(), names(home.path())), ("second", vec!["out".to_owned()]));
        fs::write(home.path().join("plain"), "a file").unwrap();
        let onto_file = write_directory_atomically(home.path().join("plain"), Existing::Replace, |dir| put(dir, "x"));
        assert!(matches!(onto_file, Err(FileError::Failed { operation: "replace", .. })), "{onto_file:?}");
    }
}
