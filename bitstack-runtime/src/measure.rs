//! How fast a model grows and shrinks on this machine, beside a plain read of the same file.
//!
//! The yardsticks are a read of the whole file as `cat` does it, into one small buffer that stays in the processor's cache, and one
//! into new memory, as a program that wants to keep the bytes must do it; both on one thread, with the file in the page cache. Growing
//! reads into new memory too, which the system must find and clear first, and may hash what it read.

use crate::{Elastic, Options, RuntimeError, Start, Verify, load_order, process_resident_bytes};
use bitstack_format::{FormatError, StackFile};
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
    /// Reading the file from start to end into new memory, by [`std::fs::read`].
    ReadToMemory,
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

/// Reads, grows and shrinks the model of a file `rounds` times in turn, without and with hashes, after one read to have the file in the
/// page cache if it fits there. Takes memory for the whole model. The rows come in the order in which they were measured.
///
/// # Errors
/// A file that cannot be opened or read; whatever growing fails with.
pub fn load(path: impl AsRef<Path>, rounds: usize) -> Result<Vec<Row>, RuntimeError> {
    let path = path.as_ref();
    let in_file = |source: FormatError| RuntimeError::File { source: Arc::new(source) };
    let in_read = |source| in_file(FormatError::File { operation: "read", path: path.to_owned(), source });
    read(path).map_err(in_read)?;
    let mut rows = Vec::new();
    for _ in 0..rounds {
        rows.push(read(path).map_err(in_read)?);
        rows.push(read_to_memory(path).map_err(in_read)?);
        for verify in [Verify::Never, Verify::Always] {
            let file = StackFile::open_path(path).map_err(in_file)?;
            let minimum_bytes = load_order(&file)?.minimum_bytes();
            let model = Elastic::open(file, minimum_bytes, Options { verify, start: Start::Whole })?;
            let bytes = model.order().total_bytes() - model.order().minimum_bytes();
            rows.push(timed(Operation::Grow(verify), bytes, || {
                model.set_budget(u64::MAX)?;
                model.wait()
            })?);
            let allocated = model.status().allocated_bytes;
            rows.push(timed(Operation::Shrink, bytes, || {
                model.set_budget(minimum_bytes)?;
                // The loader may still hold the last snapshot for a moment.
                while model.status().allocated_bytes + bytes > allocated {
                    std::thread::yield_now();
                }
                Ok(())
            })?);
        }
    }
    Ok(rows)
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

fn read_to_memory(path: &Path) -> io::Result<Row> {
    let start = Instant::now();
    let contents = std::fs::read(path)?;
    let time = start.elapsed();
    Ok(Row { operation: Operation::ReadToMemory, bytes: contents.len() as u64, time, resident_set_change: None })
}
