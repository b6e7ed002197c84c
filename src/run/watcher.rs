//! What goes on beside a run: sheets and events, measures, the best student, snapshots, losses by noise level.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tch::Tensor;

use super::data_check::DataCheck;
use super::divergence::{self, Watch};
use super::monitor::Monitor;
use super::origin::{StudentOrigin, Written};
use super::sheets::{self, Sheets};
use crate::diffusion::Denoiser;
use crate::distill::batches;
use crate::distill::checkpoint::StageKind;
use crate::distill::inputs::denoising_loss;
use crate::distill::metrics::{self, MetricsRow};
use crate::distill::observer::Begin;
use crate::distill::{Config, DebugBatch, Observer, RunDir, Running, Step, Student, Wish, cost};
use crate::error::{Context, Error, Kind, Result};
use crate::eval::in_loop::{At, InLoop, Settings};
use crate::noise::batch_noise;
use crate::report::tfevents::Hparam;
use crate::run::time_limit::TimeLimit;
use crate::runtime::EngineOptions;
use crate::tensor::HostTensor;
use crate::torch::{convert, shim};

/// Noise levels at which losses are looked at, and images of a look.
const LEVELS: usize = 12;
const LEVEL_IMAGES: usize = 16;

/// Watches one run.
pub struct Watcher<'a> {
    origin: StudentOrigin<'a>,
    config: &'a Config,
    run: &'a RunDir,
    /// Writes sample grids and the event file.
    pub sheets: Sheets,
    judge: Option<InLoop>,
    divergence: Watch,
    monitor: Arc<dyn Monitor>,
    /// Images and seconds of stage 1.
    degraded: (u64, f64),
    /// Reads the whole data set while the run goes on.
    pub data: Option<DataCheck>,
    /// When the run must be over.
    pub time_limit: Option<TimeLimit>,
    /// When the iteration before was done, and the longest one so far, with its checkpoint.
    stepped: (Instant, Duration),
    /// A target was entered whose losses by noise level have not been looked at.
    new_target: bool,
    /// Samples are wanted at once.
    samples_wanted: bool,
    /// Time spent on samples, measures and losses by noise level.
    looked: Duration,
    device: tch::Device,
}

fn settings(config: &Config) -> Vec<(String, Hparam)> {
    let table: toml::Table = config.to_toml().ok().and_then(|t| toml::from_str(&t).ok()).unwrap_or_default();
    let mut out = Vec::new();
    for (key, value) in &table {
        match value {
            toml::Value::Table(inner) => out.extend(inner.iter().map(|(k, v)| (format!("{key}.{k}"), v.clone()))),
            other => out.push((key.clone(), other.clone())),
        }
    }
    let value = |v: toml::Value| match v {
        toml::Value::Float(f) => Hparam::Number(f),
        toml::Value::Integer(i) => Hparam::Number(i as f64),
        toml::Value::Boolean(b) => Hparam::Flag(b),
        toml::Value::String(s) => Hparam::Text(s),
        other => Hparam::Text(other.to_string()),
    };
    out.into_iter().map(|(k, v)| (k, value(v))).collect()
}

/// Refuses a configuration whose files are not there, before anything is written.
pub fn check(config: &Config) -> Result<()> {
    for (key, file) in
        [("evaluate.reference", &config.evaluate.reference), ("evaluate.features", &config.evaluate.features)]
    {
        if !file.is_empty() && !std::path::Path::new(file).exists() {
            return Err(Error::io(format!("{key}: {file}: no such file or folder")));
        }
    }
    Ok(())
}

impl<'a> Watcher<'a> {
    /// Opens everything that could be missing or unfit before the first step.
    pub fn new(
        origin: StudentOrigin<'a>,
        config: &'a Config,
        run: &'a RunDir,
        mut sheets: Sheets,
        monitor: Arc<dyn Monitor>,
        device: tch::Device,
    ) -> Result<Self> {
        let evaluate = &config.evaluate;
        let judge = match evaluate.reference.is_empty() {
            true => None,
            false => {
                let wanted = Settings {
                    features: (!evaluate.features.is_empty()).then(|| evaluate.features.clone().into()),
                    reference: evaluate.reference.clone().into(),
                    patience: evaluate.patience,
                    batch: config.batch,
                    range: [-1.0, 1.0],
                    values: !sheets.makes_images(),
                    samples: evaluate.images,
                };
                let judge = InLoop::open(&wanted, run.path(), &EngineOptions::default())?;
                let card = &origin.teacher.card.card;
                match judge.by_values() {
                    true => judge.check(&card.shape, None)?,
                    false => judge.check(&sheets.image_shape(card)?, sheets.range())?,
                }
                Some(judge)
            }
        };
        let before = if run.metrics().is_file() { metrics::read(&run.metrics())? } else { Vec::new() };
        if before.is_empty() {
            let tags = ["evaluate/frechet", "backtrack/mismatch", "backtrack/loss_fake"];
            sheets.events().hparams(&settings(config), &tags)?;
        }
        let degraded =
            before.iter().rev().find(|r| r.stage == StageKind::Degrade).map_or((0, 0.0), |r| (r.images, r.seconds));
        let (time_limit, stepped) = (None, (Instant::now(), Duration::ZERO));
        Ok(Self {
            origin,
            config,
            run,
            sheets,
            judge,
            divergence: Watch::new(config, run.path()),
            monitor,
            degraded,
            data: None,
            time_limit,
            stepped,
            new_target: false,
            samples_wanted: false,
            looked: Duration::ZERO,
            device,
        })
    }

