//! Texts through everything that a teacher card is read from: metadata (`key = value` lines), the file beside the model, diffusers'
//! scheduler_config.json and `--card` entries. What is accepted is written and read again.
#![no_main]

mod folder;
mod text;

use std::path::PathBuf;
use std::sync::LazyLock;

use disback::diffusion::CardSource;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| folder::make("card"));

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        read(text);
    }
});
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { text::mutate(data, size, max_size, seed) });

fn read(text: &str) {
    let mut parts = text.split(text::PARTED);
    let mut part = || parts.next().unwrap_or_default();
    let (metadata, side, scheduler, overrides) = (part(), part(), part(), part());
    let mut source = CardSource::new();
    for (name, text) in [("t.card.toml", side), ("scheduler_config.json", scheduler)] {
        let path = FOLDER.join(name);
        match text.trim().is_empty() {
            true => drop(std::fs::remove_file(path)),
            false => std::fs::write(path, text).expect("room for the input"),
        }
    }
    let pairs = metadata.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.trim(), v.trim()));
    source = source.metadata(pairs).model(&FOLDER.join("t.onnx")).overrides(overrides.lines());
    let _ = source.known();
    let Ok(found) = source.resolve() else { return };
    let _ = found.rows();
    let card = found.card;
    // What is valid can be computed with and written, and reads back as it was.
    if let Ok(schedule) = card.schedule() {
        assert!(schedule.training_sigmas(64).iter().all(|s| s.is_finite() && *s > 0.0), "{schedule:?}");
        assert!(schedule.sampling_sigmas(64).windows(2).all(|w| w[0] >= w[1]), "{schedule:?}");
    }
    card.to_toml().expect("a card that was read can be written");
    let written = card.to_metadata().expect("a card that was read can be written");
    let again = CardSource::new().metadata(written).resolve().expect("a card that was written can be read");
    assert_eq!(again.card, card);
}
