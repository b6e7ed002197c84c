//! ONNX Runtime that says it has CUDA and TensorRT (tests/recorded_ort): built with the places of its functions from `ort-sys`, and what
//! a run asked of the providers, checked against what they know.
#![allow(dead_code, reason = "each test target uses its own part")]

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use disback::runtime::{Dim, ValueInfo};
use ort::sys::OrtApi;

/// Options of a provider, by name.
pub type Options = BTreeMap<String, String>;

/// The library, for `ORT_DYLIB_PATH`.
pub fn library() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("recorded-ort");
        std::fs::create_dir_all(&folder).expect("target/tmp is writable");
        let fresh = folder.join(format!("{}.so", std::process::id()));
        let real = &disback::runtime::ort::library().unwrap_or_else(|e| panic!("{e:?}")).path;
        let real = real.canonicalize().unwrap_or_else(|_| real.clone());
        let mut compile = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()));
        compile.args(["-shared", "-fPIC", "-std=c++17", "-Wall", "-Werror"]).args(places());
        compile.arg(format!("-DREAL=\"{}\"", real.display()));
        compile.arg(root.join("tests/recorded_ort/recorded_ort.cpp")).arg("-ldl").arg("-o").arg(&fresh);
        let out = compile.output().unwrap_or_else(|e| panic!("{compile:?}: {e}"));
        assert!(out.status.success(), "{compile:?}:\n{}", String::from_utf8_lossy(&out.stderr));
        let file = folder.join("libonnxruntime.so");
        std::fs::rename(&fresh, &file).expect("target/tmp is writable");
        file
    })
}

/// Where the table has its functions.
fn places() -> Vec<String> {
    let size = size_of::<fn()>();
    let mut all = vec![format!("-DFUNCTIONS={}", size_of::<OrtApi>() / size)];
    macro_rules! at {
        ($($name:ident)*) => {
            $(all.push(format!("-DAT_{}={}", stringify!($name), offset_of!(OrtApi, $name) / size));)*
        };
    }
    at!(CreateStatus GetAvailableProviders ReleaseAvailableProviders CloneSessionOptions ReleaseSessionOptions);
    at!(CreateCUDAProviderOptions UpdateCUDAProviderOptions ReleaseCUDAProviderOptions);
    at!(SessionOptionsAppendExecutionProvider_CUDA_V2 SessionOptionsAppendExecutionProvider_TensorRT_V2);
    at!(CreateTensorRTProviderOptions UpdateTensorRTProviderOptions ReleaseTensorRTProviderOptions);
    at!(CreateSession CreateSessionFromArray CreateMemoryInfo BindInput BindOutputToDevice Run);
    at!(GetTensorTypeAndShape GetDimensionsCount GetDimensions ReleaseTensorTypeAndShapeInfo);
    at!(Session_GetEpGraphAssignmentInfo EpAssignedSubgraph_GetEpName EpAssignedSubgraph_GetNodes);
    at!(EpAssignedNode_GetOperatorType);
    all
}

/// What was asked of the library, a call a line.
pub struct Record(Vec<Vec<String>>);

impl Record {
    /// Reads what a process left; nothing where it asked nothing.
    pub fn read(file: &Path) -> Self {
        Self::of(&std::fs::read_to_string(file).unwrap_or_default())
    }

    /// Of the text itself.
    pub fn of(text: &str) -> Self {
        Self(text.lines().map(|l| l.split('\t').map(str::to_owned).collect()).collect())
    }

    /// The words after `kind` of its lines.
    pub fn all(&self, kind: &str) -> Vec<Vec<&str>> {
        let lines = self.0.iter().filter(|l| l[0] == kind);
        lines.map(|l| l[1..].iter().map(String::as_str).collect()).collect()
    }

    /// Every provider that was registered, in order: `CUDA`, `Tensorrt`.
    pub fn providers(&self) -> Vec<(String, Options)> {
        let mut all: Vec<(String, Options)> = Vec::new();
        for line in &self.0 {
            let short = || line[1].trim_end_matches("ExecutionProvider").to_owned();
            match (line[0].as_str(), all.last_mut()) {
                ("provider", _) => all.push((short(), Options::new())),
                ("option", Some((_, options))) => {
                    options.insert(line[2].clone(), line.get(3).cloned().unwrap_or_default());
                }
                _ => {}
            }
        }
        all
    }

