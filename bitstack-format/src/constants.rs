//! The constants of FORMAT.md.

use bitstack_io::Dtype;
use bitstack_io::safetensors::LENGTH_BYTES;

/// The format version this crate writes, and the only one it reads.
pub const VERSION: &str = "1";

/// Data and blocks begin at multiples of this many bytes from the start of the file.
pub const ALIGNMENT: u64 = 64;

/// What every header begins with, up to the version.
pub(crate) const MAGIC: &str = r#"{"__metadata__":{"format":"bitstack","version":""#;

/// What stands between the version and the hash of the header.
pub(crate) const AFTER_VERSION: &str = r#"","header_blake3":""#;

/// Hexadecimal digits of a hash.
pub(crate) const HASH_DIGITS: usize = 64;

/// Where the hash of the header stands, in bytes from the start of the file.
pub(crate) const HASH_OFFSET: usize = LENGTH_BYTES as usize + MAGIC.len() + VERSION.len() + AFTER_VERSION.len();

/// Keys of the metadata that begin with this are the maker's own.
pub(crate) const PROVENANCE_PREFIX: &str = "provenance.";

/// Companion files are tensors with this prefix to their name.
pub(crate) const FILE_PREFIX: &str = "file/";
/// Pads are tensors with this prefix to their name.
pub(crate) const PAD_PREFIX: &str = "pad.";
/// The parts of a block, by the ends of their names.
pub(crate) const SIGNS: &str = "signs";
pub(crate) const BASIS: &str = "v";
pub(crate) const COEFFICIENTS: &str = "u";
pub(crate) const SPIKES: &str = "spikes";
/// The scales of an 8-bit factor are named as the factor, with this at the end.
pub(crate) const SCALE_SUFFIX: &str = "_scale";
/// What an unstacked tensor may be stored as.
pub(crate) const BASE_DTYPES: &[Dtype] = &[Dtype::F32, Dtype::F16, Dtype::BF16];
/// What a factor may be stored as.
pub(crate) const FACTOR_DTYPES: &[Dtype] = &[Dtype::F16, Dtype::I8];
/// The longest name of a tensor, a weight or a method, in bytes.
pub(crate) const MAX_NAME_BYTES: usize = 1024;
/// The longest name of a companion file, in bytes.
pub(crate) const MAX_FILE_NAME_BYTES: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockKind;
    use bitstack_io::hostile::MAX_DIMS;
    use bitstack_io::safetensors::MAX_HEADER_BYTES;

    /// The second column of a table of FORMAT.md, found by the first.
    fn documented(row: &str) -> &'static str {
        let document = include_str!("../FORMAT.md");
        let cells = |line: &'static str| line.split('|').map(str::trim).collect::<Vec<_>>();
        let found = document.lines().map(cells).find(|cells| cells.len() > 3 && cells[1] == row);
        found.unwrap_or_else(|| panic!("FORMAT.md has no row {row:?}"))[2].trim_matches('`')
    }

    #[test]
    fn the_constants_of_the_document_are_those_of_the_code() {
        let names = |dtypes: &[Dtype]| dtypes.iter().map(|d| d.name()).collect::<Vec<_>>().join(", ");
        for (row, value) in [
            ("format version", VERSION.to_owned()),
            ("alignment", ALIGNMENT.to_string()),
            ("largest header", MAX_HEADER_BYTES.to_string()),
            ("length of the header's length", LENGTH_BYTES.to_string()),
            ("start of every header", format!("{MAGIC}{VERSION}{AFTER_VERSION}")),
            ("offset of the header's hash", HASH_OFFSET.to_string()),
            ("digits of a hash", HASH_DIGITS.to_string()),
            ("prefix of provenance keys", PROVENANCE_PREFIX.to_owned()),
            ("prefix of companion files", FILE_PREFIX.to_owned()),
            ("prefix of pads", PAD_PREFIX.to_owned()),
            ("longest name", MAX_NAME_BYTES.to_string()),
            ("longest name of a companion file", MAX_FILE_NAME_BYTES.to_string()),
            ("most dimensions", MAX_DIMS.to_string()),
            ("types of unstacked tensors", names(BASE_DTYPES)),
            ("types of factors", names(FACTOR_DTYPES)),
            ("name of the signs", format!("<weight>.block.<i>.{SIGNS}")),
            ("name of the basis", format!("<weight>.block.<i>.{BASIS}")),
            ("name of the coefficients", format!("<weight>.block.<i>.{COEFFICIENTS}")),
            ("suffix of scales", SCALE_SUFFIX.to_owned()),
            ("block kind", BlockKind::Sign.name().to_owned()),
            ("bit order", format!("{:?}", bitstack_pack::BIT_ORDER)),
        ] {
            assert_eq!(documented(row), value, "{row}");
        }
    }
}
