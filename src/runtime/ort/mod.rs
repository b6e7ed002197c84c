//! ONNX Runtime through `ort`, its library loaded at run time.

mod in_place;
mod placement;
mod providers;
mod recorded;
pub mod tensorrt;
mod values;

pub use providers::short_name;
use recorded::Recorded;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use prost::Message;

use ort::environment::Environment;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::ortsys;
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{Session, SessionInputValue};

use super::{Call, Engine, EngineOptions, Source, ValueInfo, arrange, cast_transpose, model_values};
use crate::error::{Context, Error, Result};
use crate::onnx::ModelProto;
use crate::tensor::HostTensor;

/// The loaded ONNX Runtime library. One a process.
#[derive(Debug)]
pub struct Library {
    /// What was loaded; a bare file name where the system's loader found it.
    pub path: PathBuf,
    /// Its version, such as `1.32.0`.
    pub version: String,
    /// Providers the library was built with (`CPUExecutionProvider`...). Being listed does not mean that one can load.
    pub providers: Vec<String>,
    environment: Environment,
}

/// Why there is no ONNX Runtime.
#[derive(Debug, Clone)]
pub struct LibraryError {
    absent: bool,
    message: String,
    hint: String,
}

impl LibraryError {
    /// Whether no library was found and none was asked for: another engine may then be used.
    pub fn is_absent(&self) -> bool {
        self.absent
    }
}

impl From<&LibraryError> for Error {
    fn from(e: &LibraryError) -> Self {
        Error::backend(e.message.clone()).hint(e.hint.clone())
    }
}

impl<R> From<ort::Error<R>> for Error {
    fn from(e: ort::Error<R>) -> Self {
        Error::backend(format!("ONNX Runtime: {}", e.message().trim()))
    }
}

/// Loads ONNX Runtime once: `ORT_DYLIB_PATH` (which must then load), the folder of the executable (and `lib` in or beside
/// it), `$VIRTUAL_ENV`, the folder that the build found, the system's loader.
pub fn library() -> Result<&'static Library, &'static LibraryError> {
    static LIBRARY: OnceLock<Result<Library, LibraryError>> = OnceLock::new();
    LIBRARY.get_or_init(load).as_ref()
}

const FILE: &str = if cfg!(target_os = "windows") {
    "onnxruntime.dll"
} else if cfg!(target_os = "macos") {
    "libonnxruntime.dylib"
} else {
    "libonnxruntime.so"
};

/// The library in a folder: `libonnxruntime.so`, or a versioned `libonnxruntime.so.1.32.0`, `libonnxruntime.1.32.0.dylib`.
fn in_folder(folder: &Path) -> Option<PathBuf> {
    let plain = folder.join(FILE);
    if plain.is_file() {
        return Some(plain);
    }
    let stem = FILE.split('.').next()?;
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|e| e.path())
        .filter(|p| {
            let name = p.file_name().and_then(|n| n.to_str()).unwrap_or("");
            let rest = name.strip_prefix(stem).unwrap_or("");
            rest.starts_with(".so.") || (rest.starts_with('.') && rest.ends_with(".dylib"))
        })
        .collect();
    found.sort();
    found.pop()
}

fn candidates() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = Vec::new();
    if let Some(dir) = std::env::current_exe().ok().and_then(|p| p.parent().map(Path::to_path_buf)) {
        folders.extend([dir.clone(), dir.join("lib"), dir.join("../lib")]);
    }
    if let Some(env) = std::env::var_os("VIRTUAL_ENV") {
        let pythons = std::fs::read_dir(Path::new(&env).join("lib")).into_iter().flatten().flatten();
        folders.extend(pythons.map(|e| e.path().join("site-packages/onnxruntime/capi")));
        folders.push(Path::new(&env).join("Lib/site-packages/onnxruntime/capi"));
    }
    folders.extend(option_env!("DISBACK_ORT_DIR").map(PathBuf::from));
    let mut found: Vec<PathBuf> = folders.iter().filter_map(|f| in_folder(f)).collect();
    found.push(PathBuf::from(FILE));
    found
}

fn load() -> Result<Library, LibraryError> {
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH").filter(|p| !p.is_empty()) {
        let path = PathBuf::from(path);
        let file = if path.is_dir() { in_folder(&path).unwrap_or_else(|| path.join(FILE)) } else { path };
        return load_from(&file).map_err(|reason| LibraryError {
            absent: false,
            message: format!("ORT_DYLIB_PATH does not lead to a usable ONNX Runtime: {reason}"),
            hint: "point ORT_DYLIB_PATH at libonnxruntime.so (1.27 or newer), or unset it".into(),
        });
    }
    let mut reasons = Vec::new();
    let mut present = false;
    for path in candidates() {
        match load_from(&path) {
            Ok(library) => return Ok(library),
            Err(reason) => {
                // The last candidate is a bare name for the system's loader: its failure means 'not installed'.
                present |= path.is_absolute() && path.is_file();
                reasons.push(reason);
            }
        }
    }
    Err(LibraryError {
        absent: !present,
        message: match reasons.first() {
            Some(reason) if present => format!("ONNX Runtime was found but cannot be used: {reason}"),
            _ => format!("ONNX Runtime ({FILE}) was not found"),
        },
        hint:
            "pip install onnxruntime (1.27 or newer) and set ORT_DYLIB_PATH to its capi folder, or use --engine tract"
                .into(),
    })
}

