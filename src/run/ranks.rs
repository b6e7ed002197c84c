//! A run of several processes: what rank 0 finds out is told to the others, and what each was given is compared.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::distill::Config;
use crate::error::{Context, Error, Result};
use crate::run::identity::Identity;
use crate::run::request::{Request, Resume};
use crate::torch::dist::World;

/// What a run is settled to be before its teacher is loaded.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Settled {
    /// The configuration, as TOML.
    config: String,
    /// Whether the user gave the batch, or has it found.
    pub batch_given: bool,
    /// Whether there is a run to go on with.
    goes_on: bool,
    freeze: Vec<String>,
    train: Vec<String>,
    /// What the run, or the trajectory, began as.
    pub begun: Option<Identity>,
}

impl Settled {
    /// Of rank 0's configuration and request.
    pub fn new(config: &Config, batch_given: bool, request: &Request, begun: Option<Identity>) -> Result<Self> {
        let (freeze, train) = (request.freeze.clone(), request.train.clone());
        Ok(Self { config: config.to_toml()?, batch_given, goes_on: request.goes_on(), freeze, train, begun })
    }

    /// Takes it over, on every process.
    pub fn apply(&self, request: &mut Request) -> Result<Config> {
        request.freeze.clone_from(&self.freeze);
        request.train.clone_from(&self.train);
        if !request.world.leads() {
            request.resume = if self.goes_on { Resume::Always } else { Resume::Never };
        }
        Config::from_toml(&self.config, request.objective.clone())
    }
}

/// A configuration of rank 0's, on every process.
pub(super) fn shared(request: &Request, make: impl FnOnce() -> Result<Config>) -> Result<Config> {
    if request.world.is_alone() {
        return make();
    }
    let text = request.world.from_leader(|| make()?.to_toml())?;
    Config::from_toml(&text, request.objective.clone())
}

/// Refuses processes that were started with different requests.
pub(super) fn compare_requests(request: &Request) -> Result<()> {
    let world = &request.world;
    if world.is_alone() {
        return Ok(());
    }
    let file = request
        .config
        .as_ref()
        .map(|path| crate::files::read_text(path, crate::files::SETTINGS).with_context(|| path.display().to_string()));
    let given = world.agree(file.transpose())?;
    let list = |items: &[String]| items.join(" ");
    world.same(&BTreeMap::from([
        ("the version of this program", env!("CARGO_PKG_VERSION").to_owned()),
        ("the command", format!("{:?}", request.stages)),
        ("the configuration given by options and --set", list(&request.sets)),
        ("the configuration file", given.unwrap_or_default()),
        ("--card", list(&request.card)),
        ("--freeze", list(&request.freeze)),
        ("--train", list(&request.train)),
        ("--resume", format!("{:?}", request.resume)),
        ("--batch auto", request.batch_auto.to_string()),
    ]))
}

/// Refuses processes that have read different files, or compute with other numbers of threads.
pub(super) fn compare_identities(world: &World, identity: &Identity) -> Result<()> {
    if world.is_alone() {
        return Ok(());
    }
    let files: Vec<String> = identity.files.iter().map(|(key, hash)| format!("{key} {hash}")).collect();
    world.same(&BTreeMap::from([
        ("the teacher (SHA-256 of its graph and weights)", identity.teacher.clone()),
        ("the files of the configuration (SHA-256)", files.join(", ")),
        ("the number of CPU threads", identity.threads.to_string()),
    ]))
}

/// Refuses an iteration with fewer micro-batches than there are processes to share them.
pub(crate) fn check_split(size: usize, config: &Config) -> Result<()> {
    let (accumulate, batch) = (config.accumulate, config.batch);
    if accumulate >= size {
        return Ok(());
    }
    let split = batch
        .is_multiple_of(size)
        .then(|| format!("--batch {} --accumulate {} has the same images an update", batch / size, accumulate * size));
    let split = split.unwrap_or_else(|| format!("--accumulate {size} gives each process one of {batch} images"));
    Err(Error::usage(format!(
        "{size} processes share the forward passes of an update, and there are {accumulate} (accumulate)"
    ))
    .hint(split))
}
