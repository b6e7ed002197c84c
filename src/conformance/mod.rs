//! Proof of the import: ONNX's own operator cases (`onnx/backend/test/data/node` of the onnx wheel) through our graph and
//! plan, in values and in gradients.

mod gradient;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use prost::Message;
use serde::Serialize;
use tch::{Device, Tensor};

use crate::error::{Context, Error, Kind, Result};
use crate::graph::load::Model;
use crate::graph::lower::lower;
use crate::graph::{Graph, tensors};
use crate::onnx::{TensorProto, TypeProto, type_proto};
use crate::tensor::{DType, HostTensor};
use crate::torch::convert;
use crate::torch::exec::kernel::Value;
use crate::torch::exec::plan::Plan;
use crate::torch::ops;

pub use gradient::{GRADIENT_TOLERANCE, Gradient};

/// Relative and absolute tolerance of values; the suite's own relative one, and 1e-5 for sums in another order.
pub const TOLERANCE: (f64, f64) = (1e-3, 1e-5);
/// Where a graph multiplies matrices in 16 bits, units in the last place that a result may be away: the suite rounds each step of
/// attention to 16 bits, and here sums and softmax are f32 inside.
pub const ROUNDINGS: f64 = 2.0;

/// How one case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Every output equals the expected one in type, shape and value.
    Passed,
    /// The import said what it cannot do, before or while running.
    Refused,
    /// Other values, an error that is no refusal, or a panic.
    Wrong,
}

/// One case of the suite.
#[derive(Debug, Clone, Serialize)]
pub struct Case {
    /// The name of its folder, such as `test_conv_with_strides_padding`.
    pub name: String,
    /// How the values compare with the expected ones.
    pub outcome: Outcome,
    /// Why it did not pass; absent where it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether the case has operators of ONNX's default domain alone, and dense tensors of floats (bf16 excepted),
    /// integers or booleans as graph inputs and outputs.
    pub plain: bool,
    /// Autograd against central differences, where asked for and where the case has floats in and out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient: Option<Gradient>,
}

/// The results of a folder of cases.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Number of cases.
    pub total: usize,
    /// Number of cases that ended as [`Outcome::Passed`].
    pub passed: usize,
    /// Number of cases that ended as [`Outcome::Refused`].
    pub refused: usize,
    /// Number of cases that ended as [`Outcome::Wrong`].
    pub wrong: usize,
    /// The same counts over plain cases alone (see [`Case::plain`]).
    pub plain: Counts,
    /// Counts of gradient checks; absent where no case had one.
    pub gradients: Option<GradientCounts>,
    /// Every case, in the order in which they were given.
    pub cases: Vec<Case>,
}

/// Counts of outcomes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Number of cases.
    pub total: usize,
    /// Number of cases that ended as [`Outcome::Passed`].
    pub passed: usize,
    /// Number of cases that ended as [`Outcome::Refused`].
    pub refused: usize,
    /// Number of cases that ended as [`Outcome::Wrong`].
    pub wrong: usize,
}

/// Counts of gradient checks over cases with floats in and out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct GradientCounts {
    /// Number of cases with a gradient check: the sum of the other three.
    pub checked: usize,
    /// Number of checks that ended as [`Gradient::Passed`].
    pub passed: usize,
    /// Number of checks that ended as [`Gradient::Excepted`].
    pub excepted: usize,
    /// Number of checks that ended as [`Gradient::Wrong`].
    pub wrong: usize,
}

impl Report {
    /// Sums up cases.
    pub fn new(cases: Vec<Case>) -> Self {
        let count = |plain_only: bool| {
            let mut c = Counts::default();
            for case in cases.iter().filter(|c| c.plain || !plain_only) {
                c.total += 1;
                match case.outcome {
                    Outcome::Passed => c.passed += 1,
                    Outcome::Refused => c.refused += 1,
                    Outcome::Wrong => c.wrong += 1,
                }
            }
            c
        };
        let (all, plain) = (count(false), count(true));
        let gradients = cases.iter().any(|c| c.gradient.is_some()).then(|| {
            let mut g = GradientCounts::default();
            for gradient in cases.iter().filter_map(|c| c.gradient.as_ref()) {
                g.checked += 1;
                match gradient {
                    Gradient::Passed { .. } => g.passed += 1,
                    Gradient::Excepted { .. } => g.excepted += 1,
                    Gradient::Wrong { .. } => g.wrong += 1,
                }
            }
            g
        });
        Self { total: all.total, passed: all.passed, refused: all.refused, wrong: all.wrong, plain, gradients, cases }
    }
}

/// The cases of a folder, by name: its subfolders that hold a `model.onnx`.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.join("model.onnx").is_file() {
            found.push(path);
        }
    }
    found.sort();
    if found.is_empty() {
        return Err(Error::usage(format!("{} holds no folder with a model.onnx", dir.display()))
            .hint("the suite is onnx/backend/test/data/node in the wheel onnx==1.22.0"));
    }
    Ok(found)
}

