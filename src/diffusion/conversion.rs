//! The one place where predictions are turned into `x0`. Every family is affine in the network's output:
//! `x_net = c_in x_edm`, `F = net(x_net, time)`, `x0 = skip x_net + out F`, with coefficients computed in f64 (1/a
//! reaches 157 at the end of DDPM's schedule) and applied in f32.

use crate::error::{Error, Result};

use super::card::{Prediction, TeacherCard, TimeUnit};
use super::schedule::{Direction, Schedule, ScheduleSpec};

/// The conversion at one noise level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Coefficients {
    /// Factor of the network's input: `x_net = c_in x_edm`.
    pub c_in: f64,
    /// The number for the network's time input.
    pub time: f64,
    /// Factor of `x_net` in `x0 = skip x_net + out F`.
    pub skip: f64,
    /// Factor of the network's output `F` in `x0 = skip x_net + out F`.
    pub out: f64,
}

/// Where a one-step student starts: `x_net = init_scale z`, `z ~ N(0, I)`, `x0 = skip x_net + out F`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StudentStart {
    /// Factor of the noise: `x_net = init_scale z`.
    pub init_scale: f64,
    /// The noise level that `x_net` stands for; infinite for flow at t = 1.
    pub sigma: f64,
    /// Coefficients at `sigma`, or their limit where it is infinite.
    pub coefficients: Coefficients,
}

/// A card's prediction, time unit and schedule, ready to compute with.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversion {
    prediction: Prediction,
    time_unit: TimeUnit,
    sigma_data: f64,
    schedule: Schedule,
    /// The network's time runs from noise to data, and its velocity with it.
    reversed: bool,
}

/// Largest term of `x0 = skip x + out F` at which a student starts by itself, and the noise level where it starts instead.
const MOST_TERM: f64 = 200.0;
const STEEP_START: f64 = 160.0;

impl Conversion {
    /// Refuses combinations that have no meaning, such as flow with a VP schedule.
    pub fn new(card: &TeacherCard) -> Result<Self> {
        let no = |what: &str, hint: &str| Err(Error::usage(format!("card: {what}")).hint(hint));
        match (card.prediction, &card.schedule) {
            (Prediction::TrigFlow, ScheduleSpec::TrigFlow { .. }) => {}
            (Prediction::TrigFlow, _) => {
                return no("prediction `trigflow` with another schedule", "set schedule.kind = \"trigflow\"");
            }
            (
                Prediction::V | Prediction::Flow | Prediction::EdmRaw | Prediction::Consistency,
                ScheduleSpec::TrigFlow { .. },
            ) => {
                return no(
                    "schedule `trigflow` with a prediction of another family",
                    "use prediction `trigflow` (also for its consistency models), `denoised` or `epsilon`",
                );
            }
            (Prediction::EdmRaw, ScheduleSpec::Vp { .. } | ScheduleSpec::Flow { .. }) => {
                return no(
                    "prediction `edm-raw` with a schedule that is not `edm`",
                    "EDM's VP networks are prediction `epsilon` with a `vp` schedule",
                );
            }
            (Prediction::Consistency, ScheduleSpec::Vp { .. } | ScheduleSpec::Flow { .. }) => {
                return no("prediction `consistency` with a schedule that is not `edm`", "set schedule.kind = \"edm\"");
            }
            (Prediction::Flow, ScheduleSpec::Edm { .. } | ScheduleSpec::Vp { .. }) => {
                return no("prediction `flow` with a schedule that is not `flow`", "set schedule.kind = \"flow\"");
            }
            (Prediction::V, ScheduleSpec::Flow { .. }) => {
                return no("prediction `v` with a `flow` schedule, where a^2 + b^2 is not 1", "use prediction `flow`");
            }
            _ => {}
        }
        match (card.time_unit, &card.schedule) {
            (TimeUnit::Radians, ScheduleSpec::TrigFlow { .. }) => {}
            (TimeUnit::Radians, _) => {
                return no("time_unit `radians` is TrigFlow's angle", "set schedule.kind = \"trigflow\"");
            }
            (TimeUnit::Step | TimeUnit::Unit | TimeUnit::Thousand, ScheduleSpec::TrigFlow { .. }) => {
                return no("a `trigflow` schedule has its time in `radians`", "or in `sigma` or its logarithm");
            }
            (TimeUnit::Step, ScheduleSpec::Edm { .. } | ScheduleSpec::Flow { .. }) => {
                return no(
                    "time_unit `step` without a table of steps (schedule `vp`)",
                    "flow times are `unit` or `thousand`",
                );
            }
            (TimeUnit::Unit | TimeUnit::Thousand, ScheduleSpec::Edm { .. }) => {
                return no("an `edm` schedule has no time within bounds", "use time_unit `sigma` or `ln-sigma-4`");
            }
            _ => {}
        }
        Ok(Self {
            prediction: card.prediction,
            time_unit: card.time_unit,
            sigma_data: card.sigma_data,
            schedule: card.schedule()?,
            reversed: matches!(card.schedule, ScheduleSpec::Flow { direction: Direction::NoiseToData, .. }),
        })
    }

