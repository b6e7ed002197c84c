//! Students of several steps in training.

use super::*;
use crate::diffusion::TimeUnit;
use crate::distill::config::StudentConfig;
use crate::distill::draws::{Draws, Phase, Purpose};
use crate::distill::objective::ObjectiveKind;
use crate::torch::shim;

fn student(stochastic: bool) -> Student {
    let config = StudentConfig { sigma_init: 5.0, sigmas: vec![2.0, 0.5], stochastic, ..Config::default().student };
    Student::new(plain(), &config).unwrap()
}

#[test]
fn steps_before_the_drawn_one_are_simulated_without_a_gradient() {
    for stochastic in [true, false] {
        let student = student(stochastic);
        student.params().set_requires_grad(true).unwrap();
        let teacher = plain();
        let c = Conditions::none(4);
        let z = shim::randn(1, &[4, 2, 1, 1], Device::Cpu).unwrap();
        let mut seen = [false; 3];
        for iteration in 0..20 {
            let draws = Draws::new(9, Phase::Backtrack, iteration, 0);
            let step = draws.below(Purpose::Step, 3);
            seen[step] = true;
            let got = student.training_images(&draws, &z, &c).unwrap();
            // By hand.
            let mut x_t = &z * 5.0;
            let mut sigma = 5.0;
            for (k, level) in [2.0, 0.5].into_iter().enumerate().take(step) {
                let x0 = teacher.denoise(&x_t, &[sigma; 4], &c).unwrap();
                let found = (&x_t - &x0) / sigma;
                let fresh = draws.step_noise(k + 1, &z.size(), Device::Cpu).unwrap();
                x_t = &x0 + if stochastic { fresh } else { found } * level;
                sigma = level;
            }
            let expected = teacher.denoise(&x_t, &[sigma; 4], &c).unwrap();
            assert!((&got - &expected).abs().max().double_value(&[]) < 1e-5, "step {step}");
            // dD/dmean = sigma^2 / (sd^2 + sigma^2) of the last evaluation alone.
            let gradient =
                Tensor::run_backward(&[got.sum(Kind::Float)], &[&student.params().tensors()[0]], false, false);
            for (channel, sd) in [0.7f64, 0.3].into_iter().enumerate() {
                let expected = 4.0 * sigma * sigma / (sd * sd + sigma * sigma);
                let got = gradient[0].double_value(&[0, channel as i64, 0, 0]);
                assert!((got - expected).abs() < 1e-5, "step {step}: {got} for {expected}");
            }
        }
        assert_eq!(seen, [true; 3]);
        let [a, b] = [0, 0].map(|_| student.generate(&z, &c).unwrap());
        assert_eq!(a, b, "images to look at do not depend on when they are made");
    }
}

#[test]
fn few_step_runs_resume_and_differ_from_one_step() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.objective, c.degrade.steps, c.backtrack.updates, c.backtrack.switch_every) =
        (ObjectiveKind::Dmd.into(), 6, 8, 2);
    let one = finished(run(&dir.path().join("one"), &c, &plain(), None).unwrap().0).params().hash().unwrap();
    c.student.sigmas = vec![1.0, 0.3];
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let few = finished(run(&whole, &c, &plain(), None).unwrap().0).params().hash().unwrap();
    assert_ne!(one, few);
    let flag = AtomicBool::new(false);
    run(&cut, &c, &plain(), Some((&flag, checkpoint::StageKind::Backtrack, 5))).unwrap();
    run(&cut, &c, &plain(), None).unwrap();
    assert_eq!(remains(&cut), remains(&whole));
}

#[test]
fn a_grid_is_the_levels_that_it_stands_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.degrade.steps, c.backtrack.updates, c.student.sigma_init) = (4, 6, 0.0);
    c.student.steps = 3;
    let of_grid = finished(run(&dir.path().join("grid"), &c, &plain(), None).unwrap().0).params().hash().unwrap();
    let (high, low) = (10f64.powf(1.0 / 7.0), 0.05f64.powf(1.0 / 7.0));
    c.student.sigmas = [1.0, 2.0].map(|k| (high + k / 3.0 * (low - high)).powf(7.0)).to_vec();
    c.student.steps = 0;
    let listed = finished(run(&dir.path().join("listed"), &c, &plain(), None).unwrap().0).params().hash().unwrap();
    assert_eq!(of_grid, listed);
    // A flow's, from t = 1: 0.9, 0.75, 0.5 shifted by 3 are sigma 9, 3, 1.
    let schedule = ScheduleSpec::Flow { shift: 1.0, direction: Default::default() };
    let flow = TeacherCard { schedule, prediction: Prediction::Flow, ..card(2) };
    let flow = crate::diffusion::Conversion::new(&TeacherCard { time_unit: TimeUnit::Unit, ..flow }).unwrap();
    let config = StudentConfig { steps: 4, shift: 3.0, ..StudentConfig::default() };
    let levels = student::levels(&flow, &config).unwrap();
    // Where the first step starts elsewhere, the others are where they were, below it or not at all.
    let from = |sigma_init| student::levels(&flow, &StudentConfig { sigma_init, ..config.clone() });
    assert_eq!(from(20.0).unwrap(), levels);
    assert!(from(5.0).unwrap_err().to_string().contains("the second level would be 9.0000"));
    assert!(levels.iter().zip([9.0, 3.0, 1.0]).all(|(a, b)| (a - b).abs() < 1e-9), "{levels:?}");
    let e = Student::new(plain(), &config).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("student.shift: only a flow"), "{e}");
}

#[test]
fn levels_must_fall_to_above_zero() {
    for sigmas in [vec![5.0], vec![2.0, 2.0], vec![0.0], vec![2.0, -1.0], vec![f64::NAN]] {
        let config = StudentConfig { sigma_init: 5.0, sigmas: sigmas.clone(), ..Config::default().student };
        let e = Student::new(plain(), &config).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("student.sigmas"), "{sigmas:?}: {e}");
    }
}
