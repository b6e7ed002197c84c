//! Bytes through sets of images in a zip. The first byte says what they are: the archive, or a picture of each format (and a
//! dataset.json behind it, parted by a line) in a new archive.
#![no_main]

mod folder;

use std::io::{Cursor, Write};
use std::path::PathBuf;
use std::sync::LazyLock;

use disback::io::images::ImageSet;
use libfuzzer_sys::fuzz_target;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| folder::make("images"));
const PARTED: &[u8] = b"\n===\n";
const ENDINGS: [&str; 5] = ["png", "jpg", "webp", "bmp", "tiff"];

fuzz_target!(|data: &[u8]| {
    if let Some((&kind, data)) = data.split_first() {
        read(kind, data);
    }
});

fn archive(ending: &str, data: &[u8]) -> Vec<u8> {
    let at = data.windows(PARTED.len()).position(|w| w == PARTED);
    let (picture, list) = at.map_or((data, None), |k| (&data[..k], Some(&data[k + PARTED.len()..])));
    let mut out = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let mut add = |name: &str, bytes: &[u8]| {
        let wrote = out.start_file(name, zip::write::FileOptions::default()).is_ok() && out.write_all(bytes).is_ok();
        assert!(wrote, "an archive in memory");
    };
    add(&format!("a.{ending}"), picture);
    add(&format!("b.{ending}"), picture);
    if let Some(list) = list {
        add("dataset.json", list);
    }
    out.finish().expect("an archive in memory").into_inner()
}

fn read(kind: u8, data: &[u8]) {
    let bytes = match (kind as usize % 6).checked_sub(1) {
        None => data.to_vec(),
        Some(k) => archive(ENDINGS[k], data),
    };
    let path = FOLDER.join("a.zip");
    std::fs::write(&path, &bytes).expect("room for the input");
    let Ok(set) = ImageSet::open(&path, [-1.0, 1.0]) else { return };
    if let Some(labels) = set.labels() {
        assert_eq!(labels.len(), set.len());
    }
    let [c, h, w] = set.shape();
    if let Ok(batch) = set.batch_u8(0, set.len().min(2)) {
        assert_eq!(batch.bytes().len(), set.len().min(2) * c * h * w);
    }
    let _ = set.gather_u8(&[set.len() - 1]);
}
