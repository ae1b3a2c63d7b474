//! The kernels in a context: compiled by NVRTC for the device at hand, or the precompiled PTX where there is no NVRTC.

use crate::driver::{driver_is_present, nvrtc_is_present};
use crate::error::{CudaError, Doing};
use crate::plan::{KERNELS, Launch, Limits};
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUfunction_attribute_enum as FunctionAttribute, CUresult};
use cudarc::driver::{CudaContext, CudaFunction};
use cudarc::nvrtc::result::NvrtcError;
use cudarc::nvrtc::sys::nvrtcResult;
use cudarc::nvrtc::{CompileError, CompileOptions, Ptx, compile_ptx_with_opts};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The kernels' source, one translation unit.
pub(crate) const SOURCE: &str = concat!(
    include_str!("../kernels/device.cuh"),
    include_str!("../kernels/stack.cuh"),
    include_str!("../kernels/fused.cu"),
    include_str!("../kernels/spikes.cu"),
    include_str!("../kernels/rebuild.cu"),
);

/// The same, compiled for compute capability 8.0 by `check-compile --write`, which any later device translates for itself.
pub(crate) const PRECOMPILED: &str = include_str!("../kernels/bitstack.ptx");

/// The architecture of [`PRECOMPILED`], the oldest with the instructions needed.
const OLDEST: &str = "compute_80";

/// Where loaded kernels come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Compiled in this process by NVRTC.
    Compiled,
    /// The PTX that comes with the crate.
    Precompiled,
}

/// The kernels, loaded in a context. Cheap to share behind a reference; all calls take the stream to work on.
#[derive(Debug)]
pub struct Kernels {
    pub(crate) context: Arc<CudaContext>,
    pub(crate) limits: Limits,
    functions: HashMap<&'static str, CudaFunction>,
    origin: Origin,
}

/// The context of device `ordinal`, its primary one.
///
/// # Errors
/// [`CudaError::NoDriver`] and [`CudaError::NoDevice`] where there is none; never a panic.
pub fn context(ordinal: usize) -> Result<Arc<CudaContext>, CudaError> {
    if !driver_is_present() {
        return Err(CudaError::NoDriver);
    }
    let devices = match CudaContext::device_count() {
        Ok(devices) => usize::try_from(devices).unwrap_or(0),
        // A driver library without a device, as in a container started without one, says so when it is initialised.
        Err(error) if [CUresult::CUDA_ERROR_NO_DEVICE, CUresult::CUDA_ERROR_STUB_LIBRARY].contains(&error.0) => 0,
        Err(error) => return Err(error).doing("count its devices"),
    };
    if ordinal >= devices {
        return Err(CudaError::NoDevice { ordinal, devices });
    }
    CudaContext::new(ordinal).doing("make a context")
}

impl Kernels {
    /// Compiles the kernels for the context's device, once for each architecture and process, and loads them. Takes the precompiled PTX
    /// where NVRTC is absent, or newer than the driver.
    ///
    /// # Errors
    /// [`CudaError::UnsupportedDevice`] below compute capability 8.0, [`CudaError::Compile`] with the compiler's log.
    pub fn new(context: &Arc<CudaContext>) -> Result<Self, CudaError> {
        let (major, minor) = capability(context)?;
        if nvrtc_is_present() {
            match Self::load(context, compiled(major, minor)?, Origin::Compiled) {
                Err(CudaError::Driver { source, .. }) if source.0 == CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {}
                loaded => return loaded,
            }
        }
        Self::precompiled(context)
    }

    /// Loads the precompiled PTX, whatever else there is.
    ///
    /// # Errors
    /// [`CudaError::UnsupportedDevice`] below compute capability 8.0.
    pub fn precompiled(context: &Arc<CudaContext>) -> Result<Self, CudaError> {
        capability(context)?;
        Self::load(context, Ptx::from_src(PRECOMPILED), Origin::Precompiled)
    }

