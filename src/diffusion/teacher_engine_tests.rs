use super::*;
use crate::diffusion::Layout;
use crate::diffusion::{Betas, Prediction, ScheduleSpec, TimeUnit};
use crate::noise::image_noise;
use crate::onnx::{AttributeProto, GraphProto};
use crate::runtime::{Dim, EngineKind, ValueInfo, testing};

const SD: f64 = 0.5;
const MEANS: [f64; 4] = [-0.4, 0.1, 0.6, 0.0];

/// The exact denoiser of data `N(mean of the class, 0.5^2)` on 2x1x3 samples, class 3 the null:
/// `(0.25 x + sigma^2 mu[labels]) / (0.25 + sigma^2)`.
fn gaussian_teacher(batch: &str) -> Vec<u8> {
    gaussian(batch, &MEANS)
}

fn gaussian(batch: &str, means: &[f64; 4]) -> Vec<u8> {
    let means: Vec<f32> = means.iter().map(|m| *m as f32).collect();
    let constants = [
        ("mu", HostTensor::new(&[4, 1, 1, 1], &means).unwrap()),
        ("column", HostTensor::vec(&[-1i64, 1, 1, 1])),
        ("variance", HostTensor::scalar((SD * SD) as f32)),
    ];
    let mut gather = testing::node("Gather", &["mu", "labels"], "mean");
    gather.attribute.push(AttributeProto {
        name: Some("axis".into()),
        i: Some(0),
        r#type: Some(2),
        ..Default::default()
    });
    let graph = GraphProto {
        node: vec![
            gather,
            testing::node("Reshape", &["sigma", "column"], "s"),
            testing::node("Mul", &["s", "s"], "s2"),
            testing::node("Mul", &["x", "variance"], "vx"),
            testing::node("Mul", &["s2", "mean"], "sm"),
            testing::node("Add", &["vx", "sm"], "top"),
            testing::node("Add", &["s2", "variance"], "bottom"),
            testing::node("Div", &["top", "bottom"], "denoised"),
        ],
        input: vec![
            testing::value("x", DType::F32, &[batch, "2", "1", "3"]),
            testing::value("sigma", DType::F32, &[batch]),
            testing::value("labels", DType::I64, &[batch]),
        ],
        output: vec![testing::value("denoised", DType::F32, &[batch, "2", "1", "3"])],
        initializer: constants.iter().map(|(n, t)| testing::initializer(n, t)).collect(),
        ..Default::default()
    };
    let metadata: Vec<(String, String)> = card().to_metadata().unwrap();
    let metadata: Vec<(&str, &str)> = metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    testing::model(graph, &metadata)
}

fn card() -> TeacherCard {
    toml::from_str(
        r#"
        sample = "x"
        time = "sigma"
        output = "denoised"
        prediction = "denoised"
        time_unit = "sigma"
        shape = [2, 1, 3]
        [schedule]
        kind = "edm"
        [conditions.labels]
        kind = "class-index"
        classes = 3
        null = 3
        "#,
    )
    .unwrap()
}

fn request() -> TeacherRequest {
    let images = SampleRequest { seed: 11, batch: 64, ..SampleRequest::default() };
    TeacherRequest { images, sampler: Sampler::Heun, steps: 18, shift: 0.0, guidance: 1.0.into() }
}

/// The ODE's solution from `80 z` to noise level 0.
fn solution(z: f32, mean: f64) -> f64 {
    mean + (80.0 * f64::from(z) - mean) * SD / (SD * SD + 80.0 * 80.0f64).sqrt()
}

/// The same sampler on the host in f64.
fn in_f64(z: &[f32], mean: f64) -> Vec<f64> {
    let schedule = card().schedule().unwrap();
    let z: Vec<f64> = z.iter().map(|v| f64::from(*v)).collect();
    let denoise = |x: &Vec<f64>, s: f64| {
        Ok(x.iter().map(|x| (SD * SD * x + s * s * mean) / (SD * SD + s * s)).collect::<Vec<f64>>())
    };
    Sampler::Heun.run(&schedule, &z, &schedule.sampling_sigmas(18), denoise).unwrap().value
}

