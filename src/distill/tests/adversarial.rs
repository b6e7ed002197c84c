//! DMD2 and f-distill: the discriminator, its data, and that it leaves everything else alone.

use super::*;
use crate::distill::batches::Batches;
use crate::distill::config::HeadKind;
use crate::distill::draws::{Phase, Purpose};
use crate::distill::gan::{Axes, Gan, Head};
use crate::distill::objective::{Divergence, FDistill, Objective, ObjectiveKind, Terms};
use crate::io::npy;
use crate::tensor::HostTensor;
use crate::torch::shim;

/// `n` samples of `N(mean, sd^2)` per channel as an archive of images.
fn real_images(dir: &std::path::Path, mean: &[f32], sd: &[f32], n: i64) -> String {
    let c = mean.len() as i64;
    let z = shim::randn(17, &[n, c], Device::Cpu).unwrap();
    let x = z * Tensor::from_slice(sd) + Tensor::from_slice(mean);
    let values = Vec::<f32>::try_from(x.view(-1)).unwrap();
    let path = dir.join("real.npz");
    let images = HostTensor::new(&[n as usize, mean.len(), 1, 1], &values).unwrap();
    npy::write_npz(&path, &[("images", &images)]).unwrap();
    path.display().to_string()
}

fn adversarial(dir: &std::path::Path, objective: ObjectiveKind) -> Config {
    let mut c = config();
    c.objective = objective.into();
    c.gan.data = real_images(dir, &[0.8, -0.4], &[0.7, 0.3], 4000);
    c.gan.taps = vec!["moments".into()];
    c.gan.lr = 0.01;
    c
}

#[test]
fn objectives_with_data_reach_a_gaussian_with_and_without_a_trajectory() {
    let dir = tempfile::tempdir().unwrap();
    for (objective, nodes) in [
        (ObjectiveKind::Dmd2, 0),
        (ObjectiveKind::Dmd2, 3),
        (ObjectiveKind::FDistill, 3),
        (ObjectiveKind::UniInstruct, 0),
        (ObjectiveKind::UniInstruct, 3),
    ] {
        let mut c = adversarial(dir.path(), objective);
        (c.degrade.nodes, c.batch, c.degrade.steps) = (nodes.into(), 256, 100);
        (c.backtrack.updates, c.backtrack.ratio, c.backtrack.switch_every) = (600, 2, 30);
        c.ema.half_life = 20_000.0;
        c.settings.f_distill.divergence = Divergence::JensenShannon;
        let run_dir = dir.path().join(format!("{objective:?}-{nodes}"));
        let (outcome, seen) = run(&run_dir, &c, &plain(), None).unwrap();
        let (mean, sd) = moments(&finished(outcome), 20_000);
        for (got, expected) in mean.iter().chain(&sd).zip([0.8, -0.4, 0.7, 0.3]) {
            assert!((got - expected).abs() < 0.06, "{objective:?}, {nodes} nodes: {mean:?} {sd:?}");
        }
        // Real and generated images cannot be told apart any more: 2 ln 2 for the discriminator, ln 2 for the generator.
        let last = seen.rows.last().unwrap();
        let (d, g) = (last.loss_discriminator.unwrap() / 1e-2, last.loss_gan.unwrap() / 3e-3);
        assert!((d - 2.0 * 2f64.ln()).abs() < 0.1 && (g - 2f64.ln()).abs() < 0.15, "{d} {g}");
    }
}

