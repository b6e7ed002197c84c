//! How fast a student runs, and its teacher's sampler beside it.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::diffusion::{Sampler, TeacherOnEngine, TeacherRequest};
use crate::error::{Error, Result};
use crate::memory;
use crate::runtime::student::{SampleRequest, Student};
use crate::runtime::{Dim, EngineOptions};
use crate::tensor::HostTensor;

/// Calls that do not count, before those that do.
const WARM_UP: usize = 3;
/// Fewest calls that count.
const FEWEST: usize = 10;

/// One engine at one batch size.
#[derive(Debug, Clone, Serialize)]
pub struct Timing {
    /// Name of the engine and of the provider that ran the file.
    pub engine: String,
    /// Images a call.
    pub batch: usize,
    /// Opening the file, milliseconds; TensorRT builds its engine here where the cache has none.
    pub load_ms: f64,
    /// Milliseconds of the first call, which may compile or allocate.
    pub first_ms: f64,
    /// Median of the milliseconds a call; inputs are copied from and outputs to the caller's memory.
    pub p50_ms: f64,
    /// 95th percentile of the milliseconds a call.
    pub p95_ms: f64,
    /// 99th percentile of the milliseconds a call.
    pub p99_ms: f64,
    /// Images a second over all timed calls together.
    pub images_per_s: f64,
    /// Number of timed calls; the warm-up is not among them.
    pub calls: usize,
    /// Median of the milliseconds of the call alone: inputs bound beforehand, outputs left where the provider makes
    /// them.
    pub bound_p50_ms: f64,
    /// Largest resident memory of the process during this row, MiB; `None` where the system does not tell.
    pub peak_mib: Option<f64>,
}

/// A teacher's sampler beside the student.
#[derive(Debug, Clone, Serialize)]
pub struct TeacherTiming {
    /// Name of the engine and of the provider that ran the file.
    pub engine: String,
    /// Images a batch.
    pub batch: usize,
    /// Steps of the sampler.
    pub steps: usize,
    /// Network evaluations an image.
    pub nfe: usize,
    /// Opening the file, milliseconds.
    pub load_ms: f64,
    /// Milliseconds a batch: median of the runs.
    pub p50_ms: f64,
    /// Milliseconds an image: `p50_ms` over the batch size.
    pub ms_per_image: f64,
    /// Number of timed runs; the warm-up is not among them.
    pub runs: usize,
    /// Largest resident memory of the process during this row, MiB; `None` where the system does not tell.
    pub peak_mib: Option<f64>,
}

/// Value at a share of sorted times, nearest rank.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

fn ms(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

/// Sorted times of calls for about `seconds` (at least [`FEWEST`]), after a warm-up.
fn repeat(seconds: f64, mut call: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    for _ in 0..WARM_UP {
        call()?;
    }
    let mut times = Vec::new();
    let end = Instant::now() + Duration::from_secs_f64(seconds.clamp(0.0, 3600.0));
    while times.len() < FEWEST || Instant::now() < end {
        let began = Instant::now();
        call()?;
        times.push(ms(began));
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// Opens the student with these options and times calls of each batch size for about `seconds` each (ten calls at least,
/// after three that do not count), once with copies and once bound. Inputs are made beforehand.
pub fn run(path: &Path, options: &EngineOptions, batches: &[usize], seconds: f64) -> Result<Vec<Timing>> {
    let mut out = Vec::new();
    for &batch in batches {
        if batch == 0 {
            return Err(Error::usage("a batch of 0 images"));
        }
        memory::reset_peak();
        let began = Instant::now();
        let mut student = Student::open(path, options)?;
        let load_ms = ms(began);
        if let Some(Dim::Fixed(n)) = student.info().noise.shape.first()
            && *n != batch
        {
            return Err(Error::usage(format!("--batch {batch}: the student's batch is fixed at {n}")));
        }
        let mut request =
            SampleRequest { batch, embeddings: student.info().random_rows(1, 8)?, ..SampleRequest::default() };
        student.foresee(&request, batch)?;
        request.embeddings = student.info().random_rows(1, batch)?;
        let inputs = student.inputs(&request, 0, batch)?;
        let named: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let engine = student.engine_name();
        let began = Instant::now();
        student.engine().run(&named)?;
        let first_ms = ms(began);
        let times = repeat(seconds, || student.engine().run(&named).map(drop))?;
        let mut call = student.engine().bound(&named)?;
        let bound = repeat(seconds, &mut call)?;
        drop(call);
        let total: f64 = times.iter().sum();
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
            bound_p50_ms: percentile(&bound, 0.50),
            peak_mib: memory::peak().map(|b| b as f64 / f64::from(1 << 20)),
        });
    }
    Ok(out)
}

/// Times the teacher's own sampler at one batch size: at least three runs, after one that does not count.
pub fn teacher(
    path: &Path,
    card: &[String],
    options: &EngineOptions,
    batch: usize,
    steps: usize,
    seconds: f64,
) -> Result<TeacherTiming> {
    if batch == 0 || steps == 0 {
        return Err(Error::usage("the teacher needs a batch and steps of 1 or more"));
    }
    memory::reset_peak();
    let began = Instant::now();
    let mut teacher = TeacherOnEngine::open(path, card, options)?;
    let load_ms = ms(began);
    let images = SampleRequest { batch, embeddings: teacher.random_rows(1, batch)?, ..SampleRequest::default() };
    let request = TeacherRequest { images, sampler: Sampler::default(), steps, shift: 0.0, guidance: 1.0.into() };
    let mut nfe = teacher.sample(&request, 0, batch)?.nfe;
    let mut times = Vec::new();
    let end = Instant::now() + Duration::from_secs_f64(seconds.clamp(0.0, 3600.0));
    while times.len() < 3 || Instant::now() < end {
        let began = Instant::now();
        nfe = teacher.sample(&request, 0, batch)?.nfe;
        times.push(ms(began));
    }
    times.sort_by(f64::total_cmp);
    let p50_ms = percentile(&times, 0.5);
    Ok(TeacherTiming {
        engine: teacher.engine_name(),
        batch,
        steps,
        nfe,
        load_ms,
        p50_ms,
        ms_per_image: p50_ms / batch as f64,
        runs: times.len(),
        peak_mib: memory::peak().map(|b| b as f64 / f64::from(1 << 20)),
    })
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
            assert!(t.calls >= FEWEST && t.p50_ms > 0.0 && t.p50_ms <= t.p95_ms && t.p95_ms <= t.p99_ms, "{t:?}");
            assert!(t.images_per_s > 0.0 && t.bound_p50_ms > 0.0 && t.peak_mib.is_none_or(|m| m > 1.0), "{t:?}");
        }
    }

    #[test]
    fn a_bound_call_computes_what_a_plain_one_does() {
        let mut student = Student::from_bytes(&testing::student("batch"), &EngineOptions::default()).unwrap();
        let inputs = student.inputs(&SampleRequest::default(), 0, 3).unwrap();
        let named: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let before = student.engine().run(&named).unwrap();
        (0..3).try_for_each(|_| student.engine().bound(&named)?()).unwrap();
        assert_eq!(student.engine().run(&named).unwrap(), before);
        assert!(student.engine().bound(&named[..1]).is_err());
    }
}