/// Runs one case on the CPU; never fails and never panics.
pub fn run_case(dir: &Path, gradients: bool) -> Case {
    run_case_on(dir, gradients, Device::Cpu)
}

/// [`run_case`] on another device.
pub fn run_case_on(dir: &Path, gradients: bool, device: Device) -> Case {
    let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let guarded = |f: &dyn Fn() -> Result<()>| -> (Outcome, Option<String>) {
        match catch_unwind(AssertUnwindSafe(f)) {
            Ok(Ok(())) => (Outcome::Passed, None),
            Ok(Err(e)) if e.kind() == Kind::Unsupported => (Outcome::Refused, Some(e.to_string())),
            Ok(Err(e)) => (Outcome::Wrong, Some(e.to_string())),
            Err(panic) => (Outcome::Wrong, Some(format!("panic: {}", panic_text(panic.as_ref())))),
        }
    };
    let (outcome, reason) = guarded(&|| values(dir, device));
    // Where the folder lies is no part of the reason.
    let reason = reason.map(|r| r.replace(&format!("{}: ", dir.join("model.onnx").display()), ""));
    let plain = is_plain(dir).unwrap_or(false);
    let gradient = if gradients && outcome == Outcome::Passed {
        match catch_unwind(AssertUnwindSafe(|| gradient::of_case(&name, dir, device))) {
            Ok(Ok(g)) => g,
            Ok(Err(e)) => Some(Gradient::Wrong { reason: e.to_string() }),
            Err(panic) => Some(Gradient::Wrong { reason: format!("panic: {}", panic_text(panic.as_ref())) }),
        }
    } else {
        None
    };
    Case { name, outcome, reason, plain, gradient }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("of unknown kind").lines().next().unwrap_or_default().to_owned()
}

/// Default domain only, and every graph input and output a dense tensor of a type that libtorch computes with.
fn is_plain(dir: &Path) -> Result<bool> {
    let model = Model::load(&dir.join("model.onnx"))?;
    let Some(graph) = &model.proto.graph else { return Ok(false) };
    let dense = |info: &crate::onnx::ValueInfoProto| match info.r#type.as_ref().and_then(|t| t.value.as_ref()) {
        Some(type_proto::Value::TensorType(t)) => DType::from_onnx(t.elem_type()).is_ok_and(|d| d != DType::BF16),
        _ => false,
    };
    Ok(graph.node.iter().all(|n| matches!(n.domain(), "" | "ai.onnx"))
        && graph.input.iter().chain(&graph.output).all(dense))
}

/// Inputs and expected outputs of one data set, in the graph's order.
pub(crate) struct DataSet {
    pub inputs: Vec<Value>,
    pub outputs: Vec<Value>,
}

/// `onnx.SequenceProto` and `onnx.OptionalProto`, which agree in the fields that matter here.
#[derive(Clone, PartialEq, prost::Message)]
struct Wire {
    #[prost(int32, optional, tag = "2")]
    elem_type: Option<i32>,
    #[prost(message, repeated, tag = "3")]
    tensors: Vec<TensorProto>,
    #[prost(message, repeated, tag = "5")]
    sequences: Vec<Wire>,
}

