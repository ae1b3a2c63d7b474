//! A GGUF file as a checkpoint.

use super::{Checkpoint, CheckpointLimits, DataFile, Location};
use crate::files::{open_regular, read_head};
use crate::gguf::{Named, Source, is_gguf};
use crate::recognize::recognize_head;
use crate::{ModelConfig, ModelError};
use bitstack_io::Dtype;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

impl Checkpoint {
    /// Opens a file that should begin as a GGUF file does.
    pub(super) fn open_gguf(path: PathBuf, limits: &CheckpointLimits) -> Result<Self, ModelError> {
        let file = open_regular(&path)?;
        let head = read_head(&file).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        if !is_gguf(&head) {
            let advice = recognize_head(&head).unwrap_or("no model: give a directory with config.json, or a GGUF file");
            return Err(ModelError::OtherFile { path, advice: advice.to_owned() });
        }
        let (source, named) = Source::open(&path, &file, limits.header_bytes)?;
        let config_text = source.config_text().to_owned();
        let config = ModelConfig::from_json(&config_text);
        let config = config.map_err(|e| ModelError::GgufConfig { path: path.clone(), source: Box::new(e) })?;
        let tensors = named.into_iter().map(|Named { name, differs, tensor }| {
            let quantised = (!tensor.kind.is_float()).then_some(tensor.kind);
            let dtype =
                [Dtype::F32, Dtype::BF16].into_iter().find(|d| d.name() == tensor.kind.name()).unwrap_or(Dtype::F16);
            let (offset_bytes, len_bytes) = (tensor.offset_bytes, tensor.len_bytes);
            (name, Location { file: 0, dtype, shape: tensor.shape, offset_bytes, len_bytes, quantised, differs })
        });
        Ok(Self {
            config,
            config_text,
            is_part: false,
            misplaced: HashMap::new(),
            remarks: source.remarks.clone(),
            limits: *limits,
            tensors: tensors.collect(),
            files: vec![DataFile { path: path.clone(), source: Arc::new(file) }],
            gguf: Some(Arc::new(source)),
            dir: path,
        })
    }
}
