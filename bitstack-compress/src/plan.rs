//! What a compression depends on, and how others find out.

use crate::compress::Making;
use crate::units::{UnitStore, Units};
use crate::{CompressError, CompressOptions};
use bitstack_format::FormatError;
use bitstack_model::text::default_seq_len;
use bitstack_model::{Checkpoint, Part, Progress, WeightSpec};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Changes with whatever changes the contents of a unit for the same input, its blocks above all: a journal of another algorithm is another
/// journal.
pub(crate) const UNITS: u32 = 5;

/// The unit that says what a compression is, for those who find it in a store.
pub(crate) const PLAN: &str = "plan";
/// The unit of the text's tokens.
pub(crate) const TOKENS: &str = "tokens";
/// The most bytes of a plan that are read: hashes of some hundred thousand tensors.
const MOST_PLAN: u64 = 1 << 26;
/// [`PLAN`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Everything that the output depends on, by name: a value, or the BLAKE3 hash of one.
    pub(crate) input: Vec<(String, String)>,
    pub(crate) options: CompressOptions,
    /// Whether there is a unit [`TOKENS`].
    pub(crate) has_text: bool,
}

impl<'a> Making<'a> {
    /// A compression that somebody else planned ([`Journal::plan`](crate::Journal::plan)), from nothing but its store and the checkpoint: to do some of its jobs. Scratch
    /// files go to the directory `scratch`. The tensors of the checkpoint are hashed and must be those of the plan.
    ///
    /// # Errors
    /// [`CompressError::NoPlan`] where there is none, or one that is damaged; [`CompressError::JournalDiffers`] for another checkpoint, program version or
    /// kind of processor; failures to read the store or the checkpoint.
    pub fn open(
        store: impl UnitStore + 'static,
        checkpoint: &'a Checkpoint,
        scratch: &Path,
        progress: &'a dyn Progress,
    ) -> Result<Self, CompressError> {
        let plan = store.get(PLAN)?.ok_or(CompressError::NoPlan)?;
        let failed = |source| FormatError::Read { what: format!("unit {PLAN}"), source };
        let len = plan.size_bytes().map_err(failed)?;
        let mut bytes = vec![0; usize::try_from(len.min(MOST_PLAN)).expect("that many fit")];
        plan.read_exact_at(&mut bytes, 0).map_err(failed)?;
        let plan: Plan = serde_json::from_slice(&bytes).map_err(|_damaged| CompressError::NoPlan)?;
        let text_hash = plan.input.iter().find(|(name, _)| name == TEXT).map(|(_, hash)| hash.clone());
        let mut input = input(checkpoint, text_hash.ok_or(CompressError::NoPlan)?, &plan.options)?;
        same("the store".as_ref(), &plan.input, &input)?;
        input.extend(tensors(checkpoint, progress)?);
        same("the store".as_ref(), &plan.input, &input)?;
        let units = Units::new(store, *key(&input).as_bytes());
        let tokens = match plan.has_text {
            true => Some(units.load(TOKENS)?.ok_or(CompressError::NoPlan)?),
            false => None,
        };
        Self::new(checkpoint, tokens, &plan.options, units, scratch, progress)
    }
}

/// What the input calls the text.
const TEXT: &str = "calibration text";

/// What the input says of the text.
pub(crate) fn text_hash(text: Option<&str>) -> String {
    text.map_or("the model's own".to_owned(), |text| hex(blake3::hash(text.as_bytes())))
}

/// Everything that the output depends on, except the tensors.
pub(crate) fn input(
    checkpoint: &Checkpoint,
    text_hash: String,
    options: &CompressOptions,
) -> Result<Vec<(String, String)>, CompressError> {
    // Whoever adds an option has to add it here.
    let CompressOptions {
        method,
        spikes,
        rank,
        n_blocks,
        scaling,
        ordering,
        samples,
        seq_len,
        order_windows,
        keep_embeddings,
        seed,
    } = options;
    let or_default = |n: &Option<usize>| n.map_or("default".to_owned(), |n| n.to_string());
    let mut input = vec![
        // Architectures differ in their rounding, and in the order of bytes.
        ("program", format!("{} on {}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH)),
        ("units", UNITS.to_string()),
        ("method", method.name().to_owned()),
        ("spikes", spikes.to_string()),
        ("rank", or_default(rank)),
        ("blocks", or_default(n_blocks)),
        ("scale", format!("{scaling:?}").to_lowercase()),
        ("order", format!("{ordering:?}").to_lowercase()),
        ("samples", samples.to_string()),
        ("seq-len", seq_len.unwrap_or_else(|| default_seq_len(checkpoint.config())).to_string()),
        ("order-windows", order_windows.to_string()),
        ("keep-embeddings", keep_embeddings.to_string()),
        ("seed", seed.to_string()),
        (TEXT, text_hash),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect::<Vec<_>>();
    for (name, contents) in checkpoint.companions()? {
        input.push((name, hex(blake3::hash(&contents))));
    }
    Ok(input)
}

/// The tensors of the model: headers and lengths would not tell one training run from another.
pub(crate) fn tensors(
    checkpoint: &Checkpoint,
    progress: &dyn Progress,
) -> Result<Vec<(String, String)>, CompressError> {
    let config = checkpoint.config();
    let names: Vec<String> = config.weights().iter().map(WeightSpec::tensor_name).collect();
    let names: Vec<String> = names.into_iter().chain(config.other_tensors().iter().map(|v| v.name.clone())).collect();
    progress.part(Part::Opening, config.weights().iter().map(|w| (w.rows * w.cols) as u64).sum());
    progress.stage("check the model (tensors)", names.len() as u64);
    names
        .into_par_iter()
        .with_max_len(1)
        .map(|name| {
            let hash = hex(checkpoint.tensor_hash(&name)?);
            progress.advance(1);
            Ok((name, hash))
        })
        .collect()
}

pub(crate) fn key(input: &[(String, String)]) -> blake3::Hash {
    blake3::hash(&serde_json::to_vec(input).expect("pairs of strings"))
}

pub(crate) fn hex(hash: blake3::Hash) -> String {
    hash.to_hex().to_string()
}

/// Compares as far as `new` goes.
pub(crate) fn same(dir: &Path, old: &[(String, String)], new: &[(String, String)]) -> Result<(), CompressError> {
    for (i, (name, value)) in new.iter().enumerate() {
        let differs = |what: &str, was: &str, is: &str| {
            let [what, was, is] = [what, was, is].map(str::to_owned);
            Err(CompressError::JournalDiffers { dir: dir.to_owned(), what, was, is })
        };
        match old.get(i) {
            Some((old, was)) if old == name && was == value => {}
            Some((old, was)) if old == name => return differs(name, was, value),
            _ if old.iter().any(|(old, _)| old == name) => return differs(&old[i].0, &old[i].1, "absent"),
            _ => return differs(name, "absent", value),
        }
    }
    Ok(())
}
