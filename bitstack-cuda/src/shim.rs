//! Every kernel, run on the CPU under the address and undefined-behaviour sanitizers, against [`Level`] in f64.
//!
//! `shim/driver.cpp` holds the kernel sources and a shim for what they need of a GPU; it is compiled here with g++ and spoken to
//! through pipes. What this covers: all arithmetic, indices, tails, barriers and the layout of memory and parameters. What it does not:
//! the instructions themselves, timing, and memory shared between warps without a barrier in an order that the three tried do not show.
#![expect(clippy::print_stdout, reason = "tests say what they skip and what they find")]

use crate::layout::{
    BlockAddress, FactorAddress, PackedFactor, device_bytes, pack_basis, pack_coefficients, pack_signs, pack_spikes,
    weight_table,
};
use crate::plan::{
    BatchParameters, FusedPlan, Launch, Limits, ReconstructParameters, Size, batch_launch, reconstruct_launch,
    spikes_launch,
};
use bitstack_core::{
    Basis, Block, BlockRef, Coefficients, Level, SPIKE_SIZES, Shape, SignMatrix, Spike, Spikes, SpikesRef, Values,
    WeightStack, f16,
};
use bytemuck::Pod;
use half::bf16;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

/// The orders in which the threads of a block get their turn: first come first served, last come first served, at random.
const ORDERS: [u64; 3] = [0, 1, 7];

/// The compiled driver, or `None` where there is no g++ that can compile it.
fn driver() -> Option<&'static Path> {
    static DRIVER: OnceLock<Option<(tempfile::TempDir, PathBuf)>> = OnceLock::new();
    DRIVER.get_or_init(compile).as_ref().map(|(_, path)| path.as_path())
}

