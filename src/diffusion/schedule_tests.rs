//! Schedules against closed forms and the tables of others.

use super::*;

fn close(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance * expected.abs(), "{found} is not {expected}");
}

fn vp(betas: Betas) -> Schedule {
    let spec = ScheduleSpec::Vp { betas, beta_start: None, beta_end: None, steps: None, table: vec![] };
    Schedule::new(&spec).unwrap()
}

#[test]
fn named_beta_schedules_equal_numpy() {
    // numpy: np.cumprod(1 - betas) for the betas of diffusers' DDPMScheduler, sigma = sqrt((1 - abar) / abar).
    for (betas, at, expected) in NUMPY_SIGMAS {
        close(vp(betas).sigma(at), expected, 1e-9);
    }
}

const NUMPY_SIGMAS: [(Betas, f64, f64); 15] = [
    (Betas::Linear, 0.0, 1.000050003750e-02),
    (Betas::Linear, 1.0, 1.483092370898e-02),
    (Betas::Linear, 500.0, 3.442967112526e+00),
    (Betas::Linear, 980.0, 1.301437001379e+02),
    (Betas::Linear, 999.0, 1.574072808104e+02),
    (Betas::ScaledLinear, 0.0, 2.916715815172e-02),
    (Betas::ScaledLinear, 1.0, 4.131441199678e-02),
    (Betas::ScaledLinear, 500.0, 1.618278826019e+00),
    (Betas::ScaledLinear, 980.0, 1.304308318552e+01),
    (Betas::ScaledLinear, 999.0, 1.461464122933e+01),
    (Betas::Cosine, 0.0, 6.425412771142e-03),
    (Betas::Cosine, 1.0, 9.350492835615e-03),
    (Betas::Cosine, 500.0, 1.015550550520e+00),
    (Betas::Cosine, 980.0, 3.376185818523e+01),
    (Betas::Cosine, 999.0, 2.029116961002e+04),
];
const NUMPY_KARRAS: [(usize, f64); 4] =
    [(1, 0.002050197199044034), (20, 0.003231590769819518), (500, 2.5265068484381206), (980, 72.05389868632781)];

#[test]
fn linear_betas_follow_the_continuous_vp_formula() {
    // t(s) = (sqrt(bmin^2 + 2 bd ln(1 + s^2)) - bmin) / bd with bmin 0.1, bd 19.9, in units of 1/N.
    let schedule = vp(Betas::Linear);
    for sigma in [0.1, 1.0, 10.0, 50.0] {
        let t = ((0.01 + 2.0 * 19.9 * f64::ln_1p(sigma * sigma)).sqrt() - 0.1) / 19.9;
        // The table has ln(1 - beta) where the integral has -beta: 0.3 % late in the schedule.
        assert!((schedule.t(sigma) - 999.0 * t).abs() < 4.0, "{} {}", schedule.t(sigma), 999.0 * t);
    }
}

#[test]
fn t_inverts_sigma_between_and_at_the_entries() {
    for schedule in [vp(Betas::Linear), vp(Betas::ScaledLinear), vp(Betas::Cosine)] {
        for t in [0.0, 0.25, 1.0, 17.5, 400.0, 998.0, 998.75, 999.0] {
            assert!((schedule.t(schedule.sigma(t)) - t).abs() < 1e-9, "{t}");
        }
        for sigma in [0.5, 1.0, 7.3] {
            close(schedule.a(sigma).powi(2) + schedule.b(sigma).powi(2), 1.0, 1e-14);
            close(schedule.b(sigma) / schedule.a(sigma), sigma, 1e-14);
            let snapped = schedule.t(schedule.snap(sigma));
            assert!((snapped - snapped.round()).abs() < 1e-9);
            assert!((snapped - schedule.t(sigma)).abs() <= 0.5 + 1e-9);
        }
    }
    let flow = Schedule::new(&ScheduleSpec::Flow { shift: 3.0, direction: Direction::DataToNoise }).unwrap();
    close(flow.sigma(0.75), 3.0, 1e-15);
    close(flow.t(3.0), 0.75, 1e-15);
    assert_eq!((flow.t(f64::INFINITY), flow.a(f64::INFINITY), flow.b(f64::INFINITY)), (1.0, 0.0, 1.0));
}

#[test]
fn karras_table_has_1000_entries_between_the_ends() {
    let edm = Schedule::new(&ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }).unwrap();
    let table = edm.training_sigmas(1000);
    assert_eq!((table.len(), table[0], table[999]), (1000, 0.002, 80.0));
    assert!(table.windows(2).all(|w| w[0] < w[1]));
    for (i, expected) in NUMPY_KARRAS {
        close(table[i], expected, 1e-9);
    }
    let sampling = edm.sampling_sigmas(18);
    assert_eq!((sampling.len(), sampling[0], sampling[17], sampling[18]), (19, 80.0, 0.002, 0.0));
    assert_eq!(edm.sampling_sigmas(1), [80.0, 0.0]);
}

