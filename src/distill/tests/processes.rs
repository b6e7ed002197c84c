//! Runs of several processes, here threads that meet through gloo: the same bytes as one process, whatever shares the work.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::distill::checkpoint::StageKind::{Backtrack, Degrade};
use crate::distill::config::NodeCount;
use crate::distill::objective::{Choice, Objective, ObjectiveKind, Terms};
use crate::io::npy;
use crate::tensor::HostTensor;
use crate::torch::dist::launcher::Place;
use crate::torch::shim;

/// Runs `body` in a thread for each of `size` processes of a world; gives what each of them gave.
pub(super) fn together<T: Send>(size: usize, body: impl Fn(World) -> T + Sync) -> Vec<T> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let one = |rank: usize| {
        let place = Place {
            launcher: "a test",
            rank,
            world: size,
            local: rank,
            local_world: size,
            address: "127.0.0.1".into(),
            port,
            served: false,
            attempt: "0".into(),
        };
        let world = World::form(&place, Duration::from_secs(20)).unwrap();
        body(world)
    };
    std::thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || one(rank))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// What rank 0 saw and how it ended, and whether each process ended with the same student.
fn shared(
    size: usize,
    path: &Path,
    config: &Config,
    teacher: &(dyn Fn() -> Denoiser + Sync),
    stop: Option<(checkpoint::StageKind, u64)>,
) -> Vec<MetricsRow> {
    let others = path.with_extension("others");
    let ended = together(size, |world| {
        // A process that does not lead has a folder of its own, in which nothing may come to lie.
        let leads = world.leads();
        let path = if leads { path } else { &others };
        let flag = AtomicBool::new(false);
        let stop = stop.filter(|_| leads).map(|(stage, iteration)| (&flag, stage, iteration));
        let (outcome, witness) = run_in(world, path, config, &teacher(), None, stop).unwrap();
        let hash = match outcome {
            Outcome::Finished(student) => Some(student.params().hash().unwrap()),
            Outcome::Stopped(_) => None,
            Outcome::Recorded(_) => panic!("both stages were asked for"),
        };
        (hash, witness.rows)
    });
    let first = &ended[0].0;
    assert!(ended.iter().all(|(hash, _)| hash == first), "{:?}", ended.iter().map(|e| &e.0).collect::<Vec<_>>());
    assert!(!others.exists());
    ended.into_iter().next().unwrap().1
}

/// A row without what depends on the clock.
fn timeless(row: &MetricsRow) -> MetricsRow {
    MetricsRow { seconds: 0.0, images_per_s: 0.0, waited: None, ..row.clone() }
}

fn sharded(mut c: Config, on: bool) -> Config {
    c.distributed.shard = if on { Shard::Optimizer } else { Shard::None };
    c
}

fn with_data(dir: &Path, mut c: Config) -> Config {
    if c.built_objective().is_ok_and(|o| o.needs_discriminator()) {
        let z = shim::randn(17, &[50, 2], Device::Cpu).unwrap();
        let values = Vec::<f32>::try_from((z * 0.5 + 0.2).view(-1)).unwrap();
        let path = dir.join("real.npz");
        npy::write_npz(&path, &[("images", &HostTensor::new(&[50, 2, 1, 1], &values).unwrap())]).unwrap();
        (c.gan.data, c.gan.taps, c.gan.lr) = (path.display().to_string(), vec!["moments".into()], 0.01);
    }
    c
}

#[test]
fn any_number_of_processes_ends_with_the_bytes_of_one() {
    let dir = tempfile::tempdir().unwrap();
    for (k, objective) in ObjectiveKind::ALL.into_iter().enumerate() {
        let mut c = config();
        (c.objective, c.batch, c.accumulate) = (objective.into(), 4, 5);
        (c.degrade.steps, c.degrade.nodes, c.backtrack.updates, c.backtrack.switch_every) = (6, 2.into(), 6, 2);
        (c.backtrack.ratio, c.optimizer.clip) = (1 + k as u64 % 2, 0.5);
        (c.backtrack.switch, c.backtrack.switch_patience, c.backtrack.switch_max) = (Switch::Mismatch, 1, 3);
        if k % 3 == 1 {
            (c.student.sigmas, c.student.stochastic) = (vec![0.5], true);
        }
        (c.degrade.patience, c.ema.more) = (4, vec![50.0]);
        let c = with_data(dir.path(), c);
        let alone = dir.path().join(format!("{}-1", objective.name()));
        let expected: Vec<MetricsRow> = shared(1, &alone, &c, &plain, None).iter().map(timeless).collect();
        assert!(expected.iter().any(|row| row.stage == Backtrack));
        for size in [2, 3] {
            let path = dir.path().join(format!("{}-{size}", objective.name()));
            let c = sharded(c.clone(), (k + size) % 2 == 0);
            let rows: Vec<MetricsRow> = shared(size, &path, &c, &plain, None).iter().map(timeless).collect();
            assert_eq!(remains(&path), remains(&alone), "{objective:?}, {size} processes");
            assert_eq!(rows, expected, "{objective:?}, {size} processes");
        }
    }
}

