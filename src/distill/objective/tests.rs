//! Gradients against closed forms and against an independent computation in PyTorch.

use tch::Device;

use super::*;

/// Target `N(m, v)` and generator `x = theta + s z` (so fake `N(theta, s^2)`), all in one dimension with closed forms:
/// `D(x; sigma) = (sd^2 x + sigma^2 mean) / (sd^2 + sigma^2)`.
fn denoiser(mean: f64, variance: f64, x: &Tensor, sigma: f64) -> Tensor {
    (x * variance + sigma * sigma * mean) / (variance + sigma * sigma)
}

fn configured(kind: ObjectiveKind) -> Arc<dyn Objective> {
    kind.build(&Settings::default())
}

fn gradient(kind: ObjectiveKind, theta: f64, s: f64, m: f64, v: f64, sigma: f64) -> (f64, f64) {
    let (n, options) = (200_000, (Kind::Double, Device::Cpu));
    let z = Tensor::linspace(0.5 / n as f64, 1.0 - 0.5 / n as f64, n, options).special_ndtri().view([n, 1, 1, 1]);
    let e = crate::torch::shim::randn(3, &[n, 1, 1, 1], Device::Cpu).unwrap().to_kind(Kind::Double);
    let t = Tensor::from(theta).set_requires_grad(true);
    let x0 = &t + &z * s;
    let x_t = &x0 + &e * sigma;
    let target = denoiser(m, v, &x_t, sigma).detach();
    let fake = denoiser(theta, s * s, &x_t, sigma).detach();
    let level = Tensor::full([n, 1, 1, 1], sigma, options);
    let terms =
        Terms { log_ratio: None, x0: &x0, x_t: &x_t, noise: &e, sigma: &level, target: &target, fake: Some(&fake) };
    let mean_g = ((&fake - &target) / (&x0 - &target).abs()).mean(Kind::Double).double_value(&[]);
    configured(kind).loss(&terms).unwrap().backward();
    (t.grad().double_value(&[]), mean_g)
}

#[test]
fn gradient_is_that_of_the_smoothed_kl_for_a_gaussian() {
    // KL(N(theta, s^2 + sigma^2) || N(m, v + sigma^2)) has the derivative (theta - m) / (v + sigma^2) in theta;
    // weighted by sigma^2 it is E[D_fake - D_target]. Sign: positive where the generator is too far right.
    for (theta, m, sigma) in [(1.5, -0.5, 0.7), (-2.0, 0.25, 3.0), (0.3, 0.3, 1.0)] {
        let (s, v) = (0.8, 1.3);
        let (got, _) = gradient(ObjectiveKind::DiffInstruct, theta, s, m, v, sigma);
        let expected = sigma * sigma * (theta - m) / (v + sigma * sigma);
        assert!((got - expected).abs() < 0.01 * expected.abs().max(1.0), "{got} for {expected}");
    }
}

#[test]
fn dmd_divides_each_sample_by_its_distance_to_the_target() {
    let (got, mean_g) = gradient(ObjectiveKind::Dmd, 1.5, 0.8, -0.5, 1.3, 0.7);
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
    let terms =
        Terms { log_ratio: None, x0: &x0, x_t: &x0, noise: &target, sigma: &sigma, target: &target, fake: Some(&fake) };
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
    let terms = Terms {
        log_ratio: None,
        x0: &x0,
        x_t: &x0,
        noise: &target,
        sigma: &sigma,
        target: &target,
        fake: Some(&target),
    };
    Dmd.loss(&terms).unwrap().backward();
    assert_eq!(x0.grad().abs().sum(Kind::Float).double_value(&[]), 0.0);
}

/// SiD and SIM on many pixels, each with its own `z` and `e`, so that the means over pixels are expectations: the
/// derivative of the loss in the generator's mean `theta`.
#[allow(clippy::too_many_arguments)]
fn fisher(kind: ObjectiveKind, alpha: f64, theta: f64, s: f64, m: f64, v: f64, phi: f64, u: f64, sigma: f64) -> f64 {
    let (n, options) = (1_000_000, (Kind::Double, Device::Cpu));
    let normal = |seed| crate::torch::shim::randn(seed, &[1, 1, 1, n], Device::Cpu).unwrap().to_kind(Kind::Double);
    // Moments of z and e, and their correlation, exact: no sampling error is left in the linear-Gaussian expectation.
    let z = normal(1);
    let z = (&z - z.mean(Kind::Double)) / z.std(false);
    let e = normal(2);
    let e = &e - e.mean(Kind::Double) - &z * (&e * &z).mean(Kind::Double);
    let e = &e / e.std(false);
    let t = Tensor::from(theta).set_requires_grad(true);
    let x0 = &t + &z * s;
    let x_t = &x0 + &e * sigma;
    let (target, fake) = (denoiser(m, v, &x_t, sigma), denoiser(phi, u, &x_t, sigma));
    let level = Tensor::full([1, 1, 1, 1], sigma, options);
    let terms =
        Terms { log_ratio: None, x0: &x0, x_t: &x_t, noise: &e, sigma: &level, target: &target, fake: Some(&fake) };
    let weight = distance_to_target(&terms).unwrap().double_value(&[]);
    let mut settings = Settings::default();
    settings.sid.alpha = alpha;
    kind.build(&settings).loss(&terms).unwrap().backward();
    t.grad().double_value(&[]) * weight
}