#[test]
fn sampling_levels_of_vp_are_steps_and_of_flow_are_shifted() {
    let schedule = vp(Betas::ScaledLinear);
    // diffusers, timestep_spacing="trailing", 10 steps: 999, 899, ..., 99.
    let sigmas = schedule.sampling_sigmas(10);
    for (i, sigma) in sigmas[..10].iter().enumerate() {
        assert!((schedule.t(*sigma) - (999.0 - 100.0 * i as f64)).abs() < 1e-9);
    }
    assert_eq!(sigmas[10], 0.0);
    assert_eq!(schedule.training_sigmas(1000).len(), 1000);
    let flow = Schedule::new(&ScheduleSpec::Flow { shift: 3.0, direction: Direction::DataToNoise }).unwrap();
    let sigmas = flow.sampling_sigmas(4);
    // t' = 3 t / (1 + 2 t): 1, 0.9, 0.75, 0.5
    for (sigma, t) in sigmas.iter().zip([FLOW_T_MAX, 0.9, 0.75, 0.5, 0.0]) {
        assert!((flow.t(*sigma) - t).abs() < 1e-12);
    }
    assert!(flow.training_sigmas(1000).windows(2).all(|w| w[0] < w[1]));
}

#[test]
fn a_shift_in_the_other_direction_is_the_same() {
    // SiT's successors shift their own time s = 1 - t: s' = s / (s + shift - shift s).
    for (t, shift) in [(0.1f64, 3.0f64), (0.5, 6.0), (0.9, 0.5), (0.25, 1.0)] {
        let s = 1.0 - t;
        let theirs = s / (s + shift - shift * s);
        close(1.0 - theirs, shifted(t, shift), 1e-12);
    }
}

#[test]
fn impossible_schedules_are_refused() {
    let edm = |sigma_min, sigma_max| Schedule::new(&ScheduleSpec::Edm { sigma_min, sigma_max, rho: 7.0 });
    assert!(edm(1.0, 0.5).is_err() && edm(0.0, 1.0).is_err() && edm(f64::NAN, 1.0).is_err());
    assert!(Schedule::new(&ScheduleSpec::Flow { shift: -1.0, direction: Direction::DataToNoise }).is_err());
    assert!(Schedule::from_abar(&[0.9]).is_err());
    assert!(Schedule::from_abar(&[0.9, 0.95]).is_err());
    assert!(Schedule::from_abar(&[0.9, 0.0]).is_err());
    assert!(Schedule::from_abar(&[0.9, 0.5, 0.1]).is_ok());
}

/// What is accepted can be computed with at the ends of what is possible; beyond them the error says which key, what and what is possible.
#[test]
fn parameters_whose_noise_levels_are_no_numbers_are_refused() {
    let flow = |shift| ScheduleSpec::Flow { shift, direction: Direction::DataToNoise };
    let edm = |sigma_min, sigma_max, rho| ScheduleSpec::Edm { sigma_min, sigma_max, rho };
    let trig = |sigma_min, sigma_max, scale| ScheduleSpec::TrigFlow { sigma_min, sigma_max, scale };
    let betas = |kind, start, end, steps| ScheduleSpec::Vp {
        betas: kind,
        beta_start: Some(start),
        beta_end: Some(end),
        steps: Some(steps),
        table: Vec::new(),
    };
    let table = |table: &[f64]| ScheduleSpec::Vp {
        betas: Betas::Table,
        beta_start: None,
        beta_end: None,
        steps: None,
        table: table.to_vec(),
    };
    for spec in [
        flow(1e-2),
        flow(1e2),
        edm(1e-9, 1e9, 0.1),
        edm(1e-9, 1e9, 1e3),
        trig(1e-9, 1e9, 1e-6),
        trig(1e-9, 1e9, 1e6),
        betas(Betas::Linear, 1e-4, 0.02, 4000),
        betas(Betas::ScaledLinear, 1e-12, 0.5, 30),
        betas(Betas::Cosine, 0.1, 0.2, 1000),
        table(&[1.0 - 1e-15, 1e-30]),
    ] {
        let schedule = Schedule::new(&spec).unwrap_or_else(|e| panic!("{spec:?}: {e}"));
        for n in [2, 64, 1000] {
            let training = schedule.training_sigmas(n);
            assert!(training.iter().all(|s| s.is_finite() && *s > 0.0), "{spec:?}");
            assert!(training.windows(2).all(|w| w[0] < w[1]), "{spec:?}");
            let sampling = schedule.sampling_sigmas(n);
            assert!(sampling.iter().all(|s| s.is_finite()) && sampling.windows(2).all(|w| w[0] > w[1]), "{spec:?}");
            for s in &training {
                let numbers = [schedule.t(*s), schedule.a(*s), schedule.b(*s), schedule.sigma(schedule.t(*s))];
                assert!(numbers.iter().all(|v| v.is_finite()), "{spec:?} at {s}: {numbers:?}");
            }
        }
    }
    for (spec, says) in [
        // (What the fuzz target of cards found.)
        (flow(9223372036854775807.0), "`schedule.shift` is 9.223372036854776e18, expected a number from 0.01 to 100.0"),
        (flow(1e-3), "`schedule.shift` is 0.001"),
        (flow(f64::NAN), "`schedule.shift` is NaN"),
        (edm(1e-300, 1.0, 7.0), "`schedule.sigma_min` is 1e-300, expected a number from 1e-9 to 1000000000.0"),
        (edm(1.0, 1e300, 7.0), "`schedule.sigma_max` is 1e300"),
        (edm(0.1, 1.0, 1e-9), "`schedule.rho` is 1e-9, expected a number from 0.1 to 1000.0"),
        (edm(0.1, 1.0, 1e300), "`schedule.rho` is 1e300"),
        (trig(0.1, 1.0, 1e-300), "`schedule.scale` is 1e-300"),
        (trig(0.1, f64::INFINITY, 1.0), "`schedule.sigma_max` is inf"),
        (betas(Betas::Linear, 1e-300, 0.02, 1000), "`schedule.beta_start` is 1e-300"),
        (betas(Betas::Linear, 1e-4, 1.0, 1000), "`schedule.beta_end` is 1.0"),
        (betas(Betas::Linear, 0.5, 0.6, 1000), "expected a value from 1e-30 to below 1"),
        (table(&[0.5, 1e-320]), "abar of step 1 is 1e-320, expected a value from 1e-30"),
        (table(&[1e-20, 1e-20 * (1.0 - 1e-15)]), "too near to be two noise levels"),
    ] {
        let e = Schedule::new(&spec).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(says), "{spec:?}: {e}");
    }
}

