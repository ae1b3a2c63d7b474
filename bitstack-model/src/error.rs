//! What can go wrong with a model's files and with text for it.

use std::path::PathBuf;

/// Errors of this crate. Each message names the file, tensor, field or option it is about, and the values found. A cause is not repeated in the message:
/// it is the `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
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
    #[error("{file} is not valid JSON of the expected form")]
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
    /// `tokenizer.json` is malformed, or the tokenizer failed.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What the tokenizer library said.
        reason: String,
    },
    /// The model's chat template cannot be read, or refuses a conversation.
    #[error("chat template: {reason}")]
    ChatTemplate {
        /// What the template, or the template library, said.
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
}