    /// What the providers would refuse, or not do as was meant: names and values that they do not know, profiles that leave a free
    /// dimension of one of `inputs` out, calls outside of a profile.
    pub fn faults(&self, inputs: &[ValueInfo]) -> Vec<String> {
        let mut faults: Vec<String> = self.all("error").iter().map(|l| l.join(" ")).collect();
        for (provider, options) in self.providers() {
            for (name, value) in &options {
                match kind(&provider, name) {
                    None => faults.push(format!("{provider} knows no option {name}")),
                    Some(kind) if !fits(&kind, value) => {
                        faults.push(format!("{provider}'s {name} is {value}, expected {kind}"));
                    }
                    Some(_) => {}
                }
            }
            if provider == "Tensorrt" {
                faults.extend(self.profile(&options, inputs));
            }
        }
        faults
    }

    fn profile(&self, options: &Options, inputs: &[ValueInfo]) -> Vec<String> {
        let [min, opt, max] = ["min", "opt", "max"].map(|n| {
            options.get(&format!("trt_profile_{n}_shapes")).map(|t| shapes(t).unwrap_or_default()).unwrap_or_default()
        });
        let mut faults = Vec::new();
        for input in inputs.iter().filter(|i| i.shape.iter().any(|d| matches!(d, Dim::Symbol(_)))) {
            let name = &input.name;
            let (Some(a), Some(b), Some(c)) = (min.get(name), opt.get(name), max.get(name)) else {
                faults.push(format!("no profile has input {name}"));
                continue;
            };
            let rank = input.shape.len();
            if [a, b, c].iter().any(|s| s.len() != rank) {
                faults.push(format!("{name} has {rank} dimensions, its profile {a:?} {b:?} {c:?}"));
                continue;
            }
            for (k, dim) in input.shape.iter().enumerate() {
                let right = match dim {
                    Dim::Fixed(n) => [a[k], b[k], c[k]] == [*n; 3],
                    Dim::Symbol(_) => 1 <= a[k] && a[k] <= b[k] && b[k] <= c[k],
                };
                if !right {
                    faults.push(format!("dimension {k} of {name} is {dim:?}, its profile {a:?} {b:?} {c:?}"));
                }
            }
            for call in self.calls(name) {
                let within = call.len() == rank && (0..rank).all(|k| (a[k]..=c[k]).contains(&call[k]));
                if !within {
                    faults.push(format!("{name} came as {call:?}, outside of its profile {a:?} {c:?}"));
                }
            }
        }
        faults
    }

    /// The shapes in which an input came.
    pub fn calls(&self, input: &str) -> Vec<Vec<usize>> {
        let lines = self.all("fed").into_iter().chain(self.all("bound")).filter(|l| l[0] == input);
        lines.map(|l| l[1].split('x').filter_map(|n| n.parse().ok()).collect()).collect()
    }
}

/// What an option's value must be (tests/recorded_ort/options.txt).
fn kind(provider: &str, option: &str) -> Option<String> {
    let table = include_str!("../recorded_ort/options.txt");
    let mut rows = table.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    rows.find(|r| r[..] == [provider, option, r[r.len() - 1]]).map(|r| r[2].to_owned())
}

fn fits(kind: &str, value: &str) -> bool {
    match kind {
        "flag" => matches!(value, "0" | "1" | "true" | "false"),
        "number" => value.parse::<i64>().is_ok(),
        "text" => !value.is_empty(),
        "shapes" => shapes(value).is_some(),
        words => words.split('|').any(|w| w == value),
    }
}

/// `noise:4x3x32x32,labels:4`.
fn shapes(text: &str) -> Option<BTreeMap<String, Vec<usize>>> {
    let one = |part: &str| -> Option<(String, Vec<usize>)> {
        let (name, sizes) = part.rsplit_once(':')?;
        let sizes = sizes.split('x').map(|n| n.parse().ok()).collect::<Option<Vec<usize>>>()?;
        Some((name.to_owned(), sizes)).filter(|(n, _)| !n.is_empty())
    };
    text.split(',').map(one).collect()
}