fn compile() -> Option<(tempfile::TempDir, PathBuf)> {
    if Command::new("g++").arg("--version").output().is_err() {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("driver");
    let mut compiler = Command::new("g++");
    compiler.args(["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]);
    compiler.args(["-Wno-unused-function", "-Wno-clobbered", "-fno-sanitize-recover=all"]);
    compiler.arg("-fsanitize=address,undefined").arg("-o").arg(&path);
    let output = compiler.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("shim/driver.cpp")).output().unwrap();
    assert!(output.status.success(), "the shim does not compile:\n{}", String::from_utf8_lossy(&output.stderr));
    Some((dir, path))
}

/// A device in a process.
struct Shim {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
}

impl Shim {
    fn start() -> Option<Self> {
        let Some(driver) = driver() else {
            println!("skipped: no g++, so the kernels cannot run on the CPU");
            return None;
        };
        let mut child = Command::new(driver).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Some(Self { child, input, output })
    }

    fn send(&mut self, command: u8, numbers: &[u64]) {
        self.input.write_all(&[command]).unwrap();
        self.numbers(numbers);
    }

    fn numbers(&mut self, numbers: &[u64]) {
        numbers.iter().for_each(|n| self.input.write_all(&n.to_le_bytes()).unwrap());
    }

    fn allocate(&mut self, bytes: usize) -> u64 {
        self.send(b'a', &[bytes as u64]);
        let mut address = [0; 8];
        self.output.read_exact(&mut address).expect("the driver is alive");
        u64::from_le_bytes(address)
    }

    fn upload(&mut self, bytes: &[u8]) -> u64 {
        let address = self.allocate(bytes.len());
        self.send(b'w', &[address, bytes.len() as u64]);
        self.input.write_all(bytes).unwrap();
        address
    }

    fn download(&mut self, address: u64, bytes: usize) -> Vec<u8> {
        self.send(b'r', &[address, bytes as u64]);
        let mut data = vec![0; bytes];
        self.output.read_exact(&mut data).expect("the driver is alive");
        data
    }

    fn launch(&mut self, launch: Launch, order: u64, parameters: &impl Pod) {
        let Launch { kernel, grid, threads, shared_bytes } = launch;
        self.send(b'l', &[kernel.len() as u64]);
        self.input.write_all(kernel.as_bytes()).unwrap();
        self.numbers(&grid.map(|n| n as u64));
        let parameters = bytemuck::bytes_of(parameters);
        self.numbers(&[threads as u64, shared_bytes as u64, order, parameters.len() as u64]);
        self.input.write_all(parameters).unwrap();
        self.input.flush().unwrap();
        let done = self.output.read_exact(&mut [0]);
        done.unwrap_or_else(|_| panic!("{kernel} {grid:?} fails on the CPU; the sanitizer's report is above"));
    }

    fn factor(&mut self, packed: &PackedFactor) -> FactorAddress {
        let scales = packed.scales.as_ref().map(|s| self.upload(s));
        FactorAddress { values: (!packed.values.is_empty()).then(|| self.upload(&packed.values)), scales }
    }

    /// A weight's table and parts.
    fn weight(&mut self, stack: &WeightStack) -> u64 {
        self.weight_of(stack.shape(), stack.blocks().iter().map(Block::view))
    }

    fn weight_of<'a>(&mut self, shape: Shape, views: impl IntoIterator<Item = BlockRef<'a>>) -> u64 {
        let (mut blocks, mut rank) = (Vec::new(), 1);
        for view in views {
            rank = view.coefficients.rank();
            let (signs, coefficients) = (pack_signs(view.signs), pack_coefficients(view.coefficients));
            let basis = view.basis.map(pack_basis);
            let spikes = view.spikes.map(pack_spikes);
            let packed = [Some(&coefficients), basis.as_ref()].into_iter().flatten();
            let factors: usize = packed.map(|f| f.values.len() + f.scales.as_ref().map_or(0, Vec::len)).sum();
            assert_eq!(device_bytes(&view), signs.len() + factors + spikes.as_ref().map_or(0, Vec::len));
            blocks.push(BlockAddress {
                signs: self.upload(&signs),
                basis: basis.map(|v| self.factor(&v)),
                coefficients: self.factor(&coefficients),
                planes: view.coefficients.planes(),
                spikes: spikes.map(|s| self.upload(&s)),
            });
        }
        let table = weight_table(shape, rank, &blocks);
        self.upload(bytemuck::bytes_of(&table))
    }

    /// y of each weight, `tokens x rows`.
    fn fused(&mut self, case: &Fused<'_>, x: &Numbers, order: u64) -> Vec<Vec<f32>> {
        let sizes: Vec<Size> = case.stacks.iter().map(size).collect();
        let mut plan = FusedPlan::new(case.limits, &sizes, case.tokens);
        plan.parameters.x = self.upload(&x.bytes);
        (plan.parameters.x_type, plan.parameters.y_type) = (x.kind as u32, case.y as u32);
        let y_bytes: Vec<usize> = sizes.iter().map(|s| s.rows * case.tokens * case.y.bytes()).collect();
        for (i, stack) in case.stacks.iter().enumerate() {
            let w = &mut plan.parameters.weight[i];
            (w.weight, w.y) = (self.weight(stack), self.allocate(y_bytes[i]));
            if plan.operand_bytes > 0 {
                w.operands = self.allocate(plan.operand_bytes);
            }
        }
        assert_eq!(plan.prepare.is_none(), case.own, "{:?}", plan.product);
        for launch in plan.launches() {
            self.launch(*launch, order, &plan.parameters);
        }
        (0..sizes.len()).map(|i| case.y.read(&self.download(plan.parameters.weight[i].y, y_bytes[i]))).collect()
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        // Its memory is checked for leaks when it ends by itself; a test that already fails has said why.
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    F32 = 0,
    F16 = 1,
    Bf16 = 2,
}

impl Kind {
    fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn read(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self {
            Self::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Self::F16 => halves().map(|b| f16::from_bits(b).to_f32()).collect(),
            Self::Bf16 => halves().map(|b| bf16::from_bits(b).to_f32()).collect(),
        }
    }

    /// The error of rounding to this type, relative.
    fn rounding(self) -> f64 {
        match self {
            Self::F32 => f64::from(f32::EPSILON),
            Self::F16 => 2f64.powi(-11),
            Self::Bf16 => 2f64.powi(-8),
        }
    }
}

/// Numbers of some type, and what they are in f32.
struct Numbers {
    kind: Kind,
    bytes: Vec<u8>,
    values: Vec<f32>,
}

impl Numbers {
    fn new(kind: Kind, values: &[f32]) -> Self {
        let bytes: Vec<u8> = match kind {
            Kind::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Kind::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Kind::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        };
        Self { kind, values: kind.read(&bytes), bytes }
    }
}

struct Fused<'a> {
    stacks: &'a [WeightStack],
    tokens: usize,
    y: Kind,
    limits: Limits,
    /// Whether Z is expected to be prepared inside the product.
    own: bool,
}

/// A device of two multiprocessors, so that blocks get several tiles each; shared memory of an H200.
const SMALL: Limits = Limits { multiprocessors: 2, shared_per_multiprocessor: 233_472, shared_per_block: 232_448 };

/// As the plan sees a stack.
fn size(stack: &WeightStack) -> Size {
    let bases = stack.blocks().iter().filter(|b| b.basis.is_some()).count();
    let spikes = stack.blocks()[0].spikes.is_some();
    Size { rows: stack.shape().rows(), cols: stack.shape().cols(), rank: stack.rank().unwrap(), bases, spikes }
}

fn gauss(rng: &mut StdRng) -> f32 {
    let (a, b): (f64, f64) = (rng.random(), rng.random());
    ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
}

/// What blocks are like.
#[derive(Debug, Clone, Copy)]
struct Kinds {
    own_bases: bool,
    refitted: bool,
    eight_bit: bool,
    /// How many.
    spikes: usize,
}

const SHARED: Kinds = Kinds { own_bases: false, refitted: true, eight_bit: false, spikes: 0 };
const ADDITIVE: Kinds = Kinds { own_bases: true, refitted: false, eight_bit: false, spikes: 0 };

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

fn stack(rng: &mut StdRng, (rows, cols): (usize, usize), rank: usize, planes: usize, kinds: Kinds) -> WeightStack {
    let mut stack = WeightStack::new(Shape::new(rows, cols).unwrap());
    for i in 1..=planes {
        let mut values = |n: usize, vectors: usize, size: f32| {
            if kinds.eight_bit {
                let codes = (0..n).map(|_| (gauss(rng) * 40.0) as i8).collect();
                Values::I8 { codes, scales: (0..vectors).map(|v| f16::from_f32(size / (40 + v) as f32)).collect() }
            } else {
                Values::F16((0..n).map(|_| f16::from_f32(gauss(rng) * size)).collect())
            }
        };
        let basis =
            (i == 1 || kinds.own_bases).then(|| Basis::new(rank, cols, values(rank * cols, rank, 1.0)).unwrap());
        let count = if kinds.refitted { i } else { 1 };
        let u = match values(rows * count * rank, count * rank, 0.5f32.powi(i as i32)) {
            // Some blocks bring no codes of their own.
            Values::I8 { scales, .. } if i % 3 == 2 => Values::Scales(scales),
            u => u,
        };
        let signs: Vec<f32> = (0..rows * cols).map(|_| gauss(rng)).collect();
        let signs = SignMatrix::from_f32(rows, cols, &signs).unwrap();
        let coefficients = Coefficients::new(rows, count, rank, u).unwrap();
        let spikes = (i == 1 && kinds.spikes > 0).then(|| spikes(rng, stack.shape(), kinds.spikes));
        stack.push(Block { signs, basis, coefficients, spikes }).unwrap();
    }
    stack
}

/// What the spikes add to a row of y.
#[derive(Debug, Clone, Copy, Default)]
struct SpikeSum {
    exact: f64,
    /// Σ of the terms' absolute values.
    size: f64,
    /// The most that f32 may be off by: a term is a product of five factors, some of them products themselves, and the sum has as many
    /// additions as terms, and one more to what y was.
    bound: f64,
}

fn spike_sums(level: &Level<'_>, x: &[f32]) -> Vec<SpikeSum> {
    let mut sums = vec![SpikeSum::default(); level.shape().rows()];
    let Some(spikes) = level.spikes() else { return sums };
    let mut terms = vec![0; sums.len()];
    for (r, c, value) in (0..spikes.list.n_tiles()).flat_map(|tile| spikes.list.entries(tile)) {
        let unit = f64::from(spikes.row_unit(r)) * f64::from(spikes.basis.get(0, c));
        let term = f64::from(value) * unit * f64::from(x[c]);
        sums[r].exact += term;
        sums[r].size += term.abs();
        terms[r] += 1;
    }
    for (sum, terms) in sums.iter_mut().zip(terms) {
        sum.bound = f64::from(terms + 8) * f64::from(f32::EPSILON) * sum.size;
    }
    sums
}

/// For each row, the most that y may be off by, spikes aside: every z is rounded to a multiple of the largest z of its 512 columns over 32512, or of
/// twice that, so is off by at most that largest over 32512; the rest is f32 arithmetic on terms that add up to Σ |U| |z| at most.
fn fused_bound(level: &Level<'_>, x: &[f32]) -> Vec<f64> {
    let mut bound = vec![0.0; level.shape().rows()];
    for p in level.planes() {
        for k in 0..p.basis.rank() {
            let z: Vec<f64> = x.iter().enumerate().map(|(c, &x)| f64::from(p.basis.get(k, c) * x).abs()).collect();
            let step: f64 =
                z.chunks(512).map(|z| z.iter().fold(0.0, |a: f64, &b| a.max(b)) / 32512.0 * z.len() as f64).sum();
            let sum: f64 = z.iter().sum();
            for (r, bound) in bound.iter_mut().enumerate() {
                *bound +=
                    f64::from(p.coefficients.get(r, p.plane, k).abs()) * (step + 16.0 * f64::from(f32::EPSILON) * sum);
            }
        }
    }
    bound
}

fn norm(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Checks y against the oracle, element by element; returns the error's norm over that of y.
fn check_fused(stack: &WeightStack, x: &Numbers, tokens: usize, y: &[f32], kind: Kind, what: &str) -> f64 {
    let (rows, cols) = (stack.shape().rows(), stack.shape().cols());
    let level = stack.level(stack.top_level()).unwrap();
    let (mut errors, mut exact) = (Vec::new(), Vec::new());
    for token in 0..tokens {
        let x = &x.values[token * cols..][..cols];
        let (expected, bound, spikes) = (level.matvec(x).unwrap(), fused_bound(&level, x), spike_sums(&level, x));
        for r in 0..rows {
            let error = (f64::from(y[token * rows + r]) - expected[r]).abs();
            let bound = bound[r] + spikes[r].bound;
            // y is rounded with the spikes and, where there are any, before; halves have a smallest step of 2^-24.
            let before = if spikes[r].size > 0.0 { expected[r].abs() + spikes[r].size } else { 0.0 };
            let bound = bound + kind.rounding() * (expected[r].abs() + before + 2.0 * bound) + 2f64.powi(-24);
            assert!(
                error <= bound,
                "{what}: token {token}, row {r}: {} for {}, {error:e} > {bound:e}",
                y[token * rows + r],
                expected[r]
            );
            errors.push(error);
            exact.push(expected[r]);
        }
    }
    norm(errors) / norm(exact)
}

fn inputs(rng: &mut StdRng, kind: Kind, n: usize) -> Numbers {
    Numbers::new(kind, &(0..n).map(|_| gauss(rng)).collect::<Vec<_>>())
}

#[test]
fn fused_products_of_one_shared_basis_are_the_definition() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(1);
    // Rows: one, a whole tile, one more; columns: inside a byte, a unit, a chunk, two, nine chunks for eight warps.
    let shapes = [(1, 1), (16, 128), (17, 7), (33, 600), (15, 512), (50, 1030), (20, 4100)];
    for (i, shape) in shapes.into_iter().enumerate() {
        for planes in [1, 2, 3, 5] {
            for tokens in [1, 3, 4] {
                let kinds =
                    Kinds { eight_bit: planes == 3, refitted: planes != 2, spikes: (planes - 1) * 20, ..SHARED };
                let stacks = [stack(&mut rng, shape, 1, planes, kinds)];
                let x = inputs(&mut rng, [Kind::F32, Kind::F16, Kind::Bf16][i % 3], tokens * shape.1);
                let case = Fused { stacks: &stacks, tokens, y: Kind::F32, limits: SMALL, own: true };
                let y = shim.fused(&case, &x, ORDERS[(i + planes) % 3]);
                check_fused(
                    &stacks[0],
                    &x,
                    tokens,
                    &y[0],
                    Kind::F32,
                    &format!("{shape:?}, {planes} planes, {tokens} tokens"),
                );
            }
        }
    }
}

#[test]
fn fused_products_of_any_rank_and_batch_are_the_definition() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(2);
    for rank in [1, 2, 3, 4, 5, 16, 17] {
        for tokens in 1..=17 {
            if ![1, 2, 4, 16].contains(&rank) && ![1, 2, 5, 17].contains(&tokens) {
                continue;
            }
            let shape = [(33, 600), (17, 130), (5, 1100)][tokens % 3];
            let kinds = Kinds {
                own_bases: tokens % 2 == 0,
                refitted: tokens % 3 == 0,
                eight_bit: tokens % 5 == 0,
                spikes: tokens % 4 * 20,
            };
            let stacks = [stack(&mut rng, shape, rank, 1 + tokens % 4, kinds)];
            let (x_kind, y) =
                ([Kind::F32, Kind::F16, Kind::Bf16][tokens % 3], [Kind::F16, Kind::F32, Kind::Bf16][rank % 3]);
            let x = inputs(&mut rng, x_kind, tokens * shape.1);
            let own = rank == 1 && tokens <= 4 && size(&stacks[0]).bases == 1;
            let case = Fused { stacks: &stacks, tokens, y, limits: SMALL, own };
            let out = shim.fused(&case, &x, ORDERS[tokens % 3]);
            check_fused(
                &stacks[0],
                &x,
                tokens,
                &out[0],
                y,
                &format!("{shape:?}, rank {rank}, {tokens} tokens, {kinds:?}"),
            );
        }
    }
}

