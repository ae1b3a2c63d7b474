//! What can go wrong with other layouts.

use bitstack_engine::EngineError;
use std::path::PathBuf;

/// Errors of this crate. Each message names the file, tensor, field or option it is about, and the values found. A cause is not repeated in the message:
/// it is the `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// A checkpoint of the published implementation does not say in which order its blocks are loaded.
    #[error(
        "the order of the blocks is unknown: neither compression_config.json nor reduced_ppl_average.json is in {}",
        dir.display()
    )]
    NoOrder {
        /// The checkpoint's directory.
        dir: PathBuf,
    },
    /// A file that says in which order blocks are loaded does not fit the blocks that are there.
    #[error("{}: {reason}", path.display())]
    BadOrder {
        /// The file.
        path: PathBuf,
        /// What does not fit, with the values.
        reason: String,
    },
    /// A weight cannot be written in the layout of the published implementation.
    #[error("weight {name} cannot be written in the published layout: {reason}")]
    NotInReferenceLayout {
        /// The weight.
        name: String,
        /// What the layout has no place for, and how to make a file without it.
        reason: String,
    },
    /// An element of a rebuilt weight is too large for the type it should be written in.
    #[error("weight {name} holds {value}, which {dtype} cannot; write another type")]
    TooLargeFor {
        /// The weight.
        name: String,
        /// The element.
        value: f32,
        /// The type.
        dtype: &'static str,
    },
    /// A directory that should be replaced holds something other than a checkpoint.
    #[error("{} is not replaced, because it is not just a checkpoint: it holds {found}; remove it yourself or give another name", dir.display())]
    NotACheckpoint {
        /// The directory.
        dir: PathBuf,
        /// What is in it, or is not.
        found: String,
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

bitstack_engine::from_further_down!(ExchangeError);
