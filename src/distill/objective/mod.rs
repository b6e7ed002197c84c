//! What the generator minimises. One small file an objective; a trajectory node replaces the teacher in `target` alone.

mod diff_instruct;
mod dmd;

use tch::{Kind, Tensor};

use crate::distill::config::ObjectiveKind;
use crate::error::Result;

pub use diff_instruct::DiffInstruct;
pub use dmd::Dmd;

/// What an objective sees of one micro-batch; images are f32 `[B, C, H, W]` in the clean samples' scale.
pub struct Terms<'a> {
    /// The generator's images; the only tensor here that carries the generator's graph, with `x_t`.
    pub x0: &'a Tensor,
    /// `x_t = x0 + sigma e`.
    pub x_t: &'a Tensor,
    /// Noise levels, `[B, 1, 1, 1]`.
    pub sigma: &'a Tensor,
    /// Denoised by the target (a node of the trajectory, or the teacher), guided.
    pub target: &'a Tensor,
    /// Denoised by the fake score, never guided.
    pub fake: &'a Tensor,
}

/// A score-distillation objective.
pub trait Objective: Send + Sync {
    fn name(&self) -> &'static str;

    /// Whether the gradient runs through the two denoisers (Fisher-type objectives). If not, they are evaluated without
    /// a graph.
    fn through_scores(&self) -> bool {
        false
    }

    /// The loss (rank 0) whose gradient the generator descends.
    fn loss(&self, terms: &Terms) -> Result<Tensor>;
}

/// The objective of that name.
pub fn objective(kind: ObjectiveKind) -> Box<dyn Objective> {
    match kind {
        ObjectiveKind::DiffInstruct => Box::new(DiffInstruct),
        ObjectiveKind::Dmd => Box::new(Dmd),
    }
}

/// `0.5 mean (x0 - sg[x0 - g])^2`, a loss whose gradient with respect to `x0` is `g / numel`; its value is half the mean
/// square of `g`.
pub fn surrogate(x0: &Tensor, g: &Tensor) -> Result<Tensor> {
    let goal = x0.detach().f_sub(&g.detach())?;
    Ok(x0.f_sub(&goal)?.f_square()?.f_mean(Kind::Float)?.f_mul_scalar(0.5)?)
}

/// Mean over everything but the batch, `[B, 1, 1, ...]`.
pub fn mean_of_each(x: &Tensor) -> Result<Tensor> {
    let dims: Vec<i64> = (1..x.dim() as i64).collect();
    Ok(x.f_mean_dim(dims.as_slice(), true, Kind::Float)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    /// Target `N(m, v)` and generator `x = theta + s z` (so fake `N(theta, s^2)`), all in one dimension with closed forms:
    /// `D(x; sigma) = (sd^2 x + sigma^2 mean) / (sd^2 + sigma^2)`.
    fn denoiser(mean: f64, variance: f64, x: &Tensor, sigma: f64) -> Tensor {
        (x * variance + sigma * sigma * mean) / (variance + sigma * sigma)
    }

    fn gradient(kind: ObjectiveKind, theta: f64, s: f64, m: f64, v: f64, sigma: f64) -> (f64, f64, f64) {
        let (n, options) = (200_000, (Kind::Double, Device::Cpu));
        let z = Tensor::linspace(0.5 / n as f64, 1.0 - 0.5 / n as f64, n, options).special_ndtri().view([n, 1, 1, 1]);
        let e = crate::torch::shim::randn(3, &[n, 1, 1, 1], Device::Cpu).unwrap().to_kind(Kind::Double);
        let t = Tensor::from(theta).set_requires_grad(true);
        let x0 = &t + &z * s;
        let x_t = &x0 + &e * sigma;
        let target = denoiser(m, v, &x_t, sigma).detach();
        let fake = denoiser(theta, s * s, &x_t, sigma).detach();
        let level = Tensor::full([n, 1, 1, 1], sigma, options);
        let terms = Terms { x0: &x0, x_t: &x_t, sigma: &level, target: &target, fake: &fake };
        let weight = 1.0 / (&x0 - &target).abs().mean(Kind::Double).double_value(&[]);
        let mean_g = ((&fake - &target) / (&x0 - &target).abs()).mean(Kind::Double).double_value(&[]);
        objective(kind).loss(&terms).unwrap().backward();
        (t.grad().double_value(&[]), weight, mean_g)
    }

    #[test]
    fn gradient_is_that_of_the_smoothed_kl_for_a_gaussian() {
        // KL(N(theta, s^2 + sigma^2) || N(m, v + sigma^2)) has the derivative (theta - m) / (v + sigma^2) in theta;
        // weighted by sigma^2 it is E[D_fake - D_target]. Sign: positive where the generator is too far right.
        for (theta, m, sigma) in [(1.5, -0.5, 0.7), (-2.0, 0.25, 3.0), (0.3, 0.3, 1.0)] {
            let (s, v) = (0.8, 1.3);
            let (got, _, _) = gradient(ObjectiveKind::DiffInstruct, theta, s, m, v, sigma);
            let expected = sigma * sigma * (theta - m) / (v + sigma * sigma);
            assert!((got - expected).abs() < 0.01 * expected.abs().max(1.0), "{got} for {expected}");
        }
    }

    #[test]
    fn dmd_divides_each_sample_by_its_distance_to_the_target() {
        let (got, _, mean_g) = gradient(ObjectiveKind::Dmd, 1.5, 0.8, -0.5, 1.3, 0.7);
        assert!((got / mean_g - 1.0).abs() < 1e-4, "{got} for {mean_g}");
        assert!(got > 0.0, "descending must move the generator left, towards the target");
        assert!(gradient(ObjectiveKind::Dmd, -2.0, 0.8, 0.5, 1.3, 0.7).0 < 0.0);
    }

    #[test]
    fn dmd_weight_is_the_samples_own_over_all_pixels() {
        let x0 = Tensor::from_slice(&[1.0f32, 3.0, 10.0, 30.0]).view([2, 1, 1, 2]).set_requires_grad(true);
        let target = Tensor::zeros([2, 1, 1, 2], (Kind::Float, Device::Cpu));
        let fake = Tensor::from_slice(&[2.0f32, 4.0, 40.0, -20.0]).view([2, 1, 1, 2]);
        let sigma = Tensor::ones([2, 1, 1, 1], (Kind::Float, Device::Cpu));
        let terms = Terms { x0: &x0, x_t: &x0, sigma: &sigma, target: &target, fake: &fake };
        Dmd.loss(&terms).unwrap().backward();
        // Distances 2 and 20; g = (1, 2) and (2, -1), over 4 elements.
        let got = Vec::<f32>::try_from(&x0.grad().flatten(0, -1)).unwrap();
        for (g, e) in got.iter().zip([0.25, 0.5, 0.5, -0.25]) {
            assert!((g - e).abs() < 1e-6, "{got:?}");
        }
    }

    #[test]
    fn a_sample_equal_to_its_target_gives_no_nan() {
        let x0 = Tensor::ones([1, 1, 1, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let (target, sigma) = (x0.detach(), Tensor::ones([1, 1, 1, 1], (Kind::Float, Device::Cpu)));
        let terms = Terms { x0: &x0, x_t: &x0, sigma: &sigma, target: &target, fake: &target };
        Dmd.loss(&terms).unwrap().backward();
        assert_eq!(x0.grad().abs().sum(Kind::Float).double_value(&[]), 0.0);
    }
}
