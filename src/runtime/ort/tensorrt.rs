//! TensorRT through ONNX Runtime: its options from ours, and the folder of built engines with what it was built for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::runtime::{Accelerator, Dim, ValueInfo};

/// Options of the TensorRT provider for a student with these inputs.
///
/// Errors, of kind [`crate::Kind::Usage`]: profiles that do not rise from smallest to largest; a profile for a network
/// without a free batch.
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
        let dir = dir.display().to_string();
        set("engine_cache_enable", "1".into());
        set("engine_cache_path", dir.clone());
        set("timing_cache_enable", "1".into());
        set("timing_cache_path", dir);
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
    /// Model name of the device, as the driver gives it.
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
    /// The stamp of this machine.
    pub fn here(model: &[u8], onnxruntime: &str, device: u32) -> Self {
        let root = Path::new("/proc/driver/nvidia");
        let mut gpus: Vec<PathBuf> =
            std::fs::read_dir(root.join("gpus")).into_iter().flatten().flatten().map(|e| e.path()).collect();
        gpus.sort();
        let information = gpus.get(device as usize).and_then(|g| std::fs::read_to_string(g.join("information")).ok());
        let name = information.as_deref().and_then(|t| t.lines().find_map(|l| l.strip_prefix("Model:")));
        let driver = std::fs::read_to_string(root.join("version")).unwrap_or_default();
        Self {
            device: name.map_or("none", str::trim).to_owned(),
            driver: driver
                .split_whitespace()
                .find(|w| w.starts_with(|c: char| c.is_ascii_digit()))
                .unwrap_or("none")
                .into(),
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
