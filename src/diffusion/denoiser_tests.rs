use super::*;
use crate::diffusion::Layout;
use crate::diffusion::{Betas, Null, Prediction, ScheduleSpec, TimeUnit, condition::Zeros};
use crate::tensor::DType;
use std::cell::RefCell;
use std::rc::Rc;

/// Name, shape and type of every input of one call.
type Call = Vec<(String, Vec<i64>, Kind)>;
type Seen = Rc<RefCell<Vec<Call>>>;

/// `F = w x + time + 0.1 label_effect`, any layout; records the inputs' shapes and types.
struct Fake {
    params: ParamSet,
    seen: Seen,
}

impl Forward for Fake {
    fn forward(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let record = inputs.iter().map(|(n, t)| (n.to_string(), t.size(), t.kind())).collect();
        self.seen.borrow_mut().push(record);
        let get = |name: &str| inputs.iter().find(|(n, _)| *n == name).map(|(_, t)| *t);
        let x = get("x").unwrap().to_kind(Kind::Float);
        let time = get("t").unwrap().to_kind(Kind::Float);
        let time = if time.numel() == 1 { time.reshape([1, 1, 1, 1]) } else { time.reshape([-1, 1, 1, 1]) };
        let mut y = &x * &self.params.tensors()[0] + time;
        if let Some(c) = get("c") {
            let rows = c.size()[0];
            let effect = match c.dim() {
                // The sum of the classes' numbers weighted by the one-hot: its index + 1, or 0 for zeros.
                2 if c.size()[1] > 1 => {
                    let n = Tensor::arange(c.size()[1], (Kind::Float, Device::Cpu)) + 1.0;
                    (c.to_kind(Kind::Float) * n).sum_dim_intlist(1i64, false, Kind::Float)
                }
                _ => c.to_kind(Kind::Float).reshape([rows]),
            };
            y += effect.reshape([-1, 1, 1, 1]) * 0.1;
        }
        if let Some(k) = get("k") {
            y += k.to_kind(Kind::Float).reshape([-1, 1, 1, 1]);
        }
        Ok(vec![("other".into(), Tensor::zeros([1], (Kind::Float, Device::Cpu))), ("y".into(), y)])
    }
    fn params(&self) -> &ParamSet {
        &self.params
    }
    fn copy(&self) -> Result<Box<dyn Forward>> {
        Ok(Box::new(Self { params: self.params.deep_copy(Device::Cpu)?, seen: self.seen.clone() }))
    }
}

const W: f64 = 0.25;

fn card() -> TeacherCard {
    TeacherCard {
        sample: "x".into(),
        time: "t".into(),
        output: "y".into(),
        prediction: Prediction::EdmRaw,
        time_unit: TimeUnit::LnSigma4,
        shape: vec![2, 1, 3],
        modality: None,
        sample_rate: None,
        layout: Layout::ChannelsFirst,
        range: None,
        sigma_data: 0.5,
        latent_scale: 1.0,
        dataset: None,
        schedule: ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 },
        conditions: Default::default(),
        constants: Default::default(),
        concat: Vec::new(),
        dims: Default::default(),
    }
}

fn denoiser(card: TeacherCard, inputs: &[InputSpec]) -> (Denoiser, Seen) {
    let seen = Seen::default();
    let w = Tensor::from_slice(&[W as f32]).set_requires_grad(true);
    let params = ParamSet::new(vec!["w".into()], vec![w]).unwrap();
    let network = Box::new(Fake { params, seen: seen.clone() });
    (Denoiser::new(network, Arc::new(card), inputs).unwrap(), seen)
}

fn inputs(time: DType, time_shape: &[Option<usize>], layout: Layout) -> Vec<InputSpec> {
    let image = match layout {
        Layout::Nhwc => [None, Some(1), Some(3), Some(2)],
        _ => [None, Some(2), Some(1), Some(3)],
    };
    vec![InputSpec::new("x", DType::F32, &image), InputSpec::new("t", time, time_shape)]
}

