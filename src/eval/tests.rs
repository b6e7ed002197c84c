use ndarray::{Array2, ArrayView2};

use super::*;
use crate::io::ImageSet;
use crate::runtime::{EngineOptions, testing};
use crate::tensor::HostTensor;

pub(super) fn matrix(n: usize, d: usize, f: impl FnMut((usize, usize)) -> f64) -> FeatureMatrix {
    FeatureMatrix::new(Array2::from_shape_fn((n, d), f).view()).unwrap()
}

pub(super) fn gaussian(n: usize, d: usize, seed: u64, scale: f64, shift: f64) -> FeatureMatrix {
    matrix(n, d, |(i, j)| {
        let x = crate::noise::image_noise(seed, i as u64, d);
        // Correlated columns, so that covariances do not commute.
        f64::from(x[j]) * scale + shift + 0.5 * f64::from(x[(j + 1) % d]) * (j as f64 / d as f64)
    })
}

pub(super) fn close(got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance * want.abs().max(1e-12), "{got} {want}");
}

#[test]
fn frechet_of_known_gaussians() {
    // Diagonal covariances commute: sum of (mu difference)^2 + (sigma difference)^2.
    let diagonal = |mean: [f64; 3], sd: [f64; 3]| Statistics {
        mean: mean.to_vec().into(),
        covariance: Array2::from_shape_fn((3, 3), |(i, j)| if i == j { sd[i] * sd[i] } else { 0.0 }),
        count: None,
        network: None,
    };
    let a = diagonal([0.0, 1.0, 2.0], [1.0, 2.0, 0.5]);
    let b = diagonal([0.5, 1.0, 0.0], [3.0, 1.0, 0.0]);
    close(frechet::distance(&a, &b).unwrap(), 0.25 + 4.0 + 4.0 + 1.0 + 0.25, 1e-12);
    assert!(frechet::distance(&a, &a).unwrap() < 1e-12);
    // Fewer images than features: singular covariances, still 0 against itself.
    let few = gaussian(5, 40, 3, 1.0, 0.0);
    assert!(frechet::distance(&Statistics::of(&few).unwrap(), &Statistics::of(&few).unwrap()).unwrap() < 1e-9);
}

#[test]
fn statistics_survive_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.npz");
    let stats = Statistics::of(&gaussian(20, 3, 1, 2.0, 0.1)).unwrap();
    stats.write(&path).unwrap();
    assert_eq!(
        frechet::distance(&Statistics::read(&path).unwrap(), &stats).unwrap(),
        0.0f64.max(frechet::distance(&stats, &stats).unwrap())
    );
}

#[test]
fn kernel_distance_of_two_points() {
    // One feature, blocks {0, 1} and {1, 2}: k(0,1) = 1; k(1,2) = 27; across: (1 + 1 + 8 + 27) / 4.
    let x = Mat::from_fn(2, 1, |i, _| i as f64);
    let y = Mat::from_fn(2, 1, |i, _| i as f64 + 1.0);
    close(kernel::full(x.as_ref(), y.as_ref()).mean, 1.0 + 27.0 - 2.0 * 37.0 / 4.0, 1e-12);
}

#[test]
fn kernel_distance_tells_sets_apart() {
    let (a, b, c) = (gaussian(400, 8, 1, 1.0, 0.0), gaussian(400, 8, 2, 1.0, 0.0), gaussian(400, 8, 3, 1.0, 0.7));
    let same = kernel::distance(&a, &b, kernel::Estimator::Full).unwrap();
    assert!(same.mean.abs() < 4.0 * same.standard_error.unwrap(), "{same:?}");
    let other = kernel::distance(&a, &c, kernel::Estimator::Full).unwrap();
    assert!(other.mean > 4.0 * other.standard_error.unwrap(), "{other:?}");
}

