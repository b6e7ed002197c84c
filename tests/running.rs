//! Runs as schedulers, terminals and disks treat them: signals, time limits, second processes, changed files, too little memory. What
//! is resumed ends with the bytes of a run that nothing happened to.
#![cfg(all(feature = "train", unix))]

#[path = "running/processes.rs"]
mod processes;
mod support;
#[allow(dead_code, reason = "each test target uses its own part")]
#[path = "../src/runtime/testing.rs"]
mod testing;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use disback::{onnx, tensor};

const TEACHER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits/teacher.onnx");

/// Few images, steps enough to be met in the middle.
const SMALL: &str = "--device cpu --threads 1 --batch 2 --nodes 2 --degrade-steps 30 --updates 30 --set backtrack.switch_every=8 \
                     --set log.every=4 --set log.samples=0 --set log.checkpoint_every=5 --set degrade.lr=1e-3 --lr 1e-4";

fn distill(dir: &Path, run: &str, more: &str) -> Command {
    let mut command = support::disback();
    let words = |text: &'static str| text.split_whitespace().collect::<Vec<_>>();
    // What `more` says anew is left out. (Every option of `SMALL` has a value.)
    let small = words(SMALL);
    let kept = small.chunks(2).filter(|pair| pair[0] == "--set" || !more.split_whitespace().any(|w| w == pair[0]));
    command.args(["distill", TEACHER, "-o", run]).args(kept.flatten()).args(more.split_whitespace());
    command.current_dir(dir).env_remove("SLURM_JOB_END_TIME").env_remove("WORLD_SIZE");
    command
}

fn said(out: &Output) -> (Option<i32>, String) {
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    (out.status.code(), text)
}

fn output(mut command: Command) -> (Option<i32>, String) {
    said(&command.output().unwrap())
}

fn lines(path: PathBuf) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn student(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("student.onnx")).unwrap()
}

/// The iteration of the newest checkpoint, stage 2 counted after stage 1.
fn reached(run: &Path) -> u64 {
    let Ok(text) = std::fs::read(run.join("checkpoints/latest.json")) else { return 0 };
    let state: serde_json::Value = serde_json::from_slice(&text).unwrap();
    state["iteration"].as_u64().unwrap() + if state["stage"] == "backtrack" { 30 } else { 0 }
}

/// Waits until a run has written a further checkpoint; false: it ended before.
fn goes_on(child: &mut Child, run: &Path, before: u64) -> bool {
    let started = Instant::now();
    while reached(run) <= before {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(started.elapsed() < Duration::from_secs(300));
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

fn kill(child: &Child, signal: &str) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success(), "{signal}");
}

#[test]
fn whatever_ends_a_run_it_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    assert_eq!(output(distill(dir, "whole", "")).0, Some(0));
    let run = dir.join("run");
    // The job is over before it begins: one step, a checkpoint, and the code that says `again`.
    let mut late = distill(dir, "run", "--resume=auto");
    let (code, text) = output({
        late.env("SLURM_JOB_END_TIME", "1");
        late
    });
    assert_eq!((code, reached(&run)), (Some(75), 1), "{text}");
    let again = || distill(dir, "run", "--resume=auto --quiet");
    for signal in ["-USR1", "-USR2", "-XCPU", "-TERM", "-KILL"] {
        let mut child = again().stderr(Stdio::piped()).spawn().unwrap();
        if !goes_on(&mut child, &run, reached(&run)) {
            break;
        }
        kill(&child, signal);
        if signal == "-TERM" {
            // The same wish once more.
            kill(&child, signal);
        }
        let (code, text) = said(&child.wait_with_output().unwrap());
        // (A slow machine may let it end before the signal arrives.)
        let expected = if signal == "-KILL" { None } else { Some(75) };
        assert!(code == expected || code == Some(0), "{signal}: {code:?} {text}");
        assert_eq!(run.join("run.lock").exists(), code.is_none(), "{signal}");
    }
    // A flipped byte in the newest checkpoint: said, and the one before it is taken.
    let newest = std::fs::read(run.join("checkpoints/latest.json")).unwrap();
    let newest: serde_json::Value = serde_json::from_slice(&newest).unwrap();
    let path = run.join("checkpoints").join(newest["file"].as_str().unwrap());
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&path, bytes).unwrap();
    // A half-written file of a killed process goes.
    std::fs::write(run.join("checkpoints/.disback-abc"), "half").unwrap();
    // Ignored when the program starts (nohup, a script's background job), SIGHUP and SIGINT stay ignored.
    let command = again();
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP INT; exec \"$@\"", "sh"]).arg(command.get_program()).args(command.get_args());
    let mut child = shell.current_dir(dir).stderr(Stdio::piped()).spawn().unwrap();
    let pid = format!("\"pid\":{},", child.id());
    while child.try_wait().unwrap().is_none() {
        if std::fs::read_to_string(run.join("run.lock")).is_ok_and(|text| text.contains(&pid)) {
            ["-HUP", "-INT"].into_iter().for_each(|signal| kill(&child, signal));
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let (code, text) = said(&child.wait_with_output().unwrap());
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("was changed after it was written; going on from the checkpoint before it"), "{text}");
    assert!(!run.join("checkpoints/.disback-abc").exists() && !run.join("run.lock").exists());
    assert!(student(&run) == student(&dir.join("whole")));
    // What was measured on the way is the same too, but for times.
    let rows = |name: &str, file: &str| {
        let mut rows = lines(dir.join(name).join(file));
        for row in &mut rows {
            let fields = row.as_object_mut().unwrap();
            ["seconds", "images_per_s"].iter().for_each(|key| drop(fields.remove(*key)));
        }
        rows
    };
    for file in ["metrics.jsonl", "levels.jsonl"] {
        assert_eq!(rows("run", file), rows("whole", file), "{file}");
    }
}

