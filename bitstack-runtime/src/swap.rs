//! The concurrent core: one immutable value that is a prefix of a sequence, replaced while others use it.
//!
//! Readers take the current value and keep it as long as they like. Anybody asks for another length: a shorter prefix is put in place
//! at once, a longer one becomes a [`Job`] for the one worker, which hands in the items in order. Only the worker makes the value
//! longer, so a value of the length that the worker counts on has the items that it counts on.
//!
//! The lock is held for a few assignments (and for cutting a value); values are built, and given back, outside of it.

use crate::sync::{Condvar, Mutex, MutexGuard};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// The first items of a sequence whose items are determined by their positions.
pub(crate) trait Prefix: Sized {
    /// What the sequence consists of.
    type Item;

    /// The number of items.
    fn len(&self) -> usize;

    /// The first `len` items, of which there are more.
    fn cut(&self, len: usize) -> Self;

    /// These items and those that follow them.
    fn grown(&self, items: Vec<Self::Item>) -> Self;
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Goal {
    /// The number of items.
    pub(crate) len: usize,
    /// The budget that this follows from; the core only passes it on.
    pub(crate) budget_bytes: u64,
}

/// Work to do: the items of positions `from..to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Job {
    request: u64,
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// All that can be seen at one moment.
#[derive(Debug)]
pub(crate) struct View<P, E> {
    pub(crate) current: Arc<P>,
    pub(crate) goal: Goal,
    /// Whether there is work to do.
    pub(crate) is_working: bool,
    /// Why work towards the goal stopped.
    pub(crate) failed: Option<E>,
    /// Counts the changes of all this.
    pub(crate) change: u64,
}

#[derive(Debug)]
pub(crate) struct Swap<P, E> {
    state: Mutex<State<P, E>>,
    /// There may be work, or an end to it.
    work: Condvar,
    /// The view has changed.
    changed: Condvar,
}

#[derive(Debug)]
struct State<P, E> {
    current: Arc<P>,
    goal: Goal,
    /// Counts the requests, so that a failure is not blamed on a later one.
    request: u64,
    failed: Option<E>,
    change: u64,
    closed: bool,
}

impl<P: Prefix, E: Clone> Swap<P, E> {
    /// Begins with a value; `goal` may ask for more.
    pub(crate) fn new(current: Arc<P>, goal: Goal) -> Self {
        let state = State { current, goal, request: 0, failed: None, change: 0, closed: false };
        Self { state: Mutex::new(state), work: Condvar::new(), changed: Condvar::new() }
    }

    // A panic under the lock, should there be one, leaves a state that is whole: every change is a few assignments.
    fn lock(&self) -> MutexGuard<'_, State<P, E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value of now.
    pub(crate) fn current(&self) -> Arc<P> {
        self.lock().current.clone()
    }

    /// Everything of now.
    pub(crate) fn view(&self) -> View<P, E> {
        self.lock().view()
    }

    /// Asks for another length, whatever was asked for before, and forgets a failure. A shorter value is in place on return.
    pub(crate) fn request(&self, goal: Goal) {
        let mut state = self.lock();
        state.goal = goal;
        state.request += 1;
        state.failed = None;
        let cut = (state.current.len() > goal.len).then(|| Arc::new(state.current.cut(goal.len)));
        let old = cut.map(|cut| std::mem::replace(&mut state.current, cut));
        self.tell(state);
        self.work.notify_all();
        // Perhaps the last to hold what was cut off: giving that back takes time, and nobody waits for it.
        drop(old);
    }

    /// What there is to do, if anything.
    pub(crate) fn job(&self) -> Option<Job> {
        self.lock().job()
    }

    /// For the worker: waits for something to do. `None` when there will be no more.
    pub(crate) fn next_job(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(job) = state.job() {
                return Some(job);
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// For the worker: whether the item of position `position` is still wanted, on top of a value of length `len`.
    pub(crate) fn is_wanted(&self, len: usize, position: usize) -> bool {
        let state = self.lock();
        !state.closed && state.current.len() == len && position < state.goal.len
    }

    /// For the worker: adds the items that follow a value of length `len`, as many as are still wanted. False, and nothing is changed,
    /// when the value is not of this length any more.
    pub(crate) fn publish(&self, len: usize, items: Vec<P::Item>) -> bool {
        let base = self.current();
        if base.len() != len {
            return false;
        }
        let mut grown = Arc::new(base.grown(items));
        let mut state = self.lock();
        if !Arc::ptr_eq(&state.current, &base) {
            return false;
        }
        let surplus = (grown.len() > state.goal.len).then(|| {
            // A smaller request came while these items were on their way; not below `len`, or the value would be another.
            let cut = Arc::new(grown.cut(state.goal.len));
            std::mem::replace(&mut grown, cut)
        });
        let old = std::mem::replace(&mut state.current, grown);
        self.tell(state);
        drop((old, surplus));
        true
    }

    /// For the worker: the job cannot be done. Without effect when something else was asked for meanwhile.
    pub(crate) fn fail(&self, job: &Job, error: E) {
        let mut state = self.lock();
        if state.request == job.request {
            state.failed = Some(error);
            self.tell(state);
        }
    }

    /// Waits until the value is as long as was asked for.
    ///
    /// # Errors
    /// Why it will not be.
    pub(crate) fn wait(&self) -> Result<(), E> {
        let mut state = self.lock();
        while state.is_working() && !state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match &state.failed {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Waits until the view is another than number `seen`, at most for `timeout`.
    pub(crate) fn wait_change(&self, seen: u64, timeout: Duration) -> View<P, E> {
        let state = self.lock();
        if state.change != seen || state.closed {
            return state.view();
        }
        self.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0.view()
    }

    /// Lets the worker, and everybody who waits, come to an end.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        self.tell(state);
        self.work.notify_all();
    }

    fn tell(&self, mut state: MutexGuard<'_, State<P, E>>) {
        state.change += 1;
        drop(state);
        self.changed.notify_all();
    }
}

impl<P: Prefix, E: Clone> State<P, E> {
    fn is_working(&self) -> bool {
        self.failed.is_none() && self.current.len() < self.goal.len
    }

    fn job(&self) -> Option<Job> {
        self.is_working().then(|| Job { request: self.request, from: self.current.len(), to: self.goal.len })
    }

    fn view(&self) -> View<P, E> {
        View {
            current: self.current.clone(),
            goal: self.goal,
            is_working: self.is_working(),
            failed: self.failed.clone(),
            change: self.change,
        }
    }
}
