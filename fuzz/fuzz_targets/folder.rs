//! A folder in memory that inputs are written into as files.

use std::path::{Path, PathBuf};

/// A new folder, in memory where the system has one.
pub fn make(name: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = base.join(format!("disback-fuzz-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the inputs");
    folder
}