pub(crate) fn data_sets(dir: &Path, model: &Model, graph: &Graph) -> Result<Vec<DataSet>> {
    let proto = model.proto.graph.as_ref().ok_or_else(|| Error::invalid("no graph"))?;
    let declared = |name: &str| {
        let info = proto.input.iter().chain(&proto.output).find(|i| i.name() == name);
        info.and_then(|i| i.r#type.as_ref())
    };
    let mut sets = Vec::new();
    for k in 0.. {
        let set = dir.join(format!("test_data_set_{k}"));
        if !set.is_dir() {
            break;
        }
        let read = |prefix: &str, ports: &[crate::graph::Port]| -> Result<Vec<Value>> {
            ports
                .iter()
                .enumerate()
                .map(|(i, p)| {
                    let path = set.join(format!("{prefix}_{i}.pb"));
                    let bytes = crate::files::map(&path)?;
                    read_value(bytes, declared(&p.name)).with_context(|| format!("{prefix} {i} `{}`", p.name))
                })
                .collect()
        };
        sets.push(DataSet { inputs: read("input", &graph.inputs)?, outputs: read("output", &graph.outputs)? });
    }
    if sets.is_empty() {
        return Err(Error::io(format!("{} holds no test_data_set_0", dir.display())));
    }
    Ok(sets)
}

/// The inputs of the first data set of a case, in the graph's order.
pub fn read_inputs(dir: &Path, model: &Model) -> Result<Vec<Value>> {
    let sets = data_sets(dir, model, &lower(model)?)?;
    Ok(sets.into_iter().next().map(|s| s.inputs).unwrap_or_default())
}

/// A value file does not say what it holds; the graph does.
fn read_value(bytes: bytes::Bytes, declared: Option<&TypeProto>) -> Result<Value> {
    let bad = |e: prost::DecodeError| Error::invalid(e.to_string());
    let sequence = |w: &Wire| -> Result<Value> {
        Ok(Value::Sequence(w.tensors.iter().map(tensor_value).collect::<Result<Vec<_>>>()?.into()))
    };
    match declared.and_then(|t| t.value.as_ref()) {
        Some(type_proto::Value::TensorType(_)) | None => tensor_value(&TensorProto::decode(bytes).map_err(bad)?),
        Some(type_proto::Value::SequenceType(_)) => sequence(&Wire::decode(bytes).map_err(bad)?),
        Some(type_proto::Value::OptionalType(_)) => {
            let w = Wire::decode(bytes).map_err(bad)?;
            match (w.tensors.first(), w.sequences.first()) {
                (Some(t), _) => tensor_value(t),
                (None, Some(s)) => sequence(s),
                (None, None) if w.elem_type == Some(3) => Ok(Value::Sequence(Vec::new().into())),
                (None, None) => Ok(Value::Nothing),
            }
        }
        Some(_) => Err(Error::unsupported("a value that is neither a tensor nor a sequence nor an optional")),
    }
}

fn tensor_value(t: &TensorProto) -> Result<Value> {
    Ok(Value::host(convert::to_torch(&tensors::from_proto(t)?)?))
}

fn values(dir: &Path, device: Device) -> Result<()> {
    let model = Model::load(&dir.join("model.onnx"))?;
    let graph = lower(&model)?;
    let plan = Plan::new(&graph, &[], ops::registry())?;
    let products = graph.nodes.iter().any(|n| matches!(n.op.as_str(), "Attention" | "MatMul"));
    let roundings = if products { ROUNDINGS } else { 0.0 };
    for set in data_sets(dir, &model, &graph)? {
        let inputs: Vec<(&str, Value)> =
            graph.inputs.iter().zip(set.inputs).map(|(p, v)| (p.name.as_str(), v)).collect();
        // Twice: the second run takes the specialised plan.
        for pass in ["", "second run: "] {
            let got = plan.run_typed(&inputs, &[], device, &mut |_, _| {})?;
            for ((port, got), want) in graph.outputs.iter().zip(&got).zip(&set.outputs) {
                compare(got, want, port.dtype, roundings).with_context(|| format!("{pass}output `{}`", port.name))?;
            }
        }
    }
    Ok(())
}

fn compare(got: &Value, want: &Value, dtype: Option<DType>, roundings: f64) -> Result<()> {
    match (got, want) {
        (Value::Nothing, Value::Nothing) => Ok(()),
        (Value::Sequence(a), Value::Sequence(b)) => {
            if a.len() != b.len() {
                return Err(Error::mismatch(format!("a sequence of {}, expected {}", a.len(), b.len())));
            }
            a.iter()
                .zip(b.iter())
                .enumerate()
                .try_for_each(|(i, (a, b))| compare(a, b, None, roundings).with_context(|| format!("element {i}")))
        }
        _ => compare_tensors(got.tensor(Device::Cpu)?, want.tensor(Device::Cpu)?, dtype, roundings),
    }
}

fn compare_tensors(got: &Tensor, want: &Tensor, dtype: Option<DType>, roundings: f64) -> Result<()> {
    if got.kind() != want.kind() {
        return Err(Error::mismatch(format!("element type {:?}, expected {:?}", got.kind(), want.kind())));
    }
    if got.size() != want.size() {
        return Err(Error::mismatch(format!("shape {:?}, expected {:?}", got.size(), want.size())));
    }
    let (mut got, want) = (convert::to_host(got)?, convert::to_host(want)?);
    // Unsigned types wider than a byte live in 64-bit integers; their own width counts.
    if let Some(d @ (DType::U16 | DType::U32 | DType::U64)) = dtype {
        got = got.cast(d);
        return match_values(&got, &want.cast(d), 0.0);
    }
    match_values(&got, &want, roundings)
}

fn match_values(got: &HostTensor, want: &HostTensor, roundings: f64) -> Result<()> {
    let (rtol, atol) = TOLERANCE;
    let (g, w) = (got.to_f64(), want.to_f64());
    let bits = match want.dtype() {
        DType::F16 => 10,
        DType::BF16 => 7,
        _ => 52,
    };
    // Of a number in this element type.
    let unit = |v: f64| if v == 0.0 { 0.0 } else { (v.abs().log2().floor() - f64::from(bits)).exp2() };
    let allowed = |b: f64| (atol + rtol * b.abs()).max(roundings * unit(b));
    let differs = |a: f64, b: f64| !(a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= allowed(b));
    let bad: Vec<usize> = (0..w.len()).filter(|&i| differs(g[i], w[i])).collect();
    match bad.first() {
        None => Ok(()),
        Some(&i) => Err(Error::mismatch(format!(
            "{} of {} values differ, the first at {i}: {} instead of {}",
            bad.len(),
            w.len(),
            g[i],
            w[i]
        ))),
    }
}
