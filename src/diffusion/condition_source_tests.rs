use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::*;
use crate::diffusion::{Null, Prediction, ScheduleSpec, TimeUnit};
use crate::io::npy;
use crate::tensor::DType;

fn card(conditions: &[(&str, Condition)]) -> TeacherCard {
    TeacherCard {
        sample: "x".into(),
        time: "t".into(),
        output: "y".into(),
        prediction: Prediction::Epsilon,
        time_unit: TimeUnit::Sigma,
        shape: vec![1, 1, 1],
        modality: None,
        sample_rate: None,
        layout: Default::default(),
        range: None,
        sigma_data: 0.5,
        latent_scale: 1.0,
        dataset: None,
        schedule: ScheduleSpec::Edm { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 },
        conditions: conditions.iter().map(|(n, c)| ((*n).to_owned(), c.clone())).collect(),
        constants: Default::default(),
        concat: Vec::new(),
        dims: Default::default(),
    }
}

fn classes(n: usize) -> Condition {
    Condition::ClassIndex { classes: n, null: None }
}

fn embedding(shape: &[usize]) -> Condition {
    Condition::Embedding { shape: shape.to_vec(), null: None::<Null> }
}

fn npz(dir: &tempfile::TempDir, arrays: &[(&str, HostTensor)]) -> std::path::PathBuf {
    let path = dir.path().join("conditions.npz");
    let named: Vec<(&str, &HostTensor)> = arrays.iter().map(|(n, t)| (*n, t)).collect();
    npy::write_npz(&path, &named).unwrap();
    path
}

fn numbers(shape: &[usize]) -> HostTensor {
    let values: Vec<f32> = (0..shape.iter().product()).map(|v: usize| v as f32).collect();
    HostTensor::new(shape, &values).unwrap()
}

#[test]
fn one_row_of_the_file_gives_all_its_conditions() {
    let dir = tempfile::tempdir().unwrap();
    let card = card(&[
        ("text", embedding(&[2, 3])),
        ("pooled", embedding(&[4])),
        ("label", classes(9)),
        ("drawn", classes(5)),
    ]);
    let labels = HostTensor::new(&[7, 1], &[0i64, 1, 2, 3, 4, 5, 6]).unwrap();
    let path =
        npz(&dir, &[("text", numbers(&[7, 2, 3])), ("pooled", numbers(&[7, 4]).cast(DType::F16)), ("label", labels)]);
    let source = ConditionSource::new(&card, Some(&path), &[]).unwrap();
    let mut rng = ChaCha8Rng::from_seed([1; 32]);
    let drawn = source.draw(&card, &mut rng, 5000).unwrap();
    let labels = drawn.get("label").unwrap().to_i64();
    assert_eq!(drawn.get("text").unwrap().shape(), [5000, 2, 3]);
    let (text, pooled) = (drawn.get("text").unwrap().to_f32(), drawn.get("pooled").unwrap().to_f32());
    let mut counts = [0; 7];
    for (k, &label) in labels.iter().enumerate() {
        assert_eq!((text[6 * k], pooled[4 * k]), (6.0 * label as f32, 4.0 * label as f32), "rows are kept together");
        counts[label as usize] += 1;
    }
    assert!(counts.iter().all(|c| (600..830).contains(c)), "{counts:?}");
    assert_eq!(drawn.get("drawn").unwrap().shape(), [5000]);
    // Images of a seed keep their rows, whatever the batch.
    let (all, part) = (source.of_images(&card, 3, 0, 8).unwrap(), source.of_images(&card, 3, 5, 2).unwrap());
    assert_eq!(all.rows(5, 2).unwrap(), part);
}

#[test]
fn classes_follow_their_weights() {
    let card = card(&[("label", classes(4))]);
    let source = ConditionSource::new(&card, None, &[1.0, 0.0, 3.0, 0.0]).unwrap();
    let mut rng = ChaCha8Rng::from_seed([2; 32]);
    let drawn = source.draw(&card, &mut rng, 40_000).unwrap().get("label").unwrap().to_i64();
    let count = |c: i64| drawn.iter().filter(|d| **d == c).count();
    assert_eq!((count(1), count(3)), (0, 0));
    assert!((count(0) as f64 / 40_000.0 - 0.25).abs() < 0.01);
    assert_eq!((source.class(0, 4), source.class(u64::MAX, 4)), (0, 2), "both ends");
    // Without weights: what HostConditions draws.
    let (mut a, mut b) = (ChaCha8Rng::from_seed([3; 32]), ChaCha8Rng::from_seed([3; 32]));
    let uniform = ConditionSource::uniform(&card).unwrap().draw(&card, &mut a, 50).unwrap();
    assert_eq!(uniform, HostConditions::draw(&card, &mut b, 50).unwrap());
}

#[test]
fn what_does_not_fit_is_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let two = card(&[("text", embedding(&[2, 3])), ("label", classes(3))]);
    let int = |v: &[i64]| HostTensor::vec(v);
    for (arrays, says) in [
        (vec![("text", numbers(&[5, 3, 2]))], "`text` is f32 [5, 3, 2], but the graph's condition wants [rows, 2, 3]"),
        (vec![("text", numbers(&[5, 2, 3])), ("label", int(&[0, 1]))], "rows"),
        (vec![("text", numbers(&[3, 2, 3])), ("label", int(&[0, 1, 3]))], "class 3 in row 2, expected 0 to 2"),
        (vec![("text", numbers(&[1, 2, 3])), ("label", numbers(&[1]))], "integers [rows]"),
        (vec![("txt", numbers(&[1, 2, 3]))], "`txt` is no condition of the teacher, which has `label`, `text`"),
        (vec![("label", int(&[0, 1]))], "`text` is an embedding"),
        (vec![("text", numbers(&[0, 2, 3]))], "no rows"),
        (
            vec![("text", HostTensor::new(&[3, 2, 3], &[[0.0f32; 12].as_slice(), &[f32::NAN; 6]].concat()).unwrap())],
            "NaN or infinity in row 2",
        ),
    ] {
        let path = npz(&dir, &arrays);
        let e = ConditionSource::new(&two, Some(&path), &[]).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(says), "{e}");
    }
    let one = card(&[("label", classes(3))]);
    for (weights, says) in [
        (&[1.0, 2.0][..], "2 numbers"),
        (&[1.0, -1.0, 0.0], "0 or more"),
        (&[0.0, 0.0, 0.0], "above 0"),
        (&[f64::NAN, 1.0, 1.0], "0 or more"),
    ] {
        let e = ConditionSource::new(&one, None, weights).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(says), "{e}");
    }
    let e = ConditionSource::new(&card(&[]), None, &[1.0]).unwrap_err();
    assert!(e.to_string().contains("no classes"), "{e}");
    let e = ConditionSource::new(&one, Some(dir.path()), &[]).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("is a folder"), "{e}");
    assert!(
        ConditionSource::new(&one, Some(&dir.path().join("none.npz")), &[])
            .unwrap_err()
            .to_string()
            .contains("none.npz")
    );
}
