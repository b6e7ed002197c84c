//! Execution providers: registered by name, never exchanged in silence for another; what is missing is said.

use std::path::Path;

use ort::ep::{self, ArbitrarilyConfigurableExecutionProvider, ExecutionProvider};
use ort::ortsys;
use ort::session::builder::SessionBuilder;

use super::{Library, tensorrt};
use crate::error::{Context, Error, Result};
use crate::runtime::{EngineOptions, ValueInfo};

/// Short name of a provider: `CUDAExecutionProvider` -> `CUDA`.
pub fn short_name(provider: &str) -> &str {
    provider.strip_suffix("ExecutionProvider").unwrap_or(provider)
}

/// Registers the provider that the user named and returns its full name. Failure is an error: ONNX Runtime itself would go
/// on silently on the CPU.
pub fn register(
    builder: &mut SessionBuilder,
    library: &Library,
    options: &EngineOptions,
    inputs: &[ValueInfo],
) -> Result<String> {
    let wanted = options.provider.to_ascii_lowercase();
    if wanted == "cpu" {
        return Ok("CPUExecutionProvider".into());
    }
    let full = library
        .providers
        .iter()
        .find(|p| p.eq_ignore_ascii_case(&options.provider) || short_name(p).eq_ignore_ascii_case(&wanted))
        .ok_or_else(|| {
            let have: Vec<String> = library.providers.iter().map(|p| short_name(p).to_ascii_lowercase()).collect();
            Error::usage(format!(
                "ONNX Runtime {} at {} has no provider `{}`; it has: {}",
                library.version,
                library.path.display(),
                options.provider,
                have.join(", ")
            ))
            .hint(likely(&wanted).map_or_else(|| how_to_get(&wanted), |n| format!("did you mean `{n}`?")))
        })?
        .clone();
    let device = options.device as i32;
    let done = match short_name(&full) {
        "CUDA" => {
            preload_cuda(&library.path);
            ep::CUDA::default().with_device_id(device).with_cuda_graph(options.accelerator.cuda_graph).register(builder)
        }
        "Tensorrt" => {
            preload_cuda(&library.path);
            preload_tensorrt(&library.path);
            let pairs = tensorrt::options(&options.accelerator, inputs)?;
            // The provider writes there after minutes of building, and makes no folder for a file.
            if let Some(folder) = options.accelerator.ep_context.as_deref().and_then(Path::parent) {
                std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            }
            let provider = pairs
                .into_iter()
                .fold(ep::TensorRT::default().with_device_id(device), |p, (k, v)| p.with_arbitrary_config(k, v));
            provider.register(builder).and_then(|()| ep::CUDA::default().with_device_id(device).register(builder))
        }
        other => register_by_name(builder, other, &full),
    };
    done.map_err(Error::from).context(format!("provider {}", options.provider)).map_err(|e| explain(e, &wanted))?;
    Ok(full)
}

/// Providers of ONNX Runtime by the names that it has for them.
const KNOWN: [&str; 16] = [
    "cpu",
    "cuda",
    "tensorrt",
    "nvtensorrtrtx",
    "openvino",
    "dml",
    "coreml",
    "rocm",
    "migraphx",
    "webgpu",
    "qnn",
    "dnnl",
    "xnnpack",
    "acl",
    "cann",
    "azure",
];

/// The provider that a name of none was meant for.
fn likely(wanted: &str) -> Option<&'static str> {
    let near = |n: &&&str| (strsim::damerau_levenshtein(wanted, n), n.len());
    let best = KNOWN.iter().min_by_key(near).copied()?;
    let apart = strsim::damerau_levenshtein(wanted, best);
    (1..=2).contains(&apart).then_some(best).filter(|b| apart * 2 < b.len() && !KNOWN.contains(&wanted))
}

