//! Low-rank adaptation (Hu et al. 2021): a network trains `W + (alpha / rank) B A` with `W` frozen and shared by all its
//! copies, so that each of the method's networks costs its factors alone.

use std::rc::Rc;

use globset::{Glob, GlobSetBuilder};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::graph::roles::{Parameter, Role};
use crate::torch::params::ParamSet;
use crate::torch::shim;

/// Settings of low-rank adaptation (LoRA, Hu et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct LoraOptions {
    /// Rank of the change to each weight, at least 1; a weight whose own rank is smaller gets a change of that rank.
    pub rank: usize,
    /// Weight of the product is `alpha / rank`.
    pub alpha: f64,
    /// Globs over the names of the weights of Conv, Gemm and MatMul.
    pub include: Vec<String>,
    /// Seed of the factors' initial values.
    pub seed: u64,
}

/// What the adapted copies of one network share.
#[derive(Debug)]
pub struct Adapter {
    /// All weights of the network, frozen.
    base: ParamSet,
    /// Places of the adapted weights, in the order of the factors: `A` and `B` of the first, of the second...
    places: Vec<usize>,
    scale: f64,
}

impl Adapter {
    /// The adapter of these weights and its first factors: `A` random, `B` zero, so that nothing is changed yet.
    ///
    /// Errors: a glob that names no weight of a Conv, Gemm or MatMul; a rank above every such weight's.
    pub fn new(base: ParamSet, parameters: &[Parameter], options: &LoraOptions) -> Result<(Rc<Self>, ParamSet)> {
        let adaptable: Vec<usize> = parameters
            .iter()
            .enumerate()
            .filter(|(_, p)| matches!(p.role, Role::ConvWeight | Role::LinearWeight) && p.shape.len() >= 2)
            .map(|(k, _)| k)
            .collect();
        let mut globs = GlobSetBuilder::new();
        for glob in &options.include {
            let matcher = Glob::new(glob).map_err(|e| Error::usage(format!("lora.include: `{glob}`: {}", e.kind())))?;
            let one = matcher.compile_matcher();
            if !adaptable.iter().any(|&k| one.is_match(&parameters[k].name)) {
                let some: Vec<_> = adaptable.iter().take(5).map(|&k| format!("`{}`", parameters[k].name)).collect();
                return Err(Error::usage(format!(
                    "lora.include: `{glob}` matches no weight of a Conv, Gemm or MatMul in this network"
                ))
                .hint(format!("such weights are {}, ...; `disback inspect --parameters` shows all", some.join(", "))));
            }
            globs.add(matcher);
        }
        let globs = globs.build().map_err(|e| Error::usage(format!("lora.include: {e}")))?;
        let places: Vec<usize> = adaptable.into_iter().filter(|&k| globs.is_match(&parameters[k].name)).collect();
        if places.is_empty() {
            return Err(Error::usage("lora.include is empty: there is nothing to train"));
        }
        let least = |k: &usize| {
            let rows = base.tensors()[*k].size()[0].max(1);
            rows.min(base.tensors()[*k].numel() as i64 / rows)
        };
        let most = places.iter().map(least).max().unwrap_or(0);
        if options.rank as i64 > most {
            return Err(Error::usage(format!(
                "lora.rank is {}, but no adapted weight has a rank above {most}",
                options.rank
            ))
            .hint("4 to 64 are usual; 0 trains all weights"));
        }
        let (mut names, mut tensors) = (Vec::new(), Vec::new());
        for (n, &k) in places.iter().enumerate() {
            let weight = &base.tensors()[k];
            let rows = weight.size()[0];
            let columns = weight.numel() as i64 / rows.max(1);
            let rank = (options.rank as i64).min(rows).min(columns);
            let draw = options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(n as u64);
            let a = shim::randn(draw, &[rank, columns], weight.device())?;
            tensors.push(a.f_mul_scalar((1.0 / columns as f64).sqrt())?);
            tensors.push(Tensor::f_zeros([rows, rank], (Kind::Float, weight.device()))?);
            names.push(format!("{}.lora_a", parameters[k].name));
            names.push(format!("{}.lora_b", parameters[k].name));
        }
        // Two teachers with weights of the same names must not be taken for one another by their factors.
        let factors = ParamSet::new(names, tensors)?.of_base(&base.hash()?);
        base.set_requires_grad(false)?;
        Ok((Rc::new(Self { base, places, scale: options.alpha / options.rank as f64 }), factors))
    }

    /// Bytes of all frozen weights, which are in f32.
    pub fn bytes(&self) -> u64 {
        4 * self.base.elements() as u64
    }

