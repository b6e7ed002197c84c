//! What the processes of a run tell each other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor};

use super::group::{Group, has_nccl};
use super::launcher::Place;
use crate::error::{Error, Kind as Fault, Result};

/// How long the process that keeps the others' messages stays for them to read what has failed.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// All processes of a run, as one of them sees them. Rank 0 leads: it decides and writes. What a method here does with several
/// processes, all of them do in the same order.
#[derive(Debug, Clone)]
pub struct World(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    rank: usize,
    size: usize,
    /// Number on this machine, and processes there.
    here: (usize, usize),
    timeout: Duration,
    group: Option<Arc<Group>>,
    /// Messages so far, which number the next one.
    messages: AtomicU64,
    /// A process is gone or has failed: there is nobody to talk to any more.
    broken: AtomicBool,
    /// Nanoseconds that this process has waited for the others.
    waited: AtomicU64,
}

impl Default for World {
    fn default() -> Self {
        Self::alone()
    }
}

/// What a process says in an exchange.
#[derive(serde::Serialize, serde::Deserialize)]
enum Said {
    Value(String),
    /// Whether the user's request makes no sense, and why it fails.
    Failed(bool, String),
}

impl World {
    /// One process.
    pub fn alone() -> Self {
        Self::new(0, 1, (0, 1), Duration::ZERO, None)
    }

    fn new(rank: usize, size: usize, here: (usize, usize), timeout: Duration, group: Option<Arc<Group>>) -> Self {
        let (messages, waited, broken) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        Self(Arc::new(Inner { rank, size, here, timeout, group, messages, broken, waited }))
    }

    /// Meets the other processes. `timeout`: how long one waits for another, now and later.
    ///
    /// Errors: they do not all come, or cannot reach each other.
    pub fn form(place: &Place, timeout: Duration) -> Result<Self> {
        let nccl = crate::torch::cuda_half::load().is_ok() && has_nccl() && tch::Cuda::is_available();
        let at = format!("rank {} of {}, {}:{}", place.rank, place.world, place.address, place.port);
        let group = Group::form(place, timeout, nccl).map_err(|e| {
            e.context(at.clone()).context("the processes of this run cannot meet").hint(
                "all of them must reach MASTER_ADDR:MASTER_PORT; where a machine has several networks, GLOO_SOCKET_IFNAME names the \
                 one to use",
            )
        })?;
        Ok(Self::new(place.rank, place.world, (place.local, place.local_world), timeout, Some(Arc::new(group))))
    }

