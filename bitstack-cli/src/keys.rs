//! Single keys from the terminal, and signals, while something else is going on.

/// What Ctrl-C does while work goes on.
#[cfg_attr(not(unix), expect(dead_code, reason = "terminals that are not those of Unix are left alone"))]
pub(crate) enum Interrupt {
    /// Ends the process, as everywhere.
    Ends,
    /// Is said here, for the work to stop. A second one ends the process.
    Says(&'static std::sync::atomic::AtomicBool),
}

#[cfg(unix)]
pub(crate) use unix::during;

/// Nobody presses keys where terminals are not those of Unix.
#[cfg(not(unix))]
pub(crate) fn during<T>(_on_key: impl Fn(u8) + Sync, _interrupt: Interrupt, work: impl FnOnce() -> T) -> T {
    work()
}

#[cfg(unix)]
mod unix {
    use super::Interrupt;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetpgrp, tcsetattr};
    use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
    use signal_hook::iterator::Signals;
    use signal_hook::low_level::emulate_default_handler;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Mutex, MutexGuard, Once, PoisonError};

    /// What signals must know.
    struct Terminal {
        /// How the terminal was, while it is in another mode.
        before: Option<Termios>,
        interrupt: Option<&'static AtomicBool>,
    }

    static TERMINAL: Mutex<Terminal> = Mutex::new(Terminal { before: None, interrupt: None });

    fn terminal() -> MutexGuard<'static, Terminal> {
        TERMINAL.lock().unwrap_or_else(PoisonError::into_inner)
    }

    impl Terminal {
        /// Gives every key as it is pressed, without showing it. Signals keep their keys.
        fn enter(&self) {
            if let Some(before) = self.before.as_ref().filter(|_| in_foreground()) {
                let mut single = before.clone();
                single.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
                single.special_codes[SpecialCodeIndex::VMIN] = 1;
                single.special_codes[SpecialCodeIndex::VTIME] = 0;
                let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &single);
            }
        }

        /// Puts it back as it was; what is set in the background would stop the process.
        fn leave(&self) {
            if let Some(before) = self.before.as_ref().filter(|_| in_foreground()) {
                let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, before);
            }
        }
    }

    /// Calls `on_key` for every key pressed while `work` runs, if stdin is a terminal that the process may read. The terminal is then as it was
    /// before, and so it is when a signal ends the process or stops it.
    pub(crate) fn during<T>(on_key: impl Fn(u8) + Sync, interrupt: Interrupt, work: impl FnOnce() -> T) -> T {
        // A job in the background would be stopped for touching the terminal.
        let Some(before) = in_foreground().then(|| tcgetattr(rustix::stdio::stdin()).ok()).flatten() else {
            return work();
        };
        watch_signals();
        let mut state = terminal();
        state.before = Some(before);
        state.interrupt = match interrupt {
            Interrupt::Ends => None,
            Interrupt::Says(flag) => Some(flag),
        };
        state.enter();
        drop(state);
        let restore = Restore(|| {
            let mut state = terminal();
            state.leave();
            (state.before, state.interrupt) = (None, None);
        });
        let finished = AtomicBool::new(false);
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !finished.load(Ordering::Relaxed) {
                    if let Some(key) = next_key() {
                        on_key(key);
                    }
                }
            });
            // Set even when the work panics: the scope waits for the thread.
            let _finish = Restore(|| finished.store(true, Ordering::Relaxed));
            work()
        });
        drop(restore);
        result
    }

    /// From here on, until the process ends, a thread of its own does what the signals would have done, with the terminal put right first.
    fn watch_signals() {
        static STARTED: Once = Once::new();
        STARTED.call_once(|| {
            let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT]) else { return };
            std::thread::spawn(move || {
                for signal in signals.forever() {
                    let state = terminal();
                    match signal {
                        SIGCONT => state.enter(),
                        SIGINT if state.interrupt.is_some_and(|flag| !flag.swap(true, Ordering::Relaxed)) => {}
                        signal => {
                            state.leave();
                            // Ends the process, or stops it until it is continued.
                            let _ = emulate_default_handler(signal);
                        }
                    }
                }
            });
        });
    }

    fn in_foreground() -> bool {
        tcgetpgrp(rustix::stdio::stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
    }

    /// The next key, if one is pressed soon.
    fn next_key() -> Option<u8> {
        let stdin = rustix::stdio::stdin();
        let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&wait)).is_ok_and(|n| n > 0);
        let mut key = [0; 1];
        if ready && in_foreground() && rustix::io::read(stdin, &mut key) == Ok(1) {
            return Some(key[0]);
        }
        if ready {
            // A terminal that has gone away is always ready and never has a key.
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        None
    }

    /// Runs its closure when dropped.
    struct Restore<F: Fn()>(F);

    impl<F: Fn()> Drop for Restore<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
}
