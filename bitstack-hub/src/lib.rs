#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod cache;
mod download;
mod error;
mod hub;
mod repo;

pub use error::HubError;
pub use hub::{Fetched, Hub, Settings};
pub use repo::{PREFIX, Repo};
