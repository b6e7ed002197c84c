//! One tensor where the framework has several weights, and several tensors where it has one: what exporters do to files,
//! undone for training and remembered for writing back.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::tables::{made_up, uniform};
use crate::graph::attributes::{Attribute, Attributes};
use crate::graph::bodies;
use crate::graph::ir::{Constant, Graph, Node, Origin, ValueId};
use crate::tensor::HostTensor;

/// Another tensor of the file that holds the same weight, transposed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Twin {
    pub origin: Origin,
}

/// Where the tensors of a graph come from, beyond [`Origin`].
#[derive(Debug, Clone, Default)]
pub struct Provenance {
    /// For each parted copy: the nodes (index in the file) and slots that it feeds now.
    pub rewired: HashMap<ValueId, Vec<(usize, usize)>>,
    /// For each tied weight: its other tensors.
    pub twins: HashMap<ValueId, Vec<Twin>>,
}

/// Parts what was merged and ties what was doubled. Tensors that `declared`, the framework's own list, names stay as they
/// are: a converter that writes it has kept apart what the framework keeps apart.
pub fn untangle(graph: &mut Graph, declared: Option<&[String]>) -> Provenance {
    bodies::lift(graph);
    bypass_identities(graph);
    let declared: HashSet<&str> = declared.into_iter().flatten().map(String::as_str).collect();
    let twins = tie_transposed(graph, &declared);
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
    let mut taken: HashSet<String> = graph.names.iter().cloned().collect();
    for (value, constant) in shared {
        let mut copies = 1;
        // Which copy a layer reads, and which one feeds a layer called twice. The first reader keeps the original.
        let mut of_layer: HashMap<String, ValueId> = HashMap::new();
        for (k, &(node, slot)) in consumers[&value].iter().enumerate() {
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
    const LAYERS: &[&str] = &[
        "LayerNormalization",
        "GroupNormalization",
        "RMSNormalization",
        "InstanceNormalization",
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "Gemm",
    ];
    // "['', 'net', 'net.norm@1', 'layer_norm_3']": the last is the call, `@1` its second time.
    let (path, _call) = node.module.as_ref().filter(|_| LAYERS.contains(&node.op.as_str()))?.rsplit_once(", ")?;
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

/// Ties a matrix to its transposed copy: exporters that fold the Transpose before a MatMul double a weight that is also read
/// as it is (an embedding that the last layer shares). The copy becomes a Transpose of the original again.
fn tie_transposed(graph: &mut Graph, declared: &HashSet<&str>) -> HashMap<ValueId, Vec<Twin>> {
    let mut by_shape: BTreeMap<[usize; 2], Vec<ValueId>> = BTreeMap::new();
    for (v, c) in &graph.constants {
        if let [rows, columns] = *c.tensor.shape()
            && c.tensor.dtype().is_float()
            && rows > 1
            && columns > 1
        {
            by_shape.entry([rows, columns]).or_default().push(*v);
        }
    }
    let mut pairs: Vec<(ValueId, ValueId)> = Vec::new();
    let mut taken: HashSet<ValueId> = HashSet::new();
    for ([rows, columns], copies) in &by_shape {
        let Some(originals) = by_shape.get(&[*columns, *rows]) else { continue };
        for &copy in copies {
            // Only where the exporter made the copy: two weights with names of their own are two weights.
            let name = &graph.names[copy];
            if !made_up(name) || declared.contains(name.as_str()) || taken.contains(&copy) {
                continue;
            }
            let original = originals.iter().copied().find(|&o| {
                o != copy
                    && !taken.contains(&o)
                    && !made_up(&graph.names[o])
                    && transposed(&graph.constants[&o].tensor, &graph.constants[&copy].tensor)
            });
            if let Some(original) = original {
                taken.insert(copy);
                pairs.push((original, copy));
            }
        }
    }
    let mut twins: HashMap<ValueId, Vec<Twin>> = HashMap::new();
    for (original, copy) in pairs {
        let Some(constant) = graph.constants.remove(&copy) else { continue };
        twins.entry(original).or_default().push(Twin { origin: constant.origin });
        let node = Node {
            op: "Transpose".to_owned(),
            domain: String::new(),
            name: format!("{}/transposed", graph.names[original]),
            opset: 13,
            inputs: vec![Some(original)],
            outputs: vec![Some(copy)],
            attributes: Attributes::new([("perm".to_owned(), Attribute::Ints(vec![1, 0]))].into()),
            captures: Vec::new(),
            origin: None,
            module: None,
        };
        graph.nodes.insert(0, node);
    }
    twins
}

/// Whether `b` is `a` transposed, bit for bit; a few elements are looked at first.
fn transposed(a: &HostTensor, b: &HostTensor) -> bool {
    let &[rows, columns] = a.shape() else { return false };
    if a.dtype() != b.dtype() || uniform(a) {
        return false;
    }
    let size = a.dtype().size();
    let (x, y) = (a.bytes(), b.bytes());
    let same = |i: usize, j: usize| {
        let (p, q) = ((i * columns + j) * size, (j * rows + i) * size);
        x[p..p + size] == y[q..q + size]
    };
    (0..16).all(|k| same(k * 7919 % rows, k * 104_729 % columns)) && (0..rows).all(|i| (0..columns).all(|j| same(i, j)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_copy_is_known_bit_for_bit() {
        let a = HostTensor::new(&[2, 3], &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let b = HostTensor::new(&[3, 2], &[1f32, 4.0, 2.0, 5.0, 3.0, 6.0]).unwrap();
        let c = HostTensor::new(&[3, 2], &[1f32, 4.0, 2.0, 5.0, 3.0, 6.5]).unwrap();
        assert!(transposed(&a, &b));
        assert!(!transposed(&a, &c));
    }
}
