//! `disback export --format diffusers | optimum`: a folder that the framework's pipeline loads.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Globals;
use super::export::{ExportArgs, Format};
use crate::error::{Error, Result};

/// Whose pipeline loads the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framework {
    /// diffusers.
    Diffusers,
    /// optimum, on ONNX Runtime.
    Optimum,
}

impl Format {
    /// The framework whose folder is written; `None`: a file is.
    pub fn framework(self) -> Option<Framework> {
        match self {
            Self::Onnx | Self::Safetensors => None,
            Self::Diffusers => Some(Framework::Diffusers),
            Self::Optimum => Some(Framework::Optimum),
        }
    }
}

/// What a folder is made of.
#[derive(Debug, Args)]
pub struct FolderArgs {
    /// With `--format diffusers` or `optimum`: the teacher's own folder for that package. Its VAE, text encoders and tokenizers are
    /// linked.
    #[arg(long, value_name = "DIR")]
    pub pipeline: Option<PathBuf>,
    /// Copy those parts instead of linking them.
    #[arg(long, requires = "pipeline")]
    pub copy: bool,
}

impl FolderArgs {
    /// Errors: a folder is given to a format that makes none.
    pub fn refuse(&self) -> Result<()> {
        match self.pipeline {
            None => Ok(()),
            Some(_) => Err(Error::usage("--pipeline goes with --format diffusers or --format optimum")),
        }
    }
}

/// Writes the folder.
#[cfg(feature = "train")]
pub fn run(args: &ExportArgs, framework: Framework, globals: Globals) -> Result<ExitCode> {
    use serde_json::json;

    use super::export::from_run;
    use crate::export::framework::{self as folders, FolderOptions, FolderStudent};
    use crate::run::origin;
    use crate::shown::{say, tell};

    let (format, framework) = match framework {
        Framework::Diffusers => ("diffusers", folders::Framework::Diffusers),
        Framework::Optimum => ("optimum", folders::Framework::Optimum),
    };
    if args.ship.asks() || args.from.same_graph {
        return Err(Error::usage(format!(
            "--format {format} keeps the network as it is: what shapes the graph of student.onnx has no meaning"
        )));
    }
    let Some(pipeline) = &args.folder.pipeline else {
        return Err(Error::usage(format!("--format {format} needs the teacher's own folder")).hint(match framework {
            folders::Framework::Diffusers => "--pipeline DIR: the folder that the teacher was converted from",
            folders::Framework::Optimum => "--pipeline DIR: what `optimum-cli export onnx --model TEACHER DIR` made",
        }));
    };
    let to = FolderOptions { framework, pipeline: pipeline.clone(), out: args.out.clone(), copy: args.folder.copy };
    folders::check(&to)?;
    let report = from_run::chosen(&args.model, &args.from, |origin, params, config, options| {
        if origin.file.is_some() {
            return Err(Error::usage(format!(
                "--format {format} is the teacher's network with the student's weights, but this student has a network of its own"
            ))
            .hint("student.onnx has the student's network"));
        }
        let card = &origin.teacher.card.card;
        let steps = origin::steps(card, config)?;
        folders::write(&FolderStudent { network: &origin.teacher.network, params, card, options, steps: &steps }, &to)
    })?;
    if globals.json {
        println!("{}", json!({ "ok": true, "out": args.out, "format": format, "report": report }));
        return Ok(ExitCode::SUCCESS);
    }
    if !globals.quiet {
        say!("{}", args.out.display());
        say!("{} with {}: {}", report.pipeline, report.scheduler, report.call);
        report.warnings.iter().for_each(|w| tell!("warning: {w}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Without libtorch there are no weights to put into a folder.
#[cfg(not(feature = "train"))]
pub fn run(_: &ExportArgs, _: Framework, _: Globals) -> Result<ExitCode> {
    Err(super::not_built::needs("--format diffusers and --format optimum", "train"))
}