#[test]
fn one_process_works_in_a_run_folder_and_only_the_same_run_goes_on() {
    use disback::distill::lock::RunLock;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let labels = |values: &[i64]| {
        let array = disback::tensor::HostTensor::vec(values);
        disback::io::npy::write_npz(&dir.join("data/labels.npz"), &[("labels", &array)]).unwrap();
    };
    std::fs::create_dir_all(dir.join("data")).unwrap();
    labels(&[1, 2, 3]);
    let short = "--degrade-steps 2 --nodes 1 --updates 2 --freeze *bias* --set conditions.file=labels.npz";
    assert_eq!(output(distill(&dir.join("data"), "../run", short)).0, Some(0));
    let whole = student(&dir.join("run"));
    // Moved, from another folder, without what the run remembers.
    std::fs::rename(dir.join("run"), dir.join("moved")).unwrap();
    let resume = |more: &str| {
        let mut command = support::disback();
        command.args(["distill", TEACHER, "-o", "moved", "--resume", "--quiet"]).args(more.split_whitespace());
        output({
            command.current_dir(dir);
            command
        })
    };
    std::fs::remove_file(dir.join("moved/student.onnx")).unwrap();
    let (code, text) = resume("");
    assert_eq!(code, Some(0), "{text}");
    assert!(student(&dir.join("moved")) == whole);
    // Its weights are those that it trained: what reads them asks for no more.
    for args in [
        "export TEACHER --run moved -o again.onnx",
        "verify moved/student.onnx --teacher TEACHER --images 2 --no-python",
    ] {
        let mut command = support::disback();
        command.args(args.split_whitespace().map(|a| if a == "TEACHER" { TEACHER } else { a }));
        command.current_dir(dir);
        let (code, text) = output(command);
        assert_eq!(code, Some(0), "{args}: {text}");
    }
    for (args, says) in [
        ("--freeze *weight*", "began with --freeze *bias*, now it is *weight*"),
        ("--train *bias*", "began with --train nothing, now it is *bias*"),
        ("--threads 2", "1 CPU threads, now it is 2"),
        ("--set conditions.file=", "conditions.file"),
    ] {
        let (code, text) = resume(args);
        assert!(code == Some(2) && text.contains(says), "{args}: {text}");
    }
    // The same content elsewhere is the same run; another content in the same place is not.
    std::fs::copy(dir.join("data/labels.npz"), dir.join("copy.npz")).unwrap();
    let (code, text) = resume("--set conditions.file=copy.npz");
    assert_eq!(code, Some(0), "{text}");
    std::fs::remove_file(dir.join("copy.npz")).unwrap();
    labels(&[1, 2, 4]);
    let (code, text) = resume("--set conditions.file=data/labels.npz");
    assert!(
        code == Some(2) && text.contains("conditions.file: what it names is not what the run began with"),
        "{text}"
    );
    let held = RunLock::take(&dir.join("moved"), false).unwrap();
    let (code, text) = resume("");
    let says = format!("moved: process {} on ", std::process::id());
    assert!(code == Some(2) && text.contains(&says) && text.contains("works in this run folder"), "{text}");
    drop(held);
}

#[test]
fn memory_is_foreseen_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let limited = |more: &str| {
        let command = distill(dir.path(), "run", more);
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -v 20000000; exec \"$@\"", "sh"]).arg(command.get_program()).args(command.get_args());
        output({
            shell.current_dir(dir.path());
            shell
        })
    };
    for more in ["--batch 1000000 --dry-run", "--batch 1000000"] {
        let (code, text) = limited(more);
        assert!(code == Some(2) && text.contains("at batch 1000000, but") && text.contains("free"), "{text}");
        assert!(text.contains("what would fit: --batch") && text.contains("--accumulate"), "{text}");
        assert!(!dir.path().join("run").exists());
    }
    let (code, text) = limited("--accumulate 6 --batch auto --updates 1 --degrade-steps 2 --nodes 1");
    assert!(code == Some(0) && text.contains("--batch auto: batch 768, accumulate 1"), "{text}");
}

