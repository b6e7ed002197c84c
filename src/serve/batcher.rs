//! Requests of several callers in one call of the network: the first request opens a batch, further ones join until it is
//! full or the latency bound has passed. An image does not depend on its batch, so nobody notices but the throughput.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::metrics::Metrics;
use crate::error::{Error, Result};
use crate::runtime::run_batched;
use crate::runtime::student::Student;
use crate::tensor::{DType, HostTensor};

/// Images of one caller.
struct Job {
    inputs: Vec<(String, HostTensor)>,
    count: usize,
    reply: oneshot::Sender<Result<HostTensor>>,
}

/// Limits of the batches.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Images a call of the network at most.
    pub batch: usize,
    /// How long a request waits for others at most.
    pub wait: Duration,
    /// Requests that may wait.
    pub queue: usize,
}

/// Where requests are left; the network runs in a thread of its own, which ends when the last copy of this is dropped and
/// all that waits is done.
#[derive(Clone)]
pub struct Batcher {
    jobs: SyncSender<Job>,
    metrics: Arc<Metrics>,
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
        metrics: Arc<Metrics>,
    ) -> Result<(Self, std::thread::JoinHandle<()>)> {
        let (jobs, waiting) = sync_channel(limits.queue.max(1));
        let seen = metrics.clone();
        let work = move || run(student, &waiting, limits, &seen);
        let thread = std::thread::Builder::new().name("network".into()).spawn(work)?;
        Ok((Self { jobs, metrics }, thread))
    }

    /// The samples for these inputs, `count` images.
    pub async fn sample(
        &self,
        inputs: Vec<(String, HostTensor)>,
        count: usize,
    ) -> std::result::Result<HostTensor, Refused> {
        let (reply, answer) = oneshot::channel();
        self.metrics.waiting.inc();
        let sent = self.jobs.try_send(Job { inputs, count, reply });
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

fn run(mut student: Student, waiting: &Receiver<Job>, limits: Limits, metrics: &Metrics) {
    let mut held: Option<Job> = None;
    loop {
        let first = match held.take().map_or_else(|| waiting.recv(), Ok) {
            Ok(job) => job,
            Err(_) => return,
        };
        let (mut batch, mut images) = (vec![first], 0);
        images += batch[0].count;
        let end = Instant::now() + limits.wait;
        while images < limits.batch {
            match waiting.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(job) if images + job.count > limits.batch || !alike(&batch[0], &job) => {
                    held = Some(job);
                    break;
                }
                Ok(job) => {
                    images += job.count;
                    batch.push(job);
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        metrics.waiting.dec_by(batch.len() as i64);
        let began = Instant::now();
        let result = together(&mut student, &batch, limits.batch);
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
                    let _ = job.reply.send(Err(Error::backend(text.clone())));
                }
            }
        }
    }
}

/// Whether two requests can share a call: rows of one size (conditions may leave theirs free).
fn alike(a: &Job, b: &Job) -> bool {
    a.inputs.iter().zip(&b.inputs).all(|((_, s), (_, t))| s.shape().get(1..) == t.shape().get(1..))
}

/// One call for all: inputs joined by rows.
fn together(student: &mut Student, batch: &[Job], largest: usize) -> Result<HostTensor> {
    let mut inputs: Vec<(String, HostTensor)> = Vec::new();
    for (k, (name, first)) in batch[0].inputs.iter().enumerate() {
        let parts: Vec<HostTensor> = batch.iter().map(|j| j.inputs[k].1.clone()).collect();
        let joined = if parts.len() == 1 { first.clone() } else { HostTensor::concat_rows(&parts)? };
        inputs.push((name.clone(), joined));
    }
    let named: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let outputs = run_batched(student.engine(), &named, largest)?;
    let found = outputs.into_iter().find(|(n, _)| n == "sample").map(|(_, t)| t);
    Ok(found.ok_or_else(|| Error::backend("no output `sample`"))?.cast(DType::F32))
}