    /// The noise schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The number that the network takes for a noise level.
    pub fn time(&self, sigma: f64) -> f64 {
        let unit = || match self.schedule.steps() {
            Some(n) => self.schedule.t(sigma) / (n - 1) as f64,
            // 1 - t of t = sigma / (1 + sigma), without the rounding of the difference.
            None if self.reversed => self.schedule.a(sigma),
            None => self.schedule.t(sigma),
        };
        match self.time_unit {
            TimeUnit::Sigma => sigma,
            TimeUnit::LnSigma4 => sigma.ln() / 4.0,
            TimeUnit::LnSigma250 => sigma.ln() * 250.0,
            TimeUnit::LnSigmaHalf => (sigma / 2.0).ln(),
            TimeUnit::Radians => self.schedule.t(sigma),
            // The table's entries are integers; what the logarithms leave of 1e-13 must not reach a truncating cast.
            TimeUnit::Step => {
                let t = self.schedule.t(sigma);
                if (t - t.round()).abs() < 1e-6 { t.round() } else { t }
            }
            TimeUnit::Unit => unit(),
            TimeUnit::Thousand => 1000.0 * unit(),
        }
    }

    /// Coefficients at a finite noise level above 0.
    pub fn at(&self, sigma: f64) -> Result<Coefficients> {
        if !(sigma.is_finite() && sigma > 0.0) {
            return Err(Error::usage(format!("noise level {sigma}, expected a finite number above 0")));
        }
        Ok(self.coefficients(sigma))
    }

    fn coefficients(&self, sigma: f64) -> Coefficients {
        let time = self.time(sigma);
        let (a, b) = (self.schedule.a(sigma), self.schedule.b(sigma));
        let edm = matches!(self.schedule, Schedule::Edm { .. });
        // The network sees x_t over this.
        let scale = match self.schedule {
            Schedule::TrigFlow { scale, .. } => scale,
            _ => 1.0,
        };
        let (c_in, skip, out) = match self.prediction {
            Prediction::Denoised => (a / scale, 0.0, 1.0),
            Prediction::EdmRaw => {
                // c_skip / c_in = sd^2 / root, because skip multiplies x_net = c_in x.
                let sd = self.sigma_data;
                let root = sigma.hypot(sd);
                (1.0 / root, sd * sd / root, sigma * sd / root)
            }
            Prediction::Consistency => {
                let sd = self.sigma_data;
                let (root, above) = (sigma.hypot(sd), sigma - self.schedule.sigma_min());
                // c_skip / c_in and c_out; at sigma_min they are root and 0: x itself.
                (1.0 / root, sd * sd / (above * above + sd * sd) * root, above * sd / root)
            }
            Prediction::Epsilon => (a / scale, scale / a, -b / a),
            Prediction::ScaledScore => (a / scale, scale / a, b / a),
            // x0 = cos t x_t - scale sin t F.
            Prediction::TrigFlow => (a / scale, a * scale, -b),
            Prediction::V if edm => {
                // v needs a^2 + b^2 = 1: the EDM schedule's sample scaled to unit variance, as Stable Video Diffusion does.
                let unit = 1.0 / sigma.hypot(1.0);
                (unit, unit, -sigma * unit)
            }
            Prediction::V => (a, a, -b),
            // x0 = x_t - t (e - x0).
            Prediction::Flow if self.reversed => (a, 1.0, b),
            Prediction::Flow => (a, 1.0, -b),
        };
        Coefficients { c_in, time, skip, out }
    }

