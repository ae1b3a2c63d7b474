//! All that is unsafe: asking whether libraries are there, typed buffers, and launches with every check they need.
//!
//! `module` and `stack` belong together with this module: launches are methods of their types, and they need what is unsafe to make these.
//!
//! A launch is sound when each kernel stays inside the memory it is given and that memory outlives it. The first is the kernels' part, run
//! under sanitizers by `shim`, given sizes that agree: the checks here, and the invariant of [`DeviceStack`] that its table describes
//! buffers of the sizes in `layout`. The second is stream order: buffers are freed on their stream, after what was launched before.

use crate::error::{CudaError, Doing, at_most, equal};
use crate::module::Kernels;
use crate::plan::{
    BatchParameters, FusedParameters, FusedPlan, Launch, MAX_WEIGHTS, ReconstructParameters, Size, batch_launch,
    reconstruct_launch, spikes_launch,
};
use crate::stack::DeviceStack;
use bytemuck::Pod;
#[cfg(feature = "cublas")]
use cudarc::cublas::{CudaBlas, sys as cublas};
use cudarc::driver::sys::CUresult;
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, DeviceSlice,
    DriverError, LaunchConfig, PushKernelArg,
};
use half::{bf16, f16};
use std::sync::Arc;

/// What x, y and W can be made of.
pub trait Element: Pod + sealed::Element {}

/// What x can be made of in products on tensor cores.
pub trait Half: Element + sealed::Half {}

mod sealed {
    pub trait Element {
        /// As in `kernels/stack.cuh`.
        const TYPE: u32;
    }
    pub trait Half {
        const BATCH_KERNEL: &'static str;
    }
}

macro_rules! element {
    ($type:ty, $number:literal) => {
        impl Element for $type {}
        impl sealed::Element for $type {
            const TYPE: u32 = $number;
        }
    };
}
element!(f32, 0);
element!(f16, 1);
element!(bf16, 2);
impl Half for f16 {}
impl Half for bf16 {}
impl sealed::Half for f16 {
    const BATCH_KERNEL: &'static str = "batch_half";
}
impl sealed::Half for bf16 {
    const BATCH_KERNEL: &'static str = "batch_bfloat";
}

// SAFETY: `#[repr(C)]`, without padding (it is `Pod`), and the mirror of the structure the kernels take by value.
unsafe impl DeviceRepr for FusedParameters {}
// SAFETY: as above.
unsafe impl DeviceRepr for ReconstructParameters {}
// SAFETY: as above.
unsafe impl DeviceRepr for BatchParameters {}