#[test]
fn the_order_of_threads_does_not_change_a_bit() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(3);
    for (rank, kinds, own) in [(1, Kinds { spikes: 1500, ..SHARED }, true), (4, ADDITIVE, false)] {
        let stacks = [stack(&mut rng, (70, 1300), rank, 3, kinds)];
        let x = inputs(&mut rng, Kind::F16, 2 * 1300);
        let case = Fused { stacks: &stacks, tokens: 2, y: Kind::F32, limits: SMALL, own };
        let results = ORDERS.map(|order| shim.fused(&case, &x, order));
        assert_eq!(results[0], results[1]);
        assert_eq!(results[0], results[2]);
        // Nor does the number of multiprocessors.
        let many = Fused { limits: Limits { multiprocessors: 100, ..SMALL }, ..case };
        assert_eq!(results[0], shim.fused(&many, &x, 0));
    }
}

#[test]
fn weights_with_one_input_can_share_a_launch() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(4);
    for (rank, kinds, own) in [(1, SHARED, true), (2, ADDITIVE, false), (1, ADDITIVE, false)] {
        let planes_and_rows = [(3, 65), (1, 17), (4, 33), (2, 1)];
        // One launch adds the spikes of those that have some, of several tiles and of one.
        let stacks = planes_and_rows.map(|(planes, rows)| {
            let kinds = Kinds { spikes: if planes % 2 == 0 { 0 } else { rows }, ..kinds };
            stack(&mut rng, (rows, 700), rank, planes, kinds)
        });
        let x = inputs(&mut rng, Kind::F32, 2 * 700);
        for multiprocessors in [1, 3] {
            let limits = Limits { multiprocessors, ..SMALL };
            let y = shim.fused(&Fused { stacks: &stacks, tokens: 2, y: Kind::F32, limits, own }, &x, ORDERS[rank]);
            for (stack, y) in stacks.iter().zip(&y) {
                check_fused(stack, &x, 2, y, Kind::F32, &format!("rank {rank}, {} rows", stack.shape().rows()));
            }
        }
    }
}