    /// The network's weights under these factors, in its own order.
    pub fn weights(&self, factors: &ParamSet) -> Result<Vec<Tensor>> {
        let mut weights: Vec<Tensor> = self.base.tensors().iter().map(Tensor::shallow_clone).collect();
        for (pair, &k) in factors.tensors().chunks_exact(2).zip(&self.places) {
            let change = pair[1].f_matmul(&pair[0])?.f_mul_scalar(self.scale)?;
            weights[k] = weights[k].f_add(&change.f_view_as(&weights[k])?)?;
        }
        Ok(weights)
    }

    /// [`Adapter::weights`] with the network's names and no graph.
    pub fn merged(&self, factors: &ParamSet) -> Result<ParamSet> {
        self.base.with_tensors(tch::no_grad(|| self.weights(factors))?)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Device;

    use super::*;
    use crate::torch::{Forward, Network};

    fn options(include: &str) -> LoraOptions {
        LoraOptions { rank: 2, alpha: 3.0, include: vec![include.into()], seed: 5 }
    }

    #[test]
    fn factors_change_the_adapted_weights_and_nothing_else() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits/teacher.onnx");
        let plain = Network::load(&path, Device::Cpu).unwrap();
        let adapted = plain.duplicate().unwrap().adapt(&options("*")).unwrap();
        let x = shim::randn(1, &[2, 1, 8, 8], Device::Cpu).unwrap();
        let (sigma, labels) = (Tensor::from_slice(&[0.5f32, 3.0]), Tensor::from_slice(&[1i64, 7]));
        let inputs = [("x", &x), ("sigma", &sigma), ("labels", &labels)];
        let run = |n: &Network| n.forward(&inputs).unwrap().remove(0).1;
        assert_eq!(run(&adapted), run(&plain), "nothing is changed yet, bit for bit");
        assert!(adapted.params().elements() * 4 < plain.params().elements());

        let copy = adapted.duplicate().unwrap();
        copy.params().set_requires_grad(true).unwrap();
        for (k, t) in copy.params().tensors().iter().enumerate() {
            let noise = shim::randn(k as u64, &t.size(), Device::Cpu).unwrap() * 0.1;
            tch::no_grad(|| t.shallow_clone().copy_(&noise));
        }
        assert_eq!(run(&adapted), run(&plain), "copies have factors of their own");
        // The same by hand: W + (3 / 2) B A on every weight of two dimensions or more.
        let merged = copy.merged().unwrap().unwrap();
        for (name, weight) in plain.params().iter() {
            let factor =
                |s: &str| copy.params().iter().find(|(n, _)| *n == format!("{name}.lora_{s}")).map(|(_, t)| t.detach());
            let expected = match (factor("a"), factor("b")) {
                (Some(a), Some(b)) => weight + (b.matmul(&a) * 1.5).view_as(weight),
                _ => weight.shallow_clone(),
            };
            let found = merged.iter().find(|(n, _)| *n == name).unwrap().1;
            assert!((found - expected).abs().max().double_value(&[]) < 1e-6, "{name}");
        }
        let whole = plain.duplicate().unwrap();
        whole.params().copy_from(&merged).unwrap();
        let (a, b) = (run(&copy), run(&whole));
        assert!((&a - &b).abs().max().double_value(&[]) < 1e-5 * b.abs().max().double_value(&[]));
        assert!((&a - run(&plain)).abs().max().double_value(&[]) > 1e-3);
        a.square().mean(Kind::Float).backward();
        let reached = shim::grads(copy.params().tensors()).unwrap();
        assert!(reached.iter().all(Option::is_some), "every factor is trained");
        assert!(adapted.params().hash().unwrap() != copy.params().hash().unwrap());
    }

    #[test]
    fn globs_choose_and_factors_belong_to_their_weights() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits/teacher.onnx");
        let plain = Network::load(&path, Device::Cpu).unwrap();
        let first = plain.shared().parameters.iter().find(|p| p.role == Role::ConvWeight).unwrap().name.clone();
        let one = plain.duplicate().unwrap().adapt(&options(&first)).unwrap();
        assert_eq!(one.params().names(), [format!("{first}.lora_a"), format!("{first}.lora_b")]);
        let e = plain.duplicate().unwrap().adapt(&options("none.*")).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("`none.*` matches no weight"), "{e}");
        assert!(plain.duplicate().unwrap().adapt(&options("a[")).unwrap_err().to_string().contains("lora.include"));
        // The same factors on other weights are not the same network.
        let other = plain.duplicate().unwrap();
        let _ = tch::no_grad(|| other.params().tensors()[0].shallow_clone().fill_(0.5));
        let other = other.adapt(&options(&first)).unwrap();
        assert_ne!(other.params().hash().unwrap(), one.params().hash().unwrap());
    }
}
