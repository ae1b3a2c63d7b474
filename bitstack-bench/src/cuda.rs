//! How fast the kernels are on a device, beside a plain copy and cuBLAS, and that they are right: the rows of the bench's table.
//!
//! Each time is the mean over a CUDA graph of launches on different copies of the weight, more of them than the second-level cache holds,
//! median of five. Weights are random: gaussian factors, random signs. Nothing is printed here.

use crate::random::SplitMix;
use crate::statistics::median;
use bitstack_core::{Basis, Block, BlockRef, Coefficients, Level, Shape, SignMatrix, Values, f16};
use bitstack_cuda::cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use bitstack_cuda::cudarc::driver::{CudaSlice, CudaStream, DriverError};
use bitstack_cuda::{
    CublasProduct, CudaError, DeviceStack, Kernels, Origin, Workspace, context, download, upload, zeros,
};
use bitstack_pack::row_bytes;
use std::fmt;
use std::sync::Arc;

/// Bytes that successive launches must read before one comes again: above the caches of all devices so far.
const SPREAD_BYTES: usize = 256 << 20;
/// The most copies of a weight.
const MAX_COPIES: usize = 48;
/// Rows of y that are compared with f64.
const CHECKED_ROWS: usize = 16;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Cases {
    /// Rows and columns of weights.
    pub shapes: Vec<(usize, usize)>,
    /// Levels of the stacks; rank above 1 has a basis in every block, rank 1 one for all.
    pub levels: Vec<usize>,
    /// Ranks of the stacks.
    pub ranks: Vec<usize>,
    /// Numbers of tokens.
    pub batches: Vec<usize>,
}

impl Default for Cases {
    /// The shapes of models of 8 and 70 billion weights, levels 1 to 6, ranks 1 and 16, batches 1, 4, 16 and 256.
    fn default() -> Self {
        Self {
            shapes: vec![(4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672)],
            levels: (1..=6).collect(),
            ranks: vec![1, 16],
            batches: vec![1, 4, 16, 256],
        }
    }
}

impl Cases {
    /// The number of products: every shape at every level, rank and number of tokens.
    pub fn len(&self) -> usize {
        self.shapes.len() * self.levels.len() * self.ranks.len() * self.batches.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A kernel, by what it does with a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// [`Kernels::fused`].
    Fused,
    /// [`Kernels::batch`].
    Batch,
}

/// One measurement.
#[derive(Debug, Clone)]
pub struct Row {
    /// Rows of the weight.
    pub rows: usize,
    /// Columns of the weight.
    pub cols: usize,
    /// Rank of its blocks.
    pub rank: usize,
    /// Planes used.
    pub level: usize,
    /// Tokens multiplied at once, f16.
    pub tokens: usize,
    /// The kernel: the faster one of those that apply.
    pub method: Method,
    /// Time of one product, all its launches.
    pub microseconds: f64,
    /// Bytes of the planes used, as on disk.
    pub compressed_bytes: u64,
    /// Compressed bytes per time.
    pub gigabytes_per_second: f64,
    /// That over the bandwidth of a copy inside the device.
    pub ratio_to_copy: f64,
    /// Time of cuBLAS's product with the same weight in f16, where there is cuBLAS.
    pub cublas_microseconds: Option<f64>,
    /// ‖y − W x‖ / ‖W x‖ over some rows of one token, against f64.
    pub relative_error: f64,
}

/// All measurements of a device.
#[derive(Debug, Clone)]
pub struct Report {
    /// The device's name.
    pub device: String,
    /// Where the kernels come from.
    pub origin: Origin,
    /// Bytes read and written by a copy inside the device, per time.
    pub copy_gigabytes_per_second: f64,
    /// The measurements, in the order of the cases.
    pub rows: Vec<Row>,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = if self.method == Method::Fused { "fused" } else { "batch" };
        let cublas = self.cublas_microseconds.map_or("-".to_owned(), |us| format!("{us:.1}"));
        let ratio = self.cublas_microseconds.map_or("-".to_owned(), |us| format!("{:.2}", us / self.microseconds));
        write!(
            f,
            "| {} x {} | {} | {} | {} | {method} | {:.1} | {:.0} | {:.2} | {cublas} | {ratio} | {:.1e} |",
            self.rows,
            self.cols,
            self.rank,
            self.level,
            self.tokens,
            self.microseconds,
            self.gigabytes_per_second,
            self.ratio_to_copy,
            self.relative_error
        )
    }
}

