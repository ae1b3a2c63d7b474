//! A model whose size can change at any time.

use crate::RuntimeError;
use crate::host::HostMemory;
use crate::load::Loader;
use crate::memory::Memory;
use crate::resident::{extents, runs};
use crate::snapshot::Snapshot;
use crate::swap::{Goal, Swap, View};
use crate::table::{Table, TableWeight};
use bitstack_core::SignLayout;
use bitstack_format::{BlockExtent, BlockSource, ReadAt, StackFile, Verify};
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
    /// How the signs lie in memory: as the kernels that will read them like it best. [`Memory::signs`] has the last word.
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
///
/// The blocks live in a [`Memory`]: that of this process, unless [`Elastic::open_in`] is given another.
#[derive(Debug)]
pub struct Elastic<S, M: Memory = HostMemory> {
    shared: Shared<S, M>,
    worker: Option<JoinHandle<()>>,
}

/// What the threads of a model share.
#[derive(Debug)]
pub(crate) struct Shared<S, M: Memory> {
    loader: Arc<Loader<S, M>>,
    swap: Arc<Swap<Snapshot<M>, RuntimeError>>,
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
    /// What the memory has given: the unstacked tensors and the runs of all blocks that are in memory, in whole pages of the host, or
    /// as the memory counts ([`Memory::run_bytes`]). Those count that only old snapshots hold, those that are loaded and not yet
    /// published, and those that the plan has no room for and that share a run with one that it has: of at most 32 MiB, and a 64th of
    /// the model.
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
        Self::open_in(HostMemory, file, budget_bytes, options)
    }
}

impl<S: ReadAt + Send + Sync + 'static, M: Memory> Elastic<S, M> {
    /// As [`Elastic::open`], with the blocks in `memory`. Budgets count the bytes of the file's tensors, whatever they take there.
    ///
    /// # Errors
    /// As [`Elastic::open`].
    pub fn open_in(memory: M, file: StackFile<S>, budget_bytes: u64, options: Options) -> Result<Self, RuntimeError> {
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
        let extents = extents(&file, &entries)?;
        let block_bytes: Vec<u64> = extents.iter().map(|extent| memory.block_bytes(extent)).collect();
        let table = Arc::new(Table {
            runs: runs(&block_bytes, order.n_weights(), memory.unit_bytes().max(1)),
            largest_block_bytes: extents.iter().map(BlockExtent::len_bytes).max().unwrap_or(0),
            signs: memory.signs(options.signs),
            live: AtomicUsize::new(0),
            order,
            entries,
            extents,
            weights,
        });

        let first = match options.start {
            Start::Whole => plan.n_blocks,
            Start::Smallest => table.weights.len(),
        };
        let swap = Arc::new(Swap::new(Arc::new(Snapshot::empty(table.clone())), Goal { len: first, budget_bytes }));
        let loader = Arc::new(Loader::new(file, memory, table, options.verify));
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

impl<S, M: Memory> Elastic<S, M> {
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

    /// The memory that the blocks live in.
    pub fn memory(&self) -> &M {
        &self.shared.loader.memory
    }

    /// The load order, with the bytes of every size there is.
    pub fn order(&self) -> &LoadOrder {
        self.shared.order()
    }

    /// The model as it is now. Cheap; take one for each forward pass.
    pub fn snapshot(&self) -> Arc<Snapshot<M>> {
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
    pub(crate) fn shared(&self) -> &Shared<S, M> {
        &self.shared
    }
}

impl<S, M: Memory> Shared<S, M> {
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

    fn describe(&self, view: View<Snapshot<M>, RuntimeError>) -> Status {
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

// Derived, this would ask the same of the source and the memory.
impl<S, M: Memory> Clone for Shared<S, M> {
    fn clone(&self) -> Self {
        Self { loader: self.loader.clone(), swap: self.swap.clone() }
    }
}

impl<S, M: Memory> Drop for Elastic<S, M> {
    fn drop(&mut self) {
        self.shared.swap.close();
        if let Some(worker) = self.worker.take() {
            // It catches its panics.
            let _ = worker.join();
        }
    }
}
