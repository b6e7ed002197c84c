//! The loop does not wait for the device between two rows of metrics.

use super::*;
use crate::distill::objective::ObjectiveKind;
use crate::torch::training::HostReads;

/// Host reads of a run of both stages with so many steps and updates, one row of metrics each.
fn reads(kind: ObjectiveKind, ratio: u64, steps: u64) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let mut c = config();
    c.objective = kind.into();
    c.degrade.nodes = 1.into();
    c.degrade.steps = steps;
    c.backtrack.updates = steps;
    c.backtrack.ratio = ratio;
    c.backtrack.switch_every = 2;
    c.log.every = 1_000_000;
    let teacher = plain();
    let watch = HostReads::watch();
    finished(run(&dir.path().join("run"), &c, &teacher, None).unwrap().0);
    watch.count()
}

#[test]
fn more_steps_are_no_more_host_reads() {
    for kind in [ObjectiveKind::Dmd, ObjectiveKind::DiffInstruct] {
        for ratio in [1, 3] {
            let (few, many) = (reads(kind, ratio, 6), reads(kind, ratio, 18));
            assert!(few > 0, "the last row and the saved weights are read");
            assert_eq!(few, many, "{kind:?}, ratio {ratio}: the loop reads from the device");
        }
    }
}
