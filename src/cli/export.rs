//! `disback export`: trained weights into ONNX, in the form that ships.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::export_folder::{self, FolderArgs};
use super::ship_args::{self, ShipArgs};
use crate::error::{Context, Error, Result};
use crate::export::{self, ShipReport};
use crate::graph::{Model, save};
use crate::onnx::ModelProto;
use crate::shown::say;

/// Which of a run's weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Weights {
    /// The moving average, which is the run's result.
    Average,
    /// The generator as last updated, from the run's latest checkpoint.
    Live,
    /// A further average (`ema.more`), by its half-life in images.
    HalfLife(f64),
}

impl std::str::FromStr for Weights {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match (text, text.parse::<f64>()) {
            ("average", _) => Ok(Self::Average),
            ("live", _) => Ok(Self::Live),
            (_, Ok(v)) if v > 0.0 => Ok(Self::HalfLife(v)),
            _ => Err("expected average, live or a half-life of ema.more, as in 250000".into()),
        }
    }
}

/// What an export is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A network.
    Onnx,
    /// Weights.
    Safetensors,
    /// A folder for diffusers.
    Diffusers,
    /// A folder for optimum.
    Optimum,
}

/// Write a student (or any set of weights of the teacher's graph) as ONNX: optimised, portable, in the precision asked for.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The teacher that the run distilled; or a student.onnx, to be written in another form.
    pub model: PathBuf,
    /// Which trained weights are exported, and how the teacher's file is read.
    #[cfg(feature = "train")]
    #[command(flatten)]
    pub from: from_run::FromRun,
    /// Where to write.
    #[arg(short, long)]
    pub out: PathBuf,
    /// `safetensors`: the weights alone, under the framework's names and in its layout, for the network that the teacher came from.
    /// `diffusers`: a folder for its `from_pretrained`. `optimum`: one for its `ORTDiffusionPipeline`.
    #[arg(long, value_enum, default_value = "onnx")]
    pub format: Format,
    /// What a folder is made of.
    #[command(flatten)]
    pub folder: FolderArgs,
    /// The form of the file: precision, batch, operator set and what is appended.
    #[command(flatten)]
    pub ship: ShipArgs,
}

/// Forms that are asked for and not written.
const OTHERS: [&str; 13] = [
    "engine",
    "plan",
    "trt",
    "ort",
    "tflite",
    "mlmodel",
    "mlpackage",
    "xml",
    "bin",
    "pt",
    "pth",
    "safetensors",
    "gguf",
];

/// Runs the command.
pub fn run(args: &ExportArgs, globals: Globals) -> Result<ExitCode> {
    let options = args.ship.options()?;
    let extension = args.out.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    if let Some(framework) = args.format.framework() {
        return export_folder::run(args, framework, globals);
    }
    args.folder.refuse()?;
    if args.format == Format::Safetensors {
        return weights(args, globals);
    }
    if OTHERS.contains(&extension.as_str()) {
        return Err(Error::usage(format!("{}: only ONNX is written, as in -o student.onnx", args.out.display())).hint(
            "`disback package --trtexec` writes the command that builds a TensorRT engine of it; --format safetensors writes the weights alone",
        ));
    }
    let model = Model::load(&args.model)?;
    let is_student = model.metadata().iter().any(|(k, _)| k == "disback.student.method");
    #[cfg(feature = "train")]
    let (built, same_graph) = {
        if is_student && !args.from.given() {
            (student(&model)?, false)
        } else {
            (from_run::build(&args.model, &args.from, args.ship.asks())?, args.from.same_graph)
        }
    };
    #[cfg(not(feature = "train"))]
    let (built, same_graph) = if is_student {
        (student(&model)?, false)
    } else {
        return Err(Error::usage(format!(
            "{}: not a student; this build has no libtorch to make one",
            args.model.display()
        ))
        .hint("use a build with the default features"));
    };
    let (model, report) = match same_graph {
        true => (built, None),
        false => {
            let (model, report) = export::ship(built, &options)?;
            (model, Some(report))
        }
    };
    save::write_with_limit(&model, &args.out, ship_args::external_limit(args.ship.external_data))?;
    finish(args, globals, same_graph, report.as_ref());
    Ok(ExitCode::SUCCESS)
}

/// The weights of a run or of a node, as `load_state_dict` and its like take them.
#[cfg(feature = "train")]
fn weights(args: &ExportArgs, globals: Globals) -> Result<ExitCode> {
    if args.ship.asks() || args.from.same_graph {
        return Err(Error::usage(
            "--format safetensors writes weights: what shapes the graph of an ONNX file has no meaning",
        ));
    }
    from_run::weights(&args.model, &args.from, &args.out)?;
    finish(args, globals, false, None);
    Ok(ExitCode::SUCCESS)
}

