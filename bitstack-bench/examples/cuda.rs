//! The bench's table for device 0, as Markdown: `cargo run --release -p bitstack-bench --features cuda --example cuda`.
//!
//! You will see microseconds, compressed bytes per second, their ratio to a copy inside the device, the same product in f16 by cuBLAS, and
//! the error against f64. On a machine without a device it says so and does nothing.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that prints")]

use bitstack_bench::cuda::{Cases, run};
use bitstack_cuda::CudaError;

fn main() -> Result<(), CudaError> {
    let report = match run(0, &Cases::default(), |row| eprintln!("{row}")) {
        Err(error @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
            println!("skipped: {error}");
            return Ok(());
        }
        report => report?,
    };
    print!("{report}");
    let worst = report.rows.iter().map(|row| row.relative_error).fold(0.0, f64::max);
    assert!(worst <= 1e-3, "an error of {worst:.1e}");
    Ok(())
}
