//! A generator with an architecture of its own: noise and the teacher's conditions in, a sample out, in one call.

use std::sync::Arc;

use tch::{Kind, Tensor};

use crate::axes::written;
use crate::error::{Error, Result};
use crate::tensor::DType;
use crate::torch::{Forward, ParamSet, convert};

use super::card::{InputSpec, Layout, TeacherCard};
use super::condition::Condition;
use super::conditions::Conditions;
use super::sample_axes::out_of_graph;

/// What the user says about a generator's inputs and outputs; what is empty is found by name and shape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GeneratorNames {
    /// Input that takes the noise; empty: found by name and shape.
    pub noise: String,
    /// Output that is the sample; empty: found by name and shape.
    pub output: String,
    /// The teacher's condition, and the generator's input for it.
    pub conditions: Vec<(String, String)>,
}

/// Names under which noise and samples usually go, the surest first.
const NOISE: [&str; 5] = ["noise", "z", "latent", "latents", "input"];
const SAMPLE: [&str; 4] = ["sample", "image", "images", "output"];

/// A condition of the teacher as a generator takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratorCondition {
    /// The teacher's name for it.
    pub name: String,
    /// The generator's input that takes it.
    pub input: InputSpec,
    /// The generator's form: a class may be an index for the one and a one-hot row for the other.
    pub form: Condition,
}

/// Which of a graph's inputs and outputs is what.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratorPorts {
    /// Input that takes the noise.
    pub noise: InputSpec,
    /// Noise of one sample as the graph takes it, of one dimension to as many as the sample has (three at least).
    pub noise_row: Vec<usize>,
    /// Output that is the sample.
    pub output: InputSpec,
    /// Whether the output has images with their channels last ([`Layout::Nhwc`]); else it is as the card's shape says.
    pub layout: Layout,
    /// The teacher's conditions with the inputs that take them.
    pub conditions: Vec<GeneratorCondition>,
    /// One sample.
    pub shape: Vec<usize>,
}

