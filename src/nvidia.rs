//! What NVIDIA's driver says of itself and its devices, without making a context on one.

/// The driver that is loaded, as far as it says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Driver {
    /// Models of the devices, in the driver's order (by their place on the bus); none without a driver.
    pub names: Vec<String>,
    /// The driver's version, such as `580.65.06`; `None` without one, or where it is not said.
    pub version: Option<String>,
}

/// Asks the driver: its library, or its files. The library alone is there where the kernel driver is another system's, as in WSL2.
pub fn driver() -> Driver {
    if let Some((names, version)) = nvml::ask() {
        return Driver { names, version: Some(version) };
    }
    let root = std::path::Path::new("/proc/driver/nvidia");
    let mut gpus: Vec<_> =
        std::fs::read_dir(root.join("gpus")).into_iter().flatten().flatten().map(|e| e.path()).collect();
    // The folders' names are the places on the bus.
    gpus.sort();
    let names = gpus.iter().filter_map(|folder| {
        let text = std::fs::read_to_string(folder.join("information")).ok()?;
        Some(text.lines().find_map(|l| l.strip_prefix("Model:"))?.trim().to_string())
    });
    let text = std::fs::read_to_string(root.join("version")).unwrap_or_default();
    let version = text.split_whitespace().find(|w| w.starts_with(|c: char| c.is_ascii_digit()));
    Driver { names: names.collect(), version: version.map(str::to_owned) }
}

impl Driver {
    /// What device `index` of CUDA's is called; `none` without devices. CUDA may count in another order than the driver
    /// (`CUDA_VISIBLE_DEVICES`, `CUDA_DEVICE_ORDER`): where not all devices are of one model, all models, the index and those
    /// variables (`visible`, `order`) together say which it is.
    pub fn device(&self, index: u32, visible: Option<&str>, order: Option<&str>) -> String {
        let Some(first) = self.names.first() else { return "none".into() };
        if self.names.iter().all(|n| n == first) {
            return first.clone();
        }
        let set = |v: Option<&str>| v.unwrap_or("-").to_owned();
        format!("{index} of {} ({}, {})", self.names.join(", "), set(visible), set(order))
    }
}

/// NVIDIA's management library, which comes with the driver.
mod nvml {
    use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

    use libloading::Library;

    #[cfg(windows)]
    const NAME: &str = "nvml.dll";
    #[cfg(not(windows))]
    const NAME: &str = "libnvidia-ml.so.1";
    /// Longer than any name.
    const LENGTH: c_uint = 96;

    /// What `fill` wrote.
    fn text(fill: impl FnOnce(*mut c_char) -> c_int) -> Option<String> {
        let mut buffer = [0 as c_char; LENGTH as usize + 1];
        if fill(buffer.as_mut_ptr()) != 0 {
            return None;
        }
        // SAFETY: the buffer ends with a zero that `fill` was not told of.
        Some(unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().trim().to_owned())
    }

    /// Names of all devices and the driver's version; `None` without a driver that answers.
    pub fn ask() -> Option<(Vec<String>, String)> {
        type Text = unsafe extern "C" fn(*mut c_char, c_uint) -> c_int;
        type Named = unsafe extern "C" fn(*mut c_void, *mut c_char, c_uint) -> c_int;
        // SAFETY: the driver's own library, and its functions with the types of nvml.h.
        unsafe {
            let library = Library::new(NAME).ok()?;
            let init = library.get::<unsafe extern "C" fn() -> c_int>(b"nvmlInit_v2\0").ok()?;
            let shutdown = library.get::<unsafe extern "C" fn() -> c_int>(b"nvmlShutdown\0").ok()?;
            let count = library.get::<unsafe extern "C" fn(*mut c_uint) -> c_int>(b"nvmlDeviceGetCount_v2\0").ok()?;
            let handle = library
                .get::<unsafe extern "C" fn(c_uint, *mut *mut c_void) -> c_int>(b"nvmlDeviceGetHandleByIndex_v2\0")
                .ok()?;
            let name = library.get::<Named>(b"nvmlDeviceGetName\0").ok()?;
            let version = library.get::<Text>(b"nvmlSystemGetDriverVersion\0").ok()?;
            if init() != 0 {
                return None;
            }
            let ask = || {
                let mut devices: c_uint = 0;
                if count(&mut devices) != 0 {
                    return None;
                }
                let names = (0..devices).filter_map(|k| {
                    let mut device = std::ptr::null_mut();
                    (handle(k, &mut device) == 0).then(|| text(|buffer| name(device, buffer, LENGTH)))?
                });
                Some((names.collect(), text(|buffer| version(buffer, LENGTH))?))
            };
            let found = ask();
            shutdown();
            found
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_from_others_of_its_machine() {
        let of = |names: &[&str]| Driver { names: names.iter().map(|n| (*n).to_owned()).collect(), version: None };
        assert_eq!(of(&[]).device(0, None, None), "none");
        assert_eq!(of(&["A", "A"]).device(1, Some("1,0"), None), "A");
        let mixed = of(&["A", "B"]);
        assert_eq!(mixed.device(1, None, None), "1 of A, B (-, -)");
        assert_ne!(mixed.device(0, None, None), mixed.device(1, None, None));
        assert_ne!(mixed.device(0, None, None), mixed.device(0, Some("1"), None));
        assert_ne!(mixed.device(0, None, None), mixed.device(0, None, Some("PCI_BUS_ID")));
    }
}