fn batch(rows: i64) -> Tensor {
    (Tensor::arange(rows * 6, (Kind::Float, Device::Cpu)) * 0.1 - 1.0).reshape([rows, 2, 1, 3])
}

fn values(t: &Tensor) -> Vec<f64> {
    Vec::<f32>::try_from(t.detach().contiguous().view(-1)).unwrap().into_iter().map(f64::from).collect()
}

/// `skip c_in x + out (w c_in x + time + extra)` in f64.
fn expected(card: &TeacherCard, x: &Tensor, sigma: &[f64], extra: &[f64]) -> Vec<f64> {
    let conversion = Conversion::new(card).unwrap();
    let per_row = 6;
    let one = |(i, x): (usize, &f64)| {
        let c = conversion.at(sigma[i / per_row]).unwrap();
        let net = c.c_in * x;
        c.skip * net + c.out * (W * net + c.time + extra[i / per_row])
    };
    values(x).iter().enumerate().map(one).collect()
}

fn assert_close(found: &Tensor, expected: &[f64]) {
    assert_within(found, expected, 2e-6);
}

fn assert_within(found: &Tensor, expected: &[f64], tolerance: f64) {
    for (x, y) in values(found).iter().zip(expected) {
        assert!((x - y).abs() <= tolerance * y.abs().max(1.0), "{x} is not {y}");
    }
    assert_eq!(found.numel(), expected.len());
}

#[test]
fn every_form_of_time_and_layout_gives_the_conversions_value() {
    let sigma = [0.5, 3.0, 0.5, 20.0];
    let vp = ScheduleSpec::Vp { betas: Betas::Linear, beta_start: None, beta_end: None, steps: None, table: vec![] };
    for layout in [Layout::ChannelsFirst, Layout::Nhwc] {
        type Case<'a> = (DType, &'a [Option<usize>], usize, Vec<i64>);
        let cases: [Case; 6] = [
            (DType::F32, &[None], 1, vec![4]),
            (DType::F64, &[None, Some(1)], 1, vec![4, 1]),
            (DType::F16, &[None], 1, vec![4]),
            // One number for the batch: three different levels, three calls.
            (DType::F32, &[], 3, vec![]),
            (DType::F32, &[Some(1)], 3, vec![1]),
            (DType::F32, &[Some(4)], 1, vec![4]),
        ];
        for (dtype, shape, calls, time_shape) in cases {
            let card = TeacherCard { layout, ..card() };
            let (d, seen) = denoiser(card.clone(), &inputs(dtype, shape, layout));
            let x = batch(4);
            let found = d.denoise(&x, &sigma, &Conditions::none(4)).unwrap();
            let tolerance = if dtype == DType::F16 { 1e-2 } else { 2e-6 };
            for (x, y) in values(&found).iter().zip(expected(&card, &x, &sigma, &[0.0; 4])) {
                assert!((x - y).abs() <= tolerance * y.abs().max(1.0), "{x} is not {y}: {dtype} {shape:?} {layout:?}");
            }
            let seen = seen.borrow();
            assert_eq!(seen.len(), calls);
            let time = seen[0].iter().find(|(n, ..)| n == "t").unwrap();
            assert_eq!((&time.1, time.2), (&time_shape, convert::kind(dtype)));
            if layout == Layout::Nhwc {
                assert_eq!(seen[0][0].1[1..], [1, 3, 2]);
            }
        }
    }
    // Integer steps: levels next to a table entry give that entry.
    let card = TeacherCard { prediction: Prediction::Epsilon, time_unit: TimeUnit::Step, schedule: vp, ..card() };
    let (d, seen) = denoiser(card.clone(), &inputs(DType::I64, &[None], Layout::ChannelsFirst));
    let schedule = card.schedule().unwrap();
    let sigma = [schedule.sigma(0.0), schedule.sigma(500.0), schedule.sigma(999.0)];
    let found = d.denoise(&batch(3), &sigma, &Conditions::none(3)).unwrap();
    let want = expected(&card, &batch(3), &sigma, &[0.0; 3]);
    for (x, y) in values(&found).iter().zip(want) {
        assert!((x - y).abs() <= 1e-6 * y.abs().max(1.0), "{x} is not {y}");
    }
    assert_eq!(seen.borrow()[0][1].2, Kind::Int64);
}

