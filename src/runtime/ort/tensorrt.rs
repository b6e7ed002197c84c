//! TensorRT through ONNX Runtime: its options from ours, and the folder of built engines with what it was built for.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::runtime::{Accelerator, Dim, ValueInfo};

/// Options of the TensorRT provider for a student with these inputs.
///
/// Errors, of kind [`crate::Kind::Usage`]: profiles that do not rise from smallest to largest; a profile for a network
/// without a free batch; a cache outside of the folder of a context model.
pub fn options(a: &Accelerator, inputs: &[ValueInfo]) -> Result<Vec<(String, String)>> {
    let mut pairs = BTreeMap::new();
    let mut set = |key: &str, value: String| {
        pairs.insert(format!("trt_{key}"), value);
    };
    if a.fp16 {
        set("fp16_enable", "1".into());
        // Means over many values overflow in f16; TensorRT keeps layer norms in f32 on request.
        set("layer_norm_fp32_fallback", "1".into());
    }
    if a.bf16 {
        set("bf16_enable", "1".into());
    }
    if let Some(dir) = &a.cache {
        // With a context model TensorRT's provider takes this path from that model's folder.
        let engines = a.ep_context.as_deref().map_or_else(|| Ok(dir.clone()), |file| beside(dir, file))?;
        set("engine_cache_enable", "1".into());
        set("engine_cache_path", engines.display().to_string());
        set("timing_cache_enable", "1".into());
        set("timing_cache_path", dir.display().to_string());
    }
    if a.cuda_graph {
        set("cuda_graph_enable", "1".into());
    }
    if let Some(file) = &a.ep_context {
        set("dump_ep_context_model", "1".into());
        set("ep_context_file_path", file.display().to_string());
        // The engine itself, not the path of a file that is not shipped.
        set("ep_context_embed_mode", "1".into());
    }
    let free = inputs.iter().any(|i| matches!(i.shape.first(), Some(Dim::Symbol(_))));
    // Expected calls are no promise: sizes that stay free are left to TensorRT, which builds for what it meets.
    let expected = a.calls.filter(|c| free && c[0] >= 1 && shapes(inputs, c[0]).is_ok());
    match a.profile.or(expected) {
        Some([min, opt, max]) if free => {
            if !(1 <= min && min <= opt && opt <= max) {
                return Err(Error::usage(format!(
                    "--profile {min},{opt},{max}: expected smallest, usual and largest batch"
                )));
            }
            // Every free input must be in all three profiles, or TensorRT builds a new engine for each shape.
            for (name, n) in [("min", min), ("opt", opt), ("max", max)] {
                set(&format!("profile_{name}_shapes"), shapes(inputs, n)?);
            }
        }
        Some(_) => {
            return Err(Error::usage("--profile: the student's batch is fixed").hint("leave --profile out"));
        }
        None => {}
    }
    Ok(pairs.into_iter().collect())
}

/// The path of the cache from the folder of a context model.
///
/// Errors: a cache that is not within that folder, which the provider does not take.
fn beside(dir: &Path, file: &Path) -> Result<PathBuf> {
    let [cache, model] = [dir, file].map(std::path::absolute);
    let (cache, model) = (cache?, model?);
    // (`..` in either is left as it is, and then matches nothing.)
    let within = model.parent().and_then(|folder| cache.strip_prefix(folder).ok());
    match within.filter(|p| !p.components().any(|c| c == Component::ParentDir)) {
        Some(p) if p.as_os_str().is_empty() => Ok(".".into()),
        Some(p) => Ok(p.into()),
        None => Err(Error::usage(format!(
            "--cache {} is not within the folder of --ep-context {}, where TensorRT keeps the engines of such a model",
            dir.display(),
            file.display()
        ))
        .hint("give a --cache in that folder, or write the context model without --cache")),
    }
}

