//! A memory that is full or fails: the model keeps the size it had, says why, and everything goes back in the end.

mod stacks;

use bitstack_core::SignLayout;
use bitstack_format::{BlockSource, StackFile};
use bitstack_runtime::{Elastic, Memory, Options, RuntimeError, Start};
use stacks::device::{Device, DeviceError};
use stacks::{Beyond, Gate, open, products, products_of};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LARGE: usize = 1 << 30;

/// A model at its smallest size on a device, ready to grow.
fn smallest(bytes: &[u8]) -> (Device, Elastic<Vec<u8>, Device>) {
    let device = Device::with_capacity(LARGE);
    let model = open(&device, bytes.to_vec(), u64::MAX, Options::default());
    model.set_budget(model.order().minimum_bytes()).unwrap();
    (device, model)
}

/// The name of the weight and the number of the block at a position of the load order.
fn named(model: &Elastic<Vec<u8>, Device>, position: usize) -> (String, usize) {
    model.order().iter().nth(position).map(|id| (format!("layers.{}.weight", id.weight), id.block)).unwrap()
}

fn device_error(source: &Arc<dyn Error + Send + Sync>) -> &DeviceError {
    source.downcast_ref().expect("the memory's own error")
}

/// What must hold after an error: a whole model, and no memory but its own.
fn check_whole(model: &Elastic<Vec<u8>, Device>, bytes: &[u8]) {
    let snapshot = model.snapshot();
    assert_eq!(snapshot.levels(), model.order().plan_of_len(snapshot.n_blocks()).unwrap().levels);
    assert_eq!(products_of(&snapshot), products(bytes, snapshot.levels()));
    let (status, base_bytes) = (model.status(), model.file().base_bytes());
    assert!(!status.loading && status.error.is_some());
    assert_eq!(status.allocated_bytes, base_bytes + model.memory().used_bytes() as u64);
    assert_eq!(model.memory().staging_use().now, 0, "nothing is held to copy from");
}

fn check_recovery(model: &Elastic<Vec<u8>, Device>, bytes: &[u8]) {
    model.set_budget(u64::MAX).unwrap();
    model.wait().unwrap();
    assert_eq!(products_of(&model.snapshot()), products(bytes, &[5; 4]));
}

#[test]
fn model_grows_as_far_as_the_memory_has_room_and_further_when_it_has_more() {
    for bytes in [stacks::small(), stacks::uneven()] {
        let (device, model) = smallest(&bytes);
        let smallest_bytes = device.used_bytes();
        check_recovery(&model, &bytes);
        let whole_bytes = device.used_bytes();
        for part in 0..8 {
            model.set_budget(model.order().minimum_bytes()).unwrap();
            assert_eq!(device.used_bytes(), smallest_bytes);
            let capacity = smallest_bytes + (whole_bytes - smallest_bytes) * part / 8;
            device.set_capacity(capacity);
            model.set_budget(u64::MAX).unwrap();
            let error = model.wait().unwrap_err();
            let RuntimeError::Memory { weight, block, bytes: asked, source } = &error else { panic!("{error}") };
            assert_eq!((weight.clone(), *block), named(&model, model.snapshot().n_blocks()));
            let DeviceError::Full { asked: by_device, free } = *device_error(source) else { panic!("{error}") };
            assert!(*asked == by_device as u64 && by_device > free, "{error}");
            assert!(device.used_bytes() <= capacity);
            check_whole(&model, &bytes);

            device.set_capacity(LARGE);
            check_recovery(&model, &bytes);
        }
        drop(model);
        assert_eq!(device.used_bytes(), 0);
    }
}

#[test]
fn block_that_the_memory_does_not_take_is_named_and_what_comes_before_it_is_in_use() {
    for (bytes, most) in [(stacks::small(), 5), (stacks::uneven(), 12)] {
        let (device, model) = smallest(&bytes);
        for n in 0..most {
            device.permit_fills(n);
            model.set_budget(u64::MAX).unwrap();
            let error = model.wait().unwrap_err();
            let RuntimeError::Fill { weight, block, source } = &error else { panic!("{error}") };
            let reached = model.snapshot().n_blocks();
            assert!((4..=4 + n).contains(&reached), "{n} blocks taken, {reached} in use");
            assert_eq!((weight.clone(), *block), named(&model, reached));
            assert_eq!(device_error(source), &DeviceError::Fill);
            check_whole(&model, &bytes);
            device.permit_fills(usize::MAX);
            check_recovery(&model, &bytes);
            model.set_budget(model.order().minimum_bytes()).unwrap();
        }
    }
}

