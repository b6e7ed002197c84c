//! A student as the folder that a framework's pipeline loads: diffusers (`from_pretrained`) and optimum
//! (`ORTDiffusionPipeline`). The network keeps its own class, names and layout; a scheduler of diffusers makes the student's
//! steps of it; what the teacher's folder has beside the network is linked.

mod folder;
mod graph;
mod scheduler;
mod weights;

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value as Json, json};

use crate::diffusion::TeacherCard;
use crate::error::{Context, Error, Result};
use crate::export::{Steps, StudentOptions};
use crate::files;
use crate::graph::roles::Declared;
use crate::graph::save;
use crate::torch::{Network, ParamSet};

use folder::{Family, PipelineFolder};
use scheduler::Scheduling;

/// Whose pipeline loads the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framework {
    /// diffusers: weights as safetensors.
    Diffusers,
    /// optimum: the network as ONNX, for ONNX Runtime.
    Optimum,
}

/// Where the folder comes from and goes to.
#[derive(Debug, Clone)]
pub struct FolderOptions {
    /// Whose pipeline loads it.
    pub framework: Framework,
    /// The teacher's folder: a pipeline, or a network alone where its pipeline needs nothing else.
    pub pipeline: PathBuf,
    /// The folder to make; it must not be there, or be empty.
    pub out: PathBuf,
    /// Copy what lies beside the network instead of linking it.
    pub copy: bool,
}

/// What was made: printed, and part of the JSON document of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct FolderReport {
    /// The pipeline's class in `model_index.json`.
    pub pipeline: String,
    /// The scheduler's class.
    pub scheduler: String,
    /// How the pipeline is called so that it makes the student's steps.
    pub call: String,
    /// Parts of the teacher's folder that were linked, or copied.
    pub linked: Vec<String>,
    /// What the user should know about the folder, one sentence each.
    pub warnings: Vec<String>,
}

/// A student that is the teacher's network with other weights.
#[derive(Debug, Clone, Copy)]
pub struct FolderStudent<'a> {
    /// The teacher's network.
    pub network: &'a Network,
    /// The student's weights.
    pub params: &'a ParamSet,
    /// The teacher's card.
    pub card: &'a TeacherCard,
    /// Where the student starts, and what its file's metadata say.
    pub options: &'a StudentOptions,
    /// Its further steps.
    pub steps: &'a Steps,
}

/// What can be said before the teacher is loaded.
///
/// Errors: a folder that no student can be put into; a place that is taken.
pub fn check(options: &FolderOptions) -> Result<()> {
    PipelineFolder::open(&options.pipeline)?.parts(options.framework)?;
    free(&options.out)
}

/// Writes the folder, whole or not at all: it is made beside its place and then moved there.
///
/// Errors: a card or steps that no scheduler of diffusers makes; a folder that is not the teacher's; a place that is taken.
pub fn write(student: &FolderStudent, options: &FolderOptions) -> Result<FolderReport> {
    let teacher = PipelineFolder::open(&options.pipeline)?;
    let scheduling = scheduler::of(student.card, student.options.sigma_init, student.steps)?;
    let pipeline = teacher.pipeline(&scheduling, student.card)?;
    let parts = teacher.parts(options.framework)?;
    if options.framework == Framework::Optimum {
        graph::check(student.card, &teacher)?;
    }
    let place = Place::new(&options.out)?;
    let network = place.path().join(teacher.part());
    std::fs::create_dir(&network).with_context(|| network.display().to_string())?;
    write_json(&network.join("config.json"), teacher.config())?;
    match options.framework {
        Framework::Diffusers => {
            let tied = Declared::of(&student.network.shared().model)?.tied;
            let file = network.join("diffusion_pytorch_model.safetensors");
            weights::write(&teacher.weights()?, student.params, &tied, &file)?;
        }
        Framework::Optimum => {
            let model = graph::network(student, teacher.family())?;
            save::write(&model, &network.join("model.onnx"))?;
        }
    }
    let scheduler = place.path().join("scheduler");
    std::fs::create_dir(&scheduler).with_context(|| scheduler.display().to_string())?;
    write_json(&scheduler.join("scheduler_config.json"), &Json::Object(scheduling.config.clone()))?;
    let index = teacher.index(&pipeline, scheduling.class);
    write_json(&place.path().join("model_index.json"), &index)?;
    for part in &parts {
        bring(&teacher.root().join(part), &place.path().join(part), options.copy)
            .with_context(|| format!("{}: the part `{part}`", options.pipeline.display()))?;
    }
    let call = call(&scheduling, &teacher, student.card);
    let report = FolderReport {
        pipeline,
        scheduler: scheduling.class.to_owned(),
        call,
        linked: parts,
        warnings: scheduling.warnings,
    };
    files::write_atomic(&place.path().join("README.md"), read_me(&report, options.framework).as_bytes())?;
    place.keep()?;
    Ok(report)
}