#[test]
fn the_discriminator_finds_the_density_ratio() {
    // Generator samples N(-0.5, 0.5^2), data N(0.8, 0.7^2) (first channel): the optimal logit is the log ratio of the
    // smoothed densities.
    let dir = tempfile::tempdir().unwrap();
    let mut c = adversarial(dir.path(), ObjectiveKind::FDistill);
    (c.batch, c.gan.weight_discriminator, c.gan.lr, c.optimizer.clip) = (2048, 1.0, 0.03, 0.0);
    let teacher = plain();
    let batches = Batches::new(&c, &teacher).unwrap();
    let mut gan = Gan::new(&c, &teacher, &batches).unwrap().unwrap();
    let fake = Tensor::from_slice(&[-0.5f32, -0.4]).view([1, 2, 1, 1]);
    let spread = Tensor::from_slice(&[0.5f32, 0.3]).view([1, 2, 1, 1]);
    let conditions = Conditions::none(2048);
    for step in 0..400 {
        let draws = batches.draws(Phase::Backtrack, step, 0);
        let x0 = &fake + batches.noise(&draws, Purpose::Latent).unwrap() * &spread;
        gan.discriminator_loss(&teacher, &batches, &draws, &x0, &conditions).unwrap().backward();
        gan.adam.step(1.0).unwrap();
    }
    let sigma = 0.5f64;
    for x in [-1.0f64, -0.3, 0.3, 0.7] {
        let x_t = Tensor::from_slice(&[x as f32, -0.4]).view([1, 2, 1, 1]);
        let logit = tch::no_grad(|| {
            let (_, f) = teacher.denoise_tapped(&x_t, &[sigma], &Conditions::none(1), gan.taps()).unwrap();
            gan.logits(&f).unwrap().double_value(&[0])
        });
        let log_normal = |mean: f64, sd: f64| {
            let v = sd * sd + sigma * sigma;
            -(x - mean).powi(2) / (2.0 * v) - 0.5 * v.ln()
        };
        let expected = log_normal(0.8, 0.7) - log_normal(-0.5, 0.5);
        assert!((logit - expected).abs() < 0.5, "x {x}: {logit} for {expected}");
    }
}

/// SiDA: SiD with a discriminator that has no weights and reads the objective's own pass of the fake score.
fn sida(dir: &std::path::Path) -> Config {
    let mut c = adversarial(dir, ObjectiveKind::Sid);
    (c.gan.head, c.gan.shared_pass) = (HeadKind::ChannelMean, true);
    c
}

#[test]
fn a_shared_pass_judges_what_the_objective_has_noised() {
    // The first update without a trajectory: fake score and target are the teacher.
    let dir = tempfile::tempdir().unwrap();
    let mut c = sida(dir.path());
    (c.degrade.nodes, c.backtrack.updates, c.optimizer.clip, c.gan.weight_generator) = (0.into(), 1, 0.0, 0.3);
    c.log.every = 1;
    let teacher = plain();
    let path = dir.path().join("run");
    let (_, seen) = run(&path, &c, &teacher, None).unwrap();
    let batches = Batches::new(&c, &teacher).unwrap();
    let draws = batches.draws(Phase::Backtrack, 0, 0);
    let student = teacher.copy().unwrap();
    student.params().set_requires_grad(true).unwrap();
    let conditions = batches.conditions(&draws, &teacher).unwrap();
    let z = batches.noise(&draws, Purpose::Latent).unwrap();
    let x = student.generate(&z, &conditions, &student::start(&teacher, &c.student).unwrap()).unwrap();
    let sigmas = draws.sigmas(Purpose::GeneratorSigma, &batches.generator_levels, c.batch);
    let sigma = crate::torch::convert::column(&sigmas, 3, Device::Cpu).unwrap();
    let x_t = &x + batches.noise(&draws, Purpose::GeneratorNoise).unwrap() * sigma;
    let (_, features) = teacher.denoise_tapped(&x_t, &sigmas, &conditions, &c.gan.taps).unwrap();
    let judged = (-features[0].mean_dim([-1i64].as_slice(), false, Kind::Float)).softplus().mean(Kind::Float) * 0.3;
    // (SiD's own loss has no gradient while the scores are equal.)
    judged.backward();
    let told = seen.rows.last().unwrap().loss_gan.unwrap();
    assert!((told - judged.double_value(&[])).abs() < 1e-6, "{told} for {}", judged.double_value(&[]));
    let hash = plain().params().hash().unwrap();
    let mut checkpoint = checkpoint::Checkpoint::latest(&path.join("checkpoints"), &hash).unwrap().unwrap();
    // (The shift of classes is no part of this network's output.)
    for (name, t) in student.params().iter().filter(|(_, t)| t.grad().defined()) {
        let m = checkpoint.take(&format!("adam_student/m/{name}")).unwrap() / (1.0 - c.optimizer.beta1);
        let gradient = t.grad();
        let (error, scale) = ((m - &gradient).abs().max().double_value(&[]), gradient.abs().max().double_value(&[]));
        assert!(scale > 1e-5 && error < 1e-4 * scale, "{name}: {error:e} of {scale:e}");
    }
}

