//! What this build and this machine have: libtorch, CUDA, ONNX Runtime, tract; and what to do about each that is missing.

use serde::Serialize;

/// Whether something was found and is usable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Found, and usable.
    Ok,
    /// Not there; something can be done without it.
    Missing,
    /// There but unusable, or asked for and not found.
    Broken,
}

/// One part of the build or of the machine, and its state.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What was looked at, such as `libtorch` or `CUDA devices`; shown to the user.
    pub name: &'static str,
    /// Whether it is usable.
    pub state: State,
    /// What was found, in words: version, place, number of devices.
    pub detail: String,
    /// What the user can do about it; absent where nothing is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Check {
    fn new(name: &'static str, state: State, detail: impl Into<String>) -> Self {
        Self { name, state, detail: detail.into(), advice: None }
    }
    fn advice(mut self, text: impl Into<String>) -> Self {
        self.advice = Some(text.into());
        self
    }
}

/// Examines the build and the machine: libtorch, CUDA, ONNX Runtime and tract.
pub fn examine() -> Vec<Check> {
    let mut checks = vec![Check::new("disback", State::Ok, format!("{} ({})", env!("CARGO_PKG_VERSION"), features()))];
    libtorch(&mut checks);
    #[cfg(feature = "train")]
    processes(&mut checks);
    onnxruntime(&mut checks);
    checks.push(tract());
    checks
}

/// [`examine`] where libtorch cannot be loaded, and why not.
#[cfg(feature = "train")]
pub fn examine_without_libtorch(why: &str) -> Vec<Check> {
    let mut checks = vec![Check::new("disback", State::Ok, format!("{} ({})", env!("CARGO_PKG_VERSION"), features()))];
    checks.push(Check::new("libtorch", State::Broken, format!("cannot be loaded: {why}")).advice(
        "it comes with the Python package torch (pip install torch==2.11.0), or LD_LIBRARY_PATH names the folder it lies in; sampling, \
         evaluating and serving need none",
    ));
    onnxruntime(&mut checks);
    checks.push(tract());
    checks
}

fn features() -> String {
    let all = [("train", cfg!(feature = "train")), ("ort", cfg!(feature = "ort")), ("tract", cfg!(feature = "tract"))];
    let on: Vec<&str> = all.iter().filter(|(_, on)| *on).map(|(n, _)| *n).collect();
    if on.is_empty() { "no features".into() } else { format!("features {}", on.join(", ")) }
}

#[cfg(not(feature = "train"))]
fn libtorch(checks: &mut Vec<Check>) {
    let check = Check::new("libtorch", State::Missing, "this build cannot train");
    checks.push(check.advice("build with the default features to distil; sampling and evaluating need no libtorch"));
}

