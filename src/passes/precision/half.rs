//! A student in 16 bits: which nodes can be computed so, the graph rewritten, the result checked.
//!
//! Inputs and outputs of the file stay f32. Which node stays in f32 is decided by a policy (sums over many values and
//! functions that blow up small errors, as automatic mixed precision has it), by what ONNX allows, and by what calibration
//! inputs show: values that would overflow, and nodes that would lose precision; the list is part of the report.

use std::collections::{HashMap, HashSet};

use globset::{Glob, GlobSet, GlobSetBuilder};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::graph::{op_schema, tensors};
use crate::onnx::{ModelProto, NodeProto};
use crate::tensor::{DType, HostTensor};

use crate::graph::edit;
use crate::passes::evaluate;
use crate::passes::evaluate::Inputs;
use crate::passes::precision::calibrate;
use crate::passes::precision::calibrate::Range;
use crate::passes::precision::half_rewrite::{Form, rewrite};
use crate::passes::precision::rounding_loss;
use crate::passes::simplify::constants_to_initializers;

/// Largest finite f16.
const F16_MAX: f64 = 65504.0;
/// Calibration sees a few images; other noise may go this much further.
const HEADROOM: f64 = 4.0;
/// Tries to find the nodes that break in 16 bits.
const TRIES: usize = 12;

/// A node that stays in f32.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// The node, with its operator, as errors and tables name it.
    pub node: String,
    /// The operator's name, such as `Softmax`.
    pub operator: String,
    /// Why it stays in f32, in words for the user.
    pub reason: String,
}

/// What the conversion to 16 bits did.
#[derive(Debug, Clone, Serialize)]
pub struct Converted {
    /// Nodes computed in 16 bits.
    pub nodes: usize,
    /// The nodes that stay in f32, with their reasons.
    pub kept: Vec<Kept>,
    /// Largest difference of the sample to the f32 network's over the calibration inputs.
    pub max_abs: f64,
    /// How `max_abs` was measured, in words for the user.
    pub checked: String,
}

/// Converts in place. `dtype` is f16 or bf16; `keep` are globs of node names that stay in f32.
///
/// Errors: a network that gives NaN in f32 already, or in 16 bits whatever is kept.
pub fn to_half(model: &mut ModelProto, dtype: DType, keep: &[String], calibration: &[Inputs]) -> Result<Converted> {
    let globs = globs(keep)?;
    if let Some(graph) = &model.graph
        && let Some(k) = (0..keep.len()).find(|k| !graph.node.iter().any(|n| globs.matches(n.name()).contains(k)))
    {
        return Err(Error::usage(format!("--keep-f32 {}: no node of the graph has such a name", keep[k]))
            .hint("the report of an export without it names nodes; constants that were folded are no nodes any more"));
    }
    if let Some(graph) = model.graph.as_mut() {
        // Constants in another type are other tensors, as weights are; a node that holds one has no input to cast.
        constants_to_initializers(graph);
    }
    gemm_as_matmul(model)?;
    let types = evaluate::dtypes(model)?;
    let ranges = calibrate::ranges(model, &types, calibration)?;
    let reference = evaluate::samples(model, calibration)?;
    if reference.iter().flat_map(|t| t.to_f32()).any(|v| !v.is_finite()) {
        return Err(Error::mismatch("the network gives NaN or infinity in f32 already, on calibration noise")
            .hint("`disback sample` with the f32 student shows it; a run that diverged cannot be exported"));
    }
    let opset = edit::opset(model);
    let mut plan = Plan::new(model, dtype, opset, &types, &ranges, &globs);
    for (k, reason) in rounding_loss::find(model, dtype, &types, &plan.half, calibration)? {
        plan.half.remove(&k);
        if let Some(n) = model.graph.as_ref().and_then(|g| g.node.get(k)) {
            plan.keep(n, reason);
        }
    }
    for _ in 0..TRIES {
        let converted = rewrite(model, dtype, &types, &plan.half, Form::Stored);
        // ONNX Runtime has no bf16 on the CPU, and computes chains of f16 nodes in f32 there: what an engine that stores f16
        // makes of the network, the same roundings around f32 kernels show.
        let rounded = rewrite(model, dtype, &types, &plan.half, Form::Rounded);
        let how = format!("values rounded to {dtype} after each node, in ONNX Runtime on the CPU");
        let (shown, checked) = match dtype {
            DType::F16 if evaluate::open(&converted).is_ok() => {
                (vec![&converted, &rounded], format!("as it is, and {how}"))
            }
            _ => (vec![&rounded], how),
        };
        let mut max_abs = 0f64;
        let mut worst = shown[0];
        for &form in &shown {
            let found = evaluate::samples(form, calibration)?;
            let apart = found.iter().zip(&reference).map(|(a, b)| evaluate::max_abs(a, b)).fold(0.0, f64::max);
            if apart > max_abs {
                (max_abs, worst) = (apart, form);
            }
        }
        if max_abs.is_finite() {
            let nodes = plan.half.len();
            *model = converted;
            return Ok(Converted { nodes, kept: plan.kept, max_abs, checked });
        }
        let types_now = evaluate::dtypes(worst)?;
        let broken = calibrate::ranges(worst, &types_now, calibration)?;
        if !plan.keep_broken(model, &broken) {
            break;
        }
    }
    Err(Error::mismatch(format!(
        "the network gives NaN or infinity in {dtype} on calibration noise, whatever is kept in f32"
    ))
    .hint(if dtype == DType::F16 { "use --precision bf16 or f32" } else { "use --precision f32" }))
}