#[test]
fn sida_reaches_a_gaussian_and_resumes_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = sida(dir.path());
    (c.degrade.nodes, c.batch, c.degrade.steps) = (3.into(), 256, 100);
    (c.backtrack.updates, c.backtrack.ratio, c.backtrack.switch_every) = (600, 2, 30);
    (c.ema.half_life, c.gan.weight_generator) = (20_000.0, 3e-3);
    let (outcome, _) = run(&dir.path().join("long"), &c, &plain(), None).unwrap();
    let (mean, sd) = moments(&finished(outcome), 20_000);
    for (got, expected) in mean.iter().chain(&sd).zip([0.8, -0.4, 0.7, 0.3]) {
        assert!((got - expected).abs() < 0.06, "{mean:?} {sd:?}");
    }
    (c.batch, c.degrade.steps, c.backtrack.updates, c.backtrack.switch_every) = (8, 6, 8, 2);
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    run(&whole, &c, &plain(), None).unwrap();
    let flag = AtomicBool::new(false);
    run(&cut, &c, &plain(), Some((&flag, checkpoint::StageKind::Backtrack, 5))).unwrap();
    run(&cut, &c, &plain(), None).unwrap();
    assert_eq!(remains(&cut), remains(&whole));
}

#[test]
fn a_gan_of_weight_zero_is_dmd_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let hash = |name: &str, c: &Config| {
        let (outcome, _) = run(&dir.path().join(name), c, &plain(), None).unwrap();
        finished(outcome).params().hash().unwrap()
    };
    let mut c = adversarial(dir.path(), ObjectiveKind::Dmd2);
    (c.degrade.steps, c.backtrack.updates) = (10, 10);
    let with = hash("with", &c);
    (c.gan.weight_generator, c.gan.weight_discriminator) = (0.0, 0.0);
    let zero = hash("zero", &c);
    (c.objective, c.gan.data) = (ObjectiveKind::Dmd.into(), String::new());
    assert_eq!(zero, hash("dmd", &c));
    assert_ne!(zero, with);
}

#[test]
fn adversarial_runs_resume_to_the_same_bytes_with_several_averages() {
    let dir = tempfile::tempdir().unwrap();
    for objective in [ObjectiveKind::Dmd2, ObjectiveKind::FDistill, ObjectiveKind::UniInstruct] {
        let mut c = adversarial(dir.path(), objective);
        (c.degrade.steps, c.backtrack.updates, c.backtrack.switch_every) = (6, 8, 2);
        c.ema.more = vec![100.0, 5000.0];
        (c.backtrack.betas_fake, c.degrade.betas) = (vec![0.5, 0.9], vec![0.9, 0.999]);
        (c.backtrack.cooldown, c.backtrack.cooldown_fake) = (0.5, 0.0);
        let (whole, cut) = (dir.path().join(format!("{objective:?}")), dir.path().join(format!("{objective:?}-cut")));
        run(&whole, &c, &plain(), None).unwrap();
        let flag = AtomicBool::new(false);
        run(&cut, &c, &plain(), Some((&flag, checkpoint::StageKind::Backtrack, 5))).unwrap();
        run(&cut, &c, &plain(), None).unwrap();
        let made = remains(&cut);
        assert_eq!(made, remains(&whole), "{objective:?}");
        let averages: Vec<_> = made.iter().filter(|(n, _)| n.contains("student-ema-")).collect();
        assert_eq!(averages.len(), 2, "{made:?}");
        assert_ne!(averages[0].1, averages[1].1);
    }
}

#[test]
fn each_average_is_what_a_run_with_that_half_life_ends_with() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.degrade.steps, c.backtrack.updates, c.ema.half_life) = (4, 9, 300.0);
    let (outcome, _) = run(&dir.path().join("alone"), &c, &plain(), None).unwrap();
    (c.ema.half_life, c.ema.more) = (2000.0, vec![300.0]);
    run(&dir.path().join("beside"), &c, &plain(), None).unwrap();
    let beside = plain();
    beside.params().load(&dir.path().join("beside/student-ema-300.safetensors")).unwrap();
    assert_eq!(finished(outcome).params().hash().unwrap(), beside.params().hash().unwrap());
}

