//! Files that are not what they should be: every rule of FORMAT.md broken, one at a time.

mod samples;

use bitstack_core::{FactorType, Shape, SignLayout, Spike, Spikes, f16};
use bitstack_format::{BlockSource, Draft, FormatError, Limits, ReadAt, StackFile, Verify};
use bitstack_io::in_one_line;
use samples::{Forge, Like, header_text, seal};
use serde_json::json;

const Q: &str = "layers.0.q_proj.weight";

/// Breaks the sample in one way and expects opening to say what is wrong.
fn check(expected: &str, edit: impl FnOnce(&mut Forge)) {
    let mut forge = Forge::new(&samples::file());
    edit(&mut forge);
    check_bytes(expected, &forge.bytes());
}

fn check_text(expected: &str, edit: impl FnOnce(&str) -> String) {
    let file = samples::file();
    check_bytes(expected, &seal(&edit(header_text(&file)), &file[samples::data_offset(&file)..]));
}

fn check_bytes(expected: &str, bytes: &[u8]) {
    let error = in_one_line(&StackFile::open(bytes).err().unwrap_or_else(|| panic!("opened, but: {expected}")));
    assert!(error.contains(expected), "got: {error}\nexpected: {expected}");
    assert!(!error.chars().any(char::is_control), "{error:?}");
}

#[test]
fn the_forge_itself_makes_valid_files() {
    let file = samples::file();
    assert_eq!(Forge::new(&file).bytes(), file);
    assert_eq!(seal(header_text(&file), &file[samples::data_offset(&file)..]), file);
    let mut forge = Forge::new(&file);
    forge.lay_out();
    StackFile::open(forge.bytes()).unwrap();
}

#[test]
fn a_damaged_block_is_named_and_the_others_are_usable() {
    let mut bytes = samples::file();
    // The last tensor of the file: the coefficients of block 3 of weight 0.
    *bytes.last_mut().unwrap() ^= 1;
    let file = StackFile::open(bytes).unwrap();
    let name = format!("{Q}.block.3.u");
    let error = file.read_block(0, 3).unwrap_err();
    assert!(matches!(&error, FormatError::Damaged { name: n } if *n == name), "{error}");
    assert_eq!(file.read_block(0, 2).unwrap(), samples::weights()[0].3[1]);
    let report = file.verify(&mut |_, _| {}).unwrap();
    assert_eq!(report.damaged.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), [name]);
    assert!(matches!(file.write_prefix(5, std::io::sink(), &mut |_, _| {}), Err(FormatError::Damaged { .. })));
    let mut good = Vec::new();
    file.write_prefix(4, &mut good, &mut |_, _| {}).unwrap();
    assert!(StackFile::open(good).unwrap().verify(&mut |_, _| {}).unwrap().is_whole());
}

#[test]
fn whole_tensors_that_make_no_valid_block_are_found() {
    // One bit beyond the last of nine columns; one infinite scale; one pad that is not zero. All with the right hashes.
    for (name, at, value, expected) in [
        (format!("{Q}.block.1.signs"), 1, 0xfe, "bits set beyond its last column"),
        ("lm_head.weight.block.1.u_scale".to_owned(), 1, 0x7c, "not finite"),
        ("pad.0".to_owned(), 0, 1, "not zero"),
    ] {
        let mut forge = Forge::new(&samples::file());
        let begin = forge.tensor(&name)["data_offsets"][0].as_u64().unwrap() as usize;
        forge.data[begin + at] = value;
        forge.rehash(&name);
        let file = StackFile::open(forge.bytes()).unwrap();
        let report = file.verify(&mut |_, _| {}).unwrap();
        assert_eq!(report.damaged.len(), 1, "{name}");
        assert!(report.damaged[0].reason.contains(expected), "{}", report.damaged[0].reason);
        if !name.starts_with("pad") {
            let weight = usize::from(name.starts_with("lm_head"));
            assert!(matches!(file.read_block(weight, 1), Err(FormatError::Block { .. })));
        }
    }
}

