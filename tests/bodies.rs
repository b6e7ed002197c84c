//! Weights inside If, Loop and Scan: the same values and gradients as the graph with its bodies written out, trained and
//! written back into the body they came from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use disback::graph::edit::{int_attribute, node, value_info};
use disback::graph::{Model, TrainableChoice, tensors};
use disback::onnx::attribute_proto::AttributeType;
use disback::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto,
};
use disback::parity::{Tolerance, check as parity};
use disback::tensor::{DType, HostTensor};
use disback::torch::{Forward, ImportOptions, Network, convert};
use prost::Message;
use tch::{Device, Kind, Tensor};

fn weight(name: &str, shape: &[usize]) -> TensorProto {
    let seed = name.bytes().map(u64::from).sum();
    let values = disback::noise::image_noise(5, seed, shape.iter().product());
    tensors::to_proto(name, &HostTensor::new(shape, &values.iter().map(|v| v * 0.5).collect::<Vec<_>>()).unwrap())
}

/// A Constant node of a weight; `floats`: in the attribute for plain lists.
fn constant(name: &str, shape: &[usize], floats: bool) -> NodeProto {
    let t = weight(name, shape);
    let host = tensors::from_proto(&t).unwrap();
    let attribute = if floats {
        AttributeProto {
            name: Some("value_floats".into()),
            r#type: Some(AttributeType::Floats as i32),
            floats: host.to_f32(),
            ..AttributeProto::default()
        }
    } else {
        AttributeProto {
            name: Some("value".into()),
            r#type: Some(AttributeType::Tensor as i32),
            t: Some(t),
            ..AttributeProto::default()
        }
    };
    NodeProto { attribute: vec![attribute], ..node("Constant", &[], name) }
}

fn with(mut n: NodeProto, attributes: Vec<AttributeProto>) -> NodeProto {
    n.attribute.extend(attributes);
    n
}

fn several(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto { output: outputs.iter().map(|o| (*o).to_owned()).collect(), ..node(op, inputs, outputs[0]) }
}

fn body(name: &str, g: GraphProto) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        r#type: Some(AttributeType::Graph as i32),
        g: Some(g),
        ..AttributeProto::default()
    }
}

fn rows(name: &str) -> ValueInfoProto {
    value_info(name, DType::F32, &[Err("n"), Ok(4)])
}

fn graph(
    inputs: Vec<ValueInfoProto>,
    nodes: Vec<NodeProto>,
    weights: Vec<TensorProto>,
    outputs: &[&str],
) -> GraphProto {
    GraphProto {
        name: Some("g".into()),
        input: inputs,
        node: nodes,
        initializer: weights,
        output: outputs.iter().map(|o| rows(o)).collect(),
        ..GraphProto::default()
    }
}

fn model(graph: GraphProto) -> ModelProto {
    let opset = OperatorSetIdProto { domain: None, version: Some(18) };
    ModelProto { ir_version: Some(9), opset_import: vec![opset], graph: Some(graph), ..ModelProto::default() }
}

fn load(name: &str, proto: &ModelProto) -> Network {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("bodies");
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(format!("{name}.onnx"));
    std::fs::write(&path, proto.encode_to_vec()).unwrap();
    Network::load(&path, Device::Cpu).unwrap()
}

type Inputs = Vec<(String, HostTensor)>;

fn inputs(flag: Option<i64>) -> Inputs {
    let x = HostTensor::new(&[3, 4], &disback::noise::image_noise(1, 1, 12)).unwrap();
    let flag = flag.map(|f| ("flag".to_owned(), HostTensor::vec(&[f])));
    [("x".to_owned(), x)].into_iter().chain(flag).collect()
}

