//! FORMAT.md says what the code does: its listing of the smallest file is the file that the writer writes.

use bitstack_core::{Basis, Block, Coefficients, Shape, SignMatrix, Values, f16};
use bitstack_format::{Draft, StackFile};
use std::fmt::Write as _;

const DOCUMENT: &str = include_str!("../FORMAT.md");

/// One weight of 1 x 1 at rank 1, with one block, worth +1 · 2 · 0.5.
fn smallest() -> Vec<u8> {
    let one = |x: f32| Values::F16(vec![f16::from_f32(x)]);
    let mut draft = Draft::create_in(std::env::temp_dir()).unwrap();
    let w = draft.add_weight("w", Shape::new(1, 1).unwrap(), 1, "avd").unwrap();
    let block = Block {
        signs: SignMatrix::from_f32(1, 1, &[1.0]).unwrap(),
        basis: Some(Basis::new(1, 1, one(2.0)).unwrap()),
        coefficients: Coefficients::new(1, 1, 1, one(0.5)).unwrap(),
    };
    draft.push_block(w, block.view()).unwrap();
    let mut bytes = Vec::new();
    draft.finish(&[0], &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

fn hex_dump(bytes: &[u8]) -> String {
    let mut dump = String::new();
    for (i, line) in bytes.chunks(16).enumerate() {
        let hex: Vec<String> = line.iter().map(|b| format!("{b:02x}")).collect();
        let text: String = line.iter().map(|&b| if (0x20..0x7f).contains(&b) { char::from(b) } else { '.' }).collect();
        writeln!(dump, "{:06x}  {:<47}  |{text}|", 16 * i, hex.join(" ")).unwrap();
    }
    dump
}

#[test]
fn the_listing_of_the_smallest_file_is_what_the_writer_writes() {
    let bytes = smallest();
    StackFile::open(&bytes[..]).unwrap();
    let dump = hex_dump(&bytes);
    assert!(DOCUMENT.contains(&format!("```text\n{dump}```")), "FORMAT.md should have:\n{dump}");
    let size = format!("The smallest legal file has {} bytes", bytes.len());
    assert!(DOCUMENT.contains(&size), "FORMAT.md should say: {size}");
}