    /// The start of a one-step student (method of DMD, SiD, Diff-Instruct): EDM `x0 = D(sigma_init z; sigma_init)`, by
    /// default sigma_max; VP `x_net = z` at the step next to sigma_init, by default the last, or that next to sigma 160 where the
    /// last has terms of more than 200 (epsilon on Nichol's cosine schedule, whose last step is at sigma 20,291: what two such numbers
    /// leave of each other in f32 is off by 1e-3); flow `x_net = z` at t = 1, or `x_net = t z` at a finite sigma_init.
    pub fn at_start(&self, sigma_init: Option<f64>) -> Result<StudentStart> {
        if let Some(sigma) = sigma_init
            && !(sigma > 0.0 && sigma.is_finite())
        {
            return Err(Error::usage(format!("sigma_init is {sigma}, expected a finite number above 0")));
        }
        let (sigma, init_scale) = match &self.schedule {
            Schedule::Edm { sigma_max, .. } | Schedule::TrigFlow { sigma_max, .. } => {
                let sigma = sigma_init.unwrap_or(*sigma_max);
                (sigma, self.coefficients(sigma).c_in * sigma)
            }
            Schedule::Vp { .. } => {
                let last = self.schedule.sigma_max();
                let Coefficients { skip, out, .. } = self.coefficients(last);
                let start = if skip.abs().max(out.abs()) > MOST_TERM { last.min(STEEP_START) } else { last };
                (self.schedule.snap(sigma_init.unwrap_or(start)), 1.0)
            }
            Schedule::Flow { .. } => {
                let sigma = sigma_init.unwrap_or(f64::INFINITY);
                (sigma, self.schedule.b(sigma))
            }
        };
        let coefficients = self.coefficients(sigma);
        let Coefficients { c_in, time, skip, out } = coefficients;
        if ![c_in, time, skip, out].iter().all(|c| c.is_finite()) {
            return Err(Error::usage(format!(
                "a student cannot start at sigma {sigma} with prediction {:?} and time unit {:?}: x0 is undefined there",
                self.prediction, self.time_unit
            ))
            .hint("give a finite sigma_init"));
        }
        Ok(StudentStart { init_scale, sigma, coefficients })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::schedule::{Betas, karras};

    fn card(prediction: Prediction, time_unit: TimeUnit, schedule: ScheduleSpec) -> TeacherCard {
        TeacherCard {
            sample: "x".into(),
            time: "t".into(),
            output: "y".into(),
            prediction,
            time_unit,
            shape: vec![1, 1, 1],
            layout: Default::default(),
            modality: None,
            sample_rate: None,
            range: None,
            sigma_data: 0.5,
            latent_scale: 1.0,
            dataset: None,
            schedule,
            conditions: Default::default(),
            constants: Default::default(),
            concat: Vec::new(),
            dims: Default::default(),
        }
    }
    fn edm() -> ScheduleSpec {
        ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }
    }
    fn vp(betas: Betas) -> ScheduleSpec {
        ScheduleSpec::Vp { betas, beta_start: None, beta_end: None, steps: None, table: vec![] }
    }
    fn flow() -> ScheduleSpec {
        ScheduleSpec::Flow { shift: 3.0, direction: Direction::DataToNoise }
    }
    fn reversed() -> ScheduleSpec {
        ScheduleSpec::Flow { shift: 3.0, direction: Direction::NoiseToData }
    }

    fn ve() -> ScheduleSpec {
        ScheduleSpec::Edm { sigma_min: 0.02, sigma_max: 100.0, rho: 7.0 }
    }
    fn trigflow(scale: f64) -> ScheduleSpec {
        ScheduleSpec::TrigFlow { sigma_min: 0.002, sigma_max: 80.0, scale }
    }

