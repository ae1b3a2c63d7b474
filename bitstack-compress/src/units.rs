//! Units of work: what is finished of a compression, by name.

use bitstack_core::WeightStack;
use bitstack_format::{BlockSource, Draft, FormatError, ReadAt, StackFile, WriteAt};
use bitstack_io::{Existing, FileAt, write_atomically};
use bitstack_model::WeightSpec;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const HASH_BYTES: usize = blake3::OUT_LEN;

/// A unit that is there, to be read from.
pub type StoredUnit = Arc<dyn ReadAt + Send + Sync>;

/// Where finished units of work are kept: a directory, or anything else that knows names.
///
/// A unit is written once and read by whoever needs it, in this process or another. It may be replaced by one of the same name, whose bytes
/// are the same for the same input. Stores need not look into units: each ends in a hash of its own.
pub trait UnitStore: Debug + Send + Sync {
    /// Keeps a unit, which is `parts` one after the other: whole or not at all, and durable when this returns.
    ///
    /// # Errors
    /// Failures to write it.
    fn put(&self, name: &str, parts: &[&[u8]]) -> Result<(), FormatError>;

    /// A unit that is there. It can be read until the store is gone, or the unit removed.
    ///
    /// # Errors
    /// Failures to find out, or to open it. That there is none is no failure.
    fn get(&self, name: &str) -> Result<Option<StoredUnit>, FormatError>;

    /// Forgets a unit; one that is not there is forgotten already.
    ///
    /// # Errors
    /// Failures to do so.
    fn remove(&self, name: &str) -> Result<(), FormatError>;
}

/// A directory with a file for each unit, written under another name, synced and renamed.
#[derive(Debug, Clone)]
pub struct UnitDirectory {
    dir: PathBuf,
}

impl UnitDirectory {
    /// Units in `dir`, which must be there.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }
}

impl UnitStore for UnitDirectory {
    fn put(&self, name: &str, parts: &[&[u8]]) -> Result<(), FormatError> {
        write_atomically(self.dir.join(name), Existing::Replace, |out| {
            Ok(parts.iter().try_for_each(|part| out.write_all(part))?)
        })
    }

    fn get(&self, name: &str) -> Result<Option<StoredUnit>, FormatError> {
        let path = self.dir.join(name);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => Ok(Some(Arc::new(FileAt::new(path)))),
            Ok(_) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(FormatError::File { operation: "open", path, source }),
        }
    }

    fn remove(&self, name: &str) -> Result<(), FormatError> {
        let path = self.dir.join(name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(FormatError::File { operation: "remove", path, source })
            }
            _ => Ok(()),
        }
    }
}

/// A scratch file without a name, gone with whoever uses it, however the program ends. What is removed is written over.
#[derive(Debug)]
pub(crate) struct Scratch {
    file: Arc<File>,
    /// For errors.
    dir: PathBuf,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    file: File,
    units: BTreeMap<String, Range<u64>>,
    free: Vec<Range<u64>>,
    end: u64,
}

impl Written {
    /// The first free place that is long enough, or one at the end.
    fn take(&mut self, len: u64) -> Range<u64> {
        match self.free.iter().position(|free| free.end - free.start >= len) {
            Some(i) => {
                let start = self.free[i].start;
                self.free[i].start += len;
                start..start + len
            }
            None => {
                self.end += len;
                self.end - len..self.end
            }
        }
    }

    fn give_back(&mut self, name: &str) {
        self.free.extend(self.units.remove(name));
    }
}

