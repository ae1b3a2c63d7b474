#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod atomic;
mod directory;
mod dtype;
mod error;
pub mod hostile;
pub mod safetensors;
mod source;

pub use atomic::{Existing, write_atomically, write_atomically_through};
pub use directory::write_directory_atomically;
pub use dtype::Dtype;
pub use error::{FileError, in_one_line};
pub use source::{BEST_READ_BYTES, FileAt, ReadAt, WriteAt};
