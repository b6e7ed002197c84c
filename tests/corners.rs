//! Random parameters of the operators whose corners implementations disagree about (Resize, pooling, padding, slicing, grid
//! sampling, convolutions) against ONNX Runtime: the same values, or a refusal with a reason.
#![cfg(feature = "train")]

mod support;

use std::collections::BTreeMap;

use disback::conformance::{Outcome, list, run_case};

/// Cases a family (three times as many of Resize).
const COUNT: &str = "60";
/// Share of a family that must be computed, not refused, in hundredths. Resize has the most forms to refuse.
const COMPUTED: usize = 70;

#[test]
fn random_corners_are_equal_or_refused() {
    tch::set_num_threads(1);
    let dir = support::folder("corners");
    support::run_python("tests/python/corner_cases.py", &[dir.to_str().unwrap(), COUNT]);
    let mut families: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    let mut failures = Vec::new();
    for dir in list(&dir).unwrap() {
        let case = run_case(&dir, false);
        let family = case.name.rsplit_once('_').unwrap().0.to_owned();
        let (passed, all) = families.entry(family).or_default();
        *all += 1;
        let reason = case.reason.unwrap_or_default();
        match case.outcome {
            Outcome::Passed => *passed += 1,
            Outcome::Refused if reason.contains("help:") => {}
            outcome => failures.push(format!("{}: {outcome:?} {reason}", case.name)),
        }
    }
    assert!(failures.is_empty(), "{} cases fail:\n{}", failures.len(), failures.join("\n"));
    assert_eq!(families.len(), 7, "{families:?}");
    for (family, (passed, all)) in families {
        assert!(all >= 40 && passed * 100 >= all * COMPUTED, "{family}: {passed} of {all}");
    }
}
