//! `disback package`: what puts a student behind a server.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Globals;
use crate::error::{Error, Result};
use crate::package::{Form, PackageOptions, package};
use crate::shown::say;

/// Write what puts a student behind a server: Triton's model repository, TensorRT's command, Dockerfiles, a systemd unit, KServe's
/// resource, a model card.
#[derive(Debug, Args)]
pub struct PackageArgs {
    /// student.onnx.
    student: PathBuf,
    /// Folder to write into; made where it is not there.
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// models/NAME: config.pbtxt (dynamic batching, warm-up) and version 1.
    #[arg(long)]
    triton: bool,
    /// trtexec.sh: builds a TensorRT engine, with the shapes of every batch up to --max-batch.
    #[arg(long)]
    trtexec: bool,
    /// Dockerfile.serve and Dockerfile.train, around the wheels of `make wheel-runtime` and `make wheel`.
    #[arg(long)]
    docker: bool,
    /// NAME.service: a unit that serves the student.
    #[arg(long)]
    systemd: bool,
    /// inferenceservice.yaml: KServe, with the image of Dockerfile.serve.
    #[arg(long)]
    kserve: bool,
    /// README.md for a model hub: teacher, method, data, figures with their commands, hashes. Needs --license.
    #[arg(long)]
    model_card: bool,
    /// Name of the model [default: the file's name without its ending].
    #[arg(long)]
    name: Option<String>,
    /// Samples a call of the network, at most.
    #[arg(long, default_value_t = 64, value_name = "N")]
    max_batch: usize,
    /// Image that KServe starts.
    #[arg(long, default_value = concat!("disback-serve:", env!("CARGO_PKG_VERSION")))]
    image: String,
    /// Licence of the student, which is the teacher's unless that says otherwise; as the hub names it (apache-2.0).
    #[arg(long)]
    license: Option<String>,
    /// Run directory: what the model card says of training and figures (`disback evaluate --run`).
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
}

/// Runs the command. Errors: nothing asked for; as of [`package`].
pub fn run(args: &PackageArgs, globals: Globals) -> Result<ExitCode> {
    let asked = [
        (args.triton, Form::Triton),
        (args.trtexec, Form::Trtexec),
        (args.docker, Form::Docker),
        (args.systemd, Form::Systemd),
        (args.kserve, Form::Kserve),
        (args.model_card, Form::ModelCard),
    ];
    let forms: Vec<Form> = asked.into_iter().filter(|(on, _)| *on).map(|(_, form)| form).collect();
    if forms.is_empty() {
        return Err(Error::usage("nothing to write")
            .hint("name what: --triton, --trtexec, --docker, --systemd, --kserve, --model-card"));
    }
    if !args.model_card && (args.license.is_some() || args.run.is_some()) {
        return Err(Error::usage("--license and --run go with --model-card"));
    }
    let stem = args.student.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let options = PackageOptions {
        forms,
        name: args.name.clone().unwrap_or(stem),
        max_batch: args.max_batch,
        image: args.image.clone(),
        license: args.license.clone(),
        run: args.run.clone(),
    };
    let made = package(&args.student, &args.out, &options)?;
    if globals.json {
        println!("{}", json!({ "ok": true, "files": made }));
    } else if !globals.quiet {
        made.iter().for_each(|f| say!("{}", f.display()));
    }
    Ok(ExitCode::SUCCESS)
}
