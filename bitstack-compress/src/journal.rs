//! What is finished of a compression, kept beside its output: after a kill the same call goes on where the last one was.
//!
//! A journal is a directory. Every unit of work (windows that the model wrote, the hidden states in front of a layer, the blocks of a
//! weight, measured runs, the load order) is a file in it, written under another name, synced and renamed, so that a unit that is there is
//! there whole. Each ends in a BLAKE3 hash keyed with what the journal is for; one that is damaged is made again, like one that is
//! missing. `journal.json` says what the journal is for, and what the output must be once that is known.

use crate::compress::{self, Compressed, Making};
use crate::job::{Executor, Pool};
use crate::plan::{PLAN, Plan, TOKENS, hex, input, key, same, tensors, text_hash};
use crate::units::{UnitDirectory, UnitStore, Units};
use crate::{CompressError, CompressOptions};
use bitstack_format::FormatError;
use bitstack_io::{Existing, write_atomically, write_atomically_through};
use bitstack_model::{Checkpoint, ModelError, Progress};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const RECORD: &str = "journal.json";
const LOCK: &str = "lock";

/// A compression that can be killed at any moment: what is finished lies in a directory of its own.
///
/// ```no_run
/// use bitstack_compress::{CompressOptions, Journal};
/// use bitstack_io::Existing;
/// use bitstack_model::Checkpoint;
/// # fn main() -> Result<(), bitstack_compress::CompressError> {
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
    dir: PathBuf,
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
    /// [`CompressError::JournalLocked`] while another process has it open, [`CompressError::JournalDiffers`] when it is of another program version,
    /// model, text or options; failures to read the checkpoint or to write the directory.
    pub fn open(
        dir: impl AsRef<Path>,
        checkpoint: &'a Checkpoint,
        text: Option<&'a str>,
        options: &'a CompressOptions,
        progress: &dyn Progress,
    ) -> Result<Self, CompressError> {
        let dir = dir.as_ref();
        let lock = lock(dir)?;
        let record = Record::open(dir, checkpoint, text, options, progress).inspect_err(|_| {
            if !has_units(dir) && !Self::has_output(dir) {
                // Nothing is in it that the next try could use.
                let _ = remove(dir);
            }
        })?;
        let units = Units::new(UnitDirectory::new(dir), *key(&record.input).as_bytes());
        Ok(Self { checkpoint, text, options, record, dir: dir.to_owned(), units, is_removed: false, _lock: lock })
    }

    /// Removes the journal in `dir`, if there is one.
    ///
    /// # Errors
    /// [`CompressError::JournalLocked`]; failures to remove it.
    pub fn discard(dir: impl AsRef<Path>) -> Result<(), CompressError> {
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
    pub fn is_written(&self, output: impl AsRef<Path>) -> Result<bool, CompressError> {
        let (Some(expected), path) = (&self.record.output, output.as_ref()) else { return Ok(false) };
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(io(e).into()),
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
        self.record.output.is_some() || has_units(&self.dir)
    }

    /// The jobs of this compression. What they are is now in the directory too, so that [`Making::open`] finds it.
    ///
    /// # Errors
    /// What can be wrong with the text or the options; failures to write the directory.
    pub fn plan<'p>(&'p self, progress: &'p dyn Progress) -> Result<Making<'p>, CompressError> {
        let tokens = compress::tokens(self.checkpoint, self.text, progress)?;
        let plan = Plan { input: self.record.input.clone(), options: self.options.clone(), has_text: tokens.is_some() };
        let store = UnitDirectory::new(&self.dir);
        let making = Making::new(self.checkpoint, tokens, self.options, self.units.clone(), &self.dir, progress)?;
        if let Some(tokens) = making.text() {
            self.units.store(TOKENS, &[bytemuck::cast_slice(tokens)])?;
        }
        store.put(PLAN, &[&serde_json::to_vec_pretty(&plan).expect("strings and numbers")])?;
        Ok(making)
    }

    /// Compresses, or goes on with it; see [`compress`](crate::compress). Tells `progress` what is there already.
    ///
    /// # Errors
    /// As [`compress`](crate::compress). What was finished before the error stays.
    pub fn compress(&self, progress: &dyn Progress) -> Result<Compressed, CompressError> {
        self.compress_by(&Pool, progress)
    }

    /// [`Journal::compress`], with somebody else to run the jobs.
    ///
    /// # Errors
    /// As [`Journal::compress`], and whatever the executor says.
    pub fn compress_by(&self, executor: &dyn Executor, progress: &dyn Progress) -> Result<Compressed, CompressError> {
        self.plan(progress)?.compress(executor)
    }

    /// Writes the output. Calls `progress` with the bytes done and the bytes in all; returns the bytes written. The journal is still
    /// needed: a kill right after this, before [`Journal::remove`], is what [`Journal::is_written`] is for.
    ///
    /// # Errors
    /// As [`write_atomically`] and [`bitstack_format::Draft::finish`].
    pub fn write(
        &self,
        compressed: &Compressed,
        output: impl AsRef<Path>,
        existing: Existing,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<u64, CompressError> {
        let dir = &self.dir;
        write_atomically_through(dir, output, existing, |out| {
            let mut out = Hashed { out, hasher: blake3::Hasher::new() };
            let bytes = compressed.draft.finish(compressed.order.weights(), &mut out, progress)?;
            let output = Some(Output { bytes, blake3: hex(out.hasher.finalize()) });
            Record { input: self.record.input.clone(), key: self.record.key.clone(), output }.write(dir)?;
            Ok(bytes)
        })
    }

    /// Removes the journal.
    ///
    /// # Errors
    /// Failures to do so.
    pub fn remove(mut self) -> Result<(), CompressError> {
        self.is_removed = true;
        remove(&self.dir)
    }
}

impl Drop for Journal<'_> {
    fn drop(&mut self) {
        if !self.is_removed && !self.has_work() {
            // It is of no use, and of no harm either.
            let _ = remove(&self.dir);
        }
    }
}

