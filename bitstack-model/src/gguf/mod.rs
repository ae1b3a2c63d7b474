//! A GGUF file as a model directory: its metadata become the directory's small files, its tensors get the names and the order of rows that they have
//! there. So one reader of configs, with all that it refuses, serves both.

mod config;
mod tokenizer;

use crate::{Elements, ModelError};
use bitstack_gguf::{BlockType, Gguf, GgufError, Limits, MAGIC, TensorInfo};
use bitstack_io::ReadAt;
use bitstack_io::hostile::printable;
use half::f16;
use half::slice::HalfFloatSliceExt;
use serde_json::json;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Where the tensor is that lends its place to the head: none has this name of its own.
const HEAD: &str = "output.weight";
const EMBEDDING: &str = "token_embd.weight";
/// Factors of the rotary wavelengths, which the metadata do not have: [`config::llama3`].
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Names within a layer: here, and in a directory. Where a name stands twice, the first is that of models with norms behind their parts.
const PARTS: [(&str, &str); 14] = [
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The metadata of a file, and what was found out about its tensors.
#[derive(Debug)]
pub(crate) struct Source {
    path: PathBuf,
    gguf: Gguf,
    config_text: String,
    /// Whatever the user should know.
    pub(crate) remarks: Vec<String>,
}

/// By what a tensor's elements differ from those in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Differs {
    /// By nothing.
    Not,
    /// The rows of so many heads have their two halves interleaved, as the first release of Llama had: row 2 i + j of a head here is its row
    /// j · size / 2 + i there.
    Interleaved(usize),
    /// They are factors, where a directory has differences from 1 (Gemma).
    PlusOne,
}

/// A tensor with its name in a directory.
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) differs: Differs,
    pub(crate) tensor: TensorInfo,
}

/// Whether a file begins as a GGUF file does.
pub(crate) fn is_gguf(head: &[u8]) -> bool {
    head.starts_with(&MAGIC)
}

impl Source {
    /// Reads the header, makes the config, names the tensors.
    ///
    /// # Errors
    /// A file that is malformed, an architecture or a key that is not known here, a tensor that no model of the architecture has.
    pub(crate) fn open(path: &Path, file: &dyn ReadAt, limit: u64) -> Result<(Self, Vec<Named>), ModelError> {
        let broken = |source| ModelError::Gguf { path: path.to_owned(), source };
        let gguf = Gguf::read(file, &Limits::default().header_bytes(limit)).map_err(broken)?;
        let tensor = |name: &str| gguf.tensors().iter().find(|tensor| tensor.name == name);
        let mut remarks = Vec::new();
        let mut tensors: Vec<&TensorInfo> =
            gguf.tensors().iter().filter(|tensor| tensor.name != ROPE_FACTORS).collect();
        // Converters of tied models may store the matrix twice, at two precisions.
        let twins = match (tensor(EMBEDDING), tensor(HEAD)) {
            (Some(a), Some(b)) if same_matrix(file, a, b).map_err(broken)? => Some([a, b]),
            _ => None,
        };
        let mut embedding = EMBEDDING;
        if let Some([a, b]) = twins {
            let (better, worse) = if b.kind.code_bits() > a.kind.code_bits() { (b, a) } else { (a, b) };
            tensors.retain(|tensor| tensor.name != worse.name);
            embedding = &better.name;
            remarks.push(format!(
                "{EMBEDDING} ({}) and {HEAD} ({}) are one matrix, up to quantisation; {embedding} serves as both",
                a.kind.name(),
                b.kind.name()
            ));
        }
        let keys = config::Keys::new(path, &gguf)?;
        let factors = tensor(ROPE_FACTORS).map(|tensor| read_f32(file, tensor).map_err(broken)).transpose()?;
        let config = keys.config(twins.is_some() || tensor(HEAD).is_none(), factors.as_deref())?;
        let named = tensors.iter().map(|tensor| {
            let name = if tensor.name == embedding {
                Some("model.embed_tokens.weight".into())
            } else {
                name_of(&tensor.name, keys.has_post_norms())
            };
            let name = name.ok_or_else(|| ModelError::GgufKey {
                path: path.to_owned(),
                key: format!("tensor {}", printable(&tensor.name)),
                found: "there".to_owned(),
                expected: format!("only tensors that a model of architecture {} has", keys.architecture()),
            })?;
            Ok(Named { differs: keys.differs(&name), name, tensor: (*tensor).clone() })
        });
        let named = named.collect::<Result<Vec<_>, ModelError>>()?;
        let quantised: BTreeSet<&str> =
            named.iter().map(|n| n.tensor.kind).filter(|kind| !kind.is_float()).map(BlockType::name).collect();
        if !quantised.is_empty() {
            let kinds = quantised.into_iter().collect::<Vec<_>>().join(", ");
            remarks.insert(0, format!("quantised already ({kinds}): the model is that, not its original"));
        }
        let config_text = format!("{:#}\n", json!(config));
        Ok((Self { path: path.to_owned(), gguf, config_text, remarks }, named))
    }

