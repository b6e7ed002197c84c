//! Mutations of decoded models. Random bytes hardly get past the protobuf reader; these break the graph behind it.

use disback::onnx::attribute_proto::AttributeType;
use disback::onnx::tensor_proto::DataLocation;
use disback::onnx::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, SparseTensorProto,
    StringStringEntryProto, TensorProto, TypeProto, ValueInfoProto, tensor_shape_proto, type_proto,
};
use libfuzzer_sys::fuzzer_mutate;
use prost::Message;

/// Operators that replace others; the corpus has nearly all, crossing brings the rest.
const OPERATORS: &[&str] = &[
    "Add", "Mul", "Sub", "Div", "Pow", "MatMul", "Gemm", "Conv", "ConvTranspose", "Reshape", "Transpose", "Concat", "Slice",
    "Split", "Gather", "GatherND", "ScatterND", "Softmax", "Expand", "Tile", "Pad", "Resize", "Range", "ConstantOfShape",
    "Shape", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Cast", "Where", "If", "Loop", "Scan", "Constant", "Einsum",
    "InstanceNormalization", "LayerNormalization", "GroupNormalization", "Attention", "Sigmoid", "Erf", "Gelu", "TopK",
    "OneHot", "CumSum", "AveragePool", "MaxPool", "GridSample", "SequenceAt", "SplitToSequence", "DequantizeLinear",
    "QuantizeLinear", "ReduceMean", "ReduceSum", "LSTM", "EyeLike", "Trilu", "DepthToSpace", "Col2Im", "NonZero",
];
const ATTRIBUTES: &[&str] = &[
    "axis", "axes", "perm", "pads", "strides", "dilations", "kernel_shape", "group", "mode", "to", "value", "shape", "epsilon",
    "num_heads", "keepdims", "equation", "body", "then_branch", "else_branch", "auto_pad", "output_padding", "k", "size",
];

/// xorshift64*
pub struct Rng(u64);

impl Rng {
    fn new(seed: u32) -> Self {
        Self((u64::from(seed) << 17 | 0x9e37_79b9) ^ 0x2545_f491_4f6c_dd1d)
    }
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 16) % n.max(1) as u64) as usize
    }
    fn pick<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        if list.is_empty() { None } else { Some(&list[self.below(list.len())]) }
    }
    fn pick_mut<'a, T>(&mut self, list: &'a mut [T]) -> Option<&'a mut T> {
        let n = list.len();
        if n == 0 { None } else { list.get_mut(self.below(n)) }
    }
    fn int(&mut self) -> i64 {
        const ODD: &[i64] =
            &[0, -1, 1, 2, 3, 4, 5, 8, -2, -9, 64, 100, 1 << 20, 1 << 31, 1 << 40, 1 << 60, i64::MIN, i64::MAX];
        ODD[self.below(ODD.len())]
    }
    fn float(&mut self) -> f32 {
        [0.0, -1.0, 1.0, 0.5, 1e30, -1e30, f32::NAN, f32::INFINITY, 1e-30, 3.0][self.below(10)]
    }
}

/// libFuzzer's custom mutator: a decoded model with one to four things changed, or plain bytes.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut rng = Rng::new(seed);
    if rng.below(10) == 0 {
        return fuzzer_mutate(data, size, max_size);
    }
    let Ok(mut model) = ModelProto::decode(&data[..size]) else { return fuzzer_mutate(data, size, max_size) };
    for _ in 0..=rng.below(4) {
        change_model(&mut model, &mut rng);
    }
    write(&model, &mut data[..max_size]).unwrap_or_else(|| fuzzer_mutate(data, size, max_size))
}

/// libFuzzer's custom crossover: the nodes of the second model after those of the first, their inputs taken from it.
pub fn cross(a: &[u8], b: &[u8], out: &mut [u8], seed: u32) -> usize {
    let mut rng = Rng::new(seed);
    let (Ok(mut first), Ok(second)) = (ModelProto::decode(a), ModelProto::decode(b)) else { return 0 };
    let (Some(g), Some(h)) = (first.graph.as_mut(), second.graph) else { return 0 };
    if rng.below(6) == 0 {
        // As a subgraph of one of its nodes.
        if let Some(node) = rng.pick_mut(&mut g.node) {
            let name = ["body", "then_branch", "else_branch"][rng.below(3)];
            node.attribute.push(AttributeProto {
                name: Some(name.into()),
                r#type: Some(AttributeType::Graph as i32),
                g: Some(h),
                ..AttributeProto::default()
            });
        }
    } else {
        join(g, h, &mut rng);
    }
    write(&first, out).unwrap_or(0)
}