#[test]
fn a_shifted_flow_has_the_grids_of_diffusers_and_fastgen() {
    let flow = || Schedule::new(&ScheduleSpec::Flow { shift: 1.0, direction: Default::default() }).unwrap();
    // FlowMatchEulerDiscreteScheduler(shift=s).set_timesteps(sigmas=np.linspace(1, 1/n, n)) of diffusers 0.36: its sigmas are our times.
    for (shift, times) in [
        (3.0, &[1.0, 0.9, 0.75, 0.5, 0.0][..]),
        (0.5, &[1.0, 0.6666666269302368, 0.4285714626312256, 0.25, 0.111111119389534, 0.0]),
    ] {
        let n = times.len() - 1;
        let shifted = flow().with_shift(shift, "shift").unwrap();
        let steps = shifted.student_sigmas(n).unwrap();
        assert_eq!((steps.len(), steps[0]), (n, f64::INFINITY));
        let sampling = shifted.sampling_sigmas(n);
        for (k, t) in times.iter().enumerate().skip(1) {
            close(flow().t(sampling[k]), *t, 1e-7);
            steps.get(k).into_iter().for_each(|s| close(flow().t(*s), *t, 1e-7));
        }
        // sigma = t / (1 - t): shifted times are levels `shift` times as high.
        for (a, b) in shifted.training_sigmas(20).iter().zip(flow().training_sigmas(20)) {
            close(*a, shift * b, 1e-12);
        }
        // The network's own times are what they were.
        assert_eq!(shifted.t(2.0), flow().t(2.0));
    }
    assert_eq!(flow().with_shift(0.0, "shift").unwrap(), flow());
    let e = flow().with_shift(1e3, "noise.shift").unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("noise.shift is 1000.0"), "{e}");
    let e = vp(Betas::Linear).with_shift(3.0, "noise.shift").unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("schedule is no flow"), "{e}");
    // DMD2's steps of Stable Diffusion, and EDM's rho grid: the last level stands for the clean end.
    let steps = vp(Betas::ScaledLinear).student_sigmas(4).unwrap();
    let times: Vec<f64> = steps.iter().map(|s| vp(Betas::ScaledLinear).t(*s).round()).collect();
    assert_eq!(times, [999.0, 749.0, 499.0, 249.0]);
    assert!(vp(Betas::Linear).student_sigmas(1001).is_err());
    let edm = Schedule::new(&ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }).unwrap();
    let (high, low) = (80f64.powf(1.0 / 7.0), 0.002f64.powf(1.0 / 7.0));
    let steps = edm.student_sigmas(2).unwrap();
    assert_eq!(steps[0], 80.0);
    close(steps[1], ((high + low) / 2.0).powi(7), 1e-12);
    assert_eq!(edm.student_sigmas(1).unwrap(), [80.0]);
}
