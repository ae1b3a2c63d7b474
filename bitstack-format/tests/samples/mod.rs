//! Small stacks with every feature of the format, and a forge that makes files no writer would write.
#![allow(dead_code, reason = "every test file uses its own part of this")]

use bitstack_core::{
    Basis, Block, Coefficients, FactorType, SPIKE_SIZES, Shape, SignMatrix, Spike, Spikes, Values, f16,
};
use bitstack_format::{Draft, Dtype, FormatError};
use serde_json::{Map, Value, json};

/// Small numbers that look random, the same on every machine.
pub(crate) struct Numbers(pub(crate) u32);

impl Numbers {
    pub(crate) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 16
    }

    /// A multiple of 1/64 in -4..4: exact in f16.
    pub(crate) fn half(&mut self) -> f16 {
        f16::from_f32((self.next() % 512) as f32 / 64.0 - 4.0)
    }

    pub(crate) fn values(&mut self, factor: FactorType, n_values: usize, n_vectors: usize) -> Values {
        match factor {
            FactorType::F16 => Values::F16((0..n_values).map(|_| self.half()).collect()),
            FactorType::I8 => Values::I8 {
                codes: (0..n_values).map(|_| self.next() as i8).collect(),
                scales: (0..n_vectors).map(|_| self.half()).collect(),
            },
            FactorType::Scales => Values::Scales((0..n_vectors).map(|_| self.half()).collect()),
        }
    }
}

/// What a block is to be like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Like {
    pub(crate) planes: usize,
    pub(crate) basis: Option<FactorType>,
    pub(crate) coefficients: FactorType,
    pub(crate) spikes: bool,
}

pub(crate) fn block(shape: Shape, rank: usize, like: Like, numbers: &mut Numbers) -> Block {
    let (rows, cols) = (shape.rows(), shape.cols());
    let signs: Vec<f32> = (0..rows * cols).map(|_| numbers.next() as f32 - 32768.0).collect();
    Block {
        signs: SignMatrix::from_f32(rows, cols, &signs).unwrap(),
        basis: like.basis.map(|t| Basis::new(rank, cols, numbers.values(t, rank * cols, rank)).unwrap()),
        coefficients: {
            let vectors = like.planes * rank;
            let values = numbers.values(like.coefficients, rows * vectors, vectors);
            Coefficients::new(rows, like.planes, rank, values).unwrap()
        },
        // From numbers of their own: a block without them is otherwise the same.
        spikes: like.spikes.then(|| spikes(shape, &mut Numbers(numbers.0))),
    }
}

/// Up to seven spikes, some perhaps at one place.
pub(crate) fn spikes(shape: Shape, numbers: &mut Numbers) -> Spikes {
    let sizes: [f16; SPIKE_SIZES] = std::array::from_fn(|i| f16::from_f32(3.0 + i as f32));
    let n = numbers.next() % 8;
    let entries: Vec<Spike> = (0..n)
        .map(|_| {
            let [row, col] = [shape.rows(), shape.cols()].map(|n| numbers.next() as usize % n);
            let size = 1 + (numbers.next() % 15) as i8;
            Spike { row, col, size: if numbers.next().is_multiple_of(2) { size } else { -size } }
        })
        .collect();
    Spikes::encode(shape, sizes, &entries).unwrap()
}

