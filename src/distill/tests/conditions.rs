//! Conditions and guidance of a run.

use super::*;
use crate::tensor::HostTensor;

fn student(c: &Config) -> Result<String> {
    let dir = tempfile::tempdir().unwrap();
    let (outcome, _) = run(dir.path(), c, &labelled(), None)?;
    finished(outcome).params().hash()
}

#[test]
fn a_file_of_one_class_and_all_weight_on_it_train_the_same_student() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("labels.npz");
    crate::io::npy::write_npz(&path, &[("labels", &HostTensor::vec(&[3i64; 17]))]).unwrap();
    let (mut file, mut weights, mut uniform) = (config(), config(), config());
    for c in [&mut file, &mut weights, &mut uniform] {
        (c.degrade.steps, c.backtrack.updates) = (4, 3);
    }
    file.conditions.file = path.display().to_string();
    weights.conditions.weights = (0..10).map(|k| f64::from(u8::from(k == 3))).collect();
    let made = [file, weights, uniform].map(|c| student(&c).unwrap());
    assert_eq!(made[0], made[1]);
    assert_ne!(made[0], made[2]);
}

#[test]
fn shifted_levels_are_those_of_every_network() {
    let schedule = ScheduleSpec::Flow { shift: 2.0, direction: Default::default() };
    let teacher = gaussian(TeacherCard { schedule, ..card(2) }, &[0.8, -0.4], &[0.7, 0.3]);
    let levels = |shift: f64| {
        let mut c = config();
        (c.noise.levels, c.noise.generator, c.noise.fake, c.noise.shift) = (10, [2, 7], [0, 9], shift);
        let b = batches::Batches::new(&c, &teacher).unwrap();
        [b.generator_levels.spread(6), b.fake_levels.spread(10), b.degrade_levels.spread(10)].concat()
    };
    for (found, of_card) in levels(6.0).iter().zip(levels(0.0)) {
        assert!((found / of_card - 3.0).abs() < 1e-9, "{found} for {of_card}: thrice the card's shift");
    }
    assert_eq!(levels(2.0), levels(0.0), "the card's own shift");
    let mut c = config();
    c.noise.shift = 3.0;
    let e = batches::Batches::new(&c, &plain()).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("noise.shift: only a flow"), "{e}");
}

#[test]
fn an_interval_that_holds_no_drawn_level_is_no_guidance() {
    let mut c = config();
    (c.degrade.steps, c.backtrack.updates) = (4, 3);
    let none = student(&c).unwrap();
    c.guidance = 3.0;
    let everywhere = student(&c).unwrap();
    c.guidance_interval = [50.0, f64::INFINITY];
    assert_eq!(student(&c).unwrap(), none);
    c.guidance_interval = [0.0, 1.0];
    let some = student(&c).unwrap();
    assert!(some != none && some != everywhere);
}
