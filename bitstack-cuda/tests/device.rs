//! On a real device, against the reference arithmetic in f64. Skipped, and it says so, where there is none.

#![expect(clippy::print_stdout, reason = "tests say what they skip")]

use bitstack_core::{
    Basis, Block, BlockRef, Coefficients, Level, SPIKE_SIZES, Shape, SignMatrix, Spike, Spikes, Values, WeightStack,
    f16,
};
use bitstack_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use bitstack_cuda::cudarc::driver::{CudaContext, CudaStream};
use bitstack_cuda::{Bases, CudaError, DeviceStack, Kernels, Origin, Workspace, context, download, upload, zeros};
use half::bf16;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::sync::Arc;

/// The kernels from both origins, or nothing where there is no device.
fn device() -> Option<(Arc<CudaContext>, Vec<Kernels>)> {
    let context = match context(0) {
        Ok(context) => context,
        Err(error @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
            println!("skipped: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let mut kernels = vec![Kernels::precompiled(&context).unwrap()];
    let compiled = Kernels::new(&context).unwrap();
    if compiled.origin() == Origin::Compiled {
        kernels.push(compiled);
    } else {
        println!("no NVRTC here: the compiled kernels are not tested");
    }
    Some((context, kernels))
}

fn gauss(rng: &mut StdRng) -> f32 {
    let (a, b): (f64, f64) = (rng.random(), rng.random());
    ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
}

/// At random places, every fourth once more at the place before; sizes from 1 to 19.
fn spikes(rng: &mut StdRng, shape: Shape, n: usize) -> Spikes {
    let mut entries: Vec<Spike> = Vec::new();
    while entries.len() < n {
        let size = rng.random_range(1..=SPIKE_SIZES as i8) * if rng.random() { 1 } else { -1 };
        let (row, col) = match entries.last() {
            Some(last) if entries.len() % 4 == 3 => (last.row, last.col),
            _ => (rng.random_range(0..shape.rows()), rng.random_range(0..shape.cols())),
        };
        entries.push(Spike { row, col, size });
    }
    let sizes = std::array::from_fn(|i| f16::from_f32(1.235f32.powi(i as i32)));
    Spikes::encode(shape, sizes, &entries).unwrap()
}

/// A stack whose block 1 has spikes, one for 250 weights, where the number of planes is odd.
fn stack(rng: &mut StdRng, (rows, cols): (usize, usize), rank: usize, planes: usize, own_bases: bool) -> WeightStack {
    let mut stack = WeightStack::new(Shape::new(rows, cols).unwrap());
    for i in 1..=planes {
        let mut values = |n, size: f32| Values::F16((0..n).map(|_| f16::from_f32(gauss(rng) * size)).collect());
        let basis = (i == 1 || own_bases).then(|| Basis::new(rank, cols, values(rank * cols, 1.0)).unwrap());
        // Additive and refitted blocks, by turns.
        let count = if i % 2 == 0 { i } else { 1 };
        let u = values(rows * count * rank, 0.5f32.powi(i as i32));
        let coefficients = Coefficients::new(rows, count, rank, u).unwrap();
        let signs: Vec<f32> = (0..rows * cols).map(|_| gauss(rng)).collect();
        let signs = SignMatrix::from_f32(rows, cols, &signs).unwrap();
        let spikes = (i == 1 && planes % 2 == 1).then(|| spikes(rng, stack.shape(), (rows * cols).div_ceil(250)));
        stack.push(Block { signs, basis, coefficients, spikes }).unwrap();
    }
    stack
}

fn on_device(stream: &Arc<CudaStream>, stack: &WeightStack) -> DeviceStack {
    DeviceStack::from_blocks(stream, stack.shape(), stack.blocks().iter().map(Block::view)).unwrap()
}

/// ‖y − x Wᵀ‖ / ‖x Wᵀ‖.
fn error(level: &Level<'_>, x: &[f32], y: &[f32]) -> f64 {
    let expected: Vec<f64> = x.chunks(level.shape().cols()).flat_map(|x| level.matvec(x).unwrap()).collect();
    assert_eq!(expected.len(), y.len());
    let (mut errors, mut norm) = (0.0, 0.0);
    for (e, &y) in expected.iter().zip(y) {
        errors += (e - f64::from(y)).powi(2);
        norm += e * e;
    }
    (errors / norm).sqrt()
}

#[test]
fn fused_products_are_within_a_thousandth() {
    let Some((context, all)) = device() else { return };
    let (stream, mut rng) = (context.new_stream().unwrap(), StdRng::seed_from_u64(1));
    for kernels in &all {
        for shape in [(257, 1030), (4096, 4096), (64, 14336)] {
            for (rank, own_bases) in [(1, false), (1, true), (2, true), (4, false), (16, true), (17, true)] {
                let weight = stack(&mut rng, shape, rank, 3, own_bases);
                let device = on_device(&stream, &weight);
                for tokens in [1, 3, 4, 5, 16, 17] {
                    // The oracle takes its time.
                    if shape.0 == 4096 && tokens * rank > 16 {
                        continue;
                    }
                    let x: Vec<f16> = (0..tokens * shape.1).map(|_| f16::from_f32(gauss(&mut rng))).collect();
                    let x32: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
                    let bytes = kernels.workspace_bytes(&[&device], tokens).unwrap();
                    let mut workspace = Workspace::new(&stream, bytes).unwrap();
                    let x = upload(&stream, "x", &x).unwrap();
                    let mut y = zeros::<f32>(&stream, "y", tokens * shape.0).unwrap();
                    let mut ys = [y.as_view_mut()];
                    kernels.fused(&stream, &[&device], tokens, &x.as_view(), &mut ys, &mut workspace).unwrap();
                    let y = download(&stream, &y).unwrap();
                    let error = error(&weight.level(3).unwrap(), &x32, &y);
                    assert!(error <= 1e-3, "{shape:?}, rank {rank}, {tokens} tokens: {error:e}");
                }
            }
        }
    }
}

#[test]
fn several_weights_share_a_launch_and_other_streams_are_waited_for() {
    let Some((context, all)) = device() else { return };
    let (uploads, stream) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let mut rng = StdRng::seed_from_u64(2);
    let weights = [(1024, 3), (256, 1), (256, 4)].map(|(rows, planes)| stack(&mut rng, (rows, 2048), 1, planes, false));
    let x: Vec<f32> = (0..2 * 2048).map(|_| gauss(&mut rng)).collect();
    for kernels in &all {
        let devices = weights.each_ref().map(|w| on_device(&uploads, w));
        let stacks = devices.each_ref();
        let mut workspace = Workspace::new(&stream, kernels.workspace_bytes(&stacks, 2).unwrap()).unwrap();
        let x_device = upload(&stream, "x", &x).unwrap();
        let mut ys = weights.each_ref().map(|w| zeros::<f32>(&stream, "y", 2 * w.shape().rows()).unwrap());
        let mut views = ys.each_mut().map(|y| y.as_view_mut());
        kernels.fused(&stream, &stacks, 2, &x_device.as_view(), &mut views, &mut workspace).unwrap();
        drop(devices); // freed after the launch that reads them
        for (w, y) in weights.iter().zip(&ys) {
            let level = w.level(w.top_level()).unwrap();
            assert!(error(&level, &x, &download(&stream, y).unwrap()) <= 1e-3);
        }
    }
}

#[test]
fn captured_products_follow_the_level() {
    let Some((context, all)) = device() else { return };
    // In a context with no stream of its own buffers wait for no events, which would end a capture.
    let (stream, mut rng) = (context.per_thread_stream(), StdRng::seed_from_u64(3));
    let weight = stack(&mut rng, (300, 1500), 1, 5, false);
    let x: Vec<f32> = (0..1500).map(|_| gauss(&mut rng)).collect();
    for kernels in &all {
        let mut device = DeviceStack::new(&stream, weight.shape(), 1, 5, Bases::Shared).unwrap();
        device.push(weight.blocks()[0].view()).unwrap();
        let mut workspace = Workspace::new(&stream, 0).unwrap();
        let x_device = upload(&stream, "x", &x).unwrap();
        let mut y = zeros::<f32>(&stream, "y", 300).unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        let mut ys = [y.as_view_mut()];
        kernels.fused(&stream, &[&device], 1, &x_device.as_view(), &mut ys, &mut workspace).unwrap();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
        for level in [1, 2, 3, 5, 2, 1, 4] {
            // At times all of it goes, spikes included, and comes back somewhere else.
            device.truncate(if level == 4 { 0 } else { level }).unwrap();
            while device.level() < level {
                device.push(weight.blocks()[device.level() as usize].view()).unwrap();
            }
            graph.launch().unwrap();
            let y = download(&stream, &y).unwrap();
            assert!(error(&weight.level(level).unwrap(), &x, &y) <= 1e-3, "level {level}");
        }
    }
}

#[test]
fn rebuilt_weights_and_batch_products_are_those_of_the_reference() {
    let Some((context, all)) = device() else { return };
    let (stream, mut rng) = (context.new_stream().unwrap(), StdRng::seed_from_u64(4));
    for kernels in &all {
        for (shape, rank, tokens) in [((257, 1030), 1, 33), ((130, 512), 16, 300), ((64, 77), 3, 1)] {
            let weight = stack(&mut rng, shape, rank, 3, rank > 1);
            let (device, level) = (on_device(&stream, &weight), weight.level(3).unwrap());
            let mut out = zeros::<f32>(&stream, "W", shape.0 * shape.1).unwrap();
            kernels.reconstruct(&stream, &device, &mut out.as_view_mut()).unwrap();
            for (w, e) in download(&stream, &out).unwrap().iter().zip(level.reconstruct()) {
                // Sums that agree but for a few roundings of terms of at most about 100.
                assert!((w - e).abs() <= 5e-5 * (1.0 + e.abs()), "{w} for {e}");
            }
            let x: Vec<f32> = (0..tokens * shape.1).map(|_| gauss(&mut rng)).collect();
            let halves: Vec<f16> = x.iter().map(|&x| f16::from_f32(x)).collect();
            let bfloats: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut y = zeros::<f32>(&stream, "y", tokens * shape.0).unwrap();
            let x = upload(&stream, "x", &halves).unwrap();
            kernels.batch(&stream, &device, tokens, &x.as_view(), &mut y.as_view_mut()).unwrap();
            let x32: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
            assert!(error(&level, &x32, &download(&stream, &y).unwrap()) <= 1e-3);
            let x = upload(&stream, "x", &bfloats).unwrap();
            kernels.batch(&stream, &device, tokens, &x.as_view(), &mut y.as_view_mut()).unwrap();
            let x32: Vec<f32> = bfloats.iter().map(|x| x.to_f32()).collect();
            assert!(error(&level, &x32, &download(&stream, &y).unwrap()) <= 8e-3);
        }
    }
}

#[test]
fn wrong_arguments_are_errors_that_say_what_is_wrong() {
    let Some((context, all)) = device() else { return };
    let (stream, mut rng) = (context.new_stream().unwrap(), StdRng::seed_from_u64(5));
    let kernels = &all[0];
    let weight = stack(&mut rng, (20, 40), 2, 2, false);
    let device = on_device(&stream, &weight);
    let x = zeros::<f32>(&stream, "x", 40).unwrap();
    let mut y = zeros::<f32>(&stream, "y", 20).unwrap();
    let mut workspace = Workspace::new(&stream, 0).unwrap();
    let mut fused =
        |tokens| kernels.fused(&stream, &[&device], tokens, &x.as_view(), &mut [y.as_view_mut()], &mut workspace);
    assert!(matches!(fused(0), Err(CudaError::Mismatch { actual: 0, .. })));
    assert!(matches!(fused(2), Err(CudaError::Mismatch { expected: 80, actual: 40, .. })));
    assert!(matches!(fused(1), Err(CudaError::WorkspaceTooSmall { .. })));
    let mut shared = DeviceStack::new(&stream, weight.shape(), 2, 1, Bases::Shared).unwrap();
    assert!(matches!(shared.push(weight.blocks()[1].view()), Err(CudaError::Block { block: 1, .. })));
    shared.push(weight.blocks()[0].view()).unwrap();
    assert!(matches!(shared.push(weight.blocks()[0].view()), Err(CudaError::BasisNotShared { block: 2 })));
    assert!(matches!(shared.push(weight.blocks()[1].view()), Err(CudaError::TooLarge { limit: 1, actual: 2, .. })));
    shared.truncate(0).unwrap();
    let spikes = spikes(&mut rng, weight.shape(), 9);
    let late = BlockRef { spikes: Some(spikes.view()), ..weight.blocks()[0].view() };
    assert!(matches!(shared.push(late), Err(CudaError::SpikesUnexpected)));
    assert!(matches!(kernels.reconstruct(&stream, &shared, &mut y.as_view_mut()), Err(CudaError::NoPlanes)));
    let (free, _) = context.mem_get_info().unwrap();
    assert!(matches!(zeros::<u8>(&stream, "much", 64 * free + (1 << 45)), Err(CudaError::OutOfMemory { .. })));
}
