#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod export;
mod reference;

pub use error::ExchangeError;
pub use export::{ExportOptions, FloatType, export_dense, export_reference};
pub use reference::{Imported, import};
