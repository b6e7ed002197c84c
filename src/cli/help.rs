//! What `--help` says beside the options: the commands in groups, and examples of each.

use std::fmt::Write;

use clap::Command;

/// The commands as a user meets them.
const GROUPS: [(&str, &[&str]); 4] = [
    ("The teacher", &["inspect", "parity", "estimate"]),
    ("Distillation", &["distill", "degrade", "backtrack", "compare", "sweep", "report"]),
    ("The student", &["export", "verify", "sample", "evaluate", "bench", "serve", "package"]),
    ("This machine", &["doctor", "completions", "help"]),
];

/// Command lines without `disback`, by command.
const EXAMPLES: [(&str, &[&str]); 18] = [
    ("inspect", &["teacher.onnx", "teacher.onnx --card prediction=v --write-card", "teacher.onnx --parameters --json"]),
    ("parity", &["teacher.onnx", "teacher.onnx --dim height=64 --dim width=64"]),
    ("estimate", &["teacher.onnx --batch 64", "teacher.onnx --set precision=bf16 --tflops 400"]),
    (
        "distill",
        &["teacher.onnx -o run/", "teacher.onnx -o run/ --resume", "teacher.onnx -o run/ -c recipe.toml --dry-run"],
    ),
    ("degrade", &["teacher.onnx -o run/ --nodes 5"]),
    ("backtrack", &["teacher.onnx -o run/", "teacher.onnx -o other/ --trajectory run/ --objective sid"]),
    ("compare", &["teacher.onnx -o study/ --reference images.npz --features features.onnx --seeds 0,1,2"]),
    (
        "sweep",
        &[
            "teacher.onnx -o sweep/ --set objective=sid,dmd --set backtrack.lr_generator=1e-5,5e-5",
            "teacher.onnx -o sweep/ -c recipe.toml --set seed=0,1,2 --set evaluate.reference=images.npz --set evaluate.features=features.onnx",
        ],
    ),
    ("report", &["run/", "run/ --baseline base/"]),
    (
        "export",
        &[
            "run/student.onnx -o student-fp16.onnx --precision fp16",
            "run/student.onnx -o student-8.onnx --batch 8 --opset 21 --image",
            "teacher.onnx --run run/ --ema live -o latest.onnx",
            "teacher.onnx --run run/ --format diffusers --pipeline teacher/ -o student/",
        ],
    ),
    ("verify", &["run/student.onnx", "run/student.onnx --teacher teacher.onnx --target tensorrt,webgpu"]),
    (
        "sample",
        &[
            "run/student.onnx -n 64 -o grid.png",
            "run/student.onnx -n 50000 --classes 0-9 -o images.zip",
            "run/student.onnx --provider cuda --batch 256 -o images.npy",
        ],
    ),
    (
        "evaluate",
        &[
            "run/student.onnx reference.npz --features features.onnx",
            "run/student.onnx teacher.onnx reference.npz --features features.onnx --steps 9,18 --repeats 3",
        ],
    ),
    ("bench", &["run/student.onnx", "run/student.onnx --teacher teacher.onnx --provider cpu,cuda --batch 1,64"]),
    (
        "serve",
        &[
            "run/student.onnx --port 8080     # then: curl 'http://127.0.0.1:8080/sample?seed=1&n=4' > images.png",
            "run/student.onnx --host 0.0.0.0 --max-batch 128 --drain 10",
        ],
    ),
    (
        "package",
        &[
            "run/student.onnx -o served/ --triton --trtexec",
            "run/student.onnx -o served/ --name digits --docker --kserve --systemd",
            "run/student.onnx -o card/ --model-card --license apache-2.0 --run run/",
        ],
    ),
    ("doctor", &["", "--json"]),
    ("completions", &["bash > ~/.local/share/bash-completion/completions/disback", "zsh > ~/.zfunc/_disback"]),
];

/// The command line with groups and examples.
pub fn with_help(command: Command) -> Command {
    let list = groups(&command);
    let command = command.help_template(format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{list}Options:\n{{options}}\n\n\
            `disback COMMAND --help` has the options of a command, and examples.\n"
    ));
    let command = EXAMPLES.iter().fold(command, |c, (name, lines)| match c.find_subcommand(name) {
        Some(_) => c.mut_subcommand(name, |s| s.after_help(examples(name, lines))),
        None => c,
    });
    let names: Vec<String> = command.get_subcommands().map(|c| c.get_name().to_owned()).collect();
    names.into_iter().fold(command, |c, name| c.mut_subcommand(name, taking_negative_numbers))
}

/// A value of `-1` is refused for what it is, and not taken for an option.
fn taking_negative_numbers(command: Command) -> Command {
    command.mut_args(|arg| if arg.get_action().takes_values() { arg.allow_negative_numbers(true) } else { arg })
}

fn examples(name: &str, lines: &[&str]) -> String {
    let mut text = "Examples:".to_owned();
    for line in lines {
        let _ = write!(text, "\n  {}", format!("disback {name} {line}").trim_end());
    }
    text
}

/// The commands that this build has, by group, each with the first clause of what it says of itself.
fn groups(command: &Command) -> String {
    let mut text = String::new();
    for (title, names) in GROUPS {
        let _ = writeln!(text, "{title}:");
        for name in names {
            let about = match (command.find_subcommand(name), *name) {
                (Some(c), _) => c.get_about().map(|a| a.to_string()).unwrap_or_default(),
                (None, "help") => "Print help".into(),
                (None, _) => continue,
            };
            let end = [": ", "; ", ". "].iter().filter_map(|e| about.find(e)).min().unwrap_or(about.len());
            let _ = writeln!(text, "  {name:<12}{}", &about[..end]);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_command_is_in_a_group_and_has_examples_that_parse() {
        let command = with_help(Cli::command());
        for c in command.get_subcommands().filter(|c| !c.is_hide_set()).map(Command::get_name) {
            assert!(GROUPS.iter().any(|(_, names)| names.contains(&c)), "{c} is in no group");
            let (_, lines) = EXAMPLES.iter().find(|(n, _)| *n == c).unwrap_or_else(|| panic!("{c} has no example"));
            for line in *lines {
                // (What the shell makes of the line is not the command's.)
                let words = line.split(" #").next().unwrap().split(" > ").next().unwrap().split_whitespace();
                let all = ["disback", c].into_iter().chain(words);
                command.clone().try_get_matches_from(all).unwrap_or_else(|e| panic!("{c} {line}: {e}"));
            }
        }
    }

    #[test]
    fn the_overview_has_a_short_line_for_each_command() {
        let text = with_help(Cli::command()).render_help().to_string();
        for c in Cli::command().get_subcommands().filter(|c| !c.is_hide_set()) {
            let line = text.lines().find(|l| l.trim_start().starts_with(&format!("{} ", c.get_name())));
            assert!(line.is_some_and(|l| l.len() > 16 && l.chars().count() <= 120), "{}: {line:?}", c.get_name());
        }
        assert!(text.contains("--json") && text.contains("The student:"), "{text}");
    }
}
