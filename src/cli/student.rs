//! The student of a run: where its network comes from, and how its weights leave as ONNX.

use std::path::{Path, PathBuf};

use tch::Device;

use crate::diffusion::{Conversion, Denoiser, TeacherCard};
use crate::distill::config::Init;
use crate::distill::{Config, RunDir, Student, trainer};
use crate::error::{Error, Result};
use crate::export::{self, ShipOptions, Steps, StudentOptions, unroll};
use crate::graph::save;
use crate::onnx::ModelProto;
use crate::student_file::StudentFile;
use crate::teacher::Teacher;
use crate::torch::ParamSet;

/// The teacher, and the student's own network where it has one.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    pub teacher: &'a Teacher,
    pub file: Option<&'a StudentFile>,
}

/// The configured student of this teacher; `None`: the teacher's copy.
pub fn load(config: &Config, teacher: &Teacher, device: Device) -> Result<Option<StudentFile>> {
    StudentFile::load(&config.student, &teacher.card.card, device)
}

/// The configured student's network with its file's weights, tried out; `None`: the teacher's copy.
pub fn given(file: Option<&StudentFile>, teacher: &Denoiser, config: &Config) -> Result<Option<Student>> {
    let Some(file) = file else {
        crate::distill::student::levels(teacher.conversion(), &config.student)?;
        return Ok(None);
    };
    let student = file.student(&config.student)?;
    let card = teacher.card();
    let rows = match file.batch() {
        Some(fixed) if fixed != config.batch => {
            return Err(Error::usage(format!(
                "the student's graph fixes the batch at {fixed}, and batch is {}",
                config.batch
            ))
            .hint("export it with a dynamic batch, or set batch to that"));
        }
        Some(fixed) => fixed,
        None => 2,
    };
    let conditions = trainer::conditions(config, card)?.of_images(card, config.seed, 0, rows)?;
    let started = Student::initial(Some(&student), teacher, &config.student, config.seed)?;
    started.try_out(card, &conditions)?;
    Ok(Some(student))
}

impl Origin<'_> {
    /// What the metadata says beside the card.
    pub fn options(&self, config: &Config) -> StudentOptions {
        StudentOptions {
            sigma_init: (config.student.sigma_init > 0.0).then_some(config.student.sigma_init),
            method: method(config).into(),
            objective: objective_name(config),
            teacher_hash: self.teacher.hash.clone(),
        }
    }

    /// These weights as a student, all its steps in one graph.
    pub fn model(&self, params: &ParamSet, config: &Config, options: &StudentOptions) -> Result<ModelProto> {
        let card = &self.teacher.card.card;
        match self.file {
            Some(file) => file.export(params, card, options, config),
            None => unroll::unrolled(&self.teacher.network, params, card, options, &steps(card, config)?),
        }
    }

    /// [`Origin::model`] in the form that ships, into a file.
    pub fn write(&self, params: &ParamSet, config: &Config, path: &Path) -> Result<()> {
        let made = self.model(params, config, &self.options(config))?;
        let (made, report) = export::ship(made, &ShipOptions::default())?;
        report.warnings.iter().for_each(|w| eprintln!("warning: {}: {w}", path.display()));
        save::write(&made, path)
    }

    /// The teacher's graph with the student's weights.
    pub fn same_graph(&self, params: &ParamSet, options: &StudentOptions) -> Result<ModelProto> {
        self.check_same_graph()?;
        export::same_graph(&self.teacher.network, params, &self.teacher.card.card, options)
    }

    /// An error where the student's weights have no place in the teacher's graph.
    pub fn check_same_graph(&self) -> Result<()> {
        match self.file {
            None => Ok(()),
            Some(_) => Err(Error::usage(
                "--same-graph is the teacher's graph with the student's weights, but this student has a graph of its own",
            )
            .hint("student.onnx has the student's graph; leave --same-graph out")),
        }
    }

    /// Writes a finished run's student in every form asked for; the first file is `student.onnx`.
    pub fn export(
        &self,
        student: &Student,
        config: &Config,
        run: &RunDir,
        per_step: bool,
        same_graph: bool,
    ) -> Result<Vec<PathBuf>> {
        let (weights, options) = (student.weights()?, self.options(config));
        let mut files = vec![run.student()];
        self.write(&weights, config, &files[0])?;
        if per_step {
            let models = match self.file {
                Some(file) => file.per_step(&weights, &options, config)?,
                None => {
                    let card = &self.teacher.card.card;
                    unroll::per_step(&self.teacher.network, &weights, card, &options, &steps(card, config)?)?
                }
            };
            for (k, model) in models.iter().enumerate() {
                files.push(run.path().join(format!("student-step-{k}.onnx")));
                save::write(model, &files[files.len() - 1])?;
            }
        }
        if same_graph {
            files.push(run.path().join("student-same-graph.onnx"));
            save::write(&self.same_graph(&weights, &options)?, &files[files.len() - 1])?;
        }
        Ok(files)
    }
}

/// The steps of the configured student, where it is the teacher's copy.
pub fn steps(card: &TeacherCard, config: &Config) -> Result<Steps> {
    let levels = crate::distill::student::levels(&Conversion::new(card)?, &config.student)?;
    Ok(Steps { levels, stochastic: config.student.stochastic })
}

/// `disback`, or the base method's name where no trajectory was used.
pub fn method(config: &Config) -> &'static str {
    if config.degrade.nodes > 0 { "disback" } else { "base" }
}

pub fn objective_name(config: &Config) -> String {
    crate::distill::objective::objective(config).name().to_owned()
}

/// What the student is, for tables and summaries.
pub fn describe(config: &Config) -> String {
    let network = match config.student.file.as_str() {
        "" => "the teacher's copy",
        file => file,
    };
    match config.student.init {
        Init::Given => network.to_owned(),
        Init::Random => format!("{network}, weights at random"),
    }
}
