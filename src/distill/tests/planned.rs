//! `degrade.nodes = "auto"`, and what it measures.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::distill::config::NodeCount;
use crate::distill::inputs::Noised;
use crate::distill::plan;

/// Teacher and fake score are Gaussians of the same spread, so their denoised samples differ by a multiple of the distance of their
/// means: a fake score whose mean has come `k` of the way to the student's has come `k` of the way at every x_t.
#[test]
fn tracking_tells_how_far_a_fake_score_has_come() {
    const N: usize = 20_000;
    let (spread, mean) = (0.5f32, 1.5f32);
    let at = |m: f32| gaussian(card(1), &[m], &[spread]);
    let normal =
        |seed, n: usize| Tensor::from_slice(&crate::noise::batch_noise(seed, 0, n, 1)).view([n as i64, 1, 1, 1]);
    let x0 = normal(1, N) * f64::from(spread) + f64::from(mean);
    let sigmas: Vec<f64> = (0..N).map(|k| 0.3 + 2.0 * k as f64 / N as f64).collect();
    let conditions = Conditions::none(N as i64);
    let teacher = at(0.0);
    let noised = Noised::new(&teacher, &sigmas, &normal(2, N), crate::diffusion::Form::Short).unwrap();
    let x_t = noised.add_to(&x0).unwrap();
    let denoised = |d: &Denoiser| d.denoise_prepared(&x_t, &noised.prepared, &conditions, &[]).unwrap().0;
    for k in [0.1, 0.4, 0.8, 1.0, 1.2] {
        let (mismatch, gap) = noised.mismatch(&x0, &denoised(&teacher), Some(&denoised(&at(k * mean)))).unwrap();
        let found = plan::tracking(gap.double_value(&[]), mismatch.double_value(&[])).unwrap();
        assert!((found - f64::from(k)).abs() < 0.02, "{k}: {found}");
    }
}

fn planned() -> Config {
    let mut c = config();
    (c.degrade.nodes, c.degrade.steps, c.backtrack.updates) = (NodeCount::Auto, 200, 400);
    c
}

#[test]
fn stage_one_takes_as_long_as_it_must_and_its_nodes_are_the_targets() {
    let teacher = plain();
    let mut counts = Vec::new();
    for lr in [0.02, 0.05] {
        let dir = tempfile::tempdir().unwrap();
        let mut c = planned();
        c.degrade.lr = lr;
        let (_, seen) = run(dir.path(), &c, &teacher, None).unwrap();
        let trajectory = Trajectory::open(&dir.path().join("trajectory"), &teacher.params().hash().unwrap()).unwrap();
        let (nodes, last) = (trajectory.nodes(), trajectory.last());
        let steps = seen.rows.iter().filter(|r| r.mismatch.is_none()).count() as u64;
        assert_eq!(nodes[last].iteration, steps);
        let come: Vec<f64> = nodes[1..].iter().map(|n| plan::tracking_of(&nodes[0], n).unwrap()).collect();
        assert!(come.iter().all(|k| (0.1..1.3).contains(k)) && come[0] < 1.0, "{come:?}");
        assert!(come[last - 1] > 0.7 || steps == plan::most_steps(&c), "{come:?} after {steps} steps");
        assert!(trajectory.plan().unwrap().contains(&format!("took {steps} steps")), "{:?}", trajectory.plan());
        // From the node before the last to the teacher, each for as many updates as the plan says.
        let hold = plan::hold(steps, last) as usize;
        let targets: Vec<usize> = seen.rows.iter().filter(|r| r.mismatch.is_some()).map(|r| r.node).collect();
        let expected: Vec<usize> = (0..400).map(|u| (last - 1).saturating_sub(u / hold)).collect();
        assert_eq!(targets, expected);
        counts.push(steps);
    }
    assert!(counts[1] < counts[0], "a faster copy takes fewer steps: {counts:?}");
}

#[test]
fn a_planned_run_resumes_to_the_same_bytes() {
    use checkpoint::StageKind::{Backtrack, Degrade};
    let teacher = plain();
    let mut c = planned();
    c.ema.more = Vec::new();
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    run(&whole, &c, &teacher, None).unwrap();
    for (stage, iteration) in [(Degrade, 3), (Backtrack, 2), (Backtrack, 30)] {
        let path = dir.path().join(format!("{}-{iteration}", stage.name()));
        let flag = AtomicBool::new(false);
        let (outcome, _) = run(&path, &c, &teacher, Some((&flag, stage, iteration))).unwrap();
        assert!(matches!(outcome, Outcome::Stopped(s) if s == stage));
        run(&path, &c, &teacher, None).unwrap();
        assert_eq!(remains(&path), remains(&whole), "stopped in {stage:?} after {iteration}");
    }
}

#[test]
fn where_stage_one_finds_nothing_the_teacher_is_the_target_from_the_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = planned();
    // So low a rate that the copy stays the teacher.
    c.degrade.lr = 1e-6;
    let teacher = plain();
    let (_, seen) = run(dir.path(), &c, &teacher, None).unwrap();
    let trajectory = Trajectory::open(&dir.path().join("trajectory"), &teacher.params().hash().unwrap()).unwrap();
    assert_eq!(trajectory.last(), 0, "{:?}", trajectory.plan());
    assert!(trajectory.plan().unwrap().starts_with("no trajectory"), "{:?}", trajectory.plan());
    assert!(seen.rows.iter().filter(|r| r.mismatch.is_some()).all(|r| r.node == 0));
}