/// Gemm as MatMul and Add: tract 0.23 takes no Gemm whose scalars (f32 by definition) meet f16 operands; engines that have a
/// faster Gemm fuse the pair again. Returns how many there were.
pub(crate) fn gemm_as_matmul(model: &mut ModelProto) -> Result<usize> {
    let Some(graph) = model.graph.as_mut() else { return Ok(0) };
    let mut count = 0;
    let index: HashMap<String, usize> =
        graph.initializer.iter().enumerate().map(|(i, t)| (t.name().to_owned(), i)).collect();
    let mut taken = edit::value_names(graph);
    let mut out = Vec::with_capacity(graph.node.len());
    for n in std::mem::take(&mut graph.node) {
        let number = |name: &str| n.attribute.iter().find(|a| a.name() == name).and_then(|a| a.f).unwrap_or(1.0);
        let weight = n.input.get(1).and_then(|i| index.get(i)).copied();
        let plain = edit::is(&n, "Gemm") && number("alpha") == 1.0 && number("beta") == 1.0;
        let (Some(weight), true) = (weight, plain && edit::int(&n, "transA").unwrap_or(0) == 0) else {
            out.push(n);
            continue;
        };
        let mut name = |wanted: String| {
            let name = edit::free_name(&taken, &wanted);
            taken.insert(name.clone());
            name
        };
        let mut b = n.input[1].clone();
        if edit::int(&n, "transB").unwrap_or(0) == 1 {
            let tensor = tensors::from_proto(&graph.initializer[weight])?;
            b = name(format!("{b}/transposed"));
            graph.initializer.push(tensors::to_proto(&b, &transposed(&tensor)?));
        }
        let result = n.output[0].clone();
        let bias = n.input.get(2).filter(|c| !c.is_empty());
        let product = if bias.is_some() { name(format!("{result}/product")) } else { result.clone() };
        count += 1;
        let mut first = edit::node("MatMul", &[&n.input[0], &b], &product);
        first.name.clone_from(&n.name);
        out.push(first);
        if let Some(c) = bias {
            let mut second = edit::node("Add", &[&product, c], &result);
            second.name = Some(format!("{}/bias", n.name()));
            out.push(second);
        }
    }
    graph.node = out;
    edit::remove_dead(graph);
    Ok(count)
}

/// A matrix with rows and columns exchanged.
fn transposed(t: &HostTensor) -> Result<HostTensor> {
    let [rows, columns] = *t.shape() else {
        return Err(Error::invalid(format!("a matrix of shape {:?}", t.shape())));
    };
    let values = t.to_f32();
    let turned: Vec<f32> = (0..rows * columns).map(|k| values[(k % rows) * columns + k / rows]).collect();
    Ok(HostTensor::new(&[columns, rows], &turned)?.cast(t.dtype()))
}

fn globs(patterns: &[String]) -> Result<GlobSet> {
    let mut set = GlobSetBuilder::new();
    for p in patterns {
        set.add(Glob::new(p).map_err(|e| Error::usage(format!("--keep-f32 {p}: {e}")))?);
    }
    set.build().map_err(|e| Error::usage(format!("--keep-f32: {e}")))
}

/// Which nodes go to 16 bits.
struct Plan {
    half: HashSet<usize>,
    kept: Vec<Kept>,
}

