//! The Hub's cache: `models--OWNER--NAME/` with `blobs/` (contents, by their hash), `snapshots/COMMIT/` (names, linked to contents) and `refs/`
//! (names of revisions, with the commit in each).

use crate::repo::is_hex;
use crate::{HubError, Repo};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// A repository's part of the cache.
pub(crate) struct RepoCache {
    root: PathBuf,
    locks: PathBuf,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HubError {
    let path = path.to_owned();
    move |source| HubError::Cache { operation, path, source }
}

impl RepoCache {
    pub(crate) fn new(cache: &Path, repo: &Repo) -> Self {
        let folder = format!("models--{}--{}", repo.owner, repo.name);
        Self { locks: cache.join(".locks").join(&folder), root: cache.join(folder) }
    }

    /// Where the file of these contents is, or will be.
    pub(crate) fn blob(&self, hash: &str) -> PathBuf {
        self.root.join("blobs").join(hash)
    }

    /// The directory of a commit.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The commit that a revision was when it was last asked for.
    pub(crate) fn commit(&self, repo: &Repo) -> Option<String> {
        if repo.is_commit() {
            return Some(repo.revision.clone());
        }
        let commit = fs::read_to_string(self.root.join("refs").join(&repo.revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_hex(commit, 40))
    }

    /// Remembers which commit a revision is.
    pub(crate) fn remember(&self, repo: &Repo, commit: &str) -> Result<(), HubError> {
        if repo.is_commit() || self.commit(repo).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(&repo.revision);
        create_parent(&path)?;
        fs::write(&path, commit).map_err(failed("write", &path))
    }

    /// Creates the directory of contents, and takes the lock of one of them: released when the file is dropped.
    pub(crate) fn lock(&self, hash: &str) -> Result<File, HubError> {
        create_parent(&self.blob(hash))?;
        let path = self.locks.join(format!("{hash}.lock"));
        create_parent(&path)?;
        let file =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(failed("create", &path))?;
        file.lock().map_err(failed("lock", &path))?;
        Ok(file)
    }

    /// Gives contents a name in a snapshot.
    pub(crate) fn link(&self, commit: &str, name: &str, hash: &str) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(name);
        if path.exists() {
            return Ok(());
        }
        create_parent(&path)?;
        // A link to contents that were lost would be in the way.
        let _ = fs::remove_file(&path);
        let up = "../".repeat(2 + name.matches('/').count());
        place(&self.blob(hash), &format!("{up}blobs/{hash}"), &path).or_else(|error| match error.kind() {
            // Somebody else was faster.
            io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(failed("create", &path)(error)),
        })
    }
}

#[cfg(unix)]
fn place(_blob: &Path, link: &str, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(link, path)
}

#[cfg(not(unix))]
fn place(blob: &Path, _link: &str, path: &Path) -> io::Result<()> {
    // Links are a privilege there: the other name of the same contents, or a copy.
    fs::hard_link(blob, path).or_else(|_| fs::copy(blob, path).map(drop))
}

pub(crate) fn create_parent(path: &Path) -> Result<(), HubError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).map_err(failed("create", parent))
}

/// The same, for files of contents.
pub(crate) fn at<T>(operation: &'static str, path: &Path, result: io::Result<T>) -> Result<T, HubError> {
    result.map_err(failed(operation, path))
}