    pub(crate) fn config_text(&self) -> &str {
        &self.config_text
    }

    /// A file that a directory would have, made of the metadata; `None` where they have nothing for it.
    ///
    /// # Errors
    /// A tokenizer that is malformed, or of a kind that is not known here.
    pub(crate) fn companion(&self, name: &str) -> Result<Option<Vec<u8>>, ModelError> {
        let text = |key: &str| self.gguf.get(key).and_then(|value| value.as_str());
        Ok(match name {
            "tokenizer.json" => tokenizer::json(&self.path, &self.gguf)?,
            "tokenizer_config.json" => tokenizer::config(&self.gguf),
            "chat_template.jinja" => text("tokenizer.chat_template").map(|template| template.as_bytes().to_vec()),
            _ => None,
        })
    }

    /// Whether [`companion`](Self::companion) has a file of this name, without making it.
    pub(crate) fn has_companion(&self, name: &str) -> bool {
        match name {
            "config.json" => true,
            "tokenizer.json" | "tokenizer_config.json" => tokenizer::is_there(&self.gguf),
            "chat_template.jinja" => self.gguf.get("tokenizer.chat_template").is_some(),
            _ => false,
        }
    }
}

/// The name in a directory of a tensor; `None` where there is none.
fn name_of(name: &str, has_post_norms: bool) -> Option<String> {
    match name {
        HEAD => return Some("lm_head.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        _ => {}
    }
    let mut parts = name.strip_prefix("blk.")?.split('.');
    let (layer, part, kind) = (parts.next()?, parts.next()?, parts.next()?);
    let is_plain = parts.next().is_none() && matches!(kind, "weight" | "bias");
    let layer: usize = layer.parse().ok().filter(|n: &usize| is_plain && n.to_string() == layer)?;
    let parts = if has_post_norms { &PARTS[..] } else { &PARTS[3..] };
    let (_, part) = parts.iter().find(|(here, _)| *here == part)?;
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

/// Elements that are worked on at once: whole blocks of every type.
const PIECE_ELEMENTS: usize = 1 << 16;

/// Reads `out.len()` elements from element `first` on, both whole blocks.
///
/// # Errors
/// A read that fails; elements that are not whole blocks.
pub(crate) fn read_halves(
    file: &dyn ReadAt,
    kind: BlockType,
    offset_bytes: u64,
    first: usize,
    out: &mut [f16],
) -> Result<(), GgufError> {
    let mut offset = offset_bytes + (first / kind.block_elements() * kind.block_bytes()) as u64;
    let mut bytes = Vec::new();
    let mut wide = vec![0.0; out.len().min(PIECE_ELEMENTS)];
    for piece in out.chunks_mut(PIECE_ELEMENTS) {
        bytes.resize(piece.len() / kind.block_elements() * kind.block_bytes(), 0);
        file.read_exact_at(&mut bytes, offset)?;
        offset += bytes.len() as u64;
        let wide = &mut wide[..piece.len()];
        kind.dequantize(&bytes, wide)?;
        piece.convert_from_f32_slice(wide);
    }
    Ok(())
}

/// All elements of a small tensor.
fn read_f32(file: &dyn ReadAt, tensor: &TensorInfo) -> Result<Vec<f32>, GgufError> {
    const MOST: u64 = 1 << 16;
    let mut bytes = vec![0; tensor.len_bytes.min(MOST) as usize];
    file.read_exact_at(&mut bytes, tensor.offset_bytes)?;
    bytes.truncate(bytes.len() / tensor.kind.block_bytes() * tensor.kind.block_bytes());
    let mut values = vec![0.0; bytes.len() / tensor.kind.block_bytes() * tensor.kind.block_elements()];
    tensor.kind.dequantize(&bytes, &mut values)?;
    Ok(values)
}

/// Whether two tensors are one matrix at two precisions: of 64 rows, the relative squared difference is within what quantising both may do,
/// (2.5 · 2^-bits)² each, twice what ggml's quantisers do to Gaussian rows. Of different matrices it is about 2.
fn same_matrix(file: &dyn ReadAt, a: &TensorInfo, b: &TensorInfo) -> Result<bool, GgufError> {
    const ROWS: usize = 64;
    const MOST_COLS: usize = 1 << 17;
    let [n_rows, n_cols] = a.shape[..] else { return Ok(false) };
    if a.shape != b.shape || n_cols > MOST_COLS {
        return Ok(false);
    }
    let row = |tensor: &TensorInfo, row: usize| {
        let bytes = n_cols / tensor.kind.block_elements() * tensor.kind.block_bytes();
        let (mut blocks, mut values) = (vec![0; bytes], vec![0.0_f32; n_cols]);
        file.read_exact_at(&mut blocks, tensor.offset_bytes + row as u64 * bytes as u64)?;
        tensor.kind.dequantize(&blocks, &mut values)?;
        Ok::<_, GgufError>(values)
    };
    let (mut difference, mut norm) = (0.0, 0.0);
    let count = n_rows.min(ROWS);
    for i in 0..count {
        let at = (i as u128 * n_rows as u128 / count as u128) as usize;
        for (x, y) in row(a, at)?.into_iter().zip(row(b, at)?) {
            difference += f64::from(x - y).powi(2);
            norm += f64::from(x).powi(2).max(f64::from(y).powi(2));
        }
    }
    let allowed = |tensor: &TensorInfo| (2.5 * 0.5_f64.powi(tensor.kind.code_bits() as i32)).powi(2);
    Ok(difference <= (allowed(a) + allowed(b)) * norm)
}

impl Differs {
    /// Some of a tensor's elements as a directory has them, from all of them: `n_rows` rows of any length, of interleaved heads a multiple of twice
    /// their number.
    pub(crate) fn undone(self, all: Elements, n_rows: usize, range: Range<usize>) -> Elements {
        match (self, all) {
            (Self::Not, all) => all,
            (Self::Interleaved(heads), Elements::F32(v)) => Elements::F32(halves(&v, n_rows, heads)[range].to_vec()),
            (Self::Interleaved(heads), Elements::F16(v)) => Elements::F16(halves(&v, n_rows, heads)[range].to_vec()),
            (Self::Interleaved(heads), Elements::Bf16(v)) => Elements::Bf16(halves(&v, n_rows, heads)[range].to_vec()),
            (Self::PlusOne, all) => Elements::F32(all.into_f32()[range].iter().map(|factor| factor - 1.0).collect()),
        }
    }
}

fn halves<T: Copy>(values: &[T], n_rows: usize, n_heads: usize) -> Vec<T> {
    let (cols, head) = (values.len() / n_rows, n_rows / n_heads);
    let row = |row: usize| {
        let (start, within) = (row / head * head, row % head);
        let (half, pair) = (within / (head / 2), within % (head / 2));
        &values[(start + 2 * pair + half) * cols..][..cols]
    };
    (0..n_rows).flat_map(|r| row(r).iter().copied()).collect()
}