fn load_from(path: &Path) -> Result<Library, String> {
    if path.is_absolute() && !path.exists() {
        return Err(format!("{}: no such file", path.display()));
    }
    let builder = ort::init_from(path).map_err(|e| e.to_string())?;
    let setup = || -> ort::Result<(Environment, Vec<String>)> {
        let environment = builder.with_name("disback").with_telemetry(false).build()?;
        Ok((environment, provider_names()?))
    };
    // `ort` asserts instead of failing where a library exports a broken API table.
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(setup))
        .map_err(|_| format!("{} does not offer API version {}", path.display(), ort::MINOR_VERSION))?;
    let (environment, providers) = done.map_err(|e| format!("{}: {}", path.display(), e.message()))?;
    let version = loaded_version(path).unwrap_or_else(|| format!("1.{}+", ort::MINOR_VERSION));
    Ok(Library { path: path.to_path_buf(), version, providers, environment })
}

fn provider_names() -> ort::Result<Vec<String>> {
    let mut list: *mut *mut std::ffi::c_char = std::ptr::null_mut();
    let mut count = 0;
    ortsys![unsafe GetAvailableProviders(&mut list, &mut count)?];
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: the call above succeeded, so `list` holds `count` NUL-terminated strings until it is released below.
    let names =
        (0..count).map(|k| unsafe { std::ffi::CStr::from_ptr(*list.add(k)) }.to_string_lossy().into_owned()).collect();
    ortsys![unsafe ReleaseAvailableProviders(list, count as _)?];
    Ok(names)
}

/// `ort` keeps the version to itself: asks the library once more, or reads it off the file's name.
fn loaded_version(path: &Path) -> Option<String> {
    #[cfg(unix)]
    {
        use std::ffi::{CStr, CString, c_char, c_int, c_void};
        use std::os::unix::ffi::OsStrExt;
        unsafe extern "C" {
            fn dlopen(file: *const c_char, mode: c_int) -> *mut c_void;
            fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
        }
        let file = CString::new(path.as_os_str().as_bytes()).ok()?;
        // SAFETY: the library is loaded already (mode 1 is RTLD_LAZY); OrtGetApiBase has been called by `ort` with this
        // signature, and its string lives as long as the library, which is never unloaded.
        unsafe {
            let symbol = dlopen(file.as_ptr(), 1);
            let symbol = if symbol.is_null() { symbol } else { dlsym(symbol, c"OrtGetApiBase".as_ptr()) };
            if !symbol.is_null() {
                let get: unsafe extern "C" fn() -> *const ort::sys::OrtApiBase = std::mem::transmute(symbol);
                return Some(CStr::from_ptr(((*get()).GetVersionString)()).to_string_lossy().into_owned());
            }
        }
    }
    let real = path.canonicalize().ok()?;
    let name = real.file_name()?.to_str()?;
    let digits: String = name.chars().skip_while(|c| !c.is_ascii_digit()).take_while(|c| *c != 'd').collect();
    Some(digits.trim_end_matches('.').to_string()).filter(|v| !v.is_empty())
}

/// A network in an ONNX Runtime session.
pub struct OrtEngine {
    session: Session,
    inputs: Vec<ValueInfo>,
    outputs: Vec<ValueInfo>,
    name: String,
    device: i32,
    /// Whether calls are recorded as a CUDA graph, and the recording.
    graph: bool,
    recorded: Option<Recorded>,
    /// TensorRT's cache and what it is for.
    sealed: Option<(PathBuf, tensorrt::Stamp)>,
    /// What the session reads and does not own; dropped after it, as fields are in their order.
    _weights: Vec<(String, HostTensor)>,
}