impl GeneratorPorts {
    /// Finds and checks the ports of a generator of this teacher's samples.
    ///
    /// Errors: an input that is neither noise nor a condition of the teacher; a condition of the teacher that no input
    /// takes; an output of another shape than the teacher's samples.
    pub fn find(
        card: &TeacherCard,
        names: &GeneratorNames,
        inputs: &[InputSpec],
        outputs: &[InputSpec],
    ) -> Result<Self> {
        let list = |values: &[InputSpec]| values.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        let fail = |what: String, hint: String| {
            let ports = [format!("graph inputs: {}", list(inputs)), format!("graph outputs: {}", list(outputs))];
            Error::usage(format!("the student: {what}")).lines(ports).hint(hint)
        };
        let mut free: Vec<&InputSpec> = inputs.iter().collect();
        let take = |free: &mut Vec<&InputSpec>, name: &str| {
            free.iter().position(|i| i.name == name).map(|at| free.remove(at).clone())
        };
        if let Some((name, _)) = names.conditions.iter().find(|(name, _)| !card.conditions.contains_key(name)) {
            let known: Vec<_> = card.conditions.keys().map(String::as_str).collect();
            return Err(fail(
                format!("student.conditions names `{name}`, which is no condition of the teacher"),
                format!("the teacher's conditions are [{}]", known.join(", ")),
            ));
        }
        // By option or by the teacher's name first.
        let mut found: Vec<(String, InputSpec)> = Vec::new();
        for name in card.conditions.keys() {
            let given = names.conditions.iter().find(|(n, _)| n == name).map(|(_, input)| input);
            let input = take(&mut free, given.unwrap_or(name));
            match (input, given) {
                (Some(input), _) => found.push((name.clone(), input)),
                (None, Some(input)) => {
                    let what = format!("student.conditions names its input `{input}`, which it does not have");
                    return Err(fail(what, "give the name of a graph input".into()));
                }
                (None, None) => {}
            }
        }
        let noise = if names.noise.is_empty() {
            let floats: Vec<&str> =
                free.iter().filter(|i| i.dtype.is_float() && i.shape.len() > 1).map(|i| i.name.as_str()).collect();
            match floats.as_slice() {
                [only] => Some((*only).to_owned()),
                several => NOISE.iter().find(|n| several.contains(n)).map(|n| (*n).to_owned()),
            }
        } else {
            Some(names.noise.clone())
        };
        let noise = noise.and_then(|name| take(&mut free, &name)).ok_or_else(|| {
            let what = match names.noise.is_empty() {
                true => "which input takes the noise?".to_owned(),
                false => format!("student.noise names its input `{}`, which it does not have", names.noise),
            };
            fail(what, "student.noise names the input that takes standard normal noise".into())
        })?;
        // Then by what fits.
        for (name, condition) in &card.conditions {
            if found.iter().any(|(n, _)| n == name) {
                continue;
            }
            // (A number a sample is a class only where it is an integer, or called so.)
            let certain = |i: &InputSpec| match form(condition, i) {
                Some(Condition::ClassIndex { .. }) => !i.dtype.is_float(),
                other => other.is_some(),
            };
            let fitting: Vec<String> = free.iter().filter(|i| certain(i)).map(|i| i.name.clone()).collect();
            let [only] = fitting.as_slice() else {
                let what = format!("no input takes the teacher's condition `{name}`");
                return Err(fail(
                    what,
                    format!(
                        "an input of that name, or student.conditions = [\"{name}=<input>\"]; a student that does not \
                         know the condition cannot follow a teacher that does"
                    ),
                ));
            };
            found.extend(take(&mut free, only).map(|input| (name.clone(), input)));
        }
        if let Some(rest) = free.first() {
            return Err(fail(
                format!("input `{}` is neither the noise nor a condition of the teacher", rest.name),
                "a network that takes a time or noise level needs a card (`<file>.card.toml`, or its metadata); then it \
                 is evaluated at student.sigma_init"
                    .into(),
            ));
        }
        let conditions = found
            .into_iter()
            .map(|(name, input)| {
                let wanted = &card.conditions[&name];
                let form = form(wanted, &input).ok_or_else(|| {
                    let what = format!("input `{input}` does not fit the teacher's condition `{name}`, {wanted:?}");
                    fail(what, "student.conditions names another input for it".into())
                })?;
                Ok(GeneratorCondition { name, input, form })
            })
            .collect::<Result<Vec<_>>>()?;
        let most = card.rank().max(3);
        if !noise.dtype.is_float() || !(2..=1 + most).contains(&noise.shape.len()) {
            let what = format!("noise `{noise}` is not [B, ...] of floats with one to {most} dimensions a sample");
            return Err(fail(what, "student.noise names another input".into()));
        }
        // Dimensions that the file leaves open are the sample's.
        let noise_row = noise.shape[1..]
            .iter()
            .zip(&card.shape)
            .map(|(d, sample)| d.or((noise.shape.len() == 1 + card.rank()).then_some(*sample)))
            .collect::<Option<Vec<usize>>>()
            .ok_or_else(|| {
                fail(format!("noise `{noise}` leaves its size open"), "export it with fixed sizes but the batch".into())
            })?;
        let output = match (names.output.is_empty(), outputs) {
            (false, _) => outputs.iter().find(|o| o.name == names.output),
            (true, [only]) => Some(only),
            _ => SAMPLE.iter().find_map(|n| outputs.iter().find(|o| o.name == *n)),
        };
        let output = output.cloned().ok_or_else(|| {
            fail("which output is the sample?".into(), "student.output names the output that is the sample".into())
        })?;
        let fits = |row: &[usize]| {
            let dims = output.shape.iter().skip(1);
            output.shape.len() == 1 + row.len() && dims.zip(row).all(|(d, n)| d.is_none_or(|d| d == *n))
        };
        // Images may come out with their channels last, which other samples have where the card says so.
        let turned = match (card.image_shape(), card.shape.as_slice()) {
            (Some(_), [c, h, w]) => Some([*h, *w, *c]),
            _ => None,
        };
        // Exporters may leave an output's shape out; the trial call sees it then.
        let layout = if output.shape.is_empty() || fits(&card.shape) {
            Layout::ChannelsFirst
        } else if turned.is_some_and(|row| fits(&row)) {
            Layout::Nhwc
        } else {
            return Err(fail(
                format!("output `{output}` is not {}, which the teacher's samples are", written(&card.shape)),
                "student and teacher must make samples of one shape; student.output names another output".into(),
            ));
        };
        Ok(Self { noise, noise_row, output, layout, conditions, shape: card.shape.clone() })
    }

    /// The noise of one sample as a caller gives it: that of images with its dimensions filled up to three.
    pub fn noise_shape(&self) -> Vec<usize> {
        let mut row = self.noise_row.clone();
        if self.shape.len() == 3 {
            row.resize(row.len().max(3), 1);
        }
        row
    }

