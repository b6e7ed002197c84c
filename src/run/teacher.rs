//! A teacher as a user brings it: an ONNX file, what its card says, and the network it becomes.

use std::path::Path;
use std::sync::Arc;

use tch::Device;

use crate::diffusion::{CardSource, Condition, Denoiser, InputSpec, ResolvedCard, TeacherCard, by_itself};
use crate::distill::Config;
use crate::error::{Context, Error, Result};
use crate::graph::ir::Port;
use crate::graph::lower::lower;
use crate::graph::{Model, TrainableChoice, quantised, sizes};
use crate::inspect::rows_looked_up;
use crate::io::RowFile;
use crate::tensor::DType;
use crate::torch::{ImportOptions, Network, Operators};

/// What a caller says about a teacher beside its file.
#[derive(Debug, Clone, Default)]
pub struct TeacherOptions {
    /// Values of the card as `key=value`; they win over every other source.
    pub card: Vec<String>,
    /// File of conditions that training draws rows of, whose shapes a card need not repeat; empty: none.
    pub conditions: String,
    /// Which of the teacher's tensors are trained.
    pub trainable: TrainableChoice,
    /// Operators of the file beside those of this crate.
    pub operators: Arc<Operators>,
}

/// An imported teacher.
#[derive(Debug)]
pub struct Teacher {
    /// The teacher's network, trainable.
    pub network: Network,
    /// The teacher's card, and where each of its values came from.
    pub card: ResolvedCard,
    /// SHA-256 of the file, which run directories remember.
    pub hash: String,
    /// SHA-256 of graph and weights alone.
    pub graph_hash: String,
    /// Operators of the file beside those of this crate.
    pub operators: Arc<Operators>,
}

/// A port as the card checks it: unknown types count as f32, an unknown shape as rank 0 to be refused by the check.
pub fn spec(p: &Port) -> InputSpec {
    InputSpec { name: p.name.clone(), dtype: p.dtype.unwrap_or(DType::F32), shape: p.dims().unwrap_or_default() }
}

/// Puts what a card says about free dimensions, about inputs of one value and about parts of the sample's input into the model that
/// it belongs to.
///
/// Errors: the card's `dims` names a dimension that the graph does not have; a value or parts that do not fit their input.
pub fn settle(model: &mut Model, resolved: &ResolvedCard) -> Result<()> {
    let card = &resolved.card;
    if resolved.changes_graph() {
        resolved.put_into(Arc::make_mut(&mut model.proto))?;
    }
    let inputs = model.proto.graph.as_ref().map(sizes::declared_inputs).unwrap_or_default();
    model.sizes = Arc::new(card.sizes(&inputs)?);
    Ok(())
}

/// Shapes of one row of each array in a file of conditions.
fn rows_of(file: &str) -> Result<Vec<(String, Vec<usize>)>> {
    if file.is_empty() {
        return Ok(Vec::new());
    }
    let rows = RowFile::open(Path::new(file)).context("conditions.file")?;
    Ok(rows.arrays().map(|(name, _, shape)| (name.to_owned(), shape.iter().skip(1).copied().collect())).collect())
}

/// All sources of a model file's card.
pub fn card_source(model: &Model, overrides: &[String]) -> CardSource {
    CardSource::new().model(&model.path).proto(&model.proto).overrides(overrides.iter().cloned())
}

/// The card of a model file from all its sources.
pub fn card(model: &Model, overrides: &[String]) -> Result<ResolvedCard> {
    card_source(model, overrides).resolve()
}

/// Refuses classes beyond the rows of the table that the graph picks them from.
fn check_classes(model: &Model, card: &TeacherCard) -> Result<()> {
    if !card.conditions.values().any(|c| matches!(c, Condition::ClassIndex { .. })) {
        return Ok(());
    }
    // As the file has it: in an imported graph the table is a parameter.
    let graph = lower(model)?;
    for (name, condition) in &card.conditions {
        let Condition::ClassIndex { classes, null } = condition else { continue };
        let Some(port) = graph.inputs.iter().find(|p| p.name == *name) else { continue };
        let Some((rows, what)) = rows_looked_up(&graph, port.value) else { continue };
        let highest = null.unwrap_or(0).max(*classes as i64 - 1);
        if highest >= rows as i64 {
            return Err(Error::usage(format!(
                "the card contradicts the graph: `conditions.{name}` goes up to {highest} (classes = {classes}{}), but the graph knows 0 to {} ({what})",
                null.map_or(String::new(), |n| format!(", null = {n}")),
                rows - 1
            ))
            .hint("correct the card: --card key=value, <model>.card.toml, or the model's metadata_props"));
        }
    }
    Ok(())
}

