//! Both stages on networks whose exact denoiser is known.

mod adversarial;
mod conditions;
mod generators;
mod memory_format;
mod objectives;
mod planned;
mod processes;
mod ranks;
mod replayed;
mod steps;
mod sync;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Device, Kind, Tensor};

use crate::diffusion::{Condition, Conditions, Denoiser, InputSpec, Prediction, ScheduleSpec, TeacherCard};
use crate::distill::config::{Config, Precision, Shard, Spacing, Switch};
use crate::distill::inputs::denoising_loss;
use crate::distill::metrics::MetricsRow;
use crate::distill::observer::Observer;
use crate::distill::*;
use crate::error::Result;
use crate::tensor::DType;
use crate::torch::dist::World;
use crate::torch::network::NamedTensors;
use crate::torch::{Forward, ParamSet};

/// The exact denoiser of `N(mean, exp(log_sd)^2)`: `D = (sd^2 x + sigma^2 mean) / (sd^2 + sigma^2)`, plus `shift` per
/// class where there are labels.
struct Gaussian {
    params: ParamSet,
}

impl Forward for Gaussian {
    fn forward(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let get = |name: &str| inputs.iter().find(|(n, _)| *n == name).map(|(_, t)| *t);
        let x = get("x").expect("given");
        let mut column = vec![1i64; x.dim()];
        column[0] = -1;
        let sigma2 = get("sigma").expect("given").f_view(&column[..])?.f_square()?;
        let [mean, log_sd, shift] = self.params.tensors() else { panic!("three parameters") };
        let var = log_sd.f_mul_scalar(2.0)?.f_exp()?;
        let mut mean = mean.shallow_clone();
        if let Some(labels) = get("labels") {
            mean = mean.f_add(&shift.f_index_select(0, labels)?.f_view(&column[..])?)?;
        }
        let d = x.f_mul(&var)?.f_add(&mean.f_mul(&sigma2)?)?.f_div(&var.f_add(&sigma2)?)?;
        Ok(vec![("denoised".into(), d)])
    }
    /// `moments`: `[B, 2C + 1]`, the sample, its square and the logarithm of the noise level, all scaled by the network's
    /// own standard deviation so that its parameters take part.
    fn forward_tapped(&self, inputs: &[(&str, &Tensor)], taps: &[String]) -> Result<(NamedTensors, Vec<Tensor>)> {
        let features = taps.iter().map(|tap| match tap.as_str() {
            "moments" => {
                let x = inputs[0].1.f_flatten(1, -1)?.f_mul(&self.params.tensors()[1].f_flatten(0, -1)?.f_exp()?)?;
                let level = inputs[1].1.f_log()?.f_view([-1, 1])?;
                Ok(Tensor::f_cat(&[&x, &x.f_square()?, &level], 1)?)
            }
            other => Err(crate::error::Error::usage(format!("the graph has no tensor `{other}`"))),
        });
        let features = features.collect::<Result<_>>()?;
        Ok((self.forward(inputs)?, features))
    }
    fn params(&self) -> &ParamSet {
        &self.params
    }
    fn copy(&self) -> Result<Box<dyn Forward>> {
        Ok(Box::new(Self { params: self.params.deep_copy(Device::Cpu)? }))
    }
}

fn card(channels: usize) -> TeacherCard {
    let schedule = ScheduleSpec::Edm { sigma_min: 0.05, sigma_max: 10.0, rho: 7.0 };
    TeacherCard { schedule, ..TeacherCard::plain(&[channels, 1, 1]) }
}

pub(crate) fn labelled_card() -> TeacherCard {
    let mut card = card(1);
    card.conditions.insert("labels".into(), Condition::ClassIndex { classes: 10, null: Some(10) });
    card
}

