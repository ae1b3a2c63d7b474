//! A device that is a process on the CPU: compiled once, spoken to through pipes.
#![expect(clippy::print_stdout, reason = "tests say what they skip")]

use crate::layout::{
    BlockAddress, FactorAddress, PackedFactor, device_bytes, pack_basis, pack_coefficients, pack_signs, pack_spikes,
    weight_table,
};
use crate::plan::{FusedPlan, Launch, Limits, Size};
use bitstack_core::{Block, BlockRef, Shape, WeightStack, f16};
use bytemuck::Pod;
use half::bf16;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

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
pub(super) struct Shim {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
}

impl Shim {
    pub(super) fn start() -> Option<Self> {
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

    pub(super) fn allocate(&mut self, bytes: usize) -> u64 {
        self.send(b'a', &[bytes as u64]);
        let mut address = [0; 8];
        self.output.read_exact(&mut address).expect("the driver is alive");
        u64::from_le_bytes(address)
    }

    pub(super) fn upload(&mut self, bytes: &[u8]) -> u64 {
        let address = self.allocate(bytes.len());
        self.send(b'w', &[address, bytes.len() as u64]);
        self.input.write_all(bytes).unwrap();
        address
    }

    pub(super) fn download(&mut self, address: u64, bytes: usize) -> Vec<u8> {
        self.send(b'r', &[address, bytes as u64]);
        let mut data = vec![0; bytes];
        self.output.read_exact(&mut data).expect("the driver is alive");
        data
    }

    pub(super) fn launch(&mut self, launch: Launch, order: u64, parameters: &impl Pod) {
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
    pub(super) fn weight(&mut self, stack: &WeightStack) -> u64 {
        self.weight_of(stack.shape(), stack.blocks().iter().map(Block::view))
    }

    pub(super) fn weight_of<'a>(&mut self, shape: Shape, views: impl IntoIterator<Item = BlockRef<'a>>) -> u64 {
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
    pub(super) fn fused(&mut self, case: &Fused<'_>, x: &Numbers, order: u64) -> Vec<Vec<f32>> {
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
pub(super) enum Kind {
    F32 = 0,
    F16 = 1,
    Bf16 = 2,
}

impl Kind {
    pub(super) fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    pub(super) fn read(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self {
            Self::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Self::F16 => halves().map(|b| f16::from_bits(b).to_f32()).collect(),
            Self::Bf16 => halves().map(|b| bf16::from_bits(b).to_f32()).collect(),
        }
    }

    /// The error of rounding to this type, relative.
    pub(super) fn rounding(self) -> f64 {
        match self {
            Self::F32 => f64::from(f32::EPSILON),
            Self::F16 => 2f64.powi(-11),
            Self::Bf16 => 2f64.powi(-8),
        }
    }
}

/// Numbers of some type, and what they are in f32.
pub(super) struct Numbers {
    pub(super) kind: Kind,
    pub(super) bytes: Vec<u8>,
    pub(super) values: Vec<f32>,
}

impl Numbers {
    pub(super) fn new(kind: Kind, values: &[f32]) -> Self {
        let bytes: Vec<u8> = match kind {
            Kind::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Kind::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Kind::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        };
        Self { kind, values: kind.read(&bytes), bytes }
    }
}

pub(super) struct Fused<'a> {
    pub(super) stacks: &'a [WeightStack],
    pub(super) tokens: usize,
    pub(super) y: Kind,
    pub(super) limits: Limits,
    /// Whether Z is expected to be prepared inside the product.
    pub(super) own: bool,
}

/// A device of two multiprocessors, so that blocks get several tiles each; shared memory of an H200.
pub(super) const SMALL: Limits =
    Limits { multiprocessors: 2, shared_per_multiprocessor: 233_472, shared_per_block: 232_448 };

/// As the plan sees a stack.
pub(super) fn size(stack: &WeightStack) -> Size {
    let bases = stack.blocks().iter().filter(|b| b.basis.is_some()).count();
    let spikes = stack.blocks()[0].spikes.is_some();
    Size { rows: stack.shape().rows(), cols: stack.shape().cols(), rank: stack.rank().unwrap(), bases, spikes }
}
