//! Our side: the product itself, `distill` on an imported teacher and the exported student in ONNX Runtime, driven over
//! standard input like `benches/peer.py` so that contenders can alternate, each in a process of its own.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use disback::diffusion::Denoiser;
use disback::distill::{Config, Job, RunDir, Stages, distill, estimate};
use disback::distill::{Observer, Step, Wish};
use disback::error::{Error, Result};
use disback::export::{StudentOptions, student};
use disback::run::Teacher;
use disback::runtime::student::SampleRequest;
use disback::runtime::{EngineKind, EngineOptions, Student};
use disback::tensor::HostTensor;
use disback::torch::Forward;
use disback::torch::dist::World;
use disback::torch::profile::OperatorTimes;
use disback::torch::training::{count_memory, counted_memory};
use prost::Message;
use serde_json::{Value, json};

pub struct Task {
    pub model: String,
    pub phase: String,
    /// `f32` or `bf16`.
    pub precision: String,
    pub batch: usize,
    pub threads: usize,
    pub device: String,
}

fn say(value: &Value) {
    println!("{value}");
    let _ = std::io::stdout().flush();
}

fn read() -> Option<(String, u64)> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).ok()?;
    let (word, n) = line.trim().split_once(' ')?;
    Some((word.to_owned(), n.parse().ok()?))
}

/// Seconds on a clock that only runs on.
fn now() -> f64 {
    if std::env::var_os("DISBACK_BENCH_CPU").is_some() {
        let of = |text: std::io::Result<String>| text.ok()?.split(' ').next()?.parse::<f64>().ok();
        let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        return tasks.filter_map(|t| of(std::fs::read_to_string(t.path().join("schedstat")))).sum::<f64>() * 1e-9;
    }
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Highest resident size since the last reset, in MiB.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.trim().trim_end_matches("kB").trim().parse::<f64>().unwrap_or(f64::NAN) / 1024.0
}

/// The configuration with these keys and those of `DISBACK_BENCH_SET`.
fn configured(sets: &[String]) -> Result<Config> {
    let more = std::env::var("DISBACK_BENCH_SET").unwrap_or_default();
    let sets: Vec<String> = sets.iter().cloned().chain(more.split_whitespace().map(str::to_owned)).collect();
    Config::resolve(None, &sets)
}

/// Answers commands until there are none.
pub fn serve(task: &Task) -> Result<()> {
    count_memory();
    disback::torch::device::set_threads(task.threads);
    let device = disback::torch::device::parse(&task.device)?;
    let teacher = Teacher::load(Path::new(&task.model), &Default::default(), device)?;
    if let Some(batch) = task.phase.strip_prefix("call") {
        return calls(&teacher, batch.parse().unwrap_or(1), task.threads);
    }
    let specs = teacher.inputs();
    let card = Arc::new(teacher.card.card);
    let denoiser = Denoiser::new(Box::new(teacher.network), card, &specs)?;
    let (stages, ratio) = match task.phase.as_str() {
        "stage1" => (Stages::Degrade, 1),
        "stage2r5" => (Stages::Both, 5),
        _ => (Stages::Both, 1),
    };
    let folder = tempfile::tempdir()?;
    let sets = [
        format!("batch={}", task.batch),
        format!("threads={}", task.threads),
        format!("device={}", task.device),
        format!("precision={}", task.precision),
        "log.samples=0".into(),
        "log.checkpoint_every=0".into(),
        format!("degrade.nodes={}", usize::from(stages == Stages::Degrade)),
        "degrade.steps=1000000".into(),
        "backtrack.updates=1000000".into(),
        format!("backtrack.ratio={ratio}"),
        "ema.half_life=10000".into(),
    ];
    let config = configured(&sets)?;
    let run = RunDir::create(&folder.path().join("run"), &config)?;
    let stop = AtomicBool::new(false);
    let mut clock = Clock::new(ratio as u64);
    let job = Job {
        config: &config,
        student: None,
        run: &run,
        observer: &mut clock,
        stop: &stop,
        silent: true,
        world: World::alone(),
    };
    match distill(job, &denoiser, stages) {
        Err(_) if clock.ended => Ok(()),
        other => other.map(drop),
    }
}

