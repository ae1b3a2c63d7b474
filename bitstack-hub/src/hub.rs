//! The endpoint: settings, requests, and which files of a repository are wanted.

use crate::cache::RepoCache;
use crate::download::Remote;
use crate::repo::is_hex;
use crate::{HubError, Repo};
use serde::Deserialize;
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};
use ureq::http::{Method, Request, Response};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

/// Files of a model beside its weights, in the order in which they are fetched.
const SMALL: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "adapter_config.json",
];

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Most bytes of a list of files, and of an index.
const LIST_BYTES: u64 = 64 << 20;

/// Where models come from and go to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// The address, without a slash at its end.
    pub endpoint: String,
    /// The directory of the cache.
    pub cache: PathBuf,
    /// Says who asks.
    pub token: Option<String>,
    /// Whether nothing may be downloaded.
    pub offline: bool,
    /// The pause before a second try; three times that before the fourth.
    pub pause: Duration,
}

impl Settings {
    /// A cache at a directory of the caller's, the Hub itself, no token.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        let endpoint = "https://huggingface.co".to_owned();
        Self { endpoint, cache: cache.into(), token: None, offline: false, pause: Duration::from_secs(1) }
    }

    /// What the environment says, by `get`: the variables that the Hub's own library reads.
    ///
    /// # Errors
    /// [`HubError::NoHome`].
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let get = |name: &str| get(name).filter(|value| !value.trim().is_empty());
        let home = || {
            let outer = get("XDG_CACHE_HOME").map(PathBuf::from);
            let outer = outer
                .or_else(|| get("HOME").or_else(|| get("USERPROFILE")).map(|home| PathBuf::from(home).join(".cache")));
            get("HF_HOME")
                .map(PathBuf::from)
                .or_else(|| outer.map(|outer| outer.join("huggingface")))
                .ok_or(HubError::NoHome)
        };
        let cache = match get("HF_HUB_CACHE").or_else(|| get("HUGGINGFACE_HUB_CACHE")) {
            Some(cache) => cache.into(),
            None => home()?.join("hub"),
        };
        let file = get("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home().ok()?.join("token")));
        let stored = || fs::read_to_string(file?).ok();
        let token = get("HF_TOKEN").or_else(|| get("HUGGING_FACE_HUB_TOKEN")).or_else(stored);
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let offline =
            get("HF_HUB_OFFLINE").is_some_and(|on| ["1", "ON", "YES", "TRUE"].contains(&&on.to_uppercase()[..]));
        let mut settings = Self { token, offline, ..Self::new(cache) };
        if let Some(endpoint) = get("HF_ENDPOINT") {
            settings.endpoint = endpoint.trim_end_matches('/').to_owned();
        }
        Ok(settings)
    }
}

/// A model that is in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fetched {
    /// The model's directory, or its GGUF file.
    pub path: PathBuf,
    /// The commit that the revision is.
    pub commit: String,
    /// Whether the endpoint could not be reached, and the model is as it was when it was fetched.
    pub is_stale: bool,
}

/// The Hub, or whatever speaks its paths.
#[derive(Debug)]
pub struct Hub {
    settings: Settings,
    agent: Agent,
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Hub {
    /// The Hub that the environment describes.
    ///
    /// # Errors
    /// [`HubError::NoHome`], [`HubError::Endpoint`].
    pub fn from_environment() -> Result<Self, HubError> {
        Self::new(Settings::from_variables(|name| env::var(name).ok())?)
    }

    /// A Hub by its settings.
    ///
    /// # Errors
    /// [`HubError::Endpoint`].
    pub fn new(settings: Settings) -> Result<Self, HubError> {
        if !["http://", "https://"].iter().any(|scheme| settings.endpoint.starts_with(scheme)) {
            return Err(HubError::Endpoint { endpoint: settings.endpoint });
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        // The system's certificates: those of a company's proxy are among them.
        let tls =
            TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).unversioned_rustls_crypto_provider(provider);
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .tls_config(tls.build())
            .user_agent(concat!("bitstack/", env!("CARGO_PKG_VERSION")))
            // Those are followed here, so that the token is shown to the endpoint alone.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            // A connection that stands still is dropped, and the download goes on with another.
            .timeout_recv_body(Some(Duration::from_secs(300)))
            .build();
        Ok(Self { settings, agent: agent.into() })
    }

    /// Where the model is, downloaded as far as it is not there. `progress` is told the bytes that have arrived, of how many.
    ///
    /// Where the endpoint cannot be reached, a model that was fetched before is taken as it was.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn fetch(&self, repo: &Repo, progress: &mut dyn FnMut(u64, u64)) -> Result<Fetched, HubError> {
        let cache = RepoCache::new(&self.settings.cache, repo);
        if self.settings.offline {
            let missing = || HubError::Offline { repo: repo.to_string(), cache: self.settings.cache.clone() };
            return self.cached(repo, &cache).map(|found| Fetched { is_stale: false, ..found }).ok_or_else(missing);
        }
        let listing = match self.listing(repo) {
            Err(unreachable @ HubError::Unreachable { .. }) => return self.cached(repo, &cache).ok_or(unreachable),
            other => other?,
        };
        let commit = listing.sha;
        let names: BTreeSet<String> = listing.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let wanted = self.wanted(repo, &cache, &commit, &names)?;
        let remotes = wanted.iter().map(|name| Remote::describe(self, name, self.address(repo, &commit, name)));
        let remotes = remotes.collect::<Result<Vec<_>, _>>()?;
        let total = remotes.iter().map(|remote| remote.bytes).sum();
        let mut before = 0;
        for remote in &remotes {
            remote.fetch(self, &cache, &mut |bytes| progress(before + bytes, total))?;
            cache.link(&commit, &remote.name, &remote.hash)?;
            before += remote.bytes;
        }
        cache.remember(repo, &commit)?;
        let path = cache.snapshot(&commit);
        let path = repo.file.as_ref().map_or(path.clone(), |file| path.join(file));
        Ok(Fetched { path, commit, is_stale: false })
    }

