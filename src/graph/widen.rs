//! Half precision to f32: a network stored in f16 or bf16 is trained in f32, from f32 master weights. Gradients in f16
//! underflow, and activations overflow.
//!
//! What a file rounds on purpose before its first layer stays rounded: a Cast of time features to f16 is one to the grid of
//! f16 here too. (ONNX Runtime computes a chain of f16 operators in f32 on the CPU as well, and rounds at such Casts.) A Cast
//! of what the file has in half precision already rounds nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use crate::graph::attributes::{Attribute, Attributes};
use crate::graph::ir::{Graph, Node, ValueId};
use crate::graph::roles::layers::Flow;
use crate::tensor::{DType, HostTensor};

fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// Rewrites the graph in place; whether anything in it was in half precision.
pub fn widen(graph: &mut Graph) -> bool {
    if !any_half(graph) {
        return false;
    }
    let rounding = rounding(graph);
    // Inputs in half precision, and what is rounded before the first layer: the f32 form of each.
    let mut forms: HashMap<ValueId, ValueId> = HashMap::new();
    let mut nodes = Vec::with_capacity(graph.nodes.len());
    let narrow: Vec<ValueId> = graph.inputs.iter().filter(|p| p.dtype.is_some_and(is_half)).map(|p| p.value).collect();
    for v in narrow {
        nodes.push(form(graph, v, &mut forms));
    }
    let rounds = |n: &Node| n.output(0).is_some_and(|v| rounding.contains(&v));
    for mut node in std::mem::take(&mut graph.nodes) {
        for v in node.inputs.iter_mut().flatten().chain(node.captures.iter_mut().map(|(_, v)| v)) {
            *v = forms.get(v).copied().unwrap_or(*v);
        }
        if rounds(&node) {
            let made = node.output(0).expect("checked by `rounds`");
            nodes.push(node);
            nodes.push(form(graph, made, &mut forms));
        } else {
            widen_attributes(&mut node);
            nodes.push(node);
        }
    }
    graph.nodes = nodes;
    widen_tensors(graph);
    for port in &mut graph.outputs {
        port.value = forms.get(&port.value).copied().unwrap_or(port.value);
    }
    true
}

/// Results of the Casts to half precision that still round in f32: those of wider values before the first layer.
pub fn rounding(graph: &Graph) -> HashSet<ValueId> {
    let features = Flow::new(graph).features;
    let constants = graph.constants.iter().filter(|(_, c)| is_half(c.tensor.dtype())).map(|(&v, _)| v);
    let inputs = graph.inputs.iter().filter(|p| p.dtype.is_some_and(is_half)).map(|p| p.value);
    // Values that the file has in half precision.
    let mut narrow: HashSet<ValueId> = constants.chain(inputs).collect();
    let mut rounding = HashSet::new();
    for n in &graph.nodes {
        let reads_narrow = n.inputs.iter().flatten().any(|v| narrow.contains(v));
        let made = match n.op.as_str() {
            "Cast" => casts_to_half(n),
            "CastLike" => n.input(1).is_some_and(|v| narrow.contains(&v)),
            "Shape" | "Size" | "ArgMax" | "ArgMin" | "NonZero" => false,
            _ => reads_narrow,
        };
        if made {
            narrow.extend(n.outputs.iter().flatten());
        }
        if casts_to_half(n) && !reads_narrow {
            rounding.extend(n.output(0).filter(|v| !features.contains(v)));
        }
    }
    rounding
}

fn any_half(graph: &Graph) -> bool {
    let subgraphs = |n: &Node| n.attributes.iter().any(|(_, a)| matches!(a, Attribute::Graph(g) if any_half(g)));
    graph.constants.values().any(|c| is_half(c.tensor.dtype()))
        || graph.inputs.iter().any(|p| p.dtype.is_some_and(is_half))
        || graph.nodes.iter().any(|n| casts_to_half(n) || subgraphs(n))
}

fn casts_to_half(node: &Node) -> bool {
    node.is("Cast") && half_code(&node.attributes, "to")
}

fn half_code(attributes: &Attributes, name: &str) -> bool {
    let code = match attributes.get(name) {
        Some(Attribute::Int(code)) => i32::try_from(*code).ok(),
        _ => None,
    };
    code.and_then(|c| DType::from_onnx(c).ok()).is_some_and(is_half)
}

fn widened(t: &HostTensor) -> HostTensor {
    if is_half(t.dtype()) { t.cast(DType::F32) } else { t.clone() }
}

/// The node that makes the f32 form of a value.
fn form(graph: &mut Graph, v: ValueId, forms: &mut HashMap<ValueId, ValueId>) -> Node {
    let name = format!("{}/f32", graph.names[v]);
    let wide = graph.add_value(&name);
    forms.insert(v, wide);
    Node {
        op: "Widen".to_owned(),
        domain: "disback".to_owned(),
        name,
        opset: 1,
        inputs: vec![Some(v)],
        outputs: vec![Some(wide)],
        attributes: Attributes::new(BTreeMap::new()),
        captures: Vec::new(),
        origin: None,
        module: None,
    }
}

fn widen_tensors(graph: &mut Graph) {
    for c in graph.constants.values_mut() {
        c.tensor = widened(&c.tensor);
    }
    for port in &mut graph.outputs {
        if port.dtype.is_some_and(is_half) {
            port.dtype = Some(DType::F32);
        }
    }
}

/// Element types that a node names, tensors in its attributes, and everything in its subgraphs.
fn widen_attributes(node: &mut Node) {
    let mut changed: Vec<(String, Attribute)> = Vec::new();
    for (name, a) in node.attributes.iter() {
        match a {
            Attribute::Graph(g) => {
                let mut g = (**g).clone();
                widen_tensors(&mut g);
                for port in &mut g.inputs {
                    port.dtype = port.dtype.map(|d| if is_half(d) { DType::F32 } else { d });
                }
                g.nodes.iter_mut().for_each(widen_attributes);
                changed.push((name.to_owned(), Attribute::Graph(Rc::new(g))));
            }
            Attribute::Tensor(t) if is_half(t.dtype()) => {
                changed.push((name.to_owned(), Attribute::Tensor(widened(t))))
            }
            _ => {}
        }
    }
    for (name, a) in changed {
        node.attributes.set(&name, a);
    }
    for name in ["to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision", "precision"] {
        if half_code(&node.attributes, name) {
            node.attributes.set(name, Attribute::Int(i64::from(DType::F32.to_onnx())));
        }
    }
}