#[test]
fn fused_products_are_within_a_thousandth_even_with_outliers() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(5);
    for (rank, kinds, own) in [(1, SHARED, true), (16, ADDITIVE, false)] {
        let stacks = [stack(&mut rng, (48, 4096), rank, 2, kinds)];
        for outliers in [0, 8] {
            let mut x: Vec<f32> = (0..4096).map(|_| gauss(&mut rng)).collect();
            (0..outliers).for_each(|i| x[i * 499] *= 50.0);
            let x = Numbers::new(Kind::F32, &x);
            let case = Fused { stacks: &stacks, tokens: 1, y: Kind::F32, limits: SMALL, own };
            let y = shim.fused(&case, &x, 0);
            let error = check_fused(&stacks[0], &x, 1, &y[0], Kind::F32, "4096 columns");
            println!("rank {rank}, {outliers} outliers: relative error {error:.1e}");
            assert!(error <= 1e-3);
        }
    }
}

#[test]
fn inputs_that_are_not_finite_do_not_go_unnoticed() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(6);
    let stacks = [stack(&mut rng, (18, 600), 1, 2, Kinds { spikes: 30, ..SHARED })];
    for (bad, at) in [(f32::NAN, 3), (f32::INFINITY, 599), (f32::NEG_INFINITY, 512)] {
        let mut x = vec![1.0; 2 * 600];
        x[600 + at] = bad;
        let x = Numbers::new(Kind::F32, &x);
        let y = shim.fused(&Fused { stacks: &stacks, tokens: 2, y: Kind::F32, limits: SMALL, own: true }, &x, 0);
        assert!(y[0][..18].iter().all(|y| y.is_finite()));
        assert!(y[0][18..].iter().all(|y| y.is_nan()));
    }
    // Nothing comes of nothing, and next to nothing of next to nothing: 600 terms below 20, 30 spikes below 1000.
    for small in [0.0, f32::from_bits(1), 1e-37] {
        let x = Numbers::new(Kind::F32, &vec![small; 600]);
        let y = shim.fused(&Fused { stacks: &stacks, tokens: 1, y: Kind::F32, limits: SMALL, own: true }, &x, 0);
        assert!(y[0].iter().all(|&y| y.abs() <= 5e4 * small));
    }
}

