//! Time and memory of importing a large export: a network of 300 M parameters with external data, made once by
//! `benches/large_export.py` (or the file in `DISBACK_IMPORT_MODEL`). Prints the fastest of `DISBACK_BENCH_ROUNDS` imports
//! (default 5), each in a process of its own: wall and CPU seconds, and the highest resident memory.
//!
//! Resident memory has two parts: anonymous pages, which are ours, and pages of the mapped weights file, which belong to
//! the page cache and go when anybody else needs them. The ratio to the weights counts the anonymous ones; both are shown.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use disback::graph::Model;
use disback::torch::{Forward, ImportOptions, Network};

fn main() {
    // `cargo bench` passes --bench.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let [flag, path] = &arguments[..]
        && flag == "--once"
    {
        return once(Path::new(path));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = std::env::var_os("DISBACK_IMPORT_MODEL").map_or_else(|| made(root), PathBuf::from);
    let rounds = std::env::var("DISBACK_BENCH_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(5);
    let mut rows = Vec::new();
    for _ in 0..rounds {
        let done = Command::new(std::env::current_exe().expect("the bench knows its path"))
            .args(["--once".as_ref(), model.as_os_str()])
            .output()
            .expect("the bench starts itself");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let row: serde_json::Value = serde_json::from_slice(&done.stdout).expect("one JSON object");
        println!("{row}");
        rows.push(row);
    }
    let least = |key: &str| rows.iter().filter_map(|r| r[key].as_f64()).fold(f64::INFINITY, f64::min);
    let weights = least("weights_mib");
    println!("\n| parameters | wall s | CPU s | weights MiB | anonymous MiB | ratio | with mapped pages MiB |");
    println!("|---|---|---|---|---|---|---|");
    println!(
        "| {:.1} M | {:.2} | {:.2} | {weights:.0} | {:.0} | {:.2} | {:.0} |",
        least("parameters") / 1e6,
        least("wall_s"),
        least("cpu_s"),
        least("anonymous_mib"),
        least("anonymous_mib") / weights,
        least("resident_mib"),
    );
}

/// The network made by the script, kept for the next run.
fn made(root: &Path) -> PathBuf {
    let dir = root.join("target/large-export");
    let model = dir.join("model.onnx");
    if !model.exists() {
        let python = std::env::var_os("DISBACK_PYTHON").map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
        let status = Command::new(&python).arg(root.join("benches/large_export.py")).arg(&dir).status();
        let status = status.unwrap_or_else(|e| panic!("{}: {e}; run `make setup` first", python.display()));
        assert!(status.success(), "the export could not be made");
    }
    model
}

/// Imports once and prints one JSON line.
fn once(path: &Path) {
    tch::set_num_threads(1);
    // libtorch's own start-up is no part of an import.
    drop(tch::Tensor::zeros([1], (tch::Kind::Float, tch::Device::Cpu)));
    let before = memory();
    let watch = Watch::start();
    let (started, cpu) = (Instant::now(), cpu_seconds());
    let net = Model::load(path)
        .and_then(|m| Network::import(m, &ImportOptions::default(), tch::Device::Cpu))
        .unwrap_or_else(|e| panic!("{e}"));
    let (wall, cpu) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let (anonymous, resident) = watch.stop();
    let parameters = net.params().elements();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{}",
        serde_json::json!({
            "parameters": parameters,
            "tensors": net.params().len(),
            "wall_s": wall,
            "cpu_s": cpu,
            "weights_mib": mib(4 * parameters as u64),
            "anonymous_mib": mib(anonymous.saturating_sub(before.0)),
            "resident_mib": mib(resident.saturating_sub(before.1)),
        })
    );
}

/// Anonymous and all resident bytes of this process now.
fn memory() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name));
        line.and_then(|l| l.split_whitespace().nth(1)).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    (field("RssAnon:"), field("VmRSS:"))
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    // Linux counts in hundredths of a second.
    (ticks(11) + ticks(12)) / 100.0
}

/// Looks at the memory every two milliseconds and keeps the highest values.
struct Watch {
    stop: std::sync::Arc<(AtomicBool, AtomicU64, AtomicU64)>,
    thread: std::thread::JoinHandle<()>,
}

impl Watch {
    fn start() -> Self {
        let shared = std::sync::Arc::new((AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0)));
        let mine = shared.clone();
        let thread = std::thread::spawn(move || {
            while !mine.0.load(Ordering::Relaxed) {
                let (anonymous, resident) = memory();
                mine.1.fetch_max(anonymous, Ordering::Relaxed);
                mine.2.fetch_max(resident, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Self { stop: shared, thread }
    }

    fn stop(self) -> (u64, u64) {
        self.stop.0.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        let (anonymous, resident) = memory();
        let high = |kept: &AtomicU64, now: u64| kept.load(Ordering::Relaxed).max(now);
        (high(&self.stop.1, anonymous), high(&self.stop.2, resident))
    }
}
