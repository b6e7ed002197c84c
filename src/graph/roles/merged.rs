//! One tensor where the framework has several weights, and several tensors where it has one: what exporters do to files,
//! undone for training and remembered for writing back.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::tables::{made_up, uniform};
use crate::error::Result;
use crate::graph::attributes::{Attribute, Attributes};
use crate::graph::ir::{Constant, Graph, Node, Origin, ValueId};
use crate::graph::op_schema::{self, OpSchema};
use crate::graph::subgraphs;
use crate::tensor::{DType, HostTensor};

/// Another tensor of the file, folded from the same weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Twin {
    /// Where the other tensor lies in the file, so that it can be written back too.
    pub origin: Origin,
    /// How the other tensor is computed from the weight.
    pub how: Derived,
}

/// Where the tensors of a graph come from, beyond [`Origin`].
#[derive(Debug, Clone, Default)]
pub struct Provenance {
    /// For each parted copy: the nodes (index in the file) and slots that it feeds now.
    pub rewired: HashMap<ValueId, Vec<(usize, usize)>>,
    /// For each tied weight: the tensors folded from it.
    pub twins: HashMap<ValueId, Vec<Twin>>,
}

/// Parts what was merged and ties what was doubled. Tensors that `declared`, the framework's own list, names stay as they
/// are: a converter that writes it has kept apart what the framework keeps apart.
pub fn untangle(graph: &mut Graph, declared: Option<&[String]>) -> Provenance {
    subgraphs::lift(graph);
    bypass_identities(graph);
    let declared: HashSet<&str> = declared.into_iter().flatten().map(String::as_str).collect();
    let twins = tie_derived(graph, &declared);
    Provenance { rewired: part_merged(graph, &declared), twins }
}

/// Parts constants that an exporter merged because their bytes were equal: freshly initialised scales (all ones) and
/// biases (all zeros) of different layers are different weights. Tensors with any two different elements stay shared:
/// equal by design, not by accident; and so does what one and the same layer of torch reads again.
fn part_merged(graph: &mut Graph, declared: &HashSet<&str>) -> HashMap<ValueId, Vec<(usize, usize)>> {
    let consumers = graph.consumers();
    let mut rewired = HashMap::new();
    let shared: Vec<(ValueId, Constant)> = graph
        .constants
        .iter()
        .filter(|(v, c)| {
            c.tensor.dtype().is_float()
                && c.tensor.len() > 1
                && consumers.get(v).is_some_and(|u| u.len() > 1)
                && uniform(&c.tensor)
                && !declared.contains(graph.names[**v].as_str())
        })
        .map(|(v, c)| (*v, c.clone()))
        .collect();
    if shared.is_empty() {
        return rewired;
    }
    let mut taken: HashSet<String> = graph.names.iter().cloned().collect();
    for (value, constant) in shared {
        let mut copies = 1;
        // Which copy a layer reads, and which one feeds a layer called twice. The first reader keeps the original.
        let mut of_layer: HashMap<String, ValueId> = HashMap::new();
        for (k, &(node, slot)) in consumers.get(&value).unwrap_or_default().iter().enumerate() {
            if node == usize::MAX || slot == usize::MAX {
                continue;
            }
            let layer = layer_of(&graph.nodes[node]).map(|l| format!("{l} {slot}"));
            if let Some(&copy) = layer.as_ref().and_then(|l| of_layer.get(l)) {
                if copy != value
                    && let Some(origin) = graph.nodes[node].origin
                {
                    graph.nodes[node].inputs[slot] = Some(copy);
                    rewired.entry(copy).or_insert_with(Vec::new).push((origin, slot));
                }
                continue;
            }
            let mut copy = value;
            if k > 0 {
                let Some(origin) = graph.nodes[node].origin else { continue };
                copy = graph.names.len();
                let name = loop {
                    copies += 1;
                    let name = format!("{}#{copies}", graph.names[value]);
                    if taken.insert(name.clone()) {
                        break name;
                    }
                };
                graph.names.push(name);
                graph.constants.insert(copy, constant.clone());
                graph.nodes[node].inputs[slot] = Some(copy);
                rewired.insert(copy, vec![(origin, slot)]);
            }
            if let Some(layer) = layer {
                of_layer.insert(layer, copy);
            }
        }
    }
    rewired
}

/// Path of the module that a layer is, where the exporter says it: the same for every call of one module.
fn layer_of(node: &Node) -> Option<String> {
    let layer = op_schema::of(node).is_some_and(OpSchema::is_module);
    // "['', 'net', 'net.norm@1', 'layer_norm_3']": the last is the call, `@1` its second time.
    let (path, _call) = node.module.as_ref().filter(|_| layer)?.rsplit_once(", ")?;
    Some(path.split('@').map(|p| p.trim_start_matches(|c: char| c.is_ascii_digit())).collect())
}

