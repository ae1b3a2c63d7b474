//! Files that must open for ever.

mod samples;

use bitstack_format::{BlockSource, Existing, StackFile, write_atomically};

const V1: &[u8] = include_bytes!("golden/v1.bitstack");
const V1_BLAKE3: &str = "945182af2239b9bfb223c2719af809bdb55808610f714481266d4f4724774100";

#[test]
fn golden_v1_still_opens() {
    assert_eq!(blake3::hash(V1).to_hex().as_str(), V1_BLAKE3, "the golden file itself has changed");
    let file = StackFile::open(V1).unwrap();
    assert!(file.verify(&mut |_, _| {}).unwrap().is_whole());
    assert_eq!(file.order(), samples::ORDER);
    for (w, (name, shape, rank, blocks)) in samples::weights().into_iter().enumerate() {
        let info = &file.weights()[w];
        assert_eq!((info.name.as_str(), info.shape, info.rank, info.method.as_str()), (name, shape, rank, "avd"));
        for (i, block) in blocks.iter().enumerate() {
            assert_eq!(&file.read_block(w, i + 1).unwrap(), block);
        }
    }
    assert_eq!(file.read_file("config.json").unwrap(), samples::CONFIG);
    assert_eq!(file.read_file("tokenizer.json").unwrap(), samples::TOKENIZER);
    assert_eq!(file.read_tensor("norm.weight").unwrap().data[..4], 1.0f32.to_le_bytes());
    assert_eq!(file.provenance()["options"], "--blocks 3");
}

#[test]
fn the_writer_still_writes_golden_v1() {
    assert_eq!(samples::file(), V1);
}

#[test]
#[ignore = "writes the golden file of a new version, once"]
fn write_golden() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/new.bitstack");
    write_atomically(path, Existing::Refuse, |out| Ok(out.write_all(&samples::file())?)).unwrap();
}