#[test]
fn copy_that_fails_late_leaves_nothing_of_its_run_in_use() {
    let bytes = stacks::uneven();
    let (device, model) = smallest(&bytes);
    for n in 0..3 {
        device.permit_waits(n);
        model.set_budget(u64::MAX).unwrap();
        let error = model.wait().unwrap_err();
        let RuntimeError::Fill { weight, block, source } = &error else { panic!("{error}") };
        assert_eq!((weight.clone(), *block), named(&model, model.snapshot().n_blocks()));
        assert_eq!(device_error(source), &DeviceError::Copy);
        check_whole(&model, &bytes);
        device.permit_waits(usize::MAX);
        check_recovery(&model, &bytes);
        model.set_budget(model.order().minimum_bytes()).unwrap();
    }
}

#[test]
fn opening_in_a_memory_that_is_too_small_is_an_error_and_leaves_nothing_there() {
    let bytes = stacks::small();
    let open = |capacity, start| {
        let device = Device::with_capacity(capacity);
        let file = StackFile::open(bytes.clone()).unwrap();
        (Elastic::open_in(device.clone(), file, u64::MAX, Options { start, ..Options::default() }), device)
    };
    let (model, device) = open(LARGE, Start::Whole);
    let whole_bytes = device.used_bytes();
    model.unwrap().set_budget(StackFile::open(bytes.clone()).unwrap().base_bytes()).unwrap_err();
    assert_eq!(device.used_bytes(), 0, "the model is gone");
    for start in [Start::Whole, Start::Smallest] {
        let (model, device) = open(1000, start);
        let error = model.unwrap_err();
        assert!(matches!(&error, RuntimeError::Memory { .. }), "{error}");
        assert_eq!(device.used_bytes(), 0);
    }
    let (model, _) = open(whole_bytes - 1, Start::Whole);
    assert!(matches!(model, Err(RuntimeError::Memory { .. })));
    let (model, _) = open(whole_bytes - 1, Start::Smallest);
    assert!(matches!(model.unwrap().wait(), Err(RuntimeError::Memory { .. })));
}

#[test]
fn snapshot_outlives_its_model_and_gives_the_memory_back() {
    let bytes = stacks::small();
    let (device, model) = smallest(&bytes);
    check_recovery(&model, &bytes);
    let (snapshot, used) = (model.snapshot(), device.used_bytes());
    drop(model);
    assert_eq!(device.used_bytes(), used);
    assert_eq!(products_of(&snapshot), products(&bytes, &[5; 4]));
    drop(snapshot);
    assert_eq!(device.used_bytes(), 0);
}

#[test]
fn readers_copy_from_one_buffer_each_that_is_gone_when_all_is_read() {
    let bytes = stacks::uneven();
    let file = StackFile::open(bytes.clone()).unwrap();
    let largest = (0..4)
        .flat_map(|w| (1..=5).map(move |b| (w, b)))
        .map(|(w, b)| file.block_extent(w, b).unwrap().len_bytes())
        .max()
        .unwrap();
    let device = Device::with_capacity(LARGE);
    let model = open(&device, bytes, u64::MAX, Options::default());
    let used = device.staging_use();
    assert_eq!((used.now, used.bytes), (0, largest));
    assert!((1..=4).contains(&used.most), "{used:?}");
    assert_eq!(model.snapshot().levels(), [5; 4]);
}

#[test]
fn places_are_those_of_the_blocks_and_the_layout_is_the_memorys_own() {
    let bytes = stacks::uneven();
    let device = Device::with_capacity(LARGE);
    let model = open(&device, bytes, u64::MAX, Options { signs: SignLayout::Strips, ..Options::default() });
    let snapshot = model.snapshot();
    assert_eq!(snapshot.signs(), SignLayout::Rows);
    for w in 0..4 {
        let blocks: Vec<_> = snapshot.blocks(w).unwrap().collect();
        assert_eq!(blocks.len(), snapshot.levels()[w] as usize);
        for (b, block) in blocks.iter().enumerate() {
            assert_eq!(block.extent, &model.file().block_extent(w, b + 1).unwrap());
            assert!(device.run_bytes(block.run) >= device.block_bytes(block.extent));
        }
    }
    assert!(matches!(snapshot.blocks(4).err(), Some(RuntimeError::NoSuchWeight { weight: 4, n_weights: 4 })));
}

#[test]
fn memory_of_blocks_read_in_vain_is_given_back() {
    let source = Arc::new(Gate::new(stacks::uneven()));
    let device = Device::with_capacity(LARGE);
    let model = open(&device, source.clone(), u64::MAX, Options::default());
    model.set_budget(model.order().minimum_bytes()).unwrap();
    let smallest_bytes = device.used_bytes();
    for beyond in [Beyond::Fail, Beyond::Panic, Beyond::Wait] {
        source.permit(3, beyond);
        model.set_budget(u64::MAX).unwrap();
        if beyond != Beyond::Wait {
            model.wait().unwrap_err();
        }
        model.set_budget(model.order().minimum_bytes()).unwrap();
        source.permit(usize::MAX, Beyond::Wait);
        let deadline = Instant::now() + Duration::from_secs(10);
        while device.used_bytes() != smallest_bytes {
            assert!(Instant::now() < deadline, "{} bytes are left", device.used_bytes() - smallest_bytes);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
