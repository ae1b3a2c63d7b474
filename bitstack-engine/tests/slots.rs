//! Layers with any parts, together or alone: the decoder runs whatever stands in the slots.

use bitstack_engine::device::{Cpu, Device, Plain};
use bitstack_engine::{Decoder, EngineError, Frame, Pass, Weight};
use bitstack_model::config::{
    Activation, Attention, Builder, Experts, FeedForward, FeedForwardInput, Layer, LayerBuilder, Mlp, Projections,
};
use bitstack_model::{Dense, Elements, ModelConfig, RopeConfig, WeightRole, WeightSpec};
use ndarray::Array2;
use std::collections::HashMap;
use std::sync::Arc;

const HIDDEN: usize = 24;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 6;
const INNER: usize = 20;
const VOCAB: usize = 30;
const TOKENS: [u32; 9] = [3, 7, 1, 29, 0, 12, 12, 5, 8];

/// What stands in the slots.
#[derive(Clone, Copy)]
struct Slots {
    in_front: bool,
    sandwich: bool,
    residual_scale: Option<f32>,
    score_cap: Option<f32>,
    logit_scale: Option<f32>,
    logit_cap: Option<f32>,
    embedding_scale: Option<f32>,
    norm_offset: f32,
    fused: bool,
    mlp: Kind,
    activation: Activation,
    /// Of the second layer.
    second_rope: Option<usize>,
    rotary_dim: usize,
    norm_of_heads: Option<usize>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Gated,
    Plain,
    /// So many experts, and so many of them for each token.
    Experts(usize, usize),
}

const USUAL: Slots = Slots {
    in_front: true,
    sandwich: false,
    residual_scale: None,
    score_cap: None,
    logit_scale: None,
    logit_cap: None,
    embedding_scale: None,
    norm_offset: 0.0,
    fused: false,
    mlp: Kind::Gated,
    activation: Activation::Silu,
    second_rope: Some(0),
    rotary_dim: HEAD_DIM,
    norm_of_heads: None,
};

const ALL: Slots = Slots {
    in_front: true,
    sandwich: true,
    residual_scale: Some(0.7),
    score_cap: Some(2.0),
    logit_scale: Some(1.3),
    logit_cap: Some(3.0),
    embedding_scale: Some(1.5),
    norm_offset: 1.0,
    fused: true,
    mlp: Kind::Experts(5, 2),
    activation: Activation::GeluTanh,
    second_rope: Some(1),
    rotary_dim: 4,
    norm_of_heads: Some(HEAD_DIM),
};

fn feed_forward(layer: &mut LayerBuilder<'_>, name: &str, slots: &Slots) -> FeedForward {
    let mut linear = |part: &str, role, shape| layer.linear(&format!("{name}.{part}"), role, shape, false);
    let input = match (slots.mlp, slots.fused) {
        (Kind::Plain, _) => FeedForwardInput::Plain(linear("up", WeightRole::Up, [INNER, HIDDEN])),
        (_, true) => FeedForwardInput::FusedGated(linear("gate_up", WeightRole::GateUp, [2 * INNER, HIDDEN])),
        (_, false) => FeedForwardInput::Gated {
            gate: linear("gate", WeightRole::Gate, [INNER, HIDDEN]),
            up: linear("up", WeightRole::Up, [INNER, HIDDEN]),
        },
    };
    let down = linear("down", WeightRole::Down, [HIDDEN, INNER]);
    FeedForward { size: INNER, input, activation: slots.activation, down }
}