/// Two hundred draws: the error that each says is the spread that they have, for equal distributions (where the variance is of the
/// second order alone) and for others.
#[test]
fn the_kernel_distance_knows_its_error() {
    for shift in [0.0, 0.4] {
        let found: Vec<_> = (0..200u64)
            .map(|k| {
                let (a, b) = (gaussian(60, 3, 1000 + 2 * k, 1.0, 0.0), gaussian(45, 3, 1001 + 2 * k, 1.0, shift));
                kernel::distance(&a, &b, kernel::Estimator::Full).unwrap()
            })
            .collect();
        let values: Vec<f64> = found.iter().map(|k| k.mean).collect();
        let spread = tally::deviation(&values).unwrap();
        let said = found.iter().map(|k| k.standard_error.unwrap().powi(2)).sum::<f64>() / 200.0;
        let ratio = said.sqrt() / spread;
        assert!((0.85..1.2).contains(&ratio), "shift {shift}: {said} {spread} {ratio}");
        if shift == 0.0 {
            assert!(tally::mean(&values).unwrap().abs() < 4.0 * spread / 200f64.sqrt(), "unbiased");
        }
    }
    // The scheme of published figures has the same mean and more noise; strips of the full one leave nothing out.
    let (a, b) = (gaussian(1200, 4, 1, 1.0, 0.0), gaussian(1100, 4, 2, 1.0, 0.3));
    let full = kernel::distance(&a, &b, kernel::Estimator::Full).unwrap();
    let subsets = kernel::distance(&a, &b, kernel::Estimator::Subsets).unwrap();
    assert!((full.mean - subsets.mean).abs() < 0.3 * full.standard_error.unwrap(), "{full:?} {subsets:?}");
    assert!(subsets.standard_error.is_none() && subsets.deviation > Some(0.0), "{subsets:?}");
    let all = |x: &FeatureMatrix| -> Vec<usize> { (0..x.len()).collect() };
    let (x, y) = (a.select(&all(&a)), b.select(&all(&b)));
    let k = |p: &Mat<f64>, i, q: &Mat<f64>, j| ((0..4).map(|c| p[(i, c)] * q[(j, c)]).sum::<f64>() / 4.0 + 1.0).powi(3);
    let over = |p: &Mat<f64>, q: &Mat<f64>, same: bool| {
        let pairs = (0..p.nrows()).flat_map(|i| (0..q.nrows()).map(move |j| (i, j))).filter(|(i, j)| !(same && i == j));
        let (sum, count) = pairs.fold((0.0, 0.0), |(s, n), (i, j)| (s + k(p, i, q, j), n + 1.0));
        sum / count
    };
    close(full.mean, over(&x, &x, true) + over(&y, &y, true) - 2.0 * over(&x, &y, false), 1e-9);
}

#[test]
fn precision_and_recall_of_a_collapsed_set() {
    let reference = gaussian(200, 4, 1, 1.0, 0.0);
    // Copies of few reference images: all of good quality, little covered.
    let collapsed = matrix(200, 4, |(i, j)| reference.mat()[(i % 8, j)] + 1e-9 * i as f64);
    let pr = manifold::measure(&collapsed, &reference).unwrap();
    assert_eq!(pr.precision, 1.0);
    assert!(pr.recall <= 0.1, "{pr:?}");
    let same = manifold::measure(&reference, &reference).unwrap();
    assert_eq!((same.precision, same.recall), (1.0, 1.0));
    let far = gaussian(200, 4, 2, 1.0, 100.0);
    let pr = manifold::measure(&far, &reference).unwrap();
    assert_eq!((pr.precision, pr.recall), (0.0, 0.0));
}

#[test]
fn bad_features_are_refused() {
    let new = |v: &[f64]| FeatureMatrix::new(ArrayView2::from_shape((v.len() / 2, 2), v).unwrap()).map(|_| ());
    assert!(new(&[0.0, 1.0, f64::NAN, 0.0]).unwrap_err().to_string().contains("feature 0 of image 1 is NaN"));
    assert!(new(&[1.0, 2.0, 1.0, 2.0]).unwrap_err().to_string().contains("same features"));
    assert!(new(&[1.0, 2.0]).unwrap_err().to_string().contains("at least two"));
    let error = compare(&gaussian(9, 2, 1, 1.0, 0.0), &gaussian(9, 3, 1, 1.0, 0.0)).unwrap_err();
    assert!(error.to_string().contains("2 features against 3"));
    let scores = compare(&gaussian(9, 12, 1, 1.0, 0.0), &gaussian(20, 12, 2, 1.0, 0.0)).unwrap();
    assert_eq!(scores.warnings.len(), 1);
}