    fn load(context: &Arc<CudaContext>, ptx: Ptx, origin: Origin) -> Result<Self, CudaError> {
        let attribute = |attribute| {
            let value = context.attribute(attribute).doing("say what the device can run")?;
            Ok(usize::try_from(value).unwrap_or(0))
        };
        let limits = Limits {
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
            shared_per_multiprocessor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
            shared_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        };
        let module = context.load_module(ptx).doing("load the kernels")?;
        let mut functions = HashMap::new();
        for name in KERNELS {
            let function = module.load_function(name).doing("find a kernel")?;
            if name.starts_with("fused") {
                let most = i32::try_from(limits.shared_per_block).unwrap_or(i32::MAX);
                function
                    .set_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)
                    .doing("grant a kernel its shared memory")?;
            }
            functions.insert(name, function);
        }
        Ok(Self { context: context.clone(), limits, functions, origin })
    }

    /// The context the kernels are loaded in.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Where the kernels come from.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    pub(crate) fn function(&self, launch: &Launch) -> &CudaFunction {
        // Every name of a plan is one of KERNELS, all of which are loaded: `plan`'s tests say so.
        &self.functions[launch.kernel]
    }
}

fn capability(context: &Arc<CudaContext>) -> Result<(i32, i32), CudaError> {
    let (major, minor) = context.compute_capability().doing("say the device's compute capability")?;
    if major < 8 {
        let name = context.name().doing("say the device's name")?;
        return Err(CudaError::UnsupportedDevice { name, major, minor });
    }
    Ok((major, minor))
}

/// The kernels' PTX for a compute capability, from this process's cache when it is not the first time.
fn compiled(major: i32, minor: i32) -> Result<Ptx, CudaError> {
    static CACHE: Mutex<Option<HashMap<(i32, i32), Ptx>>> = Mutex::new(None);
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    let cache = cache.get_or_insert_default();
    if let Some(ptx) = cache.get(&(major, minor)) {
        return Ok(ptx.clone());
    }
    let arch = format!("compute_{major}{minor}");
    let ptx = match compile(&arch) {
        // An NVRTC older than the device does not know its name; what it makes for the oldest runs there too.
        Err(CompileError::CompileError { nvrtc: NvrtcError(nvrtcResult::NVRTC_ERROR_INVALID_OPTION), .. }) => {
            compile(OLDEST)
        }
        ptx => ptx,
    };
    let ptx = ptx.map_err(|error| CudaError::Compile {
        arch,
        log: match error {
            CompileError::CompileError { log, .. } => log.to_string_lossy().into_owned(),
            other => other.to_string(),
        },
    })?;
    cache.insert((major, minor), ptx.clone());
    Ok(ptx)
}

fn compile(arch: &str) -> Result<Ptx, CompileError> {
    let options = vec![format!("--gpu-architecture={arch}"), "--std=c++17".to_owned()];
    compile_ptx_with_opts(
        SOURCE,
        CompileOptions { options, name: Some("bitstack.cu".to_owned()), ..Default::default() },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FNV-1a, as `check-compile` writes it.
    fn hash(text: &str) -> u64 {
        text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    }

    #[test]
    fn the_precompiled_kernels_are_those_of_the_source() {
        let expected = format!("// source: {:016x}", hash(SOURCE));
        let stale = "kernels/bitstack.ptx is stale: run bitstack-cuda/check-compile --write";
        assert_eq!(PRECOMPILED.lines().next(), Some(expected.as_str()), "{stale}");
        for kernel in KERNELS {
            assert!(PRECOMPILED.contains(&format!(".entry {kernel}(")), "{kernel} is not in kernels/bitstack.ptx");
        }
    }

    #[test]
    fn a_machine_without_a_device_gets_an_error_and_no_panic() {
        match context(usize::MAX) {
            Err(CudaError::NoDriver | CudaError::NoDevice { ordinal: usize::MAX, .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}
