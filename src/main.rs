//! The `disback` binary. It starts without libtorch, which it leaves to `disback-train`.

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(feature = "train")]
    return disback::cli::main_light();
    #[cfg(not(feature = "train"))]
    disback::cli::main()
}
