//! How fast a student runs.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::student::{ConditionKind, Request, Student};
use super::{Dim, EngineOptions};
use crate::error::{Error, Result};
use crate::noise::batch_noise;
use crate::tensor::HostTensor;

/// One engine at one batch size.
#[derive(Debug, Clone, Serialize)]
pub struct Timing {
    pub engine: String,
    pub batch: usize,
    /// Opening the file, milliseconds.
    pub load_ms: f64,
    /// The first call, which may compile or allocate.
    pub first_ms: f64,
    /// Milliseconds a call: median, 95th and 99th percentile.
    pub p50_ms: f64,
    pub p95_ms: f64,
    pub p99_ms: f64,
    pub images_per_s: f64,
    pub calls: usize,
}

/// Value at a share of sorted times, nearest rank.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Opens the student with these options and times calls of each batch size for about `seconds` each (ten calls at least,
/// after two that do not count). Inputs are made beforehand: what is timed is the call alone.
pub fn run(path: &Path, options: &EngineOptions, batches: &[usize], seconds: f64) -> Result<Vec<Timing>> {
    let mut out = Vec::new();
    for &batch in batches {
        if batch == 0 {
            return Err(Error::usage("a batch of 0 images"));
        }
        let began = Instant::now();
        let mut student = Student::open(path, options)?;
        let load_ms = began.elapsed().as_secs_f64() * 1e3;
        let request = Request { batch, embeddings: embeddings(&student, batch)?, ..Request::default() };
        let inputs = student.inputs(&request, 0, batch)?;
        let named: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let engine = student.engine_name();
        let mut call = || -> Result<f64> {
            let began = Instant::now();
            student.engine().run(&named)?;
            Ok(began.elapsed().as_secs_f64() * 1e3)
        };
        let first_ms = call()?;
        call()?;
        let mut times = Vec::new();
        let end = Instant::now() + Duration::from_secs_f64(seconds.clamp(0.0, 3600.0));
        while times.len() < 10 || Instant::now() < end {
            times.push(call()?);
        }
        let total: f64 = times.iter().sum();
        times.sort_by(f64::total_cmp);
        out.push(Timing {
            engine,
            batch,
            load_ms,
            first_ms,
            p50_ms: percentile(&times, 0.50),
            p95_ms: percentile(&times, 0.95),
            p99_ms: percentile(&times, 0.99),
            images_per_s: (batch * times.len()) as f64 / total * 1e3,
            calls: times.len(),
        });
    }
    Ok(out)
}

/// Random rows for conditions that are no classes.
fn embeddings(student: &Student, batch: usize) -> Result<Vec<(String, HostTensor)>> {
    let mut out = Vec::new();
    for condition in student.info().conditions.iter().filter(|c| c.kind == ConditionKind::Embedding) {
        let dims = condition.input.shape.iter().skip(1).map(|d| match d {
            Dim::Fixed(n) => Ok(*n),
            Dim::Symbol(_) => {
                Err(Error::unsupported(format!("the size of condition {} is not fixed", condition.input)))
            }
        });
        let mut shape = vec![batch];
        shape.extend(dims.collect::<Result<Vec<_>>>()?);
        let size = shape[1..].iter().product();
        out.push((condition.input.name.clone(), HostTensor::new(&shape, &batch_noise(1, 0, batch, size))?));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::testing;

    #[test]
    fn percentiles_are_nearest_rank() {
        let sorted: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([0.5, 0.95, 0.99].map(|s| percentile(&sorted, s)), [50.0, 95.0, 99.0]);
        assert_eq!(percentile(&[7.0], 0.99), 7.0);
    }

    #[test]
    fn timings_are_consistent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("student.onnx");
        std::fs::write(&path, testing::student("batch")).unwrap();
        let timings = run(&path, &EngineOptions::default(), &[1, 4], 0.0).unwrap();
        assert_eq!(timings.iter().map(|t| t.batch).collect::<Vec<_>>(), [1, 4]);
        for t in timings {
            assert!(
                t.calls >= 10 && t.p50_ms > 0.0 && t.p50_ms <= t.p95_ms && t.p95_ms <= t.p99_ms && t.images_per_s > 0.0
            );
        }
    }
}