#[test]
fn a_denoising_graph_is_used_untouched() {
    let card = TeacherCard { prediction: Prediction::Denoised, time_unit: TimeUnit::Sigma, ..card() };
    let (d, _) = denoiser(card, &inputs(DType::F32, &[None], Layout::ChannelsFirst));
    let x = batch(2);
    let found = d.denoise(&x, &[2.0, 3.0], &Conditions::none(2)).unwrap();
    let w = &d.params().tensors()[0];
    let direct = &x * w + Tensor::from_slice(&[2f32, 3.0]).reshape([2, 1, 1, 1]);
    assert_eq!(found, direct);
}

fn with_classes(null: Option<i64>) -> (TeacherCard, Vec<InputSpec>) {
    let mut card = card();
    card.conditions.insert("c".into(), Condition::ClassIndex { classes: 4, null });
    let mut inputs = inputs(DType::F32, &[None], Layout::ChannelsFirst);
    inputs.push(InputSpec::new("c", DType::I64, &[None]));
    (card, inputs)
}

fn labels(labels: &[i64]) -> Conditions {
    Conditions::new(labels.len() as i64, vec![("c".into(), Tensor::from_slice(labels))]).unwrap()
}

#[test]
fn conditions_and_constants_reach_the_graph_in_its_own_form() {
    let (card, specs) = with_classes(Some(4));
    let x = batch(3);
    let sigma = [0.3, 1.0, 5.0];
    let (d, _) = denoiser(card.clone(), &specs);
    let found = d.denoise(&x, &sigma, &labels(&[0, 3, 2])).unwrap();
    assert_close(&found, &expected(&card, &x, &sigma, &[0.0, 0.3, 0.2]));
    // One-hot from the same indices; -1 is the row of zeros.
    let mut hot = card.clone();
    hot.conditions.insert("c".into(), Condition::OneHot { classes: 4, null: Some(Null::Zeros(Zeros::Zeros)) });
    hot.constants.insert("k".into(), 0.5);
    let mut hot_specs = specs.clone();
    hot_specs[2] = InputSpec::new("c", DType::F32, &[None, Some(4)]);
    hot_specs.push(InputSpec::new("k", DType::F64, &[]));
    let (d, seen) = denoiser(hot.clone(), &hot_specs);
    let found = d.denoise(&x, &sigma, &labels(&[0, 3, -1])).unwrap();
    assert_close(&found, &expected(&hot, &x, &sigma, &[0.6, 0.9, 0.5]));
    let record = seen.borrow()[0].clone();
    assert_eq!(record[2], ("c".to_string(), vec![3, 4], Kind::Float));
    assert_eq!(record[3], ("k".to_string(), vec![], Kind::Double));
    // Rows that do not fit, and a condition left out, are errors.
    assert!(d.denoise(&x, &sigma, &labels(&[0, 1])).is_err());
    assert!(d.denoise(&x, &sigma, &Conditions::none(3)).unwrap_err().to_string().contains("`c` is not given"));
    assert!(d.denoise(&batch(2), &sigma, &labels(&[0, 1, 2])).is_err());
    assert!(d.denoise(&x, &[0.3, 1.0, f64::INFINITY], &labels(&[0, 1, 2])).is_err());
}