/// One mean and standard deviation a value of a sample of the card's shape.
fn gaussian(card: TeacherCard, mean: &[f32], sd: &[f32]) -> Denoiser {
    let row = card.size_of(1);
    let log_sd: Vec<f32> = sd.iter().map(|s| s.ln()).collect();
    let tensors = vec![
        Tensor::from_slice(mean).view(&row[..]),
        Tensor::from_slice(&log_sd).view(&row[..]),
        Tensor::arange(11, (Kind::Float, Device::Cpu)) * 0.1,
    ];
    let names = ["mean", "log_sd", "shift"].map(String::from).to_vec();
    let network = Gaussian { params: ParamSet::new(names, tensors).unwrap() };
    let inputs = [
        InputSpec::new(
            "x",
            DType::F32,
            &std::iter::once(None).chain(card.shape.iter().copied().map(Some)).collect::<Vec<_>>(),
        ),
        InputSpec::new("sigma", DType::F32, &[None]),
        InputSpec::new("labels", DType::I64, &[None]),
    ];
    Denoiser::new(Box::new(network), Arc::new(card), &inputs).unwrap()
}

fn plain() -> Denoiser {
    gaussian(card(2), &[0.8, -0.4], &[0.7, 0.3])
}

fn labelled() -> Denoiser {
    gaussian(labelled_card(), &[0.2], &[0.6])
}

fn digits() -> Denoiser {
    adapted_digits(&Config::default())
}

/// Its low-rank factors, where the configuration has some.
fn adapted_digits(config: &Config) -> Denoiser {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits/teacher.onnx");
    let teacher = crate::run::Teacher::load(&path, &Default::default(), Device::Cpu).unwrap();
    crate::run::denoiser(&teacher, config).unwrap()
}

fn config() -> Config {
    let mut c = Config { batch: 64, seed: 3, ..Config::default() };
    c.student.sigma_init = 2.0;
    c.degrade.steps = 40;
    c.degrade.nodes = 4.into();
    c.degrade.lr = 0.02;
    c.backtrack.updates = 30;
    c.backtrack.lr_generator = 0.02;
    c.backtrack.lr_fake = 0.02;
    c.backtrack.switch_every = 5;
    c.backtrack.cooldown = 0.0;
    c.ema.half_life = 500.0;
    c.optimizer.warmup = 0;
    c.log.every = 1;
    c.log.checkpoint_every = 0;
    c
}

/// Writes down what happens; raises the stop flag after a given row.
#[derive(Debug, Default)]
struct Witness<'a> {
    recorded: Vec<(usize, String)>,
    entered: Vec<(usize, String)>,
    left: Vec<usize>,
    rows: Vec<MetricsRow>,
    stop: Option<(&'a AtomicBool, checkpoint::StageKind, u64)>,
}