#[test]
fn features_are_the_networks() {
    let weight: Vec<f32> = (0..8).map(|k| k as f32 - 3.0).collect();
    let options = features::FeatureOptions { range: Some([0.0, 1.0]), ..Default::default() };
    let mut net = FeatureNet::from_bytes(&testing::features(&weight), &options, &EngineOptions::default()).unwrap();
    let pixels: Vec<u8> = (0..20).map(|v| v * 12).collect();
    let images = ImageSet::from_tensor(HostTensor::new(&[5, 2, 2], &pixels).unwrap(), [-1.0, 1.0]).unwrap();
    let mut seen = 0;
    let got = net.features(&images, 2, |n| seen += n).unwrap();
    assert_eq!((got.len(), got.dims(), seen), (5, 2, 5));
    for i in 0..5 {
        for j in 0..2 {
            let want: f64 = (0..4).map(|p| f64::from(pixels[i * 4 + p]) / 255.0 * f64::from(weight[p * 2 + j])).sum();
            assert!((got.mat()[(i, j)] - want).abs() < 1e-5);
        }
    }
    let wrong = ImageSet::from_tensor(HostTensor::new(&[2, 3, 3], &[0u8; 18]).unwrap(), [-1.0, 1.0]).unwrap();
    assert!(net.features(&wrong, 2, |_| ()).unwrap_err().to_string().contains("the images are 3x3, grey"));
    let options = features::FeatureOptions { output: Some("none".into()), ..Default::default() };
    let error = FeatureNet::from_bytes(&testing::features(&weight), &options, &EngineOptions::default()).err().unwrap();
    assert!(error.to_string().contains("no output `none`; there are: features"));
}

#[test]
fn moments_do_not_depend_on_how_rows_arrive_nor_on_a_large_mean() {
    let set = gaussian(1300, 7, 5, 1.0, 0.0);
    let far = matrix(1300, 7, |(i, j)| set.mat()[(i, j)] + 1e6);
    let (near, away) = (Statistics::of(&set).unwrap(), Statistics::of(&far).unwrap());
    assert_eq!(near.count, Some(1300));
    for i in 0..7 {
        close(away.mean[i] - 1e6, near.mean[i], 1e-6);
        for j in 0..7 {
            let direct: f64 =
                (0..1300).map(|k| (set.mat()[(k, i)] - near.mean[i]) * (set.mat()[(k, j)] - near.mean[j])).sum::<f64>()
                    / 1299.0;
            assert!((near.covariance[(i, j)] - direct).abs() < 1e-12, "{i} {j}");
            assert!((away.covariance[(i, j)] - direct).abs() < 1e-8, "{i} {j}");
        }
    }
    let mut moments = Moments::new(2);
    assert!(moments.push([1.0].into_iter()).is_err());
    let error = moments.push([0.0, f64::NAN].into_iter()).unwrap_err().to_string();
    assert!(error.contains("feature 1 of image 0 is NaN"), "{error}");
    let mut moments = Moments::new(2);
    (0..3).for_each(|_| moments.push([1.0, 2.0].into_iter()).unwrap());
    assert!(moments.finish().unwrap_err().to_string().contains("same features"));
}