impl Teacher {
    /// Loads the file, resolves its card (command line first) and checks one against the other.
    pub fn load(path: &Path, given: &TeacherOptions, device: Device) -> Result<Self> {
        let mut model = Model::load_with(path, given.operators.definitions())?;
        if model.metadata().iter().any(|(key, _)| key == "disback.student.method") {
            return Err(Error::usage(format!("{}: a student that disback made, expected a teacher", path.display()))
                .hint("give the teacher that it was distilled from; `disback sample`, `export`, `verify` and `serve` take students"));
        }
        let source = card_source(&model, &given.card).rows(rows_of(&given.conditions)?);
        let card = source.resolve().with_context(|| path.display().to_string())?;
        settle(&mut model, &card).with_context(|| path.display().to_string())?;
        let (hash, graph_hash) = (model.hash(), model.graph_hash());
        let options = ImportOptions {
            trainable: given.trainable.clone(),
            operators: given.operators.clone(),
            ..ImportOptions::default()
        };
        let network = Network::import(model, &options, device)?;
        quantised::refuse(&network.shared().graph).with_context(|| path.display().to_string())?;
        let inputs: Vec<InputSpec> = network.fed_inputs().iter().map(spec).collect();
        let outputs: Vec<InputSpec> = network.outputs().iter().map(spec).collect();
        card.card.check_against(&inputs, &outputs).with_context(|| path.display().to_string())?;
        check_classes(&network.shared().model, &card.card).with_context(|| path.display().to_string())?;
        Ok(Self { network, card, hash, graph_hash, operators: given.operators.clone() })
    }

    /// What a user should look at, a sentence each: numbers of the card that fill whole arrays.
    pub fn warnings(&self) -> Vec<String> {
        let constants = &self.card.card.constants;
        let filled = |p: &Port| {
            let value = constants.get(&p.name)?;
            let dims = p.shape.as_ref()?;
            // The first free one is the batch.
            let array = dims.iter().enumerate().any(|(k, d)| d.as_ref().map_or(k > 0, |&n| n > 1));
            array.then(|| {
                format!(
                    "the card's `constants.{}` = {value} fills an array of {}: every element has that one value; an array comes from \
                     a file: conditions.{}.kind=constant with .file=FILE.npy",
                    p.name,
                    p.describe(),
                    p.name
                )
            })
        };
        self.network.inputs().iter().filter_map(filled).collect()
    }

    /// Inputs of the graph as specs, for the denoiser.
    pub fn inputs(&self) -> Vec<InputSpec> {
        self.network.fed_inputs().iter().map(spec).collect()
    }
}

/// The weaker network that guides this teacher (`guidance_by`), where there is one. It is read by the card in it or beside it, and has
/// the teacher's operators.
///
/// Errors: what [`Teacher::load`] refuses.
pub fn weaker(teacher: &Teacher, config: &Config) -> Result<Option<Teacher>> {
    let Some(path) = config.weaker() else { return Ok(None) };
    let options = TeacherOptions {
        conditions: config.conditions.file.clone(),
        operators: teacher.operators.clone(),
        ..TeacherOptions::default()
    };
    let weaker = Teacher::load(path, &options, teacher.network.device()).context(GUIDE)?;
    if weaker.graph_hash == teacher.graph_hash {
        return Err(by_itself(&path.display().to_string()).context(GUIDE));
    }
    Ok(Some(weaker))
}

/// The key that names the weaker network.
const GUIDE: &str = "guidance_by";

/// The teacher as stage 1 and 2 copy it: adapted, where the configuration says so, and with the network that guides it.
pub fn denoiser(teacher: &Teacher, config: &Config) -> Result<Denoiser> {
    guided(teacher, weaker(teacher, config)?.as_ref(), config)
}

/// [`denoiser`], guided by a network that is loaded already. Their weights are shared, not copied.
///
/// Errors: a weaker network of other samples, or with conditions that the teacher does not have.
pub fn guided(teacher: &Teacher, weaker: Option<&Teacher>, config: &Config) -> Result<Denoiser> {
    let network = teacher.network.alias();
    let network = match config.lora() {
        Some(options) => network.adapt(&options)?,
        None => network,
    };
    let denoiser = Denoiser::new(Box::new(network), Arc::new(teacher.card.card.clone()), &teacher.inputs())?;
    match weaker {
        None => Ok(denoiser),
        Some(weaker) => {
            let network = Box::new(weaker.network.alias());
            let weaker = Denoiser::new(network, Arc::new(weaker.card.card.clone()), &weaker.inputs())?;
            denoiser.guided_by(weaker).with_context(|| format!("{GUIDE}: {}", config.guidance_by))
        }
    }
}
