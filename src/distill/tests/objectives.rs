//! Every objective end to end: what it converges to, and that no trajectory is the base method.

use super::*;
use crate::distill::batches::Batches;
use crate::distill::draws::{Phase, Purpose};
use crate::distill::objective::{Choice, Divergence, ObjectiveKind};
use crate::torch::convert::column;
use crate::torch::shim;
use crate::torch::train::optim::AdamW;

#[test]
fn objectives_reach_a_gaussian_with_and_without_a_trajectory() {
    let teacher = plain();
    for (objective, nodes) in [
        (ObjectiveKind::Dmd, 4),
        (ObjectiveKind::DiffInstruct, 4),
        (ObjectiveKind::DiffInstruct, 0),
        (ObjectiveKind::Sid, 4),
        (ObjectiveKind::Sid, 0),
        (ObjectiveKind::Sim, 4),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut c = config();
        (c.objective, c.degrade.nodes, c.batch, c.degrade.steps) = (objective.into(), nodes.into(), 256, 200);
        (c.backtrack.updates, c.backtrack.ratio, c.backtrack.switch_every) = (700, 2, 30);
        c.ema.half_life = 20_000.0;
        let (outcome, _) = run(dir.path(), &c, &teacher, None).unwrap();
        let (mean, sd) = moments(&finished(outcome), 20_000);
        for (got, expected) in mean.iter().chain(&sd).zip([0.8, -0.4, 0.7, 0.3]) {
            assert!((got - expected).abs() < 0.05, "{objective:?}, {nodes} nodes: {mean:?} {sd:?}");
        }
    }
}

#[test]
fn without_a_fake_score_the_student_seeks_the_mode() {
    // SDS descends the target's log density alone: the mean is found, the spread is lost.
    let teacher = plain();
    for nodes in [0, 4] {
        let dir = tempfile::tempdir().unwrap();
        let mut c = config();
        (c.objective, c.degrade.nodes, c.batch, c.degrade.steps) = (ObjectiveKind::Sds.into(), nodes.into(), 256, 100);
        (c.backtrack.updates, c.backtrack.switch_every, c.ema.half_life) = (900, 30, 20_000.0);
        let (outcome, seen) = run(dir.path(), &c, &teacher, None).unwrap();
        let (mean, sd) = moments(&finished(outcome), 20_000);
        for (got, expected) in mean.iter().zip([0.8, -0.4]) {
            assert!((got - expected).abs() < 0.05, "{mean:?} {sd:?}");
        }
        assert!(sd[0] < 0.35 && sd[1] < 0.15, "{sd:?}");
        let last = seen.rows.last().unwrap();
        assert!(last.loss_fake.is_none() && last.grad_norm_fake.is_none() && last.mismatch.is_some(), "{last:?}");
    }
    let e = Config::resolve(None, &["objective=sds".into(), "backtrack.ratio=2".into()]).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("backtrack.ratio is 2"), "{e}");
}

#[test]
fn guidance_is_the_targets_alone() {
    let networks = |guidance: f64| {
        let dir = tempfile::tempdir().unwrap();
        let mut c = config();
        (c.guidance, c.backtrack.updates) = (guidance, 1);
        let teacher = labelled();
        run(dir.path(), &c, &teacher, None).unwrap();
        let hash = teacher.params().hash().unwrap();
        let mut checkpoint = checkpoint::Checkpoint::latest(&dir.path().join("checkpoints"), &hash).unwrap().unwrap();
        ["fake/", "adam_fake/m/", "adam_student/m/"].map(|prefix| {
            let copy = teacher.copy().unwrap();
            checkpoint.take_params(prefix, copy.params(), None).unwrap();
            copy.params().hash().unwrap()
        })
    };
    let (without, with) = (networks(1.0), networks(3.0));
    assert_eq!(without[..2], with[..2], "the fake score has never seen the guidance");
    assert_ne!(without[2], with[2], "the generator's gradient has");
    let dir = tempfile::tempdir().unwrap();
    let e = run(dir.path(), &Config { guidance: 2.0, ..config() }, &plain(), None).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("null"), "{e}");
}

/// [`plain`], guided by a network of another mean.
fn guided() -> Denoiser {
    plain().guided_by(gaussian(card(2), &[0.5, -0.6], &[0.7, 0.3])).unwrap()
}

