//! The shape of a decoder, from a Hugging Face `config.json`, and the list of tensors that follows from it.

use serde_json::{Map, Value};

use crate::ModelError;
use bitstack_format::hostile::printable;

const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM";

/// Limits on what a config may claim. They are far above every published model of these families, and low enough
/// that the product of any two fits in 64 bits and a typing error is caught before memory is asked for.
mod limit {
    pub(super) const HIDDEN: usize = 1 << 17;
    pub(super) const INTERMEDIATE: usize = 1 << 20;
    pub(super) const LAYERS: usize = 1 << 10;
    pub(super) const HEADS: usize = 1 << 12;
    pub(super) const HEAD_DIM: usize = 1 << 12;
    pub(super) const VOCAB: usize = 1 << 22;
    pub(super) const VOCAB_PARTS: usize = 64;
    pub(super) const POSITIONS: usize = 1 << 24;
}

/// A family of decoders with the same arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// Llama 2, 3, 3.1 and later text models.
    Llama,
    /// Mistral, with or without a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3 (dense): RMS norm of every query and key head.
    Qwen3,
}

/// Frequencies of the rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Scaling of the long wavelengths, as in Llama 3.1 (`rope_type` `llama3`).
    pub scaling: Option<Llama3Scaling>,
}

/// Parameters of the Llama 3.1 scaling of rotary frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Long wavelengths are stretched by this factor.
    pub factor: f64,
    /// Wavelengths above `original_positions / low_freq_factor` are stretched in full.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_positions / high_freq_factor` are left alone.
    pub high_freq_factor: f64,
    /// Context length of the training before the extension.
    pub original_positions: f64,
}

/// Which linear layers add a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// Query, key and value projections.
    pub qkv: bool,
    /// The attention's output projection.
    pub output: bool,
    /// Gate, up and down projections.
    pub mlp: bool,
}

/// Everything about a model that decides its arithmetic; read by [`ModelConfig::from_json`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated feed-forward part.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Size of one head; even.
    pub head_dim: usize,
    /// Number of tokens the embedding and the head know.
    pub vocab_size: usize,
    /// Rows of the embedding, and of the head, that are one weight: `vocab_size` where they are whole. See [`ModelConfig::cut_vocabulary`].
    pub vocab_part_rows: usize,
    /// Largest number of positions.
    pub max_positions: usize,
    /// Added to the mean square inside every RMS norm.
    pub norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Per layer, how many positions (its own included) a token attends to; `None` = all before it.
    pub windows: Vec<Option<usize>>,
    /// Whether the head is the embedding matrix.
    pub tied: bool,
    /// Which linear layers have biases.
    pub biases: Biases,
    /// Whether every query and key head goes through an RMS norm of its own.
    pub qk_norm: bool,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// What a weight matrix does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightRole {
    /// Token embedding: its rows are looked up. With tied embeddings it is the head as well.
    Embedding,
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Output projection of the attention.
    AttentionOutput,
    /// Gate of the feed-forward part.
    Gate,
    /// Up projection.
    Up,
    /// Down projection.
    Down,
    /// Output head, where it is not the embedding.
    Head,
}

/// One weight matrix of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightSpec {
    /// Name as in a Hugging Face checkpoint, without the trailing `.weight`; of a part, with `.rows.` and its first row.
    pub name: String,
    /// Its first row in the tensor of the checkpoint: 0 but for parts.
    pub first_row: usize,
    /// Output features.
    pub rows: usize,
    /// Rows of the tensor.
    pub tensor_rows: usize,
    /// Input features.
    pub cols: usize,
    /// What it does.
    pub role: WeightRole,
    /// The layer it belongs to; `None` for embedding and head.
    pub layer: Option<usize>,
}

impl WeightSpec {
    /// Name of the tensor in a checkpoint.
    pub fn tensor_name(&self) -> String {
        let name = match self.role {
            WeightRole::Embedding => EMBEDDING,
            WeightRole::Head => HEAD,
            _ => &self.name,
        };
        format!("{name}.weight")
    }

