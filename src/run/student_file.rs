//! A student's network as a user brings it: an ONNX file, with a card or without, in the place of the teacher's copy.

use std::path::Path;
use std::sync::Arc;

use tch::Device;

use crate::diffusion::{
    Condition, Denoiser, Generator, GeneratorNames, GeneratorPorts, InputSpec, ResolvedCard, TeacherCard,
};
use crate::distill::config::{Config, StudentConfig};
use crate::distill::{Student, student};
use crate::error::{Error, Result};
use crate::export::{self, Steps, StudentOptions, unroll};
use crate::graph::{Model, Sizes, sizes};
use crate::onnx::ModelProto;
use crate::run::teacher;
use crate::torch::{Forward, ImportOptions, Network, Operators, ParamSet};

/// An imported student.
#[derive(Debug)]
pub struct StudentFile {
    /// The student's network with the weights of its file.
    pub network: Network,
    /// SHA-256 of the file.
    pub hash: String,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Takes a noise level, as its card says: a smaller network, a consistency model, another training of the teacher.
    Levels(Arc<TeacherCard>),
    /// Takes noise and conditions alone.
    Generator(Arc<GeneratorPorts>),
}

fn specs(ports: &[crate::graph::Port]) -> Vec<InputSpec> {
    ports.iter().map(teacher::spec).collect()
}

impl StudentFile {
    /// The configured file, where there is one, checked against the teacher's card.
    ///
    /// Errors: samples of another shape or range than the teacher's, conditions that do not go together.
    pub fn load(
        config: &StudentConfig,
        card: &TeacherCard,
        operators: &Arc<Operators>,
        device: Device,
    ) -> Result<Option<Self>> {
        if config.file.is_empty() {
            return Ok(None);
        }
        let path = Path::new(&config.file);
        let shown = path.display().to_string();
        Self::open(config, path, card, operators, device).map(Some).map_err(|e| {
            let named = e.to_string().contains(&shown);
            e.context(if named { "student.file".to_owned() } else { format!("student.file: {shown}") })
        })
    }

    fn open(
        config: &StudentConfig,
        path: &Path,
        card: &TeacherCard,
        operators: &Arc<Operators>,
        device: Device,
    ) -> Result<Self> {
        let mut model = Model::load_with(path, operators.definitions())?;
        let metadata = model.metadata();
        let has = |key: &str| metadata.iter().any(|(k, _)| k == key);
        // A student of ours has the teacher's card in it, but takes no time any more.
        let own_card =
            !has("disback.student.method") && (has("disback.prediction") || path.with_extension("card.toml").is_file());
        let own_card = own_card.then(|| teacher::card(&model, &[])).transpose()?;
        match &own_card {
            Some(own) => teacher::settle(&mut model, own)?,
            // Conditions that it has under the teacher's names are as long as the teacher's.
            None => {
                let inputs = model.proto.graph.as_ref().map(sizes::declared_inputs).unwrap_or_default();
                let rows = card.conditions.iter().map(|(name, condition)| (name.clone(), condition.row_shape()));
                model.sizes = Arc::new(Sizes::new(&inputs, &Default::default(), rows)?);
            }
        }
        let hash = model.hash();
        let network = Network::import(
            model,
            &ImportOptions { operators: operators.clone(), ..ImportOptions::default() },
            device,
        )?;
        let (inputs, outputs) = (specs(&network.fed_inputs()), specs(network.outputs()));
        let kind = match own_card {
            Some(ResolvedCard { card: own, .. }) => {
                own.check_against(&inputs, &outputs)?;
                agree(&own, card)?;
                Kind::Levels(Arc::new(own))
            }
            None => {
                let conditions = config.conditions.iter().filter_map(|pair| pair.split_once('='));
                let names = GeneratorNames {
                    noise: config.noise.clone(),
                    output: config.output.clone(),
                    conditions: conditions.map(|(a, b)| (a.trim().to_owned(), b.trim().to_owned())).collect(),
                };
                Kind::Generator(Arc::new(GeneratorPorts::find(card, &names, &inputs, &outputs)?))
            }
        };
        if network.params().is_empty() {
            return Err(Error::usage("the student has no trainable tensors").hint("`disback inspect` shows why"));
        }
        Ok(Self { network, hash, kind })
    }

