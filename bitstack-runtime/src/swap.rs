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

    /// Whether somebody holds the value of now.
    pub(crate) fn is_held(&self) -> bool {
        Arc::strong_count(&self.lock().current) > 1
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
        self.tell(state, old);
        self.work.notify_all();
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
        // If the value was cut meanwhile, `grown` has what was cut off; then, too, it is a prefix, and what counts is the goal.
        let surplus = (grown.len() > state.goal.len).then(|| {
            let cut = Arc::new(grown.cut(state.goal.len));
            std::mem::replace(&mut grown, cut)
        });
        let old = std::mem::replace(&mut state.current, grown);
        // Those who are told find that nothing but the new value is held here.
        self.tell(state, (base, old, surplus));
        true
    }

    /// For the worker: the job cannot be done. Without effect when something else was asked for meanwhile.
    pub(crate) fn fail(&self, job: &Job, error: E) {
        let mut state = self.lock();
        if state.request == job.request {
            state.failed = Some(error);
            self.tell(state, ());
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
        self.tell(state, ());
        self.work.notify_all();
    }

    /// Whether that has happened.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Ends a change: gives back what it replaced, which may take time, without the lock, and tells everybody who waits.
    fn tell<T>(&self, mut state: MutexGuard<'_, State<P, E>>, replaced: T) {
        state.change += 1;
        drop(state);
        drop(replaced);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers from 0, so that a value of a length is right or wrong at sight.
    #[derive(Debug, PartialEq)]
    struct Numbers(Vec<usize>);

    impl Prefix for Numbers {
        type Item = usize;

        fn len(&self) -> usize {
            self.0.len()
        }

        fn cut(&self, len: usize) -> Self {
            assert!(len < self.len());
            Self(self.0[..len].to_vec())
        }

        fn grown(&self, items: Vec<usize>) -> Self {
            Self(self.0.iter().copied().chain(items).collect())
        }
    }

    type NumberSwap = Swap<Numbers, &'static str>;

    fn goal(len: usize) -> Goal {
        Goal { len, budget_bytes: 10 * len as u64 }
    }

    fn swap(len: usize) -> NumberSwap {
        Swap::new(Arc::new(Numbers((0..len).collect())), goal(len))
    }

    /// Takes the current value and checks that it is a prefix.
    fn check(swap: &NumberSwap) -> usize {
        let value = swap.current();
        assert!(value.0.iter().enumerate().all(|(i, &item)| i == item), "{value:?}");
        value.len()
    }

    /// Does jobs, `batch` items at a time, until the end. The item of position `bad` cannot be had.
    fn work(swap: &NumberSwap, batch: usize, bad: usize) {
        while let Some(job) = swap.next_job() {
            let mut len = job.from;
            while len < job.to && swap.is_wanted(len, len) {
                if len >= bad {
                    swap.fail(&job, "bad item");
                    break;
                }
                let items: Vec<usize> = (len..job.to.min(len + batch).min(bad)).collect();
                let n = items.len();
                if !swap.publish(len, items) {
                    break;
                }
                len += n;
            }
        }
    }

    /// Nobody asks any more: the value becomes as long as was asked for last.
    fn check_settled(swap: &NumberSwap) {
        swap.wait().unwrap();
        let view = swap.view();
        assert_eq!((view.current.len(), view.is_working), (view.goal.len, false));
        assert_eq!(view.goal, goal(view.goal.len), "length and budget are of one request");
        check(swap);
    }

    #[cfg(not(loom))]
    mod single {
        use super::*;

        #[test]
        fn shorter_request_is_in_place_at_once_and_longer_one_is_a_job() {
            let swap = swap(3);
            assert!(swap.job().is_none());
            let held = swap.current();
            swap.request(goal(1));
            assert_eq!((check(&swap), held.len(), swap.job().is_none()), (1, 3, true));
            swap.request(goal(4));
            let job = swap.next_job().unwrap();
            assert_eq!((check(&swap), job.from, job.to), (1, 1, 4));
        }

        #[test]
        fn items_are_taken_as_far_as_they_are_wanted() {
            let swap = swap(1);
            swap.request(goal(4));
            assert!(swap.is_wanted(1, 3) && !swap.is_wanted(1, 4) && !swap.is_wanted(2, 3));
            swap.request(goal(3));
            assert!(swap.publish(1, vec![1, 2, 3]));
            assert_eq!(check(&swap), 3);
            // What follows a value that was cut meanwhile is of no use.
            swap.request(goal(2));
            swap.request(goal(5));
            assert!(!swap.publish(3, vec![3, 4]));
            assert_eq!(check(&swap), 2);
        }

        #[test]
        fn failure_is_of_its_request_only() {
            let swap = swap(1);
            swap.request(goal(4));
            let job = swap.job().unwrap();
            swap.request(goal(5));
            swap.fail(&job, "too late");
            assert!(swap.view().failed.is_none() && swap.view().is_working);
            swap.fail(&swap.job().unwrap(), "in time");
            assert_eq!((swap.wait(), swap.job()), (Err("in time"), None));
            swap.request(goal(5));
            assert!(swap.view().failed.is_none() && swap.job().is_some());
        }

        #[test]
        fn changes_are_counted_and_waited_for() {
            let swap = swap(2);
            let seen = swap.view().change;
            assert_eq!(swap.wait_change(seen, Duration::from_millis(1)).change, seen);
            swap.request(goal(1));
            let view = swap.wait_change(seen, Duration::from_secs(100));
            assert_ne!(view.change, seen);
            assert_eq!(view.goal, goal(1));
        }

        #[test]
        fn everybody_gets_what_was_asked_for_last() {
            let swap = swap(1);
            let n = if cfg!(miri) { 20 } else { 2000 };
            std::thread::scope(|scope| {
                scope.spawn(|| work(&swap, 3, usize::MAX));
                scope.spawn(|| (0..n).for_each(|_| assert!(check(&swap) > 0)));
                let setters: Vec<_> = (0..2)
                    .map(|k| {
                        let swap = &swap;
                        scope.spawn(move || (0..n).for_each(|i| swap.request(goal(1 + (7 * i + k) % 11))))
                    })
                    .collect();
                setters.into_iter().for_each(|setter| setter.join().unwrap());
                check_settled(&swap);
                swap.close();
            });
        }
    }

    /// Every interleaving of a few threads, up to a number of preemptions.
    #[cfg(loom)]
    mod loom {
        use super::*;
        use ::loom::thread;

        fn explore(test: impl Fn() + Send + Sync + 'static) {
            let mut builder = ::loom::model::Builder::new();
            builder.preemption_bound = Some(3);
            builder.check(test);
        }

        fn start(len: usize, batch: usize, bad: usize) -> (Arc<NumberSwap>, thread::JoinHandle<()>) {
            let swap = Arc::new(swap(len));
            let worker = {
                let swap = swap.clone();
                thread::spawn(move || work(&swap, batch, bad))
            };
            (swap, worker)
        }

        #[test]
        fn loom_last_of_two_requests_wins_and_every_value_is_a_prefix() {
            explore(|| {
                let (swap, worker) = start(2, 1, usize::MAX);
                let other = {
                    let swap = swap.clone();
                    thread::spawn(move || {
                        swap.request(goal(3));
                        check(&swap);
                    })
                };
                swap.request(goal(1));
                check(&swap);
                other.join().unwrap();
                check_settled(&swap);
                assert!([1, 3].contains(&check(&swap)));
                swap.close();
                worker.join().unwrap();
            });
        }

        #[test]
        fn loom_growth_that_is_cut_short_ends_at_the_smaller_size() {
            explore(|| {
                let (swap, worker) = start(1, 2, usize::MAX);
                swap.request(goal(4));
                let held = swap.current();
                let len = held.len();
                swap.request(goal(2));
                assert!(check(&swap) <= 2);
                check_settled(&swap);
                assert_eq!((check(&swap), held.len()), (2, len));
                swap.close();
                worker.join().unwrap();
            });
        }

        #[test]
        fn loom_failure_is_told_to_who_waits_and_forgotten_by_the_next_request() {
            explore(|| {
                let (swap, worker) = start(1, 1, 2);
                swap.request(goal(3));
                assert_eq!(swap.wait(), Err("bad item"));
                assert_eq!(check(&swap), 2);
                swap.request(goal(3));
                swap.request(goal(2));
                check_settled(&swap);
                swap.close();
                worker.join().unwrap();
            });
        }

        #[test]
        fn loom_closing_ends_the_worker_and_those_who_wait() {
            explore(|| {
                let (swap, worker) = start(1, 1, usize::MAX);
                let waiting = {
                    let swap = swap.clone();
                    thread::spawn(move || swap.wait())
                };
                swap.request(goal(3));
                swap.close();
                worker.join().unwrap();
                assert_eq!(waiting.join().unwrap(), Ok(()));
                check(&swap);
            });
        }
    }
}
