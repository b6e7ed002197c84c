//! Small graphs that break ONNX's rules, one at a time: the error names the file, the node or tensor, and what to do. And
//! what fuzzing found (`fuzz/`).
#![cfg(feature = "train")]

mod support;

use disback::graph::edit::{float_attribute, int_attribute, node, value_info};
use disback::graph::{Model, tensors};
use disback::onnx::attribute_proto::AttributeType;
use disback::onnx::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, SparseTensorProto,
    TensorProto, TypeProto, ValueInfoProto, type_proto,
};
use disback::tensor::{DType, HostTensor};
use disback::torch::{Forward, Network};
use prost::Message;
use tch::{Device, Kind, Tensor};

fn named(op: &str, name: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto { name: Some(name.into()), ..node(op, inputs, output) }
}

fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) }
}

/// `x` [n, 4] through the nodes to `y`.
fn graph(nodes: Vec<NodeProto>, initializer: Vec<TensorProto>) -> GraphProto {
    GraphProto {
        name: Some("g".into()),
        input: vec![value_info("x", DType::F32, &[Err("n"), Ok(4)])],
        initializer,
        node: nodes,
        output: vec![ValueInfoProto { name: Some("y".into()), ..ValueInfoProto::default() }],
        ..GraphProto::default()
    }
}

fn model(graph: GraphProto) -> ModelProto {
    ModelProto { ir_version: Some(10), opset_import: vec![opset("", 20)], graph: Some(graph), ..ModelProto::default() }
}

fn ints(name: &str, values: &[i64]) -> TensorProto {
    tensors::to_proto(name, &HostTensor::vec(values))
}

fn floats(name: &str, shape: &[usize]) -> TensorProto {
    let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|v| v as f32).collect();
    tensors::to_proto(name, &HostTensor::new(shape, &values).unwrap())
}

/// Import, or where that works one forward, fails with all of these words, and says what to do.
#[track_caller]
fn refused(file: &str, model: &ModelProto, words: &[&str]) {
    let error = refused_without(file, model, words);
    assert!(error.contains("help:"), "nothing to do in: {error}");
}

