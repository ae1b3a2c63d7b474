//! A small Hub: it speaks the paths of the real one, on this machine, and breaks off when it is told to.
#![allow(dead_code, reason = "each crate uses some of it")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(crate) const REPO: &str = "owner/name";

/// What the server has, and what it has been asked for.
#[derive(Default)]
pub(crate) struct State {
    /// Files, with the hash that stands for each, and whether it lies elsewhere, as large files do.
    pub(crate) files: BTreeMap<String, (Vec<u8>, String, bool)>,
    /// Bytes after which answers with contents break off, one for each answer; whole ones after that.
    pub(crate) breaks: Vec<usize>,
    /// The token that must be shown.
    pub(crate) token: Option<String>,
    /// A status for everything.
    pub(crate) status: Option<u16>,
    /// Whether ranges are ignored.
    pub(crate) no_ranges: bool,
    /// Requests: method, path, range, and whether a token was shown.
    pub(crate) seen: Vec<(String, String, Option<String>, bool)>,
}

/// A running server, and another that large files lie at.
pub(crate) struct Server {
    pub(crate) endpoint: String,
    pub(crate) state: Arc<Mutex<State>>,
}

impl Server {
    pub(crate) fn start(state: State) -> Self {
        let state = Arc::new(Mutex::new(state));
        let elsewhere = listen(state.clone(), String::new());
        Self { endpoint: listen(state.clone(), elsewhere), state }
    }

    /// The paths that were asked for with this method.
    pub(crate) fn asked(&self, method: &str) -> Vec<String> {
        let seen = &self.state.lock().unwrap().seen;
        seen.iter().filter(|(m, ..)| m == method).map(|(_, path, ..)| path.clone()).collect()
    }
}

fn listen(state: Arc<Mutex<State>>, elsewhere: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (state, elsewhere) = (state.clone(), elsewhere.clone());
            std::thread::spawn(move || drop(answer(stream, &state, &elsewhere)));
        }
    });
    endpoint
}

fn answer(mut stream: TcpStream, state: &Mutex<State>, elsewhere: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (mut range, mut token) = (None, None);
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_owned()),
            "authorization" => token = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut state = state.lock().unwrap();
    state.seen.push((method.clone(), path.clone(), range.clone(), token.is_some()));
    let mut send = |status: u16, headers: &str, body: &[u8]| {
        let length = if headers.to_ascii_lowercase().contains("content-length") {
            String::new()
        } else {
            format!("Content-Length: {}\r\n", body.len())
        };
        stream.write_all(format!("HTTP/1.1 {status} X\r\n{headers}{length}Connection: close\r\n\r\n").as_bytes())?;
        stream.write_all(if method == "HEAD" { b"" } else { body })
    };
    if let Some(status) = state.status {
        return send(status, "", b"");
    }
    let shown = token.as_deref().and_then(|token| token.strip_prefix("Bearer "));
    if !elsewhere.is_empty() && state.token.as_deref().is_some_and(|needed| shown != Some(needed)) {
        return send(if shown.is_some() { 403 } else { 401 }, "", b"");
    }
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{REPO}/revision/")) {
        if !["main", COMMIT, "refs%2Fpr%2F1"].contains(&revision) {
            return send(404, "X-Error-Code: RevisionNotFound\r\n", b"");
        }
        let siblings: Vec<String> = state.files.keys().map(|name| format!("{{\"rfilename\":\"{name}\"}}")).collect();
        return send(200, "", format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[{}]}}", siblings.join(",")).as_bytes());
    }
    let name = path.strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/")).or_else(|| path.strip_prefix("/elsewhere/"));
    let Some((contents, hash, large)) = name.and_then(|name| state.files.get(name)).cloned() else {
        return send(404, "", b"");
    };
    if large && !elsewhere.is_empty() {
        let headers = format!(
            "X-Linked-Etag: \"{hash}\"\r\nX-Linked-Size: {}\r\nLocation: {elsewhere}/elsewhere/{}\r\n",
            contents.len(),
            name.unwrap()
        );
        return send(302, &headers, b"");
    }
    if method == "HEAD" {
        return send(200, &format!("ETag: W/\"{hash}\"\r\nContent-Length: {}\r\n", contents.len()), b"");
    }
    let from = range
        .filter(|_| !state.no_ranges)
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let start = from.unwrap_or(0);
    if start >= contents.len() && from.is_some() {
        return send(416, "", b"");
    }
    let rest = &contents[start..];
    let status = if from.is_some() { 206 } else { 200 };
    let range = from.map(|from| format!("Content-Range: bytes {from}-{}/{}\r\n", contents.len() - 1, contents.len()));
    let headers = format!("{}Content-Length: {}\r\n", range.unwrap_or_default(), rest.len());
    let end = if state.breaks.is_empty() { rest.len() } else { state.breaks.remove(0).min(rest.len()) };
    send(status, &headers, &rest[..end])
}
