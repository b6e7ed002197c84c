//! Requests of several callers in one call of the network: what has come while the network was busy shares the next call, and an
//! idle network never waits. An image does not depend on its batch, so nobody notices but the throughput.

use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::Instant;

use tokio::sync::oneshot;

use super::metrics::ModelMetrics;
use crate::error::{Error, Kind, Result};
use crate::runtime::run_batched;
use crate::runtime::student::Student;
use crate::tensor::{DType, HostTensor};

/// One input of a request's samples.
#[derive(Debug)]
pub enum Rows {
    /// A row a sample.
    Each(HostTensor),
    /// Rows that go to the samples in turn, beginning with the one of this number. They are copied only for the call that they are
    /// part of: a long text for 64 samples is in memory once.
    InTurn(HostTensor, u64),
}

impl Rows {
    fn tensor(&self) -> &HostTensor {
        match self {
            Self::Each(t) | Self::InTurn(t, _) => t,
        }
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.tensor().bytes().len()
    }

    /// Bytes of one row.
    fn row_bytes(&self) -> usize {
        let t = self.tensor();
        t.shape().iter().skip(1).product::<usize>() * t.dtype().size()
    }

    /// The rows of samples `start..start + count`.
    fn of(&self, start: usize, count: usize) -> Result<HostTensor> {
        match self {
            Self::Each(t) => t.rows(start, count),
            Self::InTurn(t, first) => {
                let held = t.shape()[0] as u64;
                let row = |k: usize| t.rows(((first % held + (start + k) as u64) % held) as usize, 1);
                HostTensor::concat_rows(&(0..count).map(row).collect::<Result<Vec<_>>>()?)
            }
        }
    }
}

/// Images of one caller.
struct Job {
    inputs: Vec<(String, Rows)>,
    count: usize,
    reply: oneshot::Sender<Result<HostTensor>>,
}

impl Job {
    /// Requests are joined input by input, so that whichever way their callers ordered them, they lie alike.
    fn new(mut inputs: Vec<(String, Rows)>, count: usize, reply: oneshot::Sender<Result<HostTensor>>) -> Self {
        inputs.sort_by(|(a, _), (b, _)| a.cmp(b));
        Self { inputs, count, reply }
    }
}

/// Limits of the batches.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Images a call of the network at most.
    pub batch: usize,
    /// Requests that may wait.
    pub queue: usize,
    /// Bytes of one call's inputs at most, but for a single row that is larger.
    pub bytes: usize,
}

/// Where requests are left; the network runs in a thread of its own, which ends when the last copy of this is dropped and
/// all that waits is done.
#[derive(Clone)]
pub struct Batcher {
    jobs: SyncSender<Job>,
    metrics: ModelMetrics,
}

/// Why there is no sample.
pub enum Refused {
    /// Too many requests wait.
    Busy,
    Failed(Error),
}

impl Batcher {
    /// Starts the thread.
    pub fn start(
        student: Student,
        limits: Limits,
        metrics: ModelMetrics,
    ) -> Result<(Self, std::thread::JoinHandle<()>)> {
        let (jobs, waiting) = sync_channel(limits.queue.max(1));
        let seen = metrics.clone();
        let work = move || run(student, &waiting, limits, &seen);
        let thread = std::thread::Builder::new().name("network".into()).spawn(work)?;
        Ok((Self { jobs, metrics }, thread))
    }

    /// The samples for these inputs, `count` images. Where this is dropped before its turn, nothing is computed for it.
    pub async fn sample(&self, inputs: Vec<(String, Rows)>, count: usize) -> std::result::Result<HostTensor, Refused> {
        let (reply, answer) = oneshot::channel();
        self.metrics.waiting.inc();
        let sent = self.jobs.try_send(Job::new(inputs, count, reply));
        if let Err(e) = sent {
            self.metrics.waiting.dec();
            return Err(match e {
                TrySendError::Full(_) => Refused::Busy,
                TrySendError::Disconnected(_) => Refused::Failed(Error::backend("the network's thread has ended")),
            });
        }
        match answer.await {
            Ok(result) => result.map_err(Refused::Failed),
            Err(_) => Err(Refused::Failed(Error::backend("the network's thread has ended"))),
        }
    }
}