pub(crate) fn driver_is_present() -> bool {
    // SAFETY: loading NVIDIA's driver library runs its initialisers, which have no preconditions.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

pub(crate) fn nvrtc_is_present() -> bool {
    // SAFETY: loading NVRTC runs its initialisers, which have no preconditions.
    unsafe { cudarc::nvrtc::sys::is_culib_present() }
}

/// The values in a new buffer, in stream order.
///
/// # Errors
/// [`CudaError::OutOfMemory`] with sizes; `what` says for what.
pub fn upload<T: Pod>(stream: &Arc<CudaStream>, what: &'static str, values: &[T]) -> Result<CudaSlice<T>, CudaError> {
    let bytes = bytemuck::cast_slice::<T, u8>(values);
    let buffer = stream.clone_htod(bytes).map_err(|source| memory_error(stream, what, bytes.len(), source))?;
    Ok(retype(stream, buffer, values.len()))
}

/// A new buffer of zeros, in stream order.
///
/// # Errors
/// [`CudaError::OutOfMemory`] with sizes; `what` says for what.
pub fn zeros<T: Pod>(stream: &Arc<CudaStream>, what: &'static str, len: usize) -> Result<CudaSlice<T>, CudaError> {
    at_most("bytes of a buffer", isize::MAX as usize, len.saturating_mul(size_of::<T>()))?;
    let bytes = len * size_of::<T>();
    let buffer = stream.alloc_zeros::<u8>(bytes).map_err(|source| memory_error(stream, what, bytes, source))?;
    Ok(retype(stream, buffer, len))
}

/// A buffer's values, when all work on the stream is done.
///
/// # Errors
/// [`CudaError::Driver`], also for errors of work launched before.
pub fn download<T: Pod>(stream: &Arc<CudaStream>, buffer: &CudaSlice<T>) -> Result<Vec<T>, CudaError> {
    let mut values = vec![T::zeroed(); buffer.len()];
    // SAFETY: any bytes are valid u8.
    let view = unsafe { buffer.transmute::<u8>(buffer.num_bytes()) }.expect("a buffer has as many bytes as it has");
    stream.memcpy_dtoh(&view, bytemuck::cast_slice_mut::<T, u8>(&mut values)).doing("copy a buffer back")?;
    stream.synchronize().doing("finish its work")?;
    Ok(values)
}

/// The same buffer as `len` values of T, which have as many bytes.
fn retype<T: Pod>(stream: &Arc<CudaStream>, buffer: CudaSlice<u8>, len: usize) -> CudaSlice<T> {
    debug_assert_eq!(buffer.len(), len * size_of::<T>());
    // SAFETY: the buffer was allocated on this stream with `len` values' bytes, and is not freed by anyone else once leaked; its bytes
    // are valid for T, which is `Pod`; allocations of the driver are aligned to 256 bytes.
    let mut buffer = unsafe { stream.upgrade_device_ptr(buffer.leak(), len) };
    // What was written so far is recorded in the new buffer's event when the guard is dropped, for other streams to wait for.
    drop(buffer.device_ptr_mut(stream).1);
    buffer
}

fn memory_error(stream: &CudaStream, what: &'static str, needed_bytes: usize, source: DriverError) -> CudaError {
    match (source.0, stream.context().mem_get_info()) {
        (CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok((free_bytes, total_bytes))) => {
            CudaError::OutOfMemory { what, needed_bytes, free_bytes, total_bytes }
        }
        _ => CudaError::Driver { doing: "allocate and fill a buffer", source },
    }
}

/// Memory for products of several tokens or of rank above 1; products use it one after another on their streams.
#[derive(Debug)]
pub struct Workspace(CudaSlice<u8>);

impl Workspace {
    /// Memory of `bytes` bytes; [`Kernels::workspace_bytes`] says how many a product needs.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] with sizes.
    pub fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self, CudaError> {
        // An allocation of nothing is an error of the driver.
        Ok(Self(zeros(stream, "the workspace", bytes.max(16))?))
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.0.len()
    }
}

impl Kernels {
    /// Bytes of workspace that [`Self::fused`] needs for these weights and this many tokens.
    ///
    /// # Errors
    /// Those of [`Self::fused`] about weights and tokens.
    pub fn workspace_bytes(&self, stacks: &[&DeviceStack], tokens: usize) -> Result<usize, CudaError> {
        let plan = self.plan(stacks, tokens)?;
        Ok(plan.operand_bytes * stacks.len())
    }

    fn plan(&self, stacks: &[&DeviceStack], tokens: usize) -> Result<FusedPlan, CudaError> {
        let [first, others @ ..] = stacks else {
            return Err(CudaError::Mismatch { what: "weights of a product", expected: 1, actual: 0 });
        };
        at_most("weights of one product", MAX_WEIGHTS, stacks.len())?;
        at_least_one_token(tokens)?;
        at_most("tokens of a fused product", 65535, tokens)?;
        for other in others {
            equal("columns of weights with the same input", first.shape().cols(), other.shape().cols())?;
            equal("the rank of weights in one product", first.rank(), other.rank())?;
        }
        let sizes: Vec<Size> = stacks.iter().map(|s| s.size()).collect();
        Ok(FusedPlan::new(self.limits, &sizes, tokens))
    }

    /// yᵢ = x Wᵢᵀ for up to 4 weights with the same input, straight from the bits: for few tokens. All planes of all weights go in one
    /// launch, preceded by a small one that prepares x unless all weights have rank 1 with a shared basis and there are at most 4 tokens,
    /// and followed by one that adds the spikes where a weight has any.
    ///
    /// # Shapes
    /// `x`: tokens x cols · `ys[i]`: tokens x rows of weight i · row-major, overwritten.
    ///
    /// # Numerics
    /// v ⊙ x is rounded to 16 bits relative to the largest of 512 columns; sums are integers, then f32. Errors about 1e-4 of ‖y‖
    /// (README). A token with an x that is not finite gets NaN throughout. Results do not depend on the device's size. Spikes are f32 products
    /// and sums, added to the y that is stored: one in f16 or bf16 is then rounded twice.
    ///
    /// # Errors
    /// Sizes that disagree, another context, [`CudaError::NoPlanes`], [`CudaError::WorkspaceTooSmall`], and the driver's.
    pub fn fused<X: Element, Y: Element>(
        &self,
        stream: &Arc<CudaStream>,
        stacks: &[&DeviceStack],
        tokens: usize,
        x: &CudaView<'_, X>,
        ys: &mut [CudaViewMut<'_, Y>],
        workspace: &mut Workspace,
    ) -> Result<(), CudaError> {
        let plan = self.plan(stacks, tokens)?;
        self.check_input(stream, stacks, tokens, x)?;
        equal("results of a product", stacks.len(), ys.len())?;
        for (stack, y) in stacks.iter().zip(ys.iter()) {
            self.check_buffer("y", stack.shape().rows().checked_mul(tokens), y)?;
        }
        self.check_buffer("the workspace", None, &workspace.0)?;
        let (needed_bytes, actual_bytes) = (plan.operand_bytes * stacks.len(), workspace.bytes());
        if actual_bytes < needed_bytes {
            return Err(CudaError::WorkspaceTooSmall { needed_bytes, actual_bytes });
        }

        let mut parameters = plan.parameters;
        wait_for(stream, stacks)?;
        // The guards record, when dropped at the end, that this stream uses the buffers.
        let (x, _x) = x.device_ptr(stream);
        let (operands, _operands) = workspace.0.device_ptr_mut(stream);
        (parameters.x, parameters.x_type, parameters.y_type) = (x, X::TYPE, Y::TYPE);
        let mut guards = Vec::with_capacity(2 * stacks.len());
        for (i, (stack, y)) in stacks.iter().zip(ys).enumerate() {
            let (table, table_guard) = stack.table().device_ptr(stream);
            let (y, y_guard) = y.device_ptr_mut(stream);
            let operands = operands + (plan.operand_bytes * i) as u64;
            parameters.weight[i] = crate::plan::FusedWeight { weight: table, y, operands, unused: 0 };
            guards.extend([table_guard, y_guard]);
        }
        for launch in plan.launches() {
            // SAFETY: `prepare`, the fused kernels and `spikes` take these parameters; x and y have the sizes checked above, the tables those
            // of their stacks, the workspace what the plan needs for each weight.
            unsafe { self.launch(stream, launch, &parameters) }?;
        }
        let_wait(stream, stacks)
    }

    /// y = x Wᵀ for many tokens: W is rebuilt tile by tile on chip and multiplied on tensor cores, 128 tokens for each rebuilt tile.
    ///
    /// # Shapes
    /// `x`: tokens x cols · `y`: tokens x rows · row-major, `y` overwritten.
    ///
    /// # Numerics
    /// W is rebuilt in f32 and rounded to the type of x (values beyond 65504 overflow in f16); sums in f32. Spikes as in [`Self::fused`],
    /// by a launch of their own.
    ///
    /// # Errors
    /// Sizes that disagree, another context, [`CudaError::NoPlanes`], and the driver's.
    pub fn batch<X: Half, Y: Element>(
        &self,
        stream: &Arc<CudaStream>,
        stack: &DeviceStack,
        tokens: usize,
        x: &CudaView<'_, X>,
        y: &mut CudaViewMut<'_, Y>,
    ) -> Result<(), CudaError> {
        at_least_one_token(tokens)?;
        at_most("tokens of a batch product", 65535 * crate::plan::BATCH_TOKENS, tokens)?;
        self.check_input(stream, &[stack], tokens, x)?;
        self.check_buffer("y", stack.shape().rows().checked_mul(tokens), y)?;
        wait_for(stream, &[stack])?;
        let (weight, _weight) = stack.table().device_ptr(stream);
        let (x, _x) = x.device_ptr(stream);
        let (y, _y) = y.device_ptr_mut(stream);
        let aligned = x.is_multiple_of(16) && stack.shape().cols().is_multiple_of(8);
        let parameters = BatchParameters {
            weight,
            x,
            y,
            tokens: tokens as u32,
            x_type: X::TYPE,
            y_type: Y::TYPE,
            aligned: u32::from(aligned),
        };
        let launch = batch_launch(X::BATCH_KERNEL, stack.shape().rows(), tokens);
        // SAFETY: the batch kernels take these parameters; x and y have the sizes checked above, the table that of its stack.
        unsafe { self.launch(stream, &launch, &parameters) }?;
        if let Some(launch) = spikes_launch(&[stack.size()], tokens) {
            let parameters = parameters.for_spikes();
            // SAFETY: `spikes` takes these parameters, which have the same buffers.
            unsafe { self.launch(stream, &launch, &parameters) }?;
        }
        let_wait(stream, &[stack])
    }

    /// Writes W out at the stack's level.
    ///
    /// # Shapes
    /// `out`: rows x cols, row-major, overwritten.
    ///
    /// # Numerics
    /// f32 sums over rank, then planes, then the spikes, rounded to the type of `out`.
    ///
    /// # Errors
    /// Sizes that disagree, another context, [`CudaError::NoPlanes`], and the driver's.
    pub fn reconstruct<T: Element>(
        &self,
        stream: &Arc<CudaStream>,
        stack: &DeviceStack,
        out: &mut CudaViewMut<'_, T>,
    ) -> Result<(), CudaError> {
        self.check_stacks(stream, &[stack])?;
        self.check_buffer("the rebuilt weight", Some(stack.shape().n_elems()), out)?;
        wait_for(stream, &[stack])?;
        let (weight, _weight) = stack.table().device_ptr(stream);
        let (out, _out) = out.device_ptr_mut(stream);
        let parameters = ReconstructParameters { weight, out, out_type: T::TYPE, unused: 0 };
        let launch = reconstruct_launch(stack.shape().rows(), stack.shape().cols());
        // SAFETY: the kernel takes these parameters; `out` has the size checked above, the table that of its stack.
        unsafe { self.launch(stream, &launch, &parameters) }?;
        let_wait(stream, &[stack])
    }

    fn check_stacks(&self, stream: &CudaStream, stacks: &[&DeviceStack]) -> Result<(), CudaError> {
        self.check_context("the stream", stream.context())?;
        for stack in stacks {
            self.check_context("a stack", stack.stream().context())?;
            if stack.level() == 0 {
                return Err(CudaError::NoPlanes);
            }
        }
        Ok(())
    }

    fn check_input<X: Element>(
        &self,
        stream: &CudaStream,
        stacks: &[&DeviceStack],
        tokens: usize,
        x: &CudaView<'_, X>,
    ) -> Result<(), CudaError> {
        self.check_stacks(stream, stacks)?;
        self.check_buffer("x", stacks[0].shape().cols().checked_mul(tokens), x)
    }

    /// A buffer of this context, with `len` values if that is said.
    fn check_buffer<T>(
        &self,
        what: &'static str,
        len: Option<usize>,
        buffer: &impl DeviceSlice<T>,
    ) -> Result<(), CudaError> {
        self.check_context(what, buffer.stream().context())?;
        len.map_or(Ok(()), |len| equal(what, len, buffer.len()))
    }

    fn check_context(&self, what: &'static str, context: &Arc<CudaContext>) -> Result<(), CudaError> {
        if *context == self.context { Ok(()) } else { Err(CudaError::OtherContext { what }) }
    }

    /// # Safety
    /// The kernel takes `parameters`, and all addresses in them are those of buffers as large as it needs, alive until it is done.
    unsafe fn launch<P: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        launch: &Launch,
        parameters: &P,
    ) -> Result<(), CudaError> {
        let size = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let [x, y, z] = launch.grid.map(size);
        let config = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (size(launch.threads), 1, 1),
            shared_mem_bytes: size(launch.shared_bytes),
        };
        let mut builder = stream.launch_builder(self.function(launch));
        builder.arg(parameters);
        // SAFETY: passed on to the caller.
        unsafe { builder.launch(config) }.doing("launch a kernel")?;
        Ok(())
    }
}

