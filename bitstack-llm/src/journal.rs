//! What is finished of a compression, kept beside its output: after a kill the same call goes on where the last one was.
//!
//! A journal is a directory. Every unit of work (windows that the model wrote, the hidden states in front of a layer, the blocks of a
//! weight, measured runs, the load order) is a file in it, written under another name, synced and renamed, so that a unit that is there is
//! there whole. Each ends in a BLAKE3 hash keyed with what the journal is for; one that is damaged is made again, like one that is
//! missing. `journal.json` says what the journal is for, and what the output must be once that is known.

use crate::compress::{self, Compressed};
use crate::text::default_seq_len;
use crate::{Checkpoint, CompressOptions, LlmError, Part, Progress, WeightSpec};
use bitstack_core::WeightStack;
use bitstack_format::{
    BlockSource, Draft, Existing, FormatError, StackFile, write_atomically, write_atomically_through,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Changes with whatever changes the contents of a unit for the same input, its blocks above all: a journal of another algorithm is another
/// journal.
const UNITS: u32 = 4;

const RECORD: &str = "journal.json";
const LOCK: &str = "lock";
const HASH_BYTES: usize = blake3::OUT_LEN;

/// A compression that can be killed at any moment: what is finished lies in a directory of its own.
///
/// ```no_run
/// use bitstack_format::Existing;
/// use bitstack_llm::{Checkpoint, CompressOptions, Journal};
/// # fn main() -> Result<(), bitstack_llm::LlmError> {
/// let (checkpoint, options) = (Checkpoint::open("Llama-3.2-1B")?, CompressOptions::default());
/// let text = std::fs::read_to_string("text.txt").expect("a text to calibrate on");
/// let journal = Journal::open("llama.bitstack.partial", &checkpoint, Some(&text), &options, &())?;
/// let compressed = journal.compress(&())?;
/// journal.write(&compressed, "llama.bitstack", Existing::Refuse, &mut |_, _| {})?;
/// journal.remove()?;
/// # Ok(())
/// # }
/// ```
///
/// The output has the same bytes as without any interruption, on the same kind of processor. While a journal is open its directory is
/// locked. A journal that is dropped stays, unless nothing is finished in it.
#[derive(Debug)]
pub struct Journal<'a> {
    checkpoint: &'a Checkpoint,
    text: Option<&'a str>,
    options: &'a CompressOptions,
    record: Record,
    units: Units,
    is_removed: bool,
    _lock: File,
}

/// `journal.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Everything that the output depends on, by name: a value, or the BLAKE3 hash of one.
    input: Vec<(String, String)>,
    /// The hash of the input.
    key: String,
    /// Set before the output gets its name.
    output: Option<Output>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Output {
    bytes: u64,
    blake3: String,
}

