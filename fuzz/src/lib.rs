//! What several targets do with a `.bitstack` file: everything that can be done with one.

use bitstack_core::{Level, SignLayout};
use bitstack_format::{BlockSource, FormatError, StackFile, Verify};
use bitstack_io::in_one_line;
use bitstack_sort::{LoadOrder, Sizes};

const HASH_FIELD: &[u8] = b"\"header_blake3\":\"";

/// Opens the bytes; what opens must be consistent: whatever `verify` finds whole can be read, by either way of reading, and is a block; a
/// prefix that is written is a whole file again; the load order is one.
///
/// Returns what could be read: (what, value), without names that the bytes choose.
pub fn exercise(bytes: &[u8]) -> Vec<String> {
    let file = match StackFile::open(bytes) {
        Ok(file) => file,
        Err(error) => {
            assert!(!in_one_line(&error).chars().any(char::is_control), "{error}");
            return Vec::new();
        }
    };
    let report = file.verify(&mut |done, total| assert!(done <= total)).expect("small tensors fit in memory");
    let is_damaged = |name: &str| report.damaged.iter().any(|d| d.name == name);
    let mut read = Vec::new();
    let mut resident = 0;
    for (w, weight) in file.weights().iter().enumerate() {
        let mut blocks = Vec::new();
        for number in 1..=weight.n_blocks() {
            resident += weight.block_bytes(number).expect("the block is there");
            let block = file.read_block(w, number);
            let extent = file.block_extent(w, number).expect("the block is there");
            // Room to begin at an even address.
            let mut buffer = vec![0; extent.len_bytes() + 1];
            let start = buffer.as_ptr().align_offset(2);
            let buffer = &mut buffer[start..start + extent.len_bytes()];
            let in_place = file.read_block_bytes(w, number, Verify::Always, buffer);
            match block {
                Ok(block) => {
                    in_place.expect("what can be read can be read in place");
                    assert_eq!(extent.view(buffer).expect("and viewed"), block.view());
                    let strips = SignLayout::Strips;
                    file.read_block_bytes_in(w, number, strips, Verify::Never, buffer, &mut || {})
                        .expect("and arranged");
                    assert_eq!(extent.view_in(strips, buffer).expect("and viewed").signs.to_owned(), block.signs);
                    read.push(format!("{block:?}"));
                    blocks.push(block);
                }
                Err(error) => {
                    let prefix = format!("{}.block.{number}.", weight.name);
                    assert!(report.damaged.iter().any(|d| d.name.starts_with(&prefix)), "{error}");
                    assert!(in_place.is_err() || extent.view(buffer).is_err());
                    // Whatever is there without being compared: a value or an error.
                    if file.read_block_bytes(w, number, Verify::Never, buffer).is_ok() {
                        let _ = extent.view(buffer);
                    }
                }
            }
        }
        if blocks.len() == weight.n_blocks() && !blocks.is_empty() {
            let level =
                Level::new(weight.shape, blocks.iter().map(|b| b.view())).expect("blocks of a file make a level");
            let n_elements = weight.shape.rows() * weight.shape.cols();
            if n_elements * blocks.len() * weight.rank < 1 << 16 {
                assert_eq!(level.reconstruct().len(), n_elements);
            }
        }
    }
    for info in file.base_tensors() {
        resident += info.len_bytes;
        let tensor = file.read_tensor(&info.name);
        assert_eq!(tensor.is_err(), is_damaged(&info.name));
        read.extend(tensor.ok().map(|t| format!("{:?}", t.data)));
    }
    for info in file.files() {
        let contents = file.read_file(&info.name);
        assert_eq!(contents.is_err(), is_damaged(&format!("file/{}", info.name)));
        read.extend(contents.ok().map(|c| format!("{c:?}")));
    }
    assert!(resident <= bytes.len() as u64, "every resident byte lies in the file");

    let sizes = Sizes::new(file.base_bytes(), file.block_sizes()).expect("sizes of what is there");
    let order = LoadOrder::from_weights(file.order(), &sizes).expect("the order of a file is one of its blocks");
    assert_eq!(order.total_bytes(), resident);

    for n_blocks in [file.weights().len(), file.order().len()] {
        let mut prefix = Vec::new();
        match file.write_prefix(n_blocks, &mut prefix, &mut |done, total| assert!(done <= total)) {
            Ok(n) => {
                assert_eq!(n, prefix.len() as u64);
                let again = StackFile::open(prefix).expect("what was written opens");
                assert_eq!(again.order(), &file.order()[..n_blocks]);
                assert!(again.missing().is_none());
                if report.damaged.is_empty() {
                    assert!(again.verify(&mut |_, _| {}).expect("it is small").is_whole());
                }
            }
            Err(FormatError::Damaged { .. }) => assert!(!report.damaged.is_empty()),
            Err(error) => panic!("{error}"),
        }
    }
    read
}

/// The bytes with the hash of the header set right, when there is a header and a place for it.
pub fn seal(bytes: &[u8]) -> Option<Vec<u8>> {
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

/// A safetensors file with the length of its header, and the number of bytes after it, as its JSON demands.
pub fn repaired(tensors: &[u8]) -> Option<Vec<u8>> {
    let header_end = tensors.iter().rposition(|&b| b == b'}')? + 1;
    let header = tensors.get(8..header_end)?;
    let json: serde_json::Value = serde_json::from_slice(header).ok()?;
    let ends = json.as_object()?.values().filter_map(|t| t.get("data_offsets")?.get(1)?.as_u64());
    let n = usize::try_from(ends.max()?).ok().filter(|&n| n < 1 << 20)?;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.extend(tensors[header_end..].iter().copied().chain(std::iter::repeat(0x3d)).take(n));
    Some(bytes)
}

/// A directory for small files, in memory where that can be had.
#[cfg(feature = "model")]
pub fn directory() -> tempfile::TempDir {
    let shared_memory = std::path::Path::new("/dev/shm");
    let dir = if shared_memory.is_dir() { tempfile::tempdir_in(shared_memory) } else { tempfile::tempdir() };
    dir.expect("a temporary directory")
}