#[test]
fn the_generators_term_reaches_neither_the_fake_score_nor_the_head() {
    let features =
        [("a".to_owned(), vec![4i64, 6]), ("b".to_owned(), vec![4, 5, 9, 7]), ("c".to_owned(), vec![4, 3, 5])];
    let head = Head::new(HeadKind::Layers, &features, &Axes::of(&card(3)), 3, Device::Cpu).unwrap();
    let x: Vec<Tensor> =
        features.iter().map(|(_, s)| shim::randn(1, s, Device::Cpu).unwrap().set_requires_grad(true)).collect();
    assert_eq!(head.logits(&x).unwrap(), Tensor::zeros([4], (Kind::Float, Device::Cpu)), "undecided at the start");
    // The fake score after one update is the same whatever weight the generator's term has.
    let dir = tempfile::tempdir().unwrap();
    let left = |weight: f64| {
        let mut c = adversarial(dir.path(), ObjectiveKind::Dmd2);
        (c.gan.weight_generator, c.backtrack.updates, c.degrade.steps) = (weight, 2, 4);
        let path = dir.path().join(format!("w{weight}"));
        run(&path, &c, &plain(), None).unwrap();
        let hash = plain().params().hash().unwrap();
        let mut checkpoint = checkpoint::Checkpoint::latest(&path.join("checkpoints"), &hash).unwrap().unwrap();
        let first = |t: Tensor| Vec::<f32>::try_from(t.view(-1)).unwrap();
        [
            checkpoint.take("adam_fake/m/mean"),
            checkpoint.take("adam_head/m/0.linear.bias"),
            checkpoint.take("adam_student/m/mean"),
        ]
        .map(|t| first(t.unwrap()))
    };
    let (small, large) = (left(0.0), left(1.0));
    assert_ne!(small[2], large[2], "the generator's gradient has it");
    // (From the second update on the images differ: only what the first step left can be compared, so one is made.)
    let mut c = adversarial(dir.path(), ObjectiveKind::Dmd2);
    c.backtrack.updates = 1;
    let one = |weight: f64| {
        let mut c = c.clone();
        c.gan.weight_generator = weight;
        let path = dir.path().join(format!("one{weight}"));
        run(&path, &c, &plain(), None).unwrap();
        let hash = plain().params().hash().unwrap();
        let mut checkpoint = checkpoint::Checkpoint::latest(&path.join("checkpoints"), &hash).unwrap().unwrap();
        ["fake/mean", "fake/log_sd", "head/0.linear.weight", "head/0.out.weight"]
            .map(|n| Vec::<f32>::try_from(checkpoint.take(n).unwrap().view(-1)).unwrap())
    };
    assert_eq!(one(0.0), one(1.0));
}

#[test]
fn f_distill_weighs_by_the_second_derivative_of_its_divergence() {
    // h(r) = r^2 f''(r), second derivatives by central differences; constants do not matter.
    type F = fn(f64) -> f64;
    let table: [(Divergence, F); 5] = [
        (Divergence::ReverseKl, |u| -u.ln()),
        (Divergence::ForwardKl, |u| u * u.ln()),
        (Divergence::JensenShannon, |u| u * u.ln() - (u + 1.0) * ((u + 1.0) / 2.0).ln()),
        (Divergence::SquaredHellinger, |u| 1.0 - u.sqrt()),
        (Divergence::Jeffreys, |u| (u - 1.0) * u.ln()),
    ];
    let ratios = [0.2f64, 0.9, 1.0, 3.5];
    let logs: Vec<f64> = ratios.iter().map(|r| r.ln()).collect();
    for (divergence, f) in table {
        let d = 1e-4;
        let h: Vec<f64> = ratios.iter().map(|&r| r * r * (f(r + d) - 2.0 * f(r) + f(r - d)) / (d * d)).collect();
        let got = Vec::<f64>::try_from(divergence.weight(&Tensor::from_slice(&logs)).unwrap()).unwrap();
        for k in 0..4 {
            assert!((got[k] / got[2] - h[k] / h[2]).abs() < 1e-4, "{divergence:?}: {got:?} {h:?}");
        }
        // The gradient is DMD's, each sample by h over the batch's mean h.
        let x0 = Tensor::from_slice(&[1.0f64, 2.0, -1.0, 0.5]).view([4, 1, 1, 1]).set_requires_grad(true);
        let target = Tensor::from_slice(&[0.0f64, 1.0, 1.0, 0.0]).view([4, 1, 1, 1]);
        let fake = Tensor::from_slice(&[3.0f64, 0.5, -2.0, 1.0]).view([4, 1, 1, 1]);
        let ratio = Tensor::from_slice(&logs).view([4, 1, 1, 1]);
        let ones = Tensor::ones([4, 1, 1, 1], (Kind::Double, Device::Cpu));
        let terms = |log_ratio| Terms {
            x0: &x0,
            x_t: &x0,
            noise: &target,
            sigma: &ones,
            target: &target,
            fake: Some(&fake),
            log_ratio,
        };
        FDistill { divergence }.loss(&terms(Some(&ratio))).unwrap().backward();
        let mean = got.iter().sum::<f64>() / 4.0;
        let dmd = [3.0, -0.5, -1.5, 2.0].map(|g: f64| g / 4.0);
        let gradient = Vec::<f64>::try_from(x0.grad().view(-1)).unwrap();
        for k in 0..4 {
            assert!((gradient[k] - dmd[k] * got[k] / mean).abs() < 1e-6, "{divergence:?}: {gradient:?}");
        }
    }
}