#[test]
fn guidance_keeps_to_its_interval_of_noise_levels() {
    let (card, specs) = with_classes(Some(4));
    let (d, seen) = denoiser(card, &specs);
    let (x, sigma) = (batch(2), [0.4, 2.0]);
    let guidance = Guidance::new(2.5, [0.4, 2.0]).unwrap();
    assert_eq!((guidance.at(0.4), guidance.at(2.0), guidance.at(2.1)), (1.0, 2.5, 1.0));
    let found = d.guided(&x, &sigma, &labels(&[1, 3]), guidance).unwrap();
    let (plain, full) =
        (d.denoise(&x, &sigma, &labels(&[1, 3])).unwrap(), d.guided(&x, &sigma, &labels(&[1, 3]), 2.5).unwrap());
    assert_eq!(found.get(0), plain.get(0), "outside: the plain denoiser, bit for bit");
    assert_close(&found.get(1), &values(&full.get(1)));
    assert!((found.get(1) - plain.get(1)).abs().max().double_value(&[]) > 1e-3);
    // Nothing to guide: one call of the single size.
    seen.borrow_mut().clear();
    let above = Guidance::new(2.5, [3.0, 9.0]).unwrap();
    assert_eq!(d.guided(&x, &sigma, &labels(&[1, 3]), above).unwrap(), plain);
    assert_eq!(seen.borrow()[0][2].1, [2]);
}

#[test]
fn guidance_extrapolates_from_the_null_condition_in_one_call() {
    let (card, specs) = with_classes(Some(4));
    let (d, seen) = denoiser(card.clone(), &specs);
    let x = batch(2).set_requires_grad(true);
    let (sigma, scale) = ([0.4, 2.0], 2.5);
    let found = d.guided(&x, &sigma, &labels(&[1, 3]), scale).unwrap();
    assert_eq!(seen.borrow().len(), 1);
    assert_eq!(seen.borrow()[0][2].1, [4]);
    let with = expected(&card, &x, &sigma, &[0.1, 0.3]);
    let without = expected(&card, &x, &sigma, &[0.4, 0.4]);
    let want: Vec<f64> = with.iter().zip(&without).map(|(c, u)| u + scale * (c - u)).collect();
    assert_close(&found, &want);
    // The gradient flows to the sample and to the parameters: dD/dx = c_in (skip + out w), the guidance's weights sum to 1.
    let grads = Tensor::run_backward(&[found.sum(Kind::Float)], &[&x, &d.params().tensors()[0]], false, false);
    let conversion = Conversion::new(&card).unwrap();
    let c = sigma.map(|s| conversion.at(s).unwrap());
    let want: Vec<f64> = (0..12).map(|i| c[i / 6].c_in * (c[i / 6].skip + c[i / 6].out * W)).collect();
    assert_close(&grads[0], &want);
    let want: f64 = values(&x).iter().enumerate().map(|(i, x)| c[i / 6].out * c[i / 6].c_in * x).sum();
    assert!((values(&grads[1])[0] - want).abs() < 1e-5 * want.abs());
    // Scale 1 is the plain denoiser; without a null value guidance is refused.
    assert_eq!(d.guided(&x, &sigma, &labels(&[1, 3]), 1.0).unwrap(), d.denoise(&x, &sigma, &labels(&[1, 3])).unwrap());
    let (card, specs) = with_classes(None);
    let error = denoiser(card, &specs).0.guided(&x, &sigma, &labels(&[1, 3]), 2.0).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("null"), "{error}");
}

/// A weaker network in other terms than [`card`]'s: without classes, a flow, channels last, another weight.
fn weaker(rows: Option<usize>) -> Denoiser {
    let flow = TeacherCard {
        prediction: Prediction::Flow,
        time_unit: TimeUnit::Unit,
        layout: Layout::Nhwc,
        schedule: ScheduleSpec::Flow { shift: 1.0, direction: Default::default() },
        ..card()
    };
    let mut specs = inputs(DType::F32, &[None], Layout::Nhwc);
    specs[0].shape[0] = rows;
    let (weaker, _) = denoiser(flow, &specs);
    let _ = tch::no_grad(|| weaker.params().tensors()[0].shallow_clone().fill_(-0.4));
    weaker
}

