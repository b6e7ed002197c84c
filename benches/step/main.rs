//! Steps of both stages and calls of the student beside native PyTorch, eager and compiled: the same network (the native
//! module there, its ONNX export by each of PyTorch's exporters here), batch, threads, precision and loop, alternating in
//! one run, medians. `make bench`, or `cargo bench --bench step -- [--check]`; results go to `benches/latest.json`, where
//! rows that were not measured this time stay. With `--check` nothing is written, and a row more than 10 % slower against
//! eager than the one in `latest.json` fails the run.
//!
//! Each contender is a process of its own; peak memory is the highest resident size of each, libraries included. What our
//! tensors hold of it stands beside the estimate (`ours_tensors_mb`, `ours_estimate_mb`).
//!
//! Environment: `DISBACK_BENCH_NETWORKS` (of digits, cifar, dit; adm is for devices), `DISBACK_BENCH_PRECISIONS` (f32, bf16),
//! `DISBACK_BENCH_PHASES` (stage1, stage2, stage2r5, call1, call64), `DISBACK_BENCH_EXPORTERS` (legacy, dynamo): lists with
//! commas; `DISBACK_BENCH_THREADS`, `DISBACK_BENCH_ROUNDS`, `DISBACK_BENCH_BATCH` (0: the network's own),
//! `DISBACK_BENCH_DEVICE`; `DISBACK_BENCH_COMPILE` (seconds to wait for torch.compile, 300 at first; 0: without it);
//! `DISBACK_BENCH_SET` (`key=value` of our configuration, with spaces between);
//! `DISBACK_BENCH_CPU=1` counts CPU seconds (one thread on a busy machine); `DISBACK_BENCH_PROFILE=1` prints the operators of our steps instead.

mod contender;
mod ours;

use std::path::{Path, PathBuf};
use std::process::Command;

use contender::Contender;
use ours::Task;
use serde_json::{Map, Value, json};