#[test]
fn reconstructed_weights_are_those_of_the_reference() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(7);
    for (i, (rank, shape)) in
        [(1, (1, 1)), (2, (67, 7)), (4, (133, 600)), (16, (15, 129)), (17, (16, 1030)), (1, (20, 513))]
            .into_iter()
            .enumerate()
    {
        let kinds =
            Kinds { own_bases: i % 2 == 1, refitted: i % 2 == 0, eight_bit: i == 2, spikes: [0, 300, 80][i % 3] };
        let planes = 1 + i % 4;
        let stack = stack(&mut rng, shape, rank, planes, kinds);
        let expected = stack.level(stack.top_level()).unwrap().reconstruct();
        for kind in [Kind::F32, Kind::F16, Kind::Bf16] {
            let (weight, out) = (shim.weight(&stack), shim.allocate(expected.len() * kind.bytes()));
            let parameters = ReconstructParameters { weight, out, out_type: kind as u32, unused: 0 };
            shim.launch(reconstruct_launch(shape.0, shape.1), ORDERS[i % 3], &parameters);
            let w = kind.read(&shim.download(out, expected.len() * kind.bytes()));
            // Both are f32 sums of rank · planes terms in the same order; contracted multiply-adds round once less. Then come the spikes of
            // a place, which only one of them adds up first: at most all of them, where there is but one place.
            let size = f64::from(expected.iter().fold(0.0f32, |a, b| a.max(b.abs())));
            let at_a_place = if stack.shape().n_elems() < 1000 { kinds.spikes } else { 8.min(kinds.spikes) };
            let terms = (rank * planes + at_a_place) as f64 * size * f64::from(f32::EPSILON);
            for (w, &e) in w.iter().zip(&expected) {
                let bound = 4.0 * terms + kind.rounding() * f64::from(e.abs()) + 2f64.powi(-24);
                assert!((f64::from(*w) - f64::from(e)).abs() <= bound, "{shape:?}, rank {rank}, {kind:?}: {w} for {e}");
            }
        }
    }
}