    /// The model as it was fetched before.
    fn cached(&self, repo: &Repo, cache: &RepoCache) -> Option<Fetched> {
        let commit = cache.commit(repo)?;
        let snapshot = cache.snapshot(&commit);
        let (path, proof) = match &repo.file {
            Some(file) => (snapshot.join(file), snapshot.join(file)),
            None => (snapshot.clone(), snapshot.join("config.json")),
        };
        proof.exists().then_some(Fetched { path, commit, is_stale: true })
    }

    fn listing(&self, repo: &Repo) -> Result<Listing, HubError> {
        let url = format!(
            "{}/api/models/{}/{}/revision/{}",
            self.settings.endpoint,
            repo.owner,
            repo.name,
            escaped(&repo.revision)
        );
        let response = self.get(&url, None).map_err(|source| HubError::Unreachable {
            url: url.clone(),
            repo: repo.to_string(),
            cache: self.settings.cache.clone(),
            source: Box::new(source),
        })?;
        let listing: Listing = self.json(&url, response)?;
        if !is_hex(&listing.sha, 40) {
            return Err(HubError::Answer { url, reason: "a commit that is none".into() });
        }
        Ok(listing)
    }

    /// The files that a model is run from.
    fn wanted(
        &self,
        repo: &Repo,
        cache: &RepoCache,
        commit: &str,
        names: &BTreeSet<String>,
    ) -> Result<Vec<String>, HubError> {
        if let Some(file) = &repo.file {
            return match names.contains(file) {
                true => Ok(vec![file.clone()]),
                false => {
                    Err(HubError::NotFound { what: repo.to_string(), page: self.page(&self.address(repo, commit, "")) })
                }
            };
        }
        let mut wanted: Vec<String> =
            SMALL.iter().filter(|name| names.contains(**name)).map(|name| (*name).to_owned()).collect();
        if names.contains(SINGLE) {
            wanted.push(SINGLE.to_owned());
        } else if names.contains(INDEX) {
            let url = self.address(repo, commit, INDEX);
            let index = Remote::describe(self, INDEX, url.clone())?;
            if index.bytes > LIST_BYTES {
                return Err(HubError::Answer { url, reason: format!("an index of {} bytes", index.bytes) });
            }
            index.fetch(self, cache, &mut |_| {})?;
            let blob = cache.blob(&index.hash);
            let text = crate::cache::at("read", &blob, fs::read(&blob))?;
            let list: Index =
                serde_json::from_slice(&text).map_err(|e| HubError::Answer { url, reason: e.to_string() })?;
            let shards: BTreeSet<String> = list.weight_map.into_values().collect();
            // Only what the repository has: a name that leads elsewhere is none of its files.
            let missing = |shard: &String| HubError::NotFound {
                what: format!("{repo}, {shard:?} of its index,"),
                page: self.page(&self.address(repo, commit, "")),
            };
            let plain = |shard: &&String| {
                names.contains(*shard) && !shard.contains(['/', '\\']) && shard.ends_with(".safetensors")
            };
            if let Some(other) = shards.iter().find(|shard| !plain(shard)) {
                return Err(missing(other));
            }
            wanted.push(INDEX.to_owned());
            wanted.extend(shards);
        } else {
            return Err(HubError::NoModel { repo: repo.to_string(), advice: advice(repo, names) });
        }
        Ok(wanted)
    }

    /// The address of a file.
    fn address(&self, repo: &Repo, commit: &str, name: &str) -> String {
        let name: Vec<String> = name.split('/').map(escaped).collect();
        format!("{}/{}/{}/resolve/{commit}/{}", self.settings.endpoint, repo.owner, repo.name, name.join("/"))
    }

    /// The page that a person looks at, of an address.
    fn page(&self, url: &str) -> String {
        let path = url[self.settings.endpoint.len().min(url.len())..].trim_start_matches("/api/models");
        let repo: Vec<&str> = path.trim_start_matches('/').split('/').take(2).collect();
        format!("{}/{}", self.settings.endpoint, repo.join("/"))
    }