/// A weight of a sample: name, shape, rank, blocks.
pub(crate) type Weight = (&'static str, Shape, usize, Vec<Block>);

/// Two weights with every kind of block: f16 and 8-bit factors, own and shared bases, additive and refitted coefficients, with and without
/// spikes, odd sizes.
pub(crate) fn weights() -> Vec<Weight> {
    use FactorType::{F16, I8};
    let mut numbers = Numbers(1);
    let mut weight = |name, rows, cols, rank, likes: &[Like]| {
        let shape = Shape::new(rows, cols).unwrap();
        (name, shape, rank, likes.iter().map(|&like| block(shape, rank, like, &mut numbers)).collect())
    };
    vec![
        weight(
            "layers.0.q_proj.weight",
            3,
            9,
            2,
            &[
                Like { planes: 1, basis: Some(F16), coefficients: F16, spikes: true },
                Like { planes: 2, basis: None, coefficients: I8, spikes: false },
                Like { planes: 1, basis: Some(I8), coefficients: F16, spikes: false },
            ],
        ),
        weight(
            "lm_head.weight",
            5,
            7,
            1,
            &[
                Like { planes: 1, basis: Some(I8), coefficients: I8, spikes: false },
                Like { planes: 2, basis: None, coefficients: F16, spikes: false },
            ],
        ),
    ]
}

/// The load order of the sample: every first block, then the rest.
pub(crate) const ORDER: [u32; 5] = [1, 0, 0, 1, 0];

pub(crate) const CONFIG: &[u8] = b"{\"model_type\":\"sample\"}\n";
pub(crate) const TOKENIZER: &[u8] = b"{\"version\":\"1.0\"}";

/// One step of making a draft.
pub(crate) type Step<'a> = &'a dyn Fn(&mut Draft) -> Result<(), FormatError>;

/// Puts the sample into a draft step by step, each step taken by `attempt`.
pub(crate) fn fill(draft: &mut Draft, attempt: &mut dyn FnMut(&mut Draft, Step<'_>) -> Result<(), FormatError>) {
    fill_with(weights(), draft, attempt);
}

fn fill_with(
    weights: Vec<Weight>,
    draft: &mut Draft,
    attempt: &mut dyn FnMut(&mut Draft, Step<'_>) -> Result<(), FormatError>,
) {
    draft.set_provenance("source", "a sample \"model\"\n").unwrap();
    draft.set_provenance("options", "--blocks 3").unwrap();
    attempt(draft, &|d| d.push_file("config.json", CONFIG)).unwrap();
    attempt(draft, &|d| d.push_file("tokenizer.json", TOKENIZER)).unwrap();
    let norm: Vec<u8> = [1.0f32, -2.5, 0.125].iter().flat_map(|x| x.to_le_bytes()).collect();
    attempt(draft, &|d| d.push_base("norm.weight", Dtype::F32, &[3], &norm)).unwrap();
    let bias = [0x80, 0x3f, 0, 0x40, 0x40, 0x40];
    attempt(draft, &|d| d.push_base("layers.0.q_proj.bias", Dtype::BF16, &[3, 1], &bias)).unwrap();
    for (name, shape, rank, blocks) in weights {
        let w = draft.add_weight(name, shape, rank, "avd").unwrap();
        for block in &blocks {
            attempt(draft, &|d| d.push_block(w, block.view())).unwrap();
        }
    }
}

/// The sample as a draft.
pub(crate) fn draft() -> Draft {
    let mut draft = Draft::create_on(Vec::new(), "memory");
    fill(&mut draft, &mut |draft, step| step(draft));
    draft
}

/// The bytes of the sample in its load order.
pub(crate) fn file() -> Vec<u8> {
    let mut bytes = Vec::new();
    draft().finish(&ORDER, &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

/// The sample without its spikes, as it was before there were any.
pub(crate) fn file_without_spikes() -> Vec<u8> {
    let mut weights = weights();
    weights.iter_mut().flat_map(|(_, _, _, blocks)| blocks).for_each(|block| block.spikes = None);
    let mut draft = Draft::create_on(Vec::new(), "memory");
    fill_with(weights, &mut draft, &mut |draft, step| step(draft));
    let mut bytes = Vec::new();
    draft.finish(&ORDER, &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

/// One weight of 1 x 1 at rank 1, with one block, worth +1 · 2 · 0.5.
pub(crate) fn smallest() -> Vec<u8> {
    let one = |x: f32| Values::F16(vec![f16::from_f32(x)]);
    let mut draft = Draft::create_on(Vec::new(), "memory");
    let w = draft.add_weight("w", Shape::new(1, 1).unwrap(), 1, "avd").unwrap();
    let block = Block {
        signs: SignMatrix::from_f32(1, 1, &[1.0]).unwrap(),
        basis: Some(Basis::new(1, 1, one(2.0)).unwrap()),
        coefficients: Coefficients::new(1, 1, 1, one(0.5)).unwrap(),
        spikes: None,
    };
    draft.push_block(w, block.view()).unwrap();
    let mut bytes = Vec::new();
    draft.finish(&[0], &mut bytes, &mut |_, _| {}).unwrap();
    bytes
}

/// Where the data of a file begins.
pub(crate) fn data_offset(file: &[u8]) -> usize {
    8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize
}

/// The header's text without its padding.
pub(crate) fn header_text(file: &[u8]) -> &str {
    std::str::from_utf8(&file[8..data_offset(file)]).unwrap().trim_end()
}

/// Where the data of a file begins if its length is to be believed.
pub(crate) fn data_offset_of(file: &[u8]) -> usize {
    let length = u64::from_le_bytes(*file.first_chunk().unwrap());
    usize::try_from(length.saturating_add(8)).unwrap_or(usize::MAX)
}

/// A file around any header text: padded, and with the right hash of the header, so that what is wrong with it is found later.
pub(crate) fn seal(text: &str, data: &[u8]) -> Vec<u8> {
    seal_bytes(text.as_bytes(), data)
}

/// [`seal`] for what may not be text.
pub(crate) fn seal_bytes(header: &[u8], data: &[u8]) -> Vec<u8> {
    const FIELD: &str = "\"header_blake3\":\"";
    let mut text = header.to_vec();
    while !(8 + text.len()).is_multiple_of(64) {
        text.push(b' ');
    }
    let length = (text.len() as u64).to_le_bytes();
    let at = text.windows(FIELD.len()).position(|w| w == FIELD.as_bytes()).map(|at| at + FIELD.len());
    if let Some(at) = at.filter(|at| at + 64 <= text.len()) {
        let digits = at..at + 64;
        text[digits.clone()].fill(b'0');
        let hash = blake3::Hasher::new().update(&length).update(&text).finalize();
        text[digits].copy_from_slice(hash.to_hex().as_bytes());
    }
    [&length[..], &text, data].concat()
}

/// The bytes of a tensor in a header, if its type and shape say.
fn len_bytes(tensor: &Value) -> Option<u64> {
    let bytes = match tensor.get("dtype")?.as_str()? {
        "U8" | "I8" => 1,
        "U16" | "F16" | "BF16" => 2,
        "F32" => 4,
        _ => return None,
    };
    tensor.get("shape")?.as_array()?.iter().try_fold(bytes, |n: u64, d| n.checked_mul(d.as_u64()?))
}

/// A file taken apart, to be changed and put together again.
pub(crate) struct Forge {
    pub(crate) metadata: Map<String, Value>,
    pub(crate) weights: Value,
    pub(crate) order: Value,
    pub(crate) tensors: Vec<(String, Value)>,
    pub(crate) data: Vec<u8>,
}

impl Forge {
    pub(crate) fn new(file: &[u8]) -> Self {
        let mut header: Map<String, Value> = serde_json::from_str(header_text(file)).unwrap();
        let Some(Value::Object(metadata)) = header.shift_remove("__metadata__") else { panic!("no metadata") };
        let parse = |field: &str| serde_json::from_str(metadata[field].as_str().unwrap()).unwrap();
        Self {
            weights: parse("weights"),
            order: parse("order"),
            metadata,
            tensors: header.into_iter().collect(),
            data: file[data_offset(file)..].to_vec(),
        }
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Value {
        &mut self.tensors.iter_mut().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}")).1
    }

    pub(crate) fn position(&self, name: &str) -> usize {
        self.tensors.iter().position(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Puts the tensors one after another, as long as their shapes and types say, and makes hashes and data as long.
    pub(crate) fn lay_out(&mut self) {
        assert!(self.try_lay_out(), "{:?}", self.tensors);
    }

    /// [`Forge::lay_out`], if every tensor has a type, a shape, and less than 1 MiB; else nothing is changed.
    pub(crate) fn try_lay_out(&mut self) -> bool {
        let mut tensors = self.tensors.clone();
        let mut offset = 0;
        for (_, t) in &mut tensors {
            let Some(len) = len_bytes(t).filter(|&len| len < 1 << 20) else { return false };
            t["data_offsets"] = json!([offset, offset + len]);
            offset += len;
        }
        self.tensors = tensors;
        self.data.resize(offset as usize, 0);
        self.metadata["blake3"] = json!("0".repeat(64 * self.tensors.len()));
        true
    }

    /// Sets the hash of a tensor right.
    pub(crate) fn rehash(&mut self, name: &str) {
        let [begin, end] = [0, 1].map(|i| self.tensor(name)["data_offsets"][i].as_u64().unwrap() as usize);
        let hash = blake3::hash(&self.data[begin..end]).to_hex();
        let position = self.position(name);
        let mut hashes = self.metadata["blake3"].as_str().unwrap().to_owned();
        hashes.replace_range(64 * position..64 * (position + 1), &hash);
        self.metadata["blake3"] = json!(hashes);
    }

    /// The header's text.
    pub(crate) fn text(&self) -> String {
        let mut metadata = self.metadata.clone();
        for (field, value) in [("weights", &self.weights), ("order", &self.order)] {
            if metadata.contains_key(field) {
                metadata[field] = json!(value.to_string());
            }
        }
        let mut text = format!("{{\"__metadata__\":{}", Value::Object(metadata));
        for (name, tensor) in &self.tensors {
            text += &format!(",{}:{tensor}", json!(name));
        }
        text + "}"
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        seal(&self.text(), &self.data)
    }
}