#[cfg(not(feature = "train"))]
fn weights(_: &ExportArgs, _: Globals) -> Result<ExitCode> {
    Err(super::not_built::needs("--format safetensors", "train"))
}

fn finish(args: &ExportArgs, globals: Globals, same_graph: bool, report: Option<&ShipReport>) {
    if globals.json {
        println!("{}", json!({ "ok": true, "out": args.out, "same_graph": same_graph, "report": report }));
    } else if !globals.quiet {
        say!("{}", args.out.display());
        if let Some(r) = report {
            ship_args::show(r);
        }
    }
}

/// A student that exists already, its external data taken in.
fn student(model: &Model) -> Result<ModelProto> {
    let mut proto = (*model.proto).clone();
    save::internalise(&mut proto);
    crate::runtime::student::StudentInfo::from_model(&proto).with_context(|| model.path.display().to_string())?;
    Ok(proto)
}

#[cfg(feature = "train")]
pub mod from_run {
    //! Weights of a run in the teacher's graph.

    use std::path::Path;

    use tch::Device;

    use super::*;
    use crate::cli::teacher::ReadingArgs;
    use crate::distill::checkpoint::Checkpoint;
    use crate::distill::trajectory::{self, Trajectory};
    use crate::distill::{Config, RunDir};
    use crate::export::StudentOptions;
    use crate::run::origin::{self, StudentOrigin, method, objective_name};
    use crate::torch::tensor_file::TensorFile;
    use crate::torch::{Forward, ParamSet};

    /// Where the weights come from.
    #[derive(Debug, Args)]
    pub struct FromRun {
        /// How the teacher's file is read.
        #[command(flatten)]
        pub reading: ReadingArgs,
        /// Run directory: takes its final weights and its configuration.
        #[arg(long, value_name = "DIR")]
        pub run: Option<PathBuf>,
        /// Weights as safetensors, e.g. a trajectory node; over those of the run.
        #[arg(long, value_name = "FILE")]
        pub weights: Option<PathBuf>,
        /// Which of the run's weights: `average`, `live` (the generator as last updated, from a checkpoint), or the
        /// half-life of a further average (`ema.more`).
        #[arg(long, default_value = "average", conflicts_with = "weights")]
        pub ema: Weights,
        /// The teacher's own graph with the weights replaced, for pipelines that bring their own scheduler.
        #[arg(long)]
        pub same_graph: bool,
        /// Noise level at which the student starts; the run's, else the schedule's.
        #[arg(long)]
        pub sigma_init: Option<f64>,
    }

    impl FromRun {
        /// Whether weights are named.
        pub fn given(&self) -> bool {
            self.run.is_some() || self.weights.is_some()
        }
    }

    /// The student (or the same graph) with the weights asked for.
    pub fn build(path: &Path, args: &FromRun, shipped: bool) -> Result<ModelProto> {
        if args.same_graph && shipped {
            return Err(Error::usage(
                "--same-graph changes nothing but the weights: no --precision, --batch, --opset, --image or --decoder",
            ));
        }
        chosen(path, args, |origin, params, config, options| match args.same_graph {
            true => origin.same_graph(params, options),
            false => origin.model(params, config, options),
        })
    }

    /// Writes the weights asked for as safetensors.
    pub fn weights(path: &Path, args: &FromRun, to: &Path) -> Result<()> {
        chosen(path, args, |_, params, _, _| params.save(to)).with_context(|| to.display().to_string())
    }

