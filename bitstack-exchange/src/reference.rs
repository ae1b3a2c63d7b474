//! Checkpoints of the published implementation of BitStack (arXiv 2410.23918): reading them into a stack.
//!
//! Such a checkpoint is an ordinary model directory in which every linear layer of the decoder is a stack of additive blocks, counted
//! from 0, instead of a weight:
//!
//! | tensor | dtype | shape | here |
//! | --- | --- | --- | --- |
//! | `<linear>.qweight_<i>` | U8 | `[ceil(rows * cols / 8)]` | signs of block i + 1, in the bit order of [`SignMatrix::from_reference_bytes`] |
//! | `<linear>.u_<i>` | F16 | `[rows, rank]` | its coefficients |
//! | `<linear>.vt_<i>` | F16 | `[rank, cols]` | its basis |
//!
//! Everything else (norms, biases, embedding, head) is stored as it is. Activation scales were divided out of the norm or linear layer in
//! front before it was stored, so nothing here has to know of them. `compression_config.json` lists the sizes at which the model can be
//! loaded, from the smallest to the largest, each with its bytes and the blocks of every linear, named `layer.<n>.<module>`: that is the
//! load order. Where it is missing, `reduced_ppl_average.json` has the measurements from which it is made.

use crate::ExchangeError;
use bitstack_core::{Basis, Block, Coefficients, CoreError, Shape, SignMatrix, Values};
use bitstack_engine::{EngineError, stack};
use bitstack_format::{BlockSource, Draft, FormatError};
use bitstack_io::hostile::plain_json;
use bitstack_model::{Checkpoint, CheckpointLimits, ModelConfig, ModelError, Progress, WeightSpec};
use bitstack_sort::{Balanced, LoadOrder, Scores, Sizes, Sorter};
use serde::de::{DeserializeSeed, Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// The sizes at which a checkpoint can be loaded.
pub(crate) const CONFIGS: &str = "compression_config.json";
/// The measurements from which they were made.
pub(crate) const MEASUREMENTS: &str = "reduced_ppl_average.json";
/// The parts of a block, by the ends of their names.
pub(crate) const SIGNS: &str = "qweight";
pub(crate) const COEFFICIENTS: &str = "u";
pub(crate) const BASIS: &str = "vt";

/// The name of a part of a block, `block` from 0.
pub(crate) fn part_name(weight: &str, part: &str, block: usize) -> String {
    format!("{weight}.{part}_{block}")
}

/// A weight's name in the order files: `layer.3.mlp.up_proj` for `model.layers.3.mlp.up_proj`; `None` outside the layers.
pub(crate) fn layer_name(weight: &str) -> Option<String> {
    Some(format!("layer.{}", weight.strip_prefix("model.layers.")?))
}

/// A checkpoint of another layout as a stack, ready to be written: `draft.finish(order.weights(), ..)`.
#[derive(Debug)]
pub struct Imported {
    /// Blocks, unstacked tensors and companion files.
    pub draft: Draft,
    /// The order of the blocks.
    pub order: LoadOrder,
}

/// Reads a checkpoint of the published implementation.
///
/// The blocks are the same bits in the order of this project; they go to a scratch file in the directory `scratch`, one at a time. The
/// load order is that of the checkpoint. Blocks beyond its largest listed size come last, level by level. Tensors that are neither the model's nor parts of blocks
/// are let be where their names match one of the patterns `ignored`, as in [`Checkpoint::open_ignoring`].
///
/// # Errors
/// What can be wrong with a model directory, tensors that are left over among it; blocks with missing parts, of wrong types or shapes, or with values that are not finite;
/// [`ExchangeError::NoOrder`], [`ExchangeError::BadOrder`] and [`ModelError::Json`] for an order that is missing or does not fit the blocks; failures to
/// write the scratch file.
pub fn import(
    dir: impl AsRef<Path>,
    ignored: &[String],
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<Imported, ExchangeError> {
    let dir = dir.as_ref();
    let mut draft = Draft::create_in(scratch)?;
    let checkpoint = Checkpoint::open_headers(dir, &CheckpointLimits::default())?;
    let config = checkpoint.config();
    let specs = config.weights();
    let n_blocks = count_blocks(&checkpoint, config)?;

    let stacked: Vec<&WeightSpec> = specs.iter().filter(|s| s.layer.is_some()).collect();
    let plain = config.other_tensors().iter().map(|v| (v.name.clone(), vec![v.len]));
    let outer = specs.iter().filter(|s| s.layer.is_none()).map(|s| (s.tensor_name(), vec![s.rows, s.cols]));
    let whole: Vec<_> = plain.chain(outer).collect();
    let mut used: HashSet<String> = whole.iter().map(|(name, _)| name.clone()).collect();
    // A dense checkpoint has no blocks, and everything in it would be left over.
    for spec in &stacked {
        checkpoint.shape(&part_name(&spec.name, BASIS, 0))?;
    }
    // Parts of what is no weight of the model were refused when they were counted.
    used.extend(checkpoint.tensor_names().filter(|name| part_of(name).is_some()).map(str::to_owned));
    checkpoint.check_used(&used, ignored)?;

    for (name, contents) in checkpoint.companions()? {
        draft.push_file(&name, &contents)?;
    }
    let measurements =
        checkpoint.has_companion(MEASUREMENTS)?.then(|| checkpoint.companion(MEASUREMENTS)).transpose()?;
    if let Some(measurements) = &measurements {
        draft.push_file(MEASUREMENTS, measurements)?;
    }
    for (name, shape) in whole {
        let (dtype, data) = stack::stored(&checkpoint.elements(&name, &shape)?);
        draft.push_base(&name, dtype, &shape, &data)?;
    }
    progress.stage("read (blocks)", n_blocks.iter().map(|&n| n as u64).sum());
    for (spec, &n_blocks) in stacked.iter().zip(&n_blocks) {
        let in_weight = |source| EngineError::Weight { name: spec.name.clone(), source };
        let shape = Shape::new(spec.rows, spec.cols).map_err(in_weight)?;
        let basis = part_name(&spec.name, BASIS, 0);
        // At least 1, so that a basis without rows is an error about its shape.
        let rank = checkpoint.shape(&basis)?.first().map_or(1, |&rank| rank.max(1));
        let weight = draft.add_weight(&spec.name, shape, rank, "avd")?;
        for block in 0..n_blocks {
            draft.push_block(weight, read_block(&checkpoint, spec, shape, rank, block)?.view())?;
            progress.advance(1);
        }
    }

    let sizes = Sizes::new(draft.base_bytes(), draft.block_sizes())?;
    let names: HashMap<String, usize> =
        stacked.iter().enumerate().filter_map(|(i, s)| Some((layer_name(&s.name)?, i))).collect();
    let order = if checkpoint.has_companion(CONFIGS)? {
        LoadOrder::from_weights(&listed_order(&dir.join(CONFIGS), &names, &n_blocks)?, &sizes)?
    } else if let Some(measurements) = &measurements {
        let scores = measured_scores(&dir.join(MEASUREMENTS), measurements, &names, &n_blocks)?;
        Balanced { scores }.order(&sizes)?
    } else {
        return Err(ExchangeError::NoOrder { dir: dir.to_owned() });
    };
    Ok(Imported { draft, order })
}

/// The weight and the block, from 0, that a tensor is a part of.
fn part_of(name: &str) -> Option<(&str, u32)> {
    let (weight, part) = name.rsplit_once('.')?;
    let (SIGNS | COEFFICIENTS | BASIS, block) = part.rsplit_once('_')? else { return None };
    Some((weight, block.parse().ok()?))
}

/// The number of blocks of every weight in a layer: up to the last of which any part is there.
fn count_blocks(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Vec<usize>, ExchangeError> {
    let mut found: HashMap<&str, usize> = HashMap::new();
    for name in checkpoint.tensor_names() {
        let Some((weight, block)) = part_of(name) else { continue };
        let n = found.entry(weight).or_default();
        *n = (*n).max(block as usize + 1);
    }
    let stacked = config.weights().into_iter().filter(|s| s.layer.is_some());
    // One without blocks fails where its first is read.
    let n_blocks = stacked.map(|s| found.remove(s.name.as_str()).unwrap_or(1)).collect();
    match found.into_keys().min() {
        Some(stray) => Err(EngineError::StrayWeight { name: stray.to_owned() }.into()),
        None => Ok(n_blocks),
    }
}

/// Reads block `block` (from 0) of a weight.
fn read_block(
    checkpoint: &Checkpoint,
    spec: &WeightSpec,
    shape: Shape,
    rank: usize,
    block: usize,
) -> Result<Block, ExchangeError> {
    let (rows, cols) = (shape.rows(), shape.cols());
    let part = |part| part_name(&spec.name, part, block);
    let signs = checkpoint.bytes(&part(SIGNS), shape.n_elems().div_ceil(8))?;
    let basis = checkpoint.halves(&part(BASIS), &[rank, cols])?;
    let coefficients = checkpoint.halves(&part(COEFFICIENTS), &[rows, rank])?;
    let build = || {
        Ok(Block {
            signs: SignMatrix::from_reference_bytes(rows, cols, &signs)
                .map_err(|source| CoreError::Signs { shape, source })?,
            basis: Some(Basis::new(rank, cols, Values::F16(basis))?),
            coefficients: Coefficients::new(rows, 1, rank, Values::F16(coefficients))?,
            spikes: None,
        })
    };
    build().map_err(|source| FormatError::Block { weight: spec.name.clone(), block: block + 1, source }.into())
}

/// The load order of `compression_config.json`, as indices of weights. It is read one size at a time: that of a large model has hundreds
/// of megabytes.
fn listed_order(path: &Path, names: &HashMap<String, usize>, n_blocks: &[usize]) -> Result<Vec<u32>, ExchangeError> {
    let file = File::open(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
    let mut ascent = Ascent { names, n_blocks, levels: vec![0; n_blocks.len()], memory: 0, order: Vec::new() };
    let mut json = serde_json::Deserializer::from_reader(BufReader::new(file));
    let read = ascent.deserialize(&mut json).and_then(|()| json.end());
    read.map_err(|source| ModelError::Json { file: path.display().to_string(), source })?;
    if ascent.order.is_empty() {
        return Err(ExchangeError::BadOrder { path: path.to_owned(), reason: "it lists no size".to_owned() });
    }
    ascent.rise(n_blocks);
    Ok(ascent.order)
}

/// One of the sizes at which a checkpoint can be loaded.
#[derive(Deserialize)]
struct Listed {
    memory: u64,
    layers: HashMap<String, usize>,
}

/// The way from no blocks to all of them.
struct Ascent<'a> {
    names: &'a HashMap<String, usize>,
    n_blocks: &'a [usize],
    /// Blocks of every weight so far, and the bytes that the file says they take.
    levels: Vec<usize>,
    memory: u64,
    order: Vec<u32>,
}

impl Ascent<'_> {
    /// Goes up to a listed size.
    fn step(&mut self, size: &Listed) -> Result<(), String> {
        if size.memory < self.memory {
            return Err(format!("a size of {} bytes after one of {}; they must rise", size.memory, self.memory));
        }
        self.memory = size.memory;
        let mut target = vec![0; self.levels.len()];
        for (name, &level) in &size.layers {
            let Some(&weight) = self.names.get(name) else {
                return Err(format!("{name:?} is no layer of the model"));
            };
            let (least, most) = (self.levels[weight].max(1), self.n_blocks[weight]);
            if level < least || level > most {
                return Err(format!("{level} blocks of {name}, expected {least} to {most}"));
            }
            target[weight] = level;
        }
        if let Some(weight) = target.iter().position(|&level| level == 0) {
            let name = self.names.iter().find(|(_, w)| **w == weight).map_or("", |(name, _)| name);
            return Err(format!("the size of {} bytes does not say how many blocks {name} has", size.memory));
        }
        self.rise(&target);
        Ok(())
    }

    /// Goes up to these levels, by one block of every weight that is not there yet, again and again.
    fn rise(&mut self, target: &[usize]) {
        let mut left = true;
        while std::mem::take(&mut left) {
            for (weight, level) in self.levels.iter_mut().enumerate().filter(|(w, level)| **level < target[*w]) {
                self.order.push(weight as u32);
                *level += 1;
                left |= *level < target[weight];
            }
        }
    }
}

impl<'de> DeserializeSeed<'de> for &mut Ascent<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for &mut Ascent<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of sizes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sizes: A) -> Result<(), A::Error> {
        while let Some(size) = sizes.next_element()? {
            self.step(&size).map_err(A::Error::custom)?;
        }
        Ok(())
    }
}

