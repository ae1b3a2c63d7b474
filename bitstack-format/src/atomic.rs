use crate::FormatError;
use std::io::{self, BufWriter, Write};
use std::path::Path;

const BUFFER_BYTES: usize = 1 << 20;

/// What to do when the output exists already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Leave it alone and report [`FormatError::Exists`].
    Refuse,
    /// Replace it, in one step, once the new contents are complete.
    Replace,
}

/// Creates a file with what `write` writes, all of it or nothing.
///
/// The bytes go to a temporary file beside `path`, through a buffer; when `write` has returned they are made durable and the file
/// takes its name in one step. On any error the temporary file is removed and `path` is as it was. A reader that has the old file
/// open keeps the old contents. Of two processes that create the same file, the last to finish wins with [`Existing::Replace`], the
/// first with [`Existing::Refuse`]. (A process that is killed may leave its temporary file, `.<name>.*.tmp`.)
///
/// `write` may use `?` on [`io::Error`]s of the writer: they come back with the path. Its other errors come back as they are.
///
/// ```
/// use bitstack_format::{Existing, FormatError, write_atomically};
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("out.txt");
/// write_atomically(&path, Existing::Refuse, |out| Ok(out.write_all(b"whole")?))?;
/// let again = write_atomically(&path, Existing::Refuse, |out| Ok(out.write_all(b"other")?));
/// assert!(matches!(again, Err(FormatError::Exists { .. })));
/// assert_eq!(std::fs::read(&path)?, b"whole");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`FormatError::Exists`]; [`FormatError::File`] with the operation that failed; whatever `write` returns.
pub fn write_atomically<T>(
    path: impl AsRef<Path>,
    existing: Existing,
    write: impl FnOnce(&mut dyn Write) -> Result<T, FormatError>,
) -> Result<T, FormatError> {
    let path = path.as_ref();
    let failed = |operation, source| FormatError::File { operation, path: path.to_owned(), source };
    let name = path.file_name().ok_or_else(|| failed("create", io::ErrorKind::InvalidFilename.into()))?;
    if existing == Existing::Refuse && path.symlink_metadata().is_ok() {
        return Err(FormatError::Exists { path: path.to_owned() });
    }
    if path.is_dir() {
        return Err(failed("create", io::ErrorKind::IsADirectory.into()));
    }
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let prefix = format!(".{}.", name.to_string_lossy());
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)]
    {
        // Temporary files are private by default; this one is to become an ordinary file. The process's mask still applies.
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    }
    let file = builder.tempfile_in(dir).map_err(|e| failed("create", e))?;

    let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
    let value = write(&mut out).map_err(|error| match error {
        FormatError::Write { source } => failed("write", source),
        other => other,
    })?;
    let file = out.into_inner().map_err(|e| failed("write", e.into_error()))?;
    file.as_file().sync_all().map_err(|e| failed("sync", e))?;
    match existing {
        Existing::Replace => file.persist(path).map(drop).map_err(|e| failed("replace", e.error))?,
        Existing::Refuse => file.persist_noclobber(path).map(drop).map_err(|e| match e.error.kind() {
            io::ErrorKind::AlreadyExists => FormatError::Exists { path: path.to_owned() },
            _ => failed("create", e.error),
        })?,
    }
    // The name is durable only once the directory is; on other systems there is nothing to call.
    #[cfg(unix)]
    std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| failed("sync the directory of", e))?;
    Ok(value)
}
