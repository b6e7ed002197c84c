//! The measures beside independent ones in numpy, scipy and PyTorch on the same numbers.

use std::path::{Path, PathBuf};

use super::tests::{close, gaussian};
use super::*;
use crate::io::npy;
use crate::tensor::HostTensor;

/// Runs a script in `dir`; what it prints is JSON.
fn python(dir: &Path, script: &str) -> Vec<f64> {
    let python = std::env::var_os("DISBACK_PYTHON")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.venv/bin/python")));
    let out = std::process::Command::new(&python).arg("-c").arg(script).current_dir(dir).output();
    let out = out.unwrap_or_else(|e| panic!("{}: {e} (make test sets it up)", python.display()));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn save(dir: &Path, name: &str, shape: &[usize], values: &[f64]) {
    npy::write(&dir.join(name), &HostTensor::new(shape, values).unwrap()).unwrap();
}

fn flat(set: &FeatureMatrix) -> Vec<f64> {
    (0..set.len()).flat_map(|i| (0..set.dims()).map(move |j| set.mat()[(i, j)])).collect()
}

/// Frechet distance by `sqrtm` as pytorch-fid and clean-fid compute it, MMD by the definition, balls by brute force, Inception
/// Score and sliced distance as their papers' code does.
#[test]
fn numpy_and_scipy_agree() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (gaussian(300, 12, 11, 1.0, 0.0), gaussian(250, 12, 12, 1.3, 0.4));
    save(dir.path(), "a.npy", &[300, 12], &flat(&a));
    save(dir.path(), "b.npy", &[250, 12], &flat(&b));
    // Statistics in double precision of a set as large as its features: singular covariances.
    let (few, many) = (gaussian(10, 24, 21, 1.0, 0.0), gaussian(60, 24, 22, 1.0, 0.3));
    save(dir.path(), "few.npy", &[10, 24], &flat(&few));
    save(dir.path(), "many.npy", &[60, 24], &flat(&many));
    let logits: Vec<f32> = (0..57).flat_map(|i| crate::noise::image_noise(5, i, 6)).map(|v| 2.0 * v).collect();
    save(dir.path(), "logits.npy", &[57, 6], &logits.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
    let image: Vec<f32> = crate::noise::image_noise(9, 0, 2 * 33 * 36);
    save(dir.path(), "image.npy", &[2, 33, 36], &image.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
    let directions = sliced::directions(12, 8);
    save(
        dir.path(),
        "directions.npy",
        &[8, 12],
        &directions.iter().flatten().map(|&v| f64::from(v)).collect::<Vec<_>>(),
    );
    let script = r#"
import numpy as np, scipy.linalg, scipy.spatial, scipy.stats, scipy.ndimage, json
load = lambda n: np.load(n + ".npy")
a, b = load("a"), load("b")

def frechet(x, y):  # pytorch-fid 0.3.0, calculate_frechet_distance
    m1, s1, m2, s2 = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    diff = m1 - m2
    root = scipy.linalg.sqrtm(s1.dot(s2))
    if not np.isfinite(root).all():
        offset = np.eye(len(s1)) * 1e-6
        root = scipy.linalg.sqrtm((s1 + offset).dot(s2 + offset))
    return diff.dot(diff) + np.trace(s1) + np.trace(s2) - 2 * np.trace(np.real(root))

k = lambda p, q: (p @ q.T / p.shape[1] + 1) ** 3
x, y = a[:100], b[:100]
kxx, kyy, kxy = k(x, x), k(y, y), k(x, y)
mmd2 = (kxx.sum() - np.trace(kxx)) / 9900 + (kyy.sum() - np.trace(kyy)) / 9900 - 2 * kxy.mean()
kaa, kbb, kab = k(a, a), k(b, b), k(a, b)
full = (kaa.sum() - np.trace(kaa)) / 300 / 299 + (kbb.sum() - np.trace(kbb)) / 250 / 249 - 2 * kab.mean()
d = scipy.spatial.distance.cdist
ra, rb, rb5 = np.sort(d(a, a), 1)[:, 3], np.sort(d(b, b), 1)[:, 3], np.sort(d(b, b), 1)[:, 5]
dab = d(a, b)
precision, recall = (dab <= rb[None]).any(1).mean(), (dab <= ra[:, None]).any(0).mean()
density, coverage = (dab <= rb5[None]).sum() / (5 * len(a)), (dab <= rb5[None]).any(0).mean()

# Inception Score, inception_score_pytorch's loop over splits
p = scipy.special.softmax(load("logits"), 1)
scores = []
for i in range(10):
    part = p[i * len(p) // 10:(i + 1) * len(p) // 10]
    scores.append(np.exp(np.mean([scipy.stats.entropy(q, part.mean(0)) for q in part])))

# Laplacian pyramid of one image: 33x36 -> 17x18
taps = np.array([1, 4, 6, 4, 1]) / 16
f = np.outer(taps, taps)[None]
image = load("image")
small = scipy.ndimage.convolve(image, f, mode="mirror")[:, ::2, ::2]
up = np.zeros_like(image)
up[:, ::2, ::2] = small
band = image - scipy.ndimage.convolve(up, 4 * f, mode="mirror")
w = [scipy.stats.wasserstein_distance(a[:200] @ v, b[:200] @ v) for v in load("directions")]
few, many = load("few"), load("many")
# The singular case without a square root of a singular product: |X Y^T|_* of the centred sets.
cx, cy = (few - few.mean(0)) / 3, (many - many.mean(0)) / np.sqrt(59)
exact = ((few.mean(0) - many.mean(0)) ** 2).sum() + (cx ** 2).sum() + (cy ** 2).sum() - 2 * np.linalg.svd(cx @ cy.T)[1].sum()
print(json.dumps([frechet(a, b), mmd2, precision, recall, density, coverage, np.mean(scores), np.std(scores),
                  float((band ** 2).sum()), float((small ** 2).sum()), float(band[1, 7, 35]), float(np.mean(w)), exact, full]))
"#;
    let want = python(dir.path(), script);
    let of = |x: &FeatureMatrix| Statistics::of(x).unwrap();
    close(frechet::distance(&of(&a), &of(&b)).unwrap(), want[0], 1e-9);
    let first: Vec<usize> = (0..100).collect();
    close(kernel::full(a.select(&first).as_ref(), b.select(&first).as_ref()).mean, want[1], 1e-9);
    close(kernel::distance(&a, &b, kernel::Estimator::Full).unwrap().mean, want[13], 1e-9);
    let m = manifold::measure(&a, &b).unwrap();
    for (got, want) in [m.precision, m.recall, m.density, m.coverage].into_iter().zip(&want[2..6]) {
        close(got, *want, 1e-12);
    }
    assert!(m.precision > 0.3 && m.precision < 1.0 && m.recall > 0.3 && m.recall < 1.0, "{m:?}");
    assert!(m.coverage > 0.3 && m.coverage < 1.0, "{m:?}");
    let mut gather = inception_score::Gather::new(57);
    logits.chunks_exact(6).for_each(|row| gather.push(row).unwrap());
    let score = gather.finish().unwrap();
    close(score.mean, want[6], 1e-9);
    close(score.deviation, want[7], 1e-9);
    let bands = sliced::pyramid(&image, 2, &[[33, 36], [17, 18]]);
    let energy = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    close(energy(&bands[0]), want[8], 1e-5);
    close(energy(&bands[1]), want[9], 1e-5);
    assert!((f64::from(bands[0][33 * 36 + 7 * 36 + 35]) - want[10]).abs() < 1e-5);
    let rows = |x: &FeatureMatrix| flat(x)[..200 * 12].iter().map(|&v| v as f32).collect::<Vec<_>>();
    let values = sliced::by_direction(&rows(&a), &rows(&b), &directions);
    close(values.iter().sum::<f64>() / 8.0, want[11], 1e-5);
    close(frechet::distance(&of(&few), &of(&many)).unwrap(), want[12], 1e-9);
}

/// Measures on values: those of flattened samples where there are enough of them, of numpy's principal components where not, and
/// the sliced distance by scipy's distance along the same directions.
#[test]
fn numpy_and_scipy_agree_on_values() {
    let dir = tempfile::tempdir().unwrap();
    let set = |n: usize, shape: &[usize], seed: u64, scale: f32, shift: f32| {
        let d: usize = shape.iter().product();
        let rows: Vec<f32> = (0..n as u64)
            .flat_map(|i| {
                let x = crate::noise::image_noise(seed, i, d);
                // Of falling variance and correlated, as samples are.
                (0..d)
                    .map(move |j| scale * (x[j] + 0.6 * x[(j + 1) % d]) / (1.0 + j as f32 / 7.0) + shift)
                    .collect::<Vec<_>>()
            })
            .collect();
        HostTensor::new(&[&[n], shape].concat(), &rows).unwrap()
    };
    let sets = [
        ("few", set(80, &[3, 2], 1, 1.0, 0.0), set(70, &[3, 2], 2, 1.3, 0.2)),
        ("many", set(60, &[4, 5, 2], 3, 1.0, 0.0), set(60, &[4, 5, 2], 4, 0.8, 0.1)),
        ("wide", set(24, &[700], 5, 1.0, 0.0), set(24, &[700], 6, 1.0, 0.3)),
    ];
    for (name, a, b) in &sets {
        npy::write(&dir.path().join(format!("{name}-a.npy")), a).unwrap();
        npy::write(&dir.path().join(format!("{name}-b.npy")), b).unwrap();
        let d: usize = a.shape()[1..].iter().product();
        let all: Vec<f32> = sliced::directions(d, sliced::ALL_DIRECTIONS).concat();
        let all = HostTensor::new(&[sliced::ALL_DIRECTIONS, d], &all).unwrap();
        npy::write(&dir.path().join(format!("{name}-directions.npy")), &all).unwrap();
    }
    let script = r#"
import numpy as np, scipy.linalg, scipy.spatial, scipy.stats, json
out = []
for name in ["few", "many", "wide"]:
    a, b = (np.load(f"{name}-{k}.npy").astype(np.float64) for k in "ab")
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    w = np.load(f"{name}-directions.npy").astype(np.float64)
    n = min(len(a), len(b))
    swd = np.mean([scipy.stats.wasserstein_distance(a @ v, b @ v) for v in w]) if len(a) == len(b) else 0.0
    kept = 1.0
    if a.shape[1] > n // 2:
        _, s, v = np.linalg.svd(b - b.mean(0), full_matrices=False)
        basis = v[:n // 2].T
        kept = (s[:n // 2] ** 2).sum() / (s ** 2).sum()
        a, b = (a - b.mean(0)) @ basis, (b - b.mean(0)) @ basis
    diff, s1, s2 = a.mean(0) - b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    frechet = diff @ diff + np.trace(s1) + np.trace(s2) - 2 * np.trace(np.real(scipy.linalg.sqrtm(s1 @ s2)))
    d = scipy.spatial.distance.cdist
    radius = np.sort(d(b, b), 1)[:, 5]
    near = d(a, b) <= radius[None]
    out += [frechet, near.any(0).mean(), near.sum() / (5 * len(a)), swd * 1e3, kept, a.shape[1]]
print(json.dumps([float(v) for v in out]))
"#;
    let want = python(dir.path(), script);
    for ((name, a, b), want) in sets.into_iter().zip(want.chunks_exact(6)) {
        let (count, reference) = (a.shape()[0], b.shape()[0]);
        let shape = a.shape()[1..].to_vec();
        let draw = source::Draw::default();
        let found = values::Reference::collect(&mut Source::Values(b), &draw, None, reference, count, |_| ()).unwrap();
        assert_eq!((found.count(), found.shape()), (reference, &shape[..]));
        let mut source = Source::Values(a);
        let row = found.measure(name, &mut source, &draw, None, (count, 1), Default::default(), |_| ()).unwrap();
        close(row.frechet.unwrap(), want[0], 1e-6);
        close(row.coverage.unwrap(), want[1], 1e-12);
        close(row.density.unwrap(), want[2], 1e-12);
        if count == reference {
            close(row.sliced.unwrap(), want[3], 1e-4);
        }
        assert_eq!(row.features, Some(want[5] as usize), "{name}");
        let said = row.warnings.iter().find(|w| w.contains("principal components"));
        assert_eq!(said.is_some(), want[4] < 1.0, "{name}: {said:?}");
        if let Some(text) = said {
            assert!(text.contains(&format!("({:.1} %", 100.0 * want[4])), "{name}: {text}, {}", want[4]);
        }
        assert!(row.coverage > Some(0.2) && row.density < Some(2.0), "{name}: {row:?}");
    }
}

/// Density and coverage of sets with exact duplicates, where `<` and `<=` differ, as prdc's `compute_prdc` has them.
#[test]
fn duplicates_count_as_in_prdc() {
    let dir = tempfile::tempdir().unwrap();
    // Whole numbers, so that equal distances are equal in numpy too.
    let set = |n: usize, seed: u64| {
        let rows = gaussian(n, 2, seed, 1.5, 0.0);
        super::tests::matrix(n, 2, |(i, j)| rows.mat()[(i, j)].round())
    };
    let (a, b) = (set(150, 31), set(120, 32));
    save(dir.path(), "a.npy", &[150, 2], &flat(&a));
    save(dir.path(), "b.npy", &[120, 2], &flat(&b));
    let script = r#"
import numpy as np, scipy.spatial, json
a, b = np.load("a.npy"), np.load("b.npy")
d = lambda x, y: scipy.spatial.distance.cdist(x, y)
def prdc(real, fake, k):
    radius = np.sort(d(real, real), 1)[:, k]
    far = d(real, fake)
    return [(far < radius[:, None]).sum(0).mean() / k, (far.min(1) < radius).mean(), (far <= radius[:, None]).any(1).mean()]
print(json.dumps([float(v) for v in prdc(b, a, 5) + prdc(b, b, 5)]))
"#;
    let want = python(dir.path(), script);
    for (x, want) in [(&a, &want[..3]), (&b, &want[3..])] {
        let m = manifold::measure(x, &b).unwrap();
        close(m.density, want[0], 1e-12);
        close(m.coverage, want[1], 1e-12);
        assert!(m.coverage < 1.0 && want[2] > want[1], "the case tells < from <=: {m:?} {want:?}");
    }
}

/// The filters beside PyTorch's and PIL's.
#[test]
fn pytorch_and_pil_resize_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let plane: Vec<f32> = crate::noise::image_noise(3, 0, 20 * 13);
    save(dir.path(), "x.npy", &[1, 1, 20, 13], &plane.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
    let script = r#"
import json, numpy as np, torch
torch.set_num_threads(1)
x = torch.from_numpy(np.load("x.npy"))
out = []
for size in [(7, 9), (31, 40)]:
    for mode, anti in [("bilinear", False), ("bilinear", True), ("bicubic", True)]:
        out += torch.nn.functional.interpolate(x, size, mode=mode, align_corners=False, antialias=anti).flatten().tolist()
# clean-fid, DINOv2 and CLIP scores: PIL on planes of floats.
from PIL import Image
plane = Image.fromarray(x[0, 0].numpy().astype(np.float32))
for h, w in [(7, 9), (31, 40)]:
    for filter in [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX]:
        out += np.asarray(plane.resize((w, h), filter)).flatten().tolist()
print(json.dumps(out))
"#;
    let want = python(dir.path(), script);
    let mut got = Vec::new();
    for size in [[7, 9], [31, 40]] {
        for filter in [resize::Filter::Bilinear, resize::Filter::BilinearAntialias, resize::Filter::BicubicAntialias] {
            got.extend(resize::Resizer::new(filter, [20, 13], size).plane(&plane));
        }
    }
    for size in [[7, 9], [31, 40]] {
        for filter in [resize::Filter::BilinearAntialias, resize::Filter::BicubicAntialias, resize::Filter::Box] {
            got.extend(resize::Resizer::new(filter, [20, 13], size).plane(&plane));
        }
    }
    assert_eq!(got.len(), want.len());
    for (k, (a, b)) in got.iter().zip(&want).enumerate() {
        assert!((f64::from(*a) - b).abs() < 2e-6, "{k}: {a} {b}");
    }
    // TensorFlow 1 takes the corner as origin: doubling repeats the grid's own pixels at even places.
    let doubled = resize::Resizer::new(resize::Filter::BilinearTf1, [20, 13], [40, 26]).plane(&plane);
    for y in 0..20 {
        for x in 0..13 {
            assert_eq!(doubled[2 * y * 26 + 2 * x], plane[y * 13 + x]);
        }
        assert_eq!(doubled[2 * y * 26 + 1], (plane[y * 13] + plane[y * 13 + 1]) / 2.0);
    }
    let half = resize::Resizer::new(resize::Filter::Box, [20, 13], [10, 13]).plane(&plane);
    assert!((half[0] - (plane[0] + plane[13]) / 2.0).abs() < 1e-6);
}