impl Record {
    /// That of the journal in `dir`, which must be for the same, or a new one.
    fn open(
        dir: &Path,
        checkpoint: &Checkpoint,
        text: Option<&str>,
        options: &CompressOptions,
        progress: &dyn Progress,
    ) -> Result<Self, CompressError> {
        for name in entries(dir)?.filter(|name| name.starts_with('.') && name.ends_with(".tmp")) {
            remove_file(&dir.join(name))?;
        }
        let path = dir.join(RECORD);
        let old = match fs::read(&path) {
            // One that is damaged is as good as none. Units say themselves what they are for.
            Ok(bytes) => serde_json::from_slice::<Record>(&bytes).ok().filter(|old| old.key == hex(key(&old.input))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(ModelError::Io { path, source }.into()),
        };
        let old = old.filter(|old| old.output.is_some() || has_units(dir));
        let compare = |input: &[(String, String)]| match &old {
            Some(old) => same(dir, &old.input, input),
            None => Ok(()),
        };
        let mut input = input(checkpoint, text_hash(text), options)?;
        // The tensors come last, because hashing them takes long; what is wrong before that is told at once.
        compare(&input)?;
        input.extend(tensors(checkpoint, progress)?);
        compare(&input)?;
        match old {
            Some(old) if old.input.len() == input.len() => Ok(old),
            Some(old) => {
                let (what, was) = old.input[input.len()].clone();
                Err(CompressError::JournalDiffers { dir: dir.to_owned(), what, was, is: "absent".to_owned() })
            }
            None => {
                let record = Record { key: hex(key(&input)), input, output: None };
                record.write(dir)?;
                Ok(record)
            }
        }
    }

    fn write(&self, dir: &Path) -> Result<(), FormatError> {
        let json = serde_json::to_vec_pretty(self).expect("strings and numbers");
        write_atomically(dir.join(RECORD), Existing::Replace, |out| Ok(out.write_all(&json)?))
    }
}

/// Makes the directory and locks it.
fn lock(dir: &Path) -> Result<File, CompressError> {
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
            Err(TryLockError::WouldBlock) => return Err(CompressError::JournalLocked { path }),
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

fn entries(dir: &Path) -> Result<impl Iterator<Item = String>, CompressError> {
    let entries = fs::read_dir(dir).map_err(|source| ModelError::Io { path: dir.to_owned(), source })?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()))
}

