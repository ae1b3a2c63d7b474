//! FORMAT.md says what the code does: its listing of the smallest file is the file that the writer writes.

mod samples;

use bitstack_format::StackFile;
use std::fmt::Write as _;

const DOCUMENT: &str = include_str!("../FORMAT.md");

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
    let bytes = samples::smallest();
    StackFile::open(&bytes[..]).unwrap();
    let dump = hex_dump(&bytes);
    assert!(DOCUMENT.contains(&format!("```text\n{dump}```")), "FORMAT.md should have:\n{dump}");
    let size = format!("The smallest legal file has {} bytes", bytes.len());
    assert!(DOCUMENT.contains(&size), "FORMAT.md should say: {size}");
}
