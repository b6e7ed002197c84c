//! A run as a library call.

use super::*;

#[test]
fn a_library_call_makes_the_bytes_that_the_command_makes() {
    use disback::run::{Finished, Request, Resume, Session};
    use std::sync::atomic::Ordering;

    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(dir, &with(&["distill", TEACHER, "-o", "command"], SMALL));
    let keys = [
        "device=cpu",
        "threads=1",
        "batch=4",
        "degrade.nodes=2",
        "degrade.steps=4",
        "degrade.lr=1e-3",
        "backtrack.updates=5",
        "backtrack.lr_generator=1e-4",
        "backtrack.lr_fake=1e-4",
        "backtrack.switch_every=2",
        "log.every=1",
        "log.samples=2",
        "log.sample_steps=2",
    ];
    let follower = std::sync::Arc::new(Follower::default());
    let request = |out: &str| {
        let asked = Request { monitor: follower.clone(), ..Request::new(TEACHER, dir.join(out)) };
        keys.iter().fold(asked, |asked, pair| asked.set(*pair))
    };
    let Finished::Distilled(made) = Session::open(request("library")).unwrap().distill().unwrap() else {
        panic!("the run did not end with a student")
    };
    assert_eq!(made.student(), &dir.join("library/student.onnx"));
    assert!(made.failed().is_none() && made.skipped_steps == 0);
    for file in ["student.onnx", "student.safetensors", "config.toml", "card.toml"] {
        let read = |run: &str| std::fs::read(dir.join(run).join(file)).unwrap();
        assert!(read("library") == read("command"), "{file}");
    }
    assert!(dir.join("library/report.html").is_file() && dir.join("library/summary.json").is_file());
    assert_eq!(follower.rows.load(Ordering::Relaxed), 9);
    let notes = follower.notes.lock().unwrap().clone();
    assert_eq!(notes[..3], ["node 0 recorded", "node 1 recorded", "node 2 recorded"], "{notes:?}");

    // Stopped from outside after its first step, it goes on to the same bytes.
    let stopped = request("stopped");
    stopped.stop.store(true, Ordering::Relaxed);
    let stopped = Session::open(stopped).unwrap().distill().unwrap();
    assert!(matches!(stopped, Finished::Stopped(stage) if stage.name() == "degrade"), "{stopped:?}");
    // What a killed start left of its rehearsed export goes; what is not ours stays.
    for name in [".disback-export-x1", ".mine"] {
        std::fs::create_dir_all(dir.join("stopped").join(name).join("inside")).unwrap();
    }
    let again = Request { resume: Resume::Always, ..Request::new(TEACHER, dir.join("stopped")) };
    assert!(matches!(Session::open(again).unwrap().distill().unwrap(), Finished::Distilled(_)));
    assert!(weights(&dir.join("stopped")) == weights(&dir.join("command")));
    assert!(!dir.join("stopped/.disback-export-x1").exists() && dir.join("stopped/.mine/inside").is_dir());
    // A request that cannot be carried out leaves nothing.
    let broken = request("broken").set("student.sigma_init=-1");
    assert!(Session::open(broken).is_err() && !dir.join("broken").exists());
}