/// The head of a table of [`Row`]s, two lines.
pub const TABLE_HEAD: &str = "\
| weight | rank | level | tokens | kernel | us | GB/s | of copy | cuBLAS f16 us | times faster | error |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernels = if self.origin == Origin::Compiled { "compiled by NVRTC" } else { "precompiled" };
        writeln!(f, "{}, kernels {kernels}; a copy moves {:.0} GB/s\n", self.device, self.copy_gigabytes_per_second)?;
        writeln!(f, "{TABLE_HEAD}")?;
        self.rows.iter().try_for_each(|row| writeln!(f, "{row}"))
    }
}

/// Measures all cases on a device, calling `on_row` after each. The default cases take about five minutes, most of it making weights.
///
/// # Errors
/// Those of the device. Cases whose weights do not fit in its memory end the run with [`CudaError::OutOfMemory`].
pub fn run(ordinal: usize, cases: &Cases, mut on_row: impl FnMut(&Row)) -> Result<Report, CudaError> {
    let context = context(ordinal)?;
    let kernels = Kernels::new(&context)?;
    // A stream that graphs can be captured from. The context makes no other, so its buffers wait for no events, which would end a capture.
    let stream = context.per_thread_stream();
    let mut report = Report {
        device: context.name().map_err(cannot("say the device's name"))?,
        origin: kernels.origin(),
        copy_gigabytes_per_second: copy_bandwidth(&stream)?,
        rows: Vec::new(),
    };
    for &(rows, cols) in &cases.shapes {
        let shape = Shape::new(rows, cols).map_err(|source| CudaError::Shape { source })?;
        let mut dense = Vec::new();
        for &tokens in &cases.batches {
            dense.push(cublas_time(&stream, shape, tokens)?);
        }
        for &rank in &cases.ranks {
            let most = cases.levels.iter().copied().max().unwrap_or(0);
            let blocks: Vec<Block> = (0..most).map(|i| random_block(shape, rank, i)).collect();
            let copies = (SPREAD_BYTES / (shape.n_elems() / 8)).clamp(2, MAX_COPIES);
            let views = || blocks.iter().map(Block::view);
            let stacks = (0..copies).map(|_| DeviceStack::from_blocks(&stream, shape, views()));
            let mut weights = Weights { shape, stacks: stacks.collect::<Result<_, _>>()? };
            let mut levels = cases.levels.clone();
            levels.sort_unstable_by(|a, b| b.cmp(a));
            for level in levels {
                weights.stacks.iter_mut().try_for_each(|s| s.truncate(level as u32))?;
                for (&tokens, &cublas_microseconds) in cases.batches.iter().zip(&dense) {
                    let row = weights.measure(&kernels, &stream, &blocks[..level], tokens)?;
                    let row = Row {
                        ratio_to_copy: row.gigabytes_per_second / report.copy_gigabytes_per_second,
                        cublas_microseconds,
                        ..row
                    };
                    on_row(&row);
                    report.rows.push(row);
                }
            }
        }
    }
    Ok(report)
}

/// What the driver cannot do, as an error.
fn cannot(doing: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |source| CudaError::Driver { doing, source }
}

/// Copies of one weight on the device.
struct Weights {
    shape: Shape,
    stacks: Vec<DeviceStack>,
}

