//! Filters with their channels last compute what they compute otherwise, and stay so through copies, nodes and the optimiser.

use super::*;
use crate::distill::config::MemoryFormat;
use crate::torch::cpu::group_norm::is_channels_last;

#[test]
fn channels_last_is_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = Config { batch: 4, ..config() };
    (c.degrade.steps, c.degrade.nodes, c.backtrack.updates, c.backtrack.switch_every) = (5, 2.into(), 6, 3);
    (c.degrade.lr, c.backtrack.lr_generator, c.backtrack.lr_fake) = (1e-4, 1e-4, 1e-4);
    c.student.sigma_init = 0.0;
    let run_with = |last: bool| {
        let mut c = c.clone();
        c.memory.format = if last { MemoryFormat::ChannelsLast } else { MemoryFormat::Contiguous };
        let (outcome, seen) = run(&dir.path().join(last.to_string()), &c, &digits(), None).unwrap();
        (finished(outcome), seen)
    };
    let ((plain, before), (last, after)) = (run_with(false), run_with(true));
    let (mut filters, mut moved) = (0, 0);
    for (a, b) in plain.params().tensors().iter().zip(last.params().tensors()) {
        let apart = (a - b).abs().max().double_value(&[]);
        assert!(apart < 2e-6 + 1e-4 * a.abs().max().double_value(&[]), "{:?}: {apart}", a.size());
        if let [_, c, h, w] = a.size()[..]
            && c > 1
            && h * w > 1
        {
            filters += 1;
            moved += usize::from(is_channels_last(b) && a.is_contiguous());
        }
    }
    assert!(filters > 5 && moved == filters, "{moved} of {filters} filters are laid out so at the end");
    for (a, b) in before.rows.iter().zip(&after.rows) {
        let (a, b) = (a.loss_fake.unwrap(), b.loss_fake.unwrap());
        assert!((a - b).abs() < 1e-4 * a.abs(), "{a} {b}");
    }
    // The file has its filters as they were.
    let saved = dir.path().join("true/student.safetensors");
    let read = crate::torch::params::load_tensors(&saved).unwrap();
    for (name, t) in &read {
        let own = last.params().iter().find(|(n, _)| n == name).map(|(_, t)| t);
        assert!(own.is_some_and(|own| own.size() == t.size() && own.equal(t)), "{name}");
    }
}
