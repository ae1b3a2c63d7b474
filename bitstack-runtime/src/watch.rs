//! A thread that looks at the system's memory and sets a model's budget.

use crate::elastic::Shared;
use crate::memory::Memory;
use crate::policy::{Controller, Model, Policy};
use crate::system::Sensors;
use crate::{Elastic, RuntimeError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The time between two looks. One takes a few reads of small files, some tens of microseconds.
const EVERY: Duration = Duration::from_millis(100);

/// Sets the budget of a model, by a [`Policy`], from what the system says about memory, until it or the model is dropped.
///
/// It looks at the memory of the host: it is for models whose blocks live there, in whatever [`Memory`]. Budgets that others set meanwhile
/// are where it goes on from. When the smallest model is still too large it can do no more.
#[derive(Debug)]
pub struct Watcher {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts to watch, with the [`Sensors`] of this process.
    ///
    /// # Errors
    /// [`RuntimeError::Thread`].
    pub fn start<S, M>(model: &Elastic<S, M>, policy: Policy) -> Result<Self, RuntimeError>
    where
        S: Send + Sync + 'static,
        M: Memory,
    {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let thread = {
            let (model, stop) = (model.shared().clone(), stop.clone());
            std::thread::Builder::new()
                .name("bitstack-watch".to_owned())
                .spawn(move || watch(&model, policy, &stop))
                .map_err(|source| RuntimeError::Thread { job: "watches memory", source: Arc::new(source) })?
        };
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // Should it have panicked, there is nothing left to stop.
            let _ = thread.join();
        }
    }
}

fn watch<S, M: Memory>(model: &Shared<S, M>, policy: Policy, (stop, told): &(Mutex<bool>, Condvar)) {
    let sensors = Sensors::detect();
    let order = model.order();
    let mut controller = Controller::new(policy, order.minimum_bytes()..=order.total_bytes());
    let start = Instant::now();
    let mut stopped = stop.lock().unwrap_or_else(PoisonError::into_inner);
    while !*stopped && !model.is_closed() {
        let status = model.status();
        let now = Model {
            budget_bytes: status.budget_bytes,
            target_bytes: status.target_bytes,
            allocated_bytes: status.allocated_bytes,
            loading: status.loading,
        };
        if let Some(budget) = controller.next(start.elapsed(), &sensors.read(), now) {
            // The controller stays within the budgets that the model can have.
            let _ = model.set_budget(budget);
        }
        stopped = told.wait_timeout(stopped, EVERY).unwrap_or_else(PoisonError::into_inner).0;
    }
}
