//! Reading blocks, on more than one thread, and handing them in in order.

use crate::RuntimeError;
use crate::memory::Memory;
use crate::resident::{Account, Resident, Run, no_memory};
use crate::snapshot::Snapshot;
use crate::swap::{Job, Swap};
use crate::table::Table;
use bitstack_format::{ReadAt, StackFile, Verify};
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// The most threads that read. Even when everything is in the page cache one of them is busy, with clearing new pages and copying, so
/// that more add to the speed until memory has no more to give.
const MAX_READERS: usize = 4;
/// A snapshot is published when the last one is this old, so that a growing model is soon of use, and when a job ends.
const PUBLISH_EVERY: Duration = Duration::from_millis(20);
/// While somebody works on a snapshot, the readers rest this many times as long as they work: a forward pass on all cores waits for the
/// slowest of them.
const REST: u32 = 5;
/// ... each time they have worked this long: short beside a token, long beside the change of threads.
const WORK: Duration = Duration::from_micros(300);
/// How much less a loading thread counts than one that computes, as `nice` has it: about a tenth.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// Everything that it takes to read blocks.
#[derive(Debug)]
pub(crate) struct Loader<S, M: Memory> {
    pub(crate) file: StackFile<S>,
    pub(crate) memory: M,
    pub(crate) table: Arc<Table>,
    pub(crate) account: Arc<Account>,
    verify: Verify,
    /// Threads that read, the one with the job included.
    readers: usize,
    /// By position, the blocks that are in memory, if only in old snapshots: none is ever there twice, and to grow back to a size that
    /// somebody still works at costs nothing.
    alive: Mutex<Vec<Weak<Run<M>>>>,
}

/// How far a job has come.
struct Progress<M: Memory> {
    /// The first position that nobody reads yet.
    next: usize,
    /// The length of the last snapshot published.
    published: usize,
    /// Blocks read and not yet published.
    ready: BTreeMap<usize, Resident<M>>,
    /// The first position that failed, and why.
    failed: Option<(usize, RuntimeError)>,
    published_at: Instant,
}

impl<M: Memory> Progress<M> {
    /// Whether the block of this position is still to be read. What comes before a failure is of use.
    fn is_wanted(&self, position: usize, swap: &Swap<Snapshot<M>, RuntimeError>) -> bool {
        self.failed.as_ref().is_none_or(|&(first, _)| position < first) && swap.is_wanted(self.published, position)
    }

    fn publish(&mut self, swap: &Swap<Snapshot<M>, RuntimeError>) {
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

/// Lets a reader rest while somebody computes.
struct Pace<'a> {
    /// Held by the reader that rests. The next one that is to rest waits for it, so that one works at a time, while another rests: two at
    /// once would hold up a pass on two cores.
    resting: &'a Mutex<()>,
    /// Its [`thread_time`] when it began to work.
    since: Option<Duration>,
}

impl Pace<'_> {
    fn after_piece(&mut self, somebody_computes: bool) {
        if !somebody_computes {
            self.since = None;
            return;
        }
        let now = thread_time();
        let worked = now.saturating_sub(*self.since.get_or_insert(now));
        if worked >= WORK {
            let _resting = lock(self.resting);
            std::thread::sleep(REST * worked);
            self.since = Some(thread_time());
        }
    }
}

impl<S: ReadAt + Send + Sync, M: Memory> Loader<S, M> {
    pub(crate) fn new(file: StackFile<S>, memory: M, table: Arc<Table>, verify: Verify) -> Self {
        let alive = Mutex::new(table.entries.iter().map(|_| Weak::new()).collect());
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self { file, memory, table, account: Arc::default(), verify, readers: cores.min(MAX_READERS), alive }
    }