    /// Number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.0.rank
    }
    /// How many processes there are.
    pub fn size(&self) -> usize {
        self.0.size
    }
    /// Number of this process among those of its machine, from 0.
    pub fn number_here(&self) -> usize {
        self.0.here.0
    }
    /// How many of them this machine has.
    pub fn on_this_machine(&self) -> usize {
        self.0.here.1.max(1)
    }
    /// Whether this process decides and writes.
    pub fn leads(&self) -> bool {
        self.0.rank == 0
    }
    /// Whether there is one process alone.
    pub fn is_alone(&self) -> bool {
        self.0.size == 1
    }
    /// Whether another process is gone, or has failed.
    pub fn is_broken(&self) -> bool {
        self.0.broken.load(Ordering::Relaxed)
    }
    pub(super) fn group(&self) -> Option<&Arc<Group>> {
        self.0.group.as_ref()
    }

    /// Seconds that this process has waited for the others, sending and receiving included.
    pub fn waited(&self) -> f64 {
        Duration::from_nanos(self.0.waited.load(Ordering::Relaxed)).as_secs_f64()
    }

    /// Talks to the others; an error says that one of them is to blame.
    pub(super) fn talk<T>(&self, talk: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.is_alone() {
            return talk();
        }
        let started = Instant::now();
        let result = talk();
        self.0.waited.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result.map_err(|e| {
            self.0.broken.store(true, Ordering::Relaxed);
            let text = e.to_string();
            let what = match text.contains("imed out") || text.contains("imeout") {
                true => format!("another process of this run does not answer within {} s", self.0.timeout.as_secs()),
                false => "another process of this run has ended".to_owned(),
            };
            Error::backend(format!("rank {}: {what} ({text})", self.rank())).hint(
                "its own message says why; the same command with --resume (or --resume=auto) goes on from the last checkpoint",
            )
        })
    }

    /// What every process has to say, in the order of their ranks, or the error of the first that has failed.
    fn exchange(&self, mine: Result<String>) -> Result<Vec<String>> {
        let Some(group) = self.group() else { return Ok(vec![mine?]) };
        if self.is_broken() {
            return mine.and(Err(Error::backend("another process of this run has failed")));
        }
        let number = self.0.messages.fetch_add(1, Ordering::Relaxed);
        let said = match &mine {
            Ok(text) => Said::Value(text.clone()),
            Err(e) => Said::Failed(e.kind() == Fault::Usage, e.to_string()),
        };
        let said = serde_json::to_vec(&said).map_err(|e| Error::backend(e.to_string()))?;
        self.talk(|| group.put(&format!("said/{number}/{}", self.rank()), &said))?;
        let (mut values, mut failed) = (Vec::new(), None);
        for rank in 0..self.size() {
            let bytes = self.talk(|| group.get(&format!("said/{number}/{rank}"), self.0.timeout))?;
            match serde_json::from_slice(&bytes).map_err(|e| Error::backend(e.to_string()))? {
                Said::Value(text) => values.push(text),
                Said::Failed(usage, text) => {
                    failed = Some((rank, if usage { Fault::Usage } else { Fault::Backend }, text));
                    break;
                }
            }
        }
        let Some((rank, kind, text)) = failed else { return mine.map(|_| values) };
        self.0.broken.store(true, Ordering::Relaxed);
        // Who keeps the messages stays until all have read this one.
        if self.leads() {
            for other in 1..self.size() {
                let _ = group.get(&format!("read/{number}/{other}"), LAST_WORDS);
            }
        } else {
            let _ = group.put(&format!("read/{number}/{}", self.rank()), b"");
        }
        mine.and(Err(Error::new(kind, format!("rank {rank} has failed: {text}"))))
    }

    /// This process's result where all have one, otherwise its own error or that of another.
    pub fn agree<T>(&self, mine: Result<T>) -> Result<T> {
        if self.is_alone() {
            return mine;
        }
        match mine {
            Ok(value) => self.exchange(Ok(String::new())).map(|_| value),
            Err(e) => {
                let text = Error::new(e.kind(), e.to_string());
                let _ = self.exchange(Err(text));
                Err(e)
            }
        }
    }

    /// What rank 0 has made, on every process. The others do not call `make`.
    pub fn from_leader<T: Serialize + DeserializeOwned>(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.is_alone() {
            return make();
        }
        let fault = |e: serde_json::Error| Error::backend(format!("a message between processes: {e}"));
        let mine = match self.leads() {
            true => make().and_then(|value| serde_json::to_string(&value).map_err(fault)),
            false => Ok(String::new()),
        };
        let said = match mine {
            Err(e) => return self.agree(Err(e)),
            Ok(text) => self.exchange(Ok(text))?,
        };
        serde_json::from_str(&said[0]).map_err(fault)
    }

    /// Refuses to go on where the processes differ in what they were given: names and values, the same names everywhere.
    pub fn same(&self, mine: &BTreeMap<&'static str, String>) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let text = serde_json::to_string(mine).map_err(|e| Error::backend(e.to_string()))?;
        let all = self.exchange(Ok(text))?;
        let read = |text: &String| serde_json::from_str::<BTreeMap<String, String>>(text).unwrap_or_default();
        let first = read(&all[0]);
        for (rank, other) in all.iter().enumerate().skip(1) {
            let other = read(other);
            let Some((name, value)) = first.iter().find(|(name, value)| other.get(*name) != Some(value)) else {
                continue;
            };
            let theirs = other.get(name).map_or("nothing", String::as_str);
            return Err(Error::usage(format!(
                "the processes of this run were not started alike: {name} is {} on rank 0, {} on rank {rank}",
                shown(value),
                shown(theirs)
            ))
            .hint("give every process the same command line, files and version of this program"));
        }
        Ok(())
    }

    /// Gives every process rank 0's values, in place.
    pub fn broadcast(&self, tensors: &[Tensor]) -> Result<()> {
        self.group().map_or(Ok(()), |group| self.talk(|| group.broadcast(tensors)))
    }

    /// `mine` (`[n]`) of every process, as `[world, n]`.
    pub fn gather(&self, mine: &Tensor) -> Result<Tensor> {
        match self.group() {
            None => Ok(mine.f_view([1, -1])?),
            Some(group) => self.talk(|| group.gather(mine)),
        }
    }

    /// A tensor that `owner` holds, on rank 0 (contiguous); the others get nothing. `mine`: it, or on other processes anything of its
    /// size, kind and device. All processes call this.
    pub fn to_leader(&self, owner: usize, mine: &Tensor) -> Result<Option<Tensor>> {
        let Some(group) = self.group() else { return Ok(Some(mine.f_contiguous()?)) };
        match (self.leads(), self.rank() == owner) {
            (true, true) => Ok(Some(mine.f_contiguous()?)),
            (true, false) => {
                let mut there = Tensor::f_empty(mine.size(), (mine.kind(), mine.device()))?;
                self.talk(|| group.receive(owner, &mut there))?;
                Ok(Some(there))
            }
            (false, true) => self.talk(|| group.send(mine)).map(|()| None),
            (false, false) => Ok(None),
        }
    }

    /// Each flag that any process has raised.
    pub fn any<const N: usize>(&self, flags: [bool; N]) -> Result<[bool; N]> {
        if self.is_alone() {
            return Ok(flags);
        }
        let mine = Tensor::from_slice(&flags.map(i64::from));
        let found = Vec::<i64>::try_from(self.gather(&mine)?.f_sum_dim_intlist(
            Some([0i64].as_slice()),
            false,
            Kind::Int64,
        )?)?;
        let mut raised = [false; N];
        raised.iter_mut().zip(found).for_each(|(flag, count)| *flag = count > 0);
        Ok(raised)
    }

    /// Rank 0's value of something that must be the same for all.
    pub fn decide(&self, mine: f32) -> Result<f32> {
        if self.is_alone() {
            return Ok(mine);
        }
        let value = Tensor::from_slice(&[mine]);
        self.broadcast(std::slice::from_ref(&value))?;
        Ok(value.f_to_device(Device::Cpu)?.f_double_value(&[0])? as f32)
    }
}

/// A value for people: hashes and long texts cut short.
fn shown(value: &str) -> String {
    let mut text: String = value.chars().take(60).collect();
    if text.len() < value.len() {
        text.push_str("...");
    }
    if text.is_empty() { "nothing".into() } else { text }
}
