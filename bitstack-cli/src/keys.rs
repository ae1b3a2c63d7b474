//! Single keys from the terminal, while something else is going on.

/// Calls `on_key` for every key pressed while `work` runs, if stdin is a terminal that the process may read; Ctrl-C still ends the process. The terminal is then as
/// it was before.
#[cfg(unix)]
pub(crate) fn during<T>(on_key: impl Fn(u8) + Sync, work: impl FnOnce() -> T) -> T {
    use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcgetpgrp, tcsetattr};
    use std::sync::atomic::{AtomicBool, Ordering};

    let stdin = rustix::stdio::stdin();
    // A job in the background would be stopped for touching the terminal.
    let in_foreground = tcgetpgrp(stdin).is_ok_and(|group| group == rustix::process::getpgrp());
    let Some(before) = in_foreground.then(|| tcgetattr(stdin).ok()).flatten() else { return work() };
    let mut single = before.clone();
    single.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
    single.special_codes[SpecialCodeIndex::VMIN] = 1;
    single.special_codes[SpecialCodeIndex::VTIME] = 0;
    if tcsetattr(stdin, OptionalActions::Now, &single).is_err() {
        return work();
    }
    let restore = Restore(move || {
        let _ = tcsetattr(stdin, OptionalActions::Now, &before);
    });
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !finished.load(Ordering::Relaxed) {
                match next_key() {
                    Some(CTRL_C) => {
                        (restore.0)();
                        // As a shell reports a process that an interrupt has ended.
                        std::process::exit(130);
                    }
                    Some(key) => on_key(key),
                    None => {}
                }
            }
        });
        // Set even when the work panics: the scope waits for the thread.
        let _finish = Restore(|| finished.store(true, Ordering::Relaxed));
        work()
    })
}

/// Nobody presses keys where terminals are not those of Unix.
#[cfg(not(unix))]
pub(crate) fn during<T>(_on_key: impl Fn(u8) + Sync, work: impl FnOnce() -> T) -> T {
    work()
}

/// What a terminal in this mode sends for the interrupt.
#[cfg(unix)]
const CTRL_C: u8 = 3;

/// The next key, if one is pressed soon.
#[cfg(unix)]
fn next_key() -> Option<u8> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let stdin = rustix::stdio::stdin();
    let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
    let ready = poll(&mut fds, Some(&wait)).is_ok_and(|n| n > 0);
    let mut key = [0; 1];
    if ready && rustix::io::read(stdin, &mut key) == Ok(1) {
        return Some(key[0]);
    }
    if ready {
        // A terminal that has gone away is always ready and never has a key.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    None
}

/// Runs its closure when dropped.
#[cfg(unix)]
struct Restore<F: Fn()>(F);

#[cfg(unix)]
impl<F: Fn()> Drop for Restore<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