impl Observer for Witness<'_> {
    fn metrics(&mut self, row: &MetricsRow) -> Result<()> {
        self.rows.push(row.clone());
        if let Some((flag, stage, iteration)) = self.stop
            && (row.stage, row.iteration) == (stage, iteration)
        {
            flag.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
    fn node_recorded(&mut self, node: usize, denoiser: &Denoiser) -> Result<()> {
        self.recorded.push((node, denoiser.params().hash()?));
        Ok(())
    }
    fn target_entered(&mut self, node: usize, target: &Denoiser) -> Result<()> {
        self.entered.push((node, target.params().hash()?));
        Ok(())
    }
    fn target_left(&mut self, node: usize, _student: &Student) -> Result<()> {
        self.left.push(node);
        Ok(())
    }
}

/// Runs both stages in `path`; goes on where a run is there.
fn run<'a>(
    path: &std::path::Path,
    config: &Config,
    teacher: &Denoiser,
    stop: Option<(&'a AtomicBool, checkpoint::StageKind, u64)>,
) -> Result<(Outcome, Witness<'a>)> {
    run_in(World::alone(), path, config, teacher, None, stop)
}

/// [`run`], with another student than the teacher's copy.
fn run_as<'a>(
    path: &std::path::Path,
    config: &Config,
    teacher: &Denoiser,
    student: Option<&Student>,
    stop: Option<(&'a AtomicBool, checkpoint::StageKind, u64)>,
) -> Result<(Outcome, Witness<'a>)> {
    run_in(World::alone(), path, config, teacher, student, stop)
}

/// [`run_as`], as one process of several.
fn run_in<'a>(
    world: World,
    path: &std::path::Path,
    config: &Config,
    teacher: &Denoiser,
    student: Option<&Student>,
    stop: Option<(&'a AtomicBool, checkpoint::StageKind, u64)>,
) -> Result<(Outcome, Witness<'a>)> {
    let run = match world.leads().then(|| RunDir::create(path, config)) {
        None => RunDir::at(path),
        Some(Ok(run)) => run,
        Some(Err(_)) => RunDir::open(path)?.0,
    };
    let mut witness = Witness { stop, ..Witness::default() };
    let flag = AtomicBool::new(false);
    let stop = stop.map_or(&flag, |s| s.0);
    let job = Job { config, student, run: &run, observer: &mut witness, stop, silent: true, world };
    let outcome = distill(job, teacher, Stages::Both)?;
    Ok((outcome, witness))
}

fn finished(outcome: Outcome) -> Student {
    match outcome {
        Outcome::Finished(student) => student,
        other => panic!("{other:?}"),
    }
}

fn moments(student: &Student, n: i64) -> (Vec<f64>, Vec<f64>) {
    let z = crate::torch::shim::randn(99, &[n, 2, 1, 1], Device::Cpu).unwrap();
    let x = tch::no_grad(|| student.generate(&z, &Conditions::none(n))).unwrap();
    let of = |t: Tensor| Vec::<f32>::try_from(t.view(-1)).unwrap().into_iter().map(f64::from).collect::<Vec<f64>>();
    (of(x.mean_dim(0, false, Kind::Float)), of(x.std_dim(0, true, false)))
}

#[test]
fn stage_one_ends_at_the_exact_denoiser_of_the_initial_student() {
    // G0 = D(2 z; 2) for N(0.6, 0.7^2): mean 0.6 * 4 / (0.49 + 4), standard deviation 2 * 0.49 / (0.49 + 4).
    let teacher = gaussian(card(1), &[0.6], &[0.7]);
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.batch, c.degrade.steps, c.degrade.lr) = (512, 700, 0.02);
    c.degrade.spacing = Spacing::LogIteration;
    let run = RunDir::create(&dir.path().join("run"), &c).unwrap();
    let stop = AtomicBool::new(false);
    let job = Job {
        config: &c,
        student: None,
        run: &run,
        observer: &mut Unobserved,
        stop: &stop,
        silent: true,
        world: World::alone(),
    };
    let Outcome::Recorded(trajectory) = distill(job, &teacher, Stages::Degrade).unwrap() else { panic!() };
    let last = teacher.copy().unwrap();
    trajectory.load(trajectory.last(), last.params()).unwrap();
    let (mean, sd) = (0.6 * 4.0 / 4.49, 0.98 / 4.49);
    let got = (last.params().tensors()[0].double_value(&[0]), last.params().tensors()[1].double_value(&[0]).exp());
    assert!((got.0 - mean).abs() < 0.03 && (got.1 - sd).abs() < 0.03, "{got:?} for {mean} {sd}");
    let losses: Vec<f32> = trajectory.nodes().iter().map(|n| n.loss.unwrap()).collect();
    assert!(losses.windows(2).all(|w| w[1] < w[0]), "each node fits the initial student better: {losses:?}");
}