#[test]
fn a_weaker_network_guides_in_its_own_terms() {
    let (card, specs) = with_classes(None);
    let (d, seen) = denoiser(card.clone(), &specs);
    let d = d.guided_by(weaker(None)).unwrap();
    let x = batch(2).set_requires_grad(true);
    let (sigma, scale, labels) = ([0.4, 2.0], 2.5, labels(&[1, 3]));
    let found = d.guided(&x, &sigma, &labels, scale).unwrap();
    assert_eq!((seen.borrow().len(), &seen.borrow()[0][2].1), (1, &vec![2]), "one call of the single size");
    // D_weak = x_t - t F, F = w x_t + t, with x_t = x / (1 + sigma), t = sigma / (1 + sigma).
    let with = expected(&card, &x, &sigma, &[0.1, 0.3]);
    let weak = |(i, x): (usize, &f64)| {
        let (x_t, t) = (x / (1.0 + sigma[i / 6]), sigma[i / 6] / (1.0 + sigma[i / 6]));
        x_t - t * (-0.4 * x_t + t)
    };
    let weak: Vec<f64> = values(&x).iter().enumerate().map(weak).collect();
    let want: Vec<f64> = with.iter().zip(&weak).map(|(d, w)| w + scale * (d - w)).collect();
    assert_close(&found, &want);
    // dD_g/dx = s dD/dx + (1 - s) dD_weak/dx.
    let slope = Tensor::run_backward(&[found.sum(Kind::Float)], &[&x], false, false).remove(0);
    let conversion = Conversion::new(&card).unwrap();
    let of = |i: usize| {
        let (c, s) = (conversion.at(sigma[i / 6]).unwrap(), sigma[i / 6]);
        let weak = (1.0 + 0.4 * s / (1.0 + s)) / (1.0 + s);
        scale * c.c_in * (c.skip + c.out * W) + (1.0 - scale) * weak
    };
    assert_close(&slope, &(0..12).map(of).collect::<Vec<_>>());
    // Its copies are guided too, by a network that takes four rows at a time as well, and outside of the interval nothing is.
    let (other, _) = denoiser(card.clone(), &specs);
    let other = other.guided_by(weaker(Some(4))).unwrap().copy().unwrap();
    assert_close(&other.guided(&x, &sigma, &labels, scale).unwrap(), &want);
    let some = d.guided(&x, &sigma, &labels, Guidance::new(scale, [0.4, 3.0]).unwrap()).unwrap();
    assert_eq!(some.get(0), d.denoise(&x, &sigma, &labels).unwrap().get(0), "bit for bit");
    assert_close(&some.get(1), &want[6..]);
    // It sees the same samples, and knows no more than the network that it guides.
    let refused = |teacher: &TeacherCard, weak: &TeacherCard| {
        let e = crate::diffusion::guidance::check_weaker(teacher, weak).unwrap_err();
        assert_eq!(e.exit_code(), 2);
        e.to_string()
    };
    let one = TeacherCard { shape: vec![1, 1, 3], ..card.clone() };
    assert!(refused(&card, &one).contains("shape [1, 1, 3], the teacher's [2, 1, 3]"));
    let plain = TeacherCard { conditions: Default::default(), ..card.clone() };
    assert!(refused(&plain, &card).contains("condition `c` of 4 classes, the teacher's none of that name"));
}