    /// Every family with the exact network output of method.md's table, as functions of (a, b, sigma, x0, e).
    #[test]
    fn exact_outputs_give_x0_back_over_the_whole_range_of_sigma() {
        type Exact = fn(f64, f64, f64, f64, f64) -> f64;
        let raw: Exact = |_, _, s, x0, e| {
            let (skip, out) = (0.25 / (s * s + 0.25), s * 0.5 / (s * s + 0.25).sqrt());
            (x0 - skip * (x0 + s * e)) / out
        };
        let cases: Vec<(Prediction, ScheduleSpec, Exact)> = vec![
            (Prediction::Denoised, edm(), |_, _, _, x0, _| x0),
            (Prediction::EdmRaw, edm(), raw),
            (Prediction::Epsilon, edm(), |_, _, _, _, e| e),
            (Prediction::V, edm(), |_, _, s, x0, e| (e - s * x0) / (1.0 + s * s).sqrt()),
            (Prediction::Denoised, vp(Betas::Linear), |_, _, _, x0, _| x0),
            (Prediction::Epsilon, vp(Betas::Linear), |_, _, _, _, e| e),
            (Prediction::Epsilon, vp(Betas::ScaledLinear), |_, _, _, _, e| e),
            (Prediction::V, vp(Betas::ScaledLinear), |a, b, _, x0, e| a * e - b * x0),
            (Prediction::V, vp(Betas::Cosine), |a, b, _, x0, e| a * e - b * x0),
            (Prediction::Flow, flow(), |_, _, _, x0, e| e - x0),
            (Prediction::Flow, reversed(), |_, _, _, x0, e| x0 - e),
            (Prediction::Denoised, reversed(), |_, _, _, x0, _| x0),
            (Prediction::Epsilon, reversed(), |_, _, _, _, e| e),
            (Prediction::Denoised, flow(), |_, _, _, x0, _| x0),
            (Prediction::Epsilon, flow(), |_, _, _, _, e| e),
            (Prediction::ScaledScore, ve(), |_, _, _, _, e| -e),
            (Prediction::ScaledScore, vp(Betas::Linear), |_, _, _, _, e| -e),
            (Prediction::TrigFlow, trigflow(1.0), |a, b, _, x0, e| a * e - b * x0),
            (Prediction::TrigFlow, trigflow(0.5), |a, b, _, x0, e| a * e - b / 0.5 * x0 / 0.5),
            (Prediction::Denoised, trigflow(0.5), |_, _, _, x0, _| x0),
            (Prediction::Epsilon, trigflow(0.5), |_, _, _, _, e| e),
        ];
        for (prediction, spec, exact) in cases {
            let unit = match spec {
                ScheduleSpec::Edm { .. } => TimeUnit::LnSigma4,
                ScheduleSpec::Vp { .. } => TimeUnit::Step,
                ScheduleSpec::Flow { .. } => TimeUnit::Unit,
                ScheduleSpec::TrigFlow { .. } => TimeUnit::Radians,
            };
            let conversion = Conversion::new(&card(prediction, unit, spec)).unwrap();
            let schedule = conversion.schedule().clone();
            let (lo, hi) = (schedule.sigma_min(), schedule.sigma_max().min(160.0));
            for sigma in karras(lo, hi, 7.0, 50) {
                for (x0, e) in [(0.8, -1.3), (-0.25, 0.4), (1.0, 2.0)] {
                    let c = conversion.at(sigma).unwrap();
                    let x_net = c.c_in * (x0 + sigma * e);
                    let (a, b) = (schedule.a(sigma), schedule.b(sigma));
                    let found = c.skip * x_net + c.out * exact(a, b, sigma, x0, e);
                    // The subtraction of terms of size sigma loses log10(sigma) of f64's digits.
                    let tolerance = 1e-12 * f64::max(1.0, sigma / 10.0);
                    assert!((found - x0).abs() <= tolerance, "{prediction:?} at {sigma}: {found} is not {x0}");
                }
            }
        }
    }

    #[test]
    fn edm_coefficients_are_the_papers() {
        let conversion = Conversion::new(&card(Prediction::EdmRaw, TimeUnit::LnSigma4, edm())).unwrap();
        for s in [0.002f64, 0.1, 0.5, 1.0, 13.0, 80.0] {
            let c = conversion.at(s).unwrap();
            let sum = s * s + 0.25;
            let close = |x: f64, y: f64| assert!((x - y).abs() <= 1e-14 * y.abs(), "{x} {y}");
            close(c.c_in, 1.0 / sum.sqrt());
            close(c.skip * c.c_in, 0.25 / sum);
            close(c.out, s * 0.5 / sum.sqrt());
            assert_eq!(c.time, s.ln() / 4.0);
        }
    }

    #[test]
    fn scaled_score_is_edms_ve_preconditioning() {
        // c_skip = 1, c_out = s, c_in = 1, c_noise = ln(s / 2).
        let conversion = Conversion::new(&card(Prediction::ScaledScore, TimeUnit::LnSigmaHalf, ve())).unwrap();
        for s in [0.02, 1.0, 3.0, 100.0] {
            let c = conversion.at(s).unwrap();
            assert_eq!(c, Coefficients { c_in: 1.0, time: (0.5 * s).ln(), skip: 1.0, out: s });
        }
        let start = conversion.at_start(None).unwrap();
        assert_eq!((start.init_scale, start.sigma), (100.0, 100.0));
    }

