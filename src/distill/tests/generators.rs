//! Students with an architecture of their own in training.

use super::*;
use crate::diffusion::{Generator, GeneratorNames, GeneratorPorts};
use crate::distill::config::Init;
use crate::distill::objective::ObjectiveKind;

/// `x = shift + exp(log_scale) z`, `z` one row of two numbers a sample.
struct Affine {
    params: ParamSet,
}

impl Forward for Affine {
    fn forward(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let z = inputs.iter().find(|(n, _)| *n == "z").expect("given").1;
        assert_eq!(z.size()[1..], [2], "in the graph's own rank");
        let [shift, log_scale] = self.params.tensors() else { panic!("two parameters") };
        let x = z.f_mul(&log_scale.f_exp()?)?.f_add(shift)?;
        Ok(vec![("made".into(), x.f_view([-1, 2, 1, 1])?)])
    }
    fn params(&self) -> &ParamSet {
        &self.params
    }
    fn copy(&self) -> Result<Box<dyn Forward>> {
        Ok(Box::new(Self { params: self.params.deep_copy(Device::Cpu)? }))
    }
}

fn affine(shift: [f32; 2], scale: [f32; 2]) -> Student {
    let names = ["shift", "log_scale"].map(String::from).to_vec();
    let tensors = vec![Tensor::from_slice(&shift), Tensor::from_slice(&scale.map(f32::ln))];
    let network = Affine { params: ParamSet::new(names, tensors).unwrap() };
    let inputs = [InputSpec::new("z", DType::F32, &[None, Some(2)])];
    let outputs = [InputSpec::new("made", DType::F32, &[None, Some(2), Some(1), Some(1)])];
    let ports = GeneratorPorts::find(&card(2), &GeneratorNames::default(), &inputs, &outputs).unwrap();
    assert_eq!((ports.noise_shape(), ports.noise_row.as_slice()), (vec![2, 1, 1], &[2][..]));
    Student::of_generator(Generator::new(Box::new(network), Arc::new(ports)), &Config::default().student).unwrap()
}

/// [`super::run`] with this student.
fn run_with<'a>(
    path: &std::path::Path,
    config: &Config,
    student: &Student,
    stop: Option<(&'a AtomicBool, checkpoint::StageKind, u64)>,
) -> Result<(Outcome, Witness<'a>)> {
    run_as(path, config, &plain(), Some(student), stop)
}

fn of_its_own() -> Config {
    let mut c = config();
    c.student.sigma_init = 0.0;
    c
}

#[test]
fn every_objective_brings_a_generator_to_the_teacher() {
    use ObjectiveKind::*;
    for (objective, nodes) in [(Dmd, 4), (Dmd, 0), (DiffInstruct, 4), (Sid, 4), (Sim, 0)] {
        let dir = tempfile::tempdir().unwrap();
        let mut c = of_its_own();
        (c.objective, c.degrade.nodes, c.batch, c.degrade.steps) = (objective.into(), nodes.into(), 256, 200);
        (c.backtrack.updates, c.backtrack.ratio, c.backtrack.switch_every) = (700, 2, 30);
        c.ema.half_life = 20_000.0;
        let student = affine([-0.5, 0.6], [0.2, 0.9]);
        let (outcome, _) = run_with(dir.path(), &c, &student, None).unwrap();
        let (mean, sd) = moments(&finished(outcome), 20_000);
        for (got, expected) in mean.iter().chain(&sd).zip([0.8, -0.4, 0.7, 0.3]) {
            assert!((got - expected).abs() < 0.05, "{objective:?}, {nodes} nodes: {mean:?} {sd:?}");
        }
        assert_eq!(student.params().tensors()[0].double_value(&[0]), -0.5, "the given one is left as it was");
    }
}

