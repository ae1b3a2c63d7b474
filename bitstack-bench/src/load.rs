//! How fast a model grows and shrinks on this machine, beside a plain read of the same file.
//!
//! The yardstick is a read of the whole file as `cat` does it, on one thread into one small buffer that stays in the processor's cache,
//! with the file in the page cache. Growing reads into new memory, which the system must find and clear first, and may hash what it
//! read. Before it is timed the file is read once, which puts it in the page cache; and each model grows and shrinks once just before it is
//! timed: the host of a virtual machine then has supplied the memory, which it may do ten times slower than memory is cleared, and has not
//! yet taken it back.

use bitstack_core::SignLayout;
use bitstack_format::{FormatError, StackFile, Verify};
use bitstack_runtime::{Elastic, Options, RuntimeError, process_resident_bytes};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The buffer of `cat`.
const BUFFER_BYTES: usize = 128 << 10;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// Reading the file from start to end into one buffer of 128 KiB, as `cat` does.
    Read,
    /// Growing from the smallest model to the whole one, from the call of `set_budget` to the last snapshot.
    Grow(Verify),
    /// Shrinking from the whole model to the smallest, from the call of `set_budget` until the memory is back with the system.
    Shrink,
}

/// One operation, done once.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Row {
    /// The operation.
    pub operation: Operation,
    /// Bytes read, loaded or given back.
    pub bytes: u64,
    /// The time it took.
    pub time: Duration,
    /// By how much the process's resident set grew (shrank, where negative), as the system counts it; `None` where it does not tell.
    pub resident_set_change: Option<i64>,
}

impl Row {
    /// Bytes per second.
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.time.as_secs_f64()
    }
}

/// Reads, grows and shrinks the model of a file `rounds` times in turn, growing without and with hashes, into this
/// layout of signs. Takes memory for the whole model. The rows come in the order in which they were measured.
///
/// # Errors
/// A file that cannot be opened or read; whatever growing fails with.
pub fn load(path: impl AsRef<Path>, signs: SignLayout, rounds: usize) -> Result<Vec<Row>, RuntimeError> {
    let path = path.as_ref();
    let read = || {
        read(path).map_err(|source| {
            let source = FormatError::File { operation: "read", path: path.to_owned(), source };
            RuntimeError::File { source: Arc::new(source) }
        })
    };
    read()?;
    let mut rows = Vec::new();
    for _ in 0..rounds {
        rows.push(read()?);
        for verify in [Verify::Never, Verify::Always] {
            let file = StackFile::open_path(path).map_err(|source| RuntimeError::File { source: Arc::new(source) })?;
            let minimum_bytes = file.load_order()?.minimum_bytes();
            let model = Elastic::open(file, minimum_bytes, Options { verify, signs, ..Options::default() })?;
            grow_and_shrink(&model, verify)?;
            rows.extend(grow_and_shrink(&model, verify)?);
        }
    }
    Ok(rows)
}

/// The row of an operation that took the median time of all of that operation; `None` when there is none.
pub fn median(rows: &[Row], operation: Operation) -> Option<Row> {
    let mut rows: Vec<_> = rows.iter().filter(|row| row.operation == operation).collect();
    rows.sort_by_key(|row| row.time);
    rows.get(rows.len() / 2).map(|row| **row)
}

fn grow_and_shrink(model: &Elastic<File>, verify: Verify) -> Result<[Row; 2], RuntimeError> {
    let minimum_bytes = model.order().minimum_bytes();
    let bytes = model.order().total_bytes() - minimum_bytes;
    let grow = timed(Operation::Grow(verify), bytes, || {
        model.set_budget(u64::MAX)?;
        model.wait()
    })?;
    let allocated_bytes = model.status().allocated_bytes;
    let shrink = timed(Operation::Shrink, bytes, || {
        model.set_budget(minimum_bytes)?;
        // The loader may still hold the last snapshot for a moment.
        while model.status().allocated_bytes + bytes > allocated_bytes {
            std::thread::yield_now();
        }
        Ok(())
    })?;
    Ok([grow, shrink])
}

fn timed(operation: Operation, bytes: u64, f: impl FnOnce() -> Result<(), RuntimeError>) -> Result<Row, RuntimeError> {
    let before = process_resident_bytes();
    let start = Instant::now();
    f()?;
    let time = start.elapsed();
    let after = process_resident_bytes();
    let resident_set_change = after.zip(before).map(|(after, before)| after as i64 - before as i64);
    Ok(Row { operation, bytes, time, resident_set_change })
}

fn read(path: &Path) -> io::Result<Row> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut bytes = 0;
    let start = Instant::now();
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => bytes += n as u64,
        }
    }
    Ok(Row { operation: Operation::Read, bytes, time: start.elapsed(), resident_set_change: None })
}