/// `noise:4x3x32x32,labels:4`.
fn shapes(inputs: &[ValueInfo], batch: usize) -> Result<String> {
    let one = |i: &ValueInfo| -> Result<String> {
        let dims = i.shape.iter().enumerate().map(|(k, d)| match d {
            Dim::Fixed(n) => Ok(n.to_string()),
            Dim::Symbol(_) if k == 0 => Ok(batch.to_string()),
            Dim::Symbol(s) => {
                Err(Error::usage(format!("input {i}: the dimension `{s}` is free, a profile needs its size"))
                    .hint("fix it when exporting the teacher"))
            }
        });
        Ok(format!("{}:{}", i.name, dims.collect::<Result<Vec<_>>>()?.join("x")))
    };
    Ok(inputs.iter().map(one).collect::<Result<Vec<_>>>()?.join(","))
}

/// What a folder of engines was built for. An engine runs on the device and with the libraries that built it, nowhere else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Model name of the device, as the driver gives it ([`crate::nvidia::Driver::device`]).
    pub device: String,
    /// Version of the NVIDIA kernel driver; `none` where it cannot be read.
    pub driver: String,
    /// Version of ONNX Runtime.
    pub onnxruntime: String,
    /// SHA-256 of the student's file.
    pub model: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Manifest {
    stamp: Option<Stamp>,
    /// SHA-256 of each engine, by file name.
    files: BTreeMap<String, String>,
}

const MANIFEST: &str = "disback-cache.json";

impl Stamp {
    /// The stamp of this machine. The driver's library is asked, else its files: WSL2 has no such files.
    pub fn here(model: &[u8], onnxruntime: &str, device: u32) -> Self {
        let driver = crate::nvidia::driver();
        let [visible, order] = ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"].map(|v| std::env::var(v).ok());
        Self {
            device: driver.device(device, visible.as_deref(), order.as_deref()),
            driver: driver.version.unwrap_or_else(|| "none".into()),
            onnxruntime: onnxruntime.to_owned(),
            model: hash(model),
        }
    }
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Checks a cache folder before TensorRT reads it: same device, driver, ONNX Runtime and student, and engines as they were
/// written. Makes the folder where it is not there.
///
/// Errors: another device's cache, a changed or cut engine: each with what to do.
pub fn check_cache(dir: &Path, stamp: &Stamp) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let file = dir.join(MANIFEST);
    if !file.is_file() {
        return Ok(());
    }
    let shown = dir.display();
    let away = || format!("remove {shown} to build new engines, or give another --cache");
    let text = crate::files::read(&file, crate::files::JSON).with_context(|| file.display().to_string())?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|e| Error::io(format!("{}: not a cache list: {e}", file.display())).hint(away()))?;
    if let Some(old) = &manifest.stamp {
        let pairs = [
            ("device", &old.device, &stamp.device),
            ("driver", &old.driver, &stamp.driver),
            ("ONNX Runtime", &old.onnxruntime, &stamp.onnxruntime),
            ("student", &old.model, &stamp.model),
        ];
        if let Some((what, was, is)) = pairs.into_iter().find(|(_, a, b)| a != b) {
            let short = |s: &str| s.chars().take(24).collect::<String>();
            return Err(Error::mismatch(format!(
                "the engine cache {shown} was built for another {what} ({}, this is {})",
                short(was),
                short(is)
            ))
            .hint(away()));
        }
    }
    for (name, want) in &manifest.files {
        let path = dir.join(Path::new(name).file_name().unwrap_or_default());
        let bytes = crate::files::map(&path)
            .map_err(|e| Error::io(format!("the engine cache {shown} lacks {name}: {e}")).hint(away()))?;
        if hash(&bytes) != *want {
            return Err(
                Error::io(format!("the engine cache {shown} is corrupt: {name} is not what was written")).hint(away())
            );
        }
    }
    Ok(())
}