#[test]
fn the_path_leads_from_the_teacher_to_this_students_samples() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = of_its_own();
    (c.batch, c.degrade.steps, c.degrade.lr, c.backtrack.updates, c.backtrack.lr_fake) = (512, 900, 0.02, 1, 1e-30);
    let student = affine([-0.5, 0.6], [0.2, 0.5]);
    let (_, seen) = run_with(dir.path(), &c, &student, None).unwrap();
    let teacher = plain();
    let hash = teacher.params().hash().unwrap();
    assert_eq!(seen.recorded[0], (0, hash.clone()));
    // The exact denoiser of the student's samples has their mean and spread.
    let trajectory = Trajectory::open(&dir.path().join("trajectory"), &hash).unwrap();
    let last = teacher.copy().unwrap();
    trajectory.load(trajectory.last(), last.params()).unwrap();
    for (channel, (mean, sd)) in [(-0.5, 0.2), (0.6, 0.5)].into_iter().enumerate() {
        let at = |k: usize| last.params().tensors()[k].double_value(&[0, channel as i64, 0, 0]);
        assert!((at(0) - mean).abs() < 0.04 && (at(1).exp() - sd).abs() < 0.04, "{} {}", at(0), at(1).exp());
    }
    // The fake score starts there.
    let mut checkpoint = checkpoint::Checkpoint::latest(&dir.path().join("checkpoints"), &hash).unwrap().unwrap();
    let fake = teacher.copy().unwrap();
    checkpoint.take_params("fake/", fake.params(), None).unwrap();
    assert_eq!(fake.params().hash().unwrap(), seen.recorded[4].1);
}

#[test]
fn a_generator_resumes_to_the_same_bytes_and_another_is_refused() {
    use checkpoint::StageKind::{Backtrack, Degrade};
    let student = affine([-0.5, 0.6], [0.2, 0.9]);
    let mut c = of_its_own();
    (c.degrade.steps, c.backtrack.updates, c.backtrack.switch_every) = (8, 8, 2);
    c.ema.more = vec![50.0];
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    run_with(&whole, &c, &student, None).unwrap();
    let expected = remains(&whole);
    for (stage, iteration) in [(Degrade, 3), (Backtrack, 5)] {
        let cut = dir.path().join(stage.name());
        let flag = AtomicBool::new(false);
        run_with(&cut, &c, &student, Some((&flag, stage, iteration))).unwrap();
        assert_ne!(remains(&cut), expected);
        let e = run_with(&cut, &c, &affine([-0.5, 0.6], [0.2, 0.900_001]), None).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("another initial student"), "{e}");
        let e = run(&cut, &c, &plain(), None).unwrap_err();
        assert!(e.to_string().contains("this one is the teacher's copy"), "{e}");
        run_with(&cut, &c, &student, None).unwrap();
        assert_eq!(remains(&cut), expected);
    }
    // A run of the teacher's copy does not go on with a generator either.
    let plain_run = dir.path().join("plain");
    run(&plain_run, &c, &plain(), None).unwrap();
    let e = run_with(&plain_run, &c, &student, None).unwrap_err();
    assert!(e.to_string().contains("the teacher's copy, this one is weights"), "{e}");
}

/// A consistency model's raw F for `N(mean, sd^2)`, whose paths are known: `f(x, s) = mean + (x - mean) r(s)` with
/// `r(s)^2 = (sd^2 + smin^2) / (sd^2 + s^2)`. Two parameters: mean and log sd, one a channel.
struct Paths {
    params: ParamSet,
}

impl Forward for Paths {
    fn forward(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let get = |name: &str| inputs.iter().find(|(n, _)| *n == name).expect("given").1;
        let [mean, log_sd] = self.params.tensors() else { panic!("two parameters") };
        let (s, sd2) = (get("sigma").f_view([-1, 1, 1, 1])?, log_sd.f_mul_scalar(2.0)?.f_exp()?);
        let x = get("x") * (s.square() + 0.25).sqrt();
        let ratio = ((&sd2 + 0.05f64.powi(2)) / (&sd2 + s.square())).sqrt();
        let f = mean + (&x - mean) * ratio;
        let above: Tensor = &s - 0.05;
        let skip = 0.25 / (above.square() + 0.25);
        let out: Tensor = &above * 0.5 / (s.square() + 0.25).sqrt();
        Ok(vec![("denoised".into(), (f - skip * x) / out)])
    }
    fn params(&self) -> &ParamSet {
        &self.params
    }
    fn copy(&self) -> Result<Box<dyn Forward>> {
        Ok(Box::new(Self { params: self.params.deep_copy(Device::Cpu)? }))
    }
}

