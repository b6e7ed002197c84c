//! Bytes through the readers of arrays. The first byte says what they are: an archive, an array in an archive (stored, deflated, or with
//! wrong sizes), a bare array, safetensors.
#![no_main]

mod folder;

use std::io::{Cursor, Write};
use std::path::PathBuf;
use std::sync::LazyLock;

use disback::io::npy;
use disback::io::rows::RowFile;
use libfuzzer_sys::fuzz_target;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| folder::make("npz"));

fuzz_target!(|data: &[u8]| {
    if let Some((&kind, data)) = data.split_first() {
        read(kind, data);
    }
});

fn archive(kind: u8, data: &[u8]) -> Vec<u8> {
    let method = if kind & 1 == 0 { zip::CompressionMethod::Stored } else { zip::CompressionMethod::Deflated };
    let mut out = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::FileOptions::default().compression_method(method);
    for name in ["images.npy", "labels.npy"] {
        let wrote = out.start_file(name, options).is_ok() && out.write_all(data).is_ok();
        assert!(wrote, "an archive in memory");
    }
    let mut bytes = out.finish().expect("an archive in memory").into_inner();
    // Sizes that lie: of the local header and of the list at the end.
    if kind & 2 != 0 {
        let lie = (data.len() as u32).rotate_left(u32::from(kind >> 2)).to_le_bytes();
        for k in 0..bytes.len().saturating_sub(28) {
            let at = match &bytes[k..k + 4] {
                b"PK\x01\x02" => k + 24,
                b"PK\x03\x04" => k + 22,
                _ => continue,
            };
            bytes[at..at + 4].copy_from_slice(&lie);
        }
    }
    bytes
}

fn read(kind: u8, data: &[u8]) {
    let (name, bytes) = match kind % 4 {
        0 => ("a.npz", data.to_vec()),
        1 => ("a.npz", archive(kind >> 2, data)),
        2 => ("a.npy", data.to_vec()),
        _ => ("a.safetensors", data.to_vec()),
    };
    let path = FOLDER.join(name);
    std::fs::write(&path, &bytes).expect("room for the input");
    match name {
        "a.npz" => {
            let _ = npy::npz_names(&path);
            let read = npy::read_npz(&path).unwrap_or_default();
            // Nothing is made of nothing: deflate packs a thousandfold at most.
            let all: usize = read.iter().map(|(_, t)| t.bytes().len()).sum();
            assert!(all <= 1100 * bytes.len() * read.len().max(1), "{all} bytes of {}", bytes.len());
        }
        "a.npy" => {
            let _ = npy::read(&path);
            let _ = npy::read_from(&bytes[..]);
        }
        _ => {}
    }
    if let Ok(file) = RowFile::open(&path) {
        let arrays: Vec<_> = file.arrays().map(|(name, _, shape)| (name.to_owned(), shape.to_vec())).collect();
        for (name, shape) in arrays {
            let last = shape.first().copied().unwrap_or(0).saturating_sub(1);
            let _ = file.rows(&name, &[0, last]);
        }
    }
    if name != "a.safetensors"
        && let Ok(set) = disback::io::images::ImageSet::open(&path, [-1.0, 1.0])
    {
        let [c, h, w] = set.shape();
        assert!(c * h * w <= bytes.len() * 1100);
        let _ = (set.doubt(), set.batch_u8(0, 1), set.batch_u8(set.len() - 1, 1));
    }
}
