/// Over how many threads one piece of work runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Threads {
    /// The calling thread only: right when many pieces (weights, windows of text) already run side by side.
    #[default]
    One,
    /// The current rayon pool: that of the calling thread if it belongs to one, the global one otherwise. A thread that belongs to none
    /// waits, some ten microseconds, until one of the pool takes over: who has many small pieces often does them inside `rayon::scope`.
    Pool,
}
