//! Commands and options that this build was compiled without: each is refused in one sentence that names the missing feature.

use std::ffi::OsString;

use clap::{Arg, ArgMatches, Command};

use crate::error::Error;

/// Commands by the feature that they need.
const COMMANDS: [(&str, &str, bool); 9] = [
    ("distill", "train", cfg!(feature = "train")),
    ("degrade", "train", cfg!(feature = "train")),
    ("backtrack", "train", cfg!(feature = "train")),
    ("estimate", "train", cfg!(feature = "train")),
    ("compare", "train", cfg!(feature = "train")),
    ("sweep", "train", cfg!(feature = "train")),
    ("parity", "train", cfg!(feature = "train")),
    ("report", "report", cfg!(feature = "report")),
    ("serve", "serve", cfg!(feature = "serve")),
];

fn missing() -> impl Iterator<Item = (&'static str, &'static str)> {
    COMMANDS.into_iter().filter(|(.., built)| !built).map(|(name, feature, _)| (name, feature))
}

/// Adds the missing commands, hidden and with any arguments, so that [`refusal`] hears of them.
pub fn with_missing(command: Command) -> Command {
    missing().fold(command, |c, (name, _)| {
        let rest = Arg::new("rest").num_args(0..).trailing_var_arg(true).allow_hyphen_values(true);
        let rest = rest.value_parser(clap::value_parser!(OsString));
        c.subcommand(Command::new(name).hide(true).disable_help_flag(true).disable_version_flag(true).arg(rest))
    })
}

/// Why the command that was asked for cannot run, if it is a missing one.
pub fn refusal(matches: &ArgMatches) -> Option<Error> {
    let asked = matches.subcommand_name()?;
    let (name, feature) = missing().find(|(name, _)| *name == asked)?;
    Some(needs(&format!("the command `{name}`"), feature))
}

/// What is refused, and how to get it.
pub fn needs(what: &str, feature: &str) -> Error {
    Error::usage(format!("{what} needs the cargo feature `{feature}`, without which this binary was built"))
        .hint(format!("build it with `--features {feature}`, or with the default features"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn a_command_is_either_built_or_refused_by_name() {
        let all = with_missing(Cli::command());
        for (name, feature, built) in COMMANDS {
            assert_eq!(Cli::command().find_subcommand(name).is_some(), built, "{name}");
            if !built {
                let asked = all.clone().get_matches_from(["disback", name, "x.onnx", "-o", "y", "--help"]);
                let text = refusal(&asked).unwrap().to_string();
                assert!(text.contains(name) && text.contains(&format!("--features {feature}")), "{text}");
            }
        }
        assert!(refusal(&all.get_matches_from(["disback", "doctor"])).is_none());
    }
}