/// How the pipeline is called: the number of steps, no guidance beyond the one that the student has learned.
fn call(scheduling: &Scheduling, teacher: &PipelineFolder, card: &TeacherCard) -> String {
    let steps = scheduling.steps;
    let mut arguments = match teacher.family() {
        Family::Unet2D if card.conditions.is_empty() => vec!["batch_size=4".to_owned()],
        Family::Unet2D => vec!["batch_size=4".to_owned(), "class_labels=[0, 1, 2, 3]".to_owned()],
        Family::DiT => vec!["class_labels=[0, 1, 2, 3]".to_owned()],
        _ => vec!["\"a prompt\"".to_owned()],
    };
    match &scheduling.sigmas {
        Some(sigmas) => arguments.push(format!("num_inference_steps={steps}, sigmas={sigmas:?}")),
        None => arguments.push(format!("num_inference_steps={steps}")),
    }
    match teacher.family() {
        Family::Unet2D => {}
        // Flux takes the guidance that it was distilled with as a number.
        Family::Flux => {
            let guidance = card.constants.get("guidance").copied().unwrap_or(1.0);
            arguments.push(format!("guidance_scale={guidance:?}"));
        }
        _ => arguments.push("guidance_scale=1.0".to_owned()),
    }
    format!("pipe({})", arguments.join(", "))
}

/// The folder's README.md: how it is loaded and called.
fn read_me(report: &FolderReport, framework: Framework) -> String {
    let load = match framework {
        Framework::Diffusers => {
            format!("from diffusers import {0}\n\npipe = {0}.from_pretrained(\".\")", report.pipeline)
        }
        Framework::Optimum => "from optimum.onnxruntime import ORTDiffusionPipeline\n\n\
             pipe = ORTDiffusionPipeline.from_pretrained(\".\")"
            .to_owned(),
    };
    let mut text = format!(
        "A student of disback {}.\n\n```python\n{load}\nimages = {}.images\n```\n",
        env!("CARGO_PKG_VERSION"),
        report.call
    );
    for warning in &report.warnings {
        text += &format!("\n{warning}\n");
    }
    text
}

fn write_json(path: &Path, value: &Json) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::invalid(e.to_string()))?;
    text.push('\n');
    files::write_atomic(path, text.as_bytes())
}

/// Errors: there is something at the place of the new folder.
fn free(out: &Path) -> Result<()> {
    let taken = |what: &str| {
        Err(Error::usage(format!("{}: {what}", out.display()))
            .hint("name a folder that is not there: it is made whole, beside nothing else"))
    };
    if out.is_dir() {
        let mut entries = std::fs::read_dir(out).with_context(|| out.display().to_string())?;
        if entries.next().is_some() {
            return taken("the folder is there and not empty");
        }
    } else if out.symlink_metadata().is_ok() {
        return taken("is there and no folder");
    }
    Ok(())
}

/// A folder on its way to its place; what is not kept is removed.
struct Place {
    made: tempfile::TempDir,
    out: PathBuf,
}

impl Place {
    fn new(out: &Path) -> Result<Self> {
        free(out)?;
        let parent = match out.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        let made = tempfile::Builder::new().prefix(".disback-").tempdir_in(parent);
        Ok(Self { made: made.with_context(|| parent.display().to_string())?, out: out.to_owned() })
    }

    fn path(&self) -> &Path {
        self.made.path()
    }

    /// Moves the folder to its place.
    fn keep(self) -> Result<()> {
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let _ = std::fs::set_permissions(self.made.path(), std::fs::Permissions::from_mode(0o755));
        }
        std::fs::rename(self.made.path(), &self.out).with_context(|| self.out.display().to_string())?;
        let _ = self.made.keep();
        Ok(())
    }
}

/// A folder of the teacher's at its new place: a link to where it lies, or a copy.
fn bring(from: &Path, to: &Path, copy: bool) -> Result<()> {
    #[cfg(unix)]
    if !copy {
        let from = from.canonicalize()?;
        return Ok(std::os::unix::fs::symlink(from, to)?);
    }
    let _ = copy;
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        // Files of a hub's cache are links: their content is copied.
        if path.is_dir() {
            bring(&path, &to, true)?;
        } else {
            std::fs::copy(&path, &to).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// `["diffusers", class]`, as `model_index.json` has a part.
fn part_of_diffusers(class: &str) -> Json {
    json!(["diffusers", class])
}