impl<'a> Journal<'a> {
    /// Opens the journal in `dir`, or makes one. What the output depends on is hashed, the tensors of the checkpoint too, and must be
    /// what it was.
    ///
    /// # Errors
    /// [`LlmError::JournalLocked`] while another process has it open, [`LlmError::JournalDiffers`] when it is of another program version,
    /// model, text or options; failures to read the checkpoint or to write the directory.
    pub fn open(
        dir: impl AsRef<Path>,
        checkpoint: &'a Checkpoint,
        text: Option<&'a str>,
        options: &'a CompressOptions,
        progress: &dyn Progress,
    ) -> Result<Self, LlmError> {
        let dir = dir.as_ref();
        let lock = lock(dir)?;
        for name in entries(dir)?.filter(|name| name.starts_with('.') && name.ends_with(".tmp")) {
            remove_file(&dir.join(name))?;
        }
        let path = dir.join(RECORD);
        let old = match fs::read(&path) {
            // One that is damaged is as good as none. Units say themselves what they are for.
            Ok(bytes) => serde_json::from_slice::<Record>(&bytes).ok().filter(|old| old.key == hex(key(&old.input))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(LlmError::Io { path, source }),
        };
        let old = old.filter(|old| old.output.is_some() || has_units(dir));
        let compare = |input: &[(String, String)]| match &old {
            Some(old) => same(dir, &old.input, input),
            None => Ok(()),
        };
        let mut input = input(checkpoint, text, options)?;
        // The tensors come last, because hashing them takes long; what is wrong before that is told at once.
        compare(&input)?;
        input.extend(tensors(checkpoint, progress)?);
        compare(&input)?;
        let record = match old {
            Some(old) if old.input.len() == input.len() => old,
            Some(old) => {
                let (what, was) = old.input[input.len()].clone();
                return Err(LlmError::JournalDiffers { dir: dir.to_owned(), what, was, is: "absent".to_owned() });
            }
            None => {
                let record = Record { key: hex(key(&input)), input, output: None };
                record.write(dir)?;
                record
            }
        };
        let units = Units { dir: dir.to_owned(), key: Some(*key(&record.input).as_bytes()) };
        Ok(Self { checkpoint, text, options, record, units, is_removed: false, _lock: lock })
    }

    /// Removes the journal in `dir`, if there is one.
    ///
    /// # Errors
    /// [`LlmError::JournalLocked`]; failures to remove it.
    pub fn discard(dir: impl AsRef<Path>) -> Result<(), LlmError> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            return Ok(());
        }
        let _lock = lock(dir)?;
        remove(dir)
    }

    /// Whether the journal in `dir` says that its output was complete: then [`Journal::is_written`] is worth asking.
    pub fn has_output(dir: impl AsRef<Path>) -> bool {
        let bytes = fs::read(dir.as_ref().join(RECORD)).unwrap_or_default();
        serde_json::from_slice::<Record>(&bytes).is_ok_and(|record| record.output.is_some())
    }

    /// Whether the file at `output` is this journal's, complete: the process was killed after it had written it.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn is_written(&self, output: impl AsRef<Path>) -> Result<bool, LlmError> {
        let (Some(expected), path) = (&self.record.output, output.as_ref()) else { return Ok(false) };
        let io = |source| LlmError::Io { path: path.to_owned(), source };
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(io(e)),
        };
        if file.metadata().map_err(io)?.len() != expected.bytes {
            return Ok(false);
        }
        let mut hasher = blake3::Hasher::new();
        io::copy(&mut file, &mut hasher).map_err(io)?;
        Ok(hasher.finalize().to_hex().as_str() == expected.blake3)
    }

    /// Whether something is finished, so that going on saves work.
    pub fn has_work(&self) -> bool {
        self.record.output.is_some() || has_units(&self.units.dir)
    }

    /// Compresses, or goes on with it; see [`compress`](crate::compress). Tells `progress` what is there already.
    ///
    /// # Errors
    /// As [`compress`](crate::compress). What was finished before the error stays.
    pub fn compress(&self, progress: &dyn Progress) -> Result<Compressed, LlmError> {
        compress::run(self.checkpoint, self.text, self.options, &self.units, progress)
    }

    /// Writes the output. Calls `progress` with the bytes done and the bytes in all; returns the bytes written. The journal is still
    /// needed: a kill right after this, before [`Journal::remove`], is what [`Journal::is_written`] is for.
    ///
    /// # Errors
    /// As [`write_atomically`] and [`Draft::finish`].
    pub fn write(
        &self,
        compressed: &Compressed,
        output: impl AsRef<Path>,
        existing: Existing,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<u64, LlmError> {
        let dir = &self.units.dir;
        Ok(write_atomically_through(dir, output, existing, |out| {
            let mut out = Hashed { out, hasher: blake3::Hasher::new() };
            let bytes = compressed.draft.finish(compressed.order.weights(), &mut out, progress)?;
            let output = Some(Output { bytes, blake3: hex(out.hasher.finalize()) });
            Record { input: self.record.input.clone(), key: self.record.key.clone(), output }.write(dir)?;
            Ok(bytes)
        })?)
    }

    /// Removes the journal.
    ///
    /// # Errors
    /// Failures to do so.
    pub fn remove(mut self) -> Result<(), LlmError> {
        self.is_removed = true;
        remove(&self.units.dir)
    }
}