/// The same where there is nothing more to say.
#[track_caller]
fn refused_without(file: &str, model: &ModelProto, words: &[&str]) -> String {
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("bad-graphs-small");
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(file);
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    let x = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
    let outcome = Network::load(&path, Device::Cpu).and_then(|n| n.forward(&[("x", &x)]).map(drop));
    let error = outcome.expect_err("a broken graph is refused").to_string();
    for word in words.iter().chain(&[file]) {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
    assert_eq!(error.matches(file).count(), 1, "the file is named more than once: {error}");
    assert!(!error.contains("panic") && !error.contains("overflow"), "{error}");
    error
}

#[test]
fn cycles() {
    let nodes =
        vec![named("Add", "first", &["x", "b"], "a"), named("Exp", "second", &["a"], "b"), node("Exp", &["b"], "y")];
    refused("cycle.onnx", &model(graph(nodes, vec![])), &["node `first`", "cycle"]);
    refused("self.onnx", &model(graph(vec![named("Add", "own", &["x", "y"], "y")], vec![])), &["node `own`", "cycle"]);
}

#[test]
fn duplicate_names() {
    let twice = vec![named("Exp", "one", &["x"], "y"), named("Neg", "two", &["x"], "y")];
    refused("two-nodes.onnx", &model(graph(twice, vec![])), &["node `two`", "`y` is defined twice"]);
    let weights = vec![floats("w", &[4]), floats("w", &[4])];
    refused("two-weights.onnx", &model(graph(vec![node("Add", &["x", "w"], "y")], weights)), &["`w` is defined twice"]);
    let mut g = graph(vec![node("Exp", &["x"], "y")], vec![]);
    g.input.push(g.input[0].clone());
    refused("two-inputs.onnx", &model(g), &["two graph inputs are named `x`"]);
    let mut exp = named("Softmax", "soft", &["x"], "y");
    exp.attribute = vec![int_attribute("axis", 0), int_attribute("axis", 1)];
    refused("two-attributes.onnx", &model(graph(vec![exp], vec![])), &["node `soft`", "`axis` is given twice"]);
}

#[test]
fn missing_inputs() {
    let unmade = vec![named("Add", "sum", &["x", "from_nowhere"], "y")];
    refused("unmade.onnx", &model(graph(unmade, vec![])), &["node `sum`", "`from_nowhere`", "never made"]);
    let too_few = vec![named("MatMul", "product", &["x"], "y")];
    refused(
        "too-few.onnx",
        &model(graph(too_few, vec![])),
        &["node `product`", "1 inputs, expected 2 to 2", "input 1"],
    );
    let omitted = vec![named("MatMul", "product", &["", "x"], "y")];
    refused("omitted.onnx", &model(graph(omitted, vec![])), &["node `product`", "input 0 is missing"]);
    refused("no-output.onnx", &model(graph(vec![node("Exp", &["x"], "z")], vec![])), &["graph outputs", "`y`"]);
}

#[test]
fn wrong_types() {
    let add = || vec![named("Add", "sum", &["x", "k"], "y")];
    refused("mixed.onnx", &model(graph(add(), vec![ints("k", &[1, 2, 3, 4])])), &["node `sum`", "f32 and i64", "Cast"]);
    let mut g = graph(vec![node("Exp", &["x"], "y")], vec![]);
    g.input[0] = value_info("x", DType::F32, &[Err("n"), Ok(4)]);
    let elem = |g: &mut GraphProto, code: i32| match g.input[0].r#type.as_mut().and_then(|t| t.value.as_mut()) {
        Some(type_proto::Value::TensorType(t)) => t.elem_type = Some(code),
        _ => unreachable!("made above"),
    };
    elem(&mut g, 99);
    refused("code.onnx", &model(g.clone()), &["`x`", "unknown element type 99"]);
    elem(&mut g, 8);
    refused("text.onnx", &model(g.clone()), &["`x`", "string", "tokenizer"]);
    g.input[0].r#type = Some(TypeProto {
        value: Some(type_proto::Value::SparseTensorType(type_proto::SparseTensor { elem_type: Some(1), shape: None })),
        ..TypeProto::default()
    });
    refused("sparse-input.onnx", &model(g), &["`x` is a sparse tensor"]);
    let gather = vec![named("Gather", "pick", &["w", "x"], "y")];
    let weights = vec![floats("w", &[5, 3])];
    let mut m = model(graph(gather, weights));
    m.graph.as_mut().unwrap().input[0] = value_info("x", DType::I64, &[Err("n"), Ok(4)]);
    let path = support::folder("bad-input-type").join("index.onnx");
    std::fs::write(&path, m.encode_to_vec()).unwrap();
    let net = Network::load(&path, Device::Cpu).unwrap();
    let x = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
    let error = net.forward(&[("x", &x)]).unwrap_err().to_string();
    assert!(error.contains("input `x`") && error.contains("expected i64[n, 4]"), "{error}");
}

#[test]
fn absurd_dimensions() {
    let huge = |dims: &[i64]| TensorProto { dims: dims.to_vec(), ..floats("w", &[4]) };
    let add = || vec![node("Add", &["x", "w"], "y")];
    for (file, dims) in [("2-60.onnx", vec![1 << 60]), ("product.onnx", vec![1 << 32, 1 << 32])] {
        refused(file, &model(graph(add(), vec![huge(&dims)])), &["tensor `w`", "larger than memory"]);
    }
    refused("negative.onnx", &model(graph(add(), vec![huge(&[-4])])), &["tensor `w`", "negative dimension"]);
    refused("claims.onnx", &model(graph(add(), vec![huge(&[1 << 30])])), &["tensor `w`", "bytes of data"]);
    let shape = |v: &[i64]| vec![ints("s", v), tensors::to_proto("one", &HostTensor::scalar(1i64))];
    let made: [(&str, &str, &[&str], &[i64]); 5] = [
        ("constant-of-shape.onnx", "ConstantOfShape", &["s"], &[1 << 60]),
        ("expand.onnx", "Expand", &["x", "s"], &[1 << 40, 1, 4]),
        ("tile.onnx", "Tile", &["x", "s"], &[1 << 40, 1]),
        ("pad.onnx", "Pad", &["x", "s"], &[1 << 60, 0, 0, 0]),
        ("pad-twice.onnx", "Pad", &["x", "s"], &[i64::MAX, 0, i64::MAX, 0]),
    ];
    for (file, op, inputs, sizes) in made {
        let nodes = vec![named(op, "big", inputs, "y")];
        refused(file, &model(graph(nodes, shape(sizes))), &["node `big`", "larger than memory"]);
    }
    let range = vec![named("Range", "big", &["zero", "top", "one"], "y")];
    let number = |name: &str, v: i64| tensors::to_proto(name, &HostTensor::scalar(v));
    let numbers = vec![number("zero", 0), number("top", 1 << 60), number("one", 1)];
    refused("range.onnx", &model(graph(range, numbers)), &["node `big`", "larger than memory"]);
    // A declared size that no random input can have.
    let mut g = graph(vec![node("Exp", &["x"], "y")], vec![]);
    g.input[0] = value_info("x", DType::F32, &[Ok(1 << 60), Ok(4)]);
    let path = support::folder("bad-declared").join("declared.onnx");
    std::fs::write(&path, model(g).encode_to_vec()).unwrap();
    let done = support::disback().args(["parity", path.to_str().unwrap()]).output().unwrap();
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(error.contains("input `x`") && error.contains("too large") && error.contains("--inputs"), "{error}");
}

