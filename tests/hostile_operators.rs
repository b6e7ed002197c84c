//! Broken uses of every operator: ONNX's cases with attributes of other values and kinds, inputs left out or exchanged, and
//! data of other ranks and sizes. Whatever comes of it, nothing may panic, and nothing may be allocated without end.
#![cfg(feature = "train")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use disback::conformance::{list, read_inputs};
use disback::graph::lower::lower;
use disback::graph::{Graph, Model};
use disback::onnx::attribute_proto::AttributeType;
use disback::onnx::{AttributeProto, ModelProto, NodeProto};
use disback::torch::exec::kernel::Value;
use disback::torch::exec::plan::Plan;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

const ROUNDS: u64 = 6;

fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    (rng.next_u64() % n.max(1) as u64) as usize
}

fn odd_int(rng: &mut ChaCha8Rng) -> i64 {
    [0, -1, 1, 2, 3, 7, -9, 100, 1 << 40, 1 << 60, i64::MIN, i64::MAX][below(rng, 12)]
}

fn odd_float(rng: &mut ChaCha8Rng) -> f32 {
    [0.0, -1.0, 1e30, f32::NAN, f32::INFINITY, 0.3][below(rng, 6)]
}

fn attribute(a: &mut AttributeProto, rng: &mut ChaCha8Rng) {
    match below(rng, 6) {
        0 => a.set_type([AttributeType::Int, AttributeType::Floats, AttributeType::String][below(rng, 3)]),
        1 => a.ints.push(odd_int(rng)),
        2 => {
            a.ints.pop();
            a.floats.clear();
        }
        _ => {
            a.i = Some(odd_int(rng));
            a.f = Some(odd_float(rng));
            let (n, m) = (a.ints.len(), a.floats.len());
            if n > 0 {
                a.ints[below(rng, n)] = odd_int(rng);
            }
            if m > 0 {
                a.floats[below(rng, m)] = odd_float(rng);
            }
            if below(rng, 4) == 0 {
                a.s = Some("bogus".into());
            }
        }
    }
}

fn node(n: &mut NodeProto, others: &[String], rng: &mut ChaCha8Rng) {
    let inputs = n.input.len();
    match below(rng, 8) {
        0 if inputs > 0 => n.input[below(rng, inputs)].clear(),
        1 => drop(n.input.pop()),
        2 if inputs > 0 => n.input[below(rng, inputs)] = others[below(rng, others.len())].clone(),
        3 => n.input.push(others[below(rng, others.len())].clone()),
        4 => drop(n.attribute.pop()),
        5 => n.output.push(String::new()),
        _ => {
            let count = n.attribute.len();
            if count > 0 {
                attribute(&mut n.attribute[below(rng, count)], rng);
            }
        }
    }
}

/// Declared types are dropped, so that data of any shape gets past the signature.
fn mutated(model: &ModelProto, rng: &mut ChaCha8Rng) -> ModelProto {
    let mut m = model.clone();
    let Some(g) = m.graph.as_mut() else { return m };
    let names: Vec<String> = g.input.iter().map(|i| i.name().to_owned()).collect();
    for port in g.input.iter_mut().chain(&mut g.output) {
        port.r#type = None;
    }
    if below(rng, 3) > 0 && !names.is_empty() && !g.node.is_empty() {
        let count = g.node.len();
        node(&mut g.node[below(rng, count)], &names, rng);
    }
    m
}

fn data(t: &Tensor, rng: &mut ChaCha8Rng) -> Tensor {
    let changed = match below(rng, 9) {
        0 => Tensor::f_zeros([0i64; 0], (t.kind(), Device::Cpu)),
        1 => Tensor::f_zeros([0], (t.kind(), Device::Cpu)),
        2 => t.f_unsqueeze(0),
        3 => t.f_flatten(0, -1),
        4 => t.f_narrow(0, 0, t.size().first().map_or(0, |n| n - 1)),
        5 => t.f_select(-1, 0),
        6 if t.kind() == Kind::Int64 => t.f_full_like(odd_int(rng)),
        7 => t.f_to_kind([Kind::Int64, Kind::Float, Kind::Bool, Kind::Uint8][below(rng, 4)]),
        _ => Ok(t.shallow_clone()),
    };
    changed.unwrap_or_else(|_| t.shallow_clone())
}

fn attempt(model: &ModelProto, inputs: &[Value], rng: &mut ChaCha8Rng) -> disback::Result<()> {
    let graph: Graph = lower(&Model::from_proto(mutated(model, rng)))?;
    let plan = Plan::new(&graph, &[], disback::torch::ops::registry())?;
    let inputs: Vec<(&str, Value)> = graph
        .inputs
        .iter()
        .zip(inputs)
        .map(|(p, v)| {
            let v = match v.tensor(Device::Cpu) {
                Ok(t) if below(rng, 2) == 0 => Value::device(data(t, rng)),
                _ => v.clone(),
            };
            (p.name.as_str(), v)
        })
        .collect();
    plan.run_typed(&inputs, &[], Device::Cpu, &mut |_, _| {}).map(|_| ())
}

fn cases() -> Vec<PathBuf> {
    let libs = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/lib");
    let found = std::fs::read_dir(&libs)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path().join("site-packages/onnx/backend/test/data/node"))
        .find(|p| p.is_dir());
    list(&found.unwrap_or_else(|| panic!("no wheel onnx==1.22.0 under {}: run `make setup`", libs.display()))).unwrap()
}

#[test]
fn no_broken_operator_panics() {
    tch::set_num_threads(1);
    // Panics of tch, which our kernels turn into errors, are no news; ours are, even where they become errors.
    static OURS: Mutex<Vec<String>> = Mutex::new(Vec::new());
    std::panic::set_hook(Box::new(|info| {
        if let Some(at) = info.location().filter(|l| l.file().starts_with("src/")) {
            OURS.lock().unwrap().push(at.to_string());
        }
    }));
    let filter = std::env::var("DISBACK_CASES").unwrap_or_default();
    let rounds = std::env::var("DISBACK_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(ROUNDS);
    let mut panics = Vec::new();
    let mut refused = 0;
    for dir in cases().iter().filter(|d| d.to_string_lossy().contains(&filter)) {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        // A loop of 2^60 rounds is legal, and nobody waits for it.
        if ["loop", "range"].iter().any(|s| name.contains(s)) {
            continue;
        }
        let model = Model::load(&dir.join("model.onnx")).unwrap();
        let Ok(inputs) = read_inputs(dir, &model) else { continue };
        for seed in 0..rounds {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            if std::env::var_os("DISBACK_VERBOSE").is_some() {
                eprintln!("{name} {seed}");
            }
            match catch_unwind(AssertUnwindSafe(|| attempt(&model.proto, &inputs, &mut rng))) {
                Ok(Ok(())) => {}
                Ok(Err(_)) => refused += 1,
                Err(panic) => {
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    panics.push(format!("{name} with seed {seed}: {}", text.unwrap_or_default()));
                }
            }
        }
    }
    drop(std::panic::take_hook());
    let mut ours = OURS.lock().unwrap().clone();
    ours.sort();
    ours.dedup();
    panics.extend(ours);
    assert!(refused > 100 || !filter.is_empty(), "only {refused} mutations were refused: nothing was broken");
    assert!(panics.is_empty(), "{} panics:\n{}", panics.len(), panics.join("\n"));
}