    /// Shape of the tensor in a checkpoint.
    pub fn tensor_shape(&self) -> [usize; 2] {
        [self.tensor_rows, self.cols]
    }
}

/// One vector of a model that is never stacked: a norm's weight or a bias.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VectorSpec {
    /// Full tensor name as in a checkpoint.
    pub name: String,
    /// Number of elements.
    pub len: usize,
}

/// Weights of one layer; their indices in [`ModelConfig::weights`] are consecutive, in this order.
const LAYER_WEIGHTS: [(&str, WeightRole); 7] = [
    ("self_attn.q_proj", WeightRole::Query),
    ("self_attn.k_proj", WeightRole::Key),
    ("self_attn.v_proj", WeightRole::Value),
    ("self_attn.o_proj", WeightRole::AttentionOutput),
    ("mlp.gate_proj", WeightRole::Gate),
    ("mlp.up_proj", WeightRole::Up),
    ("mlp.down_proj", WeightRole::Down),
];

/// Weights of one layer: q, k, v, o, gate, up, down.
pub const WEIGHTS_PER_LAYER: usize = LAYER_WEIGHTS.len();

const EMBEDDING: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";
/// Between the name of a weight that is cut and the first row of a part.
const PART: &str = ".rows.";

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// Malformed JSON, an architecture or rotary scaling that is not supported, a missing field, or a value out of range;
    /// each names the field and the value.
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        let json = parse_object(text, "config.json")?;
        let fields = Fields(&json);
        let architecture = fields.architecture()?;
        if fields.get("quantization_config").is_some() {
            return Err(bad("quantization_config", "present", "a checkpoint of f32, f16 or bf16 weights"));
        }

        let hidden_size = fields.dimension("hidden_size", limit::HIDDEN)?;
        let intermediate_size = fields.dimension("intermediate_size", limit::INTERMEDIATE)?;
        let n_layers = fields.dimension("num_hidden_layers", limit::LAYERS)?;
        let n_heads = fields.dimension("num_attention_heads", limit::HEADS)?;
        let n_kv_heads = match fields.get("num_key_value_heads") {
            // The other families' defaults are numbers of one particular model, so there the field must be given.
            None if architecture == Architecture::Llama => n_heads,
            _ => fields.dimension("num_key_value_heads", limit::HEADS)?,
        };
        if n_heads % n_kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads ({n_heads})");
            return Err(bad("num_key_value_heads", n_kv_heads, expected));
        }
        let head_dim = match fields.get("head_dim") {
            Some(_) => fields.dimension("head_dim", limit::HEAD_DIM)?,
            None if architecture == Architecture::Qwen3 => 128,
            None if hidden_size % n_heads == 0 => hidden_size / n_heads,
            None => {
                let expected = format!("a divisor of hidden_size ({hidden_size}) where head_dim is not given");
                return Err(bad("num_attention_heads", n_heads, expected));
            }
        };
        if head_dim % 2 != 0 {
            return Err(bad("head_dim", head_dim, "an even number, for rotary positions"));
        }
        let vocab_size = fields.dimension("vocab_size", limit::VOCAB)?;
        let max_positions = fields.dimension("max_position_embeddings", limit::POSITIONS)?;
        let norm_eps = fields.number("rms_norm_eps", 1e-6, 0.0, 1.0)? as f32;

        match fields.get("hidden_act").map(|v| v.as_str()) {
            None | Some(Some("silu")) => {}
            Some(_) => return Err(fields.bad("hidden_act", "\"silu\"")),
        }
        if fields.number("partial_rotary_factor", 1.0, 0.0, 1.0)? != 1.0 {
            return Err(fields.bad("partial_rotary_factor", "1"));
        }

        let attention_bias = fields.flag("attention_bias")?;
        let biases = match architecture {
            Architecture::Llama => {
                Biases { qkv: attention_bias, output: attention_bias, mlp: fields.flag("mlp_bias")? }
            }
            Architecture::Mistral => Biases::default(),
            Architecture::Qwen2 => Biases { qkv: true, output: false, mlp: false },
            Architecture::Qwen3 => Biases { qkv: attention_bias, output: attention_bias, mlp: false },
        };

        Ok(Self {
            architecture,
            hidden_size,
            intermediate_size,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab_size,
            vocab_part_rows: vocab_size,
            max_positions,
            norm_eps,
            rope: fields.rope()?,
            windows: fields.windows(architecture, n_layers)?,
            tied: fields.flag("tie_word_embeddings")?,
            biases,
            qk_norm: architecture == Architecture::Qwen3,
            eos_tokens: fields.eos_tokens()?,
        })
    }

    /// Adds the end tokens of a `generation_config.json`, which for chat models names more of them than `config.json`.
    ///
    /// # Errors
    /// Malformed JSON, or end tokens that are not token ids.
    pub fn add_generation_config(&mut self, text: &str) -> Result<(), ModelError> {
        let json = parse_object(text, "generation_config.json")?;
        for token in Fields(&json).eos_tokens()? {
            if !self.eos_tokens.contains(&token) {
                self.eos_tokens.push(token);
            }
        }
        Ok(())
    }

    /// Width of all query heads together.
    pub fn query_size(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_size(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Cuts the embedding and the head into parts by rows, each a weight of its own: 16 where the vocabulary is large.
    ///
    /// Tokenizers number their tokens in the order in which they were merged, so the first tokens are frequent and the last rare: of the
    /// tokens of English text, the first twelfth of a vocabulary of 49152 is 77 %, the last .5 %. A part counts as much as its tokens are
    /// frequent, for what is looked up and for what is predicted; so rare tokens have fewer blocks, and sizes of the model lie
    /// closer together.
    #[must_use]
    pub fn cut_vocabulary(mut self) -> Self {
        const MOST_PARTS: usize = 16;
        /// Fewer rows are not worth a basis of their own.
        const LEAST_ROWS: usize = 2048;
        /// What codes are made of at a time.
        const TILE_ROWS: usize = 64;
        let rows = self.vocab_size.div_ceil(MOST_PARTS).next_multiple_of(TILE_ROWS).max(LEAST_ROWS);
        self.vocab_part_rows = rows.min(self.vocab_size);
        self
    }

    /// Weights that the embedding is cut into.
    pub fn vocab_parts(&self) -> usize {
        self.vocab_size.div_ceil(self.vocab_part_rows)
    }

    /// The vocabulary cut as it is in a model whose weights have these names: those of a stack say how it was cut when the stack was made.
    #[must_use]
    pub fn cut_as<'n>(mut self, names: impl Iterator<Item = &'n str>) -> Self {
        // The second part says how long the first is. Parts of any other length have names that no weight of the model has.
        let part = |name: &str| name.strip_prefix(EMBEDDING)?.strip_prefix(PART)?.parse::<usize>().ok();
        let rows = names.filter_map(part).filter(|first| *first > 0).min();
        if let Some(rows) =
            rows.filter(|rows| *rows < self.vocab_size && self.vocab_size.div_ceil(*rows) <= limit::VOCAB_PARTS)
        {
            self.vocab_part_rows = rows;
        }
        self
    }

    /// Every weight matrix in forward order: the embedding, seven per layer (q, k, v, o, gate, up, down), and the head
    /// unless it is tied; embedding and head in parts where they are cut. The position in this list is the weight's index everywhere: in
    /// decoders, in compressions.
    pub fn weights(&self) -> Vec<WeightSpec> {
        let (hidden, q, kv, inner) = (self.hidden_size, self.query_size(), self.kv_size(), self.intermediate_size);
        let shapes =
            [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)];
        let outer = |name: &'static str, role| {
            (0..self.vocab_size).step_by(self.vocab_part_rows).map(move |first_row| WeightSpec {
                name: if self.vocab_parts() > 1 { format!("{name}{PART}{first_row}") } else { name.to_owned() },
                first_row,
                rows: self.vocab_part_rows.min(self.vocab_size - first_row),
                tensor_rows: self.vocab_size,
                cols: hidden,
                role,
                layer: None,
            })
        };
        let mut weights = Vec::with_capacity(self.n_layers * WEIGHTS_PER_LAYER + 2 * self.vocab_parts());
        weights.extend(outer(EMBEDDING, WeightRole::Embedding));
        for layer in 0..self.n_layers {
            for ((part, role), (rows, cols)) in LAYER_WEIGHTS.into_iter().zip(shapes) {
                weights.push(WeightSpec {
                    name: format!("model.layers.{layer}.{part}"),
                    first_row: 0,
                    rows,
                    tensor_rows: rows,
                    cols,
                    role,
                    layer: Some(layer),
                });
            }
        }
        if !self.tied {
            weights.extend(outer(HEAD, WeightRole::Head));
        }
        weights
    }

    /// Every tensor that is not a weight matrix: norms and biases, layer by layer, then the final norm.
    pub fn other_tensors(&self) -> Vec<VectorSpec> {
        let mut vectors = Vec::new();
        for layer in 0..self.n_layers {
            let mut push =
                |part: &str, len| vectors.push(VectorSpec { name: format!("model.layers.{layer}.{part}"), len });
            push("input_layernorm.weight", self.hidden_size);
            if self.biases.qkv {
                push("self_attn.q_proj.bias", self.query_size());
                push("self_attn.k_proj.bias", self.kv_size());
                push("self_attn.v_proj.bias", self.kv_size());
            }
            if self.qk_norm {
                push("self_attn.q_norm.weight", self.head_dim);
                push("self_attn.k_norm.weight", self.head_dim);
            }
            if self.biases.output {
                push("self_attn.o_proj.bias", self.hidden_size);
            }
            push("post_attention_layernorm.weight", self.hidden_size);
            if self.biases.mlp {
                push("mlp.gate_proj.bias", self.intermediate_size);
                push("mlp.up_proj.bias", self.intermediate_size);
                push("mlp.down_proj.bias", self.hidden_size);
            }
        }
        vectors.push(VectorSpec { name: "model.norm.weight".to_owned(), len: self.hidden_size });
        vectors
    }
}