    /// What `then` makes of the weights asked for.
    pub(in crate::cli) fn chosen<T>(
        path: &Path,
        args: &FromRun,
        then: impl FnOnce(StudentOrigin<'_>, &ParamSet, &Config, &StudentOptions) -> Result<T>,
    ) -> Result<T> {
        if !args.given() {
            return Err(Error::usage("give --run or --weights").hint("without them the file must be a student.onnx"));
        }
        let run: Option<(RunDir, Config)> = args.run.as_ref().map(|p| RunDir::open(p)).transpose()?;
        // The run's card is read as the run read it.
        let config = args.reading.with_card(run.as_ref().map_or_else(Config::default, |(_, c)| c.clone()));
        let reading = run.as_ref().map(|(dir, _)| args.reading.of_run(dir)).transpose()?;
        let teacher = reading.as_ref().unwrap_or(&args.reading).load(path, &config, Device::Cpu)?;
        if let Some((run, _)) = &run {
            run.check_card(&teacher.card.card, &teacher.card.origins)?;
        }
        let file = origin::load(&config, &teacher, Device::Cpu)?;
        let origin = StudentOrigin { teacher: &teacher, file: file.as_ref() };
        // The network is nobody else's: its weights are overwritten.
        let params = file.as_ref().map_or(&teacher.network, |f| &f.network).params().alias();
        // With low-rank adaptation, checkpoints and trajectory nodes hold the factors.
        let adapted = config.lora().map(|options| teacher.network.duplicate()?.adapt(&options)).transpose()?;
        let factors = adapted.as_ref().filter(|_| file.is_none());
        let merge = || match factors.map(|f| f.merged()).transpose()?.flatten() {
            Some(merged) => params.copy_from(&merged),
            None => Ok(()),
        };
        match (&args.weights, &run, args.ema) {
            (Some(file), ..) => {
                let names = TensorFile::open(existing(file)?)?.names();
                let into = match names.iter().any(|n| n.ends_with(".lora_a")) {
                    true => factors.map(Forward::params).ok_or_else(|| {
                        Error::usage(format!("{}: factors of a low-rank adaptation", file.display()))
                            .hint("give --run too: its configuration has their rank and weight")
                    })?,
                    false => &params,
                };
                // A node may be kept as its difference from the teacher: its trajectory knows.
                let began_with = || adapted.as_ref().unwrap_or(&teacher.network).params().hash();
                match node_of(file, began_with)? {
                    Some((trajectory, index)) => trajectory.load(index, into)?,
                    None => into.load(file)?,
                }
                if names.iter().any(|n| n.ends_with(".lora_a")) {
                    merge()?;
                }
            }
            (None, Some((run, _)), Weights::Average) => params.load(existing(&run.student_weights())?)?,
            (None, Some((run, _)), Weights::HalfLife(v)) => {
                let file = run.average_weights(v);
                if !file.is_file() && run.student_weights().is_file() {
                    let kept: Vec<String> = config.ema.more.iter().map(f64::to_string).collect();
                    let kept = if kept.is_empty() { "none".into() } else { kept.join(", ") };
                    return Err(Error::usage(format!("--ema {v}: the run kept no average of this half-life"))
                        .hint(format!("beside its result (--ema average) it kept ema.more: {kept}")));
                }
                params.load(existing(&file)?)?;
            }
            (None, Some((run, _)), Weights::Live) => {
                let began_with = adapted.as_ref().unwrap_or(&teacher.network).params();
                let found = Checkpoint::latest(&run.checkpoints(), &began_with.hash()?)?;
                let mut checkpoint = found.ok_or_else(|| {
                    Error::usage(format!("{} has no checkpoint", run.path().display()))
                        .hint("the live weights are only in checkpoints; --ema average takes the result")
                })?;
                checkpoint
                    .take_params("student/", factors.map_or(&params, |f| f.params()), None)
                    .context("the latest checkpoint")?;
                merge()?;
            }
            (None, None, _) => return Err(Error::usage("give --run or --weights")),
        }
        let configured = (config.student.sigma_init > 0.0).then_some(config.student.sigma_init);
        let options = StudentOptions {
            sigma_init: args.sigma_init.or(configured),
            method: run.as_ref().map_or_else(|| "weights".into(), |(_, c)| method(c).into()),
            objective: run.as_ref().map(|(_, c)| objective_name(c)).unwrap_or_default(),
            teacher_hash: teacher.hash.clone(),
            unchecked: false,
        };
        then(origin, &params, &config, &options)
    }

    /// The trajectory that a file is a node of, and which.
    fn node_of(file: &Path, teacher_hash: impl Fn() -> Result<String>) -> Result<Option<(Trajectory, usize)>> {
        let folder = file.parent().unwrap_or(Path::new(""));
        if !folder.join(trajectory::INDEX).is_file() {
            return Ok(None);
        }
        let trajectory = Trajectory::open(folder, &teacher_hash()?)?;
        let found = trajectory.nodes().iter().position(|n| file.file_name() == Some(n.file.as_ref()));
        Ok(found.map(|index| (trajectory, index)))
    }

    fn existing(file: &Path) -> Result<&Path> {
        if file.is_file() {
            return Ok(file);
        }
        Err(Error::io(format!("{}: no such file", file.display())).hint(
            "where a run has not finished, --ema live takes its latest checkpoint, --weights a node of its trajectory",
        ))
    }
}
