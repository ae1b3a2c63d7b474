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
        /// `model_type` of the config, or without one `architectures[0]`.
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
    /// A config has fields about which nothing is known: they may change the arithmetic.
    #[error("{place}: {found}: not known here; take out what does not change the arithmetic")]
    UnknownFields {
        /// The file, or the field that holds them.
        place: String,
        /// The first of them with their values, as JSON, and the number of the others.
        found: String,
    },
    /// A checkpoint has tensors that the model which its config describes does not use.
    #[error("no place for {} of {} in the model that config.json describes: {names}{reason}", tensors(*count), dir.display())]
    UnusedTensors {
        /// The checkpoint's directory.
        dir: PathBuf,
        /// How many they are.
        count: usize,
        /// The first of them.
        names: String,
        /// What the first of them is, where its name tells, in brackets; or nothing.
        reason: String,
    },
    /// A directory holds no checkpoint.
    #[error("no model in {}: {missing}; {advice}", dir.display())]
    NoCheckpoint {
        /// The directory.
        dir: PathBuf,
        /// What is not there.
        missing: &'static str,
        /// What it holds, and what is to be done.
        advice: String,
    },
    /// A file is something else than its name says.
    #[error("{} is {advice}", path.display())]
    OtherFile {
        /// The file.
        path: PathBuf,
        /// What it is, and what is to be done.
        advice: String,
    },
    /// A file is a link to nothing.
    #[error("{} is a link to {}, which is not there: download the model again", path.display(), target.display())]
    DanglingLink {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A GGUF file breaks the rules of its format.
    #[error("cannot read {}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// Which rule.
        source: bitstack_gguf::GgufError,
    },
    /// A key of a GGUF file's metadata has a value that cannot be used.
    #[error("{}: {key} is {found}, expected {expected}", path.display())]
    GgufKey {
        /// The file.
        path: PathBuf,
        /// The key, or the tensor.
        key: String,
        /// Its value.
        found: String,
        /// What would be accepted.
        expected: String,
    },
    /// The config that a GGUF file's metadata make cannot be used.
    #[error("{}, read as a model directory", path.display())]
    GgufConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<ModelError>,
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
    /// There is no tokenizer.
    #[error("no tokenizer.json in {}, and no tokenizer.model to make it of: save the tokenizer there with save_pretrained of transformers", place.display())]
    NoTokenizer {
        /// The checkpoint's directory, or its GGUF file.
        place: PathBuf,
    },
    /// `tokenizer.model` is malformed, or of a kind that is not known here.
    #[error("{}: {reason}", path.display())]
    BadPieces {
        /// The file.
        path: PathBuf,
        /// Which rule.
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

fn tensors(count: usize) -> String {
    if count == 1 { "1 tensor".to_owned() } else { format!("{count} tensors") }
}
