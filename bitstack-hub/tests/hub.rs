//! Downloads from a server of this machine that speaks the Hub's paths: what is fetched, where it is put, and what happens when it breaks off.

mod server;

use bitstack_hub::{Fetched, Hub, HubError, Settings};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use server::{COMMIT, Server, State};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Files as the Hub has them: weights elsewhere, by SHA-256; others by git's hash.
fn state(files: &[(&str, &[u8])]) -> State {
    let file = |&(name, contents): &(&str, &[u8])| {
        let large = name.ends_with(".safetensors") || name.ends_with(".gguf");
        let git = [format!("blob {}\0", contents.len()).as_bytes(), contents].concat();
        let hash = if large { digest(&SHA256, contents) } else { digest(&SHA1_FOR_LEGACY_USE_ONLY, &git) };
        (name.to_owned(), (contents.to_vec(), hex(hash.as_ref()), large))
    };
    State { files: files.iter().map(file).collect::<BTreeMap<_, _>>(), ..State::default() }
}

fn weights() -> Vec<u8> {
    (0..100_000_u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect()
}

fn model() -> State {
    state(&[
        ("config.json", b"{}"),
        ("tokenizer.json", b"{\"a\": 1}"),
        ("README.md", b"words"),
        ("pytorch_model.bin", b"never"),
        ("model.safetensors", &weights()),
    ])
}

fn hub(server: &Server, cache: &Path) -> Hub {
    let mut settings = Settings::new(cache);
    settings.endpoint = server.endpoint.clone();
    settings.pause = Duration::from_millis(1);
    Hub::new(settings).unwrap()
}

fn fetch(server: &Server, cache: &TempDir, repo: &str) -> Result<Fetched, HubError> {
    hub(server, cache.path()).fetch(&repo.parse()?, &mut |done, total| assert!(done <= total))
}

#[test]
fn a_model_is_in_the_layout_of_the_hubs_cache_and_nothing_else_is_fetched() {
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    let mut last = (0, 0);
    let found = hub(&server, cache.path())
        .fetch(&"owner/name".parse().unwrap(), &mut |done, total| last = (done, total))
        .unwrap();
    assert_eq!((found.commit.as_str(), found.is_stale), (COMMIT, false));
    assert_eq!(last, (100_010, 100_010));
    let root = cache.path().join("models--owner--name");
    assert_eq!(found.path, root.join("snapshots").join(COMMIT));
    assert_eq!(fs::read(found.path.join("model.safetensors")).unwrap(), weights());
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    let mut names: Vec<_> = fs::read_dir(&found.path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    #[cfg(unix)]
    {
        let hash = hex(digest(&SHA256, &weights()).as_ref());
        assert_eq!(fs::read_link(found.path.join("model.safetensors")).unwrap(), Path::new("../../blobs").join(&hash));
        assert!(root.join("blobs").join(hash).is_file());
    }
    // A second time, only names and hashes are asked for.
    let before = server.asked("GET").len();
    assert_eq!(fetch(&server, &cache, "hf:owner/name").unwrap(), found);
    assert_eq!(server.asked("GET")[before..], ["/api/models/owner/name/revision/main"]);
}

#[test]
fn shards_are_those_that_the_index_names() {
    let index =
        br#"{"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}"#;
    let files: [(&str, &[u8]); 5] = [
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index),
        ("model-00001-of-00002.safetensors", b"one"),
        ("model-00002-of-00002.safetensors", b"two"),
        ("consolidated.safetensors", b"not this"),
    ];
    let (server, cache) = (Server::start(state(&files)), tempfile::tempdir().unwrap());
    let found = fetch(&server, &cache, "owner/name@refs/pr/1").unwrap();
    assert_eq!(fs::read(found.path.join("model-00002-of-00002.safetensors")).unwrap(), b"two");
    assert!(!found.path.join("consolidated.safetensors").exists());
    assert!(cache.path().join("models--owner--name/refs/refs/pr/1").is_file());
    for shard in ["../../x.safetensors", "missing.safetensors", "README.md"] {
        let index = format!(r#"{{"weight_map": {{"x": "{shard}"}}}}"#);
        let server = Server::start(state(&[
            ("config.json", b"{}"),
            ("README.md", b""),
            ("model.safetensors.index.json", index.as_bytes()),
        ]));
        let error = fetch(&server, &tempfile::tempdir().unwrap(), "owner/name").unwrap_err().to_string();
        assert!(error.contains(shard), "{error}");
    }
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    // The first two answers with contents are the small files.
    server.state.lock().unwrap().breaks = vec![9, 9, 40_000, 0, 30_000];
    let found = fetch(&server, &cache, "owner/name").unwrap();
    assert_eq!(fs::read(found.path.join("model.safetensors")).unwrap(), weights());
    let seen = &server.state.lock().unwrap().seen;
    let ranges: Vec<_> = seen
        .iter()
        .filter(|(method, path, ..)| method == "GET" && path.starts_with("/elsewhere"))
        .map(|(_, _, range, _)| range.as_deref())
        .collect();
    assert_eq!(ranges, [None, Some("bytes=40000-"), Some("bytes=40000-"), Some("bytes=70000-")]);
}

#[test]
fn another_call_goes_on_from_what_the_last_one_left() {
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    server.state.lock().unwrap().breaks = [vec![9, 9, 40_000], vec![0; 20]].concat();
    let error = fetch(&server, &cache, "owner/name").unwrap_err();
    assert!(matches!(&error, HubError::BrokenOff { at: 40_000, bytes: 100_000, .. }), "{error}");
    assert!(error.to_string().contains("model.safetensors broke off at byte 40000 of 100000"));
    server.state.lock().unwrap().breaks.clear();
    let found = fetch(&server, &cache, "owner/name").unwrap();
    assert_eq!(fs::read(found.path.join("model.safetensors")).unwrap(), weights());
    let last = server.state.lock().unwrap().seen.last().unwrap().clone();
    assert_eq!(last.2.as_deref(), Some("bytes=40000-"));
    // A server that knows no ranges begins again.
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    server.state.lock().unwrap().no_ranges = true;
    server.state.lock().unwrap().breaks = vec![9, 9, 40_000];
    assert_eq!(
        fs::read(fetch(&server, &cache, "owner/name").unwrap().path.join("model.safetensors")).unwrap(),
        weights()
    );
}

#[test]
fn contents_of_another_hash_are_thrown_away() {
    for name in ["config.json", "model.safetensors"] {
        let mut model = model();
        model.files.get_mut(name).unwrap().0[1] ^= 1;
        let (server, cache) = (Server::start(model), tempfile::tempdir().unwrap());
        let error = fetch(&server, &cache, "owner/name").unwrap_err();
        assert!(matches!(&error, HubError::Hash { file, .. } if file == name), "{error}");
        let blobs = fs::read_dir(cache.path().join("models--owner--name/blobs")).unwrap();
        assert!(blobs.flatten().all(|blob| !blob.file_name().to_string_lossy().ends_with(".incomplete")));
    }
}

#[test]
fn the_token_goes_to_the_endpoint_and_nowhere_else() {
    let mut gated = model();
    gated.token = Some("secret".into());
    let (server, cache) = (Server::start(gated), tempfile::tempdir().unwrap());
    let error = fetch(&server, &cache, "owner/name").unwrap_err();
    assert!(matches!(error, HubError::Unauthorized { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("hf:owner/name")
            && text.contains(&format!("{}/owner/name", server.endpoint))
            && text.contains("HF_TOKEN"),
        "{text}"
    );
    let with = |token: &str| {
        let mut settings = Settings::new(cache.path());
        (settings.endpoint, settings.token) = (server.endpoint.clone(), Some(token.to_owned()));
        Hub::new(settings).unwrap().fetch(&"owner/name".parse().unwrap(), &mut |_, _| {})
    };
    assert!(matches!(with("wrong"), Err(HubError::Forbidden { .. })));
    with("secret").unwrap();
    let seen = &server.state.lock().unwrap().seen;
    assert!(seen.iter().filter(|(_, path, ..)| path.starts_with("/elsewhere")).all(|(.., shown)| !shown));
}

#[test]
fn offline_only_the_cache_is_looked_into() {
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    let offline = || {
        let mut settings = Settings::new(cache.path());
        (settings.endpoint, settings.offline) = (server.endpoint.clone(), true);
        Hub::new(settings).unwrap().fetch(&"owner/name".parse().unwrap(), &mut |_, _| {})
    };
    let error = offline().unwrap_err().to_string();
    assert!(error.contains("hf:owner/name is not in") && error.contains("HF_HUB_OFFLINE"), "{error}");
    assert!(server.asked("GET").is_empty());
    let found = fetch(&server, &cache, "owner/name").unwrap();
    let n = server.asked("GET").len();
    assert_eq!(offline().unwrap(), found);
    assert_eq!(server.asked("GET").len(), n);
    // Where nobody answers, what is there is taken, and said to be old.
    let mut settings = Settings::new(cache.path());
    settings.endpoint = "http://127.0.0.1:1".into();
    let unreachable = Hub::new(settings).unwrap();
    let stale = unreachable.fetch(&"owner/name".parse().unwrap(), &mut |_, _| {}).unwrap();
    assert!(stale.is_stale && stale.path == found.path);
    let error = unreachable.fetch(&"owner/other".parse().unwrap(), &mut |_, _| {}).unwrap_err();
    assert!(
        matches!(error, HubError::Unreachable { .. }) && error.to_string().contains("hf:owner/other is not in"),
        "{error}"
    );
}

#[test]
fn what_is_not_there_is_named() {
    let (server, cache) = (Server::start(model()), tempfile::tempdir().unwrap());
    let error = |repo: &str| fetch(&server, &cache, repo).unwrap_err().to_string();
    assert!(error("owner/name@v2").contains("this revision of hf:owner/name is not there"));
    assert!(error("owner/other").contains("hf:owner/other is not there: look at"));
    assert!(error("owner/name/x.gguf").contains("hf:owner/name/x.gguf is not there"));
    let holding = |name: &str| {
        let server = Server::start(state(&[("config.json", b"{}"), (name, b"")]));
        fetch(&server, &tempfile::tempdir().unwrap(), "owner/name").unwrap_err().to_string()
    };
    assert!(holding("q4.gguf").contains("give one of them, such as hf:owner/name/q4.gguf"));
    assert!(holding("pytorch_model.bin").contains("pickles (pytorch_model.bin)"));
    assert!(holding("adapter_config.json").contains("it is an adapter"));
    server.state.lock().unwrap().status = Some(429);
    assert!(error("owner/name").contains("429: too many requests"));
}

#[test]
fn one_gguf_file_of_a_repository_is_fetched() {
    let (server, cache) = (
        Server::start(state(&[("README.md", b""), ("q/a.gguf", b"GGUF"), ("q/b.gguf", b"GGUF")])),
        tempfile::tempdir().unwrap(),
    );
    let found = fetch(&server, &cache, "hf:owner/name/q/a.gguf").unwrap();
    assert_eq!(fs::read(&found.path).unwrap(), b"GGUF");
    assert!(found.path.ends_with("q/a.gguf") && !found.path.with_file_name("b.gguf").exists());
}

#[test]
fn the_environment_means_what_it_means_to_the_hubs_library() {
    let settings = |variables: &[(&str, &str)]| {
        Settings::from_variables(|name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        })
    };
    let plain = settings(&[("HOME", "/home/u")]).unwrap();
    assert_eq!(
        (plain.cache.as_path(), plain.endpoint.as_str()),
        (Path::new("/home/u/.cache/huggingface/hub"), "https://huggingface.co")
    );
    assert!(!plain.offline && plain.token.is_none());
    assert_eq!(settings(&[("HF_HOME", "/x")]).unwrap().cache, Path::new("/x/hub"));
    assert_eq!(settings(&[("HF_HOME", "/x"), ("HF_HUB_CACHE", "/y")]).unwrap().cache, Path::new("/y"));
    assert_eq!(settings(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]).unwrap().cache, Path::new("/c/huggingface/hub"));
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), "stored\n").unwrap();
    let place = home.path().to_str().unwrap();
    assert_eq!(settings(&[("HF_HOME", place)]).unwrap().token.as_deref(), Some("stored"));
    assert_eq!(settings(&[("HF_HOME", place), ("HF_TOKEN", " given ")]).unwrap().token.as_deref(), Some("given"));
    let other = settings(&[("HOME", "/h"), ("HF_ENDPOINT", "http://mirror/"), ("HF_HUB_OFFLINE", "true")]).unwrap();
    assert_eq!((other.endpoint.as_str(), other.offline), ("http://mirror", true));
    assert!(matches!(settings(&[]), Err(HubError::NoHome)));
    assert!(matches!(
        Hub::new(settings(&[("HOME", "/h"), ("HF_ENDPOINT", "mirror")]).unwrap()),
        Err(HubError::Endpoint { .. })
    ));
}