#[test]
fn a_weaker_network_guides_the_teacher_and_no_node_of_the_trajectory() {
    // Of two normal distributions of one deviation `D_w + s (D - D_w)` is the denoiser of mean `m_w + s (m - m_w)`.
    let student = |name: &str, guidance: f64, change: &dyn Fn(&mut Config)| {
        let dir = tempfile::tempdir().unwrap();
        let mut c = config();
        (c.objective, c.guidance, c.batch) = (ObjectiveKind::DiffInstruct.into(), guidance, 256);
        (c.degrade.nodes, c.degrade.steps, c.backtrack.updates, c.backtrack.ratio) = (3.into(), 60, 500, 2);
        (c.backtrack.switch_every, c.ema.half_life) = (20, 10_000.0);
        change(&mut c);
        finished(run(&dir.path().join(name), &c, &guided(), None).unwrap().0)
    };
    let (mean, sd) = moments(&student("guided", 2.0, &|_| ()), 20_000);
    for (got, expected) in mean.iter().chain(&sd).zip([1.1, -0.2, 0.7, 0.3]) {
        assert!((got - expected).abs() < 0.05, "{mean:?} {sd:?}");
    }
    // As long as the target is a node, nothing is guided.
    let nodes = |guidance| {
        let short = |c: &mut Config| (c.degrade.steps, c.backtrack.updates) = (6, 8);
        student("nodes", guidance, &short).params().hash().unwrap()
    };
    assert_eq!(nodes(1.0), nodes(2.0));
    // The differentiated pair of scores as well: there is a gradient through both networks.
    let sid = |c: &mut Config| {
        (c.objective, c.degrade.nodes, c.backtrack.updates) = (ObjectiveKind::Sid.into(), 0.into(), 400);
    };
    let (mean, _) = moments(&student("sid", 2.0, &sid), 20_000);
    for (got, expected) in mean.iter().zip([1.1, -0.2]) {
        assert!((got - expected).abs() < 0.08, "{mean:?}");
    }
}