    #[test]
    fn trigflow_is_a_rotation_of_sample_and_noise() {
        // f(x_t, t) = cos(t) x_t - sin(t) sd F(x_t / sd, t), x_t = cos(t) x0 + sin(t) z, z ~ N(0, sd^2).
        let sd = 0.5;
        let conversion = Conversion::new(&card(Prediction::TrigFlow, TimeUnit::Radians, trigflow(sd))).unwrap();
        for t in [0.01f64, 0.4, 0.785, 1.2, 1.56] {
            let sigma = sd * t.tan();
            let c = conversion.at(sigma).unwrap();
            let close = |x: f64, y: f64| assert!((x - y).abs() <= 1e-12 * y.abs().max(1.0), "{x} {y} at {t}");
            close(c.time, t);
            close(c.out, -sd * t.sin());
            // In x_t = cos(t) x_edm: x_net = x_t / sd, and skip multiplies x_net.
            close(c.c_in / t.cos(), 1.0 / sd);
            close(c.skip / sd, t.cos());
            close(conversion.schedule().sigma(t), sigma);
        }
        // At scale 1 it is the v-prediction of the table (a^2 + b^2 = 1).
        let unit = Conversion::new(&card(Prediction::TrigFlow, TimeUnit::Radians, trigflow(1.0))).unwrap();
        let c = unit.at(3.0).unwrap();
        let (a, b) = (unit.schedule().a(3.0), unit.schedule().b(3.0));
        assert!((a * a + b * b - 1.0).abs() < 1e-15 && c.skip == a && c.out == -b && c.c_in == a);
        // A student starts from noise of the network's own size.
        let start = conversion.at_start(None).unwrap();
        assert!((start.init_scale - (80.0f64 / sd).atan().sin()).abs() < 1e-12, "{start:?}");
        assert!((start.coefficients.time - (80.0f64 / sd).atan()).abs() < 1e-15);
        for (prediction, unit, schedule) in [
            (Prediction::TrigFlow, TimeUnit::Sigma, edm()),
            (Prediction::TrigFlow, TimeUnit::Unit, trigflow(1.0)),
            (Prediction::V, TimeUnit::Radians, trigflow(1.0)),
            (Prediction::Epsilon, TimeUnit::Radians, flow()),
        ] {
            let e = Conversion::new(&card(prediction, unit, schedule)).unwrap_err();
            assert!(e.exit_code() == 2 && e.hint_text().is_some(), "{e}");
        }
    }

    #[test]
    fn vp_epsilon_is_edms_vp_preconditioning() {
        // c_skip = 1, c_out = -s, c_in = 1/sqrt(s^2 + 1) in x_edm coordinates.
        let conversion = Conversion::new(&card(Prediction::Epsilon, TimeUnit::Step, vp(Betas::Linear))).unwrap();
        for s in [0.02, 1.0, 50.0] {
            let c = conversion.at(s).unwrap();
            assert!((c.c_in * (s * s + 1.0f64).sqrt() - 1.0).abs() < 1e-14);
            assert!((c.skip * c.c_in - 1.0).abs() < 1e-14 && (c.out + s).abs() < 1e-13 * s);
        }
    }

    #[test]
    fn time_numbers_of_every_unit() {
        let time = |unit, spec, sigma| Conversion::new(&card(Prediction::Denoised, unit, spec)).unwrap().time(sigma);
        assert_eq!(time(TimeUnit::Sigma, edm(), 3.0), 3.0);
        assert_eq!(time(TimeUnit::LnSigma4, edm(), 1.0), 0.0);
        let table = Schedule::new(&vp(Betas::Linear)).unwrap();
        for step in 0..1000 {
            let sigma = table.sigma(f64::from(step));
            assert_eq!(time(TimeUnit::Step, vp(Betas::Linear), sigma), f64::from(step));
        }
        assert!((time(TimeUnit::Unit, vp(Betas::Linear), table.sigma(999.0)) - 1.0).abs() < 1e-12);
        assert_eq!(time(TimeUnit::Unit, flow(), 3.0), 0.75);
        assert_eq!(time(TimeUnit::Thousand, flow(), 1.0), 500.0);
        // With noise at time 0: the shares of data.
        assert_eq!(time(TimeUnit::Unit, reversed(), 3.0), 0.25);
        assert_eq!(time(TimeUnit::Thousand, reversed(), 0.25), 800.0);
        assert_eq!(time(TimeUnit::Unit, reversed(), f64::INFINITY), 0.0);
    }

