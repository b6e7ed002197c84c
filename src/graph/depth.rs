//! Where in a network a tensor lies: its depth, counted from the graph alone.

use std::collections::{HashMap, HashSet};

use crate::graph::ir::{Graph, Node, ValueId};

/// Operators that multiply with weights.
const PRODUCTS: [&str; 6] = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Linear", "Einsum"];

/// A tensor that depends on the graph's sample input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name of the tensor.
    pub name: String,
    /// Layers (products with weights) on the longest way from the sample's input to the tensor, its own among them.
    pub depth: usize,
    /// What makes it: the end of a block, where a skip connection comes in; a layer; or something between.
    pub kind: PlaceKind,
}

/// What makes a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaceKind {
    /// A sum of two tensors that both depend on the sample: a residual connection.
    BlockEnd,
    /// A product with weights.
    Layer,
    /// Anything else.
    Other,
}

/// The tensors of a network between the sample and the output, in the order in which they are made.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// The tensors.
    pub all: Vec<Place>,
    /// Depth of the output.
    pub whole: usize,
}

/// The places of a graph, `sample` and `output` being names of its ports. Empty where one of them is not there.
pub fn places(graph: &Graph, sample: &str, output: &str) -> Places {
    let port = |ports: &[crate::graph::Port], name: &str| ports.iter().find(|p| p.name == name).map(|p| p.value);
    let (Some(from), Some(to)) = (port(&graph.inputs, sample), port(&graph.outputs, output)) else {
        return Places::default();
    };
    // Depths of what depends on the sample; what depends on other inputs alone (times, conditions) is no weight, and no feature.
    let mut depths: HashMap<ValueId, usize> = HashMap::from([(from, 0)]);
    let mut varies: HashSet<ValueId> = graph.inputs.iter().map(|p| p.value).collect();
    let mut all = Vec::new();
    for node in &graph.nodes {
        // (Of a shape nothing is left but numbers.)
        if matches!(node.op.as_str(), "Shape" | "Size") {
            continue;
        }
        let read = || node.inputs.iter().flatten().chain(node.captures.iter().map(|(_, v)| v));
        let weighted = is_product(node) && read().any(|v| !varies.contains(v));
        if read().any(|v| varies.contains(v)) {
            varies.extend(node.outputs.iter().flatten());
        }
        let from_sample: Vec<usize> = read().filter_map(|v| depths.get(v).copied()).collect();
        let Some(before) = from_sample.iter().max() else { continue };
        let kind = match node.op.as_str() {
            _ if weighted => PlaceKind::Layer,
            "Add" | "Sum" if from_sample.len() > 1 => PlaceKind::BlockEnd,
            _ => PlaceKind::Other,
        };
        let depth = before + usize::from(weighted);
        for value in node.outputs.iter().flatten() {
            depths.insert(*value, depth);
            all.push(Place { name: graph.names[*value].clone(), depth, kind });
        }
    }
    Places { all, whole: depths.get(&to).copied().unwrap_or(0) }
}

fn is_product(node: &Node) -> bool {
    PRODUCTS.contains(&node.op.as_str()) && (node.domain.is_empty() || node.domain == "disback")
}