impl Weights {
    fn measure(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        blocks: &[Block],
        tokens: usize,
    ) -> Result<Row, CudaError> {
        let (rows, cols) = (self.shape.rows(), self.shape.cols());
        let mut numbers = SplitMix(tokens as u64);
        let x: Vec<f16> = (0..tokens * cols).map(|_| f16::from_f32(numbers.gauss())).collect();
        let x_device = upload(stream, "x", &x)?;
        let mut y = zeros::<f32>(stream, "y", tokens * rows)?;
        let bytes = kernels.workspace_bytes(&[&self.stacks[0]], tokens)?;
        let mut workspace = Workspace::new(stream, bytes)?;

        let mut best: Option<(Method, f64, Vec<f32>)> = None;
        for method in [Method::Fused, Method::Batch] {
            // Either would win only by the other's defect.
            if (method == Method::Fused && tokens > 64) || (method == Method::Batch && tokens < 8) {
                continue;
            }
            let mut product = |copy: usize, y: &mut CudaSlice<f32>| {
                let stack = &self.stacks[copy];
                let mut y = y.as_view_mut();
                match method {
                    Method::Fused => {
                        kernels.fused(stream, &[stack], tokens, &x_device.as_view(), &mut [y], &mut workspace)
                    }
                    Method::Batch => kernels.batch(stream, stack, tokens, &x_device.as_view(), &mut y),
                }
            };
            product(0, &mut y)?;
            let result = download(stream, &y)?;
            let microseconds = time(stream, self.stacks.len(), |copy| product(copy, &mut y))?;
            if best.as_ref().is_none_or(|(_, us, _)| microseconds < *us) {
                best = Some((method, microseconds, result));
            }
        }
        let (method, microseconds, y) = best.expect("one method applies to any number of tokens");
        let compressed_bytes = blocks.iter().filter_map(|b| b.view().layout().ok()?.bytes()).sum();
        Ok(Row {
            rows,
            cols,
            rank: blocks[0].view().coefficients.rank(),
            level: blocks.len(),
            tokens,
            method,
            microseconds,
            compressed_bytes,
            gigabytes_per_second: compressed_bytes as f64 / microseconds / 1e3,
            ratio_to_copy: 0.0,
            cublas_microseconds: None,
            relative_error: relative_error(self.shape, blocks, &x[..cols], &y[..rows]),
        })
    }
}

/// Microseconds of one call of `work`, which gets the numbers of `copies` copies in turn.
fn time(
    stream: &Arc<CudaStream>,
    copies: usize,
    mut work: impl FnMut(usize) -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let launches = copies.max(24);
    stream.synchronize().map_err(cannot("finish its work"))?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(cannot("begin a graph"))?;
    let captured = (0..launches).try_for_each(|i| work(i % copies));
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).map_err(cannot("end a graph"))?;
    captured?;
    let Some(graph) = graph else {
        return Err(CudaError::Mismatch { what: "launches in a graph", expected: launches, actual: 0 });
    };
    graph.launch().map_err(cannot("launch a graph"))?;
    let mut times = Vec::new();
    for _ in 0..5 {
        let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let begin = stream.record_event(flags).map_err(cannot("record an event"))?;
        graph.launch().map_err(cannot("launch a graph"))?;
        let end = stream.record_event(flags).map_err(cannot("record an event"))?;
        let milliseconds = begin.elapsed_ms(&end).map_err(cannot("say the time between events"))?;
        times.push(f64::from(milliseconds) * 1e3 / launches as f64);
    }
    Ok(median(&times))
}

/// GB/s read and written by a copy of 1 GiB (or what fits).
fn copy_bandwidth(stream: &Arc<CudaStream>) -> Result<f64, CudaError> {
    let (free, _) = stream.context().mem_get_info().map_err(cannot("say how much memory is free"))?;
    let bytes = (1 << 30).min(free / 4);
    let from = zeros::<u8>(stream, "a copy", bytes)?;
    let mut to = zeros::<u8>(stream, "a copy", bytes)?;
    let microseconds = time(stream, 1, |_| stream.memcpy_dtod(&from, &mut to).map_err(cannot("copy")))?;
    Ok(2.0 * bytes as f64 / microseconds / 1e3)
}

/// Microseconds of cuBLAS's product with f16 weights, where there is cuBLAS.
fn cublas_time(stream: &Arc<CudaStream>, shape: Shape, tokens: usize) -> Result<Option<f64>, CudaError> {
    let (rows, cols) = (shape.rows(), shape.cols());
    let Some(blas) = CublasProduct::new(stream)? else { return Ok(None) };
    let mut numbers = SplitMix(0);
    let mut random = |n: usize| -> Vec<f16> { (0..n).map(|_| f16::from_f32(numbers.gauss() * 0.02)).collect() };
    let copies = (SPREAD_BYTES / (2 * shape.n_elems())).clamp(1, MAX_COPIES);
    // A power-hungry product of random values; copies may hold the same.
    let values = random(shape.n_elems().min(1 << 22)).repeat(shape.n_elems().div_ceil(1 << 22));
    let weights = (0..copies).map(|_| upload(stream, "an f16 weight", &values[..shape.n_elems()]));
    let weights: Vec<CudaSlice<f16>> = weights.collect::<Result<_, _>>()?;
    let x = upload(stream, "x", &random(tokens * cols))?;
    let mut y = zeros::<f16>(stream, "y", tokens * rows)?;
    // Once outside a graph: the library sets itself up at its first call.
    blas.apply((rows, cols, tokens), &weights[0], &x, &mut y)?;
    time(stream, copies, |copy| blas.apply((rows, cols, tokens), &weights[copy], &x, &mut y)).map(Some)
}

