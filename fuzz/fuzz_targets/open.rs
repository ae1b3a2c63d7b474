//! Opening arbitrary bytes, and reading everything that an opened file shows, ends in a value or an error: never in a panic, and never
//! in memory beyond a small multiple of the input's size.
//!
//! The hash of the header would stop nearly every mutation at the door, so the input is opened twice: as it is, and with the header's
//! hash set right. What opens must also be consistent: whatever `verify` finds whole can be read, and a prefix that is
//! written opens again.
#![no_main]

use bitstack_format::{BlockSource, FormatError, StackFile};
use libfuzzer_sys::fuzz_target;

const HASH_FIELD: &[u8] = b"\"header_blake3\":\"";

fuzz_target!(|bytes: &[u8]| {
    exercise(bytes);
    if let Some(sealed) = seal(bytes) {
        exercise(&sealed);
    }
});

fn exercise(bytes: &[u8]) {
    let file = match StackFile::open(bytes) {
        Ok(file) => file,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let report = file.verify(&mut |done, total| assert!(done <= total)).expect("small tensors fit in memory");
    let is_damaged = |name: &str| report.damaged.iter().any(|d| d.name == name);
    let mut resident = 0;
    for (w, weight) in file.weights().iter().enumerate() {
        for block in 1..=weight.n_blocks() {
            resident += weight.block_bytes(block).expect("the block is there");
            if let Err(error) = file.read_block(w, block) {
                let prefix = format!("{}.block.{block}.", weight.name);
                assert!(report.damaged.iter().any(|d| d.name.starts_with(&prefix)), "{error}");
            }
        }
    }
    for info in file.base_tensors() {
        resident += info.len_bytes;
        assert_eq!(file.read_tensor(&info.name).is_err(), is_damaged(&info.name));
    }
    for info in file.files() {
        let damaged = is_damaged(&format!("file/{}", info.name));
        assert_eq!(file.read_file(&info.name).is_err(), damaged);
    }
    assert!(resident <= bytes.len() as u64, "every resident byte lies in the file");
    let mut prefix = Vec::new();
    match file.write_prefix(file.order().len(), &mut prefix, &mut |_, _| {}) {
        Ok(n) => {
            assert_eq!(n, prefix.len() as u64);
            let again = StackFile::open(prefix).expect("what was written opens");
            assert_eq!(again.order(), file.order());
            assert!(again.missing().is_none());
        }
        Err(FormatError::Damaged { .. }) => assert!(!report.damaged.is_empty()),
        Err(error) => panic!("{error}"),
    }
}

/// The bytes with the hash of the header set right, when there is a header and a place for it.
fn seal(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    let length = u64::from_le_bytes(*bytes.first_chunk()?);
    let header_end = usize::try_from(length.checked_add(8)?).ok().filter(|&end| end <= bytes.len())?;
    let at = bytes[..header_end].windows(HASH_FIELD.len()).position(|w| w == HASH_FIELD)? + HASH_FIELD.len();
    bytes.get(at..at + 64).filter(|_| at + 64 <= header_end)?;
    bytes[at..at + 64].fill(b'0');
    let hash = blake3::hash(&bytes[..header_end]).to_hex();
    bytes[at..at + 64].copy_from_slice(hash.as_bytes());
    Some(bytes)
}
