//! Compressions whose jobs are done by other processes, who know the store, the checkpoint and a name.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use bitstack_compress::{
    CompressError, CompressOptions, Compressed, Executor, Job, Journal, Making, UnitDirectory, compress,
};
use bitstack_model::Checkpoint;
use fixtures::{checkpoint, demo};
use std::path::Path;
use std::process::Command;

/// Set for a process that is to do a job: the model, the store and the job.
const MODEL: &str = "BITSTACK_TEST_MODEL";
const STORE: &str = "BITSTACK_TEST_STORE";
const JOB: &str = "BITSTACK_TEST_JOB";

fn options() -> CompressOptions {
    CompressOptions { n_blocks: Some(3), samples: 2, seq_len: Some(16), ..Default::default() }
}

/// Not a test of its own: what the other processes run.
#[test]
fn worker() {
    let [Some(model), Some(store)] = [MODEL, STORE].map(std::env::var_os) else { return };
    let checkpoint = Checkpoint::open(model).unwrap();
    let job = std::env::var(JOB).unwrap();
    let making = Making::open(UnitDirectory::new(store), &checkpoint, &std::env::temp_dir(), &()).unwrap();
    making.make(job.parse().unwrap()).unwrap();
}

/// A process for each job, some at a time.
struct Processes<'d> {
    model: &'d Path,
    store: &'d Path,
}

impl Executor for Processes<'_> {
    fn run(&self, _: &Making<'_>, jobs: &[Job]) -> Result<(), CompressError> {
        for some in jobs.chunks(4) {
            let start = |job: &Job| {
                let mut command = Command::new(std::env::current_exe().unwrap());
                command.args(["worker", "--exact", "--quiet"]);
                command.env(MODEL, self.model).env(STORE, self.store).env(JOB, job.to_string());
                command.spawn().unwrap()
            };
            let running: Vec<_> = some.iter().map(start).collect();
            for mut process in running {
                assert!(process.wait().unwrap().success());
            }
        }
        Ok(())
    }
}

fn bytes(compressed: &Compressed) -> Vec<u8> {
    let mut bytes = Vec::new();
    compressed.draft.finish(compressed.order.weights(), &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

#[test]
fn jobs_done_by_other_processes_make_the_same_file() {
    let (checkpoint, options) = (checkpoint("llama"), options());
    let whole = compress(&checkpoint, None, &options, &std::env::temp_dir(), &()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("j");
    let journal = Journal::open(&store, &checkpoint, None, &options, &()).unwrap();
    let compressed = journal.compress_by(&Processes { model: checkpoint.dir(), store: &store }, &()).unwrap();
    assert!(bytes(&compressed) == bytes(&whole));
}

#[test]
fn a_unit_needs_nothing_but_the_store_the_checkpoint_and_its_name() {
    let demo = demo();
    let (checkpoint, options) = (Checkpoint::open(demo.join("tiny-llama")).unwrap(), options());
    let text = std::fs::read_to_string(demo.join("text.txt")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let planned = |name: &str| {
        let store = dir.path().join(name);
        let journal = Journal::open(&store, &checkpoint, Some(&text), &options, &()).unwrap();
        (store, journal)
    };
    let (all, journal) = planned("all");
    journal.compress(&()).unwrap();
    // One of the last, from a store where nothing is but the plan: whatever it needs is made too.
    let (store, journal) = planned("one");
    let steps = journal.plan(&()).unwrap().steps();
    let job = steps.iter().flatten().rfind(|job| matches!(job, Job::Weight(_))).unwrap().to_string();
    assert!(!store.join(&job).exists());
    Processes { model: checkpoint.dir(), store: &store }
        .run(&journal.plan(&()).unwrap(), &[job.parse().unwrap()])
        .unwrap();
    assert!(std::fs::read(store.join(&job)).unwrap() == std::fs::read(all.join(&job)).unwrap());
    let weights = std::fs::read_dir(&store)
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with("weight."));
    assert_eq!(weights.count(), 1, "weights that nobody asked for");
}

#[test]
fn stores_without_a_plan_and_of_another_checkpoint_are_refused() {
    let (checkpoint, options) = (checkpoint("llama"), options());
    let dir = tempfile::tempdir().unwrap();
    let open = |store: &Path, checkpoint: &Checkpoint| {
        Making::open(UnitDirectory::new(store), checkpoint, dir.path(), &()).map(drop).unwrap_err()
    };
    assert!(matches!(open(dir.path(), &checkpoint), CompressError::NoPlan));
    let store = dir.path().join("j");
    let journal = Journal::open(&store, &checkpoint, None, &options, &()).unwrap();
    let making = journal.plan(&()).unwrap();
    for job in [Job::Weight(1000), Job::States(0), Job::States(3)] {
        let name = job.to_string();
        assert!(matches!(making.make(job), Err(CompressError::NoSuchJob { name: n }) if n == name));
    }
    let other = fixtures::checkpoint("qwen3");
    assert!(matches!(open(&store, &other), CompressError::JournalDiffers { .. }));
    let plan = std::fs::read(store.join("plan")).unwrap();
    std::fs::write(store.join("plan"), &plan[..plan.len() / 2]).unwrap();
    assert!(matches!(open(&store, &checkpoint), CompressError::NoPlan));
}
