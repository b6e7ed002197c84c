//! The `disback` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    disback::cli::main()
}