#[cfg(feature = "train")]
fn libtorch(checks: &mut Vec<Check>) {
    let opened = crate::torch::cuda_half::load();
    let loaded = loaded_libraries();
    let find = |name: &str| loaded.iter().find(|p| p.rsplit('/').next().is_some_and(|f| f.starts_with(name)));
    let Some(core) = find("libtorch_cpu.so") else {
        checks.push(Check::new("libtorch", State::Ok, "linked; its place cannot be read on this system"));
        return;
    };
    let root = std::path::Path::new(core).parent().and_then(std::path::Path::parent);
    let version = root.and_then(torch_version).unwrap_or_else(|| "of unknown version".into());
    let place = root.map(|r| r.display().to_string()).unwrap_or_default();
    checks.push(Check::new("libtorch", State::Ok, format!("{version} at {place}")));
    let built = root.is_some_and(|r| r.join("lib/libtorch_cuda.so").is_file());
    let needed = std::env::current_exe()
        .ok()
        .and_then(|p| std::fs::read(p).ok())
        .and_then(|b| elf_needed(&b))
        .unwrap_or_default();
    let linked = needed.iter().any(|n| n.starts_with("libtorch_cuda"));
    let how = if linked { "linked and loaded" } else { "loaded" };
    checks.push(match (built, find("libtorch_cuda.so"), opened) {
        (_, Some(path), _) => Check::new("libtorch for CUDA", State::Ok, format!("{how}: {path}")),
        (false, ..) => Check::new("libtorch for CUDA", State::Missing, "this libtorch is a CPU build")
            .advice("to train on NVIDIA devices take a CUDA build (the PyPI wheel torch==2.11.0); LIBTORCH names it where disback is built"),
        (true, None, Err(why)) => Check::new("libtorch for CUDA", State::Broken, format!("there, but cannot be loaded: {why}"))
            .advice("libtorch finds CUDA's own libraries in the folders of the nvidia-* wheels beside it: reinstall torch with its dependencies"),
        (true, None, Ok(())) => Check::new("libtorch for CUDA", State::Broken, "opened, but not among the loaded libraries"),
    });
    let devices = tch::Cuda::device_count();
    let crate::nvidia::Driver { names, version } = crate::nvidia::driver();
    let driver = version.map_or(String::new(), |version| format!(", driver {version}"));
    // A name that nobody says is left out.
    let list = if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) };
    checks.push(if devices > 0 {
        let cudnn = if tch::Cuda::cudnn_is_available() { "with cuDNN" } else { "without cuDNN" };
        Check::new("CUDA devices", State::Ok, format!("{devices}{list}{driver}, {cudnn}"))
    } else if names.is_empty() {
        Check::new("CUDA devices", State::Missing, "none: no NVIDIA driver is loaded")
            .advice("training runs on the CPU (--device cpu); for CUDA install the NVIDIA driver")
    } else {
        Check::new(
            "CUDA devices",
            State::Broken,
            format!("the driver shows {}{driver}; libtorch sees none", names.join(", ")),
        )
        .advice("the driver may be too old for this libtorch's CUDA, or CUDA_VISIBLE_DEVICES hides the devices")
    });
}

/// What brings several processes together, and who has started this one beside others.
#[cfg(feature = "train")]
fn processes(checks: &mut Vec<Check>) {
    use crate::torch::dist::{has_nccl, launcher::Place};
    let collectives = Check::new("collectives", State::Ok, if has_nccl() { "gloo, NCCL" } else { "gloo" });
    checks.push(match has_nccl() {
        true => collectives,
        false => {
            collectives.advice("several processes share a run on CPUs; for CUDA devices build where NCCL's headers are")
        }
    });
    let found = match Place::from_env() {
        Ok(None) => return,
        Ok(Some(p)) => {
            let Place { launcher, rank, world, local, address, port, .. } = p;
            let device = if tch::Cuda::is_available() { format!("cuda:{local}") } else { "cpu".into() };
            let text = format!("{launcher}: rank {rank} of {world}, {device}, meeting at {address}:{port}");
            Check::new("launcher", State::Ok, text)
        }
        Err(e) => {
            let advice = e.hint_text().unwrap_or_default().to_owned();
            let text = e.to_string();
            Check::new("launcher", State::Broken, text.lines().next().unwrap_or_default()).advice(advice)
        }
    };
    checks.push(found);
}

/// `version.py` of the wheel or `build-version` of the plain libtorch archive.
#[cfg(feature = "train")]
fn torch_version(root: &std::path::Path) -> Option<String> {
    if let Ok(text) = std::fs::read_to_string(root.join("version.py")) {
        let line = text.lines().find(|l| l.starts_with("__version__"))?;
        return line.split(['\'', '"']).nth(1).map(str::to_string);
    }
    std::fs::read_to_string(root.join("build-version")).ok().map(|t| t.trim().to_string())
}

/// Paths of the shared libraries in this process (Linux; empty elsewhere).
#[cfg(feature = "train")]
fn loaded_libraries() -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut paths: Vec<String> =
        maps.lines().filter_map(|l| Some(l[l.find('/')?..].to_string())).filter(|p| p.contains(".so")).collect();
    paths.sort();
    paths.dedup();
    paths
}