#[test]
fn data_and_taps_that_do_not_fit_are_refused_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let good = adversarial(dir.path(), ObjectiveKind::Dmd2);
    let labels = dir.path().join("labels.npz");
    let images = HostTensor::new(&[3, 1, 1, 1], &[0.0f32; 3]).unwrap();
    npy::write_npz(&labels, &[("images", &images), ("labels", &HostTensor::vec(&[0i64, 9, 10]))]).unwrap();
    let unlabelled = dir.path().join("unlabelled.npz");
    npy::write_npz(&unlabelled, &[("images", &images)]).unwrap();
    let change = |f: &dyn Fn(&mut Config)| {
        let mut c = good.clone();
        f(&mut c);
        c
    };
    for (c, teacher, says) in [
        (change(&|c| c.gan.taps = vec!["moment".into()]), plain(), "no tensor `moment`"),
        (change(&|c| c.gan.taps.clear()), plain(), "gan.taps is empty"),
        (change(&|c| c.gan.data = "none.npz".into()), plain(), "none.npz"),
        (change(&|c| c.gan.data = labels.display().to_string()), plain(), "the teacher's samples are [rows, 2, 1, 1]"),
        (
            change(&|c| c.gan.data = labels.display().to_string()),
            labelled(),
            "image 2 has class 10, the teacher has 0 to 9",
        ),
        (change(&|c| c.gan.data = unlabelled.display().to_string()), labelled(), "condition `labels`"),
    ] {
        let batches = Batches::new(&c, &teacher).unwrap();
        let e = Gan::new(&c, &teacher, &batches).unwrap_err();
        assert!(e.to_string().contains(says), "{e}");
    }
}

#[test]
fn taps_by_share_of_the_depth_are_the_ends_of_blocks() {
    use crate::distill::gan::taps::resolve;
    let teacher = digits();
    let said = |taps: &[&str]| resolve(&taps.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>(), &teacher);
    let found = said(&["50%", "conv2d_5", "75%", "99 %"]).unwrap();
    let names: Vec<&str> = found.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["add_408", "conv2d_5", "add_571", "add_666"]);
    let features = {
        let taps: Vec<String> = found.iter().map(|t| t.name.clone()).collect();
        let x = shim::randn(1, &[3, 1, 8, 8], Device::Cpu).unwrap();
        let labels = Conditions::new(3, vec![("labels".into(), Tensor::from_slice(&[1i64, 2, 3]))]).unwrap();
        teacher.denoise_tapped(&x, &[1.0; 3], &labels, &taps).unwrap().1
    };
    for (tap, tensor) in found.iter().zip(&features).filter(|(tap, _)| tap.place.is_some()) {
        let shape: Vec<usize> = tensor.size()[1..].iter().map(|n| *n as usize).collect();
        assert_eq!(tap.place.as_ref().unwrap().2, shape, "{tap}");
    }
    assert!(found[0].to_string().contains("50% = `add_408`") && found[0].to_string().contains("after 11 of 20 layers"));
    for (taps, says) in [
        (&["98%", "99%"][..], "98% and 99% are one tensor, `add_666`"),
        (&["add_666", "99%"], "add_666 and 99% are one tensor"),
        (&["100%"], "more than 0% and less than 100%"),
    ] {
        let e = said(taps).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(says), "{e}");
    }
    // A network that is no graph has no depth.
    let e = resolve(&["50%".to_owned()], &plain()).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("no features"), "{e}");
}
