//! Generates the ONNX wire types, compiles the libtorch shim and makes the binary find libtorch at run time.

use std::path::{Path, PathBuf};

fn main() {
    generate_onnx_types();
    #[cfg(feature = "train")]
    generate_event_types();
    bake_onnxruntime_hint();
    #[cfg(feature = "train")]
    train::link_libtorch();
}

/// `onnx/onnx.proto` -> Rust, by protox (no protoc). Bytes fields become `bytes::Bytes`, so that a memory-mapped file is
/// decoded without copying its weights.
fn generate_onnx_types() {
    println!("cargo:rerun-if-changed=onnx/onnx.proto");
    let set = protox::compile(["onnx/onnx.proto"], ["onnx"]).expect("onnx/onnx.proto compiles");
    prost_build::Config::new().bytes(["."]).compile_fds(set).expect("Rust types for onnx/onnx.proto");
}

/// TensorBoard's event files. Maps are ordered, so that equal settings give equal bytes.
#[cfg(feature = "train")]
fn generate_event_types() {
    const FOLDER: &str = "src/report/tfevents";
    println!("cargo:rerun-if-changed={FOLDER}/tfevents.proto");
    let set = protox::compile(["tfevents.proto"], [FOLDER]).expect("tfevents.proto compiles");
    prost_build::Config::new().btree_map(["."]).compile_fds(set).expect("Rust types for tfevents.proto");
}

/// Where `make setup` put libonnxruntime: the last place `runtime::ort` looks, after `ORT_DYLIB_PATH` and the folder of
/// the executable.
fn bake_onnxruntime_hint() {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let libs = root.join(".venv/lib");
    let python = std::fs::read_dir(&libs)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path().join("site-packages/onnxruntime/capi"))
        .find(|p| p.is_dir());
    // (Of a folder cargo looks at every file below it, and each Python that runs there writes some: all would be built again.)
    let watched = match &python {
        Some(dir) => std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("libonnxruntime.so"))),
        None => libs.is_dir().then_some(libs),
    };
    println!("cargo:rerun-if-changed={}", watched.as_deref().unwrap_or(Path::new("build.rs")).display());
    if let Some(dir) = python {
        println!("cargo:rustc-env=DISBACK_ORT_DIR={}", dir.display());
    }
}

#[cfg(feature = "train")]
mod train {
    use std::path::{Path, PathBuf};

    const SOURCES: [&str; 13] = [
        "src/torch/shim.cpp",
        "src/torch/training.cpp",
        "src/torch/cpu/activation.cpp",
        "src/torch/profile.cpp",
        "src/torch/dist/dist.cpp",
        "src/torch/dist/reducer.cpp",
        "src/torch/train/cuda_graph.cpp",
        "src/torch/cpu/winograd.cpp",
        "src/torch/cpu/gemm.cpp",
        "src/torch/cpu/gemm_avx2.cpp",
        "src/torch/cpu/gemm_avx512.cpp",
        "src/torch/cpu/linear.cpp",
        "src/torch/cpu/group_norm.cpp",
    ];
    const HEADERS: [&str; 8] = [
        "src/torch/border.h",
        "src/torch/dist/group.h",
        "src/torch/cpu/lanes.h",
        "src/torch/cpu/parallel.h",
        "src/torch/cpu/gemm.h",
        "src/torch/cpu/gemm_kernel.h",
        "src/torch/cpu/group_norm_passes.h",
        "src/torch/cpu/winograd_tiles.h",
    ];

