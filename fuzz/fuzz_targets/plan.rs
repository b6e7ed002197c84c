//! Bytes through the import as a trainable network: a plan, its specialisation for small inputs, a second run on the
//! specialised plan, and backward. Nothing of ours may panic; libtorch must not crash, whatever the graph asks of it.
#![no_main]

mod mutate;

use bytes::Bytes;
use disback::graph::Model;
use disback::onnx::ModelProto;
use disback::torch::{Forward, ImportOptions, Network, convert};
use libfuzzer_sys::{fuzz_crossover, fuzz_mutator, fuzz_target};
use tch::{Device, Kind, Tensor};

/// Elements of one input, and of all initializers together.
const MOST_ELEMENTS: usize = 1 << 12;
const MOST_BYTES: usize = 1 << 20;

fuzz_target!(
    init: {
        tch::set_num_threads(1);
        // tch's own panics become errors in the kernels; ours are findings.
        std::panic::set_hook(Box::new(|info| {
            let place = info.location().map(|l| l.file().to_owned()).unwrap_or_default();
            if !place.contains("/tch-") {
                eprintln!("{info}");
                std::process::abort();
            }
        }));
    },
    |data: &[u8]| {
        let _ = train(data);
    }
);
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { mutate::mutate(data, size, max_size, seed) });
fuzz_crossover!(|a: &[u8], b: &[u8], out: &mut [u8], seed: u32| { mutate::cross(a, b, out, seed) });

/// Whether the file itself is small: nested functions may still make it large.
fn small(proto: &ModelProto) -> bool {
    let Some(graph) = &proto.graph else { return false };
    graph.node.len() <= 512
        && graph.initializer.iter().map(|t| t.raw_data.as_ref().map_or(0, |d| d.len())).sum::<usize>() <= MOST_BYTES
}

fn train(data: &[u8]) -> disback::Result<()> {
    let model = Model::from_bytes(Bytes::copy_from_slice(data))?;
    if !small(&model.proto) {
        return Ok(());
    }
    let net = Network::import(model, &ImportOptions::default(), Device::Cpu)?;
    net.params().set_requires_grad(true)?;
    let mut inputs = Vec::new();
    for port in net.inputs() {
        let shape: Vec<i64> = port
            .dims()
            .unwrap_or_else(|| vec![None, None])
            .into_iter()
            .map(|d| d.unwrap_or(2).min(1 << 20) as i64)
            .collect();
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d as usize));
        if elements.is_none_or(|n| n > MOST_ELEMENTS) {
            return Ok(());
        }
        let kind = port.dtype.map_or(Kind::Float, convert::kind);
        let n = elements.unwrap_or(1) as i64;
        let values = Tensor::f_arange(n, (Kind::Float, Device::Cpu))?.f_remainder(3)?;
        inputs.push((port.name.clone(), values.f_to_kind(kind)?.f_reshape(&shape[..])?));
    }
    let named: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let first = net.forward(&named)?;
    let second = net.forward(&named)?;
    assert_eq!(first.len(), second.len());
    for ((name, a), (_, b)) in first.iter().zip(&second) {
        // Sizes that depend on the data must be the same for the same data, and the specialised plan must not differ.
        assert_eq!((a.size(), a.kind()), (b.size(), b.kind()), "output `{name}` changed with the specialised plan");
    }
    for (_, y) in second {
        if y.kind() == Kind::Float && y.requires_grad() {
            y.f_sum(Kind::Float)?.f_backward()?;
            break;
        }
    }
    Ok(())
}