/// The output, and the gradient of every parameter and of `x`, by name.
fn run(net: &Network, given: &Inputs) -> (Tensor, BTreeMap<String, Tensor>) {
    for t in net.params().tensors() {
        let mut g = t.grad();
        if g.defined() {
            let _ = g.zero_();
        }
    }
    net.params().set_requires_grad(true).unwrap();
    let mut leaves: Vec<(String, Tensor)> =
        given.iter().map(|(n, t)| (n.clone(), convert::to_torch(t).unwrap())).collect();
    leaves[0].1 = leaves[0].1.set_requires_grad(true);
    let named: Vec<(&str, &Tensor)> = leaves.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let y = net.forward(&named).unwrap().remove(0).1;
    let factor = Tensor::from_slice(&disback::noise::image_noise(2, 2, y.numel())).reshape(y.size());
    (&y * factor).sum(Kind::Float).backward();
    let mut gradients: BTreeMap<String, Tensor> = net.params().iter().map(|(n, t)| (n.to_owned(), t.grad())).collect();
    gradients.insert("x".into(), leaves[0].1.grad());
    (y.detach(), gradients)
}

/// The network computes and differentiates like `written_out` (names of parameters there with their names here), also with
/// other weights, and so does the file that they are written into; ONNX Runtime agrees each time.
fn same(name: &str, proto: &ModelProto, written_out: GraphProto, names: &[(&str, &str)], given: &Inputs) {
    let net = load(name, proto);
    let plain = load(&format!("{name}-plain"), &model(written_out));
    let found: Vec<&str> = net.params().names().iter().map(String::as_str).collect();
    let plain_inputs: Inputs = given.iter().filter(|(n, _)| n == "x").cloned().collect();
    let check = |net: &Network, moved: &str| {
        let result = parity(net, given, None, Tolerance::default()).unwrap();
        assert!(result.ok, "{name} {moved}: {}", serde_json::to_string(&result).unwrap());
    };
    for moved in ["", "moved"] {
        if moved.is_empty() {
            check(&net, moved);
        } else {
            tch::no_grad(|| {
                for (k, t) in net.params().tensors().iter().enumerate() {
                    let noise = Tensor::from_slice(&disback::noise::image_noise(9, k as u64, t.numel()));
                    let _ = t.shallow_clone().g_add_(&(noise.reshape(t.size()) * 0.3));
                }
                for (theirs, ours) in names {
                    let at = |net: &Network, n: &str| {
                        net.params().iter().find(|(m, _)| *m == n).map(|(_, t)| t.shallow_clone()).unwrap()
                    };
                    at(&plain, theirs).copy_(&at(&net, ours).reshape(at(&plain, theirs).size()));
                }
            });
        }
        let (y, gradients) = run(&net, given);
        let (expected, theirs) = run(&plain, &plain_inputs);
        let error = (&y - &expected).abs().max().double_value(&[]);
        assert!(error < 2e-6, "{name} {moved}: values differ by {error:.1e}");
        for (plain, ours) in names.iter().copied().chain([("x", "x")]) {
            let mine = gradients.get(ours).unwrap_or_else(|| panic!("{name}: `{ours}` is not among {found:?}"));
            let theirs = &theirs[plain];
            let error = ((mine.reshape(theirs.size()) - theirs).norm() / theirs.norm()).double_value(&[]);
            assert!(error < 1e-5, "{name} {moved}: gradient of `{ours}` differs by {error:.1e}");
        }
        // What was not chosen has no gradient.
        for (other, g) in gradients.iter().filter(|(n, _)| *n != "x" && !names.iter().any(|(_, o)| o == n)) {
            assert!(!g.defined() || g.abs().max().double_value(&[]) == 0.0, "{name}: `{other}` has a gradient");
        }
        if moved.is_empty() {
            continue;
        }
        let back = net.to_model(net.params()).unwrap();
        let (before, after) = (proto.graph.as_ref().unwrap(), back.graph.as_ref().unwrap());
        assert_eq!(before.initializer.len(), after.initializer.len());
        assert_eq!(before.node.len(), after.node.len());
        let back = load(&format!("{name}-back"), &back);
        check(&back, "written back");
        let (again, _) = run(&back, given);
        assert_eq!((again - y).abs().max().double_value(&[]), 0.0, "{name}: written back");
    }
}

fn dense(x: &str, w: &str, b: &str, y: &str) -> Vec<NodeProto> {
    vec![node("MatMul", &[x, w], &format!("{y}_product")), node("Add", &[&format!("{y}_product"), b], y)]
}

