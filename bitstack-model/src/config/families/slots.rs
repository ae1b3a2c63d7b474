//! By what families differ from Llama beside the choices of [`Gated`](super::Gated): what stands in the slots that Llama leaves empty.

use super::Fields;
use super::bad;
use super::{FeedForward, FeedForwardInput, limit};
use crate::ModelError;
use crate::config::layer::{Activation, Experts, Mlp};
use crate::config::rope::Ropes;
use crate::config::{LayerBuilder, WeightRole};

/// What stands in the slots; [`Slots::default`] is Llama.
pub(super) struct Slots {
    /// Names of the norms: in front of the attention, behind it, in front of the feed-forward part, behind it.
    pub(super) norms: [Option<&'static str>; 4],
    /// See [`Norm::offset`](crate::config::Norm::offset).
    pub(super) norm_offset: f32,
    /// Whether norms of queries and keys, where there are some, go over all heads together.
    pub(super) heads_together: bool,
    /// Whether queries, keys and values are one weight, and gate and up projection another.
    pub(super) fused: bool,
    /// The nonlinearity of the feed-forward part, where the family has another field for it than `hidden_act`.
    pub(super) activation: Option<Activation>,
    /// Factor of the scores: `None` for 1 / sqrt(head_dim).
    pub(super) score_scale: Option<f32>,
    /// The share of each head that is turned; of another than 1 the family has read the field.
    pub(super) rotary_share: f64,
    /// The rotary tables, where the family's fields for them are not the usual ones.
    pub(super) ropes: Option<Ropes>,
    /// Whether heads are turned in each layer: empty for all layers.
    pub(super) turned: Vec<bool>,
    /// See [`Layer::residual_scale`](crate::config::Layer::residual_scale).
    pub(super) residual_scale: Option<f32>,
    /// See [`ModelConfig::embedding_scale`](crate::ModelConfig::embedding_scale).
    pub(super) embedding_scale: Option<f32>,
    /// See [`ModelConfig::logit_scale`](crate::ModelConfig::logit_scale).
    pub(super) logit_scale: Option<f32>,
    /// See [`ModelConfig::logit_cap`](crate::ModelConfig::logit_cap).
    pub(super) logit_cap: Option<f32>,
    /// Experts in the place of feed-forward parts.
    pub(super) mixture: Option<Mixture>,
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            norms: [Some("input_layernorm"), None, Some("post_attention_layernorm"), None],
            norm_offset: 0.0,
            heads_together: false,
            fused: false,
            activation: None,
            score_scale: None,
            rotary_share: 1.0,
            ropes: None,
            turned: Vec::new(),
            residual_scale: None,
            embedding_scale: None,
            logit_scale: None,
            logit_cap: None,
            mixture: None,
        }
    }
}

/// Experts of a family.
pub(super) struct Mixture {
    /// Name of the router.
    pub(super) router: &'static str,
    /// Name of the experts, in front of their numbers.
    pub(super) experts: &'static str,
    /// Names of the projections of an expert: gate, up, down.
    pub(super) projections: [&'static str; 3],
    pub(super) n_experts: usize,
    pub(super) n_active: usize,
    /// See [`FeedForward::size`].
    pub(super) size: usize,
    /// See [`Experts::normalised`].
    pub(super) normalised: bool,
    /// Whether each layer has them.
    pub(super) layers: Vec<bool>,
}

impl Mixture {
    /// The numbers of experts that `fields` name, of which there may be so many in all layers together: in all, and for each token.
    pub(super) fn counts(fields: &Fields<'_>, field: &'static str) -> Result<[usize; 2], ModelError> {
        let n_layers = fields.n_layers()?;
        let n_experts = fields.dimension(field, limit::EXPERTS / n_layers)?;
        Ok([n_experts, fields.dimension("num_experts_per_tok", n_experts)?])
    }

    /// The experts of the next layer.
    pub(super) fn build(&self, layer: &mut LayerBuilder<'_>, hidden_size: usize, activation: Activation) -> Mlp {
        let &Self { n_active, size, normalised, .. } = self;
        let router = layer.linear(self.router, WeightRole::Router, [self.n_experts, hidden_size], false);
        let expert = |index: usize| {
            let name = |part: usize| format!("{}.{index}.{}", self.experts, self.projections[part]);
            let input = FeedForwardInput::Gated {
                gate: layer.linear(&name(0), WeightRole::Gate, [size, hidden_size], false),
                up: layer.linear(&name(1), WeightRole::Up, [size, hidden_size], false),
            };
            let down = layer.linear(&name(2), WeightRole::Down, [hidden_size, size], false);
            FeedForward { size, input, activation, down }
        };
        let experts = (0..self.n_experts).map(expert).collect();
        Mlp::Experts(Experts { router, experts, n_active, normalised })
    }
}

/// A factor that stands in a field: positive, 1 where it is absent.
pub(super) fn factor(fields: &Fields<'_>, field: &'static str) -> Result<f64, ModelError> {
    fields.number(field, 1.0, 0.0, 1e6)
}

/// A field that must be absent, or null, or false: the decoder has no such part.
pub(super) fn refuse(fields: &Fields<'_>, field: &'static str) -> Result<(), ModelError> {
    match fields.get(field) {
        Some(value) if value.as_bool() != Some(false) => Err(bad(field, value, "null: the decoder has no such part")),
        _ => Ok(()),
    }
}
