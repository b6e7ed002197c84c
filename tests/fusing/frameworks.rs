//! Whole graphs as Flax (jax2onnx) and Keras (tf2onnx) write them; `tests/fixtures/frameworks/make.py` made them.

use std::collections::{BTreeMap, HashMap};

use disback::graph::Model;
use disback::torch::{Forward, ImportOptions, Network};
use tch::{Device, Kind, Tensor};

use crate::graphs::noise;

/// Output and gradients of a network at fixed inputs.
fn run(net: &Network) -> HashMap<String, Tensor> {
    net.params().set_requires_grad(true).unwrap();
    let tensors: Vec<(String, Tensor)> = net
        .inputs()
        .iter()
        .map(|p| {
            let shape: &[i64] = if p.dims().unwrap().len() == 4 { &[3, 8, 8, 2] } else { &[3] };
            let values = noise("input", shape.iter().product::<i64>() as usize);
            (p.name.clone(), Tensor::from_slice(&values).reshape(shape).set_requires_grad(true))
        })
        .collect();
    let named: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    net.forward(&named).unwrap();
    let (_, y) = net.forward(&named).unwrap().remove(0);
    let r = Tensor::from_slice(&noise("r", y.numel())).reshape(y.size());
    (&y * r).sum(Kind::Float).backward();
    let mut all: HashMap<String, Tensor> = net.params().iter().map(|(n, t)| (n.to_owned(), t.grad())).collect();
    all.extend(tensors.iter().map(|(n, t)| (n.clone(), t.grad())));
    all.insert("the output".into(), y.detach());
    all
}

fn check(name: &str, expected: &[(&'static str, usize)], gone: &[&str]) {
    let path = format!("{}/tests/fixtures/frameworks/{name}.onnx", env!("CARGO_MANIFEST_DIR"));
    let load = |fuse| {
        let options = ImportOptions { fuse, ..ImportOptions::default() };
        Network::import(Model::load(path.as_ref()).unwrap(), &options, Device::Cpu).unwrap()
    };
    let (plain, fused) = (load(false), load(true));
    let theirs = run(&plain);
    let norm = |t: &Tensor| t.norm().double_value(&[]);
    // Some gradients vanish but for rounding, as that of a bias of the keys.
    let least = 0.01 * theirs.values().map(norm).fold(0.0, f64::max);
    for (what, mine) in run(&fused) {
        let error = norm(&(&mine - &theirs[&what])) / norm(&theirs[&what]).max(least);
        assert!(error < 2e-5, "{name}: {what} differs by {error:.1e}");
    }
    let report = &fused.shared().fused;
    assert_eq!(report.near_misses, [], "{name}");
    let counts: BTreeMap<_, _> = report.counts();
    for (pattern, count) in expected {
        assert_eq!(counts.get(pattern), Some(count), "{name}: {pattern} of {counts:?}");
    }
    let left: Vec<_> = fused.shared().graph.nodes.iter().map(|n| n.op.as_str()).collect();
    for op in gone {
        assert!(!left.contains(op), "{name}: {op} is left in {left:?}");
    }
    // The file keeps its nodes: only initializers are written.
    let back = fused.to_model(fused.params()).unwrap();
    let (before, after) = (fused.shared().model.proto.graph.as_ref().unwrap(), back.graph.unwrap());
    assert_eq!(before.node.len(), after.node.len());
    println!("{name}: {} nodes, {} steps, {counts:?}", before.node.len(), left.len());
}

const MADE: &[(&str, usize)] = &[("GroupNorm", 4), ("LayerNorm", 1), ("SiLU", 5), ("Attention", 1)];

#[test]
fn flax() {
    check("flax", MADE, &["ReduceMean", "Sigmoid", "Softmax", "Tanh", "Einsum"]);
}

#[test]
fn keras() {
    check("keras", MADE, &["ReduceMean", "GlobalAveragePool", "Sqrt", "Sigmoid", "Softmax", "Tanh"]);
}