impl Scratch {
    /// A scratch file in `dir`.
    pub(crate) fn create_in(dir: &Path) -> Result<Self, FormatError> {
        let files = tempfile::tempfile_in(dir).and_then(|file| Ok((file.try_clone()?, file)));
        let (file, reader) = files.map_err(|source| FormatError::File {
            operation: "create a scratch file in",
            path: dir.to_owned(),
            source,
        })?;
        let written = Written { file, units: BTreeMap::new(), free: Vec::new(), end: 0 };
        Ok(Self { file: Arc::new(reader), dir: dir.to_owned(), written: Mutex::new(written) })
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UnitStore for Scratch {
    fn put(&self, name: &str, parts: &[&[u8]]) -> Result<(), FormatError> {
        let mut written = self.written();
        let place = written.take(parts.iter().map(|part| part.len() as u64).sum());
        let mut at = place.start;
        for part in parts {
            written.file.write_all_at(part, at).map_err(|source| FormatError::File {
                operation: "write a scratch file in",
                path: self.dir.clone(),
                source,
            })?;
            at += part.len() as u64;
        }
        written.give_back(name);
        written.units.insert(name.to_owned(), place);
        Ok(())
    }

    fn get(&self, name: &str) -> Result<Option<StoredUnit>, FormatError> {
        let place = self.written().units.get(name).cloned();
        Ok(place.map(|place| Arc::new(Piece { file: self.file.clone(), place }) as StoredUnit))
    }

    fn remove(&self, name: &str) -> Result<(), FormatError> {
        self.written().give_back(name);
        Ok(())
    }
}

/// A part of a file.
struct Piece {
    file: Arc<File>,
    place: Range<u64>,
}

impl ReadAt for Piece {
    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.place.end - self.place.start)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let end = offset_bytes.checked_add(buf.len() as u64).filter(|end| *end <= self.place.end - self.place.start);
        end.ok_or(io::ErrorKind::UnexpectedEof)?;
        self.file.read_exact_at(buf, self.place.start + offset_bytes)
    }
}

/// The units of one compression in a store: each ends in a BLAKE3 hash keyed with all that the compression depends on, so that one of another is
/// as good as none, and so is one that is damaged.
#[derive(Debug, Clone)]
pub(crate) struct Units {
    store: Arc<dyn UnitStore>,
    key: [u8; 32],
}

impl Units {
    pub(crate) fn new(store: impl UnitStore + 'static, key: [u8; 32]) -> Self {
        Self { store: Arc::new(store), key }
    }

    /// Keeps a unit.
    pub(crate) fn store(&self, name: &str, parts: &[&[u8]]) -> Result<(), FormatError> {
        let mut hasher = self.hasher(name);
        parts.iter().for_each(|part| _ = hasher.update(part));
        let hash = hasher.finalize();
        let parts: Vec<&[u8]> = parts.iter().copied().chain([&hash.as_bytes()[..]]).collect();
        self.store.put(name, &parts)
    }

    /// A unit of 32-bit numbers, if it is there and whole.
    pub(crate) fn load(&self, name: &str) -> Result<Option<Vec<u32>>, FormatError> {
        let Some(unit) = self.open(name)? else { return Ok(None) };
        let mut numbers: Vec<u32> = Vec::new();
        let out_of_memory = |_| FormatError::OutOfMemory { what: name.to_owned(), bytes: unit.len as u64 };
        numbers.try_reserve_exact(unit.len / 4).map_err(out_of_memory)?;
        numbers.resize(unit.len / 4, 0);
        let is_whole = unit.len % 4 == 0 && unit.read(&mut [bytemuck::cast_slice_mut(&mut numbers)])?;
        Ok(is_whole.then_some(numbers))
    }

    /// Fills `parts` with a unit of just that length, if it is there and whole; otherwise they are left with anything.
    pub(crate) fn load_into(&self, name: &str, parts: &mut [&mut [u8]]) -> Result<bool, FormatError> {
        match self.open(name)? {
            Some(unit) if unit.len == parts.iter().map(|p| p.len()).sum::<usize>() => unit.read(parts),
            _ => Ok(false),
        }
    }

    /// Forgets a unit.
    pub(crate) fn remove(&self, name: &str) -> Result<(), FormatError> {
        self.store.remove(name)
    }

