//! Steps that are recorded compute what they would have computed. Without a device recordings are rehearsed: from the fourth run
//! on each piece works on the tensors of that run, filled anew, and on whatever else it had then.

use super::*;
use crate::distill::objective::ObjectiveKind;
use crate::torch::exec::segments::tests::RUN_AGAIN;
use crate::torch::train::cuda_graph::rehearse;

/// A rehearsed run leaves the bytes of a plain one: nodes, checkpoints, the student.
fn same_bytes(what: &str, teacher: &Denoiser, change: impl Fn(&mut Config)) {
    let mut c = config();
    (c.degrade.steps, c.degrade.nodes, c.backtrack.updates, c.backtrack.switch_every) = (12, 2.into(), 14, 6);
    c.optimizer.warmup = 5;
    c.backtrack.cooldown = 0.5;
    change(&mut c);
    let dir = tempfile::tempdir().unwrap();
    let left = |name: &str| {
        let path = dir.path().join(name);
        let (outcome, seen) = run(&path, &c, teacher, None).unwrap();
        finished(outcome);
        let losses: Vec<_> = seen.rows.iter().map(|r| (r.loss_fake, r.loss_generator, r.mismatch)).collect();
        (remains(&path), losses)
    };
    let plain = left("plain");
    assert_eq!(rehearse(|| left("rehearsed")), plain, "{what}");
}

#[test]
fn a_rehearsed_run_is_the_plain_one_bit_for_bit() {
    for kind in [ObjectiveKind::Dmd, ObjectiveKind::Sid, ObjectiveKind::Sds, ObjectiveKind::Sim] {
        same_bytes(&format!("{kind:?}"), &plain(), |c| c.objective = kind.into());
    }
    for ratio in [2, 5] {
        same_bytes(&format!("ratio {ratio}"), &labelled(), |c| c.backtrack.ratio = ratio);
    }
    same_bytes("one image, whose levels are one number", &plain(), |c| c.batch = 1);
    same_bytes("bf16 targets", &plain(), |c| c.memory.target = Precision::Bf16);
    same_bytes("guidance", &labelled(), |c| c.guidance = 2.5);
    same_bytes("guidance at some levels", &labelled(), |c| {
        (c.guidance, c.guidance_interval) = (2.5, [0.3, 2.0]);
    });
    let weaker = || plain().guided_by(gaussian(card(2), &[0.5, -0.6], &[0.9, 0.4])).unwrap();
    same_bytes("a weaker network", &weaker(), |c| c.guidance = 2.0);
    same_bytes("a weaker network at some levels, rescaled", &weaker(), |c| {
        (c.guidance, c.guidance_interval, c.guidance_rescale) = (2.0, [0.3, 2.0], 0.7);
    });
}

#[test]
fn an_imported_network_is_rehearsed_too() {
    let teacher = digits();
    same_bytes("digits", &teacher, |c| {
        (c.batch, c.degrade.steps, c.degrade.nodes, c.backtrack.updates) = (3, 6, 1.into(), 7);
        c.student.sigma_init = 0.0;
        (c.degrade.lr, c.backtrack.lr_generator, c.backtrack.lr_fake) = (1e-4, 1e-4, 1e-4);
    });
    // Of three images everything is within a mebibyte, and nothing is computed again.
    for (batch, recomputes) in [(3, false), (12, true)] {
        let before = RUN_AGAIN.get();
        same_bytes("digits with recomputation", &teacher, |c| {
            (c.batch, c.degrade.steps, c.degrade.nodes, c.backtrack.updates) = (batch, 6, 1.into(), 7);
            c.student.sigma_init = 0.0;
            c.memory.activations_mib = 1;
        });
        assert_eq!(RUN_AGAIN.get() > before, recomputes, "{batch} images");
    }
}

#[test]
fn what_cannot_be_recorded_is_refused() {
    let refused = |sets: &[&str], why: &str| {
        let mut all = vec!["cuda_graphs=true".to_owned()];
        all.extend(sets.iter().map(|s| (*s).to_owned()));
        let e = Config::resolve(None, &all).unwrap_err().to_string();
        assert!(e.contains("cuda_graphs") && e.contains(why), "{e}");
    };
    refused(&["accumulate=2"], "accumulate");
    refused(&["student.sigmas=[1.0]"], "student.sigmas");
    refused(&["gan.data=images.npz"], "gan.data");
    let dir = tempfile::tempdir().unwrap();
    let c = Config { cuda_graphs: true, ..config() };
    let e = run(dir.path(), &c, &plain(), None).unwrap_err().to_string();
    assert!(e.contains("CUDA device"), "{e}");
}