fn join(g: &mut GraphProto, h: GraphProto, rng: &mut Rng) {
    let known: Vec<String> = values(g);
    let tag = format!("_{}", g.node.len());
    let inputs: Vec<String> = h.input.iter().map(|i| i.name().to_owned()).collect();
    // Its inputs become values of the first graph, or stay inputs.
    let mut wired: Vec<(String, String)> = Vec::new();
    for i in &inputs {
        if rng.below(3) > 0
            && let Some(v) = rng.pick(&known)
        {
            wired.push((i.clone(), v.clone()));
        }
    }
    let rename = |n: &str| match wired.iter().find(|(from, _)| from == n) {
        _ if n.is_empty() => String::new(),
        Some((_, to)) => to.clone(),
        None => format!("{n}{tag}"),
    };
    for mut i in h.input {
        if !wired.iter().any(|(from, _)| from == i.name()) {
            i.name = Some(rename(i.name()));
            g.input.push(i);
        }
    }
    for mut t in h.initializer {
        t.name = Some(rename(t.name()));
        g.initializer.push(t);
    }
    for mut n in h.node {
        n.input.iter_mut().chain(&mut n.output).for_each(|v| *v = rename(v));
        g.node.push(n);
    }
    for mut o in h.output {
        o.name = Some(rename(o.name()));
        g.output.push(o);
    }
}

fn write(model: &ModelProto, out: &mut [u8]) -> Option<usize> {
    let bytes = model.encode_to_vec();
    out.get_mut(..bytes.len())?.copy_from_slice(&bytes);
    Some(bytes.len())
}

fn values(g: &GraphProto) -> Vec<String> {
    let ports = g.input.iter().map(|i| i.name().to_owned());
    let weights = g.initializer.iter().map(|t| t.name().to_owned());
    ports.chain(weights).chain(g.node.iter().flat_map(|n| n.output.iter().cloned())).collect()
}

fn change_model(m: &mut ModelProto, rng: &mut Rng) {
    match rng.below(24) {
        0 => {
            if let Some(o) = rng.pick_mut(&mut m.opset_import) {
                o.version = Some([1, 5, 9, 11, 13, 18, 23, 0, -1, i64::MAX][rng.below(10)]);
            }
        }
        1 => make_function(m, rng),
        2 => change_function(m, rng),
        _ => {
            if let Some(g) = m.graph.as_mut() {
                change_graph(g, rng);
            }
        }
    }
}

/// Moves a node into a function that the graph then calls; the function may call itself.
fn make_function(m: &mut ModelProto, rng: &mut Rng) {
    let Some(g) = m.graph.as_mut() else { return };
    let opset_import = m.opset_import.clone();
    let Some(node) = rng.pick_mut(&mut g.node) else { return };
    let name = format!("F{}", m.functions.len());
    let mut body = vec![node.clone()];
    if rng.below(4) == 0 {
        body[0] = call(&name, &node.input, &node.output);
    } else if rng.below(3) == 0 && !m.functions.is_empty() {
        let other = m.functions[rng.below(m.functions.len())].name().to_owned();
        body.push(call(&other, &node.input, &[format!("{name}_more")]));
    }
    m.functions.push(FunctionProto {
        name: Some(name.clone()),
        domain: Some("mine".into()),
        input: node.input.clone(),
        output: node.output.clone(),
        attribute: node.attribute.iter().map(|a| a.name().to_owned()).collect(),
        node: body,
        opset_import,
        ..FunctionProto::default()
    });
    *node = NodeProto { attribute: node.attribute.clone(), ..call(&name, &node.input, &node.output) };
    if !m.opset_import.iter().any(|o| o.domain() == "mine") {
        m.opset_import.push(OperatorSetIdProto { domain: Some("mine".into()), version: Some(1) });
    }
}

fn call(name: &str, inputs: &[String], outputs: &[String]) -> NodeProto {
    NodeProto {
        op_type: Some(name.into()),
        domain: Some("mine".into()),
        input: inputs.to_vec(),
        output: outputs.to_vec(),
        ..NodeProto::default()
    }
}