#[test]
fn statistics_of_another_network_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.npz");
    let own = Statistics { network: Some("abc".into()), ..Statistics::of(&gaussian(20, 3, 1, 2.0, 0.1)).unwrap() };
    own.write(&path).unwrap();
    let read = Statistics::read(&path).unwrap();
    assert_eq!((read.network.as_deref(), read.count), (Some("abc"), Some(20)));
    read.check_network("abc", 3).unwrap();
    assert!(read.check_network("abd", 3).unwrap_err().to_string().contains("another feature network"));
    let plain = Statistics { network: None, ..read };
    plain.check_network("anything", 3).unwrap();
    let error = plain.check_network("anything", 4).unwrap_err().to_string();
    assert!(error.contains("3 features, the network gives 4"), "{error}");
    // What is no covariance.
    let write = |sigma: [f64; 4]| {
        let (mu, sigma) = (HostTensor::vec(&[0.0f64, 1.0]), HostTensor::new(&[2, 2], &sigma).unwrap());
        crate::io::npy::write_npz(&path, &[("mu", &mu), ("sigma", &sigma)]).unwrap();
        Statistics::read(&path).map(|_| ()).unwrap_err().to_string()
    };
    assert!(write([1.0, 0.5, 0.1, 1.0]).contains("[1, 0] differs from [0, 1]"));
    assert!(write([1.0, 0.0, 0.0, -1.0]).contains("variance 1 is -1"));
    assert!(write([f64::NAN, 0.0, 0.0, 1.0]).contains("NaN"));
    assert!(write([0.0; 4]).contains("same features"));
    // Symmetric, variances fine, and yet no covariance: found when it is read, and when it is used.
    assert!(write([1.0, 2.0, 2.0, 1.0]).contains("eigenvalue of -1.000e0"));
    let bent = Statistics {
        covariance: Array2::from_shape_fn((2, 2), |(i, j)| if i == j { 1.0 } else { 2.0 }),
        ..Statistics::of(&gaussian(20, 2, 1, 1.0, 0.0)).unwrap()
    };
    let error = frechet::distance(&bent, &bent).unwrap_err().to_string();
    assert!(error.contains("eigenvalue of -1.000e0"), "{error}");
}

#[test]
fn inception_score_of_known_classifiers() {
    // Certain and balanced over k classes: k. Indifferent: 1.
    let score = |rows: Vec<Vec<f32>>| {
        let mut gather = inception_score::Gather::new(rows.len());
        rows.iter().for_each(|r| gather.push(r).unwrap());
        gather.finish().unwrap()
    };
    let certain = score((0..40).map(|i| (0..4).map(|k| if i % 4 == k { 200.0 } else { 0.0 }).collect()).collect());
    close(certain.mean, 4.0, 1e-12);
    assert_eq!((certain.blocks, certain.deviation), (10, 0.0));
    close(score(vec![vec![0.3; 5]; 11]).mean, 1.0, 1e-12);
    let mut gather = inception_score::Gather::new(2);
    assert!(gather.push(&[1.0, f32::NAN]).unwrap_err().to_string().contains("class score 1 of image 0"));
    assert!(gather.push(&[1.0]).is_err());
}

#[test]
fn sliced_distance_of_equal_and_of_shifted_sets() {
    let patches = |shift: u64, size: usize| {
        let mut set = sliced::Patches::new([1, size, size]);
        for k in 0..64u64 {
            let noise = crate::noise::image_noise(7, k + shift, size * size);
            let pixels: Vec<u8> = (0..size * size)
                .map(|p| {
                    // Smooth images: what one set has in its columns, the other has in its rows.
                    let at = if shift >= 1000 { p / size } else { p % size };
                    (128.0 + 8.0 * noise[p] + 60.0 * (at as f32 / 3.0).sin()).clamp(0.0, 255.0) as u8
                })
                .collect();
            set.push(&pixels, k);
        }
        set
    };
    let (a, b, c) = (patches(0, 32), patches(500, 32), patches(1000, 32));
    let same = sliced::distance(&a, &a).unwrap();
    assert_eq!((same.mean, same.levels.len(), same.images), (0.0, 2, 64));
    let (near, far) = (sliced::distance(&a, &b).unwrap(), sliced::distance(&a, &c).unwrap());
    assert!(far.mean > 3.0 * near.mean && near.mean > 0.0 && near.standard_error < near.mean, "{near:?} {far:?}");
    assert!(sliced::distance(&a, &patches(0, 16)).is_err());
    let mut flat = sliced::Patches::new([1, 8, 8]);
    (0..4).for_each(|k| flat.push(&[9; 64], k));
    assert!(sliced::distance(&flat, &flat).unwrap_err().to_string().contains("all pixels of a channel are equal"));
}