#[test]
fn batch_products_are_the_definition() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(8);
    let cases = [
        (1, (1, 1), 1),
        (2, (17, 7), 17),
        (1, (65, 200), 129),
        (16, (70, 64), 16),
        (17, (16, 136), 5),
        (4, (64, 513), 128),
    ];
    for (i, (rank, shape, tokens)) in cases.into_iter().enumerate() {
        let kinds = Kinds { own_bases: i % 2 == 1, refitted: i % 2 == 0, eight_bit: i == 3, spikes: i % 3 * 40 };
        let planes = 1 + i % 4;
        let stack = stack(&mut rng, shape, rank, planes, kinds);
        let level = stack.level(stack.top_level()).unwrap();
        let w = level.reconstruct();
        for (kind, kernel) in [(Kind::F16, "batch_half"), (Kind::Bf16, "batch_bfloat")] {
            let x = inputs(&mut rng, kind, tokens * shape.1);
            let y_kind = [Kind::F32, Kind::F16, Kind::Bf16][i % 3];
            let y_bytes = tokens * shape.0 * y_kind.bytes();
            let (weight, x_address, y) = (shim.weight(&stack), shim.upload(&x.bytes), shim.allocate(y_bytes));
            let parameters = BatchParameters {
                weight,
                x: x_address,
                y,
                tokens: tokens as u32,
                x_type: kind as u32,
                y_type: y_kind as u32,
                aligned: u32::from(shape.1.is_multiple_of(8)),
            };
            shim.launch(batch_launch(kernel, shape.0, tokens), ORDERS[i % 3], &parameters);
            if let Some(launch) = spikes_launch(&[size(&stack)], tokens) {
                shim.launch(launch, ORDERS[i % 3], &parameters.for_spikes());
            }
            let y = y_kind.read(&shim.download(y, y_bytes));
            for token in 0..tokens {
                let x = &x.values[token * shape.1..][..shape.1];
                let (expected, spikes) = (level.matvec(x).unwrap(), spike_sums(&level, x));
                for r in 0..shape.0 {
                    // W is rounded to the type of x, then everything is f32; y is rounded, and once more with the spikes, which its
                    // product, and W there, are without.
                    let sum: f64 = w[r * shape.1..][..shape.1].iter().zip(x).map(|(w, x)| f64::from(w * x).abs()).sum();
                    let sum = sum + spikes[r].size;
                    let steps: f64 = x.iter().map(|&x| f64::from(x.abs()) * 2f64.powi(-24)).sum();
                    let f32_sums = (shape.1 + rank * planes) as f64 * f64::from(f32::EPSILON);
                    let bound = (kind.rounding() + f32_sums * 8.0) * sum
                        + steps
                        + spikes[r].bound
                        + y_kind.rounding() * (2.0 * expected[r].abs() + spikes[r].size) * 1.01
                        + 2f64.powi(-24);
                    let error = (f64::from(y[token * shape.0 + r]) - expected[r]).abs();
                    assert!(error <= bound, "{shape:?}, rank {rank}, token {token}, row {r}: {error:e} > {bound:e}");
                }
            }
        }
    }
}