#[test]
fn a_consistency_model_is_an_initial_student_that_is_nearly_there() {
    let mut own = card(2);
    own.prediction = Prediction::Consistency;
    let sd = [0.7f64, 0.3];
    let tensors = vec![
        Tensor::from_slice(&[0.6f32, -0.1]).view([1, 2, 1, 1]),
        Tensor::from_slice(&sd.map(|s| s.ln() as f32)).view([1, 2, 1, 1]),
    ];
    let network = Paths { params: ParamSet::new(["mean", "log_sd"].map(String::from).to_vec(), tensors).unwrap() };
    let inputs = [
        InputSpec::new("x", DType::F32, &[None, Some(2), Some(1), Some(1)]),
        InputSpec::new("sigma", DType::F32, &[None]),
    ];
    let denoiser = Denoiser::new(Box::new(network), Arc::new(own), &inputs).unwrap();
    let student = Student::new(denoiser, &of_its_own().student).unwrap();
    // One call from sigma_max = 10: x = mean + (10 z - mean) r(10).
    let (mean, spread) = moments(&student, 20_000);
    for (k, m) in [0.6, -0.1].into_iter().enumerate() {
        let r = ((sd[k] * sd[k] + 0.0025) / (sd[k] * sd[k] + 100.0)).sqrt();
        assert!(
            (mean[k] - m * (1.0 - r)).abs() < 0.02 && (spread[k] / (10.0 * r) - 1.0).abs() < 0.02,
            "{mean:?} {spread:?}"
        );
    }
    // The teacher's mean is another one; the spread is right from the start and stays.
    let dir = tempfile::tempdir().unwrap();
    let mut c = of_its_own();
    (c.batch, c.degrade.steps, c.backtrack.updates, c.backtrack.ratio, c.backtrack.switch_every) =
        (256, 100, 600, 2, 30);
    c.ema.half_life = 20_000.0;
    let (outcome, _) = run_with(dir.path(), &c, &student, None).unwrap();
    let (mean, spread) = moments(&finished(outcome), 20_000);
    for (got, expected) in mean.iter().chain(&spread).zip([0.8, -0.4, 0.7, 0.3]) {
        assert!((got - expected).abs() < 0.05, "{mean:?} {spread:?}");
    }
}

#[test]
fn what_a_generator_cannot_do_is_refused() {
    let generator = || match affine([0.0, 0.0], [1.0, 1.0]) {
        Student::Generator(g) => g,
        Student::Levels(_) => panic!(),
    };
    for set in ["student.sigmas=[1.0]", "student.sigma_init=2.0"] {
        let config = Config::resolve(None, &[set.into()]).unwrap().student;
        let e = Student::of_generator(generator(), &config).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(set.split('=').next().unwrap()), "{e}");
    }
    // Fresh weights need to know what the weights are.
    let mut c = config().student;
    (c.init, c.sigma_init) = (Init::Random, 0.0);
    let e = Student::initial(Some(&affine([0.0, 0.0], [1.0, 1.0])), &plain(), &c, 0).unwrap_err();
    assert!(e.to_string().contains("no ONNX graph"), "{e}");
    let conditions = crate::diffusion::HostConditions::none(3);
    let fine = affine([0.0, 0.0], [1.0, 1.0]);
    fine.try_out(&card(2), &conditions).unwrap();
    assert!(fine.try_out(&card(1), &conditions).unwrap_err().to_string().contains("[3, 1, 1, 1]"));
    let e = affine([0.0, f32::NAN], [1.0, 1.0]).try_out(&card(2), &conditions).unwrap_err();
    assert!(e.to_string().contains("NaN"), "{e}");
}