    /// The student with the file's weights, which are not copied: [`Student::initial`] makes the one that is trained.
    ///
    /// Errors: noise levels for a network that takes none, or that its schedule does not know.
    pub fn student(&self, config: &StudentConfig) -> Result<Student> {
        let network = Box::new(self.network.alias());
        match &self.kind {
            Kind::Levels(card) => {
                Student::new(Denoiser::new(network, card.clone(), &specs(&self.network.fed_inputs()))?, config)
            }
            Kind::Generator(ports) => Student::of_generator(Generator::new(network, ports.clone()), config),
        }
    }

    /// The network's own card, where it takes a noise level.
    pub fn card(&self) -> Option<&TeacherCard> {
        match &self.kind {
            Kind::Levels(card) => Some(card),
            Kind::Generator(_) => None,
        }
    }

    /// The batch that the graph fixes, where it does.
    pub fn batch(&self) -> Option<usize> {
        let noise = match &self.kind {
            Kind::Levels(card) => &card.sample,
            Kind::Generator(ports) => &ports.noise.name,
        };
        let input = self.network.inputs().iter().find(|p| p.name == *noise)?;
        input.dims()?.first().copied().flatten()
    }

    /// These weights as `student.onnx`, all steps in one graph. `card`: the teacher's.
    pub fn export(
        &self,
        params: &ParamSet,
        card: &TeacherCard,
        options: &StudentOptions,
        config: &Config,
    ) -> Result<ModelProto> {
        match &self.kind {
            Kind::Levels(own) => unroll::unrolled(&self.network, params, own, options, &self.steps(config)?),
            Kind::Generator(ports) => export::generator(&self.network, params, ports, card, options),
        }
    }

    /// One graph for each step.
    pub fn per_step(&self, params: &ParamSet, options: &StudentOptions, config: &Config) -> Result<Vec<ModelProto>> {
        match &self.kind {
            Kind::Levels(own) => unroll::per_step(&self.network, params, own, options, &self.steps(config)?),
            Kind::Generator(_) => Err(Error::usage("--per-step: the student makes its samples in one call")),
        }
    }

    fn steps(&self, config: &Config) -> Result<Steps> {
        match &self.kind {
            Kind::Levels(own) => {
                let conversion = crate::diffusion::Conversion::new(own)?;
                Ok(Steps {
                    levels: student::levels(&conversion, &config.student)?,
                    stochastic: config.student.stochastic,
                })
            }
            Kind::Generator(_) => Ok(Steps::default()),
        }
    }
}

/// A student's card must speak of the same samples and conditions as the teacher's.
fn agree(own: &TeacherCard, teacher: &TeacherCard) -> Result<()> {
    let differ = |what: &str, a: String, b: String| {
        Err(Error::usage(format!("the student's card has {what} {a}, the teacher's {b}"))
            .hint("both must make samples of one kind; correct <file>.card.toml or the student's metadata"))
    };
    if own.shape != teacher.shape {
        return differ("shape", format!("{:?}", own.shape), format!("{:?}", teacher.shape));
    }
    if own.range != teacher.range {
        return differ("range", format!("{:?}", own.range), format!("{:?}", teacher.range));
    }
    if own.latent_scale != teacher.latent_scale {
        return differ("latent_scale", own.latent_scale.to_string(), teacher.latent_scale.to_string());
    }
    let wants = |c: &Condition| match c.classes() {
        Some(n) => format!("{n} classes"),
        None => format!("rows of {:?}", c.row_shape()),
    };
    let describe = |card: &TeacherCard| {
        let all: Vec<_> = card.conditions.iter().map(|(n, c)| format!("`{n}` ({})", wants(c))).collect();
        if all.is_empty() { "none".into() } else { all.join(", ") }
    };
    if describe(own) != describe(teacher) {
        return differ("conditions", describe(own), describe(teacher));
    }
    Ok(())
}