#[test]
fn spikes_are_added_to_what_y_was_for_any_number_of_tiles_entries_and_tokens() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(9);
    // Few entries far apart, so with bridges; more than the 1024 of a step, in one tile and in three of odd height; all at one place.
    let cases = [((130, 3000), 9, 1), ((64, 500), 1500, 4), ((150, 700), 3500, 9), ((1, 1), 1100, 1)];
    for (i, (shape, n, tokens)) in cases.into_iter().enumerate() {
        let kinds = Kinds { eight_bit: i == 1, spikes: n, ..SHARED };
        // At level 2 the coefficients of plane 1 are those of block 2; those of the spikes are not.
        let stack = stack(&mut rng, shape, 1 + i % 2, 2, kinds);
        let x = inputs(&mut rng, [Kind::F32, Kind::F16, Kind::Bf16][i % 3], tokens * shape.1);
        let before = inputs(&mut rng, Kind::F32, tokens * shape.0);
        let launch = spikes_launch(&[size(&stack)], tokens).unwrap();
        // Fewer passes than the tokens need: some blocks do several.
        let launch = Launch { grid: [launch.grid[0], 1, launch.grid[2].min(2)], ..launch };
        let (weight, x_address) = (shim.weight(&stack), shim.upload(&x.bytes));
        let mut results = Vec::new();
        for order in ORDERS {
            let y = shim.upload(&before.bytes);
            let (tokens, x_type) = (tokens as u32, x.kind as u32);
            let parameters = BatchParameters { weight, x: x_address, y, tokens, x_type, y_type: 0, aligned: 0 };
            shim.launch(launch, order, &parameters.for_spikes());
            results.push(Kind::F32.read(&shim.download(y, before.bytes.len())));
        }
        assert!(
            results[0] == results[1] && results[0] == results[2],
            "{shape:?}: the order of threads changes the sums"
        );
        let level = stack.level(2).unwrap();
        for token in 0..tokens {
            for (r, sum) in spike_sums(&level, &x.values[token * shape.1..][..shape.1]).iter().enumerate() {
                let (before, y) = (before.values[token * shape.0 + r], results[0][token * shape.0 + r]);
                let error = (f64::from(y) - f64::from(before) - sum.exact).abs();
                // The last addition rounds y, too.
                let bound = sum.bound + f64::from(f32::EPSILON) * f64::from(before.abs());
                assert!(error <= bound, "{shape:?}, token {token}, row {r}: {error:e} > {bound:e}");
            }
        }
    }
}