#[test]
fn both_branches_of_an_if() {
    let yes = graph(vec![], dense("h", "w", "b", "yes"), vec![weight("w", &[4, 4]), weight("b", &[4])], &["yes"]);
    let mut nodes = vec![constant("w", &[4, 4], false), constant("c", &[4], true)];
    nodes.extend(dense("h", "w", "c", "raw"));
    nodes.push(node("Tanh", &["raw"], "no"));
    let no = graph(vec![], nodes, vec![], &["no"]);
    let flag = value_info("flag", DType::I64, &[Ok(1)]);
    let mut nodes = dense("x", "first", "shift", "h");
    nodes.push(with(node("Cast", &["flag"], "condition"), vec![int_attribute("to", 9)]));
    nodes.push(with(node("If", &["condition"], "y"), vec![body("then_branch", yes), body("else_branch", no)]));
    let outer = vec![weight("first", &[4, 4]), weight("shift", &[4])];
    let whole = model(graph(vec![rows("x"), flag], nodes, outer.clone(), &["y"]));
    let net = load("if", &whole);
    let names = ["b", "c", "disback/y/then_branch/w", "first", "shift", "w"];
    let mut found: Vec<&str> = net.params().names().iter().map(String::as_str).collect();
    found.sort_unstable();
    // Attributes come in the order of their names: else before then.
    assert_eq!(found, names);
    for (flag, bias, w) in [(1, "b", "disback/y/then_branch/w"), (0, "c", "w")] {
        let mut nodes = dense("x", "first", "shift", "h");
        nodes.extend(dense("h", "w", bias, "raw"));
        nodes.push(if flag == 1 { node("Identity", &["raw"], "y") } else { node("Tanh", &["raw"], "y") });
        let weights = [outer.clone(), vec![weight("w", &[4, 4]), weight(bias, &[4])]].concat();
        let flat = graph(vec![rows("x")], nodes, weights, &["y"]);
        let pairs = [("first", "first"), ("shift", "shift"), ("w", w), (bias, bias)];
        same(&format!("if-{flag}"), &whole, flat, &pairs, &inputs(Some(flag)));
    }
}

#[test]
fn a_loop_with_a_branch_inside() {
    let even = graph(vec![], vec![node("Mul", &["t", "gain"], "even")], vec![weight("gain", &[4])], &["even"]);
    let odd = graph(vec![], vec![node("Add", &["t", "drift"], "odd")], vec![weight("drift", &[4])], &["odd"]);
    let scalar = |name: &str, dtype| value_info(name, dtype, &[]);
    let mut nodes = vec![constant("c", &[4], true)];
    nodes.extend(dense("state", "w", "c", "raw"));
    nodes.extend([
        node("Tanh", &["raw"], "t"),
        NodeProto {
            attribute: vec![tensor_attribute("value", HostTensor::scalar(2i64))],
            ..node("Constant", &[], "two")
        },
        node("Mod", &["i", "two"], "parity"),
        with(node("Cast", &["parity"], "is_odd"), vec![int_attribute("to", 9)]),
        with(node("If", &["is_odd"], "next"), vec![body("then_branch", odd), body("else_branch", even)]),
        node("Identity", &["go"], "go_on"),
    ]);
    let mut inside = graph(
        vec![scalar("i", DType::I64), scalar("go", DType::Bool), rows("state")],
        nodes,
        vec![weight("w", &[4, 4])],
        &["go_on", "next"],
    );
    inside.output[0] = scalar("go_on", DType::Bool);
    let whole = model(graph(
        vec![rows("x")],
        vec![with(node("Loop", &["rounds", "", "x"], "y"), vec![body("body", inside)])],
        vec![tensors::to_proto("rounds", &HostTensor::scalar(3i64))],
        &["y"],
    ));
    let mut nodes = Vec::new();
    let mut last = "x".to_owned();
    for i in 0..3 {
        nodes.extend(dense(&last, "w", "c", &format!("raw{i}")));
        nodes.push(node("Tanh", &[&format!("raw{i}")], &format!("t{i}")));
        last = if i == 2 { "y".to_owned() } else { format!("s{i}") };
        let (op, weight) = if i % 2 == 0 { ("Mul", "gain") } else { ("Add", "drift") };
        nodes.push(node(op, &[&format!("t{i}"), weight], &last));
    }
    let weights = vec![weight("w", &[4, 4]), weight("c", &[4]), weight("gain", &[4]), weight("drift", &[4])];
    let flat = graph(vec![rows("x")], nodes, weights, &["y"]);
    let names = ["w", "c", "gain", "drift"].map(|n| (n, n));
    same("loop", &whole, flat, &names, &inputs(None));
}

