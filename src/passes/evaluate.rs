//! Values inside a graph: the file is run by an engine with the wanted values as its outputs. What folding, calibration and
//! the portable form must know about a network, they read off a run of it instead of guessing.

use std::collections::{HashMap, HashSet};

use prost::Message;

use crate::error::{Context, Error, Result};
use crate::onnx::{ModelProto, ValueInfoProto};
use crate::runtime::student::{SampleRequest, Student, StudentInfo};
use crate::runtime::{self, Dim, Engine, EngineKind, EngineOptions};
use crate::tensor::{DType, HostTensor};

/// Named input tensors of one run.
pub type Inputs = Vec<(String, HostTensor)>;

/// A student's inputs for `batch` images: noise by the seed convention, classes in turn, normal rows for embeddings.
/// A graph that fixes its batch gets that.
pub fn student_inputs(model: &ModelProto, seed: u64, batch: usize) -> Result<Inputs> {
    let info = StudentInfo::from_model(model)?;
    let batch = match info.noise.shape.first() {
        Some(Dim::Fixed(n)) => *n,
        _ => batch,
    };
    let classes = info.classes().map_or_else(Vec::new, |n| (0..n).collect());
    let embeddings = info.random_rows(seed, batch)?;
    Student::inputs_of(&info, &SampleRequest { seed, classes, embeddings, batch }, 0, batch)
}

/// Weights above this size are read where they lie, so that no session has a copy.
#[cfg(feature = "ort")]
const IN_PLACE_ABOVE: usize = 128 << 20;

/// Opens a model in ONNX Runtime on the CPU.
pub fn open(model: &ModelProto) -> Result<Box<dyn Engine>> {
    let options = EngineOptions { engine: EngineKind::Ort, threads: None, ..EngineOptions::default() };
    #[cfg(feature = "ort")]
    if model.encoded_len() > IN_PLACE_ABOVE {
        return Ok(Box::new(runtime::ort::OrtEngine::open_in_place(model, &options)?));
    }
    runtime::open_bytes(&model.encode_to_vec(), None, &options)
}

/// The model with other outputs, whose types the engine finds out.
pub fn with_outputs(model: &ModelProto, names: &[String]) -> ModelProto {
    let mut model = model.clone();
    if let Some(graph) = model.graph.as_mut() {
        let declared: HashMap<String, ValueInfoProto> =
            graph.output.iter().map(|o| (o.name().to_owned(), o.clone())).collect();
        graph.output = names
            .iter()
            .map(|n| {
                let bare = ValueInfoProto { name: Some(n.clone()), ..ValueInfoProto::default() };
                declared.get(n).cloned().unwrap_or(bare)
            })
            .collect();
        crate::graph::edit::remove_dead(graph);
        // The engine refuses inputs that nothing reads only when they are not given; ours are all given.
    }
    model
}

/// Runs the model once and returns the values of these names.
pub fn values(model: &ModelProto, names: &[String], inputs: &[Inputs]) -> Result<Vec<HashMap<String, HostTensor>>> {
    if names.is_empty() {
        return Ok(inputs.iter().map(|_| HashMap::new()).collect());
    }
    let mut engine = open(&with_outputs(model, names)).context("looking into the network")?;
    inputs
        .iter()
        .map(|set| {
            let named: Vec<(&str, &HostTensor)> = set.iter().map(|(n, t)| (n.as_str(), t)).collect();
            Ok(engine.run(&named).context("looking into the network")?.into_iter().collect())
        })
        .collect()
}

/// Element type of every value that nodes make, subgraphs left out. Values that are no tensors are absent.
pub fn dtypes(model: &ModelProto) -> Result<HashMap<String, DType>> {
    let graph = model.graph.as_ref().ok_or_else(|| Error::invalid("the model holds no graph"))?;
    let mut found: HashMap<String, DType> = HashMap::new();
    for t in &graph.initializer {
        if let Ok(d) = DType::from_onnx(t.data_type()) {
            found.insert(t.name().to_owned(), d);
        }
    }
    let (inputs, _) = runtime::model_values(model)?;
    found.extend(inputs.into_iter().map(|i| (i.name, i.dtype)));
    let sequences: HashSet<&str> = graph
        .node
        .iter()
        .filter(|n| crate::graph::edit::is(n, "SplitToSequence") || n.op_type().starts_with("Sequence"))
        .filter(|n| !crate::graph::edit::is(n, "SequenceAt") && !crate::graph::edit::is(n, "SequenceLength"))
        .flat_map(|n| n.output.iter().map(String::as_str))
        .collect();
    let names: Vec<String> = graph
        .node
        .iter()
        .flat_map(|n| &n.output)
        .filter(|o| !o.is_empty() && !sequences.contains(o.as_str()))
        .cloned()
        .collect();
    let engine = open(&with_outputs(model, &names)).context("finding the types in the network")?;
    found.extend(engine.outputs().iter().map(|o| (o.name.clone(), o.dtype)));
    Ok(found)
}

/// Largest absolute difference; infinite where shapes differ or a value is not finite.
pub fn max_abs(a: &HostTensor, b: &HostTensor) -> f64 {
    if a.shape() != b.shape() {
        return f64::INFINITY;
    }
    let worst = |m: f64, (x, y): (f32, f32)| {
        let d = f64::from((x - y).abs());
        if d.is_finite() { m.max(d) } else { f64::INFINITY }
    };
    a.to_f32().into_iter().zip(b.to_f32()).fold(0.0, worst)
}

/// The value named `sample` of each run.
pub fn samples(model: &ModelProto, inputs: &[Inputs]) -> Result<Vec<HostTensor>> {
    let mut found = values(model, &["sample".to_owned()], inputs)?;
    found
        .iter_mut()
        .map(|m| m.remove("sample").ok_or_else(|| Error::mismatch("the network has no output `sample`")))
        .collect()
}