impl Drop for Journal<'_> {
    fn drop(&mut self) {
        if !self.is_removed && !self.has_work() {
            // It is of no use, and of no harm either.
            let _ = remove(&self.units.dir);
        }
    }
}

impl Record {
    fn write(&self, dir: &Path) -> Result<(), FormatError> {
        let json = serde_json::to_vec_pretty(self).expect("strings and numbers");
        write_atomically(dir.join(RECORD), Existing::Replace, |out| Ok(out.write_all(&json)?))
    }
}

/// Everything that the output depends on, except the tensors.
fn input(
    checkpoint: &Checkpoint,
    text: Option<&str>,
    options: &CompressOptions,
) -> Result<Vec<(String, String)>, LlmError> {
    // Whoever adds an option has to add it here.
    let CompressOptions {
        method,
        spikes,
        rank,
        n_blocks,
        scaling,
        ordering,
        samples,
        seq_len,
        order_windows,
        keep_embeddings,
        seed,
    } = options;
    let or_default = |n: &Option<usize>| n.map_or("default".to_owned(), |n| n.to_string());
    let mut input = vec![
        // Architectures differ in their rounding, and in the order of bytes.
        ("program", format!("{} on {}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH)),
        ("units", UNITS.to_string()),
        ("method", method.name().to_owned()),
        ("spikes", spikes.to_string()),
        ("rank", or_default(rank)),
        ("blocks", or_default(n_blocks)),
        ("scale", format!("{scaling:?}").to_lowercase()),
        ("order", format!("{ordering:?}").to_lowercase()),
        ("samples", samples.to_string()),
        ("seq-len", seq_len.unwrap_or_else(|| default_seq_len(checkpoint.config())).to_string()),
        ("order-windows", order_windows.to_string()),
        ("keep-embeddings", keep_embeddings.to_string()),
        ("seed", seed.to_string()),
        ("calibration text", text.map_or("the model's own".to_owned(), |t| hex(blake3::hash(t.as_bytes())))),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect::<Vec<_>>();
    for (name, contents) in checkpoint.companions()? {
        input.push((name, hex(blake3::hash(&contents))));
    }
    Ok(input)
}

/// The tensors of the model: headers and lengths would not tell one training run from another.
fn tensors(checkpoint: &Checkpoint, progress: &dyn Progress) -> Result<Vec<(String, String)>, LlmError> {
    let config = checkpoint.config();
    let names: Vec<String> = config.weights().iter().map(WeightSpec::tensor_name).collect();
    let names: Vec<String> = names.into_iter().chain(config.other_tensors().into_iter().map(|v| v.name)).collect();
    progress.part(Part::Opening, config.weights().iter().map(|w| (w.rows * w.cols) as u64).sum());
    progress.stage("check the model (tensors)", names.len() as u64);
    names
        .into_par_iter()
        .with_max_len(1)
        .map(|name| {
            let hash = hex(checkpoint.tensor_hash(&name)?);
            progress.advance(1);
            Ok((name, hash))
        })
        .collect()
}

fn key(input: &[(String, String)]) -> blake3::Hash {
    blake3::hash(&serde_json::to_vec(input).expect("pairs of strings"))
}

fn hex(hash: blake3::Hash) -> String {
    hash.to_hex().to_string()
}

/// Compares as far as `new` goes.
fn same(dir: &Path, old: &[(String, String)], new: &[(String, String)]) -> Result<(), LlmError> {
    for (i, (name, value)) in new.iter().enumerate() {
        let differs = |what: &str, was: &str, is: &str| {
            let [what, was, is] = [what, was, is].map(str::to_owned);
            Err(LlmError::JournalDiffers { dir: dir.to_owned(), what, was, is })
        };
        match old.get(i) {
            Some((old, was)) if old == name && was == value => {}
            Some((old, was)) if old == name => return differs(name, was, value),
            _ if old.iter().any(|(old, _)| old == name) => return differs(&old[i].0, &old[i].1, "absent"),
            _ => return differs(name, "absent", value),
        }
    }
    Ok(())
}

/// Makes the directory and locks it.
fn lock(dir: &Path) -> Result<File, LlmError> {
    let failed = |operation, path: &Path, source| FormatError::File { operation, path: path.to_owned(), source };
    let path = dir.join(LOCK);
    loop {
        match fs::create_dir(dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed("create", dir, e).into()),
            _ => {}
        }
        let file = match File::options().create(true).truncate(false).write(true).open(&path) {
            // Its last holder is removing the directory just now.
            Err(e) if e.kind() == io::ErrorKind::NotFound && !dir.exists() => continue,
            file => file.map_err(|e| failed("create", &path, e))?,
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LlmError::JournalLocked { path }),
            // Some network file systems have no locks; they need not be without journals.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(failed("lock", &path, e).into()),
        }
        // Its last holder may have removed it between the opening and the locking.
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt as _;
            let number = |m: io::Result<fs::Metadata>| m.map(|m| (m.dev(), m.ino())).ok();
            if number(file.metadata()) != number(fs::metadata(&path)) {
                continue;
            }
        }
        return Ok(file);
    }
}