#[test]
fn the_target_goes_back_along_the_path_and_ends_as_the_teacher() {
    let teacher = plain();
    let dir = tempfile::tempdir().unwrap();
    let (_, seen) = run(dir.path(), &config(), &teacher, None).unwrap();
    let nodes: Vec<usize> = seen.entered.iter().map(|e| e.0).collect();
    assert_eq!(nodes, [3, 2, 1, 0]);
    assert_eq!(seen.left, [3, 2, 1]);
    let mut hashes: Vec<&String> = seen.entered.iter().map(|e| &e.1).collect();
    assert_eq!(*hashes[3], teacher.params().hash().unwrap(), "the last target is the teacher, bit for bit");
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), 4, "the weights change at every switch");
    assert_eq!(seen.recorded.len(), 5);
    assert_eq!(seen.recorded[0], (0, teacher.params().hash().unwrap()));
    for (node, hash) in &seen.entered {
        assert_eq!(seen.recorded[*node].1, *hash, "target {node} is the recorded node");
    }
    // Updates 0-4 node 3, 5-9 node 2, 10-14 node 1, from 15 on the teacher.
    let backtrack: Vec<usize> = seen.rows.iter().filter(|r| r.mismatch.is_some()).map(|r| r.node).collect();
    let expected: Vec<usize> = (0..30usize).map(|j| 3usize.saturating_sub(j / 5)).collect();
    assert_eq!(backtrack, expected);
}

#[test]
fn switching_by_mismatch_reaches_the_teacher() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.backtrack.switch, c.backtrack.switch_patience, c.backtrack.switch_max) = (Switch::Mismatch, 1, 15);
    c.backtrack.updates = 70;
    let (_, seen) = run(dir.path(), &c, &plain(), None).unwrap();
    assert_eq!(seen.entered.iter().map(|e| e.0).collect::<Vec<_>>(), [3, 2, 1, 0]);
}

#[test]
fn the_fake_score_starts_from_the_degraded_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    (c.backtrack.updates, c.backtrack.lr_fake) = (1, 1e-30);
    let teacher = plain();
    let (_, seen) = run(dir.path(), &c, &teacher, None).unwrap();
    let mut checkpoint =
        checkpoint::Checkpoint::latest(&dir.path().join("checkpoints"), &teacher.params().hash().unwrap())
            .unwrap()
            .unwrap();
    let fake = teacher.copy().unwrap();
    checkpoint.take_params("fake/", fake.params(), None).unwrap();
    assert_eq!(fake.params().hash().unwrap(), seen.recorded[4].1);
    assert_ne!(seen.recorded[4].1, seen.recorded[0].1);
}

/// Hashes of the bytes that a run leaves in its weights.
fn remains(path: &std::path::Path) -> Vec<(String, u64)> {
    use std::hash::{Hash, Hasher};
    let mut out = Vec::new();
    // Of the checkpoints the newest: which ones came before it depends on where a run was stopped.
    let newest = checkpoint::Checkpoint::latest_state(&path.join("checkpoints")).unwrap().map(|state| state.file);
    for dir in ["trajectory", "checkpoints", "."] {
        for entry in std::fs::read_dir(path.join(dir)).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if dir == "checkpoints" && newest.as_ref() != Some(&name) {
                continue;
            }
            if name.ends_with(".safetensors") || name == "trajectory.json" {
                let mut hasher = std::hash::DefaultHasher::new();
                std::fs::read(entry.path()).unwrap().hash(&mut hasher);
                out.push((format!("{dir}/{name}"), hasher.finish()));
            }
        }
    }
    out.sort();
    out
}

