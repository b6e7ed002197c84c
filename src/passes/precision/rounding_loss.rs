//! Nodes that lose what 16 bits do not hold: where their inputs are rounded, their result is off by far more than a rounding.
//! The sine of a large angle does (a time embedding reaches thousands, and f16 knows one number in two there), and so does a
//! difference of nearly equal values. Such a node stays in f32, and so does what leads to it, until its result holds.
//!
//! Every node is looked at by itself: a copy of it reads rounded inputs beside the node that reads them as they are, in one
//! run of the f32 network, of which only the sums of squares are kept.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::error::Result;
use crate::onnx::{GraphProto, ModelProto, NodeProto};
use crate::tensor::DType;

use crate::graph::edit;
use crate::graph::edit::int_attribute;
use crate::graph::op_schema;
use crate::passes::evaluate;
use crate::passes::evaluate::Inputs;

/// How many roundings a result may be off by (relative L2): a chain of a few hundred nodes stays below 2e-2 in f16.
const ROUNDINGS: f64 = 20.0;
/// How far back from a node its inputs may be kept.
const STEPS: usize = 8;

/// Half the distance between neighbouring numbers around 1.
fn rounding(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 2f64.powi(-8) } else { 2f64.powi(-11) }
}

/// The nodes (indices, of those in `half`) to keep in f32, with the reason. `types` as from [`evaluate::dtypes`].
pub fn find(
    model: &ModelProto,
    dtype: DType,
    types: &HashMap<String, DType>,
    half: &HashSet<usize>,
    calibration: &[Inputs],
) -> Result<BTreeMap<usize, String>> {
    let mut kept = BTreeMap::new();
    let Some(graph) = &model.graph else { return Ok(kept) };
    let makers: HashMap<&str, usize> =
        graph.node.iter().enumerate().flat_map(|(k, n)| n.output.iter().map(move |o| (o.as_str(), k))).collect();
    let mut half = half.clone();
    // Each node with those before it that its copy computes anew from rounded values.
    let mut regions: Vec<Region> = (0..graph.node.len())
        .filter(|&k| measured(&graph.node[k], types))
        .map(|k| Region { node: k, members: BTreeSet::from([k]) })
        .collect();
    for _ in 0..STEPS {
        let errors = errors(model, dtype, types, &half, &makers, &regions, calibration)?;
        let limit = ROUNDINGS * rounding(dtype);
        let mut off: Vec<Region> = Vec::new();
        for (mut region, error) in regions.into_iter().zip(errors) {
            if !(error > limit) {
                continue;
            }
            let node = &graph.node[region.node];
            let before: Vec<usize> = region
                .members
                .iter()
                .flat_map(|&m| &graph.node[m].input)
                .filter(|v| types.get(*v) == Some(&DType::F32))
                .filter_map(|v| makers.get(v.as_str()).copied())
                .filter(|m| !edit::has_subgraph(&graph.node[*m]))
                .collect();
            let known = region.members.len();
            region.members.extend(before);
            let mut newly = region.members.len() > known;
            for &m in &region.members {
                if half.remove(&m) {
                    newly = true;
                    let what = format!("{} is off by {error:.1e} where what it reads is in {dtype}", edit::label(node));
                    kept.insert(m, what);
                }
            }
            if newly {
                off.push(region);
            }
        }
        if off.is_empty() {
            break;
        }
        regions = off;
    }
    Ok(kept)
}

struct Region {
    node: usize,
    members: BTreeSet<usize>,
}

/// Whether a node computes with floats: what only moves or casts them is off by one rounding at most.
fn measured(n: &NodeProto, types: &HashMap<String, DType>) -> bool {
    let float = |v: &String| types.get(v) == Some(&DType::F32);
    let computes = op_schema::find(n.domain(), n.op_type()).is_none_or(|row| !row.computes_nothing());
    computes
        && matches!(n.domain(), "" | "ai.onnx")
        && !edit::has_subgraph(n)
        && n.input.iter().any(float)
        && n.output.iter().any(float)
}