/// Where a provider comes from.
fn how_to_get(provider: &str) -> String {
    match provider {
        "cuda" => {
            "pip install onnxruntime-gpu (its 1.27 to 1.31 want CUDA 13 and cuDNN 9) and set ORT_DYLIB_PATH to its capi folder"
        }
        "tensorrt" => {
            "pip install onnxruntime-gpu (its 1.27 to 1.31 want CUDA 13, cuDNN 9 and TensorRT 10) and tensorrt-cu13==10.*, and set \
             ORT_DYLIB_PATH to onnxruntime's capi folder"
        }
        "openvino" => "pip install onnxruntime-openvino and set ORT_DYLIB_PATH to its capi folder",
        "dml" | "directml" => "pip install onnxruntime-directml (Windows) and set ORT_DYLIB_PATH to its capi folder",
        "coreml" => "the onnxruntime wheel for macOS has it; set ORT_DYLIB_PATH to its capi folder",
        "rocm" | "migraphx" => "install onnxruntime-migraphx and set ORT_DYLIB_PATH to its capi folder",
        _ => "install an ONNX Runtime built with it and set ORT_DYLIB_PATH to its capi folder",
    }
    .to_owned()
}

/// Adds what a failed registration means: the loader's message names the library that is missing, and its number the
/// version that the provider was built for.
pub fn explain(e: Error, provider: &str) -> Error {
    let text = e.to_string();
    const OWN: &str = "take the capi folder of one onnxruntime-gpu wheel as it is: ONNX Runtime looks for the provider's library \
                       beside its own, and both must be of one version";
    if ["undefined symbol", "file too short", "invalid ELF header", "wrong ELF class"].iter().any(|t| text.contains(t))
    {
        return e.hint(OWN);
    }
    let Some(library) = missing_library(&text) else {
        return e.hint(match provider {
            "cuda" => "its libraries (CUDA 13 and cuDNN 9) must fit one another and be where the loader finds them",
            "tensorrt" => "its libraries (TensorRT 10, CUDA 13 and cuDNN 9) must fit one another and be where the loader finds them",
            _ => "ONNX Runtime lists this provider, but could not make it ready",
        });
    };
    let stem = library.split(".so").next().unwrap_or(library);
    let version = library.split(".so.").nth(1).unwrap_or("");
    let hint = match stem {
        "libcudart" | "libcublas" | "libcublasLt" | "libcufft" | "libcurand" | "libnvrtc" => format!(
            "the {provider} provider of this ONNX Runtime was built for CUDA {}, which is not here: install that CUDA, or an \
             onnxruntime-gpu for the CUDA you have (`disback doctor` shows both)",
            match (stem, version) {
                // These two have numbers of their own.
                ("libcufft", "12") => "13",
                ("libcufft", "11") => "12",
                ("libcurand", _) => "12 or 13",
                (_, v) => v,
            }
        ),
        s if s.starts_with("libcudnn") => format!("cuDNN {version} is missing: pip install nvidia-cudnn-cu13"),
        s if s.starts_with("libnvinfer") || s.starts_with("libnvonnxparser") => {
            format!(
                "TensorRT {version} is missing: pip install tensorrt-cu13 (of version {version}) beside onnxruntime, or install it and put \
                 its lib folder into LD_LIBRARY_PATH"
            )
        }
        s if s.starts_with("libonnxruntime") => OWN.to_owned(),
        "libcuda" => "no NVIDIA driver is loaded on this machine".to_owned(),
        _ => format!("{library} is missing: put its folder into LD_LIBRARY_PATH"),
    };
    e.hint(hint)
}

/// The library that the loader did not find: ONNX Runtime's message names the provider's own library first.
fn missing_library(text: &str) -> Option<&str> {
    let before = text.split(": cannot open shared object").next().filter(|b| b.len() < text.len())?;
    let path = before.rsplit([' ', '"', '\'', '\n']).next()?;
    path.rsplit('/').next().filter(|l| l.contains(".so"))
}