fn engines() -> Vec<EngineOptions> {
    let kinds = [EngineKind::Auto, EngineKind::Tract];
    kinds.into_iter().map(|engine| EngineOptions { engine, ..EngineOptions::default() }).collect()
}

fn open(bytes: &[u8], options: &EngineOptions) -> TeacherOnEngine {
    TeacherOnEngine::new(runtime::open_bytes(bytes, None, options).unwrap(), Arc::new(card())).unwrap()
}

#[test]
fn samples_are_the_solution_of_the_ode_for_every_image_and_batch_size() {
    for options in engines() {
        let mut teacher = open(&gaussian_teacher("batch"), &options);
        let whole = teacher.sample(&request(), 0, 10).unwrap();
        assert_eq!((whole.nfe, whole.images.shape()), (35, &[10, 2, 1, 3][..]));
        for (k, image) in whole.images.to_f32().chunks_exact(6).enumerate() {
            let mean = MEANS[image_class(11, k as u64, 3)];
            let noise = image_noise(11, k as u64, 6);
            for ((x, z), same) in image.iter().zip(&noise).zip(in_f64(&noise, mean)) {
                assert!((f64::from(*x) - same).abs() < 1e-4, "{x} is not {same}");
                // 18 Heun steps leave an error of the second order.
                assert!((same - solution(*z, mean)).abs() < 0.1, "{same} is not {}", solution(*z, mean));
            }
        }
        for batch in [1, 3] {
            let mut small = request();
            small.images.batch = batch;
            assert_eq!(teacher.sample(&small, 0, 10).unwrap().images, whole.images);
        }
        assert_eq!(teacher.sample(&request(), 7, 2).unwrap().images, whole.images.rows(7, 2).unwrap());
        // A graph with its batch fixed gives the same images.
        let mut fixed = open(&gaussian_teacher("4"), &options);
        let same = fixed.sample(&request(), 0, 10).unwrap().images;
        for (x, y) in same.to_f32().iter().zip(whole.images.to_f32()) {
            assert!((x - y).abs() < 1e-5);
        }
    }
}

#[test]
fn guidance_moves_the_mean_beyond_the_class() {
    for options in engines() {
        let mut teacher = open(&gaussian_teacher("batch"), &options);
        let mut request = request();
        (request.guidance, request.steps, request.images.classes) = (3.0.into(), 40, vec![2, 0]);
        let found = teacher.sample(&request, 0, 2).unwrap();
        assert_eq!(found.nfe, 2 * 79);
        for (k, class) in [2, 0].into_iter().enumerate() {
            let mean = MEANS[3] + 3.0 * (MEANS[class] - MEANS[3]);
            let image = found.images.rows(k, 1).unwrap().to_f32();
            for (x, z) in image.iter().zip(image_noise(11, k as u64, 6)) {
                assert!((f64::from(*x) - solution(z, mean)).abs() < 0.01, "{x} is not {}", solution(z, mean));
            }
        }
    }
}

