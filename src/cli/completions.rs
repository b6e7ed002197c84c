//! `disback completions` and `disback man`: what shells and readers of manuals get, made from the command line itself.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Command};
use clap_complete::Shell;

use crate::error::{Context, Error, Result};

/// Print a shell's completions.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// bash, zsh, fish, elvish or powershell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Write the man pages and completions that a package installs below `share`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Folder; made where it is not there.
    out: PathBuf,
}

/// Prints the completions of `command`.
pub fn run(args: &CompletionsArgs, mut command: Command) -> Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "disback", &mut text);
    // (A reader that has enough closes the pipe.)
    let _ = std::io::stdout().write_all(&text);
    Ok(ExitCode::SUCCESS)
}

/// Writes man pages and completions as they lie below a system's `share`: man/man1, bash-completion/completions and so on.
/// Errors: a folder that cannot be written.
pub fn man(args: &ManArgs, mut command: Command) -> Result<ExitCode> {
    let put = |name: &str, text: &[u8]| -> Result<()> {
        let path = args.out.join(name);
        let folder = path.parent().unwrap_or(&args.out);
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        crate::files::write_atomic(&path, text).with_context(|| path.display().to_string())
    };
    let mut all = vec![("disback".to_owned(), command.clone().disable_help_subcommand(true))];
    let shown = command.get_subcommands().filter(|c| !c.is_hide_set());
    all.extend(shown.map(|c| {
        let name = format!("disback-{}", c.get_name());
        (
            name.clone(),
            c.clone()
                .display_name(name)
                .bin_name(format!("disback {}", c.get_name()))
                .version(env!("CARGO_PKG_VERSION")),
        )
    }));
    for (name, command) in all {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page).map_err(|e| Error::io(e.to_string()))?;
        put(&format!("man/man1/{name}.1"), &page)?;
    }
    for (shell, name) in [
        (Shell::Bash, "bash-completion/completions/disback"),
        (Shell::Zsh, "zsh/site-functions/_disback"),
        (Shell::Fish, "fish/vendor_completions.d/disback.fish"),
    ] {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut command, "disback", &mut text);
        put(name, &text)?;
    }
    Ok(ExitCode::SUCCESS)
}
