use bitstack_format::FormatError;
use bitstack_sort::SortError;
use std::error::Error;
use std::io;
use std::sync::Arc;

/// What can go wrong with a model in memory. Cheap to clone: an error that stopped the loading is kept, and told to everyone who asks.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    // ---- the caller asks for something wrong
    /// There is no plan for the budget: it is below the smallest model, or the sizes are beyond counting.
    #[error(transparent)]
    Budget(#[from] SortError),
    /// There is no such weight.
    #[error("weight {weight} of {n_weights}")]
    NoSuchWeight {
        /// The index asked for, from 0.
        weight: usize,
        /// The weights there are.
        n_weights: usize,
    },

    // ---- the file, the memory or the system fails
    /// A block cannot be read, is damaged, or is not a valid block.
    #[error(
        "cannot load block {block} of weight {weight} (what was loaded before stays in use: check the file, then set the budget again)"
    )]
    Block {
        /// The name of the weight.
        weight: String,
        /// The number of the block, from 1.
        block: usize,
        /// What is wrong.
        source: Arc<FormatError>,
    },
    /// The memory has no room for a block and those of its run, or for what it takes to bring them there.
    #[error(
        "no memory for the {bytes} bytes of block {block} of weight {weight} (what was loaded before stays in use: set a smaller budget)"
    )]
    Memory {
        /// The name of the weight.
        weight: String,
        /// The number of the block, from 1.
        block: usize,
        /// The bytes asked for.
        bytes: u64,
        /// What the memory says: a [`Memory::Error`](crate::Memory::Error), which `downcast_ref` gives back.
        source: Arc<dyn Error + Send + Sync>,
    },
    /// A block was read, and the memory does not take it, or those of its run that begins with it.
    #[error(
        "cannot bring block {block} of weight {weight} into memory: {source}; what was loaded before stays in use, and setting the \
         budget tries again"
    )]
    Fill {
        /// The name of the weight.
        weight: String,
        /// The number of the block, from 1.
        block: usize,
        /// What the memory says: a [`Memory::Error`](crate::Memory::Error), which `downcast_ref` gives back.
        source: Arc<dyn Error + Send + Sync>,
    },
    /// The source of the file panicked while a block was read.
    #[error(
        "reading block {block} of weight {weight} panicked: {message}; what was loaded before stays in use, and setting the budget \
         tries again"
    )]
    Panicked {
        /// The name of the weight.
        weight: String,
        /// The number of the block, from 1.
        block: usize,
        /// What the panic says.
        message: String,
    },
    /// A file that is measured cannot be opened or read.
    #[error(transparent)]
    File {
        /// What is wrong.
        source: Arc<FormatError>,
    },
    /// A thread cannot be started.
    #[error("cannot start the thread that {job}")]
    Thread {
        /// What it was to do.
        job: &'static str,
        /// What the system says.
        source: Arc<io::Error>,
    },
}