#[test]
fn a_weaker_network_leads_away_from_its_own_mean() {
    let weaker = [-0.1, 0.0, 0.2, 0.9];
    for options in engines() {
        let teacher = open(&gaussian_teacher("batch"), &options);
        let mut teacher = teacher.guided_by(open(&gaussian("batch", &weaker), &options)).unwrap();
        let mut request = request();
        (request.guidance, request.steps, request.images.classes) = (2.0.into(), 40, vec![2, 0]);
        let found = teacher.sample(&request, 0, 2).unwrap();
        assert_eq!(found.nfe, 2 * 79);
        for (k, class) in [2, 0].into_iter().enumerate() {
            let mean = weaker[class] + 2.0 * (MEANS[class] - weaker[class]);
            let image = found.images.rows(k, 1).unwrap().to_f32();
            for (x, z) in image.iter().zip(image_noise(11, k as u64, 6)) {
                assert!((f64::from(*x) - solution(z, mean)).abs() < 0.01, "{x} is not {}", solution(z, mean));
            }
        }
        // The network that guides is still there, and is not asked where nothing is guided.
        request.guidance = 1.0.into();
        assert_eq!(teacher.sample(&request, 0, 2).unwrap().nfe, 79);
        request.guidance = Guidance::new(2.0, [0.5, 3.0]).unwrap();
        let some = teacher.sample(&request, 0, 2).unwrap().images;
        assert!(some != found.images);
    }
    let other = TeacherCard { shape: vec![6], ..card() };
    let error = check_weaker(&card(), &other).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("the weaker network's card has shape [6]"), "{error}");
}

#[test]
fn a_shift_moves_the_steps_of_a_flow() {
    let schedule = ScheduleSpec::Flow { shift: 1.0, direction: Default::default() };
    let flow = Arc::new(TeacherCard { schedule, ..card() });
    let engine = runtime::open_bytes(&gaussian_teacher("batch"), None, &EngineOptions::default()).unwrap();
    let mut teacher = TeacherOnEngine::new(engine, flow.clone()).unwrap();
    let mut request = request();
    (request.sampler, request.steps, request.images.classes) = (Sampler::Euler, 4, vec![2]);
    let schedule = flow.schedule().unwrap();
    let z: Vec<f64> = image_noise(11, 0, 6).iter().map(|v| f64::from(*v)).collect();
    // (A flow's network is given x_t = x_edm / (1 + sigma), and this one takes that for x_edm.)
    let denoise = |x: &Vec<f64>, s: f64| {
        let one = |x: &f64| (SD * SD * x / (1.0 + s) + s * s * MEANS[2]) / (SD * SD + s * s);
        Ok(x.iter().map(one).collect())
    };
    let mut made = Vec::new();
    for (shift, times) in [(0.0, [0.75, 0.5, 0.25]), (3.0, [0.9, 0.75, 0.5])] {
        request.shift = shift;
        let found = teacher.sample(&request, 0, 1).unwrap().images.to_f32();
        let sigmas = [&[schedule.sigma_max()][..], &times.map(|t| schedule.sigma(t)), &[0.0]].concat();
        let want = Sampler::Euler.run(&schedule, &z, &sigmas, denoise).unwrap().value;
        assert!(found.iter().zip(&want).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-3), "{found:?} {want:?}");
        made.push(found);
    }
    assert_ne!(made[0], made[1]);
    let e = open(&gaussian_teacher("batch"), &EngineOptions::default()).sample(&request, 0, 1).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("schedule is no flow"), "{e}");
}

#[test]
fn rescaling_is_that_of_diffusers() {
    // `rescale_noise_cfg(made, with, guidance_rescale=0.7)` of diffusers 0.36, two samples.
    let with = [1.3f32, 0.67, 0.59, -0.11, 0.55, -0.87, 1.51, 3.53, -3.81, 3.43, 2.07, 4.21];
    let made = vec![-1.98f32, 0.35, 0.59, -0.41, 1.6, 1.38, 2.23, -1.07, -3.64, -5.55, 3.49, 0.94];
    let want = [
        -1.38365, 0.244585, 0.4123, -0.286513, 1.118101, 0.964362, 1.980091, -0.950089, -3.232077, -4.928029, 3.098887,
        0.834657,
    ];
    for (found, want) in rescaled(made.clone(), &with, 6, 0.7).iter().zip(want) {
        assert!((f64::from(*found) - want).abs() < 1e-5, "{found} is not {want}");
    }
    assert_eq!(rescaled(made.clone(), &with, 6, 0.0), made);
    assert_eq!(rescaled(made.clone(), &made, 6, 1.0), made);
}