fn config(slots: &Slots) -> ModelConfig {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut model = Builder::default();
    for index in 0..2 {
        let mut layer = model.layer();
        let mut norm = |name: &str, wanted: bool| wanted.then(|| layer.norm(name, HIDDEN, 1e-5, slots.norm_offset));
        let attention_norm = norm("attention_norm", slots.in_front);
        let attention_post_norm = norm("attention_post_norm", slots.sandwich);
        let mlp_norm = norm("mlp_norm", slots.in_front);
        let mlp_post_norm = norm("mlp_post_norm", slots.sandwich);
        let mut of_heads = |name: &str, all: usize| {
            let len = slots.norm_of_heads.map(|len| len.min(all));
            len.map(|len| layer.norm(name, len, 1e-5, slots.norm_offset))
        };
        let (query_norm, key_norm) = (of_heads("query_norm", q), of_heads("key_norm", kv));
        let mut linear = |part: &str, role, shape| layer.linear(part, role, shape, true);
        let projections = if slots.fused {
            Projections::Fused(linear("qkv", WeightRole::QueryKeyValue, [q + 2 * kv, HIDDEN]))
        } else {
            Projections::Separate {
                query: linear("q", WeightRole::Query, [q, HIDDEN]),
                key: linear("k", WeightRole::Key, [kv, HIDDEN]),
                value: linear("v", WeightRole::Value, [kv, HIDDEN]),
            }
        };
        let output = linear("o", WeightRole::AttentionOutput, [HIDDEN, q]);
        let mlp = match slots.mlp {
            Kind::Experts(n, n_active) => Mlp::Experts(Experts {
                router: layer.linear("router", WeightRole::Router, [n, HIDDEN], false),
                experts: (0..n).map(|e| feed_forward(&mut layer, &format!("expert{e}"), slots)).collect(),
                n_active,
                normalised: true,
            }),
            _ => Mlp::Dense(feed_forward(&mut layer, "expert0", slots)),
        };
        layer.finish(|weights| Layer {
            attention_norm,
            attention: Attention {
                n_heads: HEADS,
                n_kv_heads: KV_HEADS,
                head_dim: HEAD_DIM,
                projections,
                query_norm,
                key_norm,
                rope: if index == 1 { slots.second_rope } else { Some(0) },
                rotary_dim: slots.rotary_dim,
                scale: 0.5,
                window: (index == 0).then_some(4),
                score_cap: slots.score_cap,
                output,
            },
            attention_post_norm,
            mlp_norm,
            mlp,
            mlp_post_norm,
            residual_scale: slots.residual_scale,
            weights,
        });
    }
    let norm = model.norm("norm", HIDDEN, 1e-5, slots.norm_offset);
    let rope = |theta| RopeConfig { theta, scaling: None };
    let mut config = model.finish(HIDDEN, VOCAB, 64, vec![rope(1e4), rope(10.0)], norm);
    (config.embedding_scale, config.tied) = (slots.embedding_scale, true);
    (config.logit_scale, config.logit_cap) = (slots.logit_scale, slots.logit_cap);
    config
}

/// Numbers that depend on a name and a place only, between -1 and 1.
fn noise(name: &str, i: usize) -> f32 {
    let seed = name.bytes().fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b)));
    ((f64::from(seed % 10_007) + 1.0) * (i as f64 + 1.0) * 0.754_877_666).sin() as f32
}

/// The rows of a weight, of several in one where its name says so.
fn rows(spec: &WeightSpec) -> Vec<f32> {
    let (front, part) = spec.name.rsplit_once('.').unwrap_or(("", &spec.name));
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let parts = match part {
        "qkv" => vec![("q", q), ("k", kv), ("v", kv)],
        "gate_up" => vec![("gate", INNER), ("up", INNER)],
        own => vec![(own, spec.rows)],
    };
    let of = |(part, rows): (&str, usize)| {
        let name = format!("{front}.{part}");
        (0..rows * spec.cols).map(move |i| 0.4 * noise(&name, i)).collect::<Vec<_>>()
    };
    parts.into_iter().flat_map(of).collect()
}

fn logits<D: Device>(device: D, slots: &Slots) -> Array2<f32>
where
    Dense: Weight<D>,
{
    let vector = |spec: &bitstack_model::VectorSpec| {
        let centre = if spec.name.ends_with("bias") { 0.0 } else { 1.0 - slots.norm_offset };
        // A bias of several in one is theirs, one after the other.
        let name = spec.name.replace("qkv", "q");
        let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        let of = |i: usize| match () {
            () if name == spec.name || i < q => noise(&name, i),
            () if i < q + kv => noise(&spec.name.replace("qkv", "k"), i - q),
            () => noise(&spec.name.replace("qkv", "v"), i - q - kv),
        };
        Ok::<_, EngineError>((0..spec.len).map(|i| centre + 0.3 * of(i)).collect())
    };
    let frame = Frame::on(device, config(slots), vector).unwrap();
    let weight = |_, spec: &WeightSpec| {
        Ok::<_, EngineError>(Dense::new(spec.rows, spec.cols, Elements::F32(rows(spec))).unwrap())
    };
    Decoder::with_frame(Arc::new(frame), weight).unwrap().forward(&TOKENS, &mut Pass::new()).unwrap()
}

