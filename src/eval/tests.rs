use std::path::PathBuf;

use super::*;
use crate::io::ImageSet;
use crate::io::npy;
use crate::runtime::{EngineOptions, testing};

fn matrix(n: usize, d: usize, f: impl FnMut((usize, usize)) -> f64) -> FeatureMatrix {
    let values: Vec<f64> = (0..n).flat_map(|i| (0..d).map(move |j| (i, j))).map(f).collect();
    FeatureMatrix::new(&HostTensor::new(&[n, d], &values).unwrap()).unwrap()
}

fn gaussian(n: usize, d: usize, seed: u64, scale: f64, shift: f64) -> FeatureMatrix {
    matrix(n, d, |(i, j)| {
        let x = crate::noise::image_noise(seed, i as u64, d);
        // Correlated columns, so that covariances do not commute.
        f64::from(x[j]) * scale + shift + 0.5 * f64::from(x[(j + 1) % d]) * (j as f64 / d as f64)
    })
}

fn close(got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance * want.abs().max(1e-12), "{got} {want}");
}

#[test]
fn frechet_of_known_gaussians() {
    // Diagonal covariances commute: sum of (mu difference)^2 + (sigma difference)^2.
    let diagonal = |mean: [f64; 3], sd: [f64; 3]| Statistics {
        mean: mean.to_vec(),
        covariance: Mat::from_fn(3, 3, |i, j| if i == j { sd[i] * sd[i] } else { 0.0 }),
    };
    let a = diagonal([0.0, 1.0, 2.0], [1.0, 2.0, 0.5]);
    let b = diagonal([0.5, 1.0, 0.0], [3.0, 1.0, 0.0]);
    close(frechet::distance(&a, &b).unwrap(), 0.25 + 4.0 + 4.0 + 1.0 + 0.25, 1e-12);
    assert!(frechet::distance(&a, &a).unwrap() < 1e-12);
    // Fewer images than features: singular covariances, still 0 against itself.
    let few = gaussian(5, 40, 3, 1.0, 0.0);
    assert!(frechet::distance(&Statistics::of(&few), &Statistics::of(&few)).unwrap() < 1e-9);
}

#[test]
fn statistics_survive_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.npz");
    let stats = Statistics::of(&gaussian(20, 3, 1, 2.0, 0.1));
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
    close(kernel::mmd2(&x, &y), 1.0 + 27.0 - 2.0 * 37.0 / 4.0, 1e-12);
}

#[test]
fn kernel_distance_tells_sets_apart() {
    let (a, b, c) = (gaussian(400, 8, 1, 1.0, 0.0), gaussian(400, 8, 2, 1.0, 0.0), gaussian(400, 8, 3, 1.0, 0.7));
    let same = kernel::distance(&a, &b).unwrap();
    assert!(same.mean.abs() < 4.0 * same.standard_error, "{same:?}");
    let other = kernel::distance(&a, &c).unwrap();
    assert!(other.mean > 4.0 * other.standard_error, "{other:?}");
}

#[test]
fn precision_and_recall_of_a_collapsed_set() {
    let reference = gaussian(200, 4, 1, 1.0, 0.0);
    // Copies of few reference images: all of good quality, little covered.
    let collapsed = matrix(200, 4, |(i, j)| reference.mat()[(i % 8, j)] + 1e-9 * i as f64);
    let pr = precision_recall::measure(&collapsed, &reference, 3).unwrap();
    assert_eq!(pr.precision, 1.0);
    assert!(pr.recall <= 0.1, "{pr:?}");
    let same = precision_recall::measure(&reference, &reference, 3).unwrap();
    assert_eq!((same.precision, same.recall), (1.0, 1.0));
    let far = gaussian(200, 4, 2, 1.0, 100.0);
    let pr = precision_recall::measure(&far, &reference, 3).unwrap();
    assert_eq!((pr.precision, pr.recall), (0.0, 0.0));
}

#[test]
fn bad_features_are_refused() {
    let new = |v: &[f64]| FeatureMatrix::new(&HostTensor::new(&[v.len() / 2, 2], v).unwrap()).map(|_| ());
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

/// numpy and scipy on the same features: Frechet distance by `sqrtm`, MMD by the definition, balls by brute force.
#[test]
fn numpy_and_scipy_agree() {
    let python = std::env::var_os("DISBACK_PYTHON")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.venv/bin/python")));
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (gaussian(300, 12, 11, 1.0, 0.0), gaussian(250, 12, 12, 1.3, 0.4));
    for (name, set) in [("a", &a), ("b", &b)] {
        let values: Vec<f64> = (0..set.len()).flat_map(|i| (0..12).map(move |j| set.mat()[(i, j)])).collect();
        npy::write(&dir.path().join(format!("{name}.npy")), &HostTensor::new(&[set.len(), 12], &values).unwrap())
            .unwrap();
    }
    let script = r#"
import numpy as np, scipy.linalg, scipy.spatial, json
a, b = np.load("a.npy"), np.load("b.npy")
sa, sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
frechet = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa + sb - 2 * scipy.linalg.sqrtm(sa @ sb).real)
k = lambda p, q: (p @ q.T / p.shape[1] + 1) ** 3
x, y = a[:100], b[:100]
kxx, kyy, kxy = k(x, x), k(y, y), k(x, y)
mmd2 = (kxx.sum() - np.trace(kxx)) / 9900 + (kyy.sum() - np.trace(kyy)) / 9900 - 2 * kxy.mean()
d = scipy.spatial.distance.cdist
ra, rb = np.sort(d(a, a), 1)[:, 3], np.sort(d(b, b), 1)[:, 3]
dab = d(a, b)
print(json.dumps([frechet, mmd2, (dab <= rb[None]).any(1).mean(), (dab <= ra[:, None]).any(0).mean()]))
"#;
    let out = std::process::Command::new(&python).arg("-c").arg(script).current_dir(dir.path()).output();
    let out = out.unwrap_or_else(|e| panic!("{}: {e} (make test sets it up)", python.display()));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let want: Vec<f64> = serde_json::from_slice(&out.stdout).unwrap();
    close(frechet::distance(&Statistics::of(&a), &Statistics::of(&b)).unwrap(), want[0], 1e-6);
    let first: Vec<usize> = (0..100).collect();
    close(kernel::mmd2(&a.select(&first), &b.select(&first)), want[1], 1e-6);
    let pr = precision_recall::measure(&a, &b, 3).unwrap();
    close(pr.precision, want[2], 1e-12);
    close(pr.recall, want[3], 1e-12);
    assert!(pr.precision > 0.3 && pr.precision < 1.0 && pr.recall > 0.3 && pr.recall < 1.0, "{pr:?}");
}
