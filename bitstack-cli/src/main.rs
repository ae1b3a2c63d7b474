//! The `bitstack` command: arguments in, library calls, results out. Printing happens here and in the modules below, nowhere else in the
//! workspace.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod chat;
mod compress;
mod demo;
mod eval;
mod export;
mod files;
mod generate;
mod import;
mod keys;
mod open;
mod output;
mod plot;
mod progress;
mod quality;
mod size;
mod timings;
mod writer;

use anyhow::Result;
use args::{Bench, Cli, Command};
use bitstack_io::in_one_line;
use clap::Parser;
use progress::Reporter;
use std::io::Write;
use std::process::ExitCode;

/// A mistake in how the command was called, as opposed to work that failed: exit status 2.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// An error of the caller's, with the reason and what to do.
fn usage(text: impl Into<String>) -> anyhow::Error {
    Usage(text.into()).into()
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(&cli) {
        Ok(code) => code,
        // Whoever reads our output may stop reading: `bitstack inspect x | head`.
        Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            progress::to_stderr(&format!("error: {}", in_one_line(e.as_ref())));
            ExitCode::from(if e.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn dispatch(cli: &Cli) -> Result<ExitCode> {
    if let Some(n) = cli.threads {
        rayon::ThreadPoolBuilder::new().num_threads(n.into()).build_global()?;
    }
    let reporter = Reporter::new(cli.quiet);
    match &cli.command {
        Command::Compress(args) => return compress::run(args, &reporter),
        Command::Inspect(args) => files::inspect(args),
        Command::Verify(args) => return files::verify(args, &reporter),
        Command::Plan(args) => files::plan(args, &reporter),
        Command::Truncate(args) => files::truncate(args, &reporter),
        Command::Eval(args) => return eval::run(args, &reporter),
        Command::Generate(args) => generate::run(args, &reporter),
        Command::Chat(args) => chat::run(args, &reporter),
        Command::Import(args) => import::run(args, &reporter),
        Command::Export(args) => export::run(args, &reporter),
        Command::Bench(Bench::Decompose(args)) => bench::decompose(args, &reporter),
        Command::Bench(Bench::Kernels(args)) => bench::kernels(args, &reporter),
        Command::Bench(Bench::Load(args)) => bench::load(args, &reporter),
        Command::Bench(Bench::Decode(args)) => bench::decode(args, &reporter),
        Command::Demo(args) => demo::run(args, &reporter),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a result to stdout.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn causes_are_told_once() {
        let e = anyhow!("no such file").context("cannot open x: no such file").context("compress failed");
        assert_eq!(in_one_line(e.as_ref()), "compress failed: cannot open x: no such file");
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