fn tensor_attribute(name: &str, t: HostTensor) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        r#type: Some(AttributeType::Tensor as i32),
        t: Some(tensors::to_proto("", &t)),
        ..AttributeProto::default()
    }
}

/// Layers as JAX writes them: their stacked weights are scanned over, beside one that the body holds itself.
#[test]
fn a_scan_over_layers() {
    let mut nodes = dense("state", "layer", "b", "raw");
    nodes.push(node("Tanh", &["raw"], "next"));
    let mut inside = graph(
        vec![rows("state"), value_info("layer", DType::F32, &[Ok(4), Ok(4)])],
        nodes,
        vec![weight("b", &[4])],
        &["next"],
    );
    inside.input[0] = rows("state");
    let scan = with(
        several("Scan", &["x", "layers"], &["y"]),
        vec![body("body", inside), int_attribute("num_scan_inputs", 1)],
    );
    let whole = model(graph(vec![rows("x")], vec![scan], vec![weight("layers", &[3, 4, 4])], &["y"]));
    let layers = tensors::from_proto(&weight("layers", &[3, 4, 4])).unwrap();
    let mut nodes = Vec::new();
    let mut last = "x".to_owned();
    let parted = tensors::to_proto("layers", &layers);
    for i in 0..3 {
        nodes.push(node("Gather", &["layers", &format!("at{i}")], &format!("w{i}")));
        nodes.extend(dense(&last, &format!("w{i}"), "b", &format!("raw{i}")));
        last = if i == 2 { "y".to_owned() } else { format!("s{i}") };
        nodes.push(node("Tanh", &[&format!("raw{i}")], &last));
    }
    let mut weights = vec![parted, weight("b", &[4])];
    weights.extend((0..3).map(|i| tensors::to_proto(&format!("at{i}"), &HostTensor::scalar(i as i64))));
    let flat = graph(vec![rows("x")], nodes, weights, &["y"]);
    same("scan", &whole, flat, &[("layers", "layers"), ("b", "b")], &inputs(None));
}

#[test]
fn what_a_body_does_not_train() {
    // Frequencies of a time, a plain number and a mask are none; a glob takes one out.
    let nodes = vec![
        node("Mul", &["x", "freqs"], "angles"),
        node("Sin", &["angles"], "waves"),
        node("MatMul", &["waves", "w"], "p"),
        node("Mul", &["p", "half"], "s"),
        node("Add", &["s", "bias"], "yes"),
    ];
    let weights = vec![
        weight("freqs", &[4]),
        weight("w", &[4, 4]),
        tensors::to_proto("half", &HostTensor::scalar(0.5f32)),
        weight("bias", &[4]),
    ];
    let yes = graph(vec![], nodes, weights, &["yes"]);
    let no = graph(vec![], vec![node("Neg", &["x"], "no")], vec![], &["no"]);
    let flag = value_info("flag", DType::Bool, &[]);
    let choose = with(node("If", &["flag"], "y"), vec![body("then_branch", yes), body("else_branch", no)]);
    let whole = model(graph(vec![rows("x"), flag], vec![choose], vec![], &["y"]));
    let names = |choice: TrainableChoice| -> Vec<String> {
        let options = ImportOptions { trainable: choice, ..ImportOptions::default() };
        let model = Model::from_proto(whole.clone());
        Network::import(model, &options, Device::Cpu).unwrap().params().names().to_vec()
    };
    assert_eq!(names(TrainableChoice::default()), ["w", "bias"]);
    assert_eq!(names(TrainableChoice { freeze: vec!["b*".into()], ..TrainableChoice::default() }), ["w"]);
    let all = TrainableChoice { train: vec!["freqs".into()], ..TrainableChoice::default() };
    assert_eq!(names(all), ["freqs", "w", "bias"]);
}