#[test]
fn attributes_of_the_wrong_kind() {
    let mut soft = named("Softmax", "soft", &["x"], "y");
    soft.attribute = vec![float_attribute("axis", 1.0)];
    refused(
        "kind.onnx",
        &model(graph(vec![soft.clone()], vec![])),
        &["node `soft`", "`axis` is a float, expected an integer"],
    );
    soft.attribute = vec![AttributeProto { name: Some("axis".into()), ..AttributeProto::default() }];
    refused("no-kind.onnx", &model(graph(vec![soft], vec![])), &["node `soft`", "`axis`", "no type and no value"]);
    let mut branch = named("If", "branch", &["c"], "y");
    branch.attribute = vec![int_attribute("then_branch", 1), int_attribute("else_branch", 1)];
    let condition = vec![tensors::to_proto("c", &HostTensor::scalar(true))];
    refused(
        "branch.onnx",
        &model(graph(vec![branch], condition)),
        &["node `branch`", "`then_branch` is an integer, expected a graph"],
    );
    let mut unknown = named("Softmax", "soft", &["x"], "y");
    unknown.attribute = vec![int_attribute("temperature", 2)];
    refused("unknown.onnx", &model(graph(vec![unknown], vec![])), &["node `soft`", "`temperature` is not known"]);
}

fn function(name: &str, body: Vec<NodeProto>) -> FunctionProto {
    FunctionProto {
        name: Some(name.into()),
        domain: Some("mine".into()),
        input: vec!["a".into()],
        output: vec!["b".into()],
        node: body,
        opset_import: vec![opset("", 20), opset("mine", 1)],
        ..FunctionProto::default()
    }
}

fn call(name: &str, input: &str, output: &str) -> NodeProto {
    NodeProto { domain: Some("mine".into()), ..named(name, "call", &[input], output) }
}

fn with_functions(functions: Vec<FunctionProto>) -> ModelProto {
    let mut m = model(graph(vec![call("F", "x", "y")], vec![]));
    m.opset_import.push(opset("mine", 1));
    m.functions = functions;
    m
}

#[test]
fn recursive_functions() {
    let own = vec![function("F", vec![call("F", "a", "b")])];
    refused("recursive.onnx", &with_functions(own), &["`F` is recursive"]);
    let mutual = vec![function("F", vec![call("G", "a", "b")]), function("G", vec![call("F", "a", "b")])];
    refused("mutual.onnx", &with_functions(mutual), &["is recursive"]);
    // Through a subgraph.
    let mut branch = named("If", "branch", &["a"], "b");
    let inner = GraphProto { node: vec![call("F", "a", "t")], ..graph(vec![], vec![]) };
    branch.attribute.push(AttributeProto {
        name: Some("then_branch".into()),
        r#type: Some(AttributeType::Graph as i32),
        g: Some(GraphProto { input: vec![], ..inner }),
        ..AttributeProto::default()
    });
    refused("nested.onnx", &with_functions(vec![function("F", vec![branch])]), &["is recursive"]);
    // Twice the body at each of 24 levels, with a long list in the innermost: few bytes that would become gigabytes.
    let mut long = node("Exp", &["a"], "b");
    long.attribute.push(disback::graph::edit::ints_attribute("list", &vec![1; 1 << 17]));
    let mut functions = vec![function("F17", vec![long])];
    for k in (0..17).rev() {
        let next = format!("F{}", k + 1);
        functions.push(function(&format!("F{k}"), vec![call(&next, "a", "t"), call(&next, "t", "b")]));
    }
    functions.push(function("F", vec![call("F0", "a", "b")]));
    refused("growth.onnx", &with_functions(functions), &["function `F17`", "bytes once functions are inlined"]);
}

