//! Texts as the files of a run's folder, through the report. Each part of the input is one file.
#![no_main]

mod folder;
mod text;

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target};

const FILES: [&str; 9] = [
    "metrics.jsonl",
    "levels.jsonl",
    "trajectory/trajectory.json",
    "summary.json",
    "evaluation.json",
    "evaluations.jsonl",
    "bench.json",
    "warnings.jsonl",
    "config.toml",
];

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = folder::make("run");
    for inside in ["trajectory", "samples"] {
        std::fs::create_dir_all(folder.join(inside)).expect("a folder for the inputs");
    }
    let grey = disback::io::images::encode_png(&[7; 64], [1, 8, 8]).expect("a picture");
    for name in ["teacher", "degraded-node-001", "student-node-001", "student-node-000", "inside-node-1-update-2"] {
        std::fs::write(folder.join(format!("samples/{name}.png")), &grey).expect("room for the input");
    }
    folder
});

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let mut parts = text.split(text::PARTED);
    for name in FILES {
        let path = FOLDER.join(name);
        match parts.next().filter(|p| !p.trim().is_empty()) {
            Some(part) => std::fs::write(path, part).expect("room for the input"),
            None => drop(std::fs::remove_file(path)),
        }
    }
    if let Ok(page) = disback::report::write(&FOLDER) {
        let page = std::fs::read_to_string(page).expect("a page of text");
        // Bounded by what was put in, and free of what a terminal or a browser would obey.
        assert!(page.len() < (4 << 20) + 64 * data.len(), "a page of {} bytes", page.len());
        assert!(!page.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "a control character");
        assert_eq!(page.matches("<script").count(), 1, "a script of the run's");
    }
});
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { text::mutate(data, size, max_size, seed) });