#[test]
fn a_plan_by_measurement_is_the_same_in_every_process() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.batch, c.accumulate, c.degrade.nodes, c.backtrack.updates) = (4, 3, NodeCount::Auto, 120);
    let paths = [1, 2].map(|size| {
        let path = dir.path().join(size.to_string());
        shared(size, &path, &c, &plain, None);
        path
    });
    assert_eq!(remains(&paths[0]), remains(&paths[1]));
    let trajectory = Trajectory::open(&paths[1].join("trajectory"), &plain().params().hash().unwrap()).unwrap();
    assert!(trajectory.last() > 1 && trajectory.plan().is_some(), "{trajectory:?}");
}

#[test]
fn a_weaker_network_guides_in_every_process() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.batch, c.accumulate, c.degrade.steps, c.degrade.nodes) = (4, 3, 4, 2.into());
    (c.backtrack.updates, c.backtrack.switch_every) = (6, 2);
    (c.guidance, c.guidance_rescale) = (2.0, 0.5);
    let teacher = || plain().guided_by(gaussian(card(2), &[0.5, -0.6], &[0.9, 0.4])).unwrap();
    let paths = [1, 2].map(|size| {
        let path = dir.path().join(size.to_string());
        shared(size, &path, &c, &teacher, None);
        path
    });
    assert_eq!(remains(&paths[0]), remains(&paths[1]));
}

#[test]
fn a_run_goes_on_with_another_number_of_processes() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.batch, c.accumulate, c.degrade.steps, c.backtrack.updates, c.backtrack.ratio) = (4, 4, 8, 8, 2);
    (c.degrade.spacing, c.memory.nodes, c.backtrack.switch_every) = (Spacing::Loss, Precision::Bf16, 3);
    c.guidance = 1.5;
    c.log.every = 3;
    let whole = dir.path().join("whole");
    let expected: Vec<MetricsRow> = shared(1, &whole, &c, &labelled, None).iter().map(timeless).collect();
    for (before, after, stage, at) in
        [(2, 1, Degrade, 3), (1, 2, Degrade, 6), (2, 3, Backtrack, 6), (3, 1, Backtrack, 9)]
    {
        let path = dir.path().join(format!("{before}-{after}-{}", stage.name()));
        // (What each process keeps may change as well.)
        let of_some = sharded(c.clone(), before + after < 4);
        let mut rows = shared(before, &path, &of_some, &labelled, Some((stage, at)));
        assert_ne!(remains(&path), remains(&whole));
        rows.extend(shared(after, &path, &sharded(c.clone(), !of_some.distributed.shares_states()), &labelled, None));
        assert_eq!(remains(&path), remains(&whole), "{before} then {after}, {stage:?} {at}");
        assert_eq!(rows.iter().map(timeless).collect::<Vec<_>>(), expected);
        let written = |path: &Path| -> Vec<MetricsRow> {
            metrics::read(&path.join("metrics.jsonl")).unwrap().iter().map(timeless).collect()
        };
        assert_eq!(written(&path), written(&whole), "no row twice, none missing");
    }
}

#[test]
fn a_real_network_ends_alike_with_recomputation_and_in_bf16() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.batch, c.accumulate, c.degrade.steps, c.degrade.nodes, c.backtrack.updates) = (2, 3, 2, 1.into(), 2);
    c.degrade.lr = 1e-3;
    (c.backtrack.lr_generator, c.backtrack.lr_fake) = (1e-3, 1e-3);
    let mut recomputed = c.clone();
    recomputed.memory.activations_mib = 1;
    let narrow = Config { precision: Precision::Bf16, ..c.clone() };
    let mut adapted = c.clone();
    adapted.lora.rank = 2;
    for (name, c) in [("plain", c), ("recomputed", recomputed), ("narrow", narrow), ("adapted", adapted)] {
        let teacher = || adapted_digits(&c);
        let alone = dir.path().join(format!("{name}-1"));
        shared(1, &alone, &c, &teacher, None);
        let path = dir.path().join(format!("{name}-2"));
        shared(2, &path, &sharded(c.clone(), name != "recomputed"), &teacher, None);
        assert_eq!(remains(&path), remains(&alone), "{name}");
    }
}