#[test]
fn a_resumed_run_ends_with_the_same_bytes() {
    use checkpoint::StageKind::{Backtrack, Degrade};
    let teacher = labelled();
    let mut c = config();
    (c.degrade.steps, c.backtrack.updates, c.backtrack.ratio, c.accumulate) = (12, 12, 2, 2);
    c.backtrack.switch_every = 3;
    c.optimizer.warmup = 9;
    c.backtrack.cooldown = 0.5;
    for (switch, spacing, patience, nodes) in [
        (Switch::Count, Spacing::Iteration, 0, Precision::F32),
        (Switch::Mismatch, Spacing::Loss, 0, Precision::Bf16),
        (Switch::Mismatch, Spacing::LogIteration, 4, Precision::F32),
        (Switch::Count, Spacing::LogIteration, 0, Precision::Bf16),
    ] {
        c.memory.nodes = nodes;
        (c.backtrack.switch, c.degrade.spacing, c.degrade.patience) = (switch, spacing, patience);
        let dir = tempfile::tempdir().unwrap();
        let whole = dir.path().join("whole");
        run(&whole, &c, &teacher, None).unwrap();
        let expected = remains(&whole);
        assert_eq!(expected.len(), 1 + 1 + 1 + 5, "index, student, checkpoint, nodes");
        for (stage, iteration) in [(Degrade, 5), (Backtrack, 5), (Backtrack, 16)] {
            let path = dir.path().join(format!("{}-{iteration}", stage.name()));
            let flag = AtomicBool::new(false);
            let (outcome, _) = run(&path, &c, &teacher, Some((&flag, stage, iteration))).unwrap();
            assert!(matches!(outcome, Outcome::Stopped(s) if s == stage));
            assert_ne!(remains(&path), expected);
            // What a kill after later steps leaves behind: rows that the resumed run writes again.
            let metrics = path.join("metrics.jsonl");
            let mut rows = metrics::read(&metrics).unwrap();
            let mut late = rows.pop().unwrap();
            late.iteration += 3;
            let text = std::fs::read_to_string(&metrics).unwrap() + &serde_json::to_string(&late).unwrap() + "\n{\"st";
            std::fs::write(&metrics, text).unwrap();
            run(&path, &c, &teacher, None).unwrap();
            assert_eq!(remains(&path), expected, "{switch:?} stopped in {stage:?} after {iteration}");
            let iterations = |p: &std::path::Path| -> Vec<(checkpoint::StageKind, u64, usize)> {
                let rows = metrics::read(&p.join("metrics.jsonl")).unwrap();
                rows.iter().map(|r| (r.stage, r.iteration, r.node)).collect()
            };
            assert_eq!(iterations(&path), iterations(&whole), "one row an iteration, none twice");
        }
    }
}

#[test]
fn another_teacher_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let flag = AtomicBool::new(false);
    run(dir.path(), &config(), &plain(), Some((&flag, checkpoint::StageKind::Backtrack, 3))).unwrap();
    let before = remains(dir.path());
    let other = gaussian(card(2), &[0.8, -0.4], &[0.7, 0.300001]);
    let e = run(dir.path(), &config(), &other, None).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("another teacher"), "{e}");
    assert_eq!(remains(dir.path()), before);
}

#[test]
fn a_network_that_gives_nan_stops_the_run_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    c.optimizer.max_skips = 3;
    let e = run(dir.path(), &c, &gaussian(card(2), &[0.8, f32::NAN], &[0.7, 0.3]), None).unwrap_err();
    assert!(e.to_string().contains("the degraded copy") && e.to_string().contains("3 steps"), "{e}");
}

#[test]
fn gradient_accumulation_is_a_larger_batch() {
    // The mean gradient over micro-batches: with accumulate = 2 the first update's norm equals that of both halves.
    let teacher = plain();
    let norm = |batch: usize, accumulate: usize| {
        let dir = tempfile::tempdir().unwrap();
        let mut c = config();
        (c.batch, c.accumulate, c.degrade.nodes, c.backtrack.updates) = (batch, accumulate, 0.into(), 1);
        let (_, seen) = run(dir.path(), &c, &teacher, None).unwrap();
        seen.rows[0].grad_norm_fake.unwrap()
    };
    let (one, eight) = (norm(4096, 1), norm(512, 8));
    assert!((one / eight - 1.0).abs() < 0.1, "{one} {eight}");
}