/// A row slower than this against the one before it is a regression.
const SLOWER: f64 = 1.10;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test` builds benches and passes --test: nothing to check there.
    if args.iter().any(|a| a == "--test") {
        return;
    }
    let outcome = match args.first().map(String::as_str) {
        Some("--ours" | "--estimate") => child(&args),
        _ => run(args.iter().any(|a| a == "--check")),
    };
    if let Err(e) = outcome {
        eprintln!("error: {e}");
        std::process::exit(1);
    }
}

/// One contender: `--ours MODEL PHASE PRECISION BATCH THREADS DEVICE`.
fn child(args: &[String]) -> Result<(), String> {
    let [kind, model, phase, precision, batch, threads, device] = args else { return Err(format!("{args:?}")) };
    let number = |text: &String| text.parse().map_err(|_| format!("`{text}` is no number"));
    let task = Task {
        model: model.clone(),
        phase: phase.clone(),
        precision: precision.clone(),
        batch: number(batch)?,
        threads: number(threads)?,
        device: device.clone(),
    };
    let done = if kind == "--ours" { ours::serve(&task) } else { ours::estimated(&task) };
    done.map_err(|e| e.to_string())
}

fn setting(name: &str, default: &str) -> String {
    std::env::var(format!("DISBACK_BENCH_{name}")).unwrap_or_else(|_| default.to_owned())
}

fn list(name: &str, default: &str) -> Vec<String> {
    setting(name, default).split(',').map(|w| w.trim().to_owned()).filter(|w| !w.is_empty()).collect()
}

fn number(name: &str, default: usize) -> usize {
    setting(name, "").parse().unwrap_or(default)
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    let n = v.len();
    match n {
        0 => f64::NAN,
        _ if n % 2 == 1 => v[n / 2],
        _ => (v[n / 2 - 1] + v[n / 2]) / 2.0,
    }
}

/// Steps or calls of one block: about a second of the small network, as few as make sense of the large ones.
fn block(network: &str, phase: &str, device: &str) -> usize {
    let small = network == "digits" || device != "cpu";
    match phase {
        "stage2r5" => 5,
        p if p.starts_with("call") => {
            if small {
                100
            } else {
                2
            }
        }
        _ => {
            if small {
                10
            } else {
                1
            }
        }
    }
}

struct Bench {
    root: PathBuf,
    python: PathBuf,
    threads: usize,
    rounds: usize,
    device: String,
    compile: u64,
    exporters: Vec<String>,
}

/// What one contender took, and the most memory it held.
#[derive(Default)]
struct Taken {
    ms: Vec<f64>,
    peak: f64,
    /// Of that, tensors (ours alone counts them).
    tensors: f64,
}

fn run(check: bool) -> Result<(), String> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("DISBACK_PYTHON").map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
    let bench = Bench {
        threads: number("THREADS", std::thread::available_parallelism().map_or(2, usize::from)),
        rounds: number("ROUNDS", 3).max(1),
        device: setting("DEVICE", "cpu"),
        compile: number("COMPILE", 300) as u64,
        exporters: list("EXPORTERS", "legacy,dynamo"),
        root,
        python,
    };
    let networks = list("NETWORKS", "digits,cifar,dit");
    bench.export(&networks)?;
    let path = bench.root.join("benches/latest.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "[]".into());
    let before: Vec<Value> = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut rows: Vec<Value> = Vec::new();
    println!("{} threads, {} rounds, {}; ms a step (or call), MiB at most", bench.threads, bench.rounds, bench.device);
    println!(
        "{:<7} {:<7} {:<5} {:<9} {:>9} {:>9} {:>9} {:>7} {:>8} {:>7} {:>6} {:>6} {:>7}",
        "network",
        "export",
        "prec",
        "phase",
        "ours",
        "eager",
        "compile",
        "/eager",
        "/compile",
        "/f32",
        "MiB",
        "eager",
        "before"
    );
    for network in &networks {
        for precision in list("PRECISIONS", "f32,bf16") {
            let mut compiled = None;
            for phase in list("PHASES", "stage1,stage2,stage2r5,call1,call64") {
                // Students in ONNX Runtime have a bench of their own for other precisions.
                if phase.starts_with("call") && precision != "f32" {
                    continue;
                }
                let made = bench.measure(network, &precision, &phase, &mut compiled, &rows, &before)?;
                for row in &made {
                    print_row(row, &before);
                }
                rows.extend(made);
            }
        }
    }
    let slower: Vec<&Value> = rows.iter().filter(|r| is_slower(r, &before)).collect();
    for r in &slower {
        println!("slower than before: {}", key(r));
    }
    if check {
        return if slower.is_empty() { Ok(()) } else { Err(format!("{} rows are slower", slower.len())) };
    }
    let kept = before.into_iter().filter(|b| !rows.iter().any(|r| key(r) == key(b)));
    let mut all: Vec<Value> = kept.chain(rows.iter().cloned()).collect();
    all.sort_by_key(key);
    let text = serde_json::to_string_pretty(&all).map_err(|e| e.to_string())?;
    std::fs::write(&path, text + "\n").map_err(|e| format!("{}: {e}", path.display()))
}

/// What tells rows apart.
fn key(row: &Value) -> String {
    let word = |k: &str| row[k].as_str().unwrap_or("?").to_owned();
    ["device", "network", "exporter", "precision", "phase"].map(word).join(" ")
}

fn ratio(row: &Value) -> f64 {
    row["ratio_eager"].as_f64().unwrap_or(f64::NAN)
}

fn same<'a>(row: &Value, before: &'a [Value]) -> Option<&'a Value> {
    before.iter().find(|b| key(b) == key(row))
}

fn is_slower(row: &Value, before: &[Value]) -> bool {
    same(row, before).is_some_and(|b| ratio(row) > ratio(b) * SLOWER)
}

fn print_row(row: &Value, before: &[Value]) {
    let word = |k: &str| row[k].as_str().unwrap_or("?").to_owned();
    let n = |k: &str, digits: usize| row[k].as_f64().map_or("-".to_owned(), |v| format!("{v:.digits$}"));
    let was = same(row, before).map_or("-".to_owned(), |b| format!("{:.2}", ratio(b)));
    println!(
        "{:<7} {:<7} {:<5} {:<9} {:>9} {:>9} {:>9} {:>7} {:>8} {:>7} {:>6} {:>6} {:>7}",
        word("network"),
        word("exporter"),
        word("precision"),
        word("phase"),
        n("ours_ms", 2),
        n("eager_ms", 2),
        n("compile_ms", 2),
        n("ratio_eager", 2),
        n("ratio_compile", 2),
        n("ratio_eager_f32", 2),
        n("ours_peak_mb", 0),
        n("eager_peak_mb", 0),
        was
    );
}

impl Bench {
    fn model(&self, network: &str, exporter: &str) -> PathBuf {
        self.root.join(format!("target/bench/{network}-{exporter}.onnx"))
    }

    /// Writes the teachers that are not there yet.
    fn export(&self, networks: &[String]) -> Result<(), String> {
        let script = self.root.join("benches/networks.py");
        let done = Command::new(&self.python).arg(&script).arg(self.root.join("target/bench")).args(networks).output();
        let done =
            done.map_err(|e| format!("{} does not start ({e}); run `make setup` first", self.python.display()))?;
        match done.status.success() {
            true => Ok(()),
            false => Err(format!("{}: {}", script.display(), String::from_utf8_lossy(&done.stderr))),
        }
    }

    fn peer(&self, network: &str, precision: &str, phase: &str, more: &[&str]) -> Result<Contender, String> {
        let mut command = Command::new(&self.python);
        command.arg(self.root.join("benches/peer.py")).args(["--network", network, "--precision", precision]);
        command.args(["--phase", phase, "--threads", &self.threads.to_string(), "--device", &self.device]);
        command.args(["--batch", &self.batch()]).args(more);
        command.env("TORCHINDUCTOR_CACHE_DIR", self.root.join("target/bench/inductor"));
        command.env("OMP_NUM_THREADS", self.threads.to_string());
        Contender::start(&mut command).map_err(|e| e.to_string())
    }

    fn batch(&self) -> String {
        number("BATCH", 0).to_string()
    }

    /// The same for our side; `kind` is `--ours` or `--estimate`.
    fn ours(&self, kind: &str, model: &Path, precision: &str, phase: &str, batch: u64) -> Result<Contender, String> {
        let mut command = Command::new(std::env::current_exe().map_err(|e| e.to_string())?);
        let (batch, threads) = (batch.to_string(), self.threads.to_string());
        command.arg(kind).arg(model).args([phase, precision, &batch, &threads, &self.device]);
        command.env("OMP_NUM_THREADS", &threads);
        Contender::start(&mut command).map_err(|e| e.to_string())
    }

    /// The rows of one network, precision and phase, one an exporter.
    fn measure(
        &self,
        network: &str,
        precision: &str,
        phase: &str,
        compiled: &mut Option<Contender>,
        rows: &[Value],
        before: &[Value],
    ) -> Result<Vec<Value>, String> {
        const LONG: u64 = 600;
        let mut eager = self.peer(network, precision, phase, &[])?;
        let ready = eager.answer(LONG).ok_or_else(|| format!("PyTorch: {}", why(&eager)))?;
        let batch = ready["batch"].as_u64().unwrap_or(1);
        let mut ours = Vec::new();
        for exporter in &self.exporters {
            let mut one = self.ours("--ours", &self.model(network, exporter), precision, phase, batch)?;
            one.answer(LONG).ok_or_else(|| format!("ours ({network}, {exporter}, {phase}): {}", why(&one)))?;
            ours.push((exporter, one, Taken::default()));
        }
        let block = block(network, phase, &self.device);
        if std::env::var_os("DISBACK_BENCH_PROFILE").is_some() {
            for (exporter, one, _) in &mut ours {
                if let Some(answer) = one.ask(&format!("profile {block}"), LONG) {
                    print_profile(&format!("{network} {exporter} {precision} {phase}"), &answer);
                }
            }
            return Ok(Vec::new());
        }
        if self.compile > 0 && compiled.is_none() {
            let mut one = self.peer(network, precision, phase, &["--compile"])?;
            one.answer(LONG);
            *compiled = Some(one);
        }
        if let Some(one) = compiled.as_mut() {
            one.ask(&format!("phase {phase}"), LONG);
            // Compiles, and says nothing of the time that takes.
            one.ask("run 1", self.compile);
            // One that goes on compiling would take the cores from the others.
            one.stop_if_failed();
        }
        let (mut eagerly, mut compiledly) = (Taken::default(), Taken::default());
        let rounds = if block == 5 && network != "digits" { self.rounds.min(2) } else { self.rounds };
        for _ in 0..rounds {
            let command = format!("run {block}");
            for (_, one, taken) in &mut ours {
                taken.add(one.ask(&command, LONG));
            }
            eagerly.add(eager.ask(&command, LONG));
            if let Some(one) = compiled.as_mut() {
                compiledly.add(one.ask(&command, LONG));
            }
        }
        if let Some(failed) = eager.failed.take() {
            return Err(format!("PyTorch: {failed}"));
        }
        let compile_failed = compiled.as_ref().and_then(|c| c.failed.clone());
        if let Some(failed) = compile_failed.as_ref().filter(|_| rows.iter().all(|r| r["compile_failed"].is_null())) {
            println!("torch.compile: {failed}");
        }
        let (eager_ms, compile_ms) = (median(eagerly.ms), median(compiledly.ms));
        // The f32 row of the same phase, of this run or an earlier one.
        let f32_ms = rows.iter().rev().chain(before).find(|r| {
            r["network"] == network && r["precision"] == "f32" && r["phase"] == phase && r["device"] == *self.device
        });
        let f32_ms = if precision == "f32" { Some(eager_ms) } else { f32_ms.and_then(|r| r["eager_ms"].as_f64()) };
        let mut out = Vec::new();
        for (exporter, mut one, taken) in ours {
            let profile = (!phase.starts_with("call")).then(|| one.ask(&format!("profile {block}"), LONG)).flatten();
            if let Some(failed) = &one.failed {
                return Err(format!("ours ({network}, {exporter}, {phase}): {failed}"));
            }
            drop(one);
            let ms = median(taken.ms);
            let mut row = Map::new();
            let mut put = |k: &str, v: Value| row.insert(k.to_owned(), v);
            put("device", json!(self.device));
            put("network", json!(network));
            put("exporter", json!(exporter));
            put("precision", json!(precision));
            put("phase", json!(phase));
            put("batch", json!(phase.strip_prefix("call").and_then(|b| b.parse().ok()).unwrap_or(batch)));
            put("threads", json!(self.threads));
            put("ours_ms", json!(ms));
            put("eager_ms", json!(eager_ms));
            put("compile_ms", json!(compile_ms));
            put("ratio_eager", json!(ms / eager_ms));
            put("ratio_compile", json!(ms / compile_ms));
            put("ratio_eager_f32", json!(f32_ms.map(|f| ms / f)));
            put("ours_peak_mb", json!(taken.peak));
            put("eager_peak_mb", json!(eagerly.peak));
            if let Some(failed) = &compile_failed {
                put("compile_failed", json!(failed));
            }
            if let Some(outside) = profile.as_ref().and_then(|p| p["outside"].as_f64()) {
                put("ours_outside_kernels", json!(outside));
            }
            if phase == "stage1" || phase == "stage2" {
                let mut estimate = self.ours("--estimate", &self.model(network, exporter), precision, phase, batch)?;
                put("ours_tensors_mb", json!(taken.tensors));
                put("ours_estimate_mb", estimate.answer(LONG).map_or(Value::Null, |e| e[phase].clone()));
            }
            out.push(Value::Object(row));
        }
        Ok(out)
    }
}

fn why(c: &Contender) -> &str {
    c.failed.as_deref().unwrap_or("no answer")
}

impl Taken {
    fn add(&mut self, answer: Option<Value>) {
        let Some(answer) = answer else { return };
        self.ms.extend(answer["ms"].as_f64());
        self.peak = self.peak.max(answer["peak_mb"].as_f64().unwrap_or(0.0));
        self.tensors = self.tensors.max(answer["tensors_mb"].as_f64().unwrap_or(0.0));
    }
}

fn print_profile(what: &str, answer: &Value) {
    let number = |v: &Value| v.as_f64().unwrap_or(f64::NAN);
    let (ms, outside) = (number(&answer["ms"]), 100.0 * number(&answer["outside"]));
    println!("{what}: {ms:.2} ms a step, {outside:.1} % outside operators");
    for o in answer["operators"].as_array().into_iter().flatten().take(24) {
        println!("{:>8.2} % {:>7} {}", number(&o[2]), o[1], o[0].as_str().unwrap_or("?"));
    }
}
