//! A model whose size can change at any time.

use crate::RuntimeError;
use crate::load::Loader;
use crate::resident::{mapped_bytes, runs};
use crate::snapshot::{Snapshot, Table, TableWeight};
use crate::swap::{Goal, Swap, View};
use bitstack_core::SignLayout;
use bitstack_format::{BlockSource, ReadAt, StackFile, Verify};
use bitstack_sort::{LoadOrder, Plan};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread::JoinHandle;
use std::time::Duration;

/// How a model is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Whether every block is compared with its hash as it is read.
    pub verify: Verify,
    /// When [`Elastic::open`] returns.
    pub start: Start,
    /// How the signs lie in memory: as the kernels that will read them like it best.
    pub signs: SignLayout,
}

/// When [`Elastic::open`] returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Start {
    /// When the whole plan of the budget is in memory.
    #[default]
    Whole,
    /// When the smallest model is: the first block of every weight. The rest is loaded in the background.
    Smallest,
}

/// The blocks of a stack that are in memory: as many as a budget allows, loaded and dropped while others read.
///
/// Share it by reference or in an [`Arc`]; all methods take `&self`. Dropping it ends the background thread, after the blocks that are
/// being read.
#[derive(Debug)]
pub struct Elastic<S> {
    shared: Shared<S>,
    worker: Option<JoinHandle<()>>,
}

/// What the threads of a model share.
#[derive(Debug)]
pub(crate) struct Shared<S> {
    loader: Arc<Loader<S>>,
    swap: Arc<Swap<Snapshot, RuntimeError>>,
}

/// Where a model stands.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Status {
    /// The budget set last.
    pub budget_bytes: u64,
    /// Resident bytes of its plan: what is loaded when nothing more is to be done.
    pub target_bytes: u64,
    /// Resident bytes of the current snapshot: the unstacked tensors and its blocks, exactly. At most `target_bytes`.
    pub resident_bytes: u64,
    /// What the system has given: the unstacked tensors and the mappings of all blocks that are in memory, in whole pages. Those count
    /// that only old snapshots hold, those that are loaded and not yet published, and those that the plan has no room for and that share
    /// a mapping with one that it has: of at most 32 MiB, and a 64th of the model.
    pub allocated_bytes: u64,
    /// Whether blocks are being loaded.
    pub loading: bool,
    /// Why loading towards this budget stopped.
    pub error: Option<RuntimeError>,
    /// Counts budgets set, snapshots published and errors, for [`Elastic::wait_change`].
    pub change: u64,
}

impl<S: ReadAt + Send + Sync + 'static> Elastic<S> {
    /// Opens a stack at a budget. [`Options::start`] says when this returns.
    ///
    /// The budget is for the stack's tensors, the unstacked ones included: these count, and whoever needs them reads them through
    /// [`Elastic::file`]. Companion files do not count.
    ///
    /// # Errors
    /// [`RuntimeError::Budget`] when the budget is below the smallest model, which it states; whatever a block that is needed before
    /// this returns fails with.
    pub fn open(file: StackFile<S>, budget_bytes: u64, options: Options) -> Result<Self, RuntimeError> {
        let order = file.load_order()?;
        let plan = order.plan(budget_bytes)?;
        let mut weights: Vec<TableWeight> = file
            .weights()
            .iter()
            .map(|w| TableWeight { name: w.name.clone(), shape: w.shape, positions: Vec::with_capacity(w.n_blocks()) })
            .collect();
        let entries: Vec<(usize, usize)> = order.iter().map(|id| (id.weight, id.block)).collect();
        for (position, &(weight, _)) in entries.iter().enumerate() {
            weights[weight].positions.push(position);
        }
        let runs = runs(&mapped_bytes(&file, &entries)?, order.n_weights());
        let table = Arc::new(Table { order, entries, weights, runs, live: AtomicUsize::new(0) });

        let first = match options.start {
            Start::Whole => plan.n_blocks,
            Start::Smallest => table.weights.len(),
        };
        let swap = Arc::new(Swap::new(Arc::new(Snapshot::empty(table.clone())), Goal { len: first, budget_bytes }));
        let loader = Arc::new(Loader::new(file, table, options.verify, options.signs));
        if let Some(job) = swap.job() {
            loader.run(&swap, &job)?;
        }
        swap.request(Goal { len: plan.n_blocks, budget_bytes });

        let shared = Shared { loader, swap };
        let worker = {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("bitstack-load".to_owned())
                .spawn(move || shared.loader.work(&shared.swap))
                .map_err(|source| RuntimeError::Thread { job: "loads blocks", source: Arc::new(source) })?
        };
        Ok(Self { shared, worker: Some(worker) })
    }
}