fn at_least_one_token(tokens: usize) -> Result<(), CudaError> {
    if tokens > 0 { Ok(()) } else { Err(CudaError::Mismatch { what: "the number of tokens", expected: 1, actual: 0 }) }
}

/// Lets work on `stream` follow what the stacks' own streams have been given so far.
fn wait_for(stream: &Arc<CudaStream>, stacks: &[&DeviceStack]) -> Result<(), CudaError> {
    for stack in stacks.iter().filter(|s| s.stream() != stream) {
        stream.join(stack.stream()).doing("wait for a stack's stream")?;
    }
    Ok(())
}

/// Lets the stacks' own streams, which free memory, follow the work on `stream`.
fn let_wait(stream: &Arc<CudaStream>, stacks: &[&DeviceStack]) -> Result<(), CudaError> {
    for stack in stacks.iter().filter(|s| s.stream() != stream) {
        stack.stream().join(stream).doing("let a stack's stream wait")?;
    }
    Ok(())
}

/// y = x Wᵀ with an ordinary matrix by NVIDIA's library, to compare with: f16, sums in f32.
#[cfg(feature = "cublas")]
#[derive(Debug)]
pub struct CublasProduct {
    blas: CudaBlas,
    stream: Arc<CudaStream>,
}

#[cfg(feature = "cublas")]
impl CublasProduct {
    /// Products on this stream; `None` where there is no cuBLAS.
    ///
    /// # Errors
    /// [`CudaError::Cublas`] when the library does not start.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Option<Self>, CudaError> {
        // SAFETY: loading cuBLAS runs its initialisers, which have no preconditions.
        if !unsafe { cublas::is_culib_present() } {
            return Ok(None);
        }
        let blas = CudaBlas::new(stream.clone()).map_err(|error| CudaError::Cublas { error })?;
        Ok(Some(Self { blas, stream: stream.clone() }))
    }

    /// y = x Wᵀ, in stream order. The first call sets the library up, and cannot be captured in a graph.
    ///
    /// # Shapes
    /// `w`: rows x cols; `x`: tokens x cols; `y`: tokens x rows, overwritten; all row-major.
    ///
    /// # Errors
    /// [`CudaError::Mismatch`] and [`CudaError::TooLarge`] when the sides do not fit; [`CudaError::Cublas`].
    pub fn apply(
        &self,
        (rows, cols, tokens): (usize, usize, usize),
        w: &CudaSlice<f16>,
        x: &CudaSlice<f16>,
        y: &mut CudaSlice<f16>,
    ) -> Result<(), CudaError> {
        equal("W", rows * cols, w.len())?;
        equal("x", tokens * cols, x.len())?;
        equal("y", tokens * rows, y.len())?;
        at_most("a side of a product", i32::MAX as usize, rows.max(cols).max(tokens))?;
        let [m, k, n] = [rows, cols, tokens].map(|side| side as i32);
        let (one, zero) = (1.0f32, 0.0f32);
        let stream = &self.stream;
        let ((w, _w), (x, _x), (y, _y)) = (w.device_ptr(stream), x.device_ptr(stream), y.device_ptr_mut(stream));
        let half = cublas::cudaDataType_t::CUDA_R_16F;
        // SAFETY: the handle lives as long as `blas`; column-major, W is a k x m matrix to be transposed, x a k x n and y an m x n one, of
        // the sizes checked above; alpha and beta are f32 as the compute type says, and are read before the call returns.
        unsafe {
            cudarc::cublas::result::gemm_ex(
                *self.blas.handle(),
                cublas::cublasOperation_t::CUBLAS_OP_T,
                cublas::cublasOperation_t::CUBLAS_OP_N,
                m,
                n,
                k,
                (&raw const one).cast(),
                w as *const _,
                half,
                k,
                x as *const _,
                half,
                k,
                (&raw const zero).cast(),
                y as *mut _,
                half,
                m,
                cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .map_err(|error| CudaError::Cublas { error })
    }
}
