use std::io;
use std::path::PathBuf;

/// Why a model was not fetched. Each message says what is to be done, where that is known; a cause is the `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The name of a repository is not one.
    #[error("{text:?} names no repository: write OWNER/NAME, OWNER/NAME@REVISION or OWNER/NAME/FILE.gguf")]
    Name {
        /// What was written.
        text: String,
    },
    /// There is no place for the cache.
    #[error("no home directory to keep downloads in: set HF_HOME")]
    NoHome,
    /// The endpoint is not an address.
    #[error("HF_ENDPOINT is {endpoint:?}, expected an address such as https://huggingface.co")]
    Endpoint {
        /// What it is.
        endpoint: String,
    },
    /// The endpoint does not answer, and the model is not in the cache.
    #[error("cannot reach {url}, and {repo} is not in {}", cache.display())]
    Unreachable {
        /// What was asked for.
        url: String,
        /// The repository.
        repo: String,
        /// The cache.
        cache: PathBuf,
        /// What the network said.
        source: Box<ureq::Error>,
    },
    /// The cache lacks the model, and nothing may be downloaded.
    #[error("{repo} is not in {}, and HF_HUB_OFFLINE forbids downloading it", cache.display())]
    Offline {
        /// The repository.
        repo: String,
        /// The cache.
        cache: PathBuf,
    },
    /// Nobody may read the repository without saying who they are, or it is not there.
    #[error(
        "{repo} is not there, or private, or needs its licence accepted at {page}: accept it, and set HF_TOKEN (or run `hf auth login`)"
    )]
    Unauthorized {
        /// The repository.
        repo: String,
        /// Its page.
        page: String,
    },
    /// The token's owner may not read the repository.
    #[error(
        "the token may not read {repo}: ask for access at {page}, and use a token that may read gated repositories"
    )]
    Forbidden {
        /// The repository.
        repo: String,
        /// Its page.
        page: String,
    },
    /// The repository, or the revision, is not there.
    #[error("{what} is not there: look at {page}")]
    NotFound {
        /// The repository, with the revision or file.
        what: String,
        /// Its page.
        page: String,
    },
    /// The endpoint answered with something else.
    #[error("{url} answers {status}{}", if *status == 429 { ": too many requests, try again later or set HF_TOKEN" } else { "" })]
    Status {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
    },
    /// The endpoint's answer is not what it should be.
    #[error("{url} answers with {reason}")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// The repository has no files that a model is run from.
    #[error("{repo} holds no safetensors: {advice}")]
    NoModel {
        /// The repository.
        repo: String,
        /// What it holds, and what is to be done.
        advice: String,
    },
    /// A download broke off too often without anything arriving.
    #[error("{file} broke off at byte {at} of {bytes}: the same command goes on from there")]
    BrokenOff {
        /// The file.
        file: String,
        /// Bytes that have arrived.
        at: u64,
        /// Its length.
        bytes: u64,
        /// What was said the last time.
        source: io::Error,
    },
    /// What has arrived is not what the Hub has.
    #[error("{file} does not have the hash {expected} that the Hub gives; it was thrown away, try again")]
    Hash {
        /// The file.
        file: String,
        /// The hash.
        expected: String,
    },
    /// The cache cannot be written to, or read.
    #[error("cannot {operation} {}", path.display())]
    Cache {
        /// `create`, `write`, ...
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}