fn change_function(m: &mut ModelProto, rng: &mut Rng) {
    let count = m.functions.len();
    let Some(f) = rng.pick_mut(&mut m.functions) else { return };
    match rng.below(6) {
        0 => f.name = Some(format!("F{}", rng.below(count + 1))),
        1 => drop(f.input.pop()),
        2 => f.output = f.input.clone(),
        3 => {
            let twice = f.node.clone();
            f.node.extend(twice);
        }
        4 => {
            let names: Vec<String> = f.attribute.clone();
            if let Some(a) = rng.pick_mut(&mut f.node).and_then(|n| rng.pick_mut(&mut n.attribute)) {
                a.ref_attr_name = rng.pick(&names).cloned();
            }
        }
        _ => {
            let known: Vec<String> = f.node.iter().flat_map(|n| n.output.iter().cloned()).chain(f.input.clone()).collect();
            if let Some(n) = rng.pick_mut(&mut f.node) {
                change_node(n, &known, rng);
            }
        }
    }
}

fn change_graph(g: &mut GraphProto, rng: &mut Rng) {
    let known = values(g);
    let name = |rng: &mut Rng| rng.pick(&known).cloned().unwrap_or_default();
    match rng.below(26) {
        0 => drop(rng.below(g.node.len().max(1)).lt(&g.node.len()).then(|| g.node.remove(rng.below(g.node.len())))),
        1 => {
            // The same node once more, under another output.
            if let Some(n) = rng.pick(&g.node) {
                let mut n = n.clone();
                n.output.iter_mut().for_each(|o| o.push('x'));
                g.node.push(n);
            }
        }
        2 if g.node.len() > 1 => {
            let (a, b) = (rng.below(g.node.len()), rng.below(g.node.len()));
            g.node.swap(a, b);
        }
        3 => {
            let v = name(rng);
            if let Some(o) = rng.pick_mut(&mut g.output) {
                o.name = Some(v);
            }
        }
        4 => {
            let v = name(rng);
            g.output.push(ValueInfoProto { name: Some(v), ..ValueInfoProto::default() });
        }
        5 | 6 => {
            if let Some(i) = rng.pick_mut(&mut g.input) {
                change_port(i, rng);
            }
        }
        7..=9 => {
            if let Some(t) = rng.pick_mut(&mut g.initializer) {
                change_tensor(t, rng);
            }
        }
        10 => {
            // An input with data of its own.
            let v = name(rng);
            g.initializer.push(small_tensor(v, rng));
        }
        11 => {
            if let Some(t) = g.initializer.first().cloned() {
                g.sparse_initializer.push(SparseTensorProto { values: Some(t), ..SparseTensorProto::default() });
            }
        }
        12 => {
            let (a, b) = (name(rng), name(rng));
            let output = format!("v{}", g.node.len());
            g.node.push(NodeProto {
                op_type: rng.pick(OPERATORS).map(|s| (*s).to_owned()),
                input: if rng.below(2) == 0 { vec![a] } else { vec![a, b] },
                output: vec![output.clone()],
                ..NodeProto::default()
            });
            g.output.push(ValueInfoProto { name: Some(output), ..ValueInfoProto::default() });
        }
        13 => g.output.truncate(1),
        _ => {
            if let Some(n) = rng.pick_mut(&mut g.node) {
                change_node(n, &known, rng);
            }
        }
    }
}

fn small_tensor(name: String, rng: &mut Rng) -> TensorProto {
    let n = rng.below(5);
    TensorProto {
        name: Some(name),
        dims: vec![n as i64],
        data_type: Some(7),
        int64_data: (0..n).map(|_| rng.int()).collect(),
        ..TensorProto::default()
    }
}

fn change_node(n: &mut NodeProto, known: &[String], rng: &mut Rng) {
    let value = rng.pick(known).cloned().unwrap_or_default();
    match rng.below(16) {
        0 => n.op_type = rng.pick(OPERATORS).map(|s| (*s).to_owned()),
        1 | 2 => {
            if let Some(i) = rng.pick_mut(&mut n.input) {
                *i = value;
            }
        }
        3 => {
            if let Some(i) = rng.pick_mut(&mut n.input) {
                i.clear();
            }
        }
        4 => n.input.push(value),
        5 => drop(n.input.pop()),
        6 => n.output.push(format!("{value}_o")),
        7 => {
            if let Some(o) = rng.pick_mut(&mut n.output) {
                if rng.below(2) == 0 { o.clear() } else { *o = value }
            }
        }
        8 => n.domain = Some(["", "ai.onnx", "com.microsoft", "disback", "mine", "ai.onnx.ml"][rng.below(6)].into()),
        9 => {
            let mut a = AttributeProto { name: rng.pick(ATTRIBUTES).map(|s| (*s).into()), ..AttributeProto::default() };
            a.set_type(AttributeType::try_from(rng.below(9) as i32).unwrap_or(AttributeType::Int));
            a.i = Some(rng.int());
            a.f = Some(rng.float());
            a.ints = (0..rng.below(5)).map(|_| rng.int()).collect();
            a.t = Some(small_tensor(String::new(), rng));
            n.attribute.push(a);
        }
        10 => drop(n.attribute.pop()),
        _ => {
            if let Some(a) = rng.pick_mut(&mut n.attribute) {
                change_attribute(a, rng);
            }
        }
    }
}

