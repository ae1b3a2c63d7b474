/// Told what long work is doing; everything may be called from any thread. `()` ignores it all.
pub trait Progress: Sync {
    /// A new stage of `total` steps begins.
    fn stage(&self, name: &str, total: u64);

    /// `steps` more steps of the current stage are done.
    fn advance(&self, steps: u64);

    /// Of an interrupted compression that goes on, `done` of `total` weights are there.
    fn resumed(&self, _done: u64, _total: u64) {}
}

impl Progress for () {
    fn stage(&self, _name: &str, _total: u64) {}
    fn advance(&self, _steps: u64) {}
}
