//! What needs libtorch is done by `disback-train`, so that everything else starts without loading it.

use std::path::PathBuf;
use std::process::{Command as Process, ExitCode};

use super::{Command, Globals, doctor};
use crate::error::{Context, Error, Result};

/// The status of a program whose libraries were not found (Linux' loader, and shells).
const NO_LIBRARY: i32 = 127;

/// The program that trains: beside this one, wherever a link to it lies.
fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("the place of this program")?;
    let path = own.with_file_name(format!("disback-train{}", std::env::consts::EXE_SUFFIX));
    match path.is_file() {
        true => Ok(path),
        false => Err(Error::io(format!("{}: no such file; it trains and looks into teachers", path.display()))
            .hint("copy both programs together (`cargo build --release` makes both), or install disback again")),
    }
}

/// Becomes `disback-train` with the same arguments: same process, same signals.
pub fn run(command: &Command, globals: Globals) -> Result<ExitCode> {
    let path = program()?;
    let mut process = Process::new(&path);
    process.args(std::env::args_os().skip(1));
    // (The name that its help shows.)
    #[cfg(unix)]
    std::os::unix::process::CommandExt::arg0(&mut process, "disback");
    if let Command::Doctor(_) = command {
        return examined(process, globals);
    }
    #[cfg(unix)]
    return Err(Error::from(std::os::unix::process::CommandExt::exec(&mut process)).context(path.display().to_string()));
    #[cfg(not(unix))]
    {
        let status = process.status().with_context(|| path.display().to_string())?;
        Ok(ExitCode::from(status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1)))
    }
}

/// `doctor` answers also where the program that trains finds no libtorch.
fn examined(mut process: Process, globals: Globals) -> Result<ExitCode> {
    let out = process.output()?;
    if out.status.code() == Some(NO_LIBRARY) {
        let why = String::from_utf8_lossy(&out.stderr).lines().next().unwrap_or("its libraries").to_owned();
        return doctor::show(&crate::doctor::examine_without_libtorch(&why), globals);
    }
    std::io::Write::write_all(&mut std::io::stdout(), &out.stdout)?;
    std::io::Write::write_all(&mut std::io::stderr(), &out.stderr)?;
    Ok(ExitCode::from(out.status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1)))
}
