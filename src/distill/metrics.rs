//! What a run measures: means kept on the device until a row is written, and `metrics.jsonl`.

use std::borrow::Cow;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::distill::stage_kind::StageKind;
use crate::error::{Context, Error, Result};

/// Running means of scalars that stay on the device; reading them is the only synchronisation of a training loop.
#[derive(Debug, Default)]
pub struct Meters {
    sums: Vec<(Cow<'static, str>, Tensor, u64)>,
}

/// A sum that a row of metrics is still to be made of, as a checkpoint holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meter {
    /// Name of the mean.
    pub name: String,
    /// The sum's bits (f64): its decimal form might not read back exactly.
    pub sum: u64,
    /// Values in it.
    pub count: u64,
}

impl Meters {
    /// Adds a scalar (rank 0) to the mean of that name.
    pub fn add(&mut self, name: &'static str, value: &Tensor) -> Result<()> {
        let value = value.detach();
        match self.sums.iter_mut().find(|(n, ..)| *n == name) {
            Some((_, sum, count)) => {
                let _ = sum.f_add_(&value)?;
                *count += 1;
            }
            // A copy: the sum is accumulated in place.
            None => self.sums.push((name.into(), value.f_to_dtype(Kind::Double, false, true)?, 1)),
        }
        Ok(())
    }

    /// Adds all that `other` has to the means here, and leaves it empty.
    pub fn take_over(&mut self, other: &mut Self) -> Result<()> {
        for (name, value, count) in other.sums.drain(..) {
            match self.sums.iter_mut().find(|(n, ..)| *n == name) {
                Some((_, sum, before)) => {
                    let _ = sum.f_add_(&value)?;
                    *before += count;
                }
                None => self.sums.push((name, value, count)),
            }
        }
        Ok(())
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.sums.clear();
    }

    fn values(&self) -> Result<Vec<f64>> {
        if self.sums.is_empty() {
            return Ok(Vec::new());
        }
        let sums = Tensor::f_stack(&self.sums.iter().map(|(_, s, _)| s).collect::<Vec<_>>(), 0)?;
        crate::torch::training::note_host_read();
        Ok(Vec::<f64>::try_from(sums.f_to_device(tch::Device::Cpu)?)?)
    }

    /// What there is, for a checkpoint.
    pub fn save(&self) -> Result<Vec<Meter>> {
        let meter = |((name, _, count), sum): (&(Cow<'static, str>, Tensor, u64), f64)| Meter {
            name: name.to_string(),
            sum: sum.to_bits(),
            count: *count,
        };
        Ok(self.sums.iter().zip(self.values()?).map(meter).collect())
    }

    /// What a checkpoint has.
    pub fn restore(saved: &[Meter], device: tch::Device) -> Result<Self> {
        let sums = saved.iter().map(|m| {
            let sum = Tensor::from(f64::from_bits(m.sum)).f_to_device(device)?;
            Ok((m.name.clone().into(), sum, m.count))
        });
        Ok(Self { sums: sums.collect::<Result<_>>()? })
    }

    /// Replaces whatever was there by this one value.
    pub fn set(&mut self, name: &'static str, value: &Tensor) -> Result<()> {
        self.sums.retain(|(n, ..)| *n != name);
        self.add(name, value)
    }

    /// Reads all means at once and starts anew.
    pub fn take(&mut self) -> Result<Means> {
        let values = self.values()?;
        let means = self.sums.drain(..).zip(values).map(|((name, _, count), sum)| (name, sum / count as f64)).collect();
        Ok(Means(means))
    }
}

/// Means read from the device.
#[derive(Debug, Default, Clone)]
pub struct Means(Vec<(Cow<'static, str>, f64)>);

impl Means {
    /// The mean of that name, where anything was added to it.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
    }
}

/// One line of `metrics.jsonl`. Losses and norms are means since the line before; `null` where there is none, or where it
/// is not finite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricsRow {
    /// Stage that the row belongs to.
    pub stage: StageKind,
    /// Iterations of the stage that are done.
    pub iteration: u64,
    /// Stage 1: nodes recorded so far. Stage 2: index of the node that is the target; 0 is the teacher.
    pub node: usize,
    /// Denoising loss of the fake score on the student's samples; in stage 1 that of the degrading copy.
    pub loss_fake: Option<f64>,
    /// The objective's loss of the generator, without the discriminator's term.
    pub loss_generator: Option<f64>,
    /// Global gradient norm of the fake score before clipping; in stage 1 that of the degrading copy.
    pub grad_norm_fake: Option<f64>,
    /// Global gradient norm of the generator before clipping.
    pub grad_norm_generator: Option<f64>,
    /// Score mismatch to the target, `E lambda (|D_target(x_t) - x|^2 - |D_fake(x_t) - x|^2)`, with the denoising
    /// loss's weight `lambda(sigma)`; without the second term where the objective has no fake score.
    pub mismatch: Option<f64>,
    /// Share of the way from the target to the score of the student's samples that the fake score has gone ([`crate::distill::plan::tracking`]):
    /// 1 where it follows, less where it lags. Means of few samples: it scatters. Absent where nothing can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracking: Option<f64>,
    /// Weighted loss of the generator against the discriminator; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_gan: Option<f64>,
    /// Weighted loss of the discriminator; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_discriminator: Option<f64>,
    /// Learning rate: stage 1 of the copy, stage 2 of the generator.
    pub lr: f64,
    /// Generator updates done.
    pub updates: u64,
    /// Images generated in the stage.
    pub images: u64,
    /// Images generated a second since the row before.
    pub images_per_s: f64,
    /// Seconds spent in the stage.
    pub seconds: f64,
    /// Optimiser steps skipped for a gradient that was not finite.
    pub skipped: u64,
    /// Seconds since the row before that this process (rank 0) has spent on sending to the others, receiving and waiting; absent in a run of
    /// one process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waited: Option<f64>,
}

/// `metrics.jsonl`, appended row by row.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: std::fs::File,
}

