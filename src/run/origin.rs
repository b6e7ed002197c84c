//! The student of a run: where its network comes from, and how its weights leave as ONNX.

use std::path::{Path, PathBuf};

use tch::Device;

use crate::diffusion::{Conversion, Denoiser, TeacherCard};
use crate::distill::config::Init;
use crate::distill::{Config, RunDir, Student, batches};
use crate::error::{Context, Error, Result};
use crate::export::{self, ShipOptions, Steps, StudentOptions, unroll};
use crate::graph::save;
use crate::onnx::ModelProto;
use crate::run::student_file::StudentFile;
use crate::run::teacher::Teacher;
use crate::runtime::student::{self as sampling, SampleRequest};
use crate::runtime::{Dim, EngineKind, EngineOptions};
use crate::shown::tell;
use crate::torch::ParamSet;

/// The teacher, and the student's own network where it has one.
#[derive(Debug, Clone, Copy)]
pub struct StudentOrigin<'a> {
    /// The teacher as imported.
    pub teacher: &'a Teacher,
    /// The student's own network; absent where the student is the teacher's copy.
    pub file: Option<&'a StudentFile>,
}

/// The forms in which a student is written beside `student.onnx`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Forms {
    /// `student-step-<k>.onnx` for each step of a student of several.
    pub per_step: bool,
    /// `student-same-graph.onnx`: the teacher's graph with the student's weights.
    pub same_graph: bool,
}

/// A student's file that was written.
#[derive(Debug)]
pub struct Written {
    /// Where the file was written.
    pub path: PathBuf,
    /// Why the file did not pass its check; absent where it passed.
    pub failed: Option<Error>,
}

/// `student.unchecked.onnx` for `student.onnx`.
fn unchecked(path: &Path) -> PathBuf {
    path.with_extension("unchecked.onnx")
}

