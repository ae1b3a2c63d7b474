//! The decoder's arithmetic against logits computed by the `transformers` library.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use std::collections::HashMap;
use std::path::Path;

use bitstack_engine::device::{Columns, Cpu, Device, Plain};
use bitstack_engine::{Decoder, EngineError, KvCache, Observer, Pass, Threads, Weight};
use bitstack_model::{Checkpoint, Dense, Elements};
use fixtures::{MODELS, checkpoint, data, tensors, with_large_vocabulary, write_tensors};
use ndarray::{Array2, ArrayView2};
use safetensors::Dtype;
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    input_ids: Vec<u32>,
    logits: HashMap<usize, Vec<f32>>,
}

fn expected(path: &Path) -> Expected {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn load<D: Tested>(name: &str) -> (Decoder<Dense, D>, Expected)
where
    Dense: Weight<D>,
{
    let model = Decoder::load_on(D::default(), &checkpoint(name), &()).unwrap();
    (model, expected(&data(name).join("expected_logits.json")))
}

/// What the tests ask of a device.
trait Tested: Device<Buffer: Clone> + Default {}

impl<D: Device<Buffer: Clone> + Default> Tested for D {}

/// Makes each of these functions a test on the CPU and one on the plain device.
macro_rules! on_each_device {
    ($($test:ident),* $(,)?) => {
        mod on_the_cpu {
            $(#[test]
            fn $test() {
                super::$test::<super::Cpu>();
            })*
        }
        mod on_the_plain_device {
            $(#[test]
            fn $test() {
                super::$test::<super::Plain>();
            })*
        }
    };
}

on_each_device!(
    logits_are_those_of_the_reference_library,
    a_cache_filled_in_any_steps_gives_the_logits_of_one_pass,
    a_truncated_cache_continues_from_where_it_was_cut,
    sequences_side_by_side_have_the_logits_that_each_has_alone,
    one_cache_among_several_is_the_case_of_one_bit_for_bit,
    rows_that_do_not_fit_their_sequences_are_errors_that_leave_the_caches,
    the_observer_sees_every_weight_once_with_inputs_of_its_width,
    layers_run_one_by_one_give_the_same_logits,
    the_last_logits_are_those_of_the_last_token_of_each_sequence,
    a_replaced_weight_takes_effect_and_one_of_another_shape_is_rejected,
    positions_beyond_the_model_or_the_cache_are_an_error,
);

fn largest_difference(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> f32 {
    assert_eq!(a.dim(), b.dim());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn check(logits: &Array2<f32>, expected: &Expected, tolerance: f32, name: &str) {
    assert!(!expected.logits.is_empty());
    for (&position, row) in &expected.logits {
        assert_eq!(row.len(), logits.ncols());
        for (token, (found, wanted)) in logits.row(position).iter().zip(row).enumerate() {
            let difference = (found - wanted).abs();
            assert!(difference < tolerance, "{name}, position {position}, token {token}: {found}, expected {wanted}");
        }
    }
}

/// Logits are of the order of 1, printed with six decimals; both sides sum some tens of f32 products in their own order, layer after layer.
fn logits_are_those_of_the_reference_library<D: Tested>()
where
    Dense: Weight<D>,
{
    for name in MODELS {
        let (model, expected) = load::<D>(name);
        let logits = model.forward(&expected.input_ids, &mut Pass::new()).unwrap();
        assert_eq!(expected.logits.len(), 3);
        check(&logits, &expected, 2e-5, name);
    }
}

fn a_cache_filled_in_any_steps_gives_the_logits_of_one_pass<D: Tested>()
where
    Dense: Weight<D>,
{
    for name in MODELS {
        let (model, Expected { input_ids, .. }) = load::<D>(name);
        let whole = model.forward(&input_ids, &mut Pass::new()).unwrap();
        for steps in [vec![1; 40], vec![7, 1, 20, 2, 10], vec![39, 1], vec![17, 23]] {
            let mut cache = KvCache::new(model.config(), 40).unwrap();
            let mut at = 0;
            for step in steps {
                let mut pass = Pass::new().with_cache(&mut cache);
                let logits = model.forward(&input_ids[at..at + step], &mut pass).unwrap();
                let rows = whole.slice_axis(ndarray::Axis(0), ndarray::Slice::from(at..at + step));
                // Products of other shapes may add in another order.
                let difference = largest_difference(logits.view(), rows);
                assert!(difference < 1e-4, "{name} at {at}, {step} tokens: {difference}");
                at += step;
            }
            assert_eq!(cache.len(), 40);
        }
    }
}

fn a_truncated_cache_continues_from_where_it_was_cut<D: Tested>()
where
    Dense: Weight<D>,
{
    let (model, Expected { input_ids, .. }) = load::<D>("mistral_window");
    let whole = model.forward(&input_ids, &mut Pass::new()).unwrap();
    let mut cache = KvCache::new(model.config(), 40).unwrap();
    model.forward(&input_ids[..20], &mut Pass::new().with_cache(&mut cache)).unwrap();
    model.forward(&[5, 5, 5], &mut Pass::new().with_cache(&mut cache)).unwrap();
    cache.truncate(20);
    let logits = model.forward(&input_ids[20..], &mut Pass::new().with_cache(&mut cache)).unwrap();
    let rows = whole.slice_axis(ndarray::Axis(0), ndarray::Slice::from(20..));
    assert!(largest_difference(logits.view(), rows) < 1e-4);
}

/// Three sequences of different lengths, in steps that differ between them, against each alone; over a product of several rows sums may be made in
/// another order, as in the test above.
fn sequences_side_by_side_have_the_logits_that_each_has_alone<D: Tested>()
where
    Dense: Weight<D>,
{
    for name in MODELS {
        let (model, Expected { input_ids, .. }) = load::<D>(name);
        // Each sequence is other tokens, and longer than the sliding window of the model that has one.
        let sequences = [0, 5, 11].map(|shift| Vec::from_iter(input_ids.iter().cycle().skip(shift).take(40).copied()));
        let alone = sequences.each_ref().map(|tokens| model.forward(tokens, &mut Pass::new()).unwrap());
        for threads in [Threads::One, Threads::Pool] {
            let mut caches = vec![KvCache::new(model.config(), 40).unwrap(); 3];
            let mut at = [0; 3];
            let even = [vec![[20; 3], [3; 3]], vec![[1; 3]; 17]].concat();
            let uneven = [vec![[20, 1, 7], [3, 2, 1]], vec![[1; 3]; 17], vec![[0, 0, 0]]].concat();
            for steps in [even, uneven] {
                caches.iter_mut().for_each(|cache| cache.truncate(0));
                at.fill(0);
                for step in steps.into_iter().filter(|step| step[0] > 0) {
                    let of = |s: usize| at[s]..at[s] + step[s];
                    let tokens = (0..3).flat_map(|s| sequences[s][of(s)].to_vec()).collect::<Vec<_>>();
                    let mut pass = Pass::new().with_caches(&mut caches).with_threads(threads).with_rows(&step);
                    let logits = model.forward(&tokens, &mut pass).unwrap();
                    let mut first = 0;
                    for (s, alone) in alone.iter().enumerate() {
                        let found = logits.slice_axis(ndarray::Axis(0), ndarray::Slice::from(first..first + step[s]));
                        let wanted = alone.slice_axis(ndarray::Axis(0), ndarray::Slice::from(of(s)));
                        let difference = largest_difference(found, wanted);
                        assert!(difference < 1e-4, "{name}, sequence {s} at {at:?}, {step:?} tokens: {difference}");
                        first += step[s];
                    }
                    at.iter_mut().zip(step).for_each(|(at, step)| *at += step);
                }
                assert_eq!(caches.iter().map(KvCache::len).collect::<Vec<_>>(), at);
            }
        }
    }
}

fn the_last_logits_are_those_of_the_last_token_of_each_sequence<D: Tested>()
where
    Dense: Weight<D>,
{
    let (model, Expected { input_ids, .. }) = load::<D>("qwen2");
    let rows = [5, 1, 9];
    let mut caches = vec![KvCache::new(model.config(), 20).unwrap(); 3];
    let all = model.forward(&input_ids[..15], &mut Pass::new().with_caches(&mut caches).with_rows(&rows)).unwrap();
    caches.iter_mut().for_each(|cache| cache.truncate(0));
    let mut pass = Pass::new().with_caches(&mut caches).with_rows(&rows);
    let last = model.last_logits(&input_ids[..15], &mut pass).unwrap();
    let wanted = [4, 5, 14].map(|row| all.row(row).to_vec()).concat();
    assert!(
        largest_difference(
            ArrayView2::from_shape((1, last.len()), last).unwrap(),
            ArrayView2::from_shape((1, wanted.len()), &wanted).unwrap()
        ) < 1e-4
    );
}

fn one_cache_among_several_is_the_case_of_one_bit_for_bit<D: Tested>()
where
    Dense: Weight<D>,
{
    let (model, Expected { input_ids, .. }) = load::<D>("qwen3");
    let run = |pass: &mut Pass<'_, D>| [&input_ids[..9], &input_ids[9..10]].map(|t| model.forward(t, pass).unwrap());
    let mut caches = [KvCache::new(model.config(), 10).unwrap()];
    let listed = run(&mut Pass::new().with_caches(&mut caches));
    let mut cache = KvCache::new(model.config(), 10).unwrap();
    assert_eq!(run(&mut Pass::new().with_cache(&mut cache)), listed);
    assert_eq!(model.forward(&input_ids, &mut Pass::new().with_caches(&mut [])).unwrap().nrows(), input_ids.len());
}

fn rows_that_do_not_fit_their_sequences_are_errors_that_leave_the_caches<D: Tested>()
where
    Dense: Weight<D>,
{
    let (model, _) = load::<D>("llama");
    let mut caches = [10, 8, 10].map(|capacity| KvCache::new(model.config(), capacity).unwrap());
    let error = model.forward(&[1; 7], &mut Pass::new().with_caches(&mut caches)).unwrap_err();
    assert!(matches!(error, EngineError::UnevenRows { rows: 7, sequences: 3 }), "{error}");
    assert_eq!(error.to_string(), "7 rows cannot be divided among 3 sequences");
    model.forward(&[1; 15], &mut Pass::new().with_caches(&mut caches)).unwrap();
    // The least room counts.
    let error = model.forward(&[1; 12], &mut Pass::new().with_caches(&mut caches)).unwrap_err();
    assert!(matches!(error, EngineError::ContextFull { needed: 9, limit: 8 }), "{error}");
    for rows in [&[2, 2][..], &[2, 2, 2], &[3, 2, 0], &[1; 5]] {
        let error = model.forward(&[1; 5], &mut Pass::new().with_caches(&mut caches).with_rows(rows)).unwrap_err();
        assert!(matches!(error, EngineError::UnevenRows { rows: 5, sequences: 3 }), "{error}");
    }
    assert_eq!(caches.each_ref().map(KvCache::len), [5; 3]);
}

#[test]
fn threads_and_widening_do_not_change_a_bit() {
    for name in MODELS {
        let (model, Expected { input_ids, .. }) = load::<Cpu>(name);
        let tokens: Vec<u32> = input_ids.iter().cycle().take(200).copied().collect();
        let one = model.forward(&tokens, &mut Pass::new()).unwrap();
        let many = model.forward(&tokens, &mut Pass::new().with_threads(Threads::Pool)).unwrap();
        assert_eq!(one, many, "{name}");
        let wide = model.widened().forward(&tokens, &mut Pass::new()).unwrap();
        assert_eq!(one, wide, "{name}");
    }
}

/// Records what it is shown, and checks it against the model: the observed input times the weight must be what the
/// decoder goes on with, which for the head are the logits.
#[derive(Default)]
struct Recorder {
    groups: Vec<(Vec<usize>, [usize; 2])>,
    last: Option<Array2<f32>>,
}

impl Observer for Recorder {
    fn input(&mut self, weights: &[usize], x: ArrayView2<'_, f32>) {
        self.groups.push((weights.to_vec(), [x.nrows(), x.ncols()]));
        self.last = Some(x.to_owned());
    }
}

fn the_observer_sees_every_weight_once_with_inputs_of_its_width<D: Tested>()
where
    Dense: Weight<D>,
{
    for name in MODELS {
        let (model, Expected { input_ids, .. }) = load::<D>(name);
        let (config, specs) = (model.config(), model.config().weights());
        // Many tokens; and one, which goes through few experts.
        for tokens in [&input_ids[..], &input_ids[..1]] {
            let mut recorder = Recorder::default();
            let logits = model.forward(tokens, &mut Pass::new().with_observer(&mut recorder)).unwrap();
            assert_eq!(recorder.groups.pop().unwrap().0, config.head().collect::<Vec<_>>(), "{name}");
            let mut seen: Vec<usize> = Vec::new();
            for (group, [rows, cols]) in &recorder.groups {
                assert!(group.iter().all(|w| specs[*w].cols == *cols), "{name} {group:?}");
                assert!(*rows == tokens.len() || specs[group[0]].name.contains(".experts."), "{name} {group:?}");
                seen.extend(group);
            }
            assert_eq!(
                seen,
                (config.layer_weights(0).start..config.layer_weights(config.n_layers() - 1).end).collect::<Vec<_>>(),
                "{name}"
            );

            let head = &model.weights()[config.head().start];
            let x = recorder.last.unwrap();
            let mut queue = D::default().queue(Threads::One).unwrap();
            let (mut input, mut product) = (D::Buffer::default(), D::Buffer::default());
            D::write(&mut queue, x.as_slice().unwrap(), &mut input).unwrap();
            D::reserve(&mut queue, &mut product, logits.len()).unwrap();
            head.multiply(&mut queue, &input, logits.nrows(), &mut product, Columns::all(logits.ncols())).unwrap();
            if (config.logit_scale, config.logit_cap) == (None, None) {
                assert_eq!(D::take(&mut queue, &mut product, logits.len()).unwrap(), logits.as_slice().unwrap());
            }
        }
    }
}

fn layers_run_one_by_one_give_the_same_logits<D: Tested>()
where
    Dense: Weight<D>,
{
    let (model, Expected { input_ids, .. }) = load::<D>("qwen3");
    let whole = model.forward(&input_ids, &mut Pass::new()).unwrap();
    let mut hidden = model.embed(&input_ids).unwrap();
    for layer in 0..model.config().n_layers() {
        model.layer(layer, &mut hidden, &mut Pass::new()).unwrap();
    }
    assert_eq!(model.logits(hidden.view(), &mut Pass::new()).unwrap(), whole);
}

fn a_replaced_weight_takes_effect_and_one_of_another_shape_is_rejected<D: Tested>()
where
    Dense: Weight<D>,
{
    let (mut model, Expected { input_ids, .. }) = load::<D>("llama");
    let before = model.forward(&input_ids, &mut Pass::new()).unwrap();
    let down = model.config().weights().iter().position(|w| w.name == "model.layers.1.mlp.down_proj").unwrap();
    let (rows, cols) = (model.config().weights()[down].rows, model.config().weights()[down].cols);
    let zeros = |rows, cols| Dense::new(rows, cols, Elements::F32(vec![0.0; rows * cols])).unwrap();
    let error = model.replace(down, zeros(cols, rows)).unwrap_err();
    assert!(error.to_string().contains("model.layers.1.mlp.down_proj has 160 rows"), "{error}");
    let old = model.replace(down, zeros(rows, cols)).unwrap();
    assert!(largest_difference(model.forward(&input_ids, &mut Pass::new()).unwrap().view(), before.view()) > 1e-2);
    *model.weight_mut(down) = old;
    assert_eq!(model.forward(&input_ids, &mut Pass::new()).unwrap(), before);
}

fn positions_beyond_the_model_or_the_cache_are_an_error<D: Tested>()
where
    Dense: Weight<D>,
{
    let (model, _) = load::<D>("llama");
    let full = |needed: usize, limit: usize, error| match error {
        EngineError::ContextFull { needed: n, limit: l } => assert_eq!((n, l), (needed, limit)),
        other => panic!("{other}"),
    };
    full(257, 256, model.forward(&[1; 257], &mut Pass::new()).unwrap_err());
    full(257, 256, KvCache::<D>::new(model.config(), 257).unwrap_err());
    let mut cache = KvCache::new(model.config(), 10).unwrap();
    model.forward(&[1; 8], &mut Pass::new().with_cache(&mut cache)).unwrap();
    full(11, 10, model.forward(&[1; 3], &mut Pass::new().with_cache(&mut cache)).unwrap_err());
    assert_eq!(cache.len(), 8);
    assert!(matches!(model.forward(&[], &mut Pass::new()), Err(EngineError::NoTokens)));
    assert!(matches!(model.forward(&[96], &mut Pass::new()), Err(EngineError::TokenOutOfRange { token: 96, .. })));
}

/// bf16 values are f32 values, and these happen to be f16 values too, or next to one.
#[test]
fn all_three_element_types_give_the_same_logits() {
    let tokens = [1, 2, 3, 40, 50];
    let logits =
        |checkpoint: &Checkpoint| Decoder::load(checkpoint).unwrap().forward(&tokens, &mut Pass::new()).unwrap();
    let original = checkpoint("llama");
    let expected = logits(&original);
    for dtype in [Dtype::F32, Dtype::F16] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), original.config_text()).unwrap();
        write_tensors(dir.path(), dtype, tensors(&original));
        let found = logits(&Checkpoint::open(dir.path()).unwrap());
        let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference <= if dtype == Dtype::F32 { 0.0 } else { 1e-3 }, "{dtype}: {difference}");
    }
}

