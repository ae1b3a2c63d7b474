//! What can go wrong with a model, its files, its text or the options for running it.

use std::path::PathBuf;

/// Errors of this crate. Each message names the file, tensor, field or option it is about, and the values found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LlmError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is read whole (config, tokenizer, index) is larger than such a file can sensibly be.
    #[error("{} has {bytes} bytes, more than the {limit} allowed for such a file", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A file is not the JSON it should be.
    #[error("{file} is not valid JSON of the expected form: {source}")]
    Json {
        /// The file, as a path or as a name inside a model.
        file: String,
        /// What the parser said, with line and column.
        source: serde_json::Error,
    },
    /// The model's architecture is not one of those the decoder knows.
    #[error("unsupported architecture {found}; supported are {supported}")]
    UnknownArchitecture {
        /// `architectures[0]` or `model_type` of the config.
        found: String,
        /// The names that are accepted.
        supported: String,
    },
    /// `config.json` lacks a field.
    #[error("config.json has no {field}")]
    MissingField {
        /// The field.
        field: &'static str,
    },
    /// A field of `config.json` has a value that cannot be used.
    #[error("config.json: {field} is {found}, expected {expected}")]
    BadField {
        /// The field.
        field: &'static str,
        /// Its value, as JSON.
        found: String,
        /// What would be accepted.
        expected: String,
    },
    /// A directory holds no checkpoint.
    #[error("no model in {}: neither model.safetensors nor model.safetensors.index.json is there", dir.display())]
    NoCheckpoint {
        /// The directory.
        dir: PathBuf,
    },
    /// A safetensors file or shard index breaks the rules of its format.
    #[error("{} is damaged or not a safetensors checkpoint: {reason}", path.display())]
    BadCheckpoint {
        /// The file.
        path: PathBuf,
        /// Which rule.
        reason: String,
    },
    /// The model needs a tensor that is nowhere in the checkpoint.
    #[error("tensor {tensor} is missing from {}", place.display())]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The checkpoint's directory.
        place: PathBuf,
    },
    /// A tensor's shape is not what the config says.
    #[error("tensor {tensor} in {} has shape {found:?}, but config.json implies {expected:?}", path.display())]
    WrongShape {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that follows from the config.
        expected: Vec<usize>,
    },
    /// A tensor's element type is not supported.
    #[error("tensor {tensor} in {} has dtype {found}, expected {expected}", path.display())]
    WrongDtype {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
        /// The dtype in the file.
        found: String,
        /// The dtypes that it may have.
        expected: &'static str,
    },
    /// A tensor holds NaN or an infinity.
    #[error("tensor {tensor} in {} holds {value} at element {index}; every weight must be finite", path.display())]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
        /// Position in row-major order.
        index: usize,
        /// The value found.
        value: f32,
    },
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
    /// A layer has parts that cannot be run backwards.
    #[error("layer {layer} has parts whose gradients are not known")]
    NoGradient {
        /// The layer; the number of layers for the head.
        layer: usize,
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
    /// `tokenizer.json` is malformed, or the tokenizer failed.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What the tokenizer library said.
        reason: String,
    },
    /// A text file for calibration or evaluation is empty.
    #[error("the text is empty: it gives no tokens")]
    EmptyText,
    /// A text is shorter than one window.
    #[error(
        "the text has {tokens} tokens, fewer than one window of {seq_len}; give a longer text or a smaller sequence length"
    )]
    TextTooShort {
        /// Tokens in the text.
        tokens: usize,
        /// Tokens in a window.
        seq_len: usize,
    },
    /// A window length that cannot be used.
    #[error("sequence length {seq_len} is out of range: a window has from 2 to {limit} tokens, the model's limit")]
    BadSeqLen {
        /// The length asked for.
        seq_len: usize,
        /// The model's limit.
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
    /// The logits hold no finite number, so no token can be chosen.
    #[error("the model's logits are not finite: no token can be chosen")]
    NoFiniteLogit,
    /// A weight's statistics, blocks or shape are not usable.
    #[error("weight {name}: {source}")]
    Weight {
        /// The weight.
        name: String,
        /// What is wrong.
        source: bitstack_core::CoreError,
    },
    /// A weight could not be decomposed.
    #[error("weight {name}: {source}")]
    Decompose {
        /// The weight.
        name: String,
        /// What is wrong.
        source: bitstack_decomp::DecompError,
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
    /// A stack could not be read or written.
    #[error(transparent)]
    Format(#[from] bitstack_format::FormatError),
    /// No load order could be made.
    #[error(transparent)]
    Sort(#[from] bitstack_sort::SortError),

    /// The blocks in memory.
    #[error(transparent)]
    Runtime(#[from] bitstack_runtime::RuntimeError),
}

impl From<bitstack_io::FileError> for LlmError {
    fn from(error: bitstack_io::FileError) -> Self {
        Self::Format(error.into())
    }
}