impl Plan {
    fn new(
        model: &ModelProto,
        dtype: DType,
        opset: i64,
        types: &HashMap<String, DType>,
        ranges: &HashMap<String, Range>,
        globs: &GlobSet,
    ) -> Self {
        let mut plan = Self { half: HashSet::new(), kept: Vec::new() };
        let Some(graph) = &model.graph else { return plan };
        let outputs: HashSet<&str> = graph.output.iter().map(|o| o.name()).collect();
        let held = edit::constants(graph);
        for (k, n) in graph.node.iter().enumerate() {
            let float = |v: &String| types.get(v) == Some(&DType::F32);
            if !n.input.iter().chain(&n.output).any(float) || matches!(n.op_type(), "Shape" | "Size") {
                continue;
            }
            let row = op_schema::find(n.domain(), n.op_type());
            let bf16_since = row.map_or(13, |row| row.bf16_since);
            let reason = if globs.is_match(n.name()) {
                Some("asked for".to_owned())
            } else if edit::has_subgraph(n) {
                Some("it holds a graph".to_owned())
            } else if !matches!(n.domain(), "" | "ai.onnx") {
                Some(format!("an operator of {}", n.domain()))
            } else if n.output.iter().any(|o| outputs.contains(o.as_str())) {
                Some("it makes an output of the file, which is f32".to_owned())
            } else if let Some(why) = row.and_then(|row| row.stays_f32) {
                Some(why.to_owned())
            } else if dtype == DType::BF16 && bf16_since > opset {
                Some(match bf16_since {
                    op_schema::NEVER => "ONNX has it for no bf16".to_owned(),
                    since => format!("ONNX has it for bf16 since opset {since}, this is {opset}"),
                })
            } else if dtype == DType::F16 {
                overflow(n, ranges).or_else(|| vanishing(n, &held))
            } else {
                None
            };
            match reason {
                Some(reason) => plan.keep(n, reason),
                None => {
                    plan.half.insert(k);
                }
            }
        }
        plan
    }

    fn keep(&mut self, n: &NodeProto, reason: String) {
        self.kept.push(Kept { node: edit::label(n), operator: n.op_type().to_owned(), reason });
    }

    /// Keeps the first node that makes what is not finite, and those before it, one step further back than is kept already:
    /// what breaks there may have been rounded long before. `false` where none is left to keep.
    fn keep_broken(&mut self, model: &ModelProto, broken: &HashMap<String, Range>) -> bool {
        let Some(graph) = &model.graph else { return false };
        let bad = |v: &String| broken.get(v).is_some_and(|r| r.broken);
        let found = graph.node.iter().position(|n| n.output.iter().any(bad) && !n.input.iter().any(bad));
        let Some(first) = found else { return false };
        let makes: HashMap<&String, usize> =
            graph.node.iter().enumerate().flat_map(|(i, n)| n.output.iter().map(move |o| (o, i))).collect();
        let (mut ring, mut seen) = (vec![first], HashSet::from([first]));
        while !ring.is_empty() {
            let now: Vec<usize> = ring.iter().copied().filter(|i| self.half.remove(i)).collect();
            for &i in &now {
                let what = format!("{} is not finite in 16 bits on calibration noise", edit::label(&graph.node[first]));
                self.keep(&graph.node[i], what);
            }
            if !now.is_empty() {
                return true;
            }
            let before = ring.iter().flat_map(|&i| &graph.node[i].input).filter_map(|v| makes.get(v).copied());
            ring = before.filter(|i| seen.insert(*i)).collect();
        }
        false
    }
}

/// A value near the end of f16's range.
fn overflow(n: &NodeProto, ranges: &HashMap<String, Range>) -> Option<String> {
    let worst = n.input.iter().chain(&n.output).filter_map(|v| ranges.get(v).map(|r| (v, r)));
    let (value, range) = worst.max_by(|a, b| {
        let size = |r: &Range| if r.broken { f64::INFINITY } else { r.max_abs };
        size(a.1).total_cmp(&size(b.1))
    })?;
    if range.broken {
        return Some(format!("`{value}` holds infinities"));
    }
    (range.max_abs * HEADROOM > F16_MAX).then(|| format!("`{value}` reaches {:.3e}, f16 ends at 65504", range.max_abs))
}

/// A single constant that f16 would round to zero: the epsilon under a root.
fn vanishing(n: &NodeProto, held: &HashMap<String, &crate::onnx::TensorProto>) -> Option<String> {
    n.input.iter().find_map(|i| {
        let t = tensors::from_proto(held.get(i)?).ok().filter(|t| t.len() == 1 && t.dtype() == DType::F32)?;
        let v = t.to_f32()[0];
        (v != 0.0 && half::f16::from_f32(v).to_f32() == 0.0).then(|| format!("the constant `{i}` = {v:e} is 0 in f16"))
    })
}
