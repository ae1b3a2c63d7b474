//! From a checkpoint to a stack and back: what is written can be opened at every level, and is worth more with every block.

#[path = "../../bitstack-model/tests/fixtures/mod.rs"]
mod fixtures;

use bitstack_compress::{
    BlockMethod, CompressError, CompressOptions, Compressed, OrderBy, block_perplexities, compress,
};
use bitstack_engine::eval::{compare, perplexity};
use bitstack_engine::stack::StackModel;
use bitstack_engine::{Decoder, EngineError};
use bitstack_format::{BlockSource, StackFile};
use bitstack_model::text::Windows;
use bitstack_model::{Checkpoint, Tokenizer};
use bitstack_sort::{Balanced, LoadOrder, Scores, Sizes, Sorter};
use fixtures::{checkpoint, demo, told};

/// Small enough for a test: 8 blocks of rank 2, calibrated on 4 windows of 32 tokens that the model writes.
fn options() -> CompressOptions {
    CompressOptions {
        method: BlockMethod::Avd,
        rank: Some(2),
        n_blocks: Some(8),
        samples: 4,
        seq_len: Some(32),
        ..Default::default()
    }
}

fn run(name: &str, options: &CompressOptions) -> Compressed {
    compress(&checkpoint(name), None, options, &std::env::temp_dir(), &()).unwrap()
}

fn file(compressed: &Compressed) -> (Vec<u8>, StackFile<Vec<u8>>) {
    let mut bytes = Vec::new();
    compressed.draft.finish(compressed.order.weights(), &mut bytes, &mut |_, _| {}).unwrap();
    (bytes.clone(), StackFile::open(bytes).unwrap())
}

/// Tokens for measuring: any will do, the models are random.
fn windows() -> Vec<Vec<u32>> {
    (0..4).map(|w| (0..40).map(|i| (w * 17 + i * i * 5 + 3) % 96).collect()).collect()
}

#[test]
fn every_block_brings_a_stack_nearer_to_its_model() {
    let compressed = run("llama", &options());
    let (_, file) = file(&compressed);
    let original = Decoder::load(&checkpoint("llama")).unwrap();
    let windows = windows();
    let windows: Vec<&[u32]> = windows.iter().map(|w| &w[..]).collect();
    let order =
        LoadOrder::from_weights(file.order(), &Sizes::new(file.base_bytes(), file.block_sizes()).unwrap()).unwrap();
    let (least, most) = (order.minimum_bytes(), order.total_bytes());
    let mut model = StackModel::open(&file, &order.plan(least).unwrap().levels, &()).unwrap();
    let (mut first, mut last) = (None, f64::INFINITY);
    for quarter in 0..=4 {
        let plan = order.plan(least + (most - least) * quarter / 4).unwrap();
        model.set_levels(&plan.levels).unwrap();
        let kl = compare(model.decoder(), &original, &windows, &()).unwrap().kl.unwrap().mean;
        assert!(kl < last, "quarter {quarter}: {kl} after {last}");
        last = kl;
        first.get_or_insert(kl);
        // Going from level to level ends where opening there directly does.
        let direct = StackModel::open(&file, &plan.levels, &()).unwrap();
        assert_eq!(model.decoder().weights(), direct.decoder().weights());
    }
    // One block leaves about 0.36 of the energy of Gaussian weights, eight leave about 0.013; divergence goes with energy.
    assert!(last < first.unwrap() / 15.0, "{last} of {first:?}");
}

#[test]
fn resident_bytes_are_those_of_the_tensors_loaded() {
    let (_, file) = file(&run("qwen2", &options()));
    let order =
        LoadOrder::from_weights(file.order(), &Sizes::new(file.base_bytes(), file.block_sizes()).unwrap()).unwrap();
    let plan = order.plan(order.total_bytes() * 2 / 3).unwrap();
    let base: u64 = file.base_tensors().iter().map(|t| file.read_tensor(&t.name).unwrap().data.len() as u64).sum();
    let mut blocks = 0;
    for (w, &level) in plan.levels.iter().enumerate() {
        for b in 1..=level as usize {
            blocks += file.read_block(w, b).unwrap().view().layout().unwrap().bytes().unwrap();
        }
    }
    assert_eq!(base + blocks, plan.resident_bytes);
}

#[test]
fn tied_embeddings_are_stored_once_and_read_both_ways() {
    let (_, file) = file(&run("llama31", &options()));
    assert!(file.weight_index("model.embed_tokens").is_some() && file.weight_index("lm_head").is_none());
    let original = Decoder::load(&checkpoint("llama31")).unwrap();
    let tokens: Vec<u32> = (0..30).collect();
    let [low, high] = [1, 8].map(|level| {
        let levels = vec![level; file.weights().len()];
        let model = StackModel::open(&file, &levels, &()).unwrap().into_decoder();
        assert_eq!(model.config().head(), 0..1);
        compare(&model, &original, &[&tokens], &()).unwrap().kl.unwrap().mean
    });
    assert!(high < low / 15.0, "{high} of {low}");
}

#[test]
fn kept_embeddings_are_left_bit_for_bit() {
    let (_, file) = file(&run("llama", &CompressOptions { keep_embeddings: true, ..options() }));
    assert_eq!(file.weights().len(), 14);
    let levels = vec![1; file.weights().len()];
    let model = StackModel::open(&file, &levels, &()).unwrap().into_decoder();
    let original = Decoder::load(&checkpoint("llama")).unwrap();
    for index in [0, original.config().head().start] {
        assert_eq!(*model.weights()[index], original.weights()[index]);
        assert_eq!(model.weights()[index].shape()[0], 96);
    }
}