/// Faults of the file system, put between the program and the C library (`tests/faults/faults.c`): an error, nothing half-written, and
/// the run goes on to the same bytes.
#[cfg(target_os = "linux")]
#[test]
fn a_file_system_with_faults_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let library = dir.join("faults.so");
    let source = support::root().join("tests/faults/faults.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).arg("-ldl").status();
    if !built.is_ok_and(|status| status.success()) {
        println!("not run: no C compiler here");
        return;
    }
    let short = "--degrade-steps 4 --updates 4 --nodes 1 --set log.checkpoint_every=2";
    assert_eq!(output(distill(dir, "whole", short)).0, Some(0));
    let whole = student(&dir.join("whole"));
    let run = dir.join("run");
    let faulty = |fault: &str| {
        let mut command = distill(dir, "run", &format!("{short} --resume=auto --quiet"));
        output({
            command.env("LD_PRELOAD", &library).env("FAULT_UNDER", &run).env("FAULT", fault);
            command
        })
    };
    // Every write short, which is no fault.
    let (code, text) = faulty("short=1");
    assert_eq!(code, Some(0), "{text}");
    assert!(student(&run) == whole);
    std::fs::remove_dir_all(&run).unwrap();
    let mut failed = 0;
    for fault in ["rename=1", "fsync=9", "write=40", "rename=9", "fsync=4"] {
        let (code, text) = faulty(fault);
        assert!(code == Some(1) || code == Some(0), "{fault}: {code:?} {text}");
        let named = text.contains("Input/output error") || text.contains("no space left");
        assert!(code == Some(0) || named, "{fault}: {text}");
        failed += usize::from(code == Some(1));
        // Whatever has a name is whole.
        for entry in std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if name.ends_with(".safetensors") {
                disback::torch::params::load_tensors(&entry.path()).unwrap();
            }
        }
    }
    assert!(failed >= 3, "{failed} of 5 faults were met");
    let (code, text) = output(distill(dir, "run", &format!("{short} --resume=auto --quiet")));
    assert_eq!(code, Some(0), "{text}");
    assert!(student(&run) == whole);
}

#[test]
fn a_sweep_runs_every_combination_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("first.toml"), "batch = 9\nthreads = 1\n[degrade]\nnodes = 1\nsteps = 2\n").unwrap();
    std::fs::write(dir.join("second.toml"), "batch = 3\ndevice = \"cpu\"\n[log]\nsamples = 0\n").unwrap();
    let line =
        |more: &str| format!("sweep {TEACHER} -o sweep -c first.toml -c second.toml --set backtrack.updates=2 {more}");
    // What cannot be is said before the first run.
    let code = support::refused(dir, &line("--set objective=sid,nonsense"), "nonsense");
    assert!(code == 2 && !dir.join("sweep").exists());
    assert_eq!(support::refused(dir, &line("--set seed=1"), "nothing to sweep"), 2);
    support::refused(dir, &line("--set seed=1,2 -c none.toml"), "none.toml: no such configuration file");
    let more = "--set seed=1,2 --set evaluate.reference=none.npz,";
    assert_eq!(support::refused(dir, &line(more), "none of them empty"), 2);
    // One of two cannot start: the other is made, and the code says so.
    let (code, _, text) = support::run(dir, &line("--set seed=1,2 --set student.file=\"\",\"none.onnx\""));
    assert_eq!(code, Some(1), "{text}");
    let rows: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(dir.join("sweep/sweep.json")).unwrap()).unwrap();
    let outcomes: Vec<&str> = rows.iter().map(|r| r["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["finished", "failed", "finished", "failed"], "{text}");
    assert!(rows[1]["error"].as_str().unwrap().contains("none.onnx") && rows[0]["seconds"].as_f64().unwrap() > 0.0);
    let student = PathBuf::from(rows[2]["student"].as_str().unwrap());
    assert!(dir.join(&student).is_file() && student.ends_with("seed=2,file=/student.onnx"), "{student:?}");
    // The later file won.
    let config = std::fs::read_to_string(dir.join(&student).with_file_name("config.toml")).unwrap();
    assert!(config.contains("batch = 3") && config.contains("steps = 2"), "{config}");
    let before = std::fs::read(dir.join(&student)).unwrap();
    support::ok(dir, &line("--set seed=1,2 --set student.file=\"\" --json"));
    assert!(dir.join("sweep/seed=1/student.onnx").is_file() && std::fs::read(dir.join(&student)).unwrap() == before);
}

#[test]
fn what_is_no_teacher_is_told_what_makes_one() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("pipeline")).unwrap();
    std::fs::write(dir.join("net.safetensors"), [8, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']).unwrap();
    std::fs::write(dir.join("student.onnx"), testing::student("batch")).unwrap();
    for (line, code, says) in [
        ("distill pipeline -o run", 1, "disback-convert diffusers FOLDER"),
        ("distill net.safetensors -o run", 1, "disback-convert torch MODULE:FUNCTION --state-dict FILE"),
        ("distill student.onnx -o run", 2, "a student that disback made, expected a teacher"),
        ("export student.onnx -o student.engine", 2, "only ONNX is written"),
    ] {
        assert_eq!(support::refused(dir, line, says), code, "{line}");
    }
    let line = format!("distill {TEACHER} -o run -c none.toml");
    assert_eq!(support::refused(dir, &line, "none.toml: no such configuration file"), 2);
    assert!(!dir.join("run").exists());
}
