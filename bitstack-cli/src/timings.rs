//! Where the time of a command goes.

use super::progress::Reporter;
use bitstack_model::{Part, Progress};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Keeps the time of every part, and passes everything on.
pub(crate) struct Timings<'a> {
    reporter: &'a Reporter,
    state: Mutex<State>,
}

struct State {
    current: Part,
    since: (Instant, Duration),
    /// In the order of [`Part::ALL`].
    parts: [Timing; Part::ALL.len()],
}

/// What a part took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    pub(crate) part: Part,
    pub(crate) seconds: f64,
    /// Of all threads together.
    pub(crate) processor_seconds: f64,
    /// See [`Part::unit`].
    pub(crate) units: u64,
}

impl<'a> Timings<'a> {
    /// The time from here on is that of `part`.
    pub(crate) fn new(reporter: &'a Reporter, part: Part) -> Self {
        let parts = Part::ALL.map(|part| Timing { part, seconds: 0.0, processor_seconds: 0.0, units: 0 });
        Self { reporter, state: Mutex::new(State { current: part, since: now(), parts }) }
    }

    /// The parts that took any time, so far.
    pub(crate) fn so_far(&self) -> Vec<Timing> {
        let mut state = self.state();
        state.pass();
        state.parts.into_iter().filter(|t| t.seconds > 0.0).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Time up to now goes to the current part.
    fn pass(&mut self) {
        let now = now();
        let timing = self.parts.iter_mut().find(|t| t.part == self.current).expect("all parts are there");
        timing.seconds += (now.0 - self.since.0).as_secs_f64();
        timing.processor_seconds += now.1.saturating_sub(self.since.1).as_secs_f64();
        self.since = now;
    }
}

impl Progress for Timings<'_> {
    fn stage(&self, name: &str, total: u64) {
        self.reporter.stage(name, total);
    }

    fn advance(&self, steps: u64) {
        self.reporter.advance(steps);
    }

    fn resumed(&self, done: u64, total: u64) {
        self.reporter.resumed(done, total);
    }

    fn few_windows(&self, found: usize, asked: usize, seq_len: usize) {
        self.reporter.few_windows(found, asked, seq_len);
    }

    fn part(&self, part: Part, units: u64) {
        let mut state = self.state();
        state.pass();
        state.current = part;
        let timing = state.parts.iter_mut().find(|t| t.part == part).expect("all parts are there");
        timing.units += units;
    }
}

/// The time, and the processor time of this process where the system tells it.
fn now() -> (Instant, Duration) {
    #[cfg(unix)]
    let processor = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime).try_into().unwrap_or_default();
    #[cfg(not(unix))]
    let processor = Duration::ZERO;
    (Instant::now(), processor)
}

/// A line for every part, and one for all.
pub(crate) fn table(timings: &[Timing]) -> String {
    let mut out = format!("{:<14} {:>9} {:>11} {:>17}", "", "seconds", "processor s", "per second");
    let row = |name: &str, seconds: f64, processor: f64, rate: &str| {
        format!("\n{name:<14} {seconds:>9.1} {processor:>11.1} {rate:>17}").trim_end().to_owned()
    };
    for t in timings {
        let rate = if t.units > 0 { rate(t.units as f64 / t.seconds, t.part.unit()) } else { String::new() };
        out.push('\n');
        out.push_str(row(t.part.name(), t.seconds, t.processor_seconds, &rate).trim_start_matches('\n'));
    }
    let sum = |of: fn(&Timing) -> f64| timings.iter().map(of).sum::<f64>();
    out.push_str(&row("all", sum(|t| t.seconds), sum(|t| t.processor_seconds), ""));
    out
}

fn rate(per_second: f64, unit: &str) -> String {
    match per_second {
        r if r >= 1e6 => format!("{:.1} M {unit}", r / 1e6),
        r if r >= 1e4 => format!("{:.1} k {unit}", r / 1e3),
        r => format!("{r:.0} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_time_belongs_to_one_part_or_another() {
        let reporter = Reporter::new(true);
        let started = Instant::now();
        let timings = Timings::new(&reporter, Part::Opening);
        for _ in 0..3 {
            timings.part(Part::Calibration, 5);
            std::thread::sleep(Duration::from_millis(2));
            timings.part(Part::Gram, 7);
        }
        let parts = timings.so_far();
        let names: Vec<_> = parts.iter().map(|t| (t.part, t.units)).collect();
        assert_eq!(names, [(Part::Opening, 0), (Part::Calibration, 15), (Part::Gram, 21)]);
        assert!(parts[1].seconds >= 0.006);
        assert!(parts.iter().map(|t| t.seconds).sum::<f64>() <= started.elapsed().as_secs_f64());
        assert_eq!(table(&parts).lines().count(), 5);
    }
}