/// DMD, but NaN for a micro-batch whose first sample's noise is above a bound.
#[derive(Debug)]
struct NowAndThenNan;

impl Objective for NowAndThenNan {
    fn name(&self) -> &str {
        "now-and-then-nan"
    }
    fn loss(&self, terms: &Terms) -> Result<Tensor> {
        let bad = terms.noise.f_flatten(0, -1)?.f_get(0)?.f_double_value(&[])? > 0.6;
        let loss = ObjectiveKind::Dmd.build(&Default::default()).loss(terms)?;
        Ok(if bad { loss.f_mul_scalar(f64::NAN)? } else { loss })
    }
}

#[test]
fn a_gradient_that_is_not_finite_on_one_process_is_skipped_by_all() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.batch, c.accumulate, c.degrade.nodes, c.backtrack.updates) = (4, 2, 0.into(), 12);
    c.objective = Choice::Given(Arc::new(NowAndThenNan));
    let [alone, two] = ["alone", "two"].map(|name| dir.path().join(name));
    let rows = shared(1, &alone, &c, &plain, None);
    let skipped = rows.last().unwrap().skipped;
    assert!(skipped > 0 && skipped < 12, "{skipped}");
    assert_eq!(shared(2, &two, &c, &plain, None).last().unwrap().skipped, skipped);
    assert_eq!(remains(&two), remains(&alone));
}

#[test]
fn what_fails_on_one_process_is_told_by_all() {
    let said = together(3, |world| {
        let mine = if world.rank() == 2 { Err(crate::Error::usage("no such teacher")) } else { Ok(()) };
        let e = world.agree(mine).unwrap_err();
        assert!(world.is_broken());
        (e.exit_code(), e.to_string())
    });
    assert_eq!(said[2], (2, "no such teacher".into()));
    for (code, text) in &said[..2] {
        assert!(*code == 2 && text.contains("rank 2 has failed: no such teacher"), "{text}");
    }
    let told =
        together(2, |world| world.from_leader::<u64>(|| Err(crate::Error::io("disk full"))).unwrap_err().to_string());
    assert!(told[0] == "disk full" && told[1].contains("rank 0 has failed: disk full"), "{told:?}");
    let numbers = together(2, |world| world.from_leader(|| Ok(world.rank() + 7)).unwrap());
    assert_eq!(numbers, [7, 7]);
    let differ =
        together(2, |world| world.same(&[("--set", world.rank().to_string())].into()).unwrap_err().to_string());
    assert!(differ.iter().all(|text| text.contains("--set is 0 on rank 0, 1 on rank 1")), "{differ:?}");
}

/// Fails after a few iterations.
struct Fails;

impl Observer for Fails {
    fn after_step(&mut self, step: &Step) -> Result<Wish> {
        match step.iteration {
            3 => Err(crate::Error::io("disk full")),
            _ => Ok(Wish::default()),
        }
    }
}

#[test]
fn a_process_that_is_gone_ends_the_others_and_leaves_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let mut c = config();
    (c.batch, c.accumulate, c.degrade.steps) = (4, 2, 10_000);
    let said = together(2, |world| {
        let e = if world.leads() {
            run_in(world, &path, &c, &plain(), None, None).unwrap_err()
        } else {
            let (run, stop) = (RunDir::at(&path), AtomicBool::new(false));
            let (config, run, stop, observer) = (&c, &run, &stop, &mut Fails);
            let job = Job { config, student: None, run, observer, stop, silent: true, world };
            distill(job, &plain(), Stages::Both).unwrap_err()
        };
        e.to_string()
    });
    assert!(said[0].contains("another process of this run has ended") && said[0].contains("--resume"), "{}", said[0]);
    assert!(said[1].contains("disk full"), "{}", said[1]);
    assert!(checkpoint::Checkpoint::latest_state(&path.join("checkpoints")).unwrap().is_none());
}