#[test]
fn data_that_does_not_fit() {
    let add = || vec![node("Add", &["x", "w"], "y")];
    let raw = TensorProto { dims: vec![5], ..floats("w", &[4]) };
    refused("raw.onnx", &model(graph(add(), vec![raw])), &["tensor `w`", "16 bytes of data for f32[5], expected 20"]);
    let list = TensorProto { raw_data: None, float_data: vec![1.0; 3], ..floats("w", &[4]) };
    refused(
        "list.onnx",
        &model(graph(add(), vec![list])),
        &["tensor `w`", "3 elements of data for f32[4], expected 4"],
    );
    let none = TensorProto { raw_data: None, ..floats("w", &[4]) };
    refused("none.onnx", &model(graph(add(), vec![none])), &["tensor `w`", "0 elements of data"]);
}

#[test]
fn sparse_and_string_tensors() {
    let add = || vec![named("Add", "sum", &["x", "w"], "y")];
    let mut g = graph(add(), vec![]);
    g.sparse_initializer.push(SparseTensorProto { values: Some(floats("w", &[2])), ..SparseTensorProto::default() });
    refused("sparse.onnx", &model(g), &["sparse initializer `w`", "dense"]);
    let text = TensorProto {
        data_type: Some(8),
        raw_data: None,
        string_data: vec!["a".into(), "b".into(), "c".into(), "d".into()],
        ..floats("w", &[4])
    };
    refused("text-weight.onnx", &model(graph(add(), vec![text])), &["tensor `w`", "string"]);
    let constant = |name: &str, kind: AttributeType| {
        let mut c = named("Constant", "value", &[], "w");
        let mut a = AttributeProto { name: Some(name.into()), s: Some("text".into()), ..AttributeProto::default() };
        a.sparse_tensor = Some(SparseTensorProto { values: Some(floats("w", &[2])), ..SparseTensorProto::default() });
        a.set_type(kind);
        c.attribute.push(a);
        let mut nodes = vec![c];
        nodes.extend(add());
        model(graph(nodes, vec![]))
    };
    refused("text-node.onnx", &constant("value_string", AttributeType::String), &["node `value`", "text"]);
    refused("sparse-node.onnx", &constant("sparse_value", AttributeType::SparseTensor), &["node `value`", "sparse"]);
}

/// Numbers whose products and sums leave 64 bits, where windows, blocks and shapes are computed from them.
#[test]
fn absurd_attributes() {
    use disback::graph::edit::ints_attribute;
    let square = |nodes, weights| {
        let mut g = graph(nodes, weights);
        g.input[0] = value_info("x", DType::F32, &[Err("n"), Ok(4)]);
        model(g)
    };
    // [n, 4] as an image of one channel.
    let image = || node("Reshape", &["x", "image"], "i");
    let shape = || ints("image", &[1, 1, 2, 4]);
    for (k, op) in ["MaxPool", "AveragePool", "LpPool", "Conv", "ConvTranspose"].into_iter().enumerate() {
        for (j, key) in ["dilations", "strides", "pads", "kernel_shape"].into_iter().enumerate() {
            for (i, v) in [i64::MAX, i64::MIN, 1 << 62].into_iter().enumerate() {
                let weighted = k > 2;
                let mut window = named(op, "window", if weighted { &["i", "w"] } else { &["i"] }, "y");
                if !weighted && key != "kernel_shape" {
                    window.attribute.push(ints_attribute("kernel_shape", &[2, 2]));
                }
                let values = if key == "pads" { vec![v, 0, v, 0] } else { vec![v, 2] };
                window.attribute.push(ints_attribute(key, &values));
                let weights = vec![shape(), floats("w", &[1, 1, 2, 2])];
                let name = format!("{}-{j}-{i}.onnx", op.to_lowercase());
                refused_without(&name, &square(vec![image(), window], weights), &["node `window`", key]);
            }
        }
    }
    for (i, v) in [i64::MAX, i64::MIN, 1 << 62].into_iter().enumerate() {
        let mut blocks = named("DepthToSpace", "blocks", &["i"], "y");
        blocks.attribute.push(int_attribute("blocksize", v));
        refused_without(&format!("blocks-{i}.onnx"), &square(vec![image(), blocks], vec![shape()]), &["node `blocks`"]);
        for mode in ["constant", "reflect", "edge", "wrap"] {
            let mut pad = named("Pad", "edge", &["i", "pads"], "y");
            pad.attribute.push(disback::graph::edit::text_attribute("mode", mode));
            let weights = vec![shape(), ints("pads", &[0, 0, v, 0, 0, 0, v, 0])];
            refused_without(&format!("{mode}-{i}.onnx"), &square(vec![image(), pad], weights), &["node `edge`"]);
        }
    }
    let empty = vec![named("ConstantOfShape", "none", &["s"], "y")];
    let sizes = vec![ints("s", &[0, 1 << 62, 1 << 62])];
    refused_without("empty.onnx", &model(graph(empty, sizes)), &["node `none`", "larger than memory"]);
}