impl OrtEngine {
    /// Where outputs are left, for bound calls.
    fn place(&self) -> AllocationDevice<'static> {
        match self.name.as_str() {
            n if n.ends_with("(CUDA)") || n.ends_with("(Tensorrt)") => AllocationDevice::CUDA,
            _ => AllocationDevice::CPU,
        }
    }

    pub(crate) fn open(source: Source<'_>, options: &EngineOptions) -> Result<Self> {
        Self::open_with(source, Vec::new(), options)
    }

    /// Opens a decoded model whose weights stay where they are: the session reads them from there, and has no copy. It
    /// makes no packed copies of them either, so that its calls are slower.
    pub(crate) fn open_in_place(model: &ModelProto, options: &EngineOptions) -> Result<Self> {
        let (bare, weights) = in_place::split(model)?;
        let bytes = bare.encode_to_vec();
        Self::open_with(Source::Bytes { bytes: &bytes, folder: None }, weights, options)
    }

    fn open_with(source: Source<'_>, weights: Vec<(String, HostTensor)>, options: &EngineOptions) -> Result<Self> {
        let library = library()?;
        let mut builder = Session::builder(&library.environment)?
            .with_log_level(ort::logging::LogLevel::Error)?
            .with_optimization_level(GraphOptimizationLevel::All)?;
        if let Some(threads) = options.threads {
            builder = builder.with_intra_threads(threads)?;
        }
        let accelerated = !options.provider.eq_ignore_ascii_case("cpu");
        let declared = if accelerated { declared(source, library, options)? } else { Declared::default() };
        let provider = providers::register(&mut builder, library, options, &declared.inputs)?;
        if fusion_fails(source, !accelerated)? {
            builder = builder.with_config_entry("optimization.disable_specified_optimizers", cast_transpose::FUSION)?;
        }
        let checked = options.strict && accelerated;
        if checked {
            builder = builder.with_config_entry(placement::RECORD, "1")?;
        }
        let views = in_place::give(&mut builder, &weights)?;
        if !weights.is_empty() {
            builder = builder.with_prepacking(false)?;
        }
        let session = match source {
            Source::File(path) => builder.commit_from_file(path),
            Source::Bytes { bytes, folder } => {
                if let Some(folder) = folder.and_then(Path::to_str) {
                    builder =
                        builder.with_config_entry("session.model_external_initializers_file_folder_path", folder)?;
                }
                builder.commit_from_memory(bytes)
            }
        }
        .context("loading the network")
        .map_err(|e| providers::explain_session(e, &provider))?;
        drop(views);
        let sealed = options.accelerator.cache.clone().zip(declared.stamp);
        if let Some((dir, stamp)) = &sealed {
            tensorrt::seal_cache(dir, stamp)?;
        }
        if checked {
            placement::check(&placement::placement(&session)?, &provider, &declared.shapes)?;
        }
        let infos = |outlets: &[ort::value::Outlet]| outlets.iter().map(values::value_info).collect::<Result<Vec<_>>>();
        Ok(Self {
            inputs: infos(session.inputs())?,
            outputs: infos(session.outputs())?,
            name: format!("onnxruntime {} ({})", library.version, short_name(&provider)),
            device: options.device as i32,
            graph: options.accelerator.cuda_graph,
            recorded: None,
            sealed,
            session,
            _weights: weights,
        })
    }
}

impl Drop for OrtEngine {
    /// TensorRT builds engines anew for shapes that it has not met, while it runs: the list of them must say so.
    fn drop(&mut self) {
        if let Some((dir, stamp)) = &self.sealed
            && let Err(e) = tensorrt::seal_cache(dir, stamp)
        {
            tracing::warn!("{e}");
        }
    }
}

impl OrtEngine {
    /// The recording, made where there is none, with these inputs.
    fn recorded(&mut self, tensors: &[&HostTensor]) -> Result<Recorded> {
        let place = (self.place(), self.device);
        let mut recorded = match self.recorded.take() {
            Some(recorded) => recorded,
            None => Recorded::new(&self.session, &self.inputs, tensors, &self.outputs, place)?,
        };
        match recorded.feed(&self.inputs, tensors) {
            Ok(()) => Ok(recorded),
            Err(e) => {
                self.recorded = Some(recorded);
                Err(e)
            }
        }
    }

    fn run_recorded(&mut self, tensors: &[&HostTensor]) -> Result<Vec<(String, HostTensor)>> {
        let recorded = self.recorded(tensors)?;
        let done = recorded.run(&mut self.session, &self.outputs);
        self.recorded = Some(recorded);
        done
    }
}

/// What a provider must know of the file before ONNX Runtime has read it.
#[derive(Default)]
struct Declared {
    inputs: Vec<ValueInfo>,
    /// What an engine cache of it must have been built for.
    stamp: Option<tensorrt::Stamp>,
    /// Names of the nodes that compute sizes.
    shapes: HashSet<String>,
}

/// Whether ONNX Runtime's optimiser would not survive the file ([`cast_transpose`]).
fn fusion_fails(source: Source<'_>, cpu: bool) -> Result<bool> {
    match source {
        Source::Bytes { bytes, .. } => Ok(cast_transpose::in_file(bytes, cpu)),
        Source::File(path) => {
            let map = crate::files::map(path)?;
            Ok(!map.is_empty() && cast_transpose::in_file(&map, cpu))
        }
    }
}