#[test]
fn a_file_is_opened_with_the_card_in_it_and_overrides() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("teacher.onnx");
    std::fs::write(&path, gaussian_teacher("batch")).unwrap();
    let options = EngineOptions::default();
    let teacher = TeacherOnEngine::open(&path, &["schedule.sigma_max=40".into()], &options).unwrap();
    assert_eq!(teacher.conversion().schedule().sigma_max(), 40.0);
    let error = TeacherOnEngine::open(&path, &["time=t".into()], &options).err().unwrap();
    assert!(error.exit_code() == 2 && error.to_string().contains("`time` names `t`"), "{error}");
    std::fs::write(&path, "no model").unwrap();
    assert!(TeacherOnEngine::open(&path, &[], &options).err().unwrap().to_string().contains("not an ONNX model"));
}

#[test]
fn classes_that_are_not_there_are_refused() {
    let mut teacher = open(&gaussian_teacher("batch"), &EngineOptions::default());
    let mut request = request();
    request.images.classes = vec![3];
    assert_eq!(teacher.sample(&request, 0, 1).unwrap_err().exit_code(), 2);
}

/// An engine of which the graph is a Rust function: epsilon of `N(0.2, 0.5^2)` on VP, channels last, integer steps.
struct Epsilon {
    inputs: Vec<ValueInfo>,
    outputs: Vec<ValueInfo>,
    schedule: crate::diffusion::Schedule,
}

impl Engine for Epsilon {
    fn name(&self) -> String {
        "test".into()
    }
    fn inputs(&self) -> &[ValueInfo] {
        &self.inputs
    }
    fn outputs(&self) -> &[ValueInfo] {
        &self.outputs
    }
    fn run(&mut self, inputs: &[(&str, &HostTensor)]) -> Result<Vec<(String, HostTensor)>> {
        let given = runtime::arrange(&self.inputs, inputs)?;
        let (x, step, gain) = (given[0], given[1].to_i64()[0], given[2].to_f64()[0]);
        let sigma = self.schedule.sigma(step as f64);
        let (a, b) = (self.schedule.a(sigma), self.schedule.b(sigma));
        // The mean of channel c is 0.2 + 0.1 c, so that a wrong layout shows.
        let epsilon = |(i, x): (usize, f64)| {
            let mean = 0.2 + 0.1 * (i % 2) as f64;
            let x_edm = x / a;
            let x0 = (SD * SD * x_edm + sigma * sigma * mean) / (SD * SD + sigma * sigma);
            (gain * (x - a * x0) / b) as f32
        };
        let values: Vec<f32> = x.to_f64().into_iter().enumerate().map(epsilon).collect();
        Ok(vec![("eps".into(), HostTensor::new(x.shape(), &values)?)])
    }
}

#[test]
fn channels_last_integer_steps_one_time_for_the_batch_and_constants() {
    let schedule =
        ScheduleSpec::Vp { betas: Betas::Linear, beta_start: None, beta_end: None, steps: None, table: vec![] };
    let image = vec![Dim::Symbol("n".into()), Dim::Fixed(1), Dim::Fixed(3), Dim::Fixed(2)];
    let info = |name: &str, dtype, shape: &[Dim]| ValueInfo { name: name.into(), dtype, shape: shape.to_vec() };
    let engine = Epsilon {
        inputs: vec![info("x", DType::F32, &image), info("t", DType::I64, &[]), info("gain", DType::F32, &[])],
        outputs: vec![info("eps", DType::F32, &image)],
        schedule: crate::diffusion::Schedule::new(&schedule).unwrap(),
    };
    let card = TeacherCard {
        time: "t".into(),
        output: "eps".into(),
        prediction: Prediction::Epsilon,
        time_unit: TimeUnit::Step,
        layout: Layout::Nhwc,
        range: Some([-0.75, 0.75]),
        schedule,
        conditions: Default::default(),
        constants: [("gain".to_owned(), 1.0)].into(),
        ..card()
    };
    let top = card.schedule().unwrap().sigma_max();
    let mut teacher = TeacherOnEngine::new(Box::new(engine), Arc::new(card)).unwrap();
    let mut request = request();
    (request.sampler, request.steps) = (Sampler::Ddim, 250);
    let found = teacher.sample(&request, 0, 4).unwrap();
    assert_eq!(found.nfe, 250);
    for (k, image) in found.images.to_f32().chunks_exact(6).enumerate() {
        for (i, (x, z)) in image.iter().zip(image_noise(11, k as u64, 6)).enumerate() {
            let mean = 0.2 + 0.1 * (i / 3) as f64;
            let end = mean + (top * f64::from(z) - mean) * SD / (SD * SD + top * top).sqrt();
            assert!((f64::from(*x) - end.clamp(-0.75, 0.75)).abs() < 0.02, "image {k} value {i}: {x} is not {end}");
        }
    }
}