/// The objectives written down once more, without trajectory, checkpoints or metrics. Hashes of the averaged student and
/// of the fake score.
fn base_method(c: &Config, teacher: &Denoiser) -> [String; 2] {
    let batches = Batches::new(c, teacher).unwrap();
    let start = student::start(teacher, &c.student).unwrap();
    let (fake, student, average) = (teacher.copy().unwrap(), teacher.copy().unwrap(), teacher.copy().unwrap());
    fake.params().set_requires_grad(true).unwrap();
    student.params().set_requires_grad(true).unwrap();
    let mut adam_fake = AdamW::new(fake.params(), c.adamw(c.backtrack.lr_fake, &[])).unwrap();
    let mut adam_student = AdamW::new(student.params(), c.adamw(c.backtrack.lr_generator, &[])).unwrap();
    let pixels = [1i64, 2, 3];
    for step in 0..c.backtrack.updates {
        let draws = batches.draws(Phase::Backtrack, step, 0);
        let conditions = batches.conditions(&draws, teacher).unwrap();
        let z = batches.noise(&draws, Purpose::Latent).unwrap();
        let x = student.generate(&z, &conditions, &start).unwrap();
        let sigmas = draws.sigmas(Purpose::GeneratorSigma, &batches.generator_levels, c.batch);
        let sigma = column(&sigmas, 3, Device::Cpu).unwrap();
        let e = batches.noise(&draws, Purpose::GeneratorNoise).unwrap();
        let x_t = &x + &e * &sigma;
        let real = teacher.denoise(&x_t, &sigmas, &conditions).unwrap();
        let fake_x = fake.denoise(&x_t, &sigmas, &conditions).unwrap();
        let distance = (x.detach() - real.detach()).abs().mean_dim(pixels.as_slice(), true, Kind::Float);
        let towards = |g: Tensor| (&x - (x.detach() - g.detach())).square().mean(Kind::Float) * 0.5;
        let Choice::Known(kind) = c.objective else { panic!("{:?}", c.objective) };
        let loss = match kind {
            ObjectiveKind::DiffInstruct => towards(fake_x - real),
            ObjectiveKind::Dmd | ObjectiveKind::Dmd2 | ObjectiveKind::FDistill => towards((fake_x - real) / distance),
            ObjectiveKind::Sds => towards(((x_t - real) / &sigma - e) * &sigma),
            // (Without a discriminator, which is that of the reverse KL, Uni-Instruct is SiD with another alpha.)
            ObjectiveKind::Sid | ObjectiveKind::UniInstruct => {
                let alpha =
                    if kind == ObjectiveKind::Sid { c.settings.sid.alpha } else { c.settings.uni_instruct.alpha };
                let difference = &real - fake_x;
                let projected = (&real - &x) - &difference * alpha;
                (difference * projected / distance).mean(Kind::Float)
            }
            ObjectiveKind::Sim => {
                let y = (&fake_x - real) / sigma.square();
                let length = y.square().sum_dim_intlist(pixels.as_slice(), true, Kind::Float);
                let direction = y / (length + c.settings.sim.c * c.settings.sim.c).sqrt();
                -(direction * (fake_x - &x)).sum_dim_intlist(pixels.as_slice(), false, Kind::Float).mean(Kind::Float)
            }
        };
        loss.backward();
        // What has flowed into the fake score's weights is none of its business.
        shim::drop_grads(fake.params().tensors()).unwrap();
        let x = x.detach();
        let sigmas = draws.sigmas(Purpose::FakeSigma, &batches.fake_levels, c.batch);
        let noise = batches.noise(&draws, Purpose::FakeNoise).unwrap();
        adam_student.step(1.0).unwrap();
        let seen = (step + 1) * c.images();
        let decay = crate::torch::train::ema::decay(c.images(), seen, c.ema.half_life, c.ema.ramp);
        tch::no_grad(|| crate::torch::train::ema::update(average.params(), student.params(), decay, None)).unwrap();
        if c.objective != ObjectiveKind::Sds {
            denoising_loss(&fake, &x, &sigmas, &noise, &conditions).unwrap().backward();
            adam_fake.step(1.0).unwrap();
        }
    }
    [average.params().hash().unwrap(), fake.params().hash().unwrap()]
}

#[test]
fn no_nodes_is_the_base_method_bit_for_bit() {
    use ObjectiveKind::*;
    for objective in [Dmd, DiffInstruct, Sds, Sid, Sim, UniInstruct] {
        let teacher = labelled();
        let mut c = config();
        (c.objective, c.degrade.nodes) = (objective.into(), 0.into());
        c.settings.uni_instruct.divergence = Divergence::ReverseKl;
        let dir = tempfile::tempdir().unwrap();
        let (outcome, seen) = run(dir.path(), &c, &teacher, None).unwrap();
        let student = finished(outcome).params().hash().unwrap();
        let mut checkpoint =
            checkpoint::Checkpoint::latest(&dir.path().join("checkpoints"), &teacher.params().hash().unwrap())
                .unwrap()
                .unwrap();
        let fake = teacher.copy().unwrap();
        if objective != Sds {
            checkpoint.take_params("fake/", fake.params(), None).unwrap();
        }
        assert_eq!([student, fake.params().hash().unwrap()], base_method(&c, &teacher), "{objective:?}");
        assert_eq!(seen.entered, [(0, teacher.params().hash().unwrap())].to_vec());
    }
}

#[test]
fn every_objective_resumes_to_the_same_bytes() {
    use ObjectiveKind::*;
    let teacher = labelled();
    for objective in [DiffInstruct, Sds, Sid, Sim] {
        let mut c = config();
        (c.objective, c.degrade.steps, c.backtrack.updates, c.backtrack.switch_every) = (objective.into(), 6, 8, 2);
        let dir = tempfile::tempdir().unwrap();
        let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
        run(&whole, &c, &teacher, None).unwrap();
        let flag = AtomicBool::new(false);
        let (outcome, _) = run(&cut, &c, &teacher, Some((&flag, checkpoint::StageKind::Backtrack, 5))).unwrap();
        assert!(matches!(outcome, Outcome::Stopped(_)));
        run(&cut, &c, &teacher, None).unwrap();
        assert_eq!(remains(&cut), remains(&whole), "{objective:?}");
    }
}
