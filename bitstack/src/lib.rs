#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub use bitstack_core as core;
#[cfg(feature = "cpu")]
pub use bitstack_cpu as cpu;
#[cfg(feature = "cuda")]
pub use bitstack_cuda as cuda;
#[cfg(feature = "decomp")]
pub use bitstack_decomp as decomp;
#[cfg(feature = "format")]
pub use bitstack_format as format;
#[cfg(feature = "format")]
pub use bitstack_io as io;
#[cfg(feature = "llm")]
pub use bitstack_llm as llm;
pub use bitstack_pack as pack;
#[cfg(feature = "runtime")]
pub use bitstack_runtime as runtime;
#[cfg(feature = "sort")]
pub use bitstack_sort as sort;
