//! Fresh weights for an imported network, layer by layer.

use crate::error::Result;
use crate::graph::Graph;
use crate::graph::ir::{Consumers, Node};
use crate::graph::roles::{Parameter, Role};
use crate::torch::params::ParamSet;
use crate::torch::shim;

/// Replaces every weight: those of layers by `N(0, 1 / fan_in)` (LeCun et al. 1998), which keeps the size of what goes
/// through; tables of embeddings by `N(0, 1)`; scales become 1 and biases 0. The k-th parameter depends on `seed` and k
/// alone.
pub fn reinitialise(graph: &Graph, parameters: &[Parameter], params: &ParamSet, seed: u64) -> Result<()> {
    let consumers = graph.consumers();
    tch::no_grad(|| {
        for (k, (parameter, tensor)) in parameters.iter().zip(params.tensors()).enumerate() {
            let mut tensor = tensor.shallow_clone();
            let std = match parameter.role {
                Role::Scale => {
                    let _ = tensor.f_fill_(1.0)?;
                    continue;
                }
                Role::Bias | Role::Buffer => {
                    let _ = tensor.f_zero_()?;
                    continue;
                }
                Role::Embedding => 1.0,
                Role::ConvWeight | Role::LinearWeight => {
                    1.0 / (fan_in(graph, &consumers, parameter).max(1) as f64).sqrt()
                }
            };
            let draw = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(k as u64);
            let fresh = shim::randn(draw, &tensor.size(), tensor.device())?;
            tensor.f_copy_(&fresh.f_mul_scalar(std)?)?;
        }
        Ok(())
    })
}

fn ints(node: &Node, name: &str) -> Vec<i64> {
    node.attributes.ints(name).ok().flatten().unwrap_or_default()
}

/// How many inputs one output of the layer that reads this weight sums over.
fn fan_in(graph: &Graph, consumers: &Consumers, parameter: &Parameter) -> usize {
    let mut value = parameter.value;
    // The weight's dimensions in the order in which the layer sees them.
    let mut dims = parameter.shape.clone();
    for _ in 0..8 {
        let Some(&(node, slot)) = consumers.get(&value).and_then(|c| c.iter().find(|(n, _)| *n != usize::MAX)) else {
            break;
        };
        let node = &graph.nodes[node];
        let rank = dims.len();
        let product = |dims: &[usize]| dims.iter().product::<usize>();
        match (node.op.as_str(), slot) {
            ("Conv" | "FusedConv", 1) if rank > 1 => return product(&dims[1..]),
            ("ConvTranspose", 1) if rank > 2 => {
                // An output is reached by one of `stride` shifts of the kernel.
                let strides = ints(node, "strides").iter().product::<i64>().max(1);
                return dims[0] * product(&dims[2..]) / strides as usize;
            }
            ("MatMul" | "FusedMatMul", 1) if rank > 1 => return dims[rank - 2],
            ("MatMul" | "FusedMatMul", 0) if rank > 1 => return dims[rank - 1],
            ("Gemm" | "FusedGemm", 1) if rank == 2 => {
                let transposed = node.attributes.int_or("transB", 0).unwrap_or(0) != 0;
                return if transposed { dims[1] } else { dims[0] };
            }
            ("Transpose", _) => {
                let perm = ints(node, "perm");
                if perm.len() == rank && perm.iter().all(|p| (0..rank as i64).contains(p)) {
                    dims = perm.iter().map(|p| dims[*p as usize]).collect();
                } else {
                    dims.reverse();
                }
            }
            ("Cast" | "CastLike" | "Identity", 0) => {}
            _ => break,
        }
        let Some(next) = node.output(0) else { break };
        value = next;
    }
    // Another layer (a recurrent one, an Einsum): the usual [out, in...].
    if parameter.shape.len() < 2 { parameter.shape.iter().product() } else { parameter.shape[1..].iter().product() }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::torch::{Forward, Network};

    fn digits() -> Network {
        Network::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits/teacher.onnx"), Device::Cpu).unwrap()
    }

    #[test]
    fn every_weight_is_fresh_and_of_the_size_that_its_layer_wants() {
        let (network, before) = (digits(), digits());
        network.reinitialise(5).unwrap();
        let mut layers = 0;
        for (p, t) in network.shared().parameters.iter().zip(network.params().tensors()) {
            let all = |v: f64| t.eq(v).all().int64_value(&[]) == 1;
            match p.role {
                Role::Scale => assert!(all(1.0), "{}", p.name),
                Role::Bias => assert!(all(0.0), "{}", p.name),
                Role::Embedding | Role::ConvWeight | Role::LinearWeight => {
                    let fan = match p.role {
                        Role::Embedding => 1,
                        // Convolutions of the file are [out, in, h, w]; its linear layers stand for y = x W^T.
                        _ => p.shape[1..].iter().product(),
                    };
                    let n = t.numel() as f64;
                    let (mean, std) = (t.mean(Kind::Double).double_value(&[]), t.std(true).double_value(&[]));
                    let expected = 1.0 / (fan as f64).sqrt();
                    // Five standard errors of a standard deviation and of a mean.
                    assert!((std / expected - 1.0).abs() < 5.0 / (2.0 * n).sqrt(), "{}: {std} for {expected}", p.name);
                    assert!(mean.abs() < 5.0 * expected / n.sqrt(), "{}: {mean}", p.name);
                    layers += 1;
                }
                Role::Buffer => panic!("{} is trained", p.name),
            }
        }
        assert!(layers > 20);
        assert_ne!(network.params().hash().unwrap(), before.params().hash().unwrap());
        let again = digits();
        again.reinitialise(5).unwrap();
        assert_eq!(again.params().hash().unwrap(), network.params().hash().unwrap(), "a function of the seed");
        again.reinitialise(6).unwrap();
        assert_ne!(again.params().hash().unwrap(), network.params().hash().unwrap());
        // What goes through keeps its size.
        let x = shim::randn(1, &[4, 1, 8, 8], Device::Cpu).unwrap();
        let (sigma, labels) = (Tensor::from_slice(&[0.5f32, 3.0, 0.1, 9.0]), Tensor::from_slice(&[1i64, 7, 0, 3]));
        let out = network.forward(&[("x", &x), ("sigma", &sigma), ("labels", &labels)]).unwrap().remove(0).1;
        let largest = out.abs().max().double_value(&[]);
        assert!(largest > 0.05 && largest < 20.0, "{largest}");
    }
}
