//! One file: what the Hub says of it, and its bytes, in as many requests as it takes.

use crate::HubError;
use crate::cache::{RepoCache, at};
use crate::hub::Hub;
use crate::repo::is_hex;
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::thread::sleep;

/// Tries in a row in which nothing arrives.
const TRIES: u32 = 4;
const PIECE_BYTES: usize = 1 << 16;

/// A file of a repository, as its address describes it.
#[derive(Debug, Clone)]
pub(crate) struct Remote {
    /// Its name in the repository.
    pub(crate) name: String,
    pub(crate) url: String,
    /// The hash of its contents, which is their name in the cache.
    pub(crate) hash: String,
    pub(crate) bytes: u64,
}

impl Remote {
    /// Asks for a file's hash and length.
    pub(crate) fn describe(hub: &Hub, name: &str, url: String) -> Result<Self, HubError> {
        let response = hub.head(&url)?;
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        // Large files lie elsewhere: their own hash and length, not those of what leads there.
        let tag = header("x-linked-etag").or_else(|| header("etag"));
        let bytes = header("x-linked-size").or_else(|| header("content-length")).and_then(|n| n.parse().ok());
        let hash = tag.map(|tag| tag.trim_start_matches("W/").trim_matches('"').to_owned());
        let is_name = |hash: &String| {
            (1..=128).contains(&hash.len()) && hash.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        match (hash.filter(is_name), bytes) {
            (Some(hash), Some(bytes)) => Ok(Self { name: name.to_owned(), url, hash, bytes }),
            (None, _) => Err(HubError::Answer { url, reason: "no ETag that is a hash".into() }),
            (_, None) => Err(HubError::Answer { url, reason: "no length of the file".into() }),
        }
    }

    /// Brings the contents into the cache, unless they are there. `arrived` is told how many bytes there are, beginning with those of earlier tries.
    pub(crate) fn fetch(&self, hub: &Hub, cache: &RepoCache, arrived: &mut dyn FnMut(u64)) -> Result<(), HubError> {
        let blob = cache.blob(&self.hash);
        let _lock = cache.lock(&self.hash)?;
        if blob.exists() {
            arrived(self.bytes);
            return Ok(());
        }
        let partial = blob.with_file_name(format!("{}.incomplete", self.hash));
        let file = at("create", &partial, File::options().create(true).append(true).open(&partial))?;
        let mut have = at("read", &partial, file.metadata())?.len();
        if have > self.bytes {
            at("write", &partial, file.set_len(0))?;
            have = 0;
        }
        let mut idle = 0;
        while have < self.bytes {
            arrived(have);
            let before = have;
            let result = self.continued(hub, &file, &partial, &mut have, arrived);
            match result {
                Ok(()) if have == self.bytes => break,
                Err(Broken::For(error)) => return Err(error),
                _ if have != before => idle = 0,
                _ => idle += 1,
            }
            let source = match result {
                Err(Broken::Off(error)) => error,
                _ => io::ErrorKind::UnexpectedEof.into(),
            };
            if idle >= TRIES {
                return Err(HubError::BrokenOff { file: self.name.clone(), at: have, bytes: self.bytes, source });
            }
            sleep(hub.pause() * idle);
        }
        at("sync", &partial, file.sync_all())?;
        drop(file);
        if !at("read", &partial, self.is_in(&partial))? {
            at("remove", &partial, fs::remove_file(&partial))?;
            return Err(HubError::Hash { file: self.name.clone(), expected: self.hash.clone() });
        }
        at("rename", &partial, fs::rename(&partial, &blob))?;
        arrived(self.bytes);
        Ok(())
    }

    /// One request, from the byte on that is missing.
    fn continued(
        &self,
        hub: &Hub,
        mut file: &File,
        partial: &Path,
        have: &mut u64,
        arrived: &mut dyn FnMut(u64),
    ) -> Result<(), Broken> {
        let mut response = hub.get(&self.url, Some(*have).filter(|n| *n > 0))?;
        match response.status().as_u16() {
            206 => {
                let range = response.headers().get("content-range").and_then(|value| value.to_str().ok());
                if range.is_none_or(|range| !range.starts_with(&format!("bytes {have}-"))) {
                    let reason = format!("the range {:?}, from byte {have} was asked for", range.unwrap_or("none"));
                    return Err(Broken::For(HubError::Answer { url: self.url.clone(), reason }));
                }
            }
            // All of it, from the beginning, or nothing behind what is there.
            200 | 416 => {
                at("write", partial, file.set_len(0)).map_err(Broken::For)?;
                *have = 0;
                if response.status() == 416 {
                    return Ok(());
                }
            }
            500.. => return Err(Broken::Off(io::Error::other(format!("{} answers {}", self.url, response.status())))),
            _ => return Err(Broken::For(hub.refused(&self.url, &response))),
        }
        // Whatever is sent beyond the length is not taken.
        let mut body = response.body_mut().as_reader().take(self.bytes - *have);
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let n = match body.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Broken::Off(error)),
            };
            at("write", partial, file.write_all(&piece[..n])).map_err(Broken::For)?;
            *have += n as u64;
            arrived(*have);
        }
    }

    /// Whether a file has the hash that it should have: SHA-256 of large files, git's of others. Endpoints that give another cannot be held to it.
    fn is_in(&self, path: &Path) -> io::Result<bool> {
        let mut context = if is_hex(&self.hash, 64) {
            Context::new(&SHA256)
        } else if is_hex(&self.hash, 40) {
            let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            context.update(format!("blob {}\0", self.bytes).as_bytes());
            context
        } else {
            return Ok(true);
        };
        let mut file = File::open(path)?;
        let mut piece = vec![0; 16 * PIECE_BYTES];
        loop {
            match file.read(&mut piece)? {
                0 => break,
                n => context.update(&piece[..n]),
            }
        }
        let found: String = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(found == self.hash)
    }
}

/// Why a request ended before its end.
enum Broken {
    /// The connection: another try may go further.
    Off(io::Error),
    /// For good.
    For(HubError),
}

impl From<ureq::Error> for Broken {
    fn from(error: ureq::Error) -> Self {
        Self::Off(error.into_io())
    }
}
