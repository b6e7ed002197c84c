//! What can be known to fail later is refused before the first step: settings that do not go together, an import that is wrong,
//! a student that cannot be exported.

use std::path::{Path, PathBuf};

use crate::diffusion::{Denoiser, ResolvedCard};
use crate::distill::batches::Batches;
use crate::distill::rundir::REHEARSAL;
use crate::distill::{Config, RunDir, Stages, Student};
use crate::error::{Context, Error, Kind, Result};
use crate::parity::{self, Tolerance};
use crate::run::monitor::Monitor;
use crate::run::origin::{Forms, StudentOrigin};
use crate::run::teacher::Teacher;
use crate::tensor::DType;

/// The trajectory's folder, where a run's was given.
pub(super) fn of_run(dir: &Path) -> PathBuf {
    let inside = dir.join("trajectory");
    if !dir.join("trajectory.json").is_file() && inside.is_dir() { inside } else { dir.to_owned() }
}

/// Refuses a trajectory that a run recorded with another reading of the teacher, or on the samples of other noise levels of
/// the student. (Its weights have a hash.)
pub(super) fn check_recorded(trajectory: &Path, config: &Config, card: &ResolvedCard) -> Result<()> {
    RunDir::at(&trajectory.join("..")).check_card(&card.card, &card.origins)?;
    let file = trajectory.join("../config.toml");
    if !file.is_file() {
        return Ok(());
    }
    let levels = ["student.sigma_init", "student.sigmas", "student.steps", "student.shift", "student.stochastic"];
    let recorded = Config::of_run(&file)?;
    match recorded.differences(config)?.into_iter().find(|d| levels.contains(&d.0.as_str())) {
        None => Ok(()),
        Some((key, before, now)) => Err(Error::usage(format!(
            "the trajectory was recorded with {key} = {before}, now it is {now}"
        ))
        .hint("stage 1 follows the initial student's samples: record it for this student with `disback degrade`")),
    }
}

/// What can be known to fail later is refused before anything is written.
pub(super) fn check_stages(config: &Config, stages: Stages, teacher: &Denoiser) -> Result<()> {
    if stages == Stages::Degrade {
        check_student(config, teacher)?;
        crate::distill::batches::table(config, teacher.card())?;
        return crate::distill::batches::conditions(config, teacher.card()).map(drop);
    }
    check_stage_two(config, teacher)
}

/// The noise levels of a student that is the teacher's copy; one from a file was made with them.
fn check_student(config: &Config, teacher: &Denoiser) -> Result<()> {
    if config.student.file.is_empty() {
        crate::distill::student::start(teacher, &config.student)?;
        crate::distill::student::levels(teacher.conversion(), &config.student)?;
    }
    Ok(())
}

/// [`check_stages`] for runs that come to stage 2.
pub fn check_stage_two(config: &Config, teacher: &Denoiser) -> Result<()> {
    let batches = Batches::new(config, teacher)?;
    crate::distill::gan::Gan::new(config, teacher, &batches)?;
    check_student(config, teacher)?;
    if config.guidance != 1.0 {
        teacher.check_guidance()?;
        let guidance = config.target_guidance()?;
        guidance.check_rescale(teacher.card())?;
        if !batches.generator_levels.any(|sigma| guidance.at(sigma) != 1.0) {
            let [low, high] = config.guidance_interval;
            return Err(Error::usage(format!(
                "guidance_interval is [{low}, {high}], which holds none of the noise levels that are drawn"
            ))
            .hint(
                "the interval is in noise levels (sigma), not in steps; noise.generator says which of them are drawn",
            ));
        }
    }
    Ok(())
}

/// Refuses a network that cannot be trained, or trained with, as it was read.
pub(super) fn check_import(teacher: &Teacher, config: &Config, monitor: &dyn Monitor) -> Result<()> {
    check_mixing(teacher, config)?;
    check_rows(teacher, config)?;
    check_parity(teacher, monitor)
}

/// Refuses a file that declares a free batch and takes one number of rows only: libtorch runs it at several.
fn check_rows(teacher: &Teacher, config: &Config) -> Result<()> {
    const ROWS: [usize; 3] = [2, 3, 5];
    let net = &teacher.network;
    let card = &teacher.card.card;
    let sample = net.inputs().iter().find(|p| p.name == card.sample);
    if sample.and_then(|p| p.dims()?.first().copied().flatten()).is_some() {
        return Ok(());
    }
    let runs = |rows: usize| parity::runs(net, card, rows, config.seed);
    let failed: Vec<(usize, Error)> = ROWS.into_iter().filter_map(|rows| Some((rows, runs(rows).err()?))).collect();
    let Some((rows, first)) = failed.into_iter().next() else { return Ok(()) };
    const TRIED: usize = 8;
    let takes: Vec<String> = (1..=TRIED).filter(|&rows| runs(rows).is_ok()).map(|rows| rows.to_string()).collect();
    if takes.is_empty() {
        return Err(first);
    }
    Err(first
        .context(format!(
            "the file declares a free batch, but does not run with {rows} rows (of 1 to {TRIED} rows it takes: {})",
            takes.join(", ")
        ))
        .hint(
            "the exporter wrote the batch of its example into the graph: export it again with the batch as a dynamic dimension \
             (in the forward, -1 for the batch in reshapes and no sizes turned into Python numbers), or declare that batch in the \
             file's inputs",
        ))
}

