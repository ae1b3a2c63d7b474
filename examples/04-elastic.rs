//! A model that answers while its memory shrinks and grows.
//!
//! You will learn: how one thread writes text with an [`ElasticModel`] while another changes its memory budget, and that the process
//! really gives the memory back: the resident bytes that the model reports beside the growth of the process that the system sees.
//!
//! `cargo run --release -p bitstack-examples --example 04-elastic` prints a line per budget. The model is made of random planes, 430
//! million weights of 6 bits: large enough to see in the process's size, and quickly made; its text is noise.

use bitstack_bench::synthetic::{self, ModelShape};
use bitstack_engine::{ElasticModel, KvCache, Pass, Threads, Workspace};
use bitstack_format::StackFile;
use bitstack_io::Existing;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("elastic.bitstack");
    let shape = ModelShape {
        hidden_size: 2048,
        intermediate_size: 5632,
        n_layers: 8,
        n_heads: 16,
        n_kv_heads: 4,
        vocab_size: 32_000,
        tied: true,
    };
    synthetic::write(&path, Existing::Refuse, &shape, 6, 1, &())?;

    let before = process_bytes();
    let model = ElasticModel::open(StackFile::open_path(&path)?, u64::MAX, Default::default(), &())?;
    let elastic = model.elastic();
    let (least, most) = (elastic.order().minimum_bytes(), elastic.order().total_bytes());
    let (tokens, finished) = (AtomicU64::new(0), AtomicBool::new(false));

    std::thread::scope(|scope| -> Result<(), Box<dyn std::error::Error>> {
        // The writer: every token runs on the blocks that are resident when it begins.
        let writer = scope.spawn(|| -> Result<(), bitstack_engine::EngineError> {
            let mut cache = KvCache::new(model.config(), 4096)?;
            let mut token = 1;
            let mut workspace = Workspace::default();
            while !finished.load(Ordering::Relaxed) {
                if cache.len() == cache.capacity() {
                    cache.truncate(0);
                }
                let snapshot = model.elastic().snapshot();
                let mut pass = Pass::new().in_workspace(workspace).with_cache(&mut cache).with_threads(Threads::Pool);
                let decoder = model.at(&snapshot)?;
                let logits = decoder.last_logits(&[token], &mut pass)?;
                let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
                token = best.map_or(0, |(token, _)| token as u32);
                workspace = pass.into_workspace();
                tokens.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });

        // Whatever happens here, the writer is told to end.
        let walk = || -> Result<(), Box<dyn std::error::Error>> {
            println!("  budget MB  resident MB  bits/weight  process grown by MB  tokens meanwhile");
            for share in [1.0, 0.75, 0.5, 0.25, 0.0, 0.4, 1.0] {
                let tokens_before = tokens.load(Ordering::Relaxed);
                let budget = least + ((most - least) as f64 * share) as u64;
                elastic.set_budget(budget)?;
                elastic.wait()?;
                // At least two more tokens: whoever still used blocks that were dropped has gone on to others.
                while tokens.load(Ordering::Relaxed) < tokens_before + 3 && !writer.is_finished() {
                    std::thread::yield_now();
                }
                let resident = elastic.status().resident_bytes;
                let levels = elastic.snapshot().levels().to_vec();
                let bits = f64::from(levels.iter().sum::<u32>()) / levels.len() as f64;
                let made = tokens.load(Ordering::Relaxed) - tokens_before;
                assert!(resident <= budget && made > 0);
                match (before, process_bytes()) {
                    (Some(before), Some(now)) => {
                        let grown = now.saturating_sub(before);
                        println!(
                            "{:11.1}  {:11.1}  {bits:11.2}  {:19.1}  {made:16}",
                            budget as f64 / 1e6,
                            resident as f64 / 1e6,
                            grown as f64 / 1e6
                        );
                        // Beside the blocks: the code, keys and values, buffers of the threads.
                        assert!(grown.abs_diff(resident) < resident / 20 + 24_000_000, "{grown} and {resident}");
                    }
                    _ => println!("{budget:11}  {resident:11}  {bits:11.2}  (skipped: needs /proc)  {made:16}"),
                }
            }
            Ok(())
        };
        let walked = walk();
        finished.store(true, Ordering::Relaxed);
        writer.join().expect("the writer does not panic")?;
        walked
    })
}

/// Bytes of this process that are in memory, as the system counts them; `None` where it does not say.
fn process_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(statm.split(' ').nth(1)?.parse::<u64>().ok()? * 4096)
}
