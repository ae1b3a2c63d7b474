//! What can go wrong with a compression.

use bitstack_engine::EngineError;
use std::path::PathBuf;

/// Errors of this crate. Each message names the file, tensor, field or option it is about, and the values found. A cause is not repeated in the message:
/// it is the `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompressError {
    /// A weight could not be decomposed.
    #[error("weight {name} cannot be decomposed")]
    Decompose {
        /// The weight.
        name: String,
        /// What is wrong.
        source: bitstack_decomp::DecompError,
    },
    /// Another process compresses into the same output.
    #[error("another process is at work here: {} is locked", path.display())]
    JournalLocked {
        /// The locked file.
        path: PathBuf,
    },
    /// A journal is there, but of a compression of something else, or in another way.
    #[error("{} holds an unfinished compression that differs in {what}: {was} there, {is} now", dir.display())]
    JournalDiffers {
        /// The journal.
        dir: PathBuf,
        /// A file, a tensor, an option, ...
        what: String,
        /// Its value, or the hash of it, in the journal; `absent` where there was none.
        was: String,
        /// The same, now.
        is: String,
    },
    /// Units are there, or none, but not what they are of.
    #[error("there is no plan of a compression here, or a damaged one")]
    NoPlan,
    /// A compression has no job of this name.
    #[error("this compression has no job {name:?}")]
    NoSuchJob {
        /// The name.
        name: String,
    },
    /// The model could not be run, or the stack it is made of does not fit it.
    #[error(transparent)]
    Engine(EngineError),
    /// The model's files or text.
    #[error(transparent)]
    Model(#[from] bitstack_model::ModelError),
    /// A stack could not be read or written.
    #[error(transparent)]
    Format(#[from] bitstack_format::FormatError),
    /// No load order could be made.
    #[error(transparent)]
    Sort(#[from] bitstack_sort::SortError),
}

bitstack_engine::from_further_down!(CompressError);