/// Refuses a network that computes a row from its neighbours, unless the configuration allows it: its student would do the same,
/// and parts of a batch that are guided or split would not be what they are in the whole.
fn check_mixing(teacher: &Teacher, config: &Config) -> Result<()> {
    if config.allow_batch_mixing {
        return Ok(());
    }
    let (net, card) = (&teacher.network, &teacher.card.card);
    let sample = net.inputs().iter().find(|p| p.name == card.sample);
    let rows = sample.and_then(|p| p.dims()?.first().copied().flatten()).unwrap_or(2);
    // What does not run with these rows is `check_rows`'s to say.
    let Ok(Some(found)) = parity::mixing(net, card, rows, config.seed) else { return Ok(()) };
    let nodes = parity::batch_statistics(&net.shared().graph);
    let cause = match nodes.first() {
        Some(first) => format!(
            "{} {} in training mode (training_mode = 1): statistics of the batch, not the trained ones",
            first,
            if nodes.len() > 1 { format!("and {} more are", nodes.len() - 1) } else { "is".to_owned() }
        ),
        None => "guidance inside the forward (DiT's forward_with_cfg uses half of the batch twice), statistics over the batch, or \
                 a reshape that takes elements of one row into another do that"
            .to_owned(),
    };
    Err(Error::unsupported(format!(
        "the rows of a batch are not independent: with other neighbours, row {} of {} changes by {:.2} standard deviations of the \
         output; {cause}",
        found.row, found.rows, found.change
    ))
    .hint(
        "export the network for inference (in PyTorch: model.eval() and TrainingMode.EVAL; the plain forward instead of \
         forward_with_cfg), or give --allow-batch-mixing for a student that mixes its rows too",
    ))
}

/// A wrong import must not cost a night of training: a small batch through ONNX Runtime first, where it is installed.
fn check_parity(teacher: &Teacher, monitor: &dyn Monitor) -> Result<()> {
    if !ort_is_here() {
        monitor.remark(
            "note: ONNX Runtime was not found, so the import is not compared with it (`disback doctor` says more)",
        );
        return Ok(());
    }
    let inputs = parity::random_inputs(teacher.network.inputs(), Some(&teacher.card.card), 2, &Default::default(), 0)?;
    let found = match parity::check(&teacher.network, &inputs, None, Tolerance::default()) {
        Err(e) if e.kind() == Kind::Unsupported => {
            monitor.remark(&format!("note: the import is not compared with ONNX Runtime: {e}"));
            return Ok(());
        }
        other => other?,
    };
    if found.ok {
        return Ok(());
    }
    let at = found.first_divergence.map_or_else(String::new, |d| format!(", first at {} (`{}`)", d.node, d.value));
    Err(Error::mismatch(format!(
        "libtorch and ONNX Runtime disagree on this network by {:.1e} of the output's standard deviation{at}",
        found.max_rel
    ))
    .hint("`disback parity` shows the values; `--no-fuse` there tells whether a rewrite is at fault; please report it"))
}

fn ort_is_here() -> bool {
    #[cfg(feature = "ort")]
    return !matches!(crate::runtime::ort::library(), Err(e) if e.is_absent());
    #[cfg(not(feature = "ort"))]
    false
}

/// An export that fails must not cost a run either: the untrained student is written, checked and run in a folder that is
/// removed again.
pub fn rehearse(
    origin: StudentOrigin,
    teacher: &Denoiser,
    given: Option<&Student>,
    config: &Config,
    forms: Forms,
    place: &Path,
) -> Result<()> {
    let folder = tempfile::Builder::new().prefix(REHEARSAL).tempdir_in(place);
    let folder = folder.with_context(|| place.display().to_string())?;
    let student = Student::initial(given, teacher, &config.student, config.seed)?;
    origin.rehearse(&student, config, forms, folder.path()).map_err(|e| {
        let e = e.context("the student could not be exported, so training was not begun");
        let wide = origin.teacher.network.inputs().iter().any(|p| p.dtype == Some(DType::F64));
        match wide {
            true => e.hint(
                "the network computes in f64, for which ONNX Runtime lacks most operators on the CPU: export the teacher in \
                 f32 (in PyTorch: model.float())",
            ),
            false => e,
        }
    })
}