#[test]
fn neighbours_are_the_nearest() {
    let reference = gaussian(50, 4, 1, 1.0, 0.0);
    let queries = matrix(3, 4, |(i, j)| reference.mat()[(10 * i, j)] + if j == 0 { 1e-3 } else { 0.0 });
    let found = neighbours::nearest(&queries, &reference, 2, 3).unwrap();
    assert_eq!((found.len(), found[0].len(), found[1][0].0), (2, 3, 10));
    close(found[0][0].1, 1e-3, 1e-9);
    assert!(found[0][1].1 <= found[0][2].1);
}

#[test]
fn feature_cards_are_checked() {
    let resolve = |entries: &[&str]| {
        let entries: Vec<String> = entries.iter().map(|e| e.to_string()).collect();
        FeatureCard::resolve(&Default::default(), None, &entries)
    };
    let card =
        resolve(&["size=[224,224]", "resize=bicubic-antialias", "mean=[0.5]", "std=[0.25]", "range=[0,1]"]).unwrap();
    assert_eq!((card.size, card.range), (Some([224, 224]), Some([0.0, 1.0])));
    for (entries, want) in [
        (&["size=[224,224]"][..], "belong together"),
        (&["size=[0,2]", "resize=box"], "expected [height, width]"),
        (&["resize=nearest", "size=[1,1]"], "expected one of bilinear"),
        (&["mean=[0.5]"], "mean and std"),
        (&["std=[0]", "mean=[0]"], "above 0"),
        (&["range=[1,0]"], "[low, high]"),
        (&["filter=box"], "unknown key `filter`"),
        (&["output"], "KEY=VALUE"),
    ] {
        let error = resolve(entries).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(want), "{entries:?}: {error}");
    }
    // Beside the model, over its metadata.
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("net.onnx");
    std::fs::write(dir.path().join("net.features.toml"), "range = [0, 255]\noutput = \"pool\"\n").unwrap();
    let metadata = [("features.range", "[0, 1]"), ("features.logits", "fc"), ("features.shape", "[1, 2, 2]")];
    let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let card = FeatureCard::resolve(&metadata, Some(&model), &["output=mixed".into()]).unwrap();
    assert_eq!(card.range, Some([0.0, 255.0]));
    assert_eq!((card.output.as_deref(), card.logits.as_deref()), (Some("mixed"), Some("fc")));
}

#[test]
fn the_card_decides_what_the_network_sees() {
    let weight: Vec<f32> = (0..16).map(|k| if k % 5 == 0 { 1.0 } else { 0.0 }).collect();
    let see = |card: &[&str], images: &HostTensor| {
        let card = card.iter().map(|c| c.to_string()).collect();
        let options = features::FeatureOptions { card, ..Default::default() };
        let net = FeatureNet::from_bytes(&testing::features(&weight), &options, &EngineOptions::default());
        let mut net = net.unwrap();
        net.see(images, 8).map(|s| (s.features, net.fingerprint()))
    };
    // 4x4 images, box filter: each output pixel is the mean of four.
    let pixels: Vec<u8> = (0..32).map(|v| v * 8).collect();
    let images = HostTensor::new(&[2, 1, 4, 4], &pixels).unwrap();
    let (got, first) = see(&["size=[2,2]", "resize=box", "range=[0,255]"], &images).unwrap();
    let block = |k: usize, y: usize, x: usize| -> f32 {
        let at = |dy: usize, dx: usize| f32::from(pixels[k * 16 + (2 * y + dy) * 4 + 2 * x + dx]);
        (at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1)) / 4.0
    };
    for k in 0..2 {
        for p in 0..4 {
            assert!((got[(k, p)] - block(k, p / 2, p % 2)).abs() < 1e-4, "{got:?}");
        }
    }
    let card = ["size=[2,2]", "resize=box", "range=[0,255]", "mean=[10]", "std=[2]"];
    let (scaled, second) = see(&card, &images).unwrap();
    assert!(got.iter().zip(&scaled).all(|(a, b)| ((a - 10.0) / 2.0 - b).abs() < 1e-4));
    assert_ne!(first, second, "another preprocessing is another feature space");
    let error = see(&["range=[0,1]"], &images).unwrap_err().to_string();
    assert!(error.contains("the images are 4x4, grey") && error.contains("resize="), "{error}");
    let colour = HostTensor::new(&[1, 3, 2, 2], &[0u8; 12]).unwrap();
    assert!(see(&["channels=1", "range=[0,1]"], &colour).unwrap_err().to_string().contains("colour is not made grey"));
}

