use super::*;
use crate::diffusion::schedule::Betas;

fn steps(levels: &[f64], stochastic: bool) -> Steps {
    Steps { levels: levels.to_vec(), stochastic }
}

fn card(prediction: Prediction, time_unit: TimeUnit, schedule: ScheduleSpec) -> TeacherCard {
    TeacherCard { prediction, time_unit, schedule, ..TeacherCard::plain(&[1, 8, 8]) }
}

fn vp_card(betas: Betas, table: Vec<f64>) -> TeacherCard {
    let schedule = ScheduleSpec::Vp { betas, beta_start: None, beta_end: None, steps: None, table };
    card(Prediction::V, TimeUnit::Step, schedule)
}

fn text_of(result: Result<Scheduling>) -> String {
    result.unwrap_err().to_string()
}

/// The table that diffusers will have, at the places where the network is called, beside the schedule's.
#[test]
fn betas_in_f32_give_the_noise_levels_back() {
    // Zero terminal SNR: the last step's beta next to 1 has no digits left.
    let plain = vp_card(Betas::ScaledLinear, Vec::new()).schedule().unwrap();
    let mut snr: Vec<f64> = (0..1000).map(|i| plain.a(plain.sigma(f64::from(i))).powi(2)).collect();
    let (first, last) = (snr[0].sqrt(), snr[999].sqrt());
    snr.iter_mut().for_each(|v| *v = ((v.sqrt() - last) * first / (first - last)).powi(2));
    snr[999] = 2f64.powi(-24);
    for card in [
        vp_card(Betas::Linear, Vec::new()),
        vp_card(Betas::ScaledLinear, Vec::new()),
        vp_card(Betas::Cosine, Vec::new()),
        vp_card(Betas::Table, snr),
    ] {
        let schedule = card.schedule().unwrap();
        for entries in [vec![999], vec![998], vec![400], vec![999, 499], vec![999, 749, 499, 249]] {
            let levels: Vec<f64> = entries.iter().map(|&k| schedule.sigma(k as f64)).collect();
            let made = of(&card, Some(levels[0]), &steps(&levels[1..], true)).unwrap();
            assert_eq!(made.class, if entries.len() == 1 { "DDIMScheduler" } else { "LCMScheduler" });
            assert_eq!(made.config["num_train_timesteps"], entries[0] + 1);
            let betas: Vec<f32> =
                made.config["trained_betas"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
            let kept = products(&betas);
            for (k, sigma) in entries.into_iter().zip(levels) {
                let abar = schedule.a(sigma).powi(2);
                assert!((kept[k] / abar - 1.0).abs() < 1e-6, "{:?} {k}: {} for {abar}", card.schedule, kept[k]);
            }
        }
    }
}

#[test]
fn what_no_scheduler_makes_is_refused_with_the_way_out() {
    let vp = vp_card(Betas::Linear, Vec::new());
    let schedule = vp.schedule().unwrap();
    let level = |k: f64| schedule.sigma(k);
    let uneven = text_of(of(&vp, None, &steps(&[level(600.0)], false)));
    assert!(uneven.contains("[999, 600]") && uneven.contains("[999, 499]"), "{uneven}");
    assert!(uneven.contains(&format!("student.sigmas = [{:.6}]", level(499.0))), "{uneven}");
    let thirds = text_of(of(&vp, None, &steps(&[level(666.0), level(332.0)], false)));
    assert!(thirds.contains("[998, 665, 332]"), "{thirds}");
    assert_eq!(of(&vp, None, &steps(&[level(499.0)], false)).unwrap().class, "DDIMScheduler");
    let ends_at_zero = text_of(of(&vp, Some(level(1.0)), &steps(&[level(0.0)], true)));
    assert!(ends_at_zero.contains("LCMScheduler"), "{ends_at_zero}");
    let unit = text_of(of(&TeacherCard { time_unit: TimeUnit::Unit, ..vp }, None, &Steps::default()));
    assert!(unit.contains("time_unit unit") && unit.contains("student.onnx"), "{unit}");

    let edm = |sigma_max| {
        let schedule = ScheduleSpec::Edm { sigma_min: 0.002, sigma_max, rho: 7.0 };
        card(Prediction::EdmRaw, TimeUnit::LnSigma4, schedule)
    };
    let made = of(&edm(80.0), None, &Steps::default()).unwrap();
    assert_eq!((made.class, made.warnings.len()), ("EDMEulerScheduler", 1));
    assert!(made.warnings[0].contains("7.8e-5"), "{:?}", made.warnings);
    let low = text_of(of(&edm(80.0), Some(2.5), &Steps::default()));
    assert!(low.contains("7.7% more"), "{low}");
    assert!(text_of(of(&edm(80.0), None, &steps(&[1.0], true))).contains("2 steps"));

    let flow = |direction| card(Prediction::Flow, TimeUnit::Thousand, ScheduleSpec::Flow { shift: 3.0, direction });
    let late = text_of(of(&flow(Direction::DataToNoise), Some(9.0), &Steps::default()));
    assert!(late.contains("start at pure noise"), "{late}");
    let fresh = text_of(of(&flow(Direction::NoiseToData), None, &steps(&[1.0], true)));
    assert!(fresh.contains("student.stochastic = false"), "{fresh}");
    let two = of(&flow(Direction::DataToNoise), None, &steps(&[3.0], true)).unwrap();
    assert_eq!(two.sigmas, Some(vec![1.0, 0.75]));
    assert_eq!(two.config["stochastic_sampling"], true);
    assert_eq!(of(&flow(Direction::DataToNoise), None, &Steps::default()).unwrap().sigmas, None);
}