/// Reads constants directly instead of through Identity: the legacy exporter writes one for each layer that shares a
/// merged tensor.
fn bypass_identities(graph: &mut Graph) {
    let outputs: HashSet<ValueId> = graph.outputs.iter().map(|p| p.value).collect();
    let mut alias: HashMap<ValueId, ValueId> = HashMap::new();
    graph.nodes.retain(|n| match (n.is("Identity"), n.input(0), n.output(0)) {
        (true, Some(from), Some(to)) if !outputs.contains(&to) => {
            let from = alias.get(&from).copied().unwrap_or(from);
            let constant = graph.constants.contains_key(&from);
            if constant {
                alias.insert(to, from);
            }
            !constant
        }
        _ => true,
    });
    for node in &mut graph.nodes {
        for v in node.inputs.iter_mut().flatten().chain(node.captures.iter_mut().map(|(_, v)| v)) {
            if let Some(from) = alias.get(v) {
                *v = *from;
            }
        }
    }
}

/// What an exporter that folds constants makes of a weight that is also read as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Derived {
    /// Before a MatMul: an embedding that the last layer shares.
    Transposed,
    /// `w * w`, as demodulation and variances read it.
    Squared,
    /// `w * w`, transposed.
    SquaredTransposed,
    /// The same elements in the same order, with other dimensions of 1: one kernel of a stack of one.
    Reshaped,
}

impl Derived {
    /// The tensor made of a weight in the file's element type.
    ///
    /// Errors: a transposition of what is no matrix.
    pub fn of(self, weight: &HostTensor) -> Result<HostTensor> {
        match self {
            // What is written is the elements; the tensor in the file has its own shape.
            Self::Reshaped => Ok(weight.clone()),
            Self::Transposed => weight.transposed(),
            Self::Squared => squared(weight),
            Self::SquaredTransposed => squared(weight)?.transposed(),
        }
    }
}

/// Ties a weight to the tensors that were folded from it. Those become operators on the original again: Transpose, Mul.
///
/// Only what the exporter made, going by its name: two weights with names of their own are two weights. A square may be one of
/// a tensor that has lost its name itself.
fn tie_derived(graph: &mut Graph, declared: &HashSet<&str>) -> HashMap<ValueId, Vec<Twin>> {
    let folded = |v: ValueId| {
        let name = graph.names[v].as_str();
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('_');
        const STEMS: &[&str] = &["mul", "pow", "square", "t", "numpy_t", "transpose", "permute", "select", "squeeze"];
        made_up(name) || STEMS.contains(&stem)
    };
    let mut originals: BTreeMap<&[usize], Vec<ValueId>> = BTreeMap::new();
    let mut stacked: BTreeMap<Vec<usize>, Vec<ValueId>> = BTreeMap::new();
    let mut copies: Vec<ValueId> = Vec::new();
    for (v, c) in &graph.constants {
        if !c.tensor.dtype().is_float() || c.tensor.len() < 2 || c.tensor.shape().contains(&1) && c.tensor.rank() == 2 {
            continue;
        }
        originals.entry(c.tensor.shape()).or_default().push(*v);
        stacked.entry(beyond_one(c.tensor.shape())).or_default().push(*v);
        if folded(*v) && !declared.contains(graph.names[*v].as_str()) {
            copies.push(*v);
        }
    }
    copies.sort_unstable();
    let mut pairs: Vec<(ValueId, ValueId, Derived)> = Vec::new();
    for copy in copies {
        let tensor = &graph.constants[&copy].tensor;
        let mut swapped = tensor.shape().to_vec();
        swapped.reverse();
        let like = |shape: &[usize], how: &'static [Derived]| {
            let those = originals.get(shape).into_iter().flatten();
            those.flat_map(move |&o| how.iter().map(move |&d| (o, d))).collect::<Vec<_>>()
        };
        let mut candidates = like(tensor.shape(), &[Derived::Squared]);
        if tensor.rank() == 2 {
            candidates.extend(like(&swapped, &[Derived::Transposed, Derived::SquaredTransposed]));
        }
        let same = stacked.get(&beyond_one(tensor.shape())).into_iter().flatten();
        candidates.extend(same.filter(|&&o| o != copy).map(|&o| (o, Derived::Reshaped)));
        let fits = |(original, how): &(ValueId, Derived)| {
            (!matches!(how, Derived::Transposed | Derived::Reshaped) || !folded(*original))
                && !pairs.iter().any(|(o, c, _)| c == original || *o == copy)
                && is_derived(&graph.constants[original].tensor, tensor, *how)
        };
        if let Some((original, how)) = candidates.into_iter().find(fits) {
            pairs.push((original, copy, how));
        }
    }
    let mut twins: HashMap<ValueId, Vec<Twin>> = HashMap::new();
    for (original, copy, how) in pairs {
        let Some(constant) = graph.constants.remove(&copy) else { continue };
        twins.entry(original).or_default().push(Twin { origin: constant.origin.clone(), how });
        let name = graph.names[original].clone();
        let mut made = Vec::new();
        let mut source = original;
        if how == Derived::Reshaped {
            let ones =
                |t: &HostTensor| (0..t.rank() as i64).filter(|&k| t.shape()[k as usize] == 1).collect::<Vec<_>>();
            let axes = |axes: Vec<i64>| [("axes".to_owned(), Attribute::Ints(axes))].into();
            // In the form of opset 11, which has the axes as an attribute.
            let plain = graph.add_value(&format!("{name}/squeezed"));
            let from = ones(&graph.constants[&original].tensor);
            let to = ones(&constant.tensor);
            made.push(operator("Squeeze", 11, &format!("{name}/squeezed"), &[original], plain, axes(from)));
            made.push(operator("Unsqueeze", 11, &format!("{name}/reshaped"), &[plain], copy, axes(to)));
            graph.nodes.splice(0..0, made);
            continue;
        }
        if how != Derived::Transposed {
            let square = if how == Derived::Squared { copy } else { graph.add_value(&format!("{name}/squared")) };
            made.push(operator("Mul", 14, &format!("{name}/squared"), &[source, source], square, BTreeMap::new()));
            source = square;
        }
        if how != Derived::Squared {
            let perm = [("perm".to_owned(), Attribute::Ints(vec![1, 0]))].into();
            made.push(operator("Transpose", 13, &format!("{name}/transposed"), &[source], copy, perm));
        }
        graph.nodes.splice(0..0, made);
    }
    twins
}