fn distance(a: &Array2<f32>, b: &Array2<f32>) -> f32 {
    assert!(a.iter().chain(b).all(|v| v.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Logits are of the order of 1, and sums of some tens of f32 products: 1e-4 is a hundred roundings.
const TOLERANCE: f32 = 1e-4;

#[test]
fn a_model_with_all_slots_used_is_the_same_on_the_cpu_and_on_the_plain_device() {
    let behind = Slots { in_front: false, norm_of_heads: Some(usize::MAX), second_rope: None, ..ALL };
    for slots in [ALL, USUAL, behind, Slots { mlp: Kind::Plain, ..ALL }, Slots { mlp: Kind::Gated, ..ALL }] {
        let (plain, cpu) = (logits(Plain, &slots), logits(Cpu, &slots));
        assert!(distance(&plain, &cpu) < TOLERANCE, "{}", distance(&plain, &cpu));
    }
}

#[test]
fn every_slot_counts() {
    let usual = logits(Plain, &USUAL);
    let changes = [
        Slots { sandwich: true, ..USUAL },
        Slots { score_cap: ALL.score_cap, ..USUAL },
        Slots { logit_cap: ALL.logit_cap, ..USUAL },
        Slots { embedding_scale: ALL.embedding_scale, ..USUAL },
        Slots { mlp: Kind::Plain, ..USUAL },
        Slots { mlp: Kind::Experts(3, 1), ..USUAL },
        Slots { activation: ALL.activation, ..USUAL },
        Slots { second_rope: Some(1), ..USUAL },
        Slots { second_rope: None, ..USUAL },
        Slots { rotary_dim: 2, ..USUAL },
        Slots { norm_of_heads: Some(HEAD_DIM), ..USUAL },
        Slots { norm_of_heads: Some(usize::MAX), ..USUAL },
        Slots { in_front: false, ..USUAL },
        Slots { residual_scale: ALL.residual_scale, ..USUAL },
        Slots { logit_scale: ALL.logit_scale, ..USUAL },
    ];
    for (i, slots) in changes.iter().enumerate() {
        assert!(distance(&logits(Plain, slots), &usual) > 0.01, "change {i}");
    }
}

#[test]
fn projections_in_one_weight_are_those_of_their_own() {
    let fused = Slots { fused: true, ..USUAL };
    assert!(distance(&logits(Plain, &fused), &logits(Plain, &USUAL)) < TOLERANCE);
}

#[test]
fn factors_stored_as_differences_from_one_are_the_same_factors() {
    let offset = Slots { norm_offset: 1.0, ..USUAL };
    assert!(distance(&logits(Plain, &offset), &logits(Plain, &USUAL)) < TOLERANCE);
}

#[test]
fn caps_far_above_what_they_cap_change_nothing() {
    let capped = Slots { score_cap: Some(1e4), logit_cap: Some(1e4), ..USUAL };
    for found in [logits(Plain, &capped), logits(Cpu, &capped)] {
        // tanh(t) - t = -t³/3 is below rounding; cap times a rounding error of tanh, 1e-7, is 1e-3.
        assert!(distance(&found, &logits(Plain, &USUAL)) < 1e-2);
    }
    let low = logits(Plain, &Slots { logit_cap: Some(0.1), ..USUAL });
    assert!(low.iter().all(|v| v.abs() <= 0.1));
}

#[test]
fn one_expert_is_the_feed_forward_part_itself() {
    let one = Slots { mlp: Kind::Experts(1, 1), ..USUAL };
    assert!(distance(&logits(Plain, &one), &logits(Plain, &USUAL)) < TOLERANCE);
}

#[test]
fn tokens_go_through_the_experts_with_the_largest_scores() {
    let mut routes = bitstack_engine::device::Routes::default();
    // Rows of probabilities; the first of equals is chosen.
    routes.fill(&[0.1, 0.6, 0.3, 0.4, 0.4, 0.2, 0.25, 0.25, 0.5], 3, 2, true);
    assert_eq!(routes.rows, [vec![1, 2], vec![0, 1], vec![0, 2]]);
    let shares: HashMap<usize, Vec<f32>> = routes.shares.into_iter().enumerate().collect();
    assert_eq!(shares[&0], [0.5, 1.0 / 3.0]);
    assert!((shares[&1][0] - 2.0 / 3.0).abs() < 1e-6 && shares[&1][1] == 0.5);
}