    pub(crate) fn pause(&self) -> Duration {
        self.settings.pause
    }

    /// The bytes of an address, wherever they lie, from byte `from` on.
    pub(crate) fn get(&self, url: &str, from: Option<u64>) -> Result<Response<Body>, ureq::Error> {
        self.send(&Method::GET, url, from)
    }

    /// The headers of an address of the endpoint: those before it leads elsewhere, which describe the file.
    pub(crate) fn head(&self, url: &str) -> Result<Response<Body>, HubError> {
        let response = self.send(&Method::HEAD, url, None);
        let response = response.map_err(|e| HubError::Answer { url: url.to_owned(), reason: e.to_string() })?;
        match response.status().as_u16() {
            200 | 300..400 => Ok(response),
            _ => Err(self.refused(url, &response)),
        }
    }

    /// Follows an address to where it leads; asked for headers alone, only as far as it stays at the endpoint (a repository that was renamed does).
    fn send(&self, method: &Method, url: &str, from: Option<u64>) -> Result<Response<Body>, ureq::Error> {
        const MOST_MOVES: usize = 8;
        let is_ours = |url: &str| url.strip_prefix(&self.settings.endpoint).is_some_and(|path| path.starts_with('/'));
        let mut at = url.to_owned();
        for _ in 0..MOST_MOVES {
            let mut request = Request::builder().method(method).uri(&at).header("Accept-Encoding", "identity");
            if let Some(token) = self.settings.token.as_ref().filter(|_| is_ours(&at)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if let Some(from) = from {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = self.agent.run(request.body(())?)?;
            let location = response.headers().get("location").and_then(|value| value.to_str().ok());
            match location.filter(|_| response.status().is_redirection()).and_then(|location| moved(&at, location)) {
                Some(next) if is_ours(&next) || method != Method::HEAD => at = next,
                _ => return Ok(response),
            }
        }
        Err(ureq::Error::TooManyRedirects)
    }

    fn json<T: serde::de::DeserializeOwned>(&self, url: &str, mut response: Response<Body>) -> Result<T, HubError> {
        if response.status() != 200 {
            return Err(self.refused(url, &response));
        }
        let answer = |reason: String| HubError::Answer { url: url.to_owned(), reason };
        let bytes =
            response.body_mut().with_config().limit(LIST_BYTES).read_to_vec().map_err(|e| answer(e.to_string()))?;
        serde_json::from_slice(&bytes).map_err(|e| answer(e.to_string()))
    }

    /// What a status means, and what is to be done about it.
    pub(crate) fn refused(&self, url: &str, response: &Response<Body>) -> HubError {
        let page = self.page(url);
        let repo = format!("{}{}", crate::PREFIX, page[self.settings.endpoint.len()..].trim_start_matches('/'));
        match response.status().as_u16() {
            401 => HubError::Unauthorized { repo, page },
            403 if self.settings.token.is_none() => HubError::Unauthorized { repo, page },
            403 => HubError::Forbidden { repo, page },
            404 => {
                let revision = response.headers().get("x-error-code").is_some_and(|code| code == "RevisionNotFound");
                let what = if revision { format!("this revision of {repo}") } else { repo };
                HubError::NotFound { what, page }
            }
            status => HubError::Status { url: url.to_owned(), status },
        }
    }
}

/// Where an address leads to that answers with this location; nowhere, where that would be without encryption and the address was not.
fn moved(at: &str, location: &str) -> Option<String> {
    if location.starts_with('/') && !location.starts_with("//") {
        let host = at.find("://")? + 3;
        let path = at[host..].find('/').map_or(at.len(), |slash| host + slash);
        return Some(format!("{}{location}", &at[..path]));
    }
    let is_kept = location.starts_with("https://") || location.starts_with("http://") && at.starts_with("http://");
    is_kept.then(|| location.to_owned())
}

/// What a repository without safetensors holds, and what is to be done.
fn advice(repo: &Repo, names: &BTreeSet<String>) -> String {
    let ending = |endings: &[&str]| names.iter().find(|name| endings.iter().any(|ending| name.ends_with(ending)));
    let shown = |name: &str| name.chars().filter(|c| !c.is_control()).take(100).collect::<String>();
    if names.contains("adapter_config.json") {
        "it is an adapter (adapter_config.json): merge it into its model first, with merge_and_unload of peft"
            .to_owned()
    } else if let Some(name) = ending(&[".gguf"]) {
        format!(
            "it has GGUF files: give one of them, such as {PREFIX}{}/{}/{}",
            repo.owner,
            repo.name,
            shown(name),
            PREFIX = crate::PREFIX
        )
    } else if let Some(name) = ending(&[".bin", ".pt", ".pth"]) {
        format!(
            "it has pickles ({}), which are not opened: look for a revision or a copy with safetensors",
            shown(name)
        )
    } else {
        "is it a model?".to_owned()
    }
}

/// A part of an address, with what may not stand there escaped.
fn escaped(part: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~');
    part.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
