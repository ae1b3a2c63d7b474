use std::io;
use std::path::PathBuf;

/// Why a file or a directory was not created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The output exists and was not to be replaced.
    #[error("{} exists already", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// An operation on a file or a directory failed.
    #[error("cannot {operation} {}", path.display())]
    Failed {
        /// `create`, `write`, `sync`, `replace`, ...
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Something else that the caller did meanwhile failed.
    #[error("cannot write")]
    Write {
        /// What the system says.
        #[from]
        source: io::Error,
    },
}