fn run(mut student: Student, waiting: &Receiver<Job>, limits: Limits, metrics: &ModelMetrics) {
    let mut held: Option<Job> = None;
    let wanted = |job: Job| {
        // Its caller has gone.
        let gone = job.reply.is_closed();
        if gone {
            metrics.waiting.dec();
            metrics.abandoned.inc();
        }
        (!gone).then_some(job)
    };
    loop {
        let first = match held.take().map_or_else(|| waiting.recv(), Ok) {
            Ok(job) => job,
            Err(_) => return,
        };
        let Some(first) = wanted(first) else { continue };
        let mut images = first.count;
        let mut batch = vec![first];
        while images < limits.batch {
            match waiting.try_recv() {
                Ok(job) => {
                    let Some(job) = wanted(job) else { continue };
                    if images + job.count > limits.batch || !alike(&batch[0], &job) {
                        held = Some(job);
                        break;
                    }
                    images += job.count;
                    batch.push(job);
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
        metrics.waiting.dec_by(batch.len() as i64);
        let began = Instant::now();
        let result = together(&mut student, &batch, limits);
        metrics.batches.observe(images as f64);
        metrics.network.observe(began.elapsed().as_secs_f64());
        match result {
            Ok(samples) => {
                metrics.images.inc_by(images as u64);
                let mut at = 0;
                for job in batch {
                    let _ = job.reply.send(samples.rows(at, job.count));
                    at += job.count;
                }
            }
            Err(e) => {
                tracing::error!("the network failed: {e}");
                let text = e.to_string();
                for job in batch {
                    let _ = job.reply.send(Err(Error::of_text(Kind::Backend, &text)));
                }
            }
        }
    }
}

/// Whether two requests can share a call: rows of one size (conditions may leave theirs free).
fn alike(a: &Job, b: &Job) -> bool {
    a.inputs.iter().zip(&b.inputs).all(|((_, s), (_, t))| s.tensor().shape().get(1..) == t.tensor().shape().get(1..))
}

/// One call for all, inputs joined by rows; several where these would take too many bytes.
fn together(student: &mut Student, batch: &[Job], limits: Limits) -> Result<HostTensor> {
    let row: usize = batch[0].inputs.iter().map(|(_, r)| r.row_bytes()).sum();
    let most = (limits.bytes / row.max(1)).clamp(1, limits.batch);
    let mut samples = Vec::new();
    let mut spans: Vec<(&Job, usize, usize)> = Vec::new();
    let mut rows = 0;
    let mut call = |spans: &mut Vec<(&Job, usize, usize)>| -> Result<()> {
        samples.push(one_call(student, spans, limits.batch)?);
        spans.clear();
        Ok(())
    };
    for job in batch {
        let mut start = 0;
        while start < job.count {
            let count = (job.count - start).min(most - rows);
            spans.push((job, start, count));
            (start, rows) = (start + count, rows + count);
            if rows == most {
                call(&mut spans)?;
                rows = 0;
            }
        }
    }
    if rows > 0 {
        call(&mut spans)?;
    }
    if samples.len() == 1 { Ok(samples.remove(0)) } else { HostTensor::concat_rows(&samples) }
}

/// The samples of these parts of requests: where each begins and how many it has.
fn one_call(student: &mut Student, spans: &[(&Job, usize, usize)], largest: usize) -> Result<HostTensor> {
    let Some((first, ..)) = spans.first() else { return Err(Error::usage("a call of the network without samples")) };
    let mut inputs: Vec<(&str, HostTensor)> = Vec::new();
    for (k, (name, _)) in first.inputs.iter().enumerate() {
        let parts = spans.iter().map(|(job, start, count)| job.inputs[k].1.of(*start, *count));
        let mut parts = parts.collect::<Result<Vec<_>>>()?;
        let joined = if parts.len() == 1 { parts.remove(0) } else { HostTensor::concat_rows(&parts)? };
        inputs.push((name, joined));
    }
    let named: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (*n, t)).collect();
    let outputs = run_batched(student.engine(), &named, largest)?;
    let found = outputs.into_iter().find(|(n, _)| n == "sample").map(|(_, t)| t);
    Ok(found.ok_or_else(|| Error::backend("no output `sample`"))?.cast(DType::F32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::testing;
    use crate::runtime::{EngineKind, EngineOptions};

    #[test]
    fn rows_in_turn_are_those_of_the_images() {
        let t = HostTensor::new(&[3, 2], &[0f32, 1., 2., 3., 4., 5.]).unwrap();
        let rows = Rows::InTurn(t.clone(), u64::MAX - 1);
        // 2^64 - 2 = 2 (mod 3).
        assert_eq!(rows.of(0, 4).unwrap().to_f32(), [4., 5., 0., 1., 2., 3., 4., 5.]);
        assert_eq!(Rows::Each(t).of(1, 2).unwrap().to_f32(), [2., 3., 4., 5.]);
    }

    #[test]
    fn a_call_that_would_be_too_large_is_several_with_the_same_samples() {
        let options = EngineOptions { engine: EngineKind::Tract, ..EngineOptions::default() };
        let mut student = Student::from_bytes(&testing::student("batch"), &options).unwrap();
        let job = |first: u64, count: usize| {
            let request = crate::runtime::student::SampleRequest { batch: 64, ..Default::default() };
            let inputs = student.inputs(&request, first, count).unwrap();
            let mut inputs: Vec<_> = inputs.into_iter().map(|(n, t)| (n, Rows::Each(t))).collect();
            // A caller may name them in any order.
            if first == 7 {
                inputs.reverse();
            }
            Job::new(inputs, count, oneshot::channel().0)
        };
        let jobs = [job(0, 3), job(7, 5), job(20, 1)];
        let limits = |bytes| Limits { batch: 16, queue: 1, bytes };
        let whole = together(&mut student, &jobs, limits(1 << 20)).unwrap();
        assert_eq!(whole.shape()[0], 9);
        for bytes in [1, 60, 100] {
            assert_eq!(together(&mut student, &jobs, limits(bytes)).unwrap(), whole, "{bytes} bytes a call");
        }
    }

    #[test]
    fn what_came_meanwhile_shares_a_call_and_who_has_gone_gets_none() {
        let options = EngineOptions { engine: EngineKind::Tract, ..EngineOptions::default() };
        let student = Student::from_bytes(&testing::student("batch"), &options).unwrap();
        let (jobs, waiting) = sync_channel(8);
        let mut answers = Vec::new();
        for (first, count) in [(0, 3), (3, 5), (8, 1), (9, 9)] {
            let request = crate::runtime::student::SampleRequest { batch: 64, ..Default::default() };
            let inputs = student.inputs(&request, first, count).unwrap();
            let (reply, answer) = oneshot::channel();
            let inputs = inputs.into_iter().map(|(n, t)| (n, Rows::Each(t))).collect();
            jobs.send(Job::new(inputs, count, reply)).unwrap();
            answers.push(answer);
        }
        drop((jobs, answers.remove(1)));
        let counted = super::super::metrics::Metrics::default();
        let metrics = counted.of_model("student", "tract");
        run(student, &waiting, Limits { batch: 12, queue: 8, bytes: 1 << 20 }, &metrics);
        let counts: Vec<usize> = answers.iter_mut().map(|a| a.try_recv().unwrap().unwrap().shape()[0]).collect();
        assert_eq!(counts, [3, 1, 9]);
        let text = counted.text().unwrap();
        // 3 and 1 together; 9 more are too many for the call.
        for line in [
            "disback_batch_images_count{model=\"student\"} 2",
            "disback_images_total{model=\"student\"} 13",
            "disback_abandoned_requests_total{model=\"student\"} 1",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
