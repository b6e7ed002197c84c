//! `disback compare` on the digits teacher: curves, files, a verdict, and that finished runs are not repeated.
#![cfg(all(feature = "train", any(feature = "ort", feature = "tract")))]

use std::path::Path;
use std::process::{Command, Output, Stdio};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits");

fn compare(dir: &Path, more: &[&str]) -> Output {
    command(dir, more).output().unwrap()
}

fn command(dir: &Path, more: &[&str]) -> Command {
    let file = |name: &str| format!("{DIGITS}/{name}");
    let mut args: Vec<String> = vec!["compare".into(), file("teacher.onnx"), "--json".into()];
    args.extend(["--reference".into(), file("digits.npz"), "--features".into(), file("classifier.onnx")]);
    for set in ["device=cpu", "threads=1", "batch=4", "degrade.steps=3", "backtrack.updates=4", "log.samples=0"] {
        args.extend(["--set".into(), set.into()]);
    }
    for (option, value) in [("-o", "out"), ("--seeds", "0,1")] {
        if !more.contains(&option) {
            args.extend([option.to_owned(), value.to_owned()]);
        }
    }
    let small = "--every 2 --samples 24 --set degrade.nodes=2 --set backtrack.switch_every=1";
    args.extend(small.split(' ').map(String::from));
    args.extend(more.iter().map(|s| (*s).to_owned()));
    let mut command = Command::new(env!("CARGO_BIN_EXE_disback"));
    command.args(args).current_dir(dir).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn both_arms_are_run_judged_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let out = compare(dir.path(), &[]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let result: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    for (arm, nodes) in [("base", 0), ("trajectory", 2)] {
        let curves = result[arm].as_array().unwrap();
        assert_eq!(curves.len(), 2);
        for curve in curves {
            assert_eq!(curve["nodes"], nodes);
            let points = curve["points"].as_array().unwrap();
            // Looks after updates 2 and 4. Images: stage 1 has 3 steps of 2 passes; an update student, fake score in training,
            // target and fake score.
            let forwards: Vec<u64> = points.iter().map(|p| p["forwards"].as_u64().unwrap()).collect();
            let before = if nodes > 0 { 3 * 2 * 4 } else { 0 };
            assert_eq!(forwards, [before + 2 * 4 * 4, before + 4 * 4 * 4]);
            assert!(points.iter().all(|p| p["distance"].as_f64().unwrap() > 0.0));
        }
    }
    assert!(result["comparison"]["final_ratio"]["low"].is_number(), "two seeds have an interval");
    let path = |name: &str| dir.path().join("out").join(name);
    let text = std::fs::read_to_string(path("compare.md")).unwrap();
    assert!(
        text.contains("share of forward passes") && text.contains(result["comparison"]["verdict"].as_str().unwrap())
    );
    assert!(std::fs::read_to_string(path("compare.svg")).unwrap().contains("<polygon"));

    // Again: read back, not run again; with other settings refused.
    let curve = path("base-seed-0/curve.json");
    let before = std::fs::metadata(&curve).unwrap().modified().unwrap();
    let again = compare(dir.path(), &[]);
    let second: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(second["base"], result["base"]);
    assert_eq!(std::fs::metadata(&curve).unwrap().modified().unwrap(), before);
    let other = compare(dir.path(), &["--set", "backtrack.lr_fake=1e-3"]);
    let text = String::from_utf8_lossy(&other.stderr);
    assert!(other.status.code() == Some(2) && text.contains("lr_fake"), "{text}");

    // Another trajectory beside it, at the first one's cost, with the runs of the base method that are there already.
    let budget = (3 * 2 + 4 * 4) * 4;
    let sets = ["--set", "degrade.nodes=1", "--set", "degrade.steps=1", "--budget", &budget.to_string()];
    let more = [&["-o", "next", "--beside", "out"], &sets[..]].concat();
    let next = compare(dir.path(), &more);
    assert!(next.status.success(), "{}", String::from_utf8_lossy(&next.stderr));
    let third: serde_json::Value = serde_json::from_slice(&next.stdout).unwrap();
    let last = |arm: &str| third[arm][0]["points"].as_array().unwrap().last().unwrap()["updates"].clone();
    // 5 updates of either arm pay for themselves (beside 1 step of stage 1 or none); looks are after every second and after the last.
    assert_eq!((last("base"), last("trajectory")), (5.into(), 5.into()));
    let text = std::fs::read_to_string(dir.path().join("next/compare.md")).unwrap();
    assert_eq!(text.matches("Command: `").count(), 2, "{text}");
    let svg = std::fs::read_to_string(dir.path().join("next/compare.svg")).unwrap();
    assert_eq!(svg.matches("<polygon").count(), 12);
}

#[test]
fn a_killed_comparison_goes_on_and_ends_alike() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["--seeds", "3", "--set", "log.checkpoint_every=3", "--set", "backtrack.updates=9"];
    let with = |out: &'static str| [&["-o", out], &sets[..]].concat();
    let whole = compare(dir.path(), &with("whole"));
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
    let mut process = command(dir.path(), &with("cut")).spawn().unwrap();
    // Killed as soon as the run with the trajectory has been looked at for the first time.
    let looks = dir.path().join("cut/trajectory-seed-3/looks.json");
    let looked = || std::fs::read_to_string(&looks).is_ok_and(|t| t.contains("\"updates\""));
    while !looked() && process.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let _ = process.kill();
    process.wait().unwrap();
    let again = compare(dir.path(), &with("cut"));
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    let curves = |out: &Output| {
        let result: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        ["base", "trajectory"].map(|arm| {
            let points = result[arm][0]["points"].as_array().unwrap().iter();
            points.map(|p| (p["updates"].clone(), p["forwards"].clone(), p["distance"].clone())).collect::<Vec<_>>()
        })
    };
    assert_eq!(curves(&again), curves(&whole));
    // After 2, 4, 6 and 8 updates, and after the last.
    assert_eq!(curves(&whole)[1].len(), 5);
    assert!(!looks.exists());
}

#[test]
fn without_nodes_there_is_nothing_to_compare() {
    let dir = tempfile::tempdir().unwrap();
    let out = compare(dir.path(), &["--set", "degrade.nodes=0"]);
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(2) && text.contains("no trajectory"), "{text}");
    assert!(!dir.path().join("out").exists());
    // A folder of something else is left as it is.
    std::fs::create_dir(dir.path().join("out")).unwrap();
    std::fs::write(dir.path().join("out/config.toml"), "").unwrap();
    let out = compare(dir.path(), &[]);
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(2) && text.contains("something other than a comparison"), "{text}");
    assert_eq!(std::fs::read_dir(dir.path().join("out")).unwrap().count(), 1);
}