#[test]
fn rescaled_guidance_has_the_deviation_of_the_networks_own_output() {
    let (card, specs) = with_classes(Some(4));
    let (x, sigma, labels) = (batch(2), [0.4, 2.0], labels(&[1, 3]));
    let deviation = |row: &[f64]| {
        let mean = row.iter().sum::<f64>() / 6.0;
        (row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 5.0).sqrt()
    };
    let conversion = Conversion::new(&card).unwrap();
    for weak in [false, true] {
        let (d, _) = denoiser(card.clone(), &specs);
        let d = if weak { d.guided_by(weaker(None)).unwrap() } else { d };
        let full = values(&d.guided(&x, &sigma, &labels, 3.0).unwrap());
        let plain = values(&d.denoise(&x, &sigma, &labels).unwrap());
        for share in [0.7, 1.0] {
            let guidance = Guidance::everywhere(3.0).rescaled(share).unwrap();
            let mut want = Vec::new();
            for (row, s) in sigma.iter().enumerate() {
                // Lin et al. 2023, equations 15 and 16, on F = (D - skip c_in x) / out.
                let k = conversion.at(*s).unwrap();
                let x = values(&x.get(row as i64));
                let f = |d: &[f64]| -> Vec<f64> {
                    d[6 * row..][..6].iter().zip(&x).map(|(d, x)| (d - k.skip * k.c_in * x) / k.out).collect()
                };
                let (with, made) = (f(&plain), f(&full));
                let factor = share * deviation(&with) / deviation(&made) + 1.0 - share;
                want.extend(made.iter().zip(&x).map(|(f, x)| k.skip * k.c_in * x + k.out * factor * f));
            }
            let found = d.guided(&x, &sigma, &labels, guidance).unwrap();
            // (Expected from F in f64, of which the denoised values in f32 say five digits.)
            assert_within(&found, &want, 2e-5);
            // (Conditions of this network move all values of a sample alike: the deviation is what it was.)
            let moved = values(&found).iter().zip(&full).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert_eq!(moved > 1e-2, weak, "{moved}");
            // Steps whose numbers are one a row compute the same, and rows outside of the interval keep their bytes.
            let fixed = d.prepare_guided(&sigma, guidance, Form::Fixed, Device::Cpu).unwrap();
            assert_within(&d.denoise_prepared(&x, &fixed, &labels, &[]).unwrap().0, &want, 2e-5);
            let some = Guidance { low: 0.4, ..guidance };
            let some = d.guided(&x, &sigma, &labels, some).unwrap();
            assert_eq!(some.get(0), d.denoise(&x, &sigma, &labels).unwrap().get(0));
            assert_within(&some.get(1), &want[6..], 2e-5);
        }
    }
    assert!(Guidance::everywhere(2.0).rescaled(1.5).unwrap_err().to_string().contains("0 to 1"));
    let one = TeacherCard { shape: vec![1, 1, 1], ..card };
    let share = Guidance::everywhere(2.0).rescaled(0.5).unwrap();
    assert!(share.check_rescale(&one).unwrap_err().to_string().contains("one value"));
}

#[test]
fn a_file_of_a_fixed_batch_is_called_with_it_whatever_is_evaluated() {
    let (card, specs) = with_classes(Some(4));
    let fixed = |time: &[Option<usize>]| {
        let mut specs = specs.clone();
        (specs[0].shape[0], specs[1].shape, specs[2].shape) = (Some(2), time.to_vec(), vec![Some(2)]);
        specs
    };
    let (free, _) = denoiser(card.clone(), &specs);
    for (time, calls) in [(Some(2), [1, 2, 2, 3]), (Some(1), [2, 3, 2, 3])] {
        let (d, seen) = denoiser(card.clone(), &fixed(&[time]));
        let count = || {
            assert!(seen.borrow().iter().all(|call| call[0].1[0] == 2 && call[2].1 == [2]), "{:?}", seen.borrow());
            seen.borrow_mut().drain(..).count()
        };
        for (rows, plain, guided) in [(2, calls[0], calls[2]), (3, calls[1], calls[3])] {
            let (x, sigma) = (batch(rows as i64).set_requires_grad(true), &[0.4, 2.0, 7.0][..rows]);
            let labels = labels(&[1, 3, 0][..rows]);
            let made = d.denoise(&x, sigma, &labels).unwrap();
            assert_close(&made, &values(&free.denoise(&x, sigma, &labels).unwrap()));
            assert_eq!(count(), plain, "{rows} rows, time {time:?}");
            let (made, want) =
                (d.guided(&x, sigma, &labels, 2.5).unwrap(), free.guided(&x, sigma, &labels, 2.5).unwrap());
            assert_close(&made, &values(&want));
            let slopes =
                [made, want].map(|t| Tensor::run_backward(&[t.sum(Kind::Float)], &[&x], false, false).remove(0));
            assert_close(&slopes[0], &values(&slopes[1]));
            assert_eq!(count(), guided, "{rows} rows guided, time {time:?}");
        }
    }
}

