use bitstack_core::{CoreError, Shape};
use cudarc::driver::DriverError;

/// What can go wrong between this process and a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The NVIDIA driver's library cannot be loaded.
    #[error("no CUDA driver: the library libcuda cannot be loaded")]
    NoDriver,
    /// There is no such device.
    #[error("no CUDA device {ordinal}: the driver has {devices}")]
    NoDevice {
        /// The device asked for, counted from 0.
        ordinal: usize,
        /// The number of devices the driver reports.
        devices: usize,
    },
    /// The device lacks instructions the kernels are made of.
    #[error("{name} has compute capability {major}.{minor}; 8.0 or higher is needed")]
    UnsupportedDevice {
        /// The device's name.
        name: String,
        /// Major part of its compute capability.
        major: i32,
        /// Minor part of its compute capability.
        minor: i32,
    },
    /// NVRTC does not compile the kernels.
    #[error("the kernels do not compile for {arch}:\n{log}")]
    Compile {
        /// The architecture asked for.
        arch: String,
        /// What the compiler says.
        log: String,
    },
    /// Device memory is exhausted.
    #[error("no device memory for {what}: {needed_bytes} bytes needed, {free_bytes} of {total_bytes} free")]
    OutOfMemory {
        /// What the memory is for.
        what: &'static str,
        /// Bytes asked for.
        needed_bytes: usize,
        /// Bytes free when it failed.
        free_bytes: usize,
        /// Bytes of the device.
        total_bytes: usize,
    },
    /// A call of the driver fails.
    #[error("the driver cannot {doing}")]
    Driver {
        /// What was attempted.
        doing: &'static str,
        /// The driver's answer.
        source: DriverError,
    },
    /// A call of cuBLAS fails.
    #[cfg(feature = "cublas")]
    #[error("cuBLAS fails: {error:?}")]
    Cublas {
        /// Its answer.
        error: cudarc::cublas::result::CublasError,
    },
    /// Something has another size than its place demands.
    #[error("{what} must be {expected}, got {actual}")]
    Mismatch {
        /// What is counted.
        what: &'static str,
        /// The size demanded.
        expected: usize,
        /// The size given.
        actual: usize,
    },
    /// Something is larger than the kernels count.
    #[error("{what} is {actual}, at most {limit} is possible")]
    TooLarge {
        /// What is counted.
        what: &'static str,
        /// The largest that is possible.
        limit: usize,
        /// The size given.
        actual: usize,
    },
    /// A shape that no weight has.
    #[error(transparent)]
    Shape {
        /// What is wrong.
        source: CoreError,
    },
    /// A block that does not fit a weight of this shape.
    #[error("block {block} of a {shape} weight")]
    Block {
        /// The number of the block, counted from 1.
        block: usize,
        /// The shape of the weight.
        shape: Shape,
        /// What is wrong.
        source: CoreError,
    },
    /// A block brings a basis of its own to a stack made for one shared basis.
    #[error("block {block} brings a basis to a stack whose planes share the first one")]
    BasisNotShared {
        /// The number of the block, counted from 1.
        block: usize,
    },
    /// A block 1 with spikes for a stack whose first one had none.
    #[error("block 1 brings spikes to a stack whose first block 1 had none; make a new stack for it")]
    SpikesUnexpected,
    /// The stack has no planes.
    #[error("the stack has no planes")]
    NoPlanes,
    /// The workspace is too small.
    #[error("the workspace has {actual_bytes} bytes, this product needs {needed_bytes}")]
    WorkspaceTooSmall {
        /// Bytes needed.
        needed_bytes: usize,
        /// Bytes given.
        actual_bytes: usize,
    },
    /// Something lives in another CUDA context than the kernels.
    #[error("{what} belongs to another CUDA context than the kernels")]
    OtherContext {
        /// What it is.
        what: &'static str,
    },
}

/// Adds to a driver's error what was being done.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, doing: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Driver { doing, source })
    }
}

pub(crate) fn equal(what: &'static str, expected: usize, actual: usize) -> Result<(), CudaError> {
    if expected == actual { Ok(()) } else { Err(CudaError::Mismatch { what, expected, actual }) }
}

pub(crate) fn at_most(what: &'static str, limit: usize, actual: usize) -> Result<(), CudaError> {
    if actual <= limit { Ok(()) } else { Err(CudaError::TooLarge { what, limit, actual }) }
}