impl<S> Elastic<S> {
    /// Sets the budget and returns its plan at once. A smaller model is in place when this returns; a larger one is loaded in the
    /// background, from snapshot to snapshot. A later call supersedes an earlier one; after an error it tries again.
    ///
    /// # Errors
    /// [`RuntimeError::Budget`] when the budget is below the smallest model; everything then stays as it is.
    pub fn set_budget(&self, budget_bytes: u64) -> Result<Plan, RuntimeError> {
        self.shared.set_budget(budget_bytes)
    }

    /// The file that the blocks come from.
    pub fn file(&self) -> &StackFile<S> {
        &self.shared.loader.file
    }

    /// The load order, with the bytes of every size there is.
    pub fn order(&self) -> &LoadOrder {
        self.shared.order()
    }

    /// The model as it is now. Cheap; take one for each forward pass.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.swap.current()
    }

    /// Waits until the model has the size of its budget.
    ///
    /// # Errors
    /// What stopped the loading. The model keeps the size it has reached, and [`Elastic::set_budget`] tries again.
    pub fn wait(&self) -> Result<(), RuntimeError> {
        self.shared.swap.wait()
    }

    /// Where the model stands.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// Waits until [`Status::change`] is not `seen`, at most for `timeout`, and says where the model stands then.
    pub fn wait_change(&self, seen: u64, timeout: Duration) -> Status {
        self.shared.describe(self.shared.swap.wait_change(seen, timeout))
    }

    /// For threads of this crate.
    pub(crate) fn shared(&self) -> &Shared<S> {
        &self.shared
    }
}

impl<S> Shared<S> {
    pub(crate) fn order(&self) -> &LoadOrder {
        &self.loader.table.order
    }

    pub(crate) fn set_budget(&self, budget_bytes: u64) -> Result<Plan, RuntimeError> {
        let plan = self.order().plan(budget_bytes)?;
        self.swap.request(Goal { len: plan.n_blocks, budget_bytes });
        Ok(plan)
    }

    pub(crate) fn status(&self) -> Status {
        self.describe(self.swap.view())
    }

    /// Whether the model has been dropped.
    pub(crate) fn is_closed(&self) -> bool {
        self.swap.is_closed()
    }

    fn describe(&self, view: View<Snapshot, RuntimeError>) -> Status {
        let bytes = self.order().cumulative_bytes();
        Status {
            budget_bytes: view.goal.budget_bytes,
            target_bytes: bytes[view.goal.len],
            resident_bytes: view.current.resident_bytes(),
            allocated_bytes: bytes[0] + self.loader.account.allocated_bytes(),
            loading: view.is_working,
            error: view.failed,
            change: view.change,
        }
    }
}

// Derived, this would ask the same of the source.
impl<S> Clone for Shared<S> {
    fn clone(&self) -> Self {
        Self { loader: self.loader.clone(), swap: self.swap.clone() }
    }
}

impl<S> Drop for Elastic<S> {
    fn drop(&mut self) {
        self.shared.swap.close();
        if let Some(worker) = self.worker.take() {
            // It catches its panics.
            let _ = worker.join();
        }
    }
}
