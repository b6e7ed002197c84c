//! One step of each stage and one student call on the digits network, ours beside native PyTorch eager: same machine, same
//! threads, same batch, alternating in one run. `cargo bench --bench step`; writes `benches/latest.json`.
//!
//! Ours is the product itself: `distill` on the imported teacher, logging and all, and the exported student in ONNX
//! Runtime. The peer is `benches/peer.py`. `DISBACK_BENCH_THREADS` and `DISBACK_BENCH_ROUNDS` change the defaults.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use disback::diffusion::Denoiser;
use disback::distill::{Config, Job, RunDir, Stages, Unobserved, distill, metrics};
use disback::error::Result;
use disback::export::{StudentOptions, student};
use disback::graph::TrainableChoice;
use disback::runtime::{EngineKind, EngineOptions, open_bytes};
use disback::teacher::Teacher;
use disback::tensor::HostTensor;
use disback::torch::Forward;
use prost::Message;
use serde_json::{Value, json};

const BATCH: usize = 128;
/// Steps between two looks at the clock.
const BLOCK: u64 = 10;

fn main() {
    // `cargo test` builds benches and passes --test: nothing to check there.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    if let Err(e) = run() {
        eprintln!("error: {e}");
        std::process::exit(1);
    }
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    let n = v.len();
    if n % 2 == 1 { v[n / 2] } else { (v[n / 2 - 1] + v[n / 2]) / 2.0 }
}

fn run() -> Result<()> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let threads = number("DISBACK_BENCH_THREADS", std::thread::available_parallelism().map_or(2, usize::from));
    let rounds = number("DISBACK_BENCH_ROUNDS", 5);
    let mut peer = Peer::start(&root, threads);
    let mut ours = Ours::new(&root, threads)?;
    println!("libtorch 2.11 against torch {}, {threads} threads, batch {BATCH}, {rounds} rounds", peer.version);
    println!(
        "{:<10} {:>10} {:>12} {:>7}   {:>12} {:>12}",
        "phase", "ours ms", "PyTorch ms", "ratio", "ours MiB", "PyTorch MiB"
    );
    let mut rows = Vec::new();
    for phase in ["stage1", "stage2", "call1", "call64"] {
        let (mut mine, mut theirs, mut peak) = (Vec::new(), Vec::new(), 0.0);
        for _ in 0..rounds {
            mine.push(ours.measure(phase)?);
            let answer = peer.measure(phase, if phase.starts_with("call") { 200 } else { 2 * BLOCK as usize });
            theirs.push(answer["median_ms"].as_f64().unwrap_or(f64::NAN));
            peak = answer["peak_rss_mb"].as_f64().unwrap_or(f64::NAN);
        }
        let (a, b, memory) = (median(mine), median(theirs), peak_mib());
        println!("{phase:<10} {a:>10.3} {b:>12.3} {:>7.2}   {memory:>12.0} {peak:>12.0}", a / b);
        rows.push(json!({
            "network": "digits", "exporter": "torch dynamo", "precision": "f32", "phase": phase, "threads": threads,
            "ours_ms": a, "eager_ms": b, "ratio_eager": a / b, "ours_peak_mb": memory, "eager_peak_mb": peak,
        }));
    }
    let text = serde_json::to_string_pretty(&rows).expect("rows are JSON");
    std::fs::write(root.join("benches/latest.json"), text + "\n")?;
    Ok(())
}

/// Highest resident size of this process so far.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.trim().trim_end_matches("kB").trim().parse::<f64>().unwrap_or(f64::NAN) / 1024.0
}

struct Ours {
    denoiser: Denoiser,
    student: Vec<u8>,
    threads: usize,
}

impl Ours {
    fn new(root: &Path, threads: usize) -> Result<Self> {
        disback::torch::device::set_threads(threads);
        let path = root.join("examples/digits/teacher.onnx");
        let teacher = Teacher::load(&path, &[], TrainableChoice::default(), tch::Device::Cpu)?;
        let specs = teacher.inputs();
        let options = StudentOptions { method: "bench".into(), ..StudentOptions::default() };
        let exported = student(&teacher.network, teacher.network.params(), &teacher.card.card, &options)?;
        let card = Arc::new(teacher.card.card);
        let denoiser = Denoiser::new(Box::new(teacher.network), card, &specs)?;
        Ok(Self { denoiser, student: exported.encode_to_vec(), threads })
    }