/// Writes down what the folder holds after engines were built.
pub fn seal_cache(dir: &Path, stamp: &Stamp) -> Result<()> {
    let mut manifest = Manifest { stamp: Some(stamp.clone()), ..Manifest::default() };
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // Timing caches change with each build and are checked by TensorRT itself.
        if name.ends_with(".engine") {
            manifest.files.insert(name, hash(&crate::files::map(&entry.path())?));
        }
    }
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::io(e.to_string()))?;
    crate::files::write_atomic(&dir.join(MANIFEST), &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    fn inputs(batch: Dim) -> Vec<ValueInfo> {
        let fixed = |n| Dim::Fixed(n);
        vec![
            ValueInfo {
                name: "noise".into(),
                dtype: DType::F32,
                shape: vec![batch.clone(), fixed(3), fixed(32), fixed(32)],
            },
            ValueInfo { name: "labels".into(), dtype: DType::I64, shape: vec![batch] },
        ]
    }

    #[test]
    fn profiles_cover_every_free_input() {
        let a =
            Accelerator { profile: Some([1, 8, 64]), fp16: true, cache: Some("c".into()), ..Accelerator::default() };
        let free = inputs(Dim::Symbol("batch".into()));
        let pairs: BTreeMap<String, String> = options(&a, &free).unwrap().into_iter().collect();
        assert_eq!(pairs["trt_profile_min_shapes"], "noise:1x3x32x32,labels:1");
        assert_eq!(pairs["trt_profile_max_shapes"], "noise:64x3x32x32,labels:64");
        assert_eq!((pairs["trt_fp16_enable"].as_str(), pairs["trt_timing_cache_path"].as_str()), ("1", "c"));
        let bad = Accelerator { profile: Some([8, 4, 64]), ..Accelerator::default() };
        assert_eq!(options(&bad, &free).unwrap_err().exit_code(), 2);
        assert!(options(&a, &inputs(Dim::Fixed(2))).unwrap_err().to_string().contains("batch is fixed"));
        assert!(options(&Accelerator::default(), &free).unwrap().is_empty());
        // The batches of the calls to come, where no profile is given.
        let calls = Accelerator { calls: Some([1, 16, 16]), ..Accelerator::default() };
        let pairs: BTreeMap<String, String> = options(&calls, &free).unwrap().into_iter().collect();
        assert_eq!(pairs["trt_profile_min_shapes"], "noise:1x3x32x32,labels:1");
        assert_eq!(pairs["trt_profile_opt_shapes"], "noise:16x3x32x32,labels:16");
        assert!(options(&calls, &inputs(Dim::Fixed(2))).unwrap().is_empty());
        let given = Accelerator { profile: Some([2, 4, 8]), ..calls };
        assert!(
            options(&given, &free)
                .unwrap()
                .contains(&("trt_profile_max_shapes".into(), "noise:8x3x32x32,labels:8".into()))
        );
    }

    #[test]
    fn the_cache_of_a_context_model_is_beside_it() {
        let path = |cache: &str, file: &str| beside(Path::new(cache), Path::new(file));
        assert_eq!(path("out/engines", "out/x.onnx").unwrap(), Path::new("engines"));
        assert_eq!(path("out", "out/x.onnx").unwrap(), Path::new("."));
        assert_eq!(path("engines", "x.onnx").unwrap(), Path::new("engines"));
        for (cache, file) in [("engines", "out/x.onnx"), ("out/../engines", "out/x.onnx"), ("../engines", "x.onnx")] {
            let e = path(cache, file).unwrap_err();
            assert!(e.exit_code() == 2 && e.to_string().contains("--ep-context"), "{cache} {file}: {e}");
        }
    }

    #[test]
    fn caches_of_another_device_and_broken_ones_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let stamp =
            |d: &str| Stamp { device: d.into(), driver: "580".into(), onnxruntime: "1.31.1".into(), model: "m".into() };
        check_cache(dir.path(), &stamp("A")).unwrap();
        std::fs::write(dir.path().join("x.engine"), b"engine").unwrap();
        seal_cache(dir.path(), &stamp("A")).unwrap();
        check_cache(dir.path(), &stamp("A")).unwrap();
        let e = check_cache(dir.path(), &stamp("B")).unwrap_err().to_string();
        assert!(e.contains("another device (A, this is B)") && e.contains("help: remove"), "{e}");
        std::fs::write(dir.path().join("x.engine"), b"engin").unwrap();
        assert!(check_cache(dir.path(), &stamp("A")).unwrap_err().to_string().contains("is corrupt: x.engine"));
        std::fs::remove_file(dir.path().join("x.engine")).unwrap();
        assert!(check_cache(dir.path(), &stamp("A")).unwrap_err().to_string().contains("lacks x.engine"));
        std::fs::write(dir.path().join(MANIFEST), b"{").unwrap();
        assert!(check_cache(dir.path(), &stamp("A")).unwrap_err().to_string().contains("not a cache list"));
    }
}