/// The relative L2 error of each region's node over the calibration inputs; 0 where nothing that it reads is rounded.
fn errors(
    model: &ModelProto,
    dtype: DType,
    types: &HashMap<String, DType>,
    half: &HashSet<usize>,
    makers: &HashMap<&str, usize>,
    regions: &[Region],
    calibration: &[Inputs],
) -> Result<Vec<f64>> {
    let mut watched = model.clone();
    let (Some(source), Some(graph)) = (&model.graph, watched.graph.as_mut()) else { return Ok(Vec::new()) };
    let mut shadows = Shadows { graph, dtype, rounded: HashSet::new() };
    let mut names = Vec::new();
    // By region, where its figures are among the names.
    let mut places: Vec<Vec<usize>> = Vec::with_capacity(regions.len());
    for (r, region) in regions.iter().enumerate() {
        let inside = |v: &str| makers.get(v).is_some_and(|m| region.members.contains(m));
        let mut rounds = false;
        let mut copies = Vec::new();
        for &m in &region.members {
            let mut copy = source.node[m].clone();
            for v in copy.input.iter_mut().filter(|v| !v.is_empty()) {
                if inside(v) {
                    *v = shadow(r, v);
                } else if types.get(v.as_str()) == Some(&DType::F32)
                    && (half.contains(&m) || makers.get(v.as_str()).is_some_and(|k| half.contains(k)))
                {
                    rounds = true;
                    *v = shadows.rounded(v);
                }
            }
            for v in copy.output.iter_mut().filter(|v| !v.is_empty()) {
                *v = shadow(r, v);
            }
            copy.name = Some(format!("disback/loss/{r}/{m}"));
            copies.push(copy);
        }
        let mut at = Vec::new();
        if rounds {
            shadows.graph.node.append(&mut copies);
            for v in source.node[region.node].output.iter().filter(|v| types.get(*v) == Some(&DType::F32)) {
                at.push(names.len());
                names.extend(shadows.compare(v, &shadow(r, v)));
            }
        }
        places.push(at);
    }
    let runs = evaluate::values(&watched, &names, calibration)?;
    let total = |k: usize| -> f64 {
        runs.iter().filter_map(|run| run.get(&names[k])).filter_map(|t| t.to_f64().first().copied()).sum()
    };
    let relative = |k: usize| {
        let (apart, size) = (total(k), total(k + 1));
        // Nothing but zeros, or what is not finite and found by its range.
        if apart.is_finite() && size > 0.0 { (apart / size).sqrt() } else { 0.0 }
    };
    Ok(places.into_iter().map(|at| at.into_iter().map(relative).fold(0.0, f64::max)).collect())
}

/// A value as computed from rounded inputs.
fn shadow(region: usize, value: &str) -> String {
    format!("disback/loss/{region}/{value}")
}

/// Writes the copies behind the network's own nodes.
struct Shadows<'a> {
    graph: &'a mut GraphProto,
    dtype: DType,
    rounded: HashSet<String>,
}

impl Shadows<'_> {
    /// The value rounded to 16 bits, in f32.
    fn rounded(&mut self, value: &str) -> String {
        let name = format!("disback/loss/rounded/{value}");
        if self.rounded.insert(value.to_owned()) {
            let low = format!("disback/loss/low/{value}");
            for (from, to, dtype) in [(value, low.as_str(), self.dtype), (&low, &name, DType::F32)] {
                let mut n = edit::node("Cast", &[from], to);
                n.attribute.push(int_attribute("to", i64::from(dtype.to_onnx())));
                self.graph.node.push(n);
            }
        }
        name
    }

    /// Adds the sums of squares of the difference and of the value; their names.
    fn compare(&mut self, value: &str, shadow: &str) -> [String; 2] {
        let [apart, error, size] = ["apart", "error", "size"].map(|what| format!("{shadow}/{what}"));
        self.graph.node.push(edit::node("Sub", &[shadow, value], &apart));
        for (from, to) in [(apart.as_str(), &error), (value, &size)] {
            let mut n = edit::node("ReduceSumSquare", &[from], to);
            n.attribute.push(int_attribute("keepdims", 0));
            self.graph.node.push(n);
        }
        [error, size]
    }
}
