//! Names of repositories.

use crate::HubError;
use std::fmt;
use std::str::FromStr;

/// What a name of a repository begins with where a path could stand.
pub const PREFIX: &str = "hf:";

/// A model repository at a revision, or one GGUF file of it: `OWNER/NAME`, `OWNER/NAME@REVISION`, `OWNER/NAME/FILE.gguf@REVISION`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repo {
    pub(crate) owner: String,
    pub(crate) name: String,
    pub(crate) file: Option<String>,
    pub(crate) revision: String,
}

impl FromStr for Repo {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let bad =
            || HubError::Name { text: text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect() };
        let bare = text.strip_prefix(PREFIX).unwrap_or(text);
        let (path, revision) = bare.split_once('@').unwrap_or((bare, "main"));
        let mut parts = path.splitn(3, '/');
        let (owner, name, file) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next());
        let is_name = |name: &str| {
            let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !name.is_empty()
                && name.len() <= 96
                && name.chars().all(legal)
                && !name.starts_with('.')
                && !name.contains("..")
        };
        let is_part = |part: &str| {
            !matches!(part, "" | "." | "..") && !part.contains(|c: char| c.is_control() || "\\?#%:".contains(c))
        };
        let is_file = |file: &str| file.ends_with(".gguf") && file.split('/').all(is_part);
        let is_revision = |revision: &str| {
            revision.len() <= 256 && revision.split('/').all(|part| is_part(part) && !part.ends_with(".lock"))
        };
        if !(is_name(owner) && is_name(name) && file.is_none_or(is_file) && is_revision(revision)) {
            return Err(bad());
        }
        let file = file.map(str::to_owned);
        Ok(Self { owner: owner.to_owned(), name: name.to_owned(), file, revision: revision.to_owned() })
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}/{}", self.owner, self.name)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

impl Repo {
    /// Whether the revision is a commit, which never changes.
    pub(crate) fn is_commit(&self) -> bool {
        is_hex(&self.revision, 40)
    }
}

/// Whether a text is a number of so many hexadecimal digits.
pub(crate) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for text in ["hf:a/b", "hf:a-1/b_2.x@v1.0", "hf:a/b@refs/pr/3", "hf:a/b/c.gguf", "hf:a/b/Q4/c.gguf@dev"] {
            assert_eq!(text.parse::<Repo>().unwrap().to_string(), text);
        }
        assert_eq!("a/b@main".parse::<Repo>().unwrap(), "hf:a/b".parse().unwrap());
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for text in [
            "",
            "hf:",
            "a",
            "a/",
            "/b",
            "../b",
            "a/..",
            "a/b/c",
            "a/b/../c.gguf",
            "a/b/c.bin",
            "a b/c",
            "a/b@",
            "a/b@../x",
            "a/b@x?y",
            "a/b\n",
        ] {
            assert!(text.parse::<Repo>().is_err(), "{text:?}");
        }
    }
}