    /// What the run was warned of.
    pub fn warnings(&self) -> Vec<String> {
        let text = |w: &divergence::Warning| format!("{}, iteration {}: {}", w.stage.name(), w.iteration, w.text);
        self.divergence.warnings().iter().map(text).collect()
    }

    /// Seconds that this process has spent on samples, measures and losses by noise level.
    pub fn seconds_looking(&self) -> f64 {
        self.looked.as_secs_f64()
    }

    /// Does what is not training, and counts its time.
    fn look<T>(&mut self, look: impl FnOnce(&mut Self) -> T) -> T {
        let started = Instant::now();
        let seen = look(self);
        self.looked += started.elapsed();
        seen
    }

    /// The run is over: samples of the finished student are written.
    pub fn finished(&mut self, student: &Student) -> Result<()> {
        self.look(|watcher| watcher.last_samples(student))
    }

    fn last_samples(&mut self, student: &Student) -> Result<()> {
        self.sheets.finished(student)?;
        self.sheets.weights("student", student.params())?;
        self.sheets.events().hparams_end(true)
    }

    /// Samples of the averaged student, always the same noise and classes.
    fn samples(&self, student: &Student, count: usize) -> Result<HostTensor> {
        let card = &self.origin.teacher.card.card;
        let row = student.noise_shape();
        let (seed, batch) = (self.config.seed, self.config.batch.max(1));
        let mut parts = Vec::new();
        for start in (0..count).step_by(batch) {
            let rows = batch.min(count - start);
            let size: Vec<usize> = std::iter::once(rows).chain(row.iter().copied()).collect();
            let noise = HostTensor::new(&size, &batch_noise(seed, start as u64, rows, row.iter().product()))?;
            let conditions = sheets::conditions(self.config, card, start as u64, rows, self.device)?;
            let z = convert::to_torch(&noise)?.f_to_device(self.device)?;
            parts.push(convert::to_host(&tch::no_grad(|| student.generate(&z, &conditions))?)?);
        }
        HostTensor::concat_rows(&parts)
    }

    /// Forward passes of all networks so far, in images, stage 1 included: as a comparison counts them.
    fn passes(&self, step: &Step) -> u64 {
        let (each, images) = (cost::passes(self.config), self.config.images());
        let iterations = step.images / images;
        cost::stage_one(self.config, self.degraded.0 / images)
            + iterations * each.iteration
            + step.updates * each.update
    }

    fn measure(&mut self, step: &Step, networks: &Running) -> Result<()> {
        let by_values = self.judge.as_ref().is_some_and(InLoop::by_values);
        let Some(range) = self.sheets.range().or(by_values.then_some([-1.0, 1.0])) else { return Ok(()) };
        let samples = self.samples(networks.average, self.config.evaluate.images)?;
        let samples = self.sheets.images(samples)?;
        let at = At {
            update: step.updates,
            images: step.images,
            passes: self.passes(step),
            seconds: self.degraded.1 + step.seconds,
            node: step.node,
        };
        let Some(judge) = &mut self.judge else { return Ok(()) };
        let point = judge.look(samples, range, at)?;
        for warning in judge.take_warnings() {
            self.monitor.warning(&format!("evaluate: {warning}"));
        }
        let values = [
            ("frechet", point.frechet),
            ("kernel", point.kernel),
            ("precision", point.precision),
            ("recall", point.recall),
            ("sliced", point.sliced),
        ];
        for (name, value) in values {
            if let Some(v) = value {
                self.sheets.events().scalar(&format!("evaluate/{name}"), step.updates as i64, v)?;
            }
        }
        self.monitor.measured(point.figure());
        if point.best {
            self.write(networks.average, &self.run.best())?;
            let text = serde_json::to_vec_pretty(&point).map_err(|e| Error::io(e.to_string()))?;
            crate::files::write_atomic(&self.run.path().join("best.json"), &text)?;
        }
        Ok(())
    }