fn onnxruntime(checks: &mut Vec<Check>) {
    #[cfg(not(feature = "ort"))]
    checks.push(
        Check::new("ONNX Runtime", State::Missing, "this build has no ONNX Runtime engine")
            .advice("build with the feature `ort`"),
    );
    #[cfg(feature = "ort")]
    match crate::runtime::ort::library() {
        Ok(library) => {
            let version = &library.version;
            checks.push(Check::new("ONNX Runtime", State::Ok, format!("{version} at {}", library.path.display())));
            let names: Vec<String> =
                library.providers.iter().map(|p| crate::runtime::ort::short_name(p).to_ascii_lowercase()).collect();
            let mut check = Check::new("its providers", State::Ok, names.join(", "));
            if !names.iter().any(|n| n == "cuda") {
                check = check
                    .advice("for CUDA or TensorRT install onnxruntime-gpu and set ORT_DYLIB_PATH to its capi folder");
            }
            checks.push(check);
        }
        Err(e) => {
            let state = if e.is_absent() { State::Missing } else { State::Broken };
            let error = crate::error::Error::from(e);
            let hint = error.hint_text().unwrap_or_default().to_string();
            let text = error.to_string();
            let detail = text.lines().next().unwrap_or_default().to_string();
            checks.push(Check::new("ONNX Runtime", state, detail).advice(hint));
        }
    }
}

fn tract() -> Check {
    #[cfg(feature = "tract")]
    return Check::new("tract", State::Ok, format!("{} (CPU, one thread)", crate::runtime::tract::VERSION));
    #[cfg(not(feature = "tract"))]
    Check::new("tract", State::Missing, "this build has no tract engine").advice("build with the feature `tract`")
}

/// Names of the shared libraries that an ELF file (64-bit, little-endian) asks for: the DT_NEEDED entries of its dynamic
/// section. `None` for anything else.
pub fn elf_needed(file: &[u8]) -> Option<Vec<String>> {
    let bytes = |at: usize, n: usize| file.get(at..at.checked_add(n)?);
    let u64_at = |at: usize| Some(u64::from_le_bytes(bytes(at, 8)?.try_into().ok()?) as usize);
    let u32_at = |at: usize| Some(u32::from_le_bytes(bytes(at, 4)?.try_into().ok()?) as usize);
    let u16_at = |at: usize| Some(u16::from_le_bytes(bytes(at, 2)?.try_into().ok()?) as usize);
    if bytes(0, 6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count) = (u64_at(32)?, u16_at(54)?, u16_at(56)?);
    let headers: Vec<usize> = (0..count).map(|k| table + k * size).collect();
    let of_type = |wanted: usize| headers.iter().copied().filter(move |&h| u32_at(h) == Some(wanted));
    // Program header: type, flags, offset, vaddr, paddr, filesz. Types: 1 load, 2 dynamic.
    let dynamic = of_type(2).next()?;
    let (start, length) = (u64_at(dynamic + 8)?, u64_at(dynamic + 32)?);
    let entries: Vec<(usize, usize)> = (0..length / 16)
        .map_while(|k| Some((u64_at(start + 16 * k)?, u64_at(start + 16 * k + 8)?)))
        .take_while(|(tag, _)| *tag != 0)
        .collect();
    // Tags: 1 needed (offset into the string table), 5 string table (an address).
    let address = entries.iter().find(|(tag, _)| *tag == 5)?.1;
    let strings = of_type(1).find_map(|h| {
        let (offset, from, size) = (u64_at(h + 8)?, u64_at(h + 16)?, u64_at(h + 32)?);
        (from <= address && address - from < size).then(|| offset + address - from)
    })?;
    let name = |at: usize| {
        let rest = file.get(strings.checked_add(at)?..)?;
        let end = rest.iter().position(|&b| b == 0)?;
        Some(String::from_utf8_lossy(&rest[..end]).into_owned())
    };
    Some(entries.iter().filter(|(tag, _)| *tag == 1).filter_map(|(_, at)| name(*at)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shortcoming_comes_with_advice() {
        let checks = examine();
        assert!(checks.iter().any(|c| c.name == "ONNX Runtime") && checks.iter().any(|c| c.name == "tract"));
        for check in checks.iter().filter(|c| c.state == State::Missing) {
            assert!(check.advice.is_some(), "{check:?}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn own_dynamic_section_is_read() {
        let file = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let needed = elf_needed(&file).unwrap();
        assert!(needed.iter().any(|n| n.starts_with("libc.so")), "{needed:?}");
        for cut in [0, 5, 40, 64, 100, 1000] {
            let _ = elf_needed(&file[..cut]);
        }
        assert!(elf_needed(b"no program").is_none());
    }
}
