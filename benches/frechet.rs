//! Frechet distance between two sets of features, from the features as they come to the figure: time and peak memory, beside
//! pytorch-fid's and clean-fid's own computation of the same figure from the same file.
//!
//! `cargo bench --bench frechet`. DISBACK_BENCH_IMAGES (50000), DISBACK_BENCH_FEATURES (2048), DISBACK_BENCH_PEERS
//! (pytorch-fid,clean-fid); the packages are installed into
//! `benches/.frechet-venv` by `benches/frechet_peers.py --setup`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use disback::eval::{Moments, Statistics, frechet};
use disback::noise::image_noise;
use disback::tensor::HostTensor;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Rows like pooled features of a network: not negative, correlated, of falling variance.
fn features(seed: u64, rows: usize, dims: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows * dims);
    for row in 0..rows {
        let x = image_noise(seed, row as u64, dims);
        for j in 0..dims {
            let scale = 1.0 / (1.0 + j as f32 / 64.0);
            out.push((x[j] + 0.7 * x[(j + 1) % dims] + 0.5 * x[(j * 7) % dims] + 0.1 * seed as f32).abs() * scale);
        }
    }
    out
}

/// The figure, through the streaming path that `disback evaluate` takes.
fn ours(folder: &Path) -> f64 {
    let statistics = |name: &str| {
        let set = disback::io::npy::read(&folder.join(name)).expect("written before");
        let dims = set.shape()[1];
        let mut moments = Moments::new(dims);
        for start in (0..set.shape()[0]).step_by(512) {
            let count = 512.min(set.shape()[0] - start);
            let values = set.rows(start, count).expect("in range").to_f32();
            for row in values.chunks_exact(dims) {
                moments.push(row.iter().map(|&v| f64::from(v))).expect("finite");
            }
        }
        Statistics::from_moments(moments).expect("more than one image")
    };
    frechet::distance(&statistics("a.npy"), &statistics("b.npy")).expect("it converges")
}

fn peak_mib() -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").trim().parse::<f64>().unwrap_or(f64::NAN) / 1024.0
}

fn main() {
    let folder = std::env::temp_dir().join("disback-frechet-bench");
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    // A process of its own: its peak memory is that of the computation.
    if std::env::args().any(|a| a == "--measure") {
        let began = Instant::now();
        let distance = ours(&folder);
        println!("disback {distance:.9} {:.2} {:.0}", began.elapsed().as_secs_f64(), peak_mib());
        return;
    }
    let (images, dims) = (number("DISBACK_BENCH_IMAGES", 50_000), number("DISBACK_BENCH_FEATURES", 2048));
    println!("{images} x {dims} features each");
    // Making them takes longer than measuring: DISBACK_BENCH_KEEP leaves them for the next run.
    let there = |name: &str| disback::io::npy::read(&folder.join(name)).is_ok_and(|t| t.shape() == [images, dims]);
    for (name, seed) in [("a.npy", 1), ("b.npy", 2)].into_iter().filter(|(name, _)| !there(name)) {
        let set = HostTensor::new(&[images, dims], &features(seed, images, dims)).expect("the shape fits");
        disback::io::npy::write(&folder.join(name), &set).expect("room for the features");
    }
    println!("{:<12} {:>16} {:>9} {:>9}", "", "distance", "seconds", "peak MiB");
    let show = |line: &str| {
        let parts: Vec<&str> = line.split_whitespace().collect();
        if let [name, distance, seconds, peak] = parts[..] {
            println!("{name:<12} {distance:>16} {seconds:>9} {peak:>9}");
        }
    };
    let me = std::env::current_exe().expect("a path of its own");
    let peers = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/frechet_peers.py"));
    let python = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/.frechet-venv/bin/python"));
    let mut figures: Vec<(String, f64)> = Vec::new();
    let mut run = |mut command: Command, what: &str| match command.output() {
        Ok(out) if out.status.success() => String::from_utf8_lossy(&out.stdout).lines().for_each(|line| {
            let mut words = line.split_whitespace();
            let pair = words.next().zip(words.next().and_then(|v| v.parse::<f64>().ok()));
            figures.extend(pair.map(|(name, figure)| (name.to_string(), figure)));
            show(line);
        }),
        Ok(out) => println!("{what}: {}", String::from_utf8_lossy(&out.stderr).lines().last().unwrap_or_default()),
        Err(e) => println!("{what}: {e}; `python3 benches/frechet_peers.py --setup` installs the others"),
    };
    let mut own = Command::new(me);
    own.arg("--measure");
    run(own, "disback");
    let wanted = std::env::var("DISBACK_BENCH_PEERS").unwrap_or_else(|_| "pytorch-fid,clean-fid".into());
    for peer in wanted.split(',').filter(|p| !p.is_empty()) {
        let mut command = Command::new(&python);
        command.arg(&peers).arg(peer).arg(&folder);
        run(command, peer);
    }
    if let Some(first) = figures.first() {
        let largest = figures.iter().map(|(_, f)| (f / first.1 - 1.0).abs()).fold(0.0, f64::max);
        println!("largest relative difference to ours: {largest:.1e}");
        for (name, figure) in &figures {
            // clean-fid adds up the means of f32 features in f32.
            let bound = if name == "clean-fid" { 1e-4 } else { 1e-6 };
            assert!((figure / first.1 - 1.0).abs() <= bound, "{name}: {figure}, ours {}", first.1);
        }
    }
    if std::env::var_os("DISBACK_BENCH_KEEP").is_none() {
        let _ = std::fs::remove_dir_all(&folder);
    }
}