#[test]
fn entries_outside_the_weight_add_nothing_and_touch_no_memory() {
    let Some(mut shim) = Shim::start() else { return };
    let mut rng = StdRng::seed_from_u64(10);
    let (rows, cols) = (70, 40);
    let stack = stack(&mut rng, (rows, cols), 1, 1, SHARED);
    // 15 sizes of 1 to 15; 40 entries of size 15 in each of two tiles, rows 0, 7, 14, .. of 64, every second 7 columns on: most of them are
    // beyond the columns, some beyond those of a unit, and in the second tile, which has 6 rows, most are beyond the rows.
    let mut words: Vec<u16> = (1..=15u8).map(|i| f16::from_f32(f32::from(i)).to_bits()).collect();
    words.extend([40, 0, 80, 0]);
    words.extend((0..80).map(|i| (i * 7 % 64) | ((i % 2 * 7) << 6) | (15 << 11)));
    let list = SpikesRef::new(stack.shape(), &words).unwrap();
    assert!(list.check().is_err() && (0..2).all(|tile| list.entries(tile).count() > 0));
    let block = BlockRef { spikes: Some(list), ..stack.blocks()[0].view() };
    let level = Level::new(stack.shape(), [block]).unwrap();

    let x = inputs(&mut rng, Kind::F32, cols);
    let (weight, x_address, y) =
        (shim.weight_of(stack.shape(), [block]), shim.upload(&x.bytes), shim.upload(&[0; 4 * 70]));
    let parameters = BatchParameters { weight, x: x_address, y, tokens: 1, x_type: 0, y_type: 0, aligned: 0 };
    let launch = spikes_launch(&[Size { spikes: true, ..size(&stack) }], 1).unwrap();
    shim.launch(launch, 0, &parameters.for_spikes());
    let y = Kind::F32.read(&shim.download(y, 4 * rows));
    for (sum, y) in spike_sums(&level, &x.values).iter().zip(y) {
        assert!((f64::from(y) - sum.exact).abs() <= sum.bound, "{y} for {}", sum.exact);
    }

    let out = shim.allocate(4 * rows * cols);
    shim.launch(reconstruct_launch(rows, cols), 0, &ReconstructParameters { weight, out, out_type: 0, unused: 0 });
    let w = Kind::F32.read(&shim.download(out, 4 * rows * cols));
    let expected = level.reconstruct();
    // No two entries share a place: sums of two terms, of about 100 at most.
    assert!(w.iter().zip(&expected).all(|(w, e)| (w - e).abs() <= 4.0 * f32::EPSILON * 100.0));
}