fn entries(dir: &Path) -> Result<impl Iterator<Item = String>, LlmError> {
    let entries = fs::read_dir(dir).map_err(|source| LlmError::Io { path: dir.to_owned(), source })?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()))
}

fn has_units(dir: &Path) -> bool {
    entries(dir).is_ok_and(|mut names| names.any(|name| name != RECORD && name != LOCK))
}

fn remove_file(path: &Path) -> Result<(), FormatError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(FormatError::File { operation: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Removes all units.
fn clear(dir: &Path) -> Result<(), LlmError> {
    for name in entries(dir)?.filter(|name| name != RECORD && name != LOCK) {
        remove_file(&dir.join(name))?;
    }
    Ok(())
}

/// Removes the directory; the record goes after the units, because it says what they are.
fn remove(dir: &Path) -> Result<(), LlmError> {
    clear(dir)?;
    remove_file(&dir.join(RECORD))?;
    remove_file(&dir.join(LOCK))?;
    let failed = |source| FormatError::File { operation: "remove", path: dir.to_owned(), source };
    Ok(fs::remove_dir(dir).map_err(failed)?)
}

/// A writer that hashes what goes through it.
struct Hashed<W> {
    out: W,
    hasher: blake3::Hasher,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Finished units of work, or the place where they would be: without a journal nothing is stored, and nothing found.
#[derive(Debug)]
pub(crate) struct Units {
    dir: PathBuf,
    key: Option<[u8; 32]>,
}

impl Units {
    /// Keeps nothing; `dir` is for scratch files.
    pub(crate) fn none(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), key: None }
    }

    /// Where scratch files go.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Keeps a unit: durable when this returns. One of the same name is replaced.
    pub(crate) fn store(&self, name: &str, parts: &[&[u8]]) -> Result<(), FormatError> {
        let Some(key) = self.key else { return Ok(()) };
        let mut hasher = unit_hasher(&key, name);
        write_atomically(self.dir.join(name), Existing::Replace, |out| {
            for part in parts {
                hasher.update(part);
                out.write_all(part)?;
            }
            Ok(out.write_all(hasher.finalize().as_bytes())?)
        })
    }

    /// A unit of 32-bit numbers, if it is there and whole.
    pub(crate) fn load(&self, name: &str) -> Result<Option<Vec<u32>>, FormatError> {
        let Some(mut unit) = self.open(name)? else { return Ok(None) };
        let mut numbers: Vec<u32> = Vec::new();
        let out_of_memory =
            |_| FormatError::OutOfMemory { what: unit.path.display().to_string(), bytes: unit.len as u64 };
        numbers.try_reserve_exact(unit.len / 4).map_err(out_of_memory)?;
        numbers.resize(unit.len / 4, 0);
        let is_whole = unit.len % 4 == 0 && unit.read(&mut [bytemuck::cast_slice_mut(&mut numbers)])?;
        Ok(is_whole.then_some(numbers))
    }

    /// Fills `parts` with a unit of just that length, if it is there and whole; otherwise they are left with anything.
    pub(crate) fn load_into(&self, name: &str, parts: &mut [&mut [u8]]) -> Result<bool, FormatError> {
        match self.open(name)? {
            Some(mut unit) if unit.len == parts.iter().map(|p| p.len()).sum::<usize>() => unit.read(parts),
            _ => Ok(false),
        }
    }

    /// Forgets a unit.
    pub(crate) fn remove(&self, name: &str) -> Result<(), FormatError> {
        if self.key.is_some() { remove_file(&self.dir.join(name)) } else { Ok(()) }
    }

    fn open(&self, name: &str) -> Result<Option<Unit>, FormatError> {
        let Some(key) = self.key else { return Ok(None) };
        let path = self.dir.join(name);
        let failed = |operation, source| FormatError::File { operation, path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed("open", e)),
        };
        let bytes = file.metadata().map_err(|e| failed("read", e))?.len();
        let len = usize::try_from(bytes).ok().and_then(|n| n.checked_sub(HASH_BYTES));
        Ok(len.map(|len| Unit { file, hasher: unit_hasher(&key, name), len, path }))
    }

    /// Keeps the blocks of the weight of this index, and its errors, for [`Units::take_weight`]; whether they are kept.
    pub(crate) fn store_weight(
        &self,
        index: usize,
        spec: &WeightSpec,
        (rank, method): (usize, &str),
        stack: &WeightStack,
        errors: &[f64],
    ) -> Result<bool, FormatError> {
        let Some(key) = self.key else { return Ok(false) };
        let mut draft = Draft::create_on(Vec::new(), "memory");
        let weight = draft.add_weight(&spec.name, stack.shape(), rank, method)?;
        for block in stack.blocks() {
            draft.push_block(weight, block.view())?;
        }
        draft.set_provenance("journal", blake3::Hash::from(key).to_hex().as_str())?;
        let errors: Vec<String> = errors.iter().map(|e| format!("{:016x}", e.to_bits())).collect();
        draft.set_provenance("errors", &errors.join(" "))?;
        let order = vec![0; stack.blocks().len()];
        write_atomically(self.weight_path(index), Existing::Replace, |out| draft.finish(&order, out, &mut |_, _| {}))?;
        Ok(true)
    }

    /// Puts the blocks of the weight of this index into the draft, if they are there and whole, and returns the errors.
    pub(crate) fn take_weight(&self, index: usize, draft: &mut Draft) -> Result<Option<Vec<f64>>, FormatError> {
        let Some(key) = self.key else { return Ok(None) };
        let path = self.weight_path(index);
        let file = match StackFile::open_path(&path) {
            Ok(file) if file.missing().is_none() => file,
            Err(e @ FormatError::File { .. }) if path.exists() => return Err(e),
            _ => return Ok(None),
        };
        let of = |name: &str| file.provenance().get(name).map_or("", |v| v);
        if of("journal") != blake3::Hash::from(key).to_hex().as_str() || !file.verify(&mut |_, _| {})?.is_whole() {
            return Ok(None);
        }
        let errors = of("errors").split(' ').map(|e| u64::from_str_radix(e, 16).map(f64::from_bits));
        let Ok(errors) = errors.collect::<Result<Vec<_>, _>>() else { return Ok(None) };
        draft.add_blocks_of(&path)?;
        Ok(Some(errors))
    }

    fn weight_path(&self, index: usize) -> PathBuf {
        self.dir.join(format!("weight.{index:04}.bitstack"))
    }
}

