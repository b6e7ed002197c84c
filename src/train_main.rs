//! The `disback-train` binary: all commands, with libtorch. `disback` calls it.

use std::process::ExitCode;

fn main() -> ExitCode {
    disback::cli::main()
}
