//! Measurements of whole models, on a small one of random planes.

use bitstack_bench::decode::{Schedule, bytes_at_level, decoding, resizing};
use bitstack_bench::load::{self, Operation};
use bitstack_bench::synthetic::{self, ModelShape};
use bitstack_core::SignLayout;
use bitstack_engine::ElasticModel;
use bitstack_format::StackFile;
use bitstack_io::Existing;
use bitstack_runtime::Verify;
use std::path::PathBuf;
use std::time::Duration;

/// A model of three blocks per weight.
fn model() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.bitstack");
    let shape = ModelShape {
        hidden_size: 64,
        intermediate_size: 160,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        vocab_size: 300,
        tied: false,
    };
    let bytes = synthetic::write(&path, Existing::Refuse, &shape, 3, 1, &()).unwrap();
    assert_eq!(bytes, path.metadata().unwrap().len());
    (directory, path)
}

#[test]
fn each_round_reads_the_file_then_grows_and_shrinks_without_hashes_and_with_them() {
    let (_directory, path) = model();
    let rows = load::load(&path, SignLayout::Strips, 2).unwrap();
    let operations: Vec<_> = rows.iter().map(|row| row.operation).collect();
    let (never, always) = (Operation::Grow(Verify::Never), Operation::Grow(Verify::Always));
    let round = [Operation::Read, never, Operation::Shrink, always, Operation::Shrink];
    assert_eq!(operations, [round, round].concat());
    assert!(rows.iter().all(|row| row.bytes > 0 && row.time.as_nanos() > 0), "{rows:?}");
    let read = load::median(&rows, Operation::Read).unwrap();
    assert_eq!((read.bytes, read.time), (path.metadata().unwrap().len(), rows[0].time.max(rows[5].time)));
    assert_eq!(load::median(&rows[..1], Operation::Shrink), None);
}

#[test]
fn a_model_is_measured_at_each_level_and_on_the_way_between_its_sizes() {
    let (_directory, path) = model();
    let model = ElasticModel::open(StackFile::open_path(&path).unwrap(), u64::MAX, Default::default(), &()).unwrap();
    let order = model.elastic().order().clone();
    let sizes = [1, 2, 3, 4].map(|level| bytes_at_level(&order, level));
    assert_eq!([sizes[0], sizes[2], sizes[3]], [order.minimum_bytes(), order.total_bytes(), order.total_bytes()]);
    for bytes in sizes {
        let measured = decoding(&model, bytes, 4).unwrap();
        assert_eq!((measured.resident_bytes, measured.token_seconds.len()), (bytes, 3));
        assert!(measured.cache_bytes > 0 && measured.ratio() > 0.0, "{measured:?}");
        assert!(measured.slowest_seconds() >= measured.median_seconds(), "{measured:?}");
    }
    let measured = resizing(&model, Schedule { tokens: 3, rounds: 2, pause: Duration::ZERO }).unwrap();
    let lens = [&measured.small, &measured.large, &measured.shrinking, &measured.shrunk].map(Vec::len);
    assert_eq!(lens, [3, 2 * 3, 2, 2 * 2]);
    let at = |bytes| move |token: &bitstack_bench::decode::Token| token.resident_bytes == bytes;
    assert!(measured.small.iter().chain(&measured.shrunk).all(at(sizes[0])), "{measured:?}");
    assert!(measured.large.iter().all(at(sizes[2])), "{measured:?}");
}