/// The dimensions that are not 1.
fn beyond_one(shape: &[usize]) -> Vec<usize> {
    shape.iter().copied().filter(|&d| d != 1).collect()
}

fn operator(
    op: &str,
    opset: i64,
    name: &str,
    inputs: &[ValueId],
    output: ValueId,
    attributes: BTreeMap<String, Attribute>,
) -> Node {
    Node {
        op: op.to_owned(),
        domain: String::new(),
        name: name.to_owned(),
        opset,
        inputs: inputs.iter().map(|&v| Some(v)).collect(),
        outputs: vec![Some(output)],
        attributes: Attributes::new(attributes),
        captures: Vec::new(),
        origin: None,
        module: None,
    }
}

/// Each element times itself, rounded as its type rounds.
fn squared(t: &HostTensor) -> Result<HostTensor> {
    // The product of two narrower numbers is exact in f32 or rounded as f32 rounds it.
    let square = |x: f64| if t.dtype() == DType::F64 { x * x } else { f64::from(x as f32 * x as f32) };
    let values: Vec<f64> = t.to_f64().into_iter().map(square).collect();
    Ok(HostTensor::new(t.shape(), &values)?.cast(t.dtype()))
}

/// Whether `b` was made of `a`, bit for bit; a few elements are looked at first.
fn is_derived(a: &HostTensor, b: &HostTensor, how: Derived) -> bool {
    if a.dtype() != b.dtype() || a.len() != b.len() || uniform(a) {
        return false;
    }
    let size = a.dtype().size();
    let element = |t: &HostTensor, i: usize| t.bytes().slice(i * size..(i + 1) * size);
    // Of element (i, j) of `a` the place in `b`.
    let columns = a.shape().last().copied().unwrap_or(1).max(1);
    let rows = a.len() / columns;
    let in_place = matches!(how, Derived::Squared | Derived::Reshaped);
    let place = |i: usize| if in_place { i } else { i % columns * rows + i / columns };
    let made = |i: usize| {
        let own = element(a, i);
        if matches!(how, Derived::Transposed | Derived::Reshaped) {
            return Some(own);
        }
        let one = HostTensor::from_bytes(a.dtype(), vec![1], own).ok()?;
        squared(&one).ok().map(|s| s.bytes().clone())
    };
    let same = |i: usize| made(i).is_some_and(|m| m == element(b, place(i)));
    // Zeros and ones are their own squares: a mask is not the square of a mask.
    let tells = |i: usize| {
        matches!(how, Derived::Transposed | Derived::Reshaped) || made(i).is_some_and(|m| m != element(a, i))
    };
    let few = |k: usize| k * 7919 % a.len();
    (0..16).all(|k| same(few(k))) && (0..16).any(|k| tells(few(k))) && how.of(a).is_ok_and(|m| m.bytes() == b.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_copy_is_known_bit_for_bit() {
        let a = HostTensor::new(&[2, 3], &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let b = HostTensor::new(&[3, 2], &[1f32, 4.0, 2.0, 5.0, 3.0, 6.0]).unwrap();
        let c = HostTensor::new(&[3, 2], &[1f32, 4.0, 2.0, 5.0, 3.0, 6.5]).unwrap();
        assert!(is_derived(&a, &b, Derived::Transposed));
        assert!(!is_derived(&a, &c, Derived::Transposed));
    }

    #[test]
    fn a_square_is_known_in_every_type_and_a_mask_is_none() {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let w = HostTensor::new(&[2, 3], &[0.1f64, -0.7, 1.3, 0.01, 3.1, -2.2]).unwrap().cast(dtype);
            for how in [Derived::Squared, Derived::SquaredTransposed] {
                let made = how.of(&w).unwrap();
                assert!(is_derived(&w, &made, how), "{dtype}");
                assert!(!is_derived(&made, &w, how), "{dtype}");
            }
        }
        let mask = HostTensor::new(&[4], &[0f32, 1.0, 1.0, 0.0]).unwrap();
        assert!(!is_derived(&mask, &mask, Derived::Squared));
    }
}