/// Over some rows, spread over the weight, by the reference arithmetic on a weight of those rows alone.
fn relative_error(shape: Shape, blocks: &[Block], x: &[f16], y: &[f32]) -> f64 {
    let chosen: Vec<usize> = (0..CHECKED_ROWS).map(|i| i * (shape.rows() - 1) / (CHECKED_ROWS - 1)).collect();
    let some: Vec<Block> = blocks.iter().map(|b| rows_of(b.view(), &chosen)).collect();
    let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    let expected = Shape::new(CHECKED_ROWS, shape.cols())
        .and_then(|shape| Level::new(shape, some.iter().map(Block::view)))
        .and_then(|level| level.matvec(&x))
        .expect("rows of a weight are a weight");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let errors = norm(&mut chosen.iter().zip(&expected).map(|(&r, e)| f64::from(y[r]) - e));
    errors / norm(&mut expected.iter().copied())
}

/// The block of some rows of a weight; f16 factors, no spikes.
fn rows_of(block: BlockRef<'_>, rows: &[usize]) -> Block {
    let (signs, u) = (block.signs, block.coefficients);
    let bits = rows.iter().flat_map(|&r| signs.row(r).into_owned()).collect();
    let (planes, rank) = (u.planes(), u.rank());
    let values =
        rows.iter().flat_map(|&r| (0..planes * rank).map(move |i| f16::from_f32(u.get(r, i / rank, i % rank))));
    let v = block.basis.map(|v| Basis::new(rank, v.cols(), v.values().to_owned()));
    Block {
        signs: SignMatrix::from_bytes(rows.len(), signs.cols(), bits).expect("whole rows"),
        basis: v.transpose().expect("the same basis"),
        coefficients: Coefficients::new(rows.len(), planes, rank, Values::F16(values.collect()))
            .expect("some of the coefficients"),
        spikes: None,
    }
}

/// Block `index` of a random weight: refitted with one basis for rank 1, additive with its own basis above.
fn random_block(shape: Shape, rank: usize, index: usize) -> Block {
    let (rows, cols) = (shape.rows(), shape.cols());
    let mut numbers = SplitMix((rows + cols + rank * 1000 + index) as u64);
    let mut bytes = vec![0; rows * row_bytes(cols)];
    numbers.signs(&mut bytes, cols);
    let mut values = |n: usize, size: f32| Values::F16((0..n).map(|_| f16::from_f32(numbers.gauss() * size)).collect());
    let planes = if rank == 1 { index + 1 } else { 1 };
    let size = 0.5f32.powi(index as i32) / (rank as f32).sqrt();
    Block {
        signs: SignMatrix::from_bytes(rows, cols, bytes).expect("as many bytes as a sign matrix has"),
        basis: (index == 0 || rank > 1)
            .then(|| Basis::new(rank, cols, values(rank * cols, 1.0)).expect("finite values")),
        coefficients: Coefficients::new(rows, planes, rank, values(rows * planes * rank, size)).expect("finite values"),
        spikes: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_weights_are_valid_stacks_and_their_rows_are_theirs() {
        for rank in [1, 16] {
            let shape = Shape::new(37, 133).unwrap();
            let blocks: Vec<Block> = (0..3).map(|i| random_block(shape, rank, i)).collect();
            let level = Level::new(shape, blocks.iter().map(Block::view)).unwrap();
            let mut numbers = SplitMix(3);
            let x: Vec<f16> = (0..133).map(|_| f16::from_f32(numbers.gauss())).collect();
            let x32: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
            let y: Vec<f32> = level.matvec(&x32).unwrap().into_iter().map(|y| y as f32).collect();
            assert!(relative_error(shape, &blocks, &x, &y) < 1e-7);
            let wrong: Vec<f32> = y.iter().map(|y| y * 1.01).collect();
            assert!((relative_error(shape, &blocks, &x, &wrong) - 0.01).abs() < 1e-4);
        }
    }

    #[test]
    fn measuring_without_a_device_is_an_error() {
        assert!(matches!(
            run(usize::MAX, &Cases::default(), |_| ()),
            Err(CudaError::NoDriver | CudaError::NoDevice { .. })
        ));
    }
}