/// The committed digits teacher: libtorch and ONNX Runtime must sample the same images.
#[cfg(all(feature = "train", feature = "ort"))]
#[test]
fn libtorch_and_onnx_runtime_sample_the_same_digits() {
    use crate::diffusion::{Conditions, Denoiser};
    use crate::torch::{Network, convert};
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits/teacher.onnx");
    let options = EngineOptions { engine: EngineKind::Ort, ..EngineOptions::default() };
    let mut engine = TeacherOnEngine::open(&path, &[], &options).unwrap();
    let mut wanted = request();
    wanted.steps = 8;
    let there = engine.sample(&wanted, 0, 6).unwrap();
    let network = Network::load(&path, tch::Device::Cpu).unwrap();
    let inputs: Vec<InputSpec> = network.inputs().iter().map(InputSpec::from).collect();
    let outputs: Vec<InputSpec> = network.outputs().iter().map(InputSpec::from).collect();
    engine.card().check_against(&inputs, &outputs).unwrap();
    let denoiser = Denoiser::new(Box::new(network), engine.card().clone(), &inputs).unwrap();
    let &[c, h, w] = engine.card().shape.as_slice() else { panic!("images") };
    let z = HostTensor::new(&[6, c, h, w], &batch_noise(11, 0, 6, c * h * w)).unwrap();
    let cond = engine.conditions(&wanted.images, 0, 6).unwrap();
    let cond = Conditions::from_host(&cond, tch::Device::Cpu).unwrap();
    let here = denoiser.sample(&convert::to_torch(&z).unwrap(), &cond, Sampler::Heun, 8, 1.0).unwrap();
    assert_eq!((here.nfe, there.nfe), (15, 15));
    let here = convert::to_host(&here.value.clamp(-1.0, 1.0)).unwrap().to_f32();
    for (x, y) in here.iter().zip(there.images.to_f32()) {
        assert!((x - y).abs() < 1e-3, "{x} is not {y}");
    }
    // Guided and rescaled as well.
    wanted.guidance = Guidance::everywhere(3.0).rescaled(0.7).unwrap();
    let guided = engine.sample(&wanted, 0, 6).unwrap().images.to_f32();
    let z = HostTensor::new(&[6, c, h, w], &batch_noise(11, 0, 6, c * h * w)).unwrap();
    let same = denoiser.sample(&convert::to_torch(&z).unwrap(), &cond, Sampler::Heun, 8, wanted.guidance).unwrap();
    let same = convert::to_host(&same.value.clamp(-1.0, 1.0)).unwrap().to_f32();
    for (x, y) in same.iter().zip(&guided) {
        assert!((x - y).abs() < 2e-3, "{x} is not {y}, guided");
    }
    assert!(here.iter().any(|v| *v > 0.5) && here.iter().any(|v| *v < -0.5), "no digits: {here:?}");
}