/// Removes a file of ours and its external data, where they are.
fn remove(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for file in [path.to_owned(), path.with_file_name(format!("{name}.data"))] {
        match std::fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::from(e).context(file.display().to_string()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The file in an engine of this build that is there; `None`: there is none.
fn runnable(path: &Path) -> Result<Option<sampling::Student>> {
    #[cfg(feature = "ort")]
    if crate::runtime::ort::library().is_ok() {
        return sampling::Student::open(path, &EngineOptions { engine: EngineKind::Ort, ..Default::default() })
            .map(Some);
    }
    #[cfg(feature = "tract")]
    return sampling::Student::open(path, &EngineOptions { engine: EngineKind::Tract, ..Default::default() }).map(Some);
    #[cfg(not(feature = "tract"))]
    Ok(None)
}

/// The configured student of this teacher; `None`: the teacher's copy.
pub fn load(config: &Config, teacher: &Teacher, device: Device) -> Result<Option<StudentFile>> {
    StudentFile::load(&config.student, &teacher.card.card, &teacher.operators, device)
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
    let conditions = batches::conditions(config, card)?.of_images(card, config.seed, 0, rows)?;
    let started = Student::initial(Some(&student), teacher, &config.student, config.seed)?;
    started.try_out(card, &conditions)?;
    Ok(Some(student))
}

impl StudentOrigin<'_> {
    /// What the metadata says beside the card.
    pub fn options(&self, config: &Config) -> StudentOptions {
        StudentOptions {
            sigma_init: (config.student.sigma_init > 0.0).then_some(config.student.sigma_init),
            method: method(config).into(),
            objective: objective_name(config),
            teacher_hash: self.teacher.hash.clone(),
            unchecked: false,
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

    /// [`StudentOrigin::model`] in the form that ships.
    fn shipped(&self, params: &ParamSet, config: &Config, shown: &Path) -> Result<ModelProto> {
        let made = self.model(params, config, &self.options(config))?;
        let (made, report) = export::ship(made, &ShipOptions::default())?;
        report.warnings.iter().for_each(|w| tell!("warning: {}: {w}", shown.display()));
        Ok(made)
    }

    /// Writes [`StudentOrigin::model`] in the form that ships. What fails its check is not lost: it goes, as it was built, into a file
    /// beside that is called `unchecked`, with what its check said in its metadata.
    ///
    /// Errors: a student that cannot be built as ONNX at all; a file that cannot be written.
    pub fn write(&self, params: &ParamSet, config: &Config, path: &Path) -> Result<Written> {
        let unchecked = unchecked(path);
        let why = match self.shipped(params, config, path) {
            Ok(made) => {
                save::write(&made, path)?;
                // One of an earlier end of the run is out of date.
                remove(&unchecked)?;
                return Ok(Written { path: path.to_owned(), failed: None });
            }
            Err(why) => why,
        };
        let options = StudentOptions { unchecked: true, ..self.options(config) };
        let built = self.model(params, config, &options).and_then(|mut made| {
            export::consumer::consumer_metadata(&mut made, "f32")?;
            save::set_metadata(&mut made, "disback.student.unchecked", &why.to_string());
            Ok(made)
        });
        match built {
            // Nothing to write: the reason is the one that the check gave.
            Err(_) => Err(why),
            Ok(made) => {
                save::write(&made, &unchecked)?;
                Ok(Written { path: unchecked, failed: Some(why) })
            }
        }
    }

    /// Writes the student in every form asked for into `folder`, opens the file and runs it. Before the first step this tells
    /// what an export would fail at after the last.
    ///
    /// Errors: whatever of it fails.
    pub fn rehearse(&self, student: &Student, config: &Config, forms: Forms, folder: &Path) -> Result<()> {
        for written in self.export(student, config, forms, folder)? {
            if let Some(why) = written.failed {
                return Err(why);
            }
        }
        let path = RunDir::at(folder).student();
        let mut engine = match runnable(&path)? {
            Some(engine) => engine,
            None => return Ok(()),
        };
        let rows = match engine.info().noise.shape.first() {
            Some(Dim::Fixed(n)) => *n,
            _ => 2,
        };
        let embeddings = engine.info().random_rows(config.seed, rows)?;
        let request = SampleRequest { seed: config.seed, batch: rows, embeddings, ..SampleRequest::default() };
        let made = engine.sample(&request, 0, rows).context("running the untrained student")?;
        match made.to_f32().into_iter().all(f32::is_finite) {
            true => Ok(()),
            false => Err(Error::mismatch("the untrained student gives NaN or infinity")),
        }
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

    /// Writes a student in every form asked for into `folder`; the first file is `student.onnx`, or what became of it.
    pub fn export(&self, student: &Student, config: &Config, forms: Forms, folder: &Path) -> Result<Vec<Written>> {
        let (weights, options) = (student.weights()?, self.options(config));
        let mut files = vec![self.write(&weights, config, &RunDir::at(folder).student())?];
        let mut write = |name: String, model: &ModelProto| -> Result<()> {
            let path = folder.join(name);
            save::write(model, &path)?;
            files.push(Written { path, failed: None });
            Ok(())
        };
        if forms.per_step {
            let models = match self.file {
                Some(file) => file.per_step(&weights, &options, config)?,
                None => {
                    let card = &self.teacher.card.card;
                    unroll::per_step(&self.teacher.network, &weights, card, &options, &steps(card, config)?)?
                }
            };
            for (k, model) in models.iter().enumerate() {
                write(format!("student-step-{k}.onnx"), model)?;
            }
        }
        if forms.same_graph {
            write("student-same-graph.onnx".to_owned(), &self.same_graph(&weights, &options)?)?;
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
    if config.degrade.nodes.any() { "disback" } else { "base" }
}

/// The objective's name, as the configuration has it.
pub fn objective_name(config: &Config) -> String {
    config.objective.name().to_owned()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::teacher::TeacherOptions;
    use crate::torch::Forward;

    #[test]
    fn a_student_that_fails_its_check_is_written_with_the_reason() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits/teacher.onnx");
        let teacher = Teacher::load(&file, &TeacherOptions::default(), Device::Cpu).unwrap();
        let origin = StudentOrigin { teacher: &teacher, file: None };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("student.onnx");
        let broken = teacher.network.params().deep_copy(Device::Cpu).unwrap();
        let _ = broken.tensors()[0].shallow_clone().fill_(f64::NAN);
        let config = Config::default();
        let written = origin.write(&broken, &config, &path).unwrap();
        let why = written.failed.unwrap().to_string();
        assert!(why.contains("NaN") && why.contains(&broken.names()[0]), "{why}");
        assert_eq!(written.path, dir.path().join("student.unchecked.onnx"));
        assert!(!path.exists());
        let model = crate::graph::Model::load(&written.path).unwrap();
        let said = model.metadata().into_iter().find(|(k, _)| k == "disback.student.unchecked").unwrap().1;
        assert_eq!(said, why);
        // It is a student like any other, with the weights that were trained.
        let info = sampling::StudentInfo::from_model(&model.proto).unwrap();
        assert_eq!(info.shape, teacher.card.card.shape);

        // Once it can be written as it should be, the other is out of date.
        let written = origin.write(teacher.network.params(), &config, &path).unwrap();
        assert!(written.failed.is_none() && path.is_file());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