/// What `reduced_ppl_average.json` says: at every level, the perplexity with one block more of each weight.
#[derive(Deserialize)]
struct Measured {
    reduced_ppl: Vec<MeasuredLevel>,
}

#[derive(Deserialize)]
struct MeasuredLevel {
    /// Blocks of all other weights.
    bit: usize,
    ppls: Vec<MeasuredLayer>,
}

#[derive(Deserialize)]
struct MeasuredLayer {
    layer: String,
    /// `None` stands for NaN.
    ppl: Option<f64>,
}

/// The scores of `reduced_ppl_average.json`, whose text this is, one for each block; NaN where nothing was measured.
fn measured_scores(
    path: &Path,
    text: &[u8],
    names: &HashMap<String, usize>,
    n_blocks: &[usize],
) -> Result<Scores, ExchangeError> {
    let measured: Measured = serde_json::from_slice(&plain_json(text))
        .map_err(|source| ModelError::Json { file: path.display().to_string(), source })?;
    let bad = |reason| ExchangeError::BadOrder { path: path.to_owned(), reason };
    let mut scores: Vec<Vec<f64>> = n_blocks.iter().map(|&n| vec![f64::NAN; n]).collect();
    for MeasuredLevel { bit, ppls } in measured.reduced_ppl {
        for MeasuredLayer { layer, ppl } in ppls {
            let weight = *names.get(&layer).ok_or_else(|| bad(format!("{layer:?} is no layer of the model")))?;
            let n = n_blocks[weight];
            if bit == 0 || bit >= n {
                return Err(bad(format!("a perplexity of {layer} beyond {bit} blocks, of which it has {n}")));
            }
            scores[weight][bit] = ppl.unwrap_or(f64::NAN);
        }
    }
    Ok(Scores::new(scores))
}