/// Everything that words of a list of spikes can say and must not, in a file whose hashes are right.
#[test]
fn spikes_that_lie_are_refused_however_they_are_read_and_the_weight_is_named() {
    let shape = Shape::new(70, 40).unwrap();
    let like = Like { planes: 1, basis: Some(FactorType::F16), coefficients: FactorType::I8, spikes: false };
    let mut first = samples::block(shape, 1, like, &mut samples::Numbers(9));
    let sizes = std::array::from_fn(|i| f16::from_f32(1.0 + i as f32));
    let entries = [Spike { row: 3, col: 35, size: 2 }, Spike { row: 69, col: 39, size: -1 }];
    first.spikes = Some(Spikes::encode(shape, sizes, &entries).unwrap());
    let mut draft = Draft::create_on(Vec::new(), "memory");
    let w = draft.add_weight("w", shape, 1, "sample").unwrap();
    draft.push_block(w, first.view()).unwrap();
    let mut file = Vec::new();
    draft.finish(&[0], &mut file, &mut |_, _| {}).unwrap();
    let n_words = 15 + 2 * 2 + 4; // bridges before columns 35 and 39
    assert_eq!(StackFile::open(&file[..]).unwrap().weights()[0].blocks[0].spike_words, n_words);

    let name = "w.block.1.spikes";
    let refused = |expected: &str, edit: &dyn Fn(&mut Vec<u16>)| {
        let mut forge = Forge::new(&file);
        let begin = forge.tensor(name)["data_offsets"][0].as_u64().unwrap() as usize;
        let mut words: Vec<u16> =
            forge.data[begin..].chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        edit(&mut words);
        forge.tensor(name)["shape"] = json!([words.len()]);
        let data = words.iter().flat_map(|word| word.to_le_bytes());
        forge.data.splice(begin.., data);
        forge.tensor(name)["data_offsets"][1] = json!(forge.data.len());
        forge.rehash(name);
        let file = StackFile::open(forge.bytes()).unwrap();
        let is_refused = |error: FormatError| {
            assert!(matches!(&error, FormatError::Block { weight, block: 1, .. } if weight == "w"), "{error}");
            assert!(in_one_line(&error).contains(expected), "got: {error}\nexpected: {expected}");
        };
        is_refused(file.read_block(0, 1).unwrap_err());
        let report = file.verify(&mut |_, _| {}).unwrap();
        assert_eq!(report.damaged.len(), 1);
        assert!(report.damaged[0].reason.contains(expected), "{}", report.damaged[0].reason);
        let extent = file.block_extent(0, 1).unwrap();
        let mut halves = vec![0u16; extent.len_bytes().div_ceil(2)];
        let bytes = &mut bytemuck::cast_slice_mut(&mut halves)[..extent.len_bytes()];
        for (layout, verify) in [(SignLayout::Rows, Verify::Always), (SignLayout::Strips, Verify::Never)] {
            is_refused(file.read_block_bytes_in(0, 1, layout, verify, bytes, &mut || {}).unwrap_err());
        }
    };
    let (ends, entries) = (15, 15 + 4);
    for size in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY, f16::NEG_ONE, f16::NEG_ZERO] {
        refused("size 14 of a list of spikes is", &|words| words[14] = size.to_bits());
    }
    refused("spikes up to the end of a tile, at least must be 3, got 2", &|words| {
        (words[ends], words[ends + 2]) = (3, 2);
    });
    refused("entries of a list of spikes must be 65540, got 4", &|words| words[ends + 3] = 1);
    refused("entries of a list of spikes must be 4, got 3", &|words| words.truncate(entries + 3)); // one is missing
    refused("entries of a list of spikes must be 4, got 0", &|words| words.truncate(entries)); // all are
    refused("entries of a list of spikes must be 4, got 5", &|words| words.push(0)); // one that no tile has
    refused("entry 3 of a list of spikes has no place in a 70 x 40 weight", &|words| words[entries + 3] += 1); // row 70
    refused("entry 3 of a list of spikes has no place in a 70 x 40 weight", &|words| words[entries + 3] += 1 << 6); // column 40
    refused("entry 2 of a list of spikes has no place", &|words| words[entries + 2] |= 63); // a bridge in row 127
}

