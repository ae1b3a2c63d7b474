use std::error::Error;
use std::io;
use std::path::PathBuf;

/// An error and its causes, first to last, with colons between them: no error of these crates has its cause in its own text. A cause that
/// the text before it already has is left out.
///
/// ```
/// use bitstack_io::{FileError, in_one_line};
/// let source = std::io::Error::other("pulled out");
/// let error = FileError::Failed { operation: "write", path: "x".into(), source };
/// assert_eq!(error.to_string(), "cannot write x");
/// assert_eq!(in_one_line(&error), "cannot write x: pulled out");
/// ```
pub fn in_one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = cause.source();
    }
    line
}

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