    fn open(&self, name: &str) -> Result<Option<Unit>, FormatError> {
        let Some(source) = self.store.get(name)? else { return Ok(None) };
        let bytes = source.size_bytes().map_err(|source| FormatError::Read { what: format!("unit {name}"), source })?;
        let len = usize::try_from(bytes).ok().and_then(|n| n.checked_sub(HASH_BYTES));
        Ok(len.map(|len| Unit { source, hasher: self.hasher(name), len, name: name.to_owned() }))
    }

    /// Keeps the blocks of a weight, and its errors.
    pub(crate) fn store_weight(
        &self,
        unit: &str,
        spec: &WeightSpec,
        (rank, method): (usize, &str),
        stack: &WeightStack,
        errors: &[f64],
    ) -> Result<(), FormatError> {
        let mut draft = Draft::create_on(Vec::new(), "memory");
        let weight = draft.add_weight(&spec.name, stack.shape(), rank, method)?;
        for block in stack.blocks() {
            draft.push_block(weight, block.view())?;
        }
        draft.set_provenance("journal", blake3::Hash::from(self.key).to_hex().as_str())?;
        let errors: Vec<String> = errors.iter().map(|e| format!("{:016x}", e.to_bits())).collect();
        draft.set_provenance("errors", &errors.join(" "))?;
        let order = vec![0; stack.blocks().len()];
        let mut bytes = Vec::new();
        draft.finish(&order, &mut bytes, &mut |_, _| {})?;
        self.store.put(unit, &[&bytes])
    }

    /// The blocks of a weight and its errors, if they are there and whole.
    pub(crate) fn weight(&self, unit: &str) -> Result<Option<WeightUnit>, FormatError> {
        let Some(source) = self.store.get(unit)? else { return Ok(None) };
        let file = match StackFile::open(source) {
            Ok(file) if file.missing().is_none() => file,
            Err(FormatError::Read { source, .. }) if source.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(FormatError::Read { what: format!("unit {unit}"), source });
            }
            _ => return Ok(None),
        };
        let of = |name: &str| file.provenance().get(name).map_or("", |v| v);
        if of("journal") != blake3::Hash::from(self.key).to_hex().as_str() || !file.verify(&mut |_, _| {})?.is_whole() {
            return Ok(None);
        }
        let errors = of("errors").split(' ').map(|e| u64::from_str_radix(e, 16).map(f64::from_bits));
        let Ok(errors) = errors.collect::<Result<Vec<_>, _>>() else { return Ok(None) };
        Ok(Some(WeightUnit { file, errors }))
    }

    fn hasher(&self, name: &str) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(name.as_bytes()).update(&[0]);
        hasher
    }
}

/// A weight that is decomposed.
pub(crate) struct WeightUnit {
    /// A stack of this weight alone.
    pub(crate) file: StackFile<StoredUnit>,
    /// The squared error of its outputs at every level, and at last that of the rounded weight, per token.
    pub(crate) errors: Vec<f64>,
}

/// A unit that is to be read.
struct Unit {
    source: StoredUnit,
    hasher: blake3::Hasher,
    /// Bytes without the hash.
    len: usize,
    name: String,
}

impl Unit {
    /// Whether the hash is right.
    fn read(mut self, parts: &mut [&mut [u8]]) -> Result<bool, FormatError> {
        let (mut hash, mut at) = ([0; HASH_BYTES], 0);
        let mut read = |part: &mut [u8]| {
            self.source.read_exact_at(part, at)?;
            at += part.len() as u64;
            Ok(())
        };
        let mut all = || {
            for part in parts.iter_mut() {
                read(part)?;
                self.hasher.update(part);
            }
            read(&mut hash)
        };
        all().map_err(|source| FormatError::Read { what: format!("unit {}", self.name), source })?;
        Ok(self.hasher.finalize() == hash)
    }
}

/// The runs that are finished of those of one kind: a unit that grows. Without units nothing is kept.
pub(crate) struct Runs<'a> {
    name: String,
    units: Option<&'a Units>,
    kept: Instant,
    /// What keeping them took the last time.
    cost: Duration,
}

impl<'a> Runs<'a> {
    /// Keeping takes at most this share of the time: runs of a large model are kept layer by layer, those of a tiny one by the handful.
    const SHARE: u32 = 20;