#[test]
fn other_files_are_not_taken_for_stacks() {
    check_bytes("the header is incomplete: it needs 8 bytes, the file has 0", b"");
    check_bytes("the header is incomplete: it needs 8 bytes, the file has 3", b"GGU");
    check_bytes("not a .bitstack file", b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0");
    check_bytes("not a .bitstack file", &[0xff; 100]);
    check_bytes("not a .bitstack file", &seal(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, &[0]));
    check_text("not a .bitstack file", |text| text.replacen("bitstack", "pt", 1));
}

#[test]
fn other_versions_are_named() {
    for version in ["2", "0", "10", "", "1.0"] {
        let text = |text: &str| text.replacen("\"version\":\"1\"", &format!("\"version\":\"{version}\""), 1);
        check_text(&format!("format version {version:?}; this program reads version \"1\""), text);
    }
}

#[test]
fn wrong_header_lengths_are_rejected() {
    let file = samples::file();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap());
    let with = |length: u64| [&length.to_le_bytes(), &file[8..]].concat();
    check_bytes("the header is 100000001 bytes; the limit is 100000000", &with(100_000_001));
    check_bytes("the header is 18446744073709551615 bytes", &with(u64::MAX));
    check_bytes("must be a multiple of 64", &with(length + 1));
    check_bytes("must be a multiple of 64", &with(0));
    check_bytes("must be a multiple of 64", &with(56)); // aligned, but without room for the fixed part
    check_bytes("the header is incomplete", &with(99_999_992));
    check_bytes("the header is damaged", &with(length - 64));
    let limits = Limits { header_bytes: length - 1, ..Limits::default() };
    assert!(matches!(StackFile::open_with(&file[..], &limits), Err(FormatError::LimitExceeded { .. })));
    let limits = Limits { header_bytes: length, ..Limits::default() };
    assert!(StackFile::open_with(&file[..], &limits).is_ok());
}

