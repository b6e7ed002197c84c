//! Training does not depend on how many axes a sample has: the same values in another shape end as the same student.

use super::*;
use crate::distill::objective::ObjectiveKind;
use crate::io::npy;
use crate::tensor::HostTensor;
use crate::torch::shim;

const MEAN: [f32; 4] = [0.8, -0.4, 0.1, 0.3];
const SD: [f32; 4] = [0.7, 0.3, 0.5, 0.4];

/// What a run of this configuration ends with, value by value.
fn ended(dir: &std::path::Path, shape: &[usize], c: &Config) -> Vec<f32> {
    let mut c = c.clone();
    let of = TeacherCard { shape: shape.to_vec(), ..card(1) };
    let name: Vec<String> = shape.iter().map(ToString::to_string).collect();
    if c.built_objective().is_ok_and(|o| o.needs_discriminator()) {
        let z = shim::randn(17, &[50, 4], Device::Cpu).unwrap() * Tensor::from_slice(&SD) + Tensor::from_slice(&MEAN);
        let values = Vec::<f32>::try_from(z.view(-1)).unwrap();
        let path = dir.join(format!("real-{}.npz", name.join("-")));
        npy::write_npz(&path, &[("samples", &HostTensor::new(&of.batch_of(50), &values).unwrap())]).unwrap();
        (c.gan.data, c.gan.taps, c.gan.lr) = (path.display().to_string(), vec!["moments".into()], 0.01);
    }
    let path = dir.join(format!("{:?}-{}-{}", c.objective, c.student.sigmas.len(), name.join("-")));
    let (outcome, _) = run(&path, &c, &gaussian(of, &MEAN, &SD), None).unwrap();
    let student = finished(outcome);
    let parts = student.params().tensors()[..2].iter().map(|t| Vec::<f32>::try_from(t.detach().reshape([-1])).unwrap());
    parts.flatten().collect()
}

#[test]
fn every_objective_ends_alike_for_samples_of_every_rank() {
    use ObjectiveKind::{DiffInstruct, Dmd, Dmd2, FDistill, Sds, Sid, Sim, UniInstruct};
    let dir = tempfile::tempdir().unwrap();
    for (objective, further) in [
        (DiffInstruct, 0),
        (Dmd, 0),
        (Dmd2, 0),
        (FDistill, 0),
        (Sds, 0),
        (Sid, 0),
        (Sim, 0),
        (UniInstruct, 0),
        (Dmd, 1),
    ] {
        let mut c = config();
        (c.objective, c.batch, c.degrade.steps, c.degrade.nodes, c.backtrack.updates) =
            (objective.into(), 8, 4, 1.into(), 6);
        if further > 0 {
            (c.student.sigmas, c.student.stochastic) = (vec![0.5], true);
        }
        let image = ended(dir.path(), &[4, 1, 1], &c);
        assert!(image.iter().zip(MEAN).any(|(a, b)| (a - b).abs() > 1e-3), "{objective:?} did not move: {image:?}");
        for shape in [&[4][..], &[2, 2], &[1, 2, 2, 1], &[2, 1, 1, 2, 1]] {
            let other = ended(dir.path(), shape, &c);
            for (a, b) in image.iter().zip(&other) {
                assert!((a - b).abs() < 1e-5, "{objective:?} {shape:?}: {other:?} for {image:?}");
            }
        }
    }
}