fn declared(source: Source<'_>, library: &Library, options: &EngineOptions) -> Result<Declared> {
    let read;
    let bytes = match source {
        Source::File(path) => {
            read = crate::files::map(path)?;
            &read[..]
        }
        Source::Bytes { bytes, .. } => bytes,
    };
    let model = super::student::decode(bytes)?;
    let (inputs, _) = model_values(&model)?;
    let stamp = options.accelerator.cache.as_ref().map(|dir| {
        let stamp = tensorrt::Stamp::here(bytes, &library.version, options.device);
        tensorrt::check_cache(dir, &stamp).map(|()| stamp)
    });
    Ok(Declared { inputs, stamp: stamp.transpose()?, shapes: placement::shape_arithmetic(&model) })
}

impl Engine for OrtEngine {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn inputs(&self) -> &[ValueInfo] {
        &self.inputs
    }
    fn outputs(&self) -> &[ValueInfo] {
        &self.outputs
    }
    fn run(&mut self, inputs: &[(&str, &HostTensor)]) -> Result<Vec<(String, HostTensor)>> {
        let tensors = arrange(&self.inputs, inputs)?;
        if self.graph {
            return self.run_recorded(&tensors);
        }
        let values: Vec<SessionInputValue<'_>> = tensors.into_iter().map(values::input).collect::<Result<_>>()?;
        let outputs = self.session.run(values.as_slice())?;
        self.outputs
            .iter()
            .map(|info| {
                let value =
                    outputs.get(&info.name).ok_or_else(|| Error::backend(format!("no output `{}`", info.name)))?;
                Ok((info.name.clone(), values::output(value).context(&info.name)?))
            })
            .collect()
    }
    fn bound<'a>(&'a mut self, inputs: &[(&str, &HostTensor)]) -> Result<Call<'a>> {
        let tensors = arrange(&self.inputs, inputs)?;
        if self.graph {
            // What was recorded is repeated: another binding would not be looked at.
            let recorded = self.recorded(&tensors)?;
            self.recorded = Some(recorded);
            let (session, recorded) = (&mut self.session, &self.recorded);
            return Ok(Box::new(move || recorded.iter().try_for_each(|r| r.call(session))));
        }
        let mut binding = self.session.create_binding()?;
        for (info, tensor) in self.inputs.iter().zip(tensors) {
            binding.bind_input(info.name.as_str(), &values::owned(tensor)?)?;
        }
        // Outputs stay where the provider leaves them.
        let place = self.place();
        let memory = MemoryInfo::new(place, self.device, AllocatorType::Device, MemoryType::Default)?;
        for info in &self.outputs {
            binding.bind_output_to_device(info.name.as_str(), &memory)?;
        }
        let session = &mut self.session;
        Ok(Box::new(move || {
            session.run_binding(&binding)?;
            binding.synchronize_outputs()?;
            Ok(())
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::testing;

    #[test]
    fn recorded_calls_give_what_plain_ones_do() {
        let bytes = testing::student("batch");
        let open = |graph| {
            let source = Source::Bytes { bytes: &bytes, folder: None };
            let mut engine = OrtEngine::open(source, &EngineOptions::default()).unwrap();
            // The bindings are those of a CUDA graph; here they lie on the CPU.
            engine.graph = graph;
            engine
        };
        let (mut plain, mut recorded) = (open(false), open(true));
        let labels = HostTensor::vec(&[0i64, 2, 1]);
        for seed in 0..3 {
            let noise = HostTensor::new(&[3, 1, 2, 2], &crate::noise::batch_noise(seed, 0, 3, 4)).unwrap();
            let inputs = [("noise", &noise), ("labels", &labels)];
            assert_eq!(recorded.run(&inputs).unwrap(), plain.run(&inputs).unwrap(), "seed {seed}");
        }
        let noise = HostTensor::new(&[1, 1, 2, 2], &[0f32; 4]).unwrap();
        let one = HostTensor::vec(&[0i64]);
        let e = recorded.run(&[("noise", &noise), ("labels", &one)]).unwrap_err().to_string();
        assert!(e.contains("recorded as a CUDA graph with [3, 1, 2, 2]") && e.contains("--batch N"), "{e}");
        let noise = HostTensor::new(&[3, 1, 2, 2], &[0.5f32; 12]).unwrap();
        let inputs = [("noise", &noise), ("labels", &labels)];
        recorded.bound(&inputs).unwrap()().unwrap();
        assert_eq!(recorded.run(&inputs).unwrap(), plain.run(&inputs).unwrap());
    }
}