#[test]
fn headers_that_are_not_of_the_right_form_are_rejected() {
    check_text("the header is malformed", |text| text[..text.len() - 1].to_owned());
    check_text("trailing characters", |text| format!("{text}}}"));
    // Nesting deep enough to overrun a stack that followed it.
    check_text("expected u64", |text| text.replacen("\"shape\":", &format!("\"shape\":{}", "[".repeat(100_000)), 1));
    let deep = format!(r#"\"x\":{}"#, "[".repeat(100_000));
    check_text("metadata field \"weights\"", |text| text.replacen(r#"\"kind\""#, &format!(r#"{deep},\"kind\""#), 1));
    check_text("__metadata__ stands twice", |text| format!("{},\"__metadata__\":{{}}}}", &text[..text.len() - 1]));
    check_text("\"order\" stands twice", |text| text.replacen("\"order\":", "\"order\":\"[]\",\"order\":", 1));
    check_text("duplicate field `shape`", |text| text.replacen("\"shape\":", "\"shape\":[1],\"shape\":", 1));
    check_text("unknown field", |text| text.replacen("\"shape\":", "\"\\u001b[2J\":", 1));
    check_text("missing field `dtype`", |text| text.replacen("\"dtype\":\"U8\",", "", 1));
    check_text("invalid type", |text| text.replacen("\"blake3\":\"", "\"x\":7,\"blake3\":\"", 1));
    check_text("at most 8 dimensions", |text| text.replacen("\"shape\":[", "\"shape\":[1,1,1,1,1,1,1,1,", 1));
    check_text("invalid value", |text| text.replacen("\"shape\":[", "\"shape\":[-", 1));
    check_text("invalid type: floating point", |text| text.replacen("\"shape\":[", "\"shape\":[1.5,", 1));
    check_text("number out of range", |text| text.replacen("\"shape\":[", "\"shape\":[1e999,", 1));
    check_text("header_blake3 does not follow", |text| text.replacen("\"header_blake3\"", "\"header-blake3\"", 1));
    let file = samples::file();
    let text = header_text(&file);
    let at = text.find("sample").unwrap();
    // Not UTF-8, with the right hash: sealed by hand.
    let mut bytes = seal(text, &[]);
    bytes[8 + at] = 0xff;
    let hash_at = 8 + text.find("header_blake3\":\"").unwrap() + 16;
    bytes[hash_at..hash_at + 64].fill(b'0');
    let hash = blake3::hash(&bytes).to_hex();
    bytes[hash_at..hash_at + 64].copy_from_slice(hash.as_bytes());
    check_bytes("the header is malformed", &bytes);
}

#[test]
fn metadata_that_is_missing_or_wrong_is_rejected() {
    for field in ["weights", "order", "blake3"] {
        check(&format!("metadata field \"{field}\": it is missing"), |f| drop(f.metadata.shift_remove(field)));
    }
    check("metadata field \"weights\": invalid type", |f| f.weights = json!({}));
    check("metadata field \"weights\": invalid type", |f| f.weights[0]["rows"] = json!("3"));
    check("metadata field \"weights\": missing field `name`", |f| f.weights[0] = json!({}));
    check("metadata field \"weights\": missing field `kind`", |f| f.weights[0] = json!({"name": "x"}));
    for field in ["rows", "cols", "rank", "method", "n_blocks"] {
        check(&format!("weight {Q} has no {field}"), |f| {
            f.weights[0].as_object_mut().unwrap().shift_remove(field);
        });
    }
    check("stored in blocks of kind \"codebook\"", |f| f.weights[1] = json!({"name": "x", "kind": "codebook"}));
    check("rank 0", |f| f.weights[0]["rank"] = json!(0));
    check("0 x 9", |f| f.weights[0]["rows"] = json!(0));
    check("3 x 18446744073709551615", |f| f.weights[0]["cols"] = json!(u64::MAX));
    check("4294967296 x 4294967296", |f| {
        (f.weights[0]["rows"], f.weights[0]["cols"]) = (json!(1u64 << 32), json!(1u64 << 32));
    });
    check("control characters", |f| f.weights[0]["method"] = json!("\u{1b}[2J"));
    check("it is empty", |f| f.weights[0]["name"] = json!(""));
    check("are reserved", |f| f.weights[0]["name"] = json!("file/x"));
    check("taken for pads", |f| f.weights[0]["name"] = json!("pad"));
    check("has n_blocks 4, and 3 blocks in the load order", |f| f.weights[0]["n_blocks"] = json!(4));
    check("which has 2", |f| f.weights[0]["n_blocks"] = json!(2));
    check("there is no weight", |f| f.weights = json!([]));

    check("metadata field \"order\"", |f| f.order = json!("x"));
    check("metadata field \"order\"", |f| f.order = json!([-1]));
    check("metadata field \"order\"", |f| f.order = json!([1u64 << 32]));
    check("position 0: weight 2 of 2", |f| f.order[0] = json!(2));
    check("position 1: weight 1 comes again", |f| f.order = json!([1, 1, 0, 0, 0]));
    check("0 blocks are fewer than one for each", |f| f.order = json!([]));
    check("position 4: block 3 of weight 1, which has 2", |f| f.order = json!([1, 0, 0, 1, 1]));

    check("0 digits for 31 tensors", |f| f.metadata["blake3"] = json!(""));
    check("character 0 is not a lower-case hexadecimal digit", |f| {
        let digits = f.metadata["blake3"].as_str().unwrap();
        f.metadata["blake3"] = json!(format!("A{}", &digits[1..]));
    });
}

#[test]
fn tensors_that_are_not_in_their_place_are_rejected() {
    let signs = &format!("{Q}.block.1.signs");
    let set = |name: &str, field: &'static str, value: serde_json::Value| {
        let name = name.to_owned();
        move |f: &mut Forge| f.tensor(&name)[field] = value
    };
    let shaped = |name: &str, shape: serde_json::Value| {
        let name = name.to_owned();
        move |f: &mut Forge| {
            f.tensor(&name)["shape"] = shape;
            f.lay_out();
        }
    };
    // Types and shapes.
    check("dtype is F64, expected U8, I8, U16, F16, BF16 or F32", set(signs, "dtype", json!("F64")));
    check("dtype is I8, expected U8", set(signs, "dtype", json!("I8")));
    check("dtype is I8, expected F32 or F16 or BF16", |f| {
        *f.tensor("norm.weight") = json!({"dtype": "I8", "shape": [3]});
        f.lay_out();
    });
    check(&format!("tensor {signs}: shape is [2, 3], expected [3, 2]"), set(signs, "shape", json!([2, 3])));
    check("the number of elements is 0", set(signs, "shape", json!([3, 0])));
    check("the number of bytes is", set(signs, "shape", json!([u32::MAX, u32::MAX, u32::MAX])));
    check("expected one dimension", shaped("file/config.json", json!([1, 23])));
    for (name, shape) in [
        (format!("{Q}.block.1.v"), json!([1, 9])),
        (format!("{Q}.block.1.u"), json!([3, 1, 1])),
        (format!("{Q}.block.1.u"), json!([3])),
        (format!("{Q}.block.2.u_scale"), json!([2, 1])),
        (format!("{Q}.block.3.v_scale"), json!([3])),
        (format!("{Q}.block.1.spikes"), json!([1, 20])),
        (format!("{Q}.block.1.spikes"), json!([16])), // 15 sizes and the end of one tile take 17
        (format!("{Q}.block.1.spikes"), json!([])),
    ] {
        check(&format!("tensor {name}: shape is"), shaped(&name, shape));
    }
    check("brings coefficients for 2 planes; it must be 1 (additive) or 3 (refitted)", |f| {
        f.tensor(&format!("{Q}.block.3.u"))["shape"] = json!([3, 2, 2]);
        f.lay_out();
    });
    check(&format!("tensor {Q}.block.1.spikes: dtype is F16, expected U16"), |f| {
        f.tensor(&format!("{Q}.block.1.spikes"))["dtype"] = json!("F16");
    });
    check(&format!("block 2 of weight {Q}: block 2 has a list of spikes; only block 1 has one"), |f| {
        let at = f.position(&format!("{Q}.block.2.u_scale"));
        f.tensors.insert(at + 1, (format!("{Q}.block.2.spikes"), json!({"dtype": "U16", "shape": [17]})));
        f.lay_out();
    });
    check(&format!("expected tensor {Q}.block.2.signs, found {Q}.block.1.spikes"), |f| {
        let at = f.position(&format!("{Q}.block.1.spikes"));
        let spikes = f.tensors[at].clone();
        f.tensors.insert(at, (format!("{Q}.block.1.spikes"), spikes.1));
        f.tensors[at + 1].0 = format!("{Q}.block.1.spikes ");
        f.lay_out();
    });
    check("the first block of a stack has no basis", |f| {
        let at = f.position(&format!("{Q}.block.1.v"));
        f.tensors.remove(at);
        f.lay_out();
    });

    // Offsets: holes, overlaps, backwards, beyond all numbers.
    let at = Forge::new(&samples::file()).tensor(signs)["data_offsets"][0].as_u64().unwrap();
    check(
        &format!("the first data offset is {}, expected {at}", at + 1),
        set(signs, "data_offsets", json!([at + 1, at + 7])),
    );
    check(&format!("the first data offset is 0, expected {at}"), set(signs, "data_offsets", json!([0, 6])));
    check(&format!("the second data offset is {}", at + 7), set(signs, "data_offsets", json!([at, at + 7])));
    check("the second data offset is 0", set(signs, "data_offsets", json!([at, 0])));
    check("the second data offset is 18446744073709551615", set(signs, "data_offsets", json!([at, u64::MAX])));
    check("expected within a file of 2^63 - 1 bytes", |f| {
        let last = f.tensors.len() - 1;
        let (_, t) = &mut f.tensors[last];
        let begin = t["data_offsets"][0].as_u64().unwrap();
        let n = u64::MAX - 1024;
        *t = json!({"dtype": "U8", "shape": [n], "data_offsets": [begin, begin + n]});
    });

    // Names and places.
    check("the name file/config.json is taken twice", |f| f.tensors[1].0 = "file/config.json".to_owned());
    check("must be 1 to 255 letters", |f| f.tensors[0].0 = "file/../config.json".to_owned());
    check("must be 1 to 255 letters", |f| f.tensors[0].0 = "file/".to_owned());
    check("control characters", |f| f.tensors[0].0 = "file/\u{1b}".to_owned());
    check("the name lm_head.weight is taken twice", |f| {
        let at = f.position("norm.weight");
        f.tensors[at].0 = "lm_head.weight".to_owned();
    });
    check("expected tensor layers.0.q_proj.weight.block.1.signs, found", |f| {
        let at = f.position(signs);
        f.tensors[at].0 = "x".to_owned();
    });
    check("expected tensor lm_head.weight.block.2.signs, found layers.0.q_proj.weight.block.2.signs", |f| {
        f.order = json!([0, 1, 0, 1, 0]);
        f.weights.as_array_mut().unwrap().swap(0, 1);
        (f.weights[0]["n_blocks"], f.weights[1]["n_blocks"]) = (json!(3), json!(2));
    });
    check("found the end of the header", |f| {
        f.tensors.pop();
        f.lay_out();
    });
    check("expected tensor no more, found extra", |f| {
        f.tensors.push(("extra".to_owned(), json!({"dtype": "U8", "shape": [1]})));
        f.lay_out();
    });

    // Pads: named by counting, exactly as long as needed, and only where needed.
    check("expected tensor pad.0, found pad.70", |f| {
        let at = f.position("pad.0");
        f.tensors[at].0 = "pad.70".to_owned();
    });
    check("tensor pad.0: shape is", shaped("pad.0", json!([1])));
    check("expected tensor pad.0, found norm.weight", |f| {
        let at = f.position("pad.0");
        f.tensors.remove(at);
        f.lay_out();
    });
    check("expected tensor file/tokenizer.json, found pad.90", |f| {
        f.tensors.insert(1, ("pad.90".to_owned(), json!({"dtype": "U8", "shape": [1]})));
        f.lay_out();
    });
    check("found pad.x", |f| {
        f.tensors.push(("pad.x".to_owned(), json!({"dtype": "U8", "shape": [1]})));
        f.lay_out();
    });
}

/// A source as large as it says, with nothing but zeros after its first bytes.
#[derive(Debug)]
struct Hollow(Vec<u8>, u64);

impl ReadAt for Hollow {
    fn size_bytes(&self) -> std::io::Result<u64> {
        Ok(self.1)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> std::io::Result<()> {
        assert!(
            offset_bytes + buf.len() as u64 <= self.0.len() as u64,
            "nothing but the header is read to open a file"
        );
        self.0.read_exact_at(buf, offset_bytes)
    }
}

#[test]
fn a_huge_tensor_is_not_allocated_for_and_may_be_refused() {
    let mut forge = Forge::new(&samples::file());
    // Block 1 of a weight of 2^20 x 2^20 takes 128 GiB.
    let side = 1 << 20;
    forge.weights = json!([
        {"name": "w", "kind": "sign", "rows": side, "cols": side, "rank": 1, "method": "avd", "n_blocks": 1}
    ]);
    forge.order = json!([0]);
    let mut offset = 0u64;
    let mut tensor = |name: &str, dtype: &str, shape: &[u64], bytes: u64| {
        let n = shape.iter().product::<u64>() * bytes;
        let t = json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + n]});
        offset += n;
        (format!("w.block.1.{name}"), t)
    };
    forge.tensors = vec![
        tensor("signs", "U8", &[1 << 20, 1 << 17], 1),
        tensor("v", "F16", &[1, 1 << 20], 2),
        tensor("u", "F16", &[1 << 20, 1, 1], 2),
    ];
    forge.metadata["blake3"] = json!("0".repeat(3 * 64));
    forge.data = Vec::new();
    let header = forge.bytes();
    let size = header.len() as u64 + offset;
    let needed = in_one_line(&StackFile::open(&header[..]).unwrap_err());
    assert!(needed.contains("the limit is 68719476736"), "{needed}");
    let limits = Limits { tensor_bytes: u64::MAX, ..Limits::default() };
    let error = StackFile::open_with(&header[..], &limits).unwrap_err();
    assert!(matches!(error, FormatError::CutTooShort { needed, .. } if needed == size), "{error}");
    let file = StackFile::open_with(Hollow(header, size), &limits).unwrap();
    assert_eq!(file.block_sizes(), [[(1 << 37) + (1 << 22)]]);
}
