//! Opening arbitrary bytes, and reading, verifying and truncating whatever opens, ends in a value or an error: never in a panic, and never
//! in memory beyond a small multiple of the input's size.
//!
//! The hash of the header would stop nearly every mutation at the door, so the input is opened twice: as it is, and with the header's
//! hash set right. What opens must also be consistent; see `exercise`.
#![no_main]

use bitstack_fuzz::{exercise, seal};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    exercise(bytes);
    if let Some(sealed) = seal(bytes) {
        exercise(&sealed);
    }
});