fn parse_object(text: &str, file: &str) -> Result<Map<String, Value>, ModelError> {
    serde_json::from_str(text).map_err(|source| ModelError::Json { file: file.to_owned(), source })
}

fn bad(field: &'static str, found: impl ToString, expected: impl Into<String>) -> ModelError {
    ModelError::BadField { field, found: printable(&found.to_string()), expected: expected.into() }
}

/// Typed access to the fields of a JSON object; `null` counts as absent, as in the Python library.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|v| !v.is_null())
    }

    fn bad(&self, field: &'static str, expected: impl Into<String>) -> ModelError {
        bad(field, self.get(field).unwrap_or(&Value::Null), expected)
    }

    fn dimension(&self, field: &'static str, max: usize) -> Result<usize, ModelError> {
        let value = self.get(field).ok_or(ModelError::MissingField { field })?;
        match value.as_u64() {
            Some(n) if n >= 1 && n <= max as u64 => Ok(n as usize),
            _ => Err(self.bad(field, format!("a whole number from 1 to {max}"))),
        }
    }

    /// A number above `min` and at most `max`; `default` where the field is absent.
    fn number(&self, field: &'static str, default: f64, min: f64, max: f64) -> Result<f64, ModelError> {
        let Some(value) = self.get(field) else { return Ok(default) };
        match value.as_f64() {
            Some(x) if x > min && x <= max => Ok(x),
            _ => Err(self.bad(field, format!("a number above {min} and at most {max}"))),
        }
    }

    fn required_number(&self, field: &'static str, max: f64) -> Result<f64, ModelError> {
        self.get(field).ok_or(ModelError::MissingField { field })?;
        self.number(field, 0.0, 0.0, max)
    }

    fn flag(&self, field: &'static str) -> Result<bool, ModelError> {
        match self.get(field) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(field, "true or false")),
        }
    }

    fn architecture(&self) -> Result<Architecture, ModelError> {
        let class = self.get("architectures").and_then(|v| v.get(0)).and_then(Value::as_str);
        let found = class.or_else(|| self.get("model_type").and_then(Value::as_str));
        match found {
            Some("LlamaForCausalLM" | "llama") => Ok(Architecture::Llama),
            Some("MistralForCausalLM" | "mistral") => Ok(Architecture::Mistral),
            Some("Qwen2ForCausalLM" | "qwen2") => Ok(Architecture::Qwen2),
            Some("Qwen3ForCausalLM" | "qwen3") => Ok(Architecture::Qwen3),
            Some(other) => Err(ModelError::UnknownArchitecture { found: printable(other), supported: SUPPORTED }),
            None => Err(ModelError::MissingField { field: "architectures" }),
        }
    }

    /// `rope_theta` and `rope_scaling`, or the newer `rope_parameters` which holds both.
    fn rope(&self) -> Result<RopeConfig, ModelError> {
        const MAX_THETA: f64 = 1e12;
        let outer_theta = self.number("rope_theta", 10_000.0, 0.0, MAX_THETA)?;
        let field = if self.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        let Some(value) = self.get(field) else { return Ok(RopeConfig { theta: outer_theta, scaling: None }) };
        let inner = Fields(value.as_object().ok_or_else(|| self.bad(field, "an object"))?);
        let theta = inner.number("rope_theta", outer_theta, 0.0, MAX_THETA)?;
        let kind = inner.get("rope_type").or_else(|| inner.get("type"));
        let scaling = match kind.map(|v| v.as_str()) {
            None | Some(Some("default")) => None,
            Some(Some("llama3")) => {
                let scaling = Llama3Scaling {
                    factor: inner.required_number("factor", 1e6)?,
                    low_freq_factor: inner.required_number("low_freq_factor", 1e6)?,
                    high_freq_factor: inner.required_number("high_freq_factor", 1e6)?,
                    original_positions: inner
                        .required_number("original_max_position_embeddings", limit::POSITIONS as f64)?,
                };
                if scaling.high_freq_factor <= scaling.low_freq_factor {
                    let expected = format!("more than low_freq_factor ({})", scaling.low_freq_factor);
                    return Err(inner.bad("high_freq_factor", expected));
                }
                Some(scaling)
            }
            Some(_) => return Err(bad("rope_type", kind.unwrap_or(&Value::Null), "\"default\" or \"llama3\"")),
        };
        Ok(RopeConfig { theta, scaling })
    }

    /// The attention window of each layer. Mistral has one for all; Qwen only where `use_sliding_window` is set, from
    /// layer `max_window_layers` on; `layer_types`, where given, says it layer by layer.
    fn windows(&self, architecture: Architecture, n_layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
        let window = match architecture {
            Architecture::Llama => None,
            Architecture::Qwen2 | Architecture::Qwen3 if !self.flag("use_sliding_window")? => None,
            _ if self.get("sliding_window").is_none() => None,
            _ => Some(self.dimension("sliding_window", limit::POSITIONS)?),
        };
        if let Some(types) = self.get("layer_types") {
            let expected = format!("a list of {n_layers} times \"full_attention\" or \"sliding_attention\"");
            let types = types.as_array().filter(|t| t.len() == n_layers);
            let types = types.ok_or_else(|| self.bad("layer_types", expected.clone()))?;
            return types
                .iter()
                .map(|kind| match kind.as_str() {
                    Some("full_attention") => Ok(None),
                    Some("sliding_attention") => Ok(window),
                    _ => Err(bad("layer_types", kind, expected.clone())),
                })
                .collect();
        }
        let first = match architecture {
            Architecture::Qwen2 | Architecture::Qwen3 if window.is_some() => match self.get("max_window_layers") {
                None => 28,
                Some(value) => value.as_u64().ok_or_else(|| self.bad("max_window_layers", "a whole number"))?,
            },
            _ => 0,
        };
        Ok((0..n_layers).map(|layer| window.filter(|_| layer as u64 >= first)).collect())
    }

    /// `eos_token_id`: one id, a list, or nothing.
    fn eos_tokens(&self) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|n| u32::try_from(n).ok());
            id.ok_or_else(|| self.bad("eos_token_id", "a token id or a list of them"))
        };
        match self.get("eos_token_id") {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }
}