#[test]
fn every_order_starts_with_the_smallest_model_and_the_same_bytes_come_out_of_any_number_of_threads() {
    for (ordering, method) in [
        (OrderBy::Gain, BlockMethod::Avd),
        (OrderBy::Gain, BlockMethod::Nested),
        (OrderBy::Perplexity, BlockMethod::Avd),
        (OrderBy::Greedy, BlockMethod::Avd),
        (OrderBy::Random, BlockMethod::Nested),
    ] {
        let options = CompressOptions { n_blocks: Some(3), ordering, method, ..options() };
        let bytes = [1, 2].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| file(&run("qwen3", &options)).0)
        });
        assert!(bytes[0] == bytes[1], "{ordering:?} depends on the number of threads");
        let [bytes, _] = bytes;
        let file = StackFile::open(bytes).unwrap();
        let n = file.weights().len();
        let mut first: Vec<u32> = file.order()[..n].to_vec();
        first.sort_unstable();
        assert_eq!(first, (0..n as u32).collect::<Vec<_>>(), "{ordering:?}");
        assert_eq!(file.order().len(), 3 * n);
    }
}

#[test]
fn nested_codes_are_nearer_to_the_model_than_the_published_method_in_the_same_bytes() {
    let windows = windows();
    let windows: Vec<&[u32]> = windows.iter().map(|w| &w[..]).collect();
    let original = Decoder::load(&checkpoint("qwen3")).unwrap();
    let divergences = [BlockMethod::Avd, BlockMethod::Nested].map(|method| {
        // Enough text for a Gram matrix of full rank.
        let options = CompressOptions { method, rank: Some(1), samples: 16, ..options() };
        let (_, file) = file(&run("qwen3", &options));
        assert!(file.weights().iter().all(|w| w.method == method.name()));
        let sizes = Sizes::new(file.base_bytes(), file.block_sizes()).unwrap();
        let order = LoadOrder::from_weights(file.order(), &sizes).unwrap();
        let stacked: usize = file.weights().iter().map(|w| w.shape.n_elems()).sum();
        [3, 4, 5].map(|bits| {
            let plan = order.plan(file.base_bytes() + (stacked * bits / 8) as u64).unwrap();
            let model = StackModel::open(&file, &plan.levels, &()).unwrap();
            compare(model.decoder(), &original, &windows, &()).unwrap().kl.unwrap().mean
        })
    });
    let [avd, nested] = divergences;
    assert!(avd.iter().zip(&nested).all(|(a, n)| n < a), "{avd:?} {nested:?}");
}

#[test]
fn a_model_can_be_calibrated_on_text_only_with_its_tokenizer() {
    // The fixtures have none, so the error must name what is missing.
    let error = compress(&checkpoint("llama"), Some("text"), &options(), &std::env::temp_dir(), &()).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
}

#[test]
fn impossible_options_are_named_with_the_weight() {
    let error = compress(
        &checkpoint("llama"),
        None,
        &CompressOptions { rank: Some(65), ..options() },
        &std::env::temp_dir(),
        &(),
    );
    let error = told(&error.unwrap_err());
    assert!(error.contains("model.embed_tokens") && error.contains("65"), "{error}");
}

#[test]
fn levels_beyond_the_stack_are_errors() {
    let (_, file) = file(&run("llama", &CompressOptions { n_blocks: Some(2), ordering: OrderBy::Random, ..options() }));
    for bad in [vec![0; 16], vec![3; 16], vec![1; 15]] {
        assert!(StackModel::open(&file, &bad, &()).is_err(), "{bad:?}");
    }
    let mut model = StackModel::open(&file, &[1; 16], &()).unwrap();
    assert!(model.set_levels(&[3; 16]).is_err());
    // The model is still whole.
    model.set_levels(&[2; 16]).unwrap();
    let tokens: Vec<u32> = (0..30).collect();
    assert!(perplexity(model.decoder(), &[&tokens], &()).unwrap().perplexity.is_finite());
}

#[test]
fn an_order_by_perplexity_is_measured_on_as_many_windows_as_asked() {
    let checkpoint = Checkpoint::open(demo().join("tiny-llama")).unwrap();
    let text: String = (0..4000u32).map(|i| char::from(b'a' + (i * i % 23) as u8)).collect();
    let tokenizer = Tokenizer::from_bytes(&checkpoint.companion("tokenizer.json").unwrap()).unwrap();
    let tokens = tokenizer.encode(&text).unwrap();
    let validation = Windows::new(&tokens, 32, 32).unwrap().halves().1;
    let orders = [1, 5].map(|order_windows| {
        let options = CompressOptions { ordering: OrderBy::Perplexity, n_blocks: Some(3), order_windows, ..options() };
        let compressed = compress(&checkpoint, Some(&text), &options, &std::env::temp_dir(), &()).unwrap();
        let sizes = Sizes::new(compressed.draft.base_bytes(), compressed.draft.block_sizes()).unwrap();
        let windows = validation.evenly_spaced(order_windows);
        assert_eq!(windows.len(), order_windows);
        let scores = Scores::new(block_perplexities(&compressed.draft, &windows, &()).unwrap());
        assert_eq!(compressed.order.weights(), Balanced { scores }.order(&sizes).unwrap().weights());
        compressed.order.weights().to_vec()
    });
    assert_ne!(orders[0], orders[1], "the windows make no difference");
    let none = CompressOptions { ordering: OrderBy::Perplexity, order_windows: 0, ..options() };
    let error = compress(&checkpoint, Some(&text), &none, &std::env::temp_dir(), &()).unwrap_err();
    assert!(matches!(error, CompressError::Engine(EngineError::NoWindows)), "{error}");
}