    fn measure(&mut self, phase: &str) -> Result<f64> {
        match phase {
            "stage1" => self.steps(Stages::Degrade),
            "stage2" => self.steps(Stages::Both),
            "call1" => self.call(1),
            _ => self.call(64),
        }
    }

    /// Milliseconds a step: the loop's own clock over the last blocks of a short run.
    fn steps(&self, stages: Stages) -> Result<f64> {
        let folder = tempfile::tempdir()?;
        let stage = if stages == Stages::Degrade { "degrade" } else { "backtrack" };
        let sets = [
            format!("batch={BATCH}"),
            format!("threads={}", self.threads),
            "device=cpu".into(),
            format!("log.every={BLOCK}"),
            "log.samples=0".into(),
            "log.checkpoint_every=0".into(),
            format!("degrade.nodes={}", usize::from(stages == Stages::Degrade)),
            format!("degrade.steps={}", 3 * BLOCK),
            format!("backtrack.updates={}", 3 * BLOCK),
            "ema.half_life=10000".into(),
        ];
        let config = Config::resolve(None, &sets)?;
        let run = RunDir::create(&folder.path().join("run"), &config)?;
        let stop = AtomicBool::new(false);
        let job =
            Job { config: &config, student: None, run: &run, observer: &mut Unobserved, stop: &stop, silent: true };
        distill(job, &self.denoiser, stages)?;
        let rows = metrics::read(&run.metrics())?;
        let times: Vec<f64> = rows.iter().filter(|r| r.stage.name() == stage).map(|r| r.seconds).collect();
        // The first block is warm-up.
        Ok(median(times.windows(2).map(|w| (w[1] - w[0]) * 1e3 / BLOCK as f64).collect()))
    }

    /// Milliseconds a call of the exported student in ONNX Runtime.
    fn call(&self, batch: usize) -> Result<f64> {
        let options =
            EngineOptions { engine: EngineKind::Ort, threads: Some(self.threads), ..EngineOptions::default() };
        let mut engine = open_bytes(&self.student, None, &options)?;
        let noise = HostTensor::new(&[batch, 1, 8, 8], &disback::noise::batch_noise(0, 0, batch, 64))?;
        let labels = HostTensor::vec(&vec![3i64; batch]);
        let inputs = [("noise", &noise), ("labels", &labels)];
        let mut times = Vec::new();
        for k in 0..210 {
            let started = Instant::now();
            engine.run(&inputs)?;
            if k >= 10 {
                times.push(started.elapsed().as_secs_f64() * 1e3);
            }
        }
        Ok(median(times))
    }
}

/// `benches/peer.py`, driven over its standard input.
struct Peer {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    version: String,
}

impl Peer {
    fn start(root: &Path, threads: usize) -> Self {
        let python = std::env::var_os("DISBACK_PYTHON").map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
        let mut child = Command::new(&python)
            .arg(root.join("benches/peer.py"))
            .args(["--threads", &threads.to_string(), "--batch", &BATCH.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{} does not start ({e}); run `make setup` first", python.display()));
        let to = child.stdin.take().expect("stdin is piped");
        let from = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut peer = Self { child, to, from, version: String::new() };
        peer.version = peer.line()["torch"].as_str().unwrap_or("?").to_owned();
        peer
    }

    fn line(&mut self) -> Value {
        let mut text = String::new();
        self.from.read_line(&mut text).expect("the peer answers");
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("the peer said `{text}` ({e})"))
    }

    fn measure(&mut self, phase: &str, n: usize) -> Value {
        writeln!(self.to, "{phase} {n}").expect("the peer listens");
        self.line()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = writeln!(self.to, "quit");
        let _ = self.child.wait();
    }
}
