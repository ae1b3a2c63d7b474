//! The machine: its name, and how fast it reads memory.

use bitstack_cpu::Threads;
use rayon::prelude::*;
use std::hint::black_box;

/// The processor's name, as the system gives it, and the number of its threads.
pub fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!("{}, {threads} hardware threads", cpu.unwrap_or_else(|| std::env::consts::ARCH.to_owned()))
}

/// Pieces that memory is read in: small enough that threads end together.
pub(crate) const PIECE_BYTES: usize = 1 << 20;

/// Reads all pieces, and does as little with them as the compiler lets.
pub(crate) fn read(pieces: &[&[u8]], threads: Threads) {
    let read = |bytes: &&[u8]| {
        let mut sums = [0u64; 16];
        for words in bytes.as_chunks::<8>().0.as_chunks::<16>().0 {
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum ^= u64::from_ne_bytes(*word);
            }
        }
        black_box(sums);
    };
    match threads {
        Threads::One => pieces.iter().for_each(read),
        Threads::Pool => pieces.par_iter().for_each(read),
    }
}