#[test]
fn values_of_a_student_are_measured() {
    let student =
        crate::runtime::student::Student::from_bytes(&testing::halved(&[4, 3], &[]), &EngineOptions::default());
    let mut source = Source::Student(Box::new(student.unwrap()));
    // The student's own distribution, and one beside it.
    let noise = |seed: u64, shift: f32| {
        let values: Vec<f32> = crate::noise::batch_noise(seed, 0, 200, 12).iter().map(|v| 0.5 * v + shift).collect();
        Source::Values(HostTensor::new(&[200, 4, 3], &values).unwrap())
    };
    let draw = source::Draw::default();
    let row = |reference: &mut Source, source: &mut Source| {
        let reference = values::Reference::collect(reference, &draw, None, 200, 200, |_| ()).unwrap();
        reference.measure("student", source, &draw, None, (100, 2), Default::default(), |_| ())
    };
    let near = row(&mut noise(9, 0.0), &mut source).unwrap();
    let far = row(&mut noise(9, 1.0), &mut source).unwrap();
    assert_eq!((near.kind.as_str(), near.nfe, near.features, near.blocks), ("student", Some(1), Some(12), 2));
    // The means differ by 1 in 12 values.
    assert!(near.frechet < Some(1.0) && far.frechet > Some(11.0) && far.frechet < Some(14.0), "{near:?} {far:?}");
    assert!(near.coverage > Some(0.7) && far.coverage < Some(0.1) && far.sliced > near.sliced);
    assert!(near.sliced_standard_error.is_some() && near.kernel.is_some() && near.warnings.is_empty(), "{near:?}");
    // Another shape, too few, NaN.
    let other =
        |shape: &[usize]| Source::Values(HostTensor::new(shape, &vec![0.5f32; shape.iter().product()]).unwrap());
    let error = row(&mut noise(9, 0.0), &mut other(&[100, 3, 4])).unwrap_err().to_string();
    assert!(error.contains("[B, 3, 4], the reference [B, 4, 3]"), "{error}");
    let error = row(&mut noise(9, 0.0), &mut other(&[100, 4, 3])).unwrap_err().to_string();
    assert!(error.contains("too few"), "{error}");
    let mut broken = vec![0.5f32; 200 * 12];
    broken[31] = f32::NAN;
    let mut broken = Source::Values(HostTensor::new(&[200, 4, 3], &broken).unwrap());
    let error = row(&mut noise(9, 0.0), &mut broken).unwrap_err().to_string();
    assert!(error.contains("sample 2 holds NaN"), "{error}");
    // A network of features for them takes the values as they are.
    let weight: Vec<f32> = (0..8).map(|k| k as f32 - 3.0).collect();
    let options = features::FeatureOptions { range: Some([0.0, 1.0]), ..Default::default() };
    let mut net = FeatureNet::from_bytes(&testing::features(&weight), &options, &EngineOptions::default()).unwrap();
    let samples = HostTensor::new(&[2, 1, 2, 2], &[1f32, 0.0, 0.0, 0.0, 0.0, -2.0, 0.0, 0.0]).unwrap();
    assert_eq!(net.see_values(&samples, 8).unwrap(), ndarray::array![[-3.0, -2.0], [2.0, 0.0]]);
    let error = net.see_values(&HostTensor::new(&[2, 4], &[0f32; 8]).unwrap(), 8).unwrap_err().to_string();
    assert!(error.contains("the samples are [B, 4]"), "{error}");
}
