//! Progress on stderr: bars with rate and time left on a terminal, a line now and then otherwise, nothing when quiet.

use bitstack_model::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines are at least this far apart where bars cannot be drawn.
const BETWEEN_LINES: Duration = Duration::from_secs(5);

/// Shows what long work is doing.
pub(crate) struct Reporter {
    mode: Mode,
}

enum Mode {
    Quiet,
    Bars(Mutex<ProgressBar>),
    Lines(Mutex<Line>),
}

struct Line {
    stage: String,
    total: u64,
    done: u64,
    started: Instant,
    shown: Instant,
}

impl Reporter {
    /// Bars if stderr is a terminal, lines otherwise, nothing when `quiet`.
    pub(crate) fn new(quiet: bool) -> Self {
        let mode = if quiet {
            Mode::Quiet
        } else if std::io::stderr().is_terminal() {
            Mode::Bars(Mutex::new(ProgressBar::hidden()))
        } else {
            let now = Instant::now();
            Mode::Lines(Mutex::new(Line { stage: String::new(), total: 0, done: 0, started: now, shown: now }))
        };
        Self { mode }
    }

    /// Takes the bar away, before results are printed.
    pub(crate) fn finish(&self) {
        if let Mode::Bars(bar) = &self.mode {
            bar.lock().unwrap_or_else(|e| e.into_inner()).finish_and_clear();
        }
    }

    /// A stage that counts bytes: to be told how many are done, of how many.
    pub(crate) fn bytes(&self, name: &'static str) -> impl FnMut(u64, u64) {
        let mut before = None;
        move |done, total| {
            let before = before.replace(done).unwrap_or_else(|| {
                self.stage(name, total);
                0
            });
            self.advance(done - before);
        }
    }

    /// A remark to the user, on stderr, unless quiet.
    pub(crate) fn say(&self, text: &str) {
        match &self.mode {
            Mode::Quiet => {}
            Mode::Bars(bar) => bar.lock().unwrap_or_else(|e| e.into_inner()).suspend(|| to_stderr(text)),
            Mode::Lines(_) => to_stderr(text),
        }
    }
}

/// Writes a line to stderr; a closed stderr is no reason to stop working.
pub(crate) fn to_stderr(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

impl Progress for Reporter {
    fn stage(&self, name: &str, total: u64) {
        match &self.mode {
            Mode::Quiet => {}
            Mode::Bars(bar) => {
                let style = ProgressStyle::with_template("{msg:28} {bar:30} {pos}/{len}  {per_sec}  {eta} left")
                    .expect("the template is a constant");
                let new = ProgressBar::new(total).with_style(style).with_message(name.to_owned());
                new.enable_steady_tick(Duration::from_millis(200));
                let mut bar = bar.lock().unwrap_or_else(|e| e.into_inner());
                bar.finish_and_clear();
                *bar = new;
            }
            Mode::Lines(line) => {
                let mut line = line.lock().unwrap_or_else(|e| e.into_inner());
                let now = Instant::now();
                *line = Line { stage: name.to_owned(), total, done: 0, started: now, shown: now };
            }
        }
    }

    fn advance(&self, by: u64) {
        match &self.mode {
            Mode::Quiet => {}
            Mode::Bars(bar) => bar.lock().unwrap_or_else(|e| e.into_inner()).inc(by),
            Mode::Lines(line) => {
                let mut line = line.lock().unwrap_or_else(|e| e.into_inner());
                line.done += by;
                let now = Instant::now();
                if now - line.shown < BETWEEN_LINES {
                    return;
                }
                line.shown = now;
                let rate = line.done as f64 / (now - line.started).as_secs_f64();
                let left = line.total.saturating_sub(line.done) as f64 / rate;
                to_stderr(&format!("{}: {}/{}, {rate:.1}/s, {left:.0} s left", line.stage, line.done, line.total));
            }
        }
    }

    fn resumed(&self, done: u64, total: u64) {
        self.say(&format!("resuming: {done} of {total} weights are there"));
    }

    fn few_windows(&self, found: usize, asked: usize, seq_len: usize) {
        self.say(&format!(
"the text gives {found} of the {asked} windows of {seq_len} tokens to calibrate on: a longer one makes a better file"
        ));
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.finish();
    }
}
