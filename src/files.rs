//! Files written whole or not at all; files that others may have made, read with bounds ([`open`], [`read`], [`open_inside`]).

use std::io::Write;
use std::path::Path;

use crate::error::{Context, Error, Result};

mod reading;

pub use reading::*;

/// How names of files begin that are being written.
const HALF: &str = ".disback-";

/// Whether a file of this name is one that was being written when its process ended.
#[cfg(feature = "train")]
pub(crate) fn is_half_written(name: &str) -> bool {
    name.starts_with(HALF)
}

/// Removes what killed processes left half-written in a folder that nobody writes to. Links and folders stay.
#[cfg(feature = "train")]
pub(crate) fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let plain = entry.file_type().is_ok_and(|kind| kind.is_file());
        if plain && is_half_written(&entry.file_name().to_string_lossy()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Writes through a temporary file in the same folder: fsync, then rename, then the folder's own fsync. A killed process, a power
/// cut or a full disk leaves the old file or none, never half of one.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes))
}

/// [`write_atomic`] for content that is produced as it is written.
pub fn write_atomic_with(
    path: &Path,
    write: impl FnOnce(&mut std::io::BufWriter<&std::fs::File>) -> std::io::Result<()>,
) -> Result<()> {
    let dir = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let run = || -> std::io::Result<()> {
        let file = tempfile::Builder::new().prefix(HALF).tempfile_in(dir)?;
        let mut out = std::io::BufWriter::new(file.as_file());
        write(&mut out)?;
        out.flush()?;
        drop(out);
        file.as_file().sync_all()?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
        }
        // (Through the C library, so that a test can make it fail.)
        let (_, written) = file.into_parts();
        std::fs::rename(&written, path)?;
        let _ = written.keep();
        // The new name must outlast a power cut before anything relies on it. (Some file systems know no fsync of folders.)
        #[cfg(unix)]
        if let Ok(folder) = std::fs::File::open(dir) {
            let _ = folder.sync_all();
        }
        Ok(())
    };
    run()
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::StorageFull => Error::io(format!("no space left on the device: {e}"))
                .hint("free some space; nothing was left half-written"),
            _ => Error::io(e.to_string()),
        })
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a file of lines anew without those for which `keep` is false, a last one cut short among them, where there are such: line by
/// line, so that a long file takes no memory.
pub(crate) fn keep_lines(path: &Path, keep: impl Fn(&str) -> bool) -> Result<()> {
    let (dir, name) = (path.parent().unwrap_or(Path::new(".")), path.file_name().unwrap_or_default().to_string_lossy());
    let mut all = true;
    for_lines(open_inside(dir, &name)?, |line, whole| all &= whole && keep(line))?;
    if all {
        return Ok(());
    }
    let file = open_inside(dir, &name)?;
    write_atomic_with(path, |out| {
        let mut written = Ok(());
        for_lines(file, |line, _| {
            if written.is_ok() && keep(line) {
                written = writeln!(out, "{line}");
            }
        })?;
        written
    })
}