    /// torch-sys (a direct dependency for this very reason) tells where it linked libtorch.
    pub fn link_libtorch() {
        println!("cargo:rerun-if-env-changed=LIBTORCH");
        for file in SOURCES.iter().chain(&HEADERS) {
            println!("cargo:rerun-if-changed={file}");
        }
        let lib = PathBuf::from(
            std::env::var("DEP_TCH_LIBTORCH_LIB")
                .expect("torch-sys exports the path of libtorch (DEP_TCH_LIBTORCH_LIB)"),
        );
        let root = lib.parent().expect("libtorch's lib folder has a parent").to_path_buf();
        compile_shim(&root);
        println!("cargo:rustc-link-search=native={}", lib.display());
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
        // Nothing refers to libtorch_cuda by symbol, so the linker would drop it and a CUDA machine would train on its CPU. (Programs
        // linked with this crate, and the wheel's, open it by its name: src/torch/cuda_half.rs.)
        let has = |name: &str| lib.join(name).exists();
        let mut arguments = vec!["-Wl,--no-as-needed", "-ltorch"];
        if has("libtorch_cuda.so") {
            arguments.extend(["-ltorch_cuda", "-lc10_cuda"]);
            // Its own dependencies sit in the wheel's nvidia/ folders; the loader finds them by libtorch_cuda's rpath.
            println!("cargo:rustc-link-arg=-Wl,--allow-shlib-undefined");
        }
        arguments.push("-Wl,--as-needed");
        // The program `disback` calls nothing of libtorch, and must start without it: what libtorch has too is not kept for its sake.
        println!("cargo:rustc-link-arg-bin=disback=-Wl,--exclude-libs,ALL");
        for argument in arguments {
            println!("cargo:rustc-link-arg-bin=disback-train={argument}");
            for targets in ["tests", "examples", "benches"] {
                println!("cargo:rustc-link-arg-{targets}={argument}");
            }
        }
    }

    fn compile_shim(root: &Path) {
        let include = root.join("include");
        if !Path::new("src/torch/shim.cpp").exists() {
            return;
        }
        let mut build = cc::Build::new();
        if root.join("lib/libtorch_cuda.so").exists()
            && let Some(folders) = cuda_headers(root)
        {
            // NCCL's header and what it includes: without them CUDA devices of several processes are refused.
            let has = |file: &str| folders.iter().any(|d| d.join(file).is_file());
            if has("nccl.h") && has("nv/target") {
                build.define("USE_C10D_NCCL", None).define("DISBACK_NCCL", None);
            }
            build.define("DISBACK_CUDA", None).includes(folders);
        }
        build
            .cpp(true)
            .std("c++20")
            .files(SOURCES)
            .include(&include)
            .include(include.join("torch/csrc/api/include"))
            // The wheel has gloo inside libtorch_cpu and not its headers: the few names that c10d's header mentions are ours.
            .include("src/torch/dist/gloo_names")
            .define("USE_C10D_GLOO", None)
            .flag_if_supported("-Wno-unused-parameter")
            .warnings(false)
            .opt_level(3)
            .compile("disback_shim");
    }

    /// Folders with the headers of CUDA's runtime and what they include: of a toolkit, or of the wheels beside PyTorch's
    /// (of which Triton's alone has the compiler's). Without them CUDA graphs are left out.
    fn cuda_headers(root: &Path) -> Option<Vec<PathBuf>> {
        println!("cargo:rerun-if-env-changed=CUDA_HOME");
        let toolkit = std::env::var_os("CUDA_HOME").map_or_else(|| PathBuf::from("/usr/local/cuda"), PathBuf::from);
        let packages = root.canonicalize().ok().and_then(|r| Some(r.parent()?.to_path_buf()));
        let beside = packages.into_iter().flat_map(|p| {
            ["cu13/include", "cuda_runtime/include", "nccl/include", "cuda_cccl/include"]
                .map(|d| p.join("nvidia").join(d))
                .into_iter()
                .chain([p.join("triton/backends/nvidia/include")])
        });
        let all: Vec<PathBuf> = std::iter::once(toolkit.join("include")).chain(beside).filter(|d| d.is_dir()).collect();
        let has = |file: &str| all.iter().any(|d| d.join(file).is_file());
        (has("cuda_runtime_api.h") && has("crt/host_config.h")).then_some(all)
    }
}