#[test]
fn the_student_is_the_denoiser_at_its_start() {
    let (d, _) = denoiser(card(), &inputs(DType::F32, &[None], Layout::ChannelsFirst));
    let start = d.conversion().at_start(Some(2.5)).unwrap();
    let z = batch(2);
    let student = d.generate(&z, &Conditions::none(2), &start).unwrap();
    let same = d.denoise(&(&z * 2.5), &[2.5, 2.5], &Conditions::none(2)).unwrap();
    assert!((student - same).abs().max().double_value(&[]) < 1e-6);
    // Flow at t = 1, where sigma is infinite: x0 = z - F(z, 1).
    let flow = TeacherCard {
        prediction: Prediction::Flow,
        time_unit: TimeUnit::Unit,
        schedule: ScheduleSpec::Flow { shift: 1.0, direction: Default::default() },
        ..card()
    };
    let (d, _) = denoiser(flow, &inputs(DType::F32, &[None], Layout::ChannelsFirst));
    let start = d.conversion().at_start(None).unwrap();
    let found = d.generate(&z, &Conditions::none(2), &start).unwrap();
    let want: Vec<f64> = values(&z).iter().map(|z| z - (W * z + 1.0)).collect();
    assert_close(&found, &want);
}

#[test]
fn copies_have_their_own_parameters() {
    let (d, _) = denoiser(card(), &inputs(DType::F32, &[None], Layout::ChannelsFirst));
    let copy = d.copy().unwrap();
    assert_eq!(copy.params().hash().unwrap(), d.params().hash().unwrap());
    let _ = tch::no_grad(|| copy.params().tensors()[0].shallow_clone().fill_(3.0));
    assert_ne!(copy.params().hash().unwrap(), d.params().hash().unwrap());
}

#[test]
fn drawn_conditions_are_classes_of_the_card_and_depend_on_the_generator_alone() {
    use rand_chacha::rand_core::SeedableRng;
    let (card, specs) = with_classes(Some(4));
    let (d, _) = denoiser(card, &specs);
    let draw = |seed| {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let drawn = d.sample_conditions(&mut rng, 4000).unwrap();
        Vec::<i64>::try_from(drawn.get("c").unwrap()).unwrap()
    };
    let first = draw(1);
    assert_eq!(first, draw(1));
    assert_ne!(first, draw(2));
    for class in 0..4 {
        let count = first.iter().filter(|l| **l == class).count();
        assert!((900..1100).contains(&count), "class {class}: {count} of 4000");
    }
    let images = HostConditions::of_images(d.card(), 7, 3, 5).unwrap();
    let want: Vec<i64> = (3..8).map(|k| crate::noise::image_class(7, k, 4) as i64).collect();
    assert_eq!(images.get("c").unwrap().to_i64(), want);
    let both = Conditions::cat(&[&labels(&[0, 1]), &labels(&[2])]).unwrap();
    assert_eq!(both.len(), 3);
    assert_eq!(Vec::<i64>::try_from(both.rows(1, 2).unwrap().get("c").unwrap()).unwrap(), [1, 2]);
    let picked = both.select(&Tensor::from_slice(&[2i64, 0])).unwrap();
    assert_eq!(Vec::<i64>::try_from(picked.get("c").unwrap()).unwrap(), [2, 0]);
}

#[test]
fn sampling_with_a_linear_network_runs_the_ode() {
    // Prediction `denoised` with w = 0 and time 0 would be D = 0; here D = w x + sigma is not physical, but NFE and shape are.
    let card = TeacherCard { prediction: Prediction::Denoised, time_unit: TimeUnit::Sigma, ..card() };
    let (d, seen) = denoiser(card, &inputs(DType::F32, &[None], Layout::ChannelsFirst));
    let found = d.sample(&batch(2), &Conditions::none(2), crate::diffusion::Sampler::Heun, 5, 1.0).unwrap();
    assert_eq!((found.nfe, seen.borrow().len()), (9, 9));
    assert_eq!(found.value.size(), [2, 2, 1, 3]);
    assert!(!found.value.requires_grad());
}