fn change_attribute(a: &mut AttributeProto, rng: &mut Rng) {
    match rng.below(10) {
        0 => a.r#type = Some(rng.below(16) as i32),
        1 => a.ints.push(rng.int()),
        2 => drop(a.ints.pop()),
        3 => a.floats.push(rng.float()),
        4 => a.name = rng.pick(ATTRIBUTES).map(|s| (*s).to_owned()),
        5 => a.s = Some(["", "bogus", "SAME_UPPER", "SAME_LOWER", "VALID", "linear", "cubic", "reflect"][rng.below(8)].into()),
        _ => {
            if let Some(g) = a.g.as_mut() {
                return change_graph(g, rng);
            }
            if let Some(t) = a.t.as_mut() {
                return change_tensor(t, rng);
            }
            a.i = a.i.map(|_| rng.int());
            a.f = a.f.map(|_| rng.float());
            if let Some(i) = rng.pick_mut(&mut a.ints) {
                *i = [-1, 0, 1, 2, 3, 4, 5][rng.below(7)];
            }
            if rng.below(3) == 0
                && let Some(i) = rng.pick_mut(&mut a.ints)
            {
                *i = [-1, 0, 1, i64::MAX, i64::MIN, 1 << 40][rng.below(6)];
            }
        }
    }
}

fn change_tensor(t: &mut TensorProto, rng: &mut Rng) {
    let resize = |t: &mut TensorProto, rng: &mut Rng| {
        let mut bytes = t.raw_data.clone().unwrap_or_default().to_vec();
        bytes.resize(bytes.len().saturating_sub(4) + 4 * rng.below(4), 1);
        t.raw_data = Some(bytes.into());
    };
    match rng.below(12) {
        0 => t.dims.push(rng.int()),
        1 => drop(t.dims.pop()),
        2 => t.data_type = Some(rng.below(28) as i32),
        3 => resize(t, rng),
        4 => {
            t.data_location = Some(DataLocation::External as i32);
            t.external_data = vec![StringStringEntryProto { key: Some("location".into()), value: Some("../x".into()) }];
        }
        5 => {
            if let Some(d) = rng.pick_mut(&mut t.dims) {
                *d = rng.int();
            }
        }
        // Data as int64, as many as the shape wants: a shape or index that says something odd.
        6..=8 => {
            let n = t.dims.iter().try_fold(1i64, |n, &d| n.checked_mul(d)).filter(|n| (0..=64).contains(n)).unwrap_or(0);
            t.data_type = Some(7);
            t.raw_data = None;
            t.float_data.clear();
            t.int64_data = (0..n).map(|_| rng.int()).collect();
        }
        9 => t.string_data.push("text".into()),
        10 => {
            if let Some(bytes) = &t.raw_data {
                let mut bytes = bytes.to_vec();
                if let Some(b) = rng.pick_mut(&mut bytes) {
                    *b ^= 1 << (rng.next() % 8);
                }
                t.raw_data = Some(bytes.into());
            }
        }
        _ => {
            if let Some(v) = rng.pick_mut(&mut t.int64_data) {
                *v = rng.int();
            }
            if let Some(v) = rng.pick_mut(&mut t.float_data) {
                *v = rng.float();
            }
        }
    }
}

fn change_port(p: &mut ValueInfoProto, rng: &mut Rng) {
    let Some(type_proto::Value::TensorType(t)) = p.r#type.as_mut().and_then(|t| t.value.as_mut()) else {
        p.r#type = Some(TypeProto::default());
        return;
    };
    match rng.below(6) {
        0 => t.elem_type = Some([1, 2, 6, 7, 9, 10, 11, 16, 8, 23, 99][rng.below(11)]),
        1 => t.shape = None,
        2 => p.r#type = None,
        _ => {
            let shape = t.shape.get_or_insert_default();
            let value = match rng.below(4) {
                0 => tensor_shape_proto::dimension::Value::DimParam("n".into()),
                1 => tensor_shape_proto::dimension::Value::DimValue(rng.int()),
                _ => tensor_shape_proto::dimension::Value::DimValue(rng.below(5) as i64),
            };
            match rng.pick_mut(&mut shape.dim) {
                Some(d) => d.value = Some(value),
                None => shape.dim.push(tensor_shape_proto::Dimension { value: Some(value), ..Default::default() }),
            }
        }
    }
}