#[test]
fn sid_gradient_is_that_of_the_fisher_divergence_between_gaussians() {
    // D_r - D_f = A x_t + B, D_r = a x_t + b; E x_t = theta, E x_t^2 = theta^2 + s^2 + sigma^2, E x_t x0 = theta^2 + s^2.
    for (theta, s, m, v, phi, u, sigma, alpha) in [
        (1.5, 0.8, -0.5, 1.3, 1.5, 0.64, 0.7, 1.0),
        (-2.0, 0.5, 0.25, 0.9, -1.0, 2.0, 3.0, 1.2),
        (0.4, 1.0, 0.4, 1.0, 0.4, 1.0, 1.0, 1.2),
    ] {
        let (r, f, s2) = (v + sigma * sigma, u + sigma * sigma, sigma * sigma);
        let (a, b) = (v / r, s2 * m / r);
        let (big_a, big_b) = (a - u / f, b - s2 * phi / f);
        let expected = 2.0 * big_a * a * theta + big_a * b + big_b * a
            - 2.0 * big_a * theta
            - big_b
            - 2.0 * alpha * big_a * (big_a * theta + big_b);
        let got = fisher(ObjectiveKind::Sid, alpha, theta, s, m, v, phi, u, sigma);
        assert!((got - expected).abs() < 1e-5 * (1.0 + expected.abs()), "{got} for {expected}");
    }
    // An exact fake score: (theta - m) sigma^4 / (v + sigma^2)^2, so descending moves the generator to the target.
    let exact = fisher(ObjectiveKind::Sid, 1.2, 1.0, 0.9, 0.2, 0.81, 1.0, 0.81, 0.5);
    assert!((exact - 0.8 * 0.0625 / 1.06f64.powi(2)).abs() < 1e-6, "{exact}");
}

/// `E_p[h(q / p) (s_p - s_q)^2] sigma^4 / 2` of `p = N(theta, s^2 + sigma^2)` and `q = N(m, v + sigma^2)`, on a fine grid.
fn expanded(divergence: Divergence, theta: f64, s: f64, m: f64, v: f64, sigma: f64) -> f64 {
    let (p, q) = (s * s + sigma * sigma, v + sigma * sigma);
    let (n, width) = (40_000, 12.0 * p.sqrt());
    let x = Tensor::linspace(theta - width, theta + width, n, (Kind::Double, Device::Cpu));
    let log = |mean: f64, variance: f64| (&x - mean).square() * (-0.5 / variance) - 0.5 * variance.ln();
    let (log_p, log_q) = (log(theta, p), log(m, q));
    let u = (&x - theta) / -p + (&x - m) / q;
    let h = divergence.weight(&(log_q - &log_p)).unwrap();
    let density = log_p.exp();
    let mass = density.sum(Kind::Double);
    ((density * h * u.square()).sum(Kind::Double) / mass).double_value(&[]) * sigma.powi(4) / 2.0
}

#[test]
fn uni_instruct_gradient_is_that_of_the_expanded_divergence_between_gaussians() {
    let (side, options) = (1200, (Kind::Double, Device::Cpu));
    let quantiles =
        Tensor::linspace(0.5 / side as f64, 1.0 - 0.5 / side as f64, side, options).special_ndtri().view([side, 1]);
    let (z, e) = (quantiles.expand([side, side], false), quantiles.tr().expand([side, side], false));
    let column = |x: Tensor| x.reshape([side * side, 1, 1, 1]);
    let (z, e) = (column(z), column(e));
    // A second pixel, far from its target and without a difference of the scores, makes the weights of all samples one.
    let far = 1e7;
    let beside = |x: &Tensor, other: f64| Tensor::cat(&[x, &Tensor::full_like(x, other)], 3);
    for divergence in [
        Divergence::ReverseKl,
        Divergence::ForwardKl,
        Divergence::JensenShannon,
        Divergence::SquaredHellinger,
        Divergence::Jeffreys,
    ] {
        for (theta, s, m, v, sigma) in [(0.9, 1.1, 0.2, 0.8, 0.7), (-0.6, 0.9, 0.3, 0.7, 1.5)] {
            let t = Tensor::from(theta).set_requires_grad(true);
            let x0 = &t + &z * s;
            let x_t = &x0 + &e * sigma;
            let (p, q) = (s * s + sigma * sigma, v + sigma * sigma);
            let level = Tensor::full([side * side, 1, 1, 1], sigma, options);
            let log = |mean: f64, variance: f64| (&x_t - mean).square() * (-0.5 / variance) - 0.5 * variance.ln();
            let ratio = (log(m, q) - log(theta, p)).detach();
            // The scores are fixed functions of x_t: the fake score's mean does not move with theta.
            let terms = Terms {
                x0: &beside(&x0, far),
                x_t: &beside(&x_t, far),
                noise: &beside(&e, 0.0),
                sigma: &level,
                target: &beside(&denoiser(m, v, &x_t, sigma), 0.0),
                fake: Some(&beside(&denoiser(theta, s * s, &x_t, sigma), 0.0)),
                log_ratio: (divergence != Divergence::ReverseKl).then_some(&ratio),
            };
            UniInstruct { divergence, alpha: 0.5, ratio_gradient: true }.loss(&terms).unwrap().backward();
            let mean = divergence.weight(&ratio).unwrap().mean(Kind::Double).double_value(&[]);
            let got = t.grad().double_value(&[]) * far * mean;
            let d = 1e-4;
            let at = |theta| expanded(divergence, theta, s, m, v, sigma);
            let expected = (at(theta + d) - at(theta - d)) / (2.0 * d);
            assert!((got - expected).abs() < 5e-3 * expected.abs(), "{divergence:?}: {got} for {expected}");
        }
    }
}