/// Adds what an error of a session that was being made means.
pub fn explain_session(e: Error, provider: &str) -> Error {
    let text = e.to_string().to_ascii_lowercase();
    if text.contains("cuda graph") || text.contains("cudagraph") {
        return e.hint(
            "every node must run on the device: `disback export --batch N` leaves no shape arithmetic; or leave --cuda-graph out",
        );
    }
    if ["no cuda-capable device", "cuda driver version is insufficient", "cuda failure 35", "cuda failure 100"]
        .iter()
        .any(|t| text.contains(t))
    {
        return e.hint("`nvidia-smi` shows the devices and the driver; `disback doctor` what this program found");
    }
    if text.contains("out of memory") {
        return e.hint("another --gpu, or a smaller --batch or --profile, takes less memory");
    }
    if provider == "TensorrtExecutionProvider" && text.contains("engine") {
        return e
            .hint("an engine of another TensorRT or device does not load: remove --cache's folder to build new ones");
    }
    e
}

/// Providers without typed options here. Old libraries know some only by the short name.
fn register_by_name(builder: &mut SessionBuilder, short: &str, full: &str) -> ort::Result<()> {
    use ort::AsPointer;
    let append = |builder: &mut SessionBuilder, name: &str| -> ort::Result<()> {
        let name = std::ffi::CString::new(name).unwrap_or_default();
        let options = builder.ptr_mut();
        ortsys![unsafe SessionOptionsAppendExecutionProvider(
            options,
            name.as_ptr(),
            std::ptr::null(),
            std::ptr::null(),
            0
        )?];
        Ok(())
    };
    append(builder, full).or_else(|_| append(builder, short))
}

/// The CUDA provider needs CUDA and cuDNN in the process. Python wheels put them beside onnxruntime, where the loader does not
/// look; a failure here shows when the provider is registered.
fn preload_cuda(library: &Path) {
    let Some(site) = library.parent().and_then(Path::parent).and_then(Path::parent) else { return };
    let cuda = site.join("nvidia/cu13/lib");
    let cudnn = site.join("nvidia/cudnn/lib");
    let result =
        ep::cuda::preload_dylibs(cuda.is_dir().then_some(cuda.as_path()), cudnn.is_dir().then_some(cudnn.as_path()));
    if let Err(e) = result {
        tracing::debug!("CUDA libraries beside onnxruntime: {}", e.message());
    }
}

/// TensorRT's wheel puts its libraries into a folder of its own beside onnxruntime.
fn preload_tensorrt(library: &Path) {
    let Some(site) = library.parent().and_then(Path::parent).and_then(Path::parent) else { return };
    let folder = site.join("tensorrt_libs");
    for file in ["libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"] {
        if let Err(e) = ort::util::preload_dylib(folder.join(file)) {
            return tracing::debug!("TensorRT beside onnxruntime: {file}: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_missing_library_tells_what_to_install() {
        // As ONNX Runtime 1.27 to 1.31 say it, from a wheel and from a program that brought its own build.
        let hint = |l: &str, p: &str| {
            let text = |at: &str| {
                format!(
                    "ONNX Runtime: /onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:1952 \
                     onnxruntime::Provider& onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load \
                     library {at}libonnxruntime_providers_{p}.so with error: {l}: cannot open shared object file: No such \
                     file or directory"
                )
            };
            let hints =
                ["", "/opt/ort/lib/"].map(|at| explain(Error::backend(text(at)), p).hint_text().unwrap().to_owned());
            assert_eq!(hints[0], hints[1]);
            hints[0].clone()
        };
        assert!(hint("libcublasLt.so.12", "cuda").contains("built for CUDA 12"));
        assert!(hint("libcudnn.so.9", "cuda").contains("cuDNN 9"));
        assert!(hint("libnvinfer.so.10", "tensorrt").contains("TensorRT 10 is missing"));
        assert!(hint("libcuda.so.1", "cuda").contains("no NVIDIA driver"));
        assert!(hint("/opt/ort/lib/libonnxruntime_providers_cuda.so", "cuda").contains("one onnxruntime-gpu wheel"));
        // Other files under the provider's name, as seen with 1.31.1.
        for what in ["file too short", "undefined symbol: GetProvider"] {
            let text = format!("Failed to load library x with error: /x/libonnxruntime_providers_cuda.so: {what}");
            assert!(explain(Error::backend(text), "cuda").hint_text().unwrap().contains("of one version"));
        }
        assert!(explain(Error::backend("something else"), "cuda").hint_text().unwrap().contains("CUDA 13"));
    }
}