impl MetricsFile {
    /// Opens the file, first dropping rows that a resumed run will write again: those for which `keep` is false, and a
    /// last line cut short.
    pub fn open(path: &Path, keep: impl Fn(&MetricsRow) -> bool) -> Result<Self> {
        let shown = || path.display().to_string();
        if path.exists() {
            let keep = |line: &str| serde_json::from_str::<MetricsRow>(line).is_ok_and(|row| keep(&row));
            crate::files::keep_lines(path, keep).with_context(shown)?;
        }
        let file = crate::files::append(path).with_context(shown)?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Appends a row as one line of JSON.
    pub fn append(&mut self, row: &MetricsRow) -> Result<()> {
        let mut line = serde_json::to_string(row).map_err(|e| Error::io(e.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).with_context(|| self.path.display().to_string())
    }

    /// Waits until all rows are on disk: before a checkpoint, from which they are not written again.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().with_context(|| self.path.display().to_string())
    }
}

/// Reads a `metrics.jsonl`; lines that are not rows are passed over.
pub fn read(path: &Path) -> Result<Vec<MetricsRow>> {
    crate::files::rows(path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(stage: StageKind, iteration: u64) -> MetricsRow {
        MetricsRow {
            stage,
            iteration,
            node: 1,
            loss_fake: Some(0.5),
            loss_generator: None,
            grad_norm_fake: Some(f64::NAN),
            grad_norm_generator: None,
            mismatch: None,
            tracking: None,
            loss_gan: None,
            loss_discriminator: None,
            lr: 1e-4,
            updates: 0,
            images: 128,
            images_per_s: 3.0,
            seconds: 1.0,
            skipped: 0,
            waited: None,
        }
    }

    #[test]
    fn means_are_over_what_was_added() {
        let mut meters = Meters::default();
        for v in [1f32, 2.0, 6.0] {
            meters.add("a", &Tensor::from(v)).unwrap();
        }
        let kept = Tensor::from(4f32);
        meters.add("b", &kept).unwrap();
        meters.add("b", &Tensor::from(2f32)).unwrap();
        let means = meters.take().unwrap();
        assert_eq!((means.get("a"), means.get("b"), means.get("c")), (Some(3.0), Some(3.0), None));
        assert_eq!(kept.double_value(&[]), 4.0, "the first tensor added must not be accumulated into");
        assert!(meters.take().unwrap().get("a").is_none());
    }

    #[test]
    fn rows_after_the_checkpoint_and_cut_lines_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path, |_| true).unwrap();
        for k in 1..5 {
            file.append(&row(StageKind::Degrade, k)).unwrap();
        }
        drop(file);
        let mut text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\"stage\":\"degrade\",\"iteration\":1,"), "{text}");
        assert!(text.contains("\"grad_norm_fake\":null"));
        text.push_str("{\"stage\":\"degr");
        std::fs::write(&path, text).unwrap();
        let mut file = MetricsFile::open(&path, |r| r.iteration <= 2).unwrap();
        file.append(&row(StageKind::Backtrack, 9)).unwrap();
        let iterations: Vec<u64> = read(&path).unwrap().iter().map(|r| r.iteration).collect();
        assert_eq!(iterations, [1, 2, 9]);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
    }
}