/// Branches and shapes that weights or float inputs decide about are named before anything runs.
#[test]
fn data_that_decides() {
    let side = |op: &str| GraphProto {
        name: Some(op.into()),
        node: vec![node(op, &["x"], "out")],
        output: vec![ValueInfoProto { name: Some("out".into()), ..ValueInfoProto::default() }],
        ..GraphProto::default()
    };
    let attribute = |name: &str, g: GraphProto| AttributeProto {
        name: Some(name.into()),
        r#type: Some(AttributeType::Graph as i32),
        g: Some(g),
        ..AttributeProto::default()
    };
    let mut branch = named("If", "choose", &["c"], "y");
    branch.attribute = vec![attribute("then_branch", side("Exp")), attribute("else_branch", side("Neg"))];
    let mut sum = node("ReduceSum", &["p"], "s");
    sum.attribute.push(int_attribute("keepdims", 0));
    let zero = || tensors::to_proto("zero", &HostTensor::scalar(0f32));
    let nodes = |first: &str| {
        let mut n = vec![node("MatMul", &["x", first], "p"), sum.clone(), node("Greater", &["s", "zero"], "c")];
        n.push(branch.clone());
        n
    };
    let file = model(graph(nodes("w"), vec![floats("w", &[4, 4]), zero()]));
    // By the input and by the weights; either is enough.
    let path = support::folder("data-decides").join("if.onnx");
    std::fs::write(&path, file.encode_to_vec()).unwrap();
    let error = Network::load(&path, Device::Cpu).unwrap_err().to_string();
    for word in ["If node `choose`", "chooses a branch", "graph input `x`", "torch.where", "if.onnx"] {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
    let mut own = file.clone();
    own.graph.as_mut().unwrap().node[0].input = vec!["w".into(), "w".into()];
    let net = Network::import(Model::from_proto(own.clone()), &Default::default(), Device::Cpu);
    // A product of constants is a constant, not a weight: the branch is settled.
    assert!(net.is_ok(), "{:?}", net.err());
    let mut trained = own;
    let g = trained.graph.as_mut().unwrap();
    g.node[0].input = vec!["shape_of_x".into(), "w".into()];
    g.node.insert(0, node("Shape", &["x"], "dims"));
    let mut cast = node("Cast", &["k"], "shape_of_x");
    cast.attribute.push(int_attribute("to", 1));
    g.node.insert(0, cast);
    g.input.push(value_info("k", DType::I64, &[Ok(2), Ok(4)]));
    let error = Network::import(Model::from_proto(trained), &Default::default(), Device::Cpu).unwrap_err().to_string();
    for word in ["If node `choose`", "chooses a branch", "parameter `w`"] {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

/// Long and branching chains of constants: no stack overflow, no path gone through twice.
#[test]
fn weights_behind_long_chains() {
    const LONG: usize = 20_000;
    let chain = |op: &str, twice: bool, length: usize| {
        let mut nodes = Vec::new();
        let mut last = "w".to_owned();
        for k in 0..length {
            let next = format!("v{k}");
            let inputs: Vec<&str> = if twice { vec![&last, &last] } else { vec![&last] };
            nodes.push(node(op, &inputs, &next));
            last = next;
        }
        nodes.push(node("MatMul", &["x", &last], "y"));
        model(graph(nodes, vec![floats("w", &[4, 4])]))
    };
    for (m, what) in [(chain("Identity", false, LONG), "long"), (chain("Add", true, 64), "branching")] {
        let graph = disback::graph::lower::lower(&Model::from_proto(m)).unwrap();
        let roles = disback::graph::roles::classify(&graph, &Default::default(), &Default::default()).unwrap();
        assert_eq!(roles.parameters.len(), 1, "{what}");
    }
}