    #[test]
    fn a_consistency_model_is_the_identity_at_the_lowest_level() {
        let c = Conversion::new(&card(Prediction::Consistency, TimeUnit::LnSigma250, edm())).unwrap();
        let at = c.at(0.002).unwrap();
        assert!(at.out.abs() < 1e-12 && (at.skip * at.c_in - 1.0).abs() < 1e-12, "{at:?}");
        assert!((at.time - 1000.0 * 0.25 * 0.002f64.ln()).abs() < 1e-9);
        // Song et al., appendix C: c_skip = sd^2 / ((s - eps)^2 + sd^2), c_out = sd (s - eps) / sqrt(sd^2 + s^2).
        let at = c.at(1.5).unwrap();
        assert!((at.skip * at.c_in - 0.25 / (1.498f64.powi(2) + 0.25)).abs() < 1e-12);
        assert!((at.out - 0.5 * 1.498 / 2.5f64.sqrt()).abs() < 1e-12);
        let e = Conversion::new(&card(Prediction::Consistency, TimeUnit::Unit, flow())).unwrap_err();
        assert!(e.to_string().contains("consistency"), "{e}");
    }

    #[test]
    fn students_start_as_in_the_method() {
        let start =
            |prediction, unit, spec, sigma| Conversion::new(&card(prediction, unit, spec)).unwrap().at_start(sigma);
        // EDM: x0 = D(80 z; 80).
        let s = start(Prediction::Denoised, TimeUnit::Sigma, edm(), None).unwrap();
        assert_eq!((s.init_scale, s.sigma), (80.0, 80.0));
        assert_eq!(s.coefficients, Coefficients { c_in: 1.0, time: 80.0, skip: 0.0, out: 1.0 });
        let s = start(Prediction::EdmRaw, TimeUnit::LnSigma4, edm(), Some(2.5)).unwrap();
        assert!((s.init_scale - 2.5 / (6.25f64 + 0.25).sqrt()).abs() < 1e-15);
        // VP: x_net = z at T*, x0 = (z - b eps) / a.
        let table = Schedule::new(&vp(Betas::ScaledLinear)).unwrap();
        for (sigma_init, step) in [(None, 999.0), (Some(table.sigma(399.2)), 399.0)] {
            let s = start(Prediction::Epsilon, TimeUnit::Step, vp(Betas::ScaledLinear), sigma_init).unwrap();
            let (a, b) = (table.a(s.sigma), table.b(s.sigma));
            assert_eq!((s.init_scale, s.coefficients.time), (1.0, step));
            let (z, eps) = (0.7, -0.2);
            assert!((s.coefficients.skip * z + s.coefficients.out * eps - (z - b * eps) / a).abs() < 1e-12);
        }
        // Nichol's cosine schedule ends where epsilon's terms are 20,000 times the sample; v's stay at 1.
        let cosine = || vp(Betas::Cosine);
        let last = Schedule::new(&cosine()).unwrap().sigma_max();
        let s = start(Prediction::Epsilon, TimeUnit::Step, cosine(), None).unwrap();
        assert!(last > 2e4 && (100.0..200.0).contains(&s.sigma) && s.coefficients.out.abs() <= MOST_TERM, "{s:?}");
        assert_eq!(start(Prediction::V, TimeUnit::Step, cosine(), None).unwrap().sigma, last);
        assert_eq!(start(Prediction::Epsilon, TimeUnit::Step, cosine(), Some(last)).unwrap().sigma, last);
        // Flow: x0 = z - u at t = 1.
        let s = start(Prediction::Flow, TimeUnit::Thousand, flow(), None).unwrap();
        assert_eq!(s.init_scale, 1.0);
        assert_eq!(s.coefficients, Coefficients { c_in: 0.0, time: 1000.0, skip: 1.0, out: -1.0 });
        // The other way round: x0 = z + u at time 0.
        let s = start(Prediction::Flow, TimeUnit::Unit, reversed(), None).unwrap();
        assert_eq!(s.coefficients, Coefficients { c_in: 0.0, time: 0.0, skip: 1.0, out: 1.0 });
        // x0 cannot be had from noise alone when the network predicts the noise.
        assert!(start(Prediction::Epsilon, TimeUnit::Unit, flow(), None).is_err());
        assert!(start(Prediction::Epsilon, TimeUnit::Unit, flow(), Some(9.0)).is_ok());
        assert!(start(Prediction::Denoised, TimeUnit::Sigma, edm(), Some(-1.0)).is_err());
    }
}
