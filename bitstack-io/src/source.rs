use std::fmt;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// What [`ReadAt::best_read_bytes`] says unless a source knows better: large enough for any disk, small enough to be hashed and arranged
/// while still in the cache.
pub const BEST_READ_BYTES: usize = 256 << 10;

/// Bytes that can be read at any offset, by several threads at once: a file, a slice, an object store, ...
///
/// ```
/// use bitstack_io::ReadAt;
/// let mut two = [0; 2];
/// b"stack".read_exact_at(&mut two, 3)?;
/// assert_eq!(&two, b"ck");
/// assert!(b"stack".read_exact_at(&mut two, 4).is_err());
/// # Ok::<(), std::io::Error>(())
/// ```
pub trait ReadAt {
    /// The number of bytes there are.
    fn size_bytes(&self) -> io::Result<u64>;

    /// Fills `buf` with the bytes from `offset_bytes` on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] when there are not that many; `buf` is then unspecified.
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()>;

    /// How many bytes are best read at once; whoever reads much reads it in pieces of about this size. More, when each read has a cost of
    /// its own, as a request has. By default [`BEST_READ_BYTES`].
    fn best_read_bytes(&self) -> usize {
        BEST_READ_BYTES
    }
}

impl ReadAt for [u8] {
    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let from = usize::try_from(offset_bytes).ok().and_then(|offset| self.get(offset..)?.get(..buf.len()));
        buf.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl<const N: usize> ReadAt for [u8; N] {
    fn size_bytes(&self) -> io::Result<u64> {
        self[..].size_bytes()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self[..].read_exact_at(buf, offset_bytes)
    }
}

impl ReadAt for Vec<u8> {
    fn size_bytes(&self) -> io::Result<u64> {
        self[..].size_bytes()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self[..].read_exact_at(buf, offset_bytes)
    }
}

impl ReadAt for File {
    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    #[cfg(unix)]
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buf, offset_bytes)
    }

    #[cfg(windows)]
    fn read_exact_at(&self, mut buf: &mut [u8], mut offset_bytes: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(self, buf, offset_bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset_bytes += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A file by its path, opened for each read: for programs with more files than they may have open. It has to stay as it is.
///
/// ```
/// use bitstack_io::{FileAt, ReadAt};
/// assert!(FileAt::new("no-such-file").size_bytes().is_err());
/// ```
#[derive(Debug, Clone)]
pub struct FileAt {
    path: PathBuf,
}

impl FileAt {
    /// The file at `path`. Nothing is opened yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Says of a failed read where it failed.
    fn placed<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", self.path.display())))
    }
}

impl ReadAt for FileAt {
    fn size_bytes(&self) -> io::Result<u64> {
        let regular = |metadata: std::fs::Metadata| match metadata.is_file() {
            true => Ok(metadata.len()),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
        };
        self.placed(std::fs::metadata(&self.path).and_then(regular))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.placed(File::open(&self.path).and_then(|file| file.read_exact_at(buf, offset_bytes)))
    }
}

/// Storage for what is not finished yet: bytes that can be written at any offset and read back. A file, memory, ...
pub trait WriteAt: ReadAt + fmt::Debug + Send + Sync {
    /// Writes all of `buf` from `offset_bytes` on, over what is there or beyond it.
    ///
    /// # Errors
    /// Whatever the storage says; some of `buf` may then be written.
    fn write_all_at(&mut self, buf: &[u8], offset_bytes: u64) -> io::Result<()>;
}

impl WriteAt for File {
    #[cfg(unix)]
    fn write_all_at(&mut self, buf: &[u8], offset_bytes: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, buf, offset_bytes)
    }

    #[cfg(windows)]
    fn write_all_at(&mut self, mut buf: &[u8], mut offset_bytes: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match std::os::windows::fs::FileExt::seek_write(self, buf, offset_bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    buf = &buf[n..];
                    offset_bytes += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl WriteAt for Vec<u8> {
    /// Bytes between the end and the offset become zeros.
    fn write_all_at(&mut self, buf: &[u8], offset_bytes: u64) -> io::Result<()> {
        let end = usize::try_from(offset_bytes).ok().and_then(|offset| offset.checked_add(buf.len()));
        let end = end.ok_or(io::ErrorKind::FileTooLarge)?;
        if end > self.len() {
            self.try_reserve(end - self.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
            self.resize(end, 0);
        }
        self[end - buf.len()..end].copy_from_slice(buf);
        Ok(())
    }
}

macro_rules! read_at_through_pointer {
    ($($pointer:ty),*) => {$(
        impl<T: ReadAt + ?Sized> ReadAt for $pointer {
            fn size_bytes(&self) -> io::Result<u64> {
                (**self).size_bytes()
            }

            fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
                (**self).read_exact_at(buf, offset_bytes)
            }

            fn best_read_bytes(&self) -> usize {
                (**self).best_read_bytes()
            }
        }
    )*};
}

read_at_through_pointer!(&T, Box<T>, Arc<T>);