#[test]
fn uni_instruct_without_the_ratios_gradient_is_sid_by_sample() {
    // Each sample's gradient is SiD's times h over the batch's mean h.
    let numbers = |values: [f64; 3]| Tensor::from_slice(&values).view([3, 1, 1, 1]);
    let (e, sigma) = (numbers([0.3, -1.0, 0.6]), numbers([0.5, 1.0, 2.0]));
    let logs = numbers([-1.0, 0.4, 2.0]);
    let gradient = |objective: &dyn Objective, log_ratio: Option<&Tensor>| {
        let x0 = numbers([0.7, -0.2, 1.4]).set_requires_grad(true);
        let x_t = &x0 + &e * &sigma;
        let (target, fake) = (&x_t * 0.4 + 0.1, &x_t * 0.7 - 0.2);
        let (target, fake) = (&target, Some(&fake));
        objective
            .loss(&Terms { x0: &x0, x_t: &x_t, noise: &e, sigma: &sigma, target, fake, log_ratio })
            .unwrap()
            .backward();
        x0.grad()
    };
    let sid = gradient(&Sid { alpha: 1.2 }, None);
    for divergence in [Divergence::ForwardKl, Divergence::JensenShannon, Divergence::Jeffreys] {
        let uni = UniInstruct { divergence, alpha: 1.2, ratio_gradient: false };
        let h = divergence.weight(&logs).unwrap();
        let expected = &sid * &h / h.mean(Kind::Double);
        let error = (gradient(&uni, Some(&logs)) - &expected).abs().max().double_value(&[]);
        assert!(error < 1e-6, "{divergence:?}: {error}");
        // Towards a node there is no ratio.
        assert_eq!(gradient(&uni, None), sid);
    }
}

#[test]
fn gradients_are_those_of_an_independent_computation_in_score_units() {
    let file: serde_json::Value = serde_json::from_str(include_str!("../../../tests/data/objectives.json")).unwrap();
    let numbers =
        |v: &serde_json::Value| -> Vec<f64> { v.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect() };
    let shape: Vec<i64> = numbers(&file["shape"]).iter().map(|d| *d as i64).collect();
    let e = Tensor::from_slice(&numbers(&file["noise"])).view(shape.as_slice());
    let sigma = Tensor::from_slice(&numbers(&file["sigma"])).view([-1, 1, 1, 1]);
    let denoised =
        |x: &Tensor, p: &[f64]| (x * p[0] + x.tanh() * p[1] + x.roll([1], [3]) * p[2]) / (sigma.square() + 1.0) + p[3];
    let (target, fake) = (numbers(&file["target"]), numbers(&file["fake"]));
    let mut settings = Settings::default();
    (settings.sid.alpha, settings.sim.c) = (file["alpha"].as_f64().unwrap(), file["c"].as_f64().unwrap());
    for (name, expected) in file["gradients"].as_object().unwrap() {
        let choice: Choice = serde_json::from_value(name.as_str().into()).unwrap();
        let objective = choice.build(&settings).unwrap();
        assert_eq!(objective.name(), name);
        let x0 = Tensor::from_slice(&numbers(&file["x0"])).view(shape.as_slice()).set_requires_grad(true);
        let x_t = &x0 + &e * &sigma;
        let (mut real, mut fake) = (denoised(&x_t, &target), denoised(&x_t, &fake));
        if !objective.through_scores() {
            (real, fake) = (real.detach(), fake.detach());
        }
        let fake = objective.needs_fake().then_some(&fake);
        let terms = Terms { log_ratio: None, x0: &x0, x_t: &x_t, noise: &e, sigma: &sigma, target: &real, fake };
        objective.loss(&terms).unwrap().backward();
        let expected = Tensor::from_slice(&numbers(expected)).view(shape.as_slice());
        let error = (x0.grad() - &expected).abs().max().double_value(&[]);
        let scale = expected.abs().max().double_value(&[]);
        // The losses end in an f32 mean.
        assert!(scale > 1e-4 && error < 1e-6 * scale, "{name}: {error:e} of {scale:e}");
    }
}