    /// Writes a student on the way. One that fails its check is kept all the same, and costs the run nothing.
    fn write(&self, student: &Student, path: &Path) -> Result<()> {
        let written = self.origin.write(&student.weights()?, self.config, path);
        let (path, why) = match written {
            Ok(Written { failed: None, .. }) => return Ok(()),
            Ok(Written { path, failed: Some(why) }) => (path, why),
            Err(e) if e.kind() == Kind::Io => return Err(e),
            Err(why) => (path.to_owned(), why),
        };
        self.monitor.warning(&format!("{}: this student did not pass its check: {why}", path.display()));
        Ok(())
    }

    fn snapshot(&self, step: &Step, networks: &Running) -> Result<()> {
        let folder = self.run.snapshots();
        crate::files::make_inside(self.run.path(), "snapshots").with_context(|| folder.display().to_string())?;
        let mut kept = vec![("average".to_string(), networks.average), ("student".to_string(), networks.student)];
        kept.extend(networks.others.iter().map(|(half_life, s)| (format!("average-{half_life}"), *s)));
        for (kind, student) in kept {
            let path = folder.join(format!("update-{:08}-{kind}.onnx", step.updates));
            self.write(student, &path)?;
        }
        Ok(())
    }

    /// Whether the student is measured after this step: once for each multiple of `every` that the images pass.
    fn measures(&self, step: &Step) -> bool {
        let (every, batch) = (self.config.evaluate.every, self.config.images() * self.config.backtrack.ratio);
        let passed = step.images / every > step.images.saturating_sub(batch) / every;
        step.updated && self.judge.is_some() && (step.iteration == step.total || passed)
    }

    /// Whether it is written after this step, the last or not. (Averages of other half-lives are for `disback evaluate --run` to choose
    /// from.)
    fn snapshots(&self, step: &Step, last: bool) -> bool {
        let every = self.config.log.snapshot_every;
        step.updated && (every > 0 && step.updates.is_multiple_of(every) || last && !self.config.ema.more.is_empty())
    }

    /// Whether losses by noise level are looked at after this step, the last or not.
    fn looks_at_levels(&self, step: &Step, last: bool) -> bool {
        let rows = self.config.log.levels;
        rows > 0
            && (self.new_target || last || step.iteration.is_multiple_of(rows.saturating_mul(self.config.log.every)))
    }

    /// Whether the time is over before a further step would be done.
    fn is_time_over(&mut self) -> bool {
        let (before, longest) = &mut self.stepped;
        *longest = before.elapsed().max(*longest);
        *before = Instant::now();
        self.time_limit.is_some_and(|limit| limit.is_reached(*longest))
    }

    /// Denoising losses of target and fake score on the student's samples, by noise level, as a line of levels.jsonl.
    fn levels(&mut self, step: &Step, networks: &Running) -> Result<()> {
        let card = &self.origin.teacher.card.card;
        let (table, _) = batches::table(self.config, card)?;
        let [low, high] = self.config.noise.generator;
        let at = |k: usize| table.get(low + (high - low) * k / (LEVELS - 1)).copied();
        let sigmas: Vec<f64> = (0..LEVELS).filter_map(at).collect();
        let count = LEVEL_IMAGES.min(self.config.batch.max(1));
        let samples = self.samples(networks.average, count)?;
        if let Some(share) = self.sheets.share_of_spread(&samples) {
            self.divergence.samples(step.iteration, share)?;
        }
        let x0 = convert::to_torch(&samples)?.f_to_device(self.device)?;
        // Another seed than the samples': their noise must not come back.
        let noise = batch_noise(!self.config.seed, 0, count, card.sample_len());
        let noise = convert::to_torch(&HostTensor::new(&card.batch_of(count), &noise)?)?.f_to_device(self.device)?;
        let conditions = sheets::conditions(self.config, card, 0, count, self.device)?;
        let loss = |denoiser: &Denoiser| -> Result<Vec<f64>> {
            let one = |s: &f64| denoising_loss(denoiser, &x0, &vec![*s; count], &noise, &conditions);
            let losses = tch::no_grad(|| sigmas.iter().map(one).collect::<Result<Vec<Tensor>>>())?;
            losses.iter().map(|l| Ok(l.f_double_value(&[])?)).collect()
        };
        let row = json!({
            "stage": step.stage, "iteration": step.iteration, "node": step.node, "sigmas": sigmas,
            "target": loss(networks.target)?, "fake": networks.fake.map(loss).transpose()?,
        });
        for name in ["target", "fake"] {
            for (sigma, value) in sigmas.iter().zip(row[name].as_array().into_iter().flatten()) {
                let tag = format!("levels/{name}/sigma-{sigma:.4}");
                self.sheets.events().scalar(&tag, step.iteration as i64, value.as_f64().unwrap_or(f64::NAN))?;
            }
        }
        let path = self.run.levels();
        let append = || -> std::io::Result<()> { writeln!(crate::files::append(&path)?, "{row}") };
        append().with_context(|| path.display().to_string())
    }