impl Places {
    /// Depths at which features can be taken, with the tensors of each: the ends of blocks, or of a network without any the results of
    /// its layers. The nearest to `share` (0 to 1) of the whole depth is the first; of two equally near ones the shallower. What comes
    /// before the first layer is no feature, and what comes after the last one is the output.
    pub fn near(&self, share: f64) -> Vec<(usize, Vec<&str>)> {
        let inside = |kind: PlaceKind| {
            let inside = move |p: &&Place| p.kind == kind && p.depth > 0 && p.depth < self.whole;
            self.all.iter().filter(inside).collect::<Vec<_>>()
        };
        let mut found = inside(PlaceKind::BlockEnd);
        if found.is_empty() {
            found = inside(PlaceKind::Layer);
        }
        let mut depths: Vec<usize> = found.iter().map(|p| p.depth).collect();
        depths.sort_unstable();
        depths.dedup();
        let away = |depth: &usize| (*depth as f64 - share * self.whole as f64).abs();
        depths.sort_by(|a, b| away(a).total_cmp(&away(b)));
        let of = |d: usize| found.iter().filter(|p| p.depth == d).map(|p| p.name.as_str()).collect();
        depths.into_iter().map(|d| (d, of(d))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::graph::{Model, lower::lower};
    use crate::onnx::GraphProto;
    use crate::runtime::testing;
    use crate::tensor::{DType, HostTensor};

    fn graph(nodes: &[(&str, &[&str], &str)]) -> Graph {
        let weight = HostTensor::new(&[2, 2], &[1f32, 0.0, 0.0, 1.0]).unwrap();
        let proto = GraphProto {
            node: nodes.iter().map(|(op, inputs, output)| testing::node(op, inputs, output)).collect(),
            input: ["x", "t"].map(|n| testing::value(n, DType::F32, &["batch", "2"])).to_vec(),
            output: vec![testing::value("y", DType::F32, &["batch", "2"])],
            initializer: vec![testing::initializer("w", &weight)],
            ..Default::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.onnx");
        std::fs::write(&path, testing::model(proto, &[])).unwrap();
        lower(&Model::load(&path).unwrap()).unwrap()
    }

    #[test]
    fn depth_is_the_longest_way_through_layers_and_blocks_end_in_sums() {
        let g = graph(&[
            ("MatMul", &["t", "w"], "time"),
            ("MatMul", &["x", "w"], "a1"),
            ("Add", &["a1", "time"], "shifted"),
            ("Relu", &["shifted"], "relu"),
            ("MatMul", &["relu", "w"], "a2"),
            ("Add", &["x", "a2"], "block1"),
            ("MatMul", &["block1", "w"], "q"),
            ("Mul", &["q", "q"], "product"),
            ("MatMul", &["product", "w"], "a4"),
            ("Add", &["block1", "a4"], "block2"),
            ("MatMul", &["block2", "w"], "last"),
            ("Add", &["x", "last"], "y"),
        ]);
        let found = places(&g, "x", "y");
        let of = |name: &str| found.all.iter().find(|p| p.name == name).map(|p| (p.depth, p.kind));
        assert_eq!(found.whole, 5);
        assert_eq!(of("time"), None, "of the time alone");
        assert_eq!(of("shifted"), Some((1, PlaceKind::Other)), "a shift by the time ends no block");
        assert_eq!((of("block1"), of("q")), (Some((2, PlaceKind::BlockEnd)), Some((3, PlaceKind::Layer))));
        assert_eq!((of("block2"), of("y")), (Some((4, PlaceKind::BlockEnd)), Some((5, PlaceKind::BlockEnd))));
        assert_eq!(found.near(0.1), [(2, vec!["block1"]), (4, vec!["block2"])]);
        assert_eq!(found.near(0.99)[0], (4, vec!["block2"]), "the output is no feature");
        assert_eq!(found.near(0.6)[0].0, 2, "of two equally near ones the shallower");
        assert!(places(&g, "x", "none").near(0.5).is_empty());
    }

    #[test]
    fn a_chain_of_layers_has_its_layers() {
        let chain: &[(&str, &[&str], &str)] = &[
            ("MatMul", &["x", "w"], "a"),
            ("Relu", &["a"], "b"),
            ("MatMul", &["b", "w"], "c"),
            ("MatMul", &["c", "w"], "d"),
            ("MatMul", &["d", "w"], "y"),
        ];
        let found = places(&graph(chain), "x", "y");
        assert_eq!((found.whole, found.near(0.5)[0].clone()), (4, (2, vec!["c"])));
        // A real one: 20 layers; its skip connections are those of the file.
        let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits/teacher.onnx");
        let found = places(&lower(&Model::load(&digits).unwrap()).unwrap(), "x", "denoised");
        let first = |share: f64| found.near(share)[0].clone();
        assert_eq!(found.whole, 20);
        assert_eq!(first(0.5), (11, vec!["add_408"]));
        assert_eq!(first(0.75), (16, vec!["add_571"]));
        assert_eq!(first(0.99), (19, vec!["add_666"]));
    }
}
