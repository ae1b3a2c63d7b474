/// Told what long work is doing; everything may be called from any thread. `()` ignores it all.
pub trait Progress: Sync {
    /// A new stage of `total` steps begins.
    fn stage(&self, name: &str, total: u64);

    /// `steps` more steps of the current stage are done.
    fn advance(&self, steps: u64);

    /// Of an interrupted compression that goes on, `done` of `total` weights are there.
    fn resumed(&self, _done: u64, _total: u64) {}

    /// A text gives fewer windows of `seq_len` tokens to calibrate on than were asked for.
    fn few_windows(&self, _found: usize, _asked: usize, _seq_len: usize) {}

    /// From here to the next call, the time belongs to `part`, and does so many more of its units. Parts alternate where layers do.
    fn part(&self, _part: Part, _units: u64) {}
}

impl Progress for () {
    fn stage(&self, _name: &str, _total: u64) {}
    fn advance(&self, _steps: u64) {}
}

/// A part of compressing, for those who want to know where the time goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Reading and hashing the model; weights.
    Opening,
    /// Text to tokens, or text of the model's own; tokens.
    Text,
    /// The model forward and backward once; tokens.
    Importance,
    /// The original model on the calibration's windows; tokens.
    Calibration,
    /// Sums of products of the weights' inputs; tokens.
    Gram,
    /// Weights to blocks; weights.
    Decomposition,
    /// Runs with one weight at level 2 and all others at level 1; tokens through half of the model.
    Sensitivity,
    /// Runs at some sizes, with the better of two orders; tokens.
    Check,
    /// Other runs that choose an order; tokens.
    Order,
    /// Runs that say how good the model is; tokens.
    Quality,
    /// The file; bytes.
    Writing,
}

impl Part {
    /// All parts, in the order they begin.
    pub const ALL: [Self; 11] = [
        Self::Opening,
        Self::Text,
        Self::Importance,
        Self::Calibration,
        Self::Gram,
        Self::Decomposition,
        Self::Sensitivity,
        Self::Check,
        Self::Order,
        Self::Quality,
        Self::Writing,
    ];

    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Text => "text",
            Self::Importance => "importance",
            Self::Calibration => "calibration",
            Self::Gram => "gram matrices",
            Self::Decomposition => "decomposition",
            Self::Sensitivity => "sensitivity",
            Self::Check => "check",
            Self::Order => "order",
            Self::Quality => "quality",
            Self::Writing => "writing",
        }
    }

    /// What it counts.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Opening | Self::Decomposition => "weights",
            Self::Writing => "bytes",
            _ => "tokens",
        }
    }
}
