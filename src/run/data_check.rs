//! A data set is read whole before the first step, or in the background where that takes long: one broken image must not end a night of
//! training when it is first drawn.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::diffusion::TeacherCard;
use crate::distill::Config;
use crate::distill::gan::RealImages;
use crate::error::{Error, Result};
use crate::run::monitor::Monitor;

/// Seconds that a new run waits for its data set to be read; beyond, it is read in the background.
const WAITED: f64 = 60.0;

/// Broken images that are named.
const NAMED: usize = 3;

/// A data set that is being read in the background.
#[derive(Debug)]
pub struct DataCheck {
    /// What is wrong with images that cannot be read, and the number of all.
    thread: Option<JoinHandle<(Vec<String>, usize)>>,
    over: Arc<AtomicBool>,
    data: PathBuf,
    skip: bool,
}

/// What to say about images that cannot be read: an error, or a warning where they are passed over.
fn verdict(data: &Path, broken: &[String], all: usize, skip: bool) -> Result<Option<String>> {
    if broken.is_empty() {
        return Ok(None);
    }
    let named: Vec<&str> = broken.iter().take(NAMED).map(|b| b.lines().next().unwrap_or_default()).collect();
    let more = if broken.len() > NAMED { "; ..." } else { "" };
    let text =
        format!("{}: {} of {all} images cannot be read: {}{more}", data.display(), broken.len(), named.join("; "));
    match skip {
        true => Ok(Some(format!("{text}; they are passed over (data.skip_broken)"))),
        false => Err(Error::io(text).hint("mend or remove them; data.skip_broken=true passes over them")),
    }
}

impl DataCheck {
    /// Reads the data set of the configuration, where there is one: now where it is `now` wanted and takes under a minute, else in the
    /// background.
    ///
    /// Errors: images that cannot be read, unless they are passed over.
    pub fn begin(config: &Config, card: &TeacherCard, now: bool, monitor: &dyn Monitor) -> Result<Option<Self>> {
        if config.gan.data.is_empty() {
            return Ok(None);
        }
        let (data, skip) = (PathBuf::from(&config.gan.data), config.data.skip_broken);
        let images = RealImages::open(&data, card, config.gan.said_range()?, skip)?;
        monitor.remark(&format!("gan.data: {}", images.size()));
        if now && images.seconds_to_check() < WAITED {
            let broken = images.check(&|| true);
            if let Some(warning) = verdict(&data, &broken, images.len(), skip)? {
                monitor.warning(&warning);
            }
            return Ok(None);
        }
        let over = Arc::new(AtomicBool::new(false));
        let asked = over.clone();
        let read = move || (images.check(&|| !asked.load(Ordering::Relaxed)), images.len());
        let thread = std::thread::Builder::new().name("data-check".into()).spawn(read)?;
        Ok(Some(Self { thread: Some(thread), over, data, skip }))
    }

    /// What the background has found: a warning, once. Never waits.
    ///
    /// Errors: images that cannot be read, unless they are passed over.
    pub fn found(&mut self) -> Result<Option<String>> {
        match self.thread.take_if(|thread| thread.is_finished()) {
            None => Ok(None),
            Some(thread) => match thread.join() {
                Ok((broken, all)) => verdict(&self.data, &broken, all, self.skip),
                Err(_) => Err(Error::backend(format!("{}: reading the data set failed", self.data.display()))),
            },
        }
    }
}

impl Drop for DataCheck {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::distill::config::{DataConfig, GanConfig};
    use crate::io::images::encode_png;
    use crate::run::monitor::Console;

    #[test]
    fn every_image_is_read_and_broken_ones_are_named_or_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        for k in 0..600 {
            let png = encode_png(&[k as u8; 64], [1, 8, 8]).unwrap();
            std::fs::write(dir.path().join(format!("{k:04}.png")), png).unwrap();
        }
        let card = TeacherCard { range: Some([-1.0, 1.0]), ..TeacherCard::plain(&[1, 8, 8]) };
        let config = |skip_broken| Config {
            gan: GanConfig { data: dir.path().to_str().unwrap().into(), ..GanConfig::default() },
            data: DataConfig { skip_broken },
            ..Config::default()
        };
        let console = Console { quiet: true };
        assert!(DataCheck::begin(&config(false), &card, true, &console).unwrap().is_none());
        // Not among the 256 that are looked at when the set is opened.
        let looked: Vec<usize> = (0..256).map(|k| k * 599 / 255).collect();
        let broken = (300..).find(|k| !looked.contains(k)).unwrap();
        std::fs::write(dir.path().join(format!("{broken:04}.png")), b"cut").unwrap();
        let e = DataCheck::begin(&config(false), &card, true, &console).unwrap_err().to_string();
        assert!(e.contains("1 of 600 images cannot be read") && e.contains(&format!("{broken:04}.png")), "{e}");
        assert!(e.contains("data.skip_broken=true"), "{e}");
        for skip in [false, true] {
            let mut check = DataCheck::begin(&config(skip), &card, false, &console).unwrap().unwrap();
            let found = loop {
                match check.found() {
                    Ok(None) => std::thread::sleep(std::time::Duration::from_millis(1)),
                    other => break other,
                }
            };
            assert_eq!(found.is_ok(), skip);
            let said = found.map_or_else(|e| e.to_string(), |w| w.unwrap_or_default());
            assert!(said.contains("1 of 600 images"), "{said}");
        }
        // The same draws as from a set in which the next image stands in the place of the broken one.
        use rand_chacha::rand_core::SeedableRng;
        let draw = |skip| {
            let images = RealImages::open(dir.path(), &card, None, skip).unwrap();
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
            (0..40).map(|_| Ok(images.draw(&card, &mut rng, 50)?.0)).collect::<Result<Vec<_>>>()
        };
        let passed_over = draw(true).unwrap();
        let e = draw(false).unwrap_err().to_string();
        assert!(e.contains(&format!("{broken:04}.png")) && e.contains("data.skip_broken"), "{e}");
        let next = dir.path().join(format!("{:04}.png", broken + 1));
        std::fs::copy(next, dir.path().join(format!("{broken:04}.png"))).unwrap();
        assert!(passed_over == draw(false).unwrap());
    }
}
