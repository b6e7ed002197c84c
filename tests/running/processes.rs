//! A run that several processes share, as launchers start them: same bytes as one process, one writer, and faults that are told.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{distill, goes_on, kill, lines, output, reached, said, student};
use crate::support;

/// One micro-batch for each of two processes.
const TWO: &str = "--accumulate 2 --degrade-steps 12 --updates 12 --set backtrack.switch_every=4";

fn port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

/// A command as process `rank` of two that meet at `port`.
fn ranked(mut command: Command, rank: usize, port: &str) -> Command {
    command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string()).env("WORLD_SIZE", "2");
    command.env("LOCAL_WORLD_SIZE", "2").env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port);
    command.stderr(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// Starts both processes; what the second one gets may differ.
fn pair(dir: &std::path::Path, run: &str, more: [&str; 2]) -> [Child; 2] {
    let port = port();
    [0, 1].map(|rank| ranked(distill(dir, run, more[rank]), rank, &port).spawn().unwrap())
}

fn ended(children: [Child; 2]) -> [(Option<i32>, String); 2] {
    children.map(|child| said(&child.wait_with_output().unwrap()))
}

#[test]
fn two_processes_end_with_the_bytes_of_one_and_one_goes_on_alone() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // One process of a world of one is a process as before.
    let mut alone = distill(dir, "whole", TWO);
    alone.env("WORLD_SIZE", "1").env("RANK", "0");
    let (code, text) = output(alone);
    assert_eq!(code, Some(0), "{text}");
    let [first, second] = ended(pair(dir, "run", [TWO, TWO]));
    assert_eq!((first.0, second.0), (Some(0), Some(0)), "{}{}", first.1, second.1);
    assert!(student(&dir.join("run")) == student(&dir.join("whole")));
    assert!(second.1.is_empty(), "one process speaks: {}", second.1);
    let steps = |run: &str| {
        let rows = lines(dir.join(run).join("metrics.jsonl"));
        rows.iter().map(|r| (r["stage"].to_string(), r["iteration"].as_u64())).collect::<Vec<_>>()
    };
    assert_eq!(steps("run"), steps("whole"));
    // A signal to one of them stops both, with the code that says `again`; one process alone goes on.
    let more = format!("{TWO} --resume=auto");
    let mut children = pair(dir, "stopped", [&more, &more]);
    assert!(goes_on(&mut children[0], &dir.join("stopped"), 0));
    kill(&children[1], "-TERM");
    let [first, second] = ended(children);
    assert_eq!((first.0, second.0), (Some(75), Some(75)), "{}{}", first.1, second.1);
    let (code, text) = output(distill(dir, "stopped", &more));
    assert_eq!(code, Some(0), "{text}");
    assert!(student(&dir.join("stopped")) == student(&dir.join("whole")));
}

#[test]
fn processes_that_cannot_work_together_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let other = format!("{TWO} --lr 2e-4");
    for (more, says) in [
        ([TWO, other.as_str()], "the configuration given by options and --set is"),
        (["--accumulate 1", "--accumulate 1"], "--batch 1 --accumulate 2 has the same images an update"),
    ] {
        for (code, text) in ended(pair(dir, "run", more)) {
            assert!(code == Some(2) && text.contains(says), "{code:?} {text}");
        }
        assert!(!dir.join("run").exists());
    }
    // A teacher that is another one in the second place.
    let elsewhere = dir.join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let shapes = support::root().join("examples/shapes/teacher.onnx");
    let port = port();
    let mut second = support::disback();
    second.arg("distill").arg(shapes).args(["-o", "run"]).args(distill(dir, "run", TWO).get_args().skip(4));
    second.current_dir(&elsewhere);
    let first = ranked(distill(dir, "run", TWO), 0, &port).spawn().unwrap();
    let second = ranked(second, 1, &port).spawn().unwrap();
    for (code, text) in ended([first, second]) {
        assert!(code == Some(2) && text.contains("the teacher (SHA-256"), "{code:?} {text}");
    }
    assert!(!dir.join("run").exists());
    // What no launcher has set up.
    let mut lost = distill(dir, "run", TWO);
    lost.env("WORLD_SIZE", "2").env_remove("RANK");
    let (code, text) = output(lost);
    assert!(code == Some(2) && text.contains("RANK is not set"), "{text}");
}

#[test]
fn a_process_that_hangs_or_dies_ends_the_run_without_half_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let long = "--accumulate 2 --degrade-steps 4000 --rank-timeout 4s --resume=auto";
    let whole = |run: &std::path::Path| {
        let newest = std::fs::read(run.join("checkpoints/latest.json")).unwrap();
        let newest: serde_json::Value = serde_json::from_slice(&newest).unwrap();
        disback::torch::params::load_tensors(&run.join("checkpoints").join(newest["file"].as_str().unwrap())).unwrap();
    };
    for signal in ["-KILL", "-STOP"] {
        let name = format!("run{signal}");
        let run = dir.join(&name);
        let mut children = pair(dir, &name, [long, long]);
        assert!(goes_on(&mut children[0], &run, 0));
        kill(&children[1], signal);
        let started = Instant::now();
        let [first, mut second] = children;
        let (code, text) = said(&first.wait_with_output().unwrap());
        assert!(started.elapsed() < Duration::from_secs(60));
        assert!(code == Some(1) && text.contains("rank 0: another process of this run"), "{code:?} {text}");
        let says = if signal == "-STOP" { "does not answer within 4 s" } else { "has ended" };
        assert!(text.contains(says) && text.contains("--resume"), "{text}");
        // Only checkpoints that were due: every 5 steps.
        assert!(reached(&run) > 0 && reached(&run).is_multiple_of(5), "{}", reached(&run));
        whole(&run);
        let _ = second.kill();
        let _ = second.wait();
    }
}

/// torchrun itself: a killed process, the same command once more, the same bytes.
#[test]
fn torchrun_starts_a_run_again_that_has_lost_a_process() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let more = format!("{TWO} --resume=auto");
    assert_eq!(output(distill(dir, "whole", TWO)).0, Some(0));
    let plain = distill(dir, "run", &more);
    let mut command = Command::new(support::python());
    command.args([
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--no-python",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]);
    command.arg(plain.get_program()).args(plain.get_args()).current_dir(dir);
    command.env("TORCHELASTIC_ERROR_FILE", dir.join("errors.json"));
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    assert!(goes_on(&mut child, &dir.join("run"), 0));
    // The process that leads: its lock says which it is.
    let lock: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("run/run.lock")).unwrap()).unwrap();
    let killed = Command::new("kill").args(["-KILL", &lock["pid"].to_string()]).status().unwrap();
    assert!(killed.success());
    let (code, text) = said(&child.wait_with_output().unwrap());
    assert_eq!(code, Some(0), "{text}");
    assert!(student(&dir.join("run")) == student(&dir.join("whole")));
}
