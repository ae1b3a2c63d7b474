//! Reading blocks, on more than one thread, and handing them in in order.

use crate::RuntimeError;
use crate::resident::{Account, Resident};
use crate::snapshot::{Snapshot, Table};
use crate::swap::{Job, Swap};
use bitstack_format::{ReadAt, StackFile, Verify};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// The most threads that read. Even when everything is in the page cache one of them is busy, with clearing new pages and copying, so
/// that more add to the speed until memory has no more to give.
const MAX_READERS: u32 = 4;
/// A snapshot is published when the last one is this old, so that a growing model is soon of use, and when a job ends.
const PUBLISH_EVERY: Duration = Duration::from_millis(20);
/// While somebody works on a snapshot, the readers together are at work for about a sixth of the time, and rest this many times as
/// long: a forward pass on all cores waits for the slowest of them.
const REST: u32 = 5;
/// How much less a loading thread counts than one that computes, as `nice` has it: about a tenth.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// Everything that it takes to read blocks.
#[derive(Debug)]
pub(crate) struct Loader<S> {
    pub(crate) file: StackFile<S>,
    pub(crate) table: Arc<Table>,
    pub(crate) account: Arc<Account>,
    verify: Verify,
    /// Threads that read, the one with the job included.
    readers: u32,
    /// By position, the blocks that are in memory, if only in old snapshots: none is ever there twice, and to grow back to a size that
    /// somebody still works at costs nothing.
    alive: Mutex<Vec<Weak<Resident>>>,
}

/// How far a job has come.
struct Progress {
    /// The length of the last snapshot published.
    published: usize,
    /// Blocks read and not yet published.
    ready: BTreeMap<usize, Arc<Resident>>,
    /// The first position that failed, and why.
    failed: Option<(usize, RuntimeError)>,
    published_at: Instant,
}

impl Progress {
    fn publish(&mut self, swap: &Swap<Snapshot, RuntimeError>) {
        let mut items = Vec::new();
        while let Some(block) = self.ready.remove(&(self.published + items.len())) {
            items.push(block);
        }
        let n = items.len();
        if n > 0 && swap.publish(self.published, items) {
            self.published += n;
        }
        self.published_at = Instant::now();
    }
}

impl<S: ReadAt + Send + Sync> Loader<S> {
    pub(crate) fn new(file: StackFile<S>, table: Arc<Table>, verify: Verify) -> Self {
        let alive = Mutex::new(table.entries.iter().map(|_| Weak::new()).collect());
        let cores = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        Self { file, table, account: Arc::new(Account::new()), verify, readers: cores.min(MAX_READERS), alive }
    }

    /// Loads the blocks of a job, as far as they stay wanted, and publishes them as they come.
    ///
    /// # Errors
    /// The first block that cannot be loaded; those before it are published.
    pub(crate) fn run(&self, swap: &Swap<Snapshot, RuntimeError>, job: &Job) -> Result<(), RuntimeError> {
        let next = AtomicUsize::new(job.from);
        let progress = Mutex::new(Progress {
            published: job.from,
            ready: BTreeMap::new(),
            failed: None,
            published_at: Instant::now(),
        });
        let read = || {
            loop {
                let position = next.fetch_add(1, Ordering::Relaxed);
                if position >= job.to {
                    break;
                }
                let p = lock(&progress);
                // What comes before a failure is still of use.
                let failed = p.failed.as_ref().is_some_and(|&(first, _)| first < position);
                if failed || !swap.is_wanted(p.published, position) {
                    break;
                }
                drop(p);
                let before = thread_time();
                let block = self.block(position);
                let mut p = lock(&progress);
                match block {
                    Ok(block) => {
                        p.ready.insert(position, block);
                        if p.published_at.elapsed() >= PUBLISH_EVERY {
                            p.publish(swap);
                        }
                    }
                    Err(error) => {
                        if p.failed.as_ref().is_none_or(|&(first, _)| position < first) {
                            p.failed = Some((position, error));
                        }
                    }
                }
                drop(p);
                if swap.is_held() || self.table.live.load(Ordering::Relaxed) > 1 {
                    std::thread::sleep(REST * self.readers * thread_time().saturating_sub(before));
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..(self.readers as usize).min(job.to - job.from) {
                // Without a thread more it takes longer.
                let _ = std::thread::Builder::new().name("bitstack-read".to_owned()).spawn_scoped(scope, read);
            }
            read();
        });
        let mut progress = progress.into_inner().unwrap_or_else(PoisonError::into_inner);
        progress.publish(swap);
        progress.failed.map_or(Ok(()), |(_, error)| Err(error))
    }

    /// The block of a position, from memory if it is there.
    fn block(&self, position: usize) -> Result<Arc<Resident>, RuntimeError> {
        if let Some(block) = lock(&self.alive)[position].upgrade() {
            return Ok(block);
        }
        let (weight, block) = self.table.entries[position];
        // The source is not ours: if it panics, that is one more way in which it fails.
        let read = || Resident::read(&self.file, weight, block, self.verify, &self.account);
        let resident = catch_unwind(AssertUnwindSafe(read))
            .unwrap_or_else(|panic| Err(self.panicked(position, panic.as_ref())))?;
        let resident = Arc::new(resident);
        lock(&self.alive)[position] = Arc::downgrade(&resident);
        Ok(resident)
    }

    fn panicked(&self, position: usize, panic: &(dyn std::any::Any + Send)) -> RuntimeError {
        let (weight, block) = self.table.entries[position];
        let message = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        let message = message.unwrap_or("without a message").to_owned();
        RuntimeError::Panicked { weight: self.table.weights[weight].name.clone(), block, message }
    }

    /// What the background thread does until the end.
    pub(crate) fn work(&self, swap: &Swap<Snapshot, RuntimeError>) {
        lower_priority();
        while let Some(job) = swap.next_job() {
            let result = catch_unwind(AssertUnwindSafe(|| self.run(swap, &job)))
                .unwrap_or_else(|panic| Err(self.panicked(job.from, panic.as_ref())));
            if let Err(error) = result {
                swap.fail(&job, error);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The time for which this thread was at work: not waiting for storage, nor for a core.
fn thread_time() -> Duration {
    #[cfg(unix)]
    return rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime).try_into().unwrap_or_default();
    #[cfg(not(unix))]
    Duration::ZERO
}

/// Makes way for threads that compute. Threads started from this one inherit it.
fn lower_priority() {
    // On Linux `nice` is of the calling thread; elsewhere it would be of the process. To refuse it does no harm.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::nice(NICE);
}
