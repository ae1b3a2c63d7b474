#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[cfg(feature = "compress")]
pub use bitstack_compress as compress;
pub use bitstack_core as core;
#[cfg(feature = "cpu")]
pub use bitstack_cpu as cpu;
#[cfg(feature = "cuda")]
pub use bitstack_cuda as cuda;
#[cfg(feature = "decomp")]
pub use bitstack_decomp as decomp;
#[cfg(feature = "engine")]
pub use bitstack_engine as engine;
#[cfg(feature = "exchange")]
pub use bitstack_exchange as exchange;
#[cfg(feature = "format")]
pub use bitstack_format as format;
#[cfg(feature = "model")]
pub use bitstack_gguf as gguf;
#[cfg(feature = "format")]
pub use bitstack_io as io;
#[cfg(feature = "model")]
pub use bitstack_model as model;
pub use bitstack_pack as pack;
#[cfg(feature = "runtime")]
pub use bitstack_runtime as runtime;
#[cfg(feature = "sort")]
pub use bitstack_sort as sort;
