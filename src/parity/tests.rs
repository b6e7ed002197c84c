//! What counts as agreement, and what is drawn.

use super::*;

#[test]
fn nothing_but_nan_is_no_agreement() {
    let given = |values: &[f32]| vec![("y".to_owned(), HostTensor::vec(values))];
    let of = |values: &[f32]| pairs(&given(values), &given(values), Tolerance::default()).unwrap().remove(0);
    let (half, all) = (of(&[f32::NAN, 1.0]), of(&[f32::NAN, f32::NAN]));
    assert_eq!((half.ok, half.nan), (true, 0.5));
    assert_eq!((all.ok, all.nan), (false, 1.0));
}

#[test]
fn one_number_a_sample_is_drawn_above_zero() {
    let port = |name: &str, shape: &[Result<usize, &str>]| Port {
        name: name.to_owned(),
        value: 0,
        dtype: Some(DType::F32),
        shape: Some(shape.iter().map(|d| d.map_err(str::to_owned)).collect()),
    };
    let ports = [port("x", &[Err("batch"), Ok(3), Ok(8), Ok(8)]), port("sigma", &[Err("batch")])];
    let drawn = random_inputs(&ports, None, 64, &BTreeMap::new(), 0).unwrap();
    assert!(drawn[0].1.to_f32().iter().any(|v| *v < 0.0));
    assert!(drawn[1].1.to_f32().iter().all(|v| *v > 0.0 && *v < 1.0));
}