#[test]
fn a_model_in_parts_is_the_model() {
    for name in ["llama", "llama31"] {
        let (_dir, checkpoint) = with_large_vocabulary(name);
        let cut = checkpoint.with_cut_vocabulary();
        assert_eq!(cut.config().vocab_parts(), 3);
        let [whole, parts] = [&checkpoint, &cut].map(|c| Decoder::load(c).unwrap());
        for tokens in [&[4999u32][..], &[0, 2047, 2048, 4095, 4096, 4999, 17, 3000]] {
            let [whole, parts] = [&whole, &parts].map(|model| model.forward(tokens, &mut Pass::new()).unwrap());
            assert_eq!(whole, parts, "{name}");
        }
    }
}

/// The two trained models are not part of this repository; where they lie beside it, they are checked too.
#[test]
#[expect(clippy::print_stdout, reason = "a skipped check must not look like a passed one")]
fn logits_of_trained_models_are_those_of_the_reference_library() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    for name in ["tiny", "small"] {
        let dir = shared.join(format!("models/{name}-llama"));
        let logits = shared.join(format!("reference/logits-{name}.json"));
        if !dir.exists() || !logits.exists() {
            println!("skipped: no {name}-llama beside the repository");
            continue;
        }
        let expected = expected(&logits);
        let model = Decoder::load(&Checkpoint::open(dir).unwrap()).unwrap();
        check(&model.forward(&expected.input_ids, &mut Pass::new()).unwrap(), &expected, 1e-3, name);
    }
}