    pub(crate) fn new(name: &str, units: Option<&'a Units>) -> Self {
        Self { name: name.to_owned(), units, kept: Instant::now(), cost: Duration::ZERO }
    }

    /// What was measured, NaN where nothing was yet.
    pub(crate) fn finished(&self, n: usize) -> Result<Vec<f64>, FormatError> {
        let mut found = vec![f64::NAN; n];
        let is_there = match self.units {
            Some(units) => units.load_into(&self.name, &mut [bytemuck::cast_slice_mut(&mut found)])?,
            None => false,
        };
        if !is_there {
            found.fill(f64::NAN);
        }
        Ok(found)
    }

    pub(crate) fn keep(&mut self, found: &[f64], last: bool) -> Result<(), FormatError> {
        let Some(units) = self.units.filter(|_| last || self.kept.elapsed() >= self.cost * Self::SHARE) else {
            return Ok(());
        };
        let started = Instant::now();
        units.store(&self.name, &[bytemuck::cast_slice(found)])?;
        self.kept = Instant::now();
        self.cost = self.kept - started;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_found_only_whole_under_its_name_and_for_its_input() {
        let dir = tempfile::tempdir().unwrap();
        let units = |key| Units::new(UnitDirectory::new(dir.path()), [key; 32]);
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
            role: bitstack_model::WeightRole::Query,
            layer: Some(0),
        };
        let matrix = ndarray::Array2::from_shape_fn((3, 9), |(r, c)| (r * 7 + c * 5) as f32 % 4.0 - 1.5);
        let options = bitstack_decomp::DecomposeOptions::new(1, 2);
        let stack = bitstack_decomp::decompose(matrix.view(), &options).unwrap().stack;
        let units = |key| Units::new(UnitDirectory::new(dir.path()), [key; 32]);
        let errors = [0.1 + 0.2, 5e-324];
        units(1).store_weight("w", &spec, (1, "avd"), &stack, &errors).unwrap();
        let take = |key| {
            let WeightUnit { file, errors } = units(key).weight("w").unwrap()?;
            Some((errors, file.read_block(0, 2).unwrap()))
        };
        assert_eq!(take(1).unwrap(), (errors.to_vec(), stack.blocks()[1].clone()));
        assert!(take(2).is_none());
        let path = dir.path().join("w");
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
    fn stores_keep_units_until_they_are_removed_or_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::create_in(dir.path()).unwrap();
        for store in [&UnitDirectory::new(dir.path()) as &dyn UnitStore, &scratch] {
            let read = |name: &str| {
                let unit = store.get(name).unwrap()?;
                let mut bytes = vec![0; unit.size_bytes().unwrap() as usize];
                unit.read_exact_at(&mut bytes, 0).unwrap();
                assert!(unit.read_exact_at(&mut [0; 2], bytes.len() as u64 - 1).is_err());
                Some(bytes)
            };
            assert_eq!(read("a"), None);
            store.put("a", &[b"first", b"", b" unit"]).unwrap();
            store.put("b", &[b"second"]).unwrap();
            assert_eq!((read("a").unwrap(), read("b").unwrap()), (b"first unit".to_vec(), b"second".to_vec()));
            store.put("a", &[b"longer than it was"]).unwrap();
            store.put("c", &[b"third"]).unwrap();
            store.remove("b").unwrap();
            store.remove("b").unwrap();
            store.put("d", &[b"fourth"]).unwrap();
            let all = ["a", "b", "c", "d"].map(read);
            assert_eq!(all[0].as_deref(), Some(&b"longer than it was"[..]));
            assert_eq!(all[1], None);
            assert_eq!((all[2].as_deref(), all[3].as_deref()), (Some(&b"third"[..]), Some(&b"fourth"[..])));
        }
        // What was removed or replaced is written over: 10 bytes of the first, of which the third took 5; 6 of the second.
        assert_eq!(scratch.written().end, 10 + 6 + 18);
    }
}