    /// Drops lines of levels.jsonl that the stage will write again.
    fn forget_levels(&self, begin: &Begin) -> Result<()> {
        let path = self.run.levels();
        if !path.exists() {
            return Ok(());
        }
        let old =
            |row: &Value| row["stage"] == json!(begin.stage) && row["iteration"].as_u64() <= Some(begin.iteration);
        let keep = |line: &str| serde_json::from_str(line).is_ok_and(|row: Value| old(&row));
        crate::files::keep_lines(&path, keep).with_context(|| path.display().to_string())
    }
}

impl Observer for Watcher<'_> {
    fn stage_begins(&mut self, begin: &Begin) -> Result<bool> {
        self.forget_levels(begin)?;
        let file = self.run.metrics();
        let before = if begin.iteration > 0 && file.is_file() { metrics::read(&file)? } else { Vec::new() };
        self.divergence.begin(begin.stage, begin.iteration, &before)?;
        self.monitor.stage_begins(self.run.path(), begin);
        self.stepped.0 = Instant::now();
        // A target that was entered before the checkpoint has been looked at.
        self.new_target &= begin.iteration == 0;
        let Some(judge) = &mut self.judge else { return Ok(false) };
        judge.forget_after(begin.updates)?;
        Ok(begin.stage == StageKind::Backtrack && judge.exhausted())
    }

    fn looks(&mut self, step: &Step) -> bool {
        self.samples_wanted |= self.monitor.wants_samples();
        let last = step.iteration == step.total;
        self.samples_wanted
            || self.measures(step)
            || self.snapshots(step, last)
            || step.stage == StageKind::Backtrack && self.looks_at_levels(step, last)
    }

    fn after_step(&mut self, step: &Step) -> Result<Wish> {
        let mut wish = Wish::default();
        let monitor = self.monitor.clone();
        monitor.iteration(step.iteration);
        wish.checkpoint = monitor.wants_checkpoint();
        wish.stop = self.is_time_over();
        if std::mem::take(&mut self.samples_wanted)
            && let Some(networks) = &step.networks
        {
            self.look(|watcher| watcher.sheets.student("student-now", networks.average))?;
            monitor.note(&format!("samples/student-now.png, update {}", step.updates));
        }
        if let Some(found) = self.data.as_mut().map(DataCheck::found).transpose()?.flatten() {
            monitor.warning(&found);
        }
        monitor.wait_while_paused();
        let Some(networks) = &step.networks else { return Ok(wish) };
        let last = step.iteration == step.total;
        if self.measures(step) {
            self.look(|watcher| watcher.measure(step, networks))?;
            wish.end = !last && self.judge.as_ref().is_some_and(InLoop::exhausted);
        }
        let last = last || wish.end;
        if self.snapshots(step, last) {
            self.look(|watcher| watcher.snapshot(step, networks))?;
        }
        if self.looks_at_levels(step, last) {
            self.new_target = false;
            self.look(|watcher| watcher.levels(step, networks))?;
        }
        Ok(wish)
    }

    fn warning(&mut self, text: &str) {
        self.monitor.warning(text);
    }

    fn debug_batch(&mut self, node: usize, updates: u64, batch: &DebugBatch) -> Result<()> {
        self.sheets.debug_batch(node, updates, batch)
    }

    fn metrics(&mut self, row: &MetricsRow) -> Result<()> {
        if row.stage == StageKind::Degrade {
            self.degraded = (row.images, row.seconds);
        }
        for warning in self.divergence.row(row)? {
            self.monitor.warning(&warning);
        }
        self.monitor.row(row, shim::memory(self.device)?.map(|m| m.peak));
        self.sheets.metrics(row)
    }

    fn node_recorded(&mut self, node: usize, denoiser: &Denoiser) -> Result<()> {
        self.monitor.note(&format!("node {node} recorded"));
        self.look(|watcher| watcher.sheets.node_recorded(node, denoiser))
    }

    fn target_entered(&mut self, node: usize, target: &Denoiser) -> Result<()> {
        self.new_target = true;
        self.look(|watcher| watcher.sheets.target_entered(node, target))
    }

    fn target_left(&mut self, node: usize, student: &Student) -> Result<()> {
        self.monitor.note(&format!("node {node} left"));
        self.look(|watcher| {
            watcher.sheets.target_left(node, student)?;
            watcher.sheets.weights("average", student.params())
        })
    }
}