fn unit_hasher(key: &[u8; 32], name: &str) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(name.as_bytes()).update(&[0]);
    hasher
}

/// The file of a unit.
struct Unit {
    file: File,
    hasher: blake3::Hasher,
    /// Bytes without the hash.
    len: usize,
    path: PathBuf,
}

impl Unit {
    /// Whether the hash is right.
    fn read(&mut self, parts: &mut [&mut [u8]]) -> Result<bool, FormatError> {
        let mut hash = [0; HASH_BYTES];
        let mut read = || {
            for part in parts.iter_mut() {
                self.file.read_exact(part)?;
                self.hasher.update(part);
            }
            self.file.read_exact(&mut hash)
        };
        read().map_err(|source| FormatError::File { operation: "read", path: self.path.clone(), source })?;
        Ok(self.hasher.finalize() == hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ordering;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    fn checkpoint() -> Checkpoint {
        Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/llama")).unwrap()
    }

    fn options(ordering: Ordering) -> CompressOptions {
        CompressOptions { n_blocks: Some(3), samples: 2, seq_len: Some(16), ordering, ..Default::default() }
    }

    fn bytes(compressed: &Compressed) -> Vec<u8> {
        let mut bytes = Vec::new();
        compressed.draft.finish(compressed.order.weights(), &mut bytes, &mut |_, _| {}).unwrap();
        bytes
    }

    fn whole(options: &CompressOptions) -> Vec<u8> {
        bytes(&crate::compress(&checkpoint(), None, options, &std::env::temp_dir(), &()).unwrap())
    }

    /// Work that stops, as if killed, after some steps.
    struct StopAfter(AtomicU64);

    impl Progress for StopAfter {
        fn stage(&self, _: &str, _: u64) {}
        fn advance(&self, steps: u64) {
            // What is found finished is told at once and is no work.
            if steps == 1 && self.0.fetch_sub(1, Relaxed) == 0 {
                std::panic::resume_unwind(Box::new("stopped"));
            }
        }
    }

    #[test]
    fn a_compression_that_stops_again_and_again_ends_with_the_same_bytes() {
        let checkpoint = checkpoint();
        for (ordering, steps) in [(Ordering::Gain, 33), (Ordering::Perplexity, 33), (Ordering::Random, 35)] {
            let options = options(ordering);
            let dir = tempfile::tempdir().unwrap();
            let mut n_stops = 0;
            let ended = loop {
                let journal = Journal::open(dir.path().join("j"), &checkpoint, None, &options, &()).unwrap();
                let stop = StopAfter(AtomicU64::new(steps));
                if let Ok(result) = catch_unwind(AssertUnwindSafe(|| journal.compress(&stop))) {
                    break bytes(&result.unwrap());
                }
                n_stops += 1;
                assert!(n_stops < 50, "{ordering:?} comes to no end");
            };
            assert!(n_stops > 0, "{ordering:?} was never stopped");
            assert!(ended == whole(&options), "{ordering:?}: other bytes after {n_stops} stops");
        }
    }

    /// 86 texts of the model's own of 8 tokens, two groups: one of 48, one of 38. Stops fall into the first, into the second, and behind them.
    #[test]
    fn a_compression_with_a_text_that_stops_around_the_models_own_ends_with_the_same_bytes() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../bitstack/demo");
        let checkpoint = Checkpoint::open(format!("{demo}/tiny-llama")).unwrap();
        let text = fs::read_to_string(format!("{demo}/text.txt")).unwrap();
        let options = CompressOptions { samples: 129, ..options(Ordering::Random) };
        let whole = crate::compress(&checkpoint, Some(&text), &options, &std::env::temp_dir(), &()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let run = |steps| {
            let journal = Journal::open(&path, &checkpoint, Some(&text), &options, &()).unwrap();
            let stop = StopAfter(AtomicU64::new(steps));
            let result = catch_unwind(AssertUnwindSafe(|| journal.compress(&stop))).ok();
            (
                result.map(|compressed| bytes(&compressed.unwrap())),
                [0, 1, 2].map(|i| path.join(format!("text.0000{i}")).exists()),
            )
        };
        let loaded = checkpoint.config().weights().len() as u64;
        assert_eq!(run(loaded + 3), (None, [false; 3]));
        assert_eq!(run(loaded + 7 + 3), (None, [true, false, false]));
        // The first group is there, and not sampled again.
        assert_eq!(run(loaded + 3), (None, [true, false, false]));
        assert_eq!(run(loaded + 7 + 3), (None, [true, true, false]));
        assert!(run(u64::MAX).0.unwrap() == bytes(&whole));
    }

    #[test]
    fn what_is_finished_is_not_done_again() {
        let checkpoint = checkpoint();
        let options = options(Ordering::Gain);
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path().join("j"), &checkpoint, None, &options, &()).unwrap();
        let first = bytes(&journal.compress(&()).unwrap());
        let at_once = StopAfter(AtomicU64::new(0));
        assert!(bytes(&journal.compress(&at_once).unwrap()) == first);
        assert_eq!(at_once.0.into_inner(), 0, "a step of work");
    }

    #[test]
    fn damaged_units_are_made_again() {
        let checkpoint = checkpoint();
        let options = options(Ordering::Gain);
        let whole = whole(&options);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let run = || bytes(&Journal::open(&path, &checkpoint, None, &options, &()).unwrap().compress(&()).unwrap());
        assert!(run() == whole);
        for name in [
            "order",
            "text.00000",
            "weight.0003.bitstack",
            "weight.0015.bitstack",
            "importance",
            "runs.quality",
            "journal.json",
        ] {
            let good = fs::read(path.join(name)).unwrap();
            let mut flipped = good.clone();
            flipped[good.len() / 3] ^= 4;
            for bad in [&good[..0], &good[..good.len() / 2], &good[..good.len() - 1], &flipped] {
                fs::write(path.join(name), bad).unwrap();
                if name != "order" {
                    remove_file(&path.join("order")).unwrap();
                }
                assert!(run() == whole, "{name}: {} of {} bytes", bad.len(), good.len());
                assert!(fs::read(path.join(name)).unwrap() == good, "{name} was not made again");
            }
        }
    }

    #[test]
    fn a_unit_is_found_only_whole_under_its_name_and_for_its_input() {
        let dir = tempfile::tempdir().unwrap();
        let units = |key| Units { dir: dir.path().to_owned(), key: Some([key; 32]) };
        units(1).store("a", &[b"some", b" bytes of it"]).unwrap();
        let found = |units: &Units, name| {
            let (mut head, mut tail) = ([0; 5], [0; 11]);
            units.load_into(name, &mut [&mut head, &mut tail]).unwrap().then(|| [&head[..], &tail].concat())
        };
        assert_eq!(found(&units(1), "a").unwrap(), b"some bytes of it");
        assert_eq!(units(1).load("a").unwrap().unwrap().len(), 4);
        assert_eq!(found(&units(2), "a"), None);
        assert_eq!(found(&units(1), "b"), None);
        let path = dir.path().join("a");
        let good = fs::read(&path).unwrap();
        fs::copy(&path, dir.path().join("b")).unwrap();
        assert_eq!(found(&units(1), "b"), None);
        for cut in 0..good.len() {
            fs::write(&path, &good[..cut]).unwrap();
            assert_eq!((found(&units(1), "a"), units(1).load("a").unwrap()), (None, None), "{cut}");
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, bad).unwrap();
            assert_eq!((found(&units(1), "a"), units(1).load("a").unwrap()), (None, None), "{bit}");
        }
        // Without a journal there is nothing to find.
        fs::write(&path, good).unwrap();
        assert_eq!(found(&Units::none(dir.path()), "a"), None);
    }

