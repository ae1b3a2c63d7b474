//! What can go wrong when a model runs.

/// Errors of this crate. Each message names the file, tensor, field or option it is about, and the values found. A cause is not repeated in the message:
/// it is the `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A linear operator or vector given to the decoder has the wrong size.
    #[error("{name} has {found_rows} rows and {found_cols} columns, the model needs {rows} and {cols}")]
    OperatorShape {
        /// The weight or tensor.
        name: String,
        /// Rows given.
        found_rows: usize,
        /// Columns given.
        found_cols: usize,
        /// Rows needed.
        rows: usize,
        /// Columns needed.
        cols: usize,
    },
    /// Rows of several sequences are not equally many of each, nor as many as the pass says.
    #[error("{rows} rows cannot be divided among {sequences} sequences")]
    UnevenRows {
        /// Rows given.
        rows: usize,
        /// Sequences, one per cache.
        sequences: usize,
    },
    /// Hidden states or logits given to a function have the wrong size.
    #[error("{what} is {found_rows} x {found_cols}, expected {rows} x {cols}")]
    StateShape {
        /// Which argument.
        what: &'static str,
        /// Rows given.
        found_rows: usize,
        /// Columns given.
        found_cols: usize,
        /// Rows expected.
        rows: usize,
        /// Columns expected.
        cols: usize,
    },
    /// A token id is outside the model's vocabulary.
    #[error(
        "token {token} is outside the model's vocabulary of {vocab_size}; does the tokenizer belong to this model?"
    )]
    TokenOutOfRange {
        /// The token id.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A pass over no tokens was asked for.
    #[error("no tokens given: the prompt is empty")]
    NoTokens,
    /// More positions are needed than the cache or the model has.
    #[error("{needed} positions are needed, but only {limit} are available")]
    ContextFull {
        /// Positions needed, those already cached included.
        needed: usize,
        /// Capacity of the cache, or limit of the model.
        limit: usize,
    },
    /// No windows were given to an evaluation.
    #[error("no windows to evaluate on")]
    NoWindows,
    /// Two models that should be compared do not share a vocabulary.
    #[error("the models cannot be compared: vocabularies of {model} and {reference} tokens")]
    DifferentVocabulary {
        /// Vocabulary of the model under test.
        model: usize,
        /// Vocabulary of the reference.
        reference: usize,
    },
    /// A sampling option is out of range.
    #[error("{option} is {value}, expected {expected}")]
    BadSampling {
        /// The option.
        option: &'static str,
        /// Its value.
        value: f64,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A stop string without a character.
    #[error("a stop string is empty: it would end every text before it begins")]
    EmptyStop,
    /// The logits hold no finite number, so no token can be chosen.
    #[error("the model's logits are not finite: no token can be chosen")]
    NoFiniteLogit,
    /// A weight's statistics, blocks or shape are not usable.
    #[error("weight {name} cannot be used")]
    Weight {
        /// The weight.
        name: String,
        /// What is wrong.
        source: bitstack_core::CoreError,
    },
    /// A stack's tensor has another shape than its config says.
    #[error("tensor {name} of the stack has shape {found:?}, but its config.json implies {expected:?}")]
    StackShape {
        /// The tensor.
        name: String,
        /// The shape in the stack.
        found: Vec<usize>,
        /// The shape that follows from the config.
        expected: Vec<usize>,
    },
    /// An unstacked tensor has a type that no model tensor has.
    #[error("tensor {name} of the stack has dtype {found}; supported are F32, F16 and BF16")]
    StackDtype {
        /// The tensor.
        name: String,
        /// Its type.
        found: &'static str,
    },
    /// A stack holds a weight that its model does not have.
    #[error("the stack holds weight {name}, which its config.json does not know")]
    StrayWeight {
        /// The weight.
        name: String,
    },
    /// The model's files or text.
    #[error(transparent)]
    Model(#[from] bitstack_model::ModelError),
    /// A stack could not be read or written.
    #[error(transparent)]
    Format(#[from] bitstack_format::FormatError),
    /// The blocks in memory.
    #[error(transparent)]
    Runtime(#[from] bitstack_runtime::RuntimeError),
}

/// Implements `From` for what an error type of a crate above takes from further down: each cause has one place there, the variants `Model`, `Format` and
/// `Engine`, whichever way it came.
#[doc(hidden)]
#[macro_export]
macro_rules! from_further_down {
    ($error:ty) => {
        impl From<$crate::EngineError> for $error {
            fn from(error: $crate::EngineError) -> Self {
                match error {
                    $crate::EngineError::Model(error) => error.into(),
                    $crate::EngineError::Format(error) => error.into(),
                    error => Self::Engine(error),
                }
            }
        }

        impl From<bitstack_io::FileError> for $error {
            fn from(error: bitstack_io::FileError) -> Self {
                Self::Format(error.into())
            }
        }
    };
}
