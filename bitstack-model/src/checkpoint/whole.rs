//! That a checkpoint is used as a whole: no tensor left over, and the head that is stored.

use super::Checkpoint;
use crate::config::is_of_images;
use crate::{ModelError, WeightRole, WeightSpec, account};
use bitstack_io::hostile::plain_json;
use std::collections::HashSet;

impl Checkpoint {
    /// Checks that no tensor is left over beside those that are `used`: others follow from the config (rotary frequencies), are the head of tied
    /// embeddings once more, are the parts for images of a model of text and images, or match one of the patterns `ignored`.
    ///
    /// # Errors
    /// [`ModelError::UnusedTensors`].
    pub fn check_used(&self, used: &HashSet<String>, ignored: &[String]) -> Result<(), ModelError> {
        let [_, head] = self.outer_tensors();
        let is_known = |name: &&str| (self.config.tied && **name == head) || (self.is_part && is_of_images(name));
        let names = self.tensor_names().filter(|name| !is_known(name));
        account::check(&self.dir, names, used, self.config.n_layers(), ignored)
    }

    /// The names of the tensors of embedding and head.
    fn outer_tensors(&self) -> [String; 2] {
        let spec = &self.config.weights()[0];
        let of = |role| WeightSpec { role, ..spec.clone() }.tensor_name();
        [of(WeightRole::Embedding), of(WeightRole::Head)]
    }

    /// A head beside tied embeddings that is another matrix is the head, as for the Hugging Face library. The config then says so, too.
    pub(super) fn untie(&mut self) -> Result<(), ModelError> {
        let [embedding, head] = self.outer_tensors();
        if !self.config.tied || !self.tensors.contains_key(&head) || !self.tensors.contains_key(&embedding) {
            return Ok(());
        }
        if self.are_equal(&embedding, &head)? {
            return Ok(());
        }
        let is_tied = "tie_word_embeddings";
        self.remarks.push(format!(
            "config.json: {is_tied} is true, but {head} is stored and differs from {embedding}; the stored one is used"
        ));
        self.config.tied = false;
        let text = plain_json(self.config_text.as_bytes());
        let mut json: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&text)
            .map_err(|source| ModelError::Json { file: "config.json".to_owned(), source })?;
        json.insert(is_tied.to_owned(), false.into());
        self.config_text = format!("{:#}\n", serde_json::Value::Object(json));
        Ok(())
    }

    /// Whether two tensors have the same shape and elements.
    fn are_equal(&self, a: &str, b: &str) -> Result<bool, ModelError> {
        /// Elements that are compared at a time.
        const PIECE: usize = 1 << 14;
        let shape = self.shape(a)?.to_vec();
        if shape != self.shape(b)? {
            return Ok(false);
        }
        let len: usize = shape.iter().product();
        for first in (0..len).step_by(PIECE) {
            let piece = |name| Ok(self.part(name, &shape, first..len.min(first + PIECE))?.into_f32());
            if piece(a)? != piece(b)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