    /// Loads the blocks of a job, as far as they stay wanted, and publishes them as they come.
    ///
    /// # Errors
    /// The first block that cannot be loaded; those before it are published.
    pub(crate) fn run(&self, swap: &Swap<Snapshot<M>, RuntimeError>, job: &Job) -> Result<(), RuntimeError> {
        let progress = Mutex::new(Progress {
            next: job.from,
            published: job.from,
            ready: BTreeMap::new(),
            failed: None,
            published_at: Instant::now(),
        });
        let resting = Mutex::new(());
        let is_wanted = |position| lock(&progress).is_wanted(position, swap);
        let read = || {
            let mut pace = Pace { resting: &resting, since: None };
            let mut staging = None;
            let mut after_piece = || pace.after_piece(swap.is_held() || self.table.live.load(Ordering::Relaxed) > 1);
            loop {
                let mut p = lock(&progress);
                let positions = p.next..job.to.min(self.table.run_end(p.next));
                if positions.is_empty() || !p.is_wanted(positions.start, swap) {
                    break;
                }
                p.next = positions.end;
                drop(p);
                let mut blocks = Vec::with_capacity(positions.len());
                let loaded = self.blocks(positions, &mut staging, is_wanted, &mut after_piece, &mut blocks);
                let mut p = lock(&progress);
                p.ready.extend(blocks);
                if let Err((position, error)) = loaded
                    && p.failed.as_ref().is_none_or(|&(first, _)| position < first)
                {
                    p.failed = Some((position, error));
                }
                if p.published_at.elapsed() >= PUBLISH_EVERY {
                    p.publish(swap);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.readers.min(job.to - job.from) {
                // Without a thread more it takes longer.
                let _ = std::thread::Builder::new().name("bitstack-read".to_owned()).spawn_scoped(scope, read);
            }
            read();
        });
        let mut progress = progress.into_inner().unwrap_or_else(PoisonError::into_inner);
        progress.publish(swap);
        progress.failed.map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Adds the blocks of some positions, from memory where they are there, up to the first that is not wanted or fails.
    fn blocks(
        &self,
        positions: Range<usize>,
        staging: &mut Option<M::Staging>,
        is_wanted: impl Fn(usize) -> bool,
        after_piece: &mut dyn FnMut(),
        blocks: &mut Vec<(usize, Resident<M>)>,
    ) -> Result<(), (usize, RuntimeError)> {
        let mut next = positions.start;
        while next < positions.end && is_wanted(next) {
            let (run, missing) = {
                let alive = &lock(&self.alive)[next..positions.end];
                (alive[0].upgrade(), alive.iter().take_while(|run| run.strong_count() == 0).count())
            };
            let (run, read) = match run {
                Some(run) => (Some(run), Ok(())),
                None => self.read(next..next + missing, staging, &is_wanted, after_piece),
            };
            if let Some(run) = run {
                let end = run.positions().end.min(positions.end);
                blocks.extend((next..end).map(|position| (position, Resident::new(run.clone(), position))));
                next = end;
            }
            read.map_err(|error| (next, error))?;
        }
        Ok(())
    }

    /// Reads blocks that are not in memory into a new run, up to the first that is not wanted or fails.
    fn read(
        &self,
        positions: Range<usize>,
        staging: &mut Option<M::Staging>,
        is_wanted: impl Fn(usize) -> bool,
        after_piece: &mut dyn FnMut(),
    ) -> (Option<Arc<Run<M>>>, Result<(), RuntimeError>) {
        let (memory, table) = (&self.memory, &*self.table);
        let begun = match staging {
            Some(staging) => Ok(staging),
            None => self.staging(positions.start).map(|new| staging.insert(new)),
        };
        let begun = begun.and_then(|staging| Ok((staging, Run::new(memory, table, positions.clone(), &self.account)?)));
        let (staging, mut run) = match begun {
            Ok(begun) => begun,
            Err(error) => return (None, Err(error)),
        };
        let mut read = Ok(());
        for position in positions {
            if !is_wanted(position) {
                break;
            }
            // The source is not ours: if it panics, that is one more way in which it fails.
            let next = || run.fill_next(memory, staging, &self.file, table, self.verify, after_piece);
            read = catch_unwind(AssertUnwindSafe(next))
                .unwrap_or_else(|panic| Err(self.panicked(position, panic.as_ref())));
            if read.is_err() {
                break;
            }
        }
        if run.positions().is_empty() {
            return (None, read);
        }
        match run.seal(memory, table) {
            Ok(run) => {
                lock(&self.alive)[run.positions()].fill(Arc::downgrade(&run));
                (Some(run), read)
            }
            Err(error) => (None, Err(error)),
        }
    }

    /// What a thread needs to fill runs, the first of which begins at this position.
    fn staging(&self, position: usize) -> Result<M::Staging, RuntimeError> {
        self.memory
            .staging(self.table.largest_block_bytes)
            .map_err(|source| no_memory(&self.table, position, self.table.largest_block_bytes as u64, source))
    }

    fn panicked(&self, position: usize, panic: &(dyn std::any::Any + Send)) -> RuntimeError {
        let block = self.table.entries[position].1;
        let message = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        let message = message.unwrap_or("without a message").to_owned();
        RuntimeError::Panicked { weight: self.table.name(position), block, message }
    }

    /// What the background thread does until the end.
    pub(crate) fn work(&self, swap: &Swap<Snapshot<M>, RuntimeError>) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn work(time: Duration) -> Duration {
        let start = thread_time();
        while thread_time() < start + time {
            std::hint::spin_loop();
        }
        thread_time() - start
    }

    #[test]
    #[cfg(unix)]
    fn readers_rest_a_multiple_of_what_they_work_while_somebody_computes() {
        let resting = Mutex::new(());
        let mut pace = Pace { resting: &resting, since: None };
        pace.after_piece(true);
        for _ in 0..3 {
            let worked = work(WORK);
            let start = Instant::now();
            pace.after_piece(true);
            assert!(start.elapsed() >= REST * worked, "{:?} of rest after {worked:?}", start.elapsed());
        }
        work(3 * WORK);
        pace.after_piece(false);
        assert!(pace.since.is_none());
        // What was done while nobody computed is nothing to rest for.
        let start = thread_time();
        pace.after_piece(true);
        assert!(pace.since.is_some_and(|since| since >= start));
    }

    #[test]
    #[cfg(unix)]
    fn readers_together_work_no_more_than_one_would() {
        const READERS: u32 = 3;
        const ROUNDS: u32 = 8;
        let resting = Mutex::new(());
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..READERS {
                scope.spawn(|| {
                    let mut pace = Pace { resting: &resting, since: None };
                    pace.after_piece(true);
                    for _ in 0..ROUNDS {
                        work(WORK);
                        pace.after_piece(true);
                    }
                });
            }
        });
        assert!(start.elapsed() >= READERS * ROUNDS * REST * WORK, "{:?}", start.elapsed());
    }
}