    /// The batch that the graph fixes, where it does.
    pub fn batch(&self) -> Option<usize> {
        self.noise.shape.first().copied().flatten()
    }
}

/// The form in which an input can take a condition of the teacher.
fn form(condition: &Condition, input: &InputSpec) -> Option<Condition> {
    let shape = input.shape.as_slice();
    match condition {
        Condition::ClassIndex { classes, .. } | Condition::OneHot { classes, .. } => {
            let index = matches!(shape, [] | [_] | [_, Some(1)]) && input.dtype != DType::Bool;
            let one_hot = matches!(shape, [_, Some(n)] if n == classes) && *classes > 1;
            if one_hot {
                Some(Condition::OneHot { classes: *classes, null: None })
            } else {
                index.then_some(Condition::ClassIndex { classes: *classes, null: None })
            }
        }
        Condition::Embedding { shape: row, .. } => {
            let fits =
                shape.len() == row.len() + 1 && shape[1..].iter().zip(row).all(|(d, n)| d.is_none_or(|d| d == *n));
            (fits && (input.dtype.is_float() || input.dtype == DType::Bool))
                .then(|| Condition::Embedding { shape: row.clone(), null: None })
        }
        Condition::Constant { .. } => None,
    }
}

/// A generator's network with its ports. Copies share everything but the parameters.
pub struct Generator {
    network: Box<dyn Forward>,
    ports: Arc<GeneratorPorts>,
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator").field("ports", &self.ports).finish_non_exhaustive()
    }
}

impl Generator {
    /// Joins a network with the ports that were found for it.
    pub fn new(network: Box<dyn Forward>, ports: Arc<GeneratorPorts>) -> Self {
        Self { network, ports }
    }

    /// The trained weights.
    pub fn params(&self) -> &ParamSet {
        self.network.params()
    }
    /// The network.
    pub fn network(&self) -> &dyn Forward {
        &*self.network
    }
    /// Which of the graph's inputs and outputs is what.
    pub fn ports(&self) -> &GeneratorPorts {
        &self.ports
    }

    /// The same network with its own parameters of equal values.
    pub fn copy(&self) -> Result<Self> {
        Ok(Self { network: self.network.copy()?, ports: self.ports.clone() })
    }

    /// The conditions in the graph's form, in the order of the ports.
    pub fn bound(&self, conditions: &Conditions) -> Result<Vec<Tensor>> {
        self.ports.conditions.iter().map(|c| conditions.bound(&c.name, &c.form, &c.input)).collect()
    }

    /// Samples `[B, ...shape]` f32 for noise `[B, ...noise_shape]` f32.
    pub fn generate(&self, z: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        let ports = &*self.ports;
        let rows = z.size().first().copied().unwrap_or(0);
        let sized =
            |row: &[usize]| -> Vec<i64> { std::iter::once(rows).chain(row.iter().map(|d| *d as i64)).collect() };
        if z.size() != sized(&ports.noise_shape()) {
            let expected = sized(&ports.noise_shape());
            return Err(Error::mismatch(format!("noise of shape {:?}, expected {expected:?}", z.size())));
        }
        let noise = z.f_reshape(sized(&ports.noise_row))?.f_to_kind(convert::kind(ports.noise.dtype))?;
        let bound =
            self.bound(conditions)?.iter().map(|t| Ok(t.f_to_device(z.device())?)).collect::<Result<Vec<_>>>()?;
        let mut inputs = vec![(ports.noise.name.as_str(), &noise)];
        inputs.extend(ports.conditions.iter().map(|c| c.input.name.as_str()).zip(&bound));
        let outputs = self.network.forward(&inputs)?;
        let name = &ports.output.name;
        let (_, output) = outputs
            .into_iter()
            .find(|(n, _)| n == name)
            .ok_or_else(|| Error::usage(format!("the student has no output `{name}`")))?;
        let output = out_of_graph(ports.layout, output)?;
        if output.size() != sized(&ports.shape) {
            let expected = sized(&ports.shape);
            return Err(Error::mismatch(format!(
                "the student's output `{name}` has shape {:?}, expected {expected:?}",
                output.size()
            )));
        }
        Ok(output.f_to_kind(Kind::Float)?)
    }
}

#[cfg(test)]
#[path = "generator_tests.rs"]
mod tests;