    #[test]
    fn a_weight_is_taken_only_whole_and_for_its_input() {
        let dir = tempfile::tempdir().unwrap();
        let spec = WeightSpec {
            name: "w".to_owned(),
            first_row: 0,
            rows: 3,
            tensor_rows: 3,
            cols: 9,
            role: crate::WeightRole::Query,
            layer: Some(0),
        };
        let matrix = ndarray::Array2::from_shape_fn((3, 9), |(r, c)| (r * 7 + c * 5) as f32 % 4.0 - 1.5);
        let options = bitstack_decomp::DecomposeOptions::new(1, 2);
        let stack = bitstack_decomp::decompose(matrix.view(), &options).unwrap().stack;
        let units = |key| Units { dir: dir.path().to_owned(), key: Some([key; 32]) };
        let errors = [0.1 + 0.2, 5e-324];
        units(1).store_weight(0, &spec, (1, "avd"), &stack, &errors).unwrap();
        let take = |key| {
            let mut draft = Draft::create_in(dir.path()).unwrap();
            draft.add_weight("w", stack.shape(), 1, "avd").unwrap();
            let errors = units(key).take_weight(0, &mut draft).unwrap();
            assert_eq!(draft.weights()[0].n_blocks(), if errors.is_some() { 2 } else { 0 });
            errors.map(|errors| (errors, draft.read_block(0, 2).unwrap()))
        };
        assert_eq!(take(1).unwrap(), (errors.to_vec(), stack.blocks()[1].clone()));
        assert!(take(2).is_none());
        let path = units(1).weight_path(0);
        let good = fs::read(&path).unwrap();
        for cut in 0..good.len() {
            fs::write(&path, &good[..cut]).unwrap();
            assert!(take(1).is_none(), "cut at {cut}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, bad).unwrap();
            assert!(take(1).is_none(), "a bit of byte {at}");
        }
    }

    #[test]
    fn a_journal_is_of_one_input_and_has_one_holder() {
        let checkpoint = checkpoint();
        let options = options(Ordering::Random);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let open = |options: &CompressOptions, text: Option<&str>| {
            Journal::open(&path, &checkpoint, text, options, &()).map(drop).map_err(|e| e.to_string())
        };
        let journal = Journal::open(&path, &checkpoint, None, &options, &()).unwrap();
        assert!(matches!(
            Journal::open(&path, &checkpoint, None, &options, &()),
            Err(LlmError::JournalLocked { path: p }) if p == path.join("lock")
        ));
        assert!(matches!(Journal::discard(&path), Err(LlmError::JournalLocked { .. })));
        assert!(!journal.has_work());
        drop(journal);
        assert!(!path.exists(), "a journal without work goes with its holder");

        let journal = Journal::open(&path, &checkpoint, None, &options, &()).unwrap();
        let compressed = journal.compress(&()).unwrap();
        let out = dir.path().join("out");
        assert!(!journal.is_written(&out).unwrap());
        journal.write(&compressed, &out, Existing::Refuse, &mut |_, _| {}).unwrap();
        drop(journal);
        let error = open(&CompressOptions { seed: 3, ..options.clone() }, None).unwrap_err();
        assert!(error.contains("differs in seed: 0 there, 3 now"), "{error}");
        let error = open(&options, Some("other")).unwrap_err();
        assert!(error.contains("calibration text: the model's own there"), "{error}");
        let record = || serde_json::from_slice::<Record>(&fs::read(path.join(RECORD)).unwrap()).unwrap();
        let mut earlier = record();
        earlier.input[0].1 = "0.0.9 on paper".to_owned();
        earlier.key = hex(key(&earlier.input));
        let ours = record();
        earlier.write(&path).unwrap();
        let error = open(&options, None).unwrap_err();
        assert!(error.contains(&format!("program: 0.0.9 on paper there, {} now", ours.input[0].1)), "{error}");
        ours.write(&path).unwrap();
        assert!(Journal::has_output(&path));
        let journal = Journal::open(&path, &checkpoint, None, &options, &()).unwrap();
        assert!(journal.is_written(&out).unwrap());
        fs::write(&out, b"other").unwrap();
        assert!(!journal.is_written(&out).unwrap());
        journal.remove().unwrap();
        assert!(!path.exists());
        Journal::discard(&path).unwrap();
    }
}
