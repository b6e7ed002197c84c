//! libtorch's CUDA half (`libtorch_cuda.so`): opened by its name, so that a program that is not linked with it, such as the wheel's,
//! trains on CUDA where the half is there, and starts where it is not.

use std::sync::OnceLock;

/// Opens the half, once a process, and before anything asks libtorch for CUDA: it remembers its first answer. In a program that is
/// linked with it this changes nothing.
///
/// The error is the loader's: no such file beside a libtorch for the CPU, or what is missing for it.
pub fn load() -> Result<(), &'static str> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(open).as_ref().copied().map_err(String::as_str)
}

#[cfg(target_os = "linux")]
fn open() -> Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};
    // SAFETY: its initialisers register kernels and hooks with libtorch, which is loaded: this crate is linked with it.
    match unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_LAZY | RTLD_GLOBAL) } {
        // For as long as the process lives.
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        // (The words are the loader's.)
        Err(e) => Err(std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string)),
    }
}

#[cfg(not(target_os = "linux"))]
fn open() -> Result<(), String> {
    Err("it is opened on Linux alone".into())
}
