//! Files of a model's directory, read whole: regular ones only, within a limit, and not what only has their name.

use crate::ModelError;
use crate::recognize::recognize_head;
use bitstack_io::ReadAt;
use std::fs::File;
use std::io::{Error, ErrorKind, Read};
use std::path::Path;

/// Whether a file is there. A link to nothing is not taken for nothing: a cache of downloads that is not whole has such.
pub(crate) fn exists(path: &Path) -> Result<bool, ModelError> {
    let exists = path.try_exists().map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
    match std::fs::read_link(path) {
        Ok(target) if !exists => Err(ModelError::DanglingLink { path: path.to_owned(), target }),
        _ => Ok(exists),
    }
}

/// The first bytes of a file.
pub(crate) fn read_head(file: &File) -> std::io::Result<Vec<u8>> {
    let mut head = vec![0; file.metadata()?.len().min(512) as usize];
    ReadAt::read_exact_at(file, &mut head, 0)?;
    Ok(head)
}

/// Opens what is a file and nothing else: to open a pipe is to wait for somebody to write to it.
pub(crate) fn open_regular(path: &Path) -> Result<File, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(io(Error::new(ErrorKind::InvalidInput, "it is not a regular file")));
    }
    File::open(path).map_err(io)
}

pub(crate) fn read_whole(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let file = open_regular(path)?;
    let bytes = file.metadata().map_err(io)?.len();
    if bytes > limit {
        return Err(ModelError::FileTooLarge { path: path.to_owned(), bytes, limit });
    }
    let mut contents = Vec::with_capacity(bytes as usize);
    // One more than it had, to notice if it grows.
    file.take(bytes + 1).read_to_end(&mut contents).map_err(io)?;
    if contents.len() as u64 > bytes {
        return Err(io(Error::new(ErrorKind::InvalidData, "it is being written to")));
    }
    match recognize_head(&contents) {
        Some(advice) => Err(ModelError::OtherFile { path: path.to_owned(), advice: advice.to_owned() }),
        None => Ok(contents),
    }
}

pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let text = String::from_utf8(read_whole(path, limit)?);
    text.map_err(|e| ModelError::Io {
        path: path.to_owned(),
        source: Error::new(ErrorKind::InvalidData, e.utf8_error()),
    })
}