/// The estimate of both stages, in MiB.
pub fn estimated(task: &Task) -> Result<()> {
    let teacher = Teacher::load(Path::new(&task.model), &Default::default(), tch::Device::Cpu)?;
    let specs = teacher.inputs();
    let card = Arc::new(teacher.card.card);
    let denoiser = Denoiser::new(Box::new(teacher.network), card, &specs)?;
    let sets = [format!("batch={}", task.batch), format!("precision={}", task.precision)];
    let found = estimate::estimate(&denoiser, None, &configured(&sets)?, 1)?;
    say(&json!({"stage1": found.degrade.total >> 20, "stage2": found.backtrack.total >> 20}));
    Ok(())
}

/// Stands inside the loop: between two iterations it waits for the next command.
struct Clock {
    warm_up: u64,
    left: u64,
    block: u64,
    started: f64,
    times: Option<OperatorTimes>,
    ended: bool,
}

impl Clock {
    fn new(ratio: u64) -> Self {
        let warm_up = if ratio > 1 { ratio } else { 2 };
        Self { warm_up, left: 0, block: 0, started: now(), times: None, ended: false }
    }

    /// False where there is nothing more to do.
    fn next(&mut self) -> bool {
        let Some((word, n)) = read() else { return false };
        (self.left, self.block) = (n, n);
        self.times = (word == "profile").then(OperatorTimes::start);
        self.started = now();
        true
    }

    fn answer(&mut self) {
        let took = now() - self.started;
        let tensors = counted_memory(false).peak as f64 / (1 << 20) as f64;
        let mut answer = json!({"ms": took * 1e3 / self.block as f64, "peak_mb": peak_mib(), "tensors_mb": tensors});
        if let Some(times) = self.times.take() {
            let times = times.finish();
            let share = |d: std::time::Duration| d.as_secs_f64() / took;
            // The operators are timed by the wall.
            if std::env::var_os("DISBACK_BENCH_CPU").is_none() {
                answer["outside"] = json!(1.0 - share(times.inside));
            }
            let of = |o: &disback::torch::profile::Operator| json!([o.name, o.calls, 100.0 * share(o.own)]);
            answer["operators"] = times.operators.iter().map(of).collect();
        }
        say(&answer);
    }
}

impl Observer for Clock {
    fn after_step(&mut self, _step: &Step) -> Result<Wish> {
        let go_on = if self.warm_up > 0 {
            self.warm_up -= 1;
            if self.warm_up > 0 {
                true
            } else {
                say(&json!({"ready": true}));
                self.next()
            }
        } else {
            self.left -= 1;
            if self.left > 0 {
                true
            } else {
                self.answer();
                self.next()
            }
        };
        self.ended = !go_on;
        if go_on { Ok(Wish::default()) } else { Err(Error::usage("the bench has ended")) }
    }
}

/// Calls of the exported student in ONNX Runtime.
fn calls(teacher: &Teacher, batch: usize, threads: usize) -> Result<()> {
    let options = StudentOptions { method: "bench".into(), ..StudentOptions::default() };
    let exported = student(&teacher.network, teacher.network.params(), &teacher.card.card, &options)?.encode_to_vec();
    let options = EngineOptions { engine: EngineKind::Ort, threads: Some(threads), ..EngineOptions::default() };
    let mut student = Student::from_bytes(&exported, &options)?;
    let inputs = student.inputs(&SampleRequest::default(), 0, batch)?;
    let named: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    for _ in 0..2 {
        student.engine().run(&named)?;
    }
    say(&json!({"ready": true}));
    while let Some((_, n)) = read() {
        let started = now();
        for _ in 0..n {
            student.engine().run(&named)?;
        }
        say(&json!({"ms": (now() - started) * 1e3 / n as f64, "peak_mb": peak_mib()}));
    }
    Ok(())
}
