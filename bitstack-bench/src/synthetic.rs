//! Models of a given shape with random planes: what is needed to measure speed and memory, without the model.
//!
//! Time and memory do not depend on what the weights are, only on how many there are. Text from such a model is noise.

use std::path::Path;

use bitstack_core::{BasisRef, BlockRef, CoefficientsRef, Shape, SignView, ValuesRef, f16};
use bitstack_engine::EngineError;
use bitstack_format::{BlockSource, Draft, Dtype};
use bitstack_io::{Existing, write_atomically};
use bitstack_model::{ModelConfig, Progress};
use bitstack_pack::row_bytes;
use serde_json::json;

use crate::random::SplitMix;

/// The shape of a Llama model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelShape {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Whether the head is the embedding matrix.
    pub tied: bool,
}

impl ModelShape {
    /// Llama 3.1 8B: 8.03e9 weights.
    pub const LLAMA_8B: Self = Self {
        hidden_size: 4096,
        intermediate_size: 14336,
        n_layers: 32,
        n_heads: 32,
        n_kv_heads: 8,
        vocab_size: 128_256,
        tied: false,
    };

    /// Llama 3.2 1B: 1.24e9 weights.
    pub const LLAMA_1B: Self = Self {
        hidden_size: 2048,
        intermediate_size: 8192,
        n_layers: 16,
        n_heads: 32,
        n_kv_heads: 8,
        vocab_size: 128_256,
        tied: true,
    };

    /// The `config.json` of such a model.
    pub fn config_json(&self) -> String {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
        })
        .to_string()
    }
}

/// A stack of this shape: `n_blocks` blocks per weight in the form of nested codes (one 8-bit basis, refitted 8-bit coefficients), signs
/// at random, magnitudes such that activations keep their size. The draft is in `scratch`, which needs room for it.
///
/// # Errors
/// A shape that is no model's; failures to write.
pub fn draft(
    shape: &ModelShape,
    n_blocks: usize,
    seed: u64,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<Draft, EngineError> {
    let json = shape.config_json();
    let config = ModelConfig::from_json(&json)?.cut_vocabulary();
    let mut draft = Draft::create_in(scratch)?;
    draft.push_file("config.json", json.as_bytes())?;
    for spec in config.other_tensors() {
        let ones: Vec<u8> = (0..spec.len).flat_map(|_| 1.0f32.to_le_bytes()).collect();
        draft.push_base(&spec.name, Dtype::F32, &[spec.len], &ones)?;
    }
    let specs = config.weights();
    progress.stage("random planes (blocks)", (specs.len() * n_blocks) as u64);
    let mut random = SplitMix(seed);
    for spec in &specs {
        let in_weight = |source| EngineError::Weight { name: spec.name.clone(), source };
        let shape = Shape::new(spec.rows, spec.cols).map_err(in_weight)?;
        let weight = draft.add_weight(&spec.name, shape, 1, "nested")?;
        let basis_scale = [f16::from_f32(1.0 / (127.0 * (spec.cols as f32).sqrt()))];
        let basis_codes = vec![127; spec.cols];
        let mut signs = vec![0; spec.rows * row_bytes(spec.cols)];
        for block in 1..=n_blocks {
            random.signs(&mut signs, spec.cols);
            // Plane i has half the magnitude of plane i - 1.
            let scales: Vec<f16> = (0..block).map(|plane| f16::from_f32(0.5f32.powi(plane as i32) / 127.0)).collect();
            let codes = vec![127; spec.rows * block];
            let basis = ValuesRef::I8 { codes: &basis_codes, scales: &basis_scale };
            let coefficients = ValuesRef::I8 { codes: &codes, scales: &scales };
            let block = BlockRef {
                signs: SignView::new(spec.rows, spec.cols, &signs).expect("a buffer of this shape"),
                basis: (block == 1).then(|| BasisRef::new(1, spec.cols, basis)).transpose().map_err(in_weight)?,
                coefficients: CoefficientsRef::new(spec.rows, block, 1, coefficients).map_err(in_weight)?,
                spikes: None,
            };
            draft.push_block(weight, block)?;
            progress.advance(1);
        }
    }
    Ok(draft)
}

/// Writes a `.bitstack` file: the stack of [`draft`], in a load order that goes level by level. Returns its bytes.
///
/// # Errors
/// As [`draft`]; failures to write.
pub fn write(
    path: &Path,
    existing: Existing,
    shape: &ModelShape,
    n_blocks: usize,
    seed: u64,
    progress: &dyn Progress,
) -> Result<u64, EngineError> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let draft = draft(shape, n_blocks, seed, directory, progress)?;
    let n_weights = draft.weights().len() as u32;
    let order: Vec<u32> = (0..n_blocks).flat_map(|_| 0..n_weights).collect();
    let mut done_before = None;
    let mut report = |done: u64, total: u64| {
        let before = done_before.replace(done).unwrap_or_else(|| {
            progress.stage("write (bytes)", total);
            0
        });
        progress.advance(done - before);
    };
    Ok(write_atomically(path, existing, |out| draft.finish(&order, out, &mut report))?)
}