fn has_units(dir: &Path) -> bool {
    entries(dir).is_ok_and(|mut names| names.any(|name| ![RECORD, LOCK, PLAN, TOKENS].contains(&&name[..])))
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
fn clear(dir: &Path) -> Result<(), CompressError> {
    for name in entries(dir)?.filter(|name| name != RECORD && name != LOCK) {
        remove_file(&dir.join(name))?;
    }
    Ok(())
}

/// Removes the directory; the record goes after the units, because it says what they are.
fn remove(dir: &Path) -> Result<(), CompressError> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OrderBy;
    use crate::fixtures::{checkpoint, demo};
    use crate::plan::UNITS;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    fn options(ordering: OrderBy) -> CompressOptions {
        CompressOptions { n_blocks: Some(3), samples: 2, seq_len: Some(16), ordering, ..Default::default() }
    }

    fn bytes(compressed: &Compressed) -> Vec<u8> {
        let mut bytes = Vec::new();
        compressed.draft.finish(compressed.order.weights(), &mut bytes, &mut |_, _| {}).unwrap();
        bytes
    }

    fn whole(options: &CompressOptions) -> Vec<u8> {
        bytes(&crate::compress(&checkpoint("llama"), None, options, &std::env::temp_dir(), &()).unwrap())
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
        let checkpoint = checkpoint("llama");
        for (ordering, steps) in [(OrderBy::Gain, 33), (OrderBy::Perplexity, 33), (OrderBy::Random, 35)] {
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
        let checkpoint = Checkpoint::open(demo().join("tiny-llama")).unwrap();
        let text = fs::read_to_string(demo().join("text.txt")).unwrap();
        let options = CompressOptions { samples: 129, ..options(OrderBy::Random) };
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
        let checkpoint = checkpoint("llama");
        let options = options(OrderBy::Gain);
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path().join("j"), &checkpoint, None, &options, &()).unwrap();
        let first = bytes(&journal.compress(&()).unwrap());
        let at_once = StopAfter(AtomicU64::new(0));
        assert!(bytes(&journal.compress(&at_once).unwrap()) == first);
        assert_eq!(at_once.0.into_inner(), 0, "a step of work");
    }

    #[test]
    fn damaged_units_are_made_again() {
        let checkpoint = checkpoint("llama");
        let options = options(OrderBy::Gain);
        let whole = whole(&options);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let run = || bytes(&Journal::open(&path, &checkpoint, None, &options, &()).unwrap().compress(&()).unwrap());
        assert!(run() == whole);
        for name in ["order", "text.00000", "weight.0003", "weight.0015", "importance", "runs.quality", "journal.json"]
        {
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

    /// What units hold, as numbers: kinds of CPU round differently, which moves these by far less than a hundredth.
    ///
    /// Whoever changes what units hold has to raise [`UNITS`], so that no compression goes on with units of another algorithm; then
    /// `BITSTACK_BLESS=1 cargo test -p bitstack-compress units_hold_what` writes the numbers anew.
    #[test]
    fn units_hold_what_they_held_when_their_version_was_set() {
        #[derive(Debug, Serialize, Deserialize)]
        struct Golden {
            units: u32,
            importance: Vec<f64>,
            errors: Vec<Vec<f64>>,
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/units.json");
        let (checkpoint, options) = (checkpoint("llama"), options(OrderBy::Gain));
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path().join("j"), &checkpoint, None, &options, &()).unwrap();
        journal.compress(&()).unwrap();
        let n = checkpoint.config().weights().len();
        let mut importance = vec![0.0; n];
        assert!(journal.units.load_into("importance", &mut [bytemuck::cast_slice_mut(&mut importance)]).unwrap());
        let errors = (0..n).map(|weight| journal.units.weight(&format!("weight.{weight:04}")).unwrap().unwrap().errors);
        let found = Golden { units: UNITS, importance, errors: errors.collect() };
        if std::env::var_os("BITSTACK_BLESS").is_some() {
            fs::write(path, serde_json::to_vec_pretty(&found).unwrap()).unwrap();
        }
        let golden: Golden = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        assert_eq!(golden.units, UNITS, "the numbers of {path} are of another version: write them anew");
        let numbers = |g: &Golden| g.importance.iter().chain(g.errors.iter().flatten()).copied().collect::<Vec<f64>>();
        let (found, golden) = (numbers(&found), numbers(&golden));
        assert_eq!(found.len(), golden.len(), "units hold something else: raise UNITS");
        for (found, golden) in found.iter().zip(&golden) {
            let close = (found - golden).abs() <= 0.01 * golden.abs();
            assert!(close, "units hold something else, {found} for {golden}: raise UNITS, and write the numbers anew");
        }
    }

    #[test]
    fn a_journal_is_of_one_input_and_has_one_holder() {
        let checkpoint = checkpoint("llama");
        let options = options(OrderBy::Random);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let open = |options: &CompressOptions, text: Option<&str>| {
            Journal::open(&path, &checkpoint, text, options, &()).map(drop).map_err(|e| e.to_string())
        };
        let journal = Journal::open(&path, &checkpoint, None, &options, &()).unwrap();
        assert!(matches!(
            Journal::open(&path, &checkpoint, None, &options, &()),
            Err(CompressError::JournalLocked { path: p }) if p == path.join("lock")
        ));
        assert!(matches!(Journal::discard(&path), Err(CompressError::JournalLocked { .. })));
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
