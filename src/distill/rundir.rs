//! The run directory: what lies where, and when it may be written to.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::diffusion::{CardOrigin, TeacherCard};
use crate::distill::checkpoint::{Checkpoint, StageKind};
use crate::distill::config::Config;
use crate::distill::lock::{self, RunLock};
use crate::distill::{checkpoint, trajectory};
use crate::error::{Context, Error, Kind, Result};

/// How folders of a rehearsed export begin.
pub(crate) const REHEARSAL: &str = ".disback-export-";

/// Names of everything in a run directory.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
    /// Held by the process that writes the run.
    lock: Option<Arc<RunLock>>,
}

impl RunDir {
    /// The run directory at this path, whether it exists or not.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), lock: None }
    }

    /// A new run: the folder must not exist, be empty, or hold nothing but what a start leaves that ended before its first step.
    /// Takes the folder for this process and writes `config.toml`.
    pub fn create(path: &Path, config: &Config) -> Result<Self> {
        Self::create_with(path, config, false)
    }

    /// [`RunDir::create`]; `steal` as in [`RunLock::take`].
    pub fn create_with(path: &Path, config: &Config, steal: bool) -> Result<Self> {
        if !steal {
            RunLock::refuse_held(path)?;
        }
        // (Nothing is written into a folder that is somebody else's.)
        refuse_occupied(path)?;
        let mut run = Self::at(path);
        std::fs::create_dir_all(&run.path).with_context(|| run.path.display().to_string())?;
        run.take(steal)?;
        // Another start may have had the folder meanwhile.
        refuse_occupied(path)?;
        run.sweep();
        for dir in [run.checkpoints(), run.samples()] {
            std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        }
        // The card of a start that was refused is not this run's.
        let _ = std::fs::remove_file(run.card_file());
        let _ = std::fs::remove_file(run.path.join("identity.json"));
        run.write_config(config)?;
        Ok(run)
    }

    /// Takes the folder for this process, for as long as this or a clone of it lives. Only who has taken it may write a run.
    ///
    /// Errors: another process works there, see [`RunLock::take`].
    pub fn take(&mut self, steal: bool) -> Result<()> {
        self.lock = Some(Arc::new(RunLock::take(&self.path, steal)?));
        Ok(())
    }

    /// Errors where another process has taken the folder away from this one.
    pub fn check_taken(&self) -> Result<()> {
        self.lock.as_ref().map_or(Ok(()), |lock| lock.check())
    }

    /// Removes half-written files and rehearsed exports that a killed process left: with the folder taken, nobody is writing
    /// them. (In the run's own folder others may write, such as an evaluation.) Links are left alone.
    pub(crate) fn sweep(&self) {
        for entry in std::fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let ours = entry.file_name().to_string_lossy().starts_with(REHEARSAL);
            if ours && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        for dir in [self.checkpoints(), self.trajectory(), self.samples(), self.snapshots()] {
            crate::files::sweep(&dir);
        }
    }

    /// Whether there is a run that has come to this stage, to go on with.
    pub fn has_begun(&self, stage: StageKind) -> Result<bool> {
        if stage == StageKind::Degrade {
            return Ok(self.config_file().is_file() && !left_by_a_start(&self.path));
        }
        let checkpoint = Checkpoint::latest_state(&self.checkpoints())?;
        Ok(checkpoint.is_some_and(|c| c.stage == stage) || self.student_weights().is_file())
    }

    /// Removes a run that has not begun.
    pub fn discard(&self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }

    /// An existing run, with the configuration it was started with.
    pub fn open(path: &Path) -> Result<(Self, Config)> {
        let run = Self::at(path);
        run.refuse_links()?;
        let file = run.config_file();
        if !file.is_file() {
            return Err(Error::usage(format!("{} holds no run (no config.toml)", path.display()))
                .hint("`disback distill TEACHER -o DIR` starts one; --resume, --run and --out name its folder"));
        }
        for dir in [run.checkpoints(), run.samples()] {
            std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        }
        let config = Config::of_run(&file)?;
        Ok((run, config))
    }

    /// Refuses symbolic links in the places that a run writes to: through them it would write into, or remove, what lies
    /// elsewhere. The folder itself may be reached through one, and links under other names are none of our business.
    fn refuse_links(&self) -> Result<()> {
        for inside in ["", "checkpoints", "trajectory", "samples", "snapshots"] {
            let folder = self.path.join(inside);
            // A folder of ours that is a link has been refused with the entries of the run's own folder.
            let Ok(entries) = std::fs::read_dir(&folder) else { continue };
            for entry in entries.flatten() {
                let name = entry.file_name();
                let linked = entry.file_type().is_ok_and(|kind| kind.is_symlink());
                if linked && writes(inside, &name.to_string_lossy()) {
                    let path = entry.path();
                    return Err(Error::usage(format!("{} is a symbolic link", path.display())).hint(
                        "a run writes and removes files there, so it must be a real file or folder: move what the link \
                         points to into its place (the folder of the whole run may be a link)",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Saves the configuration as resolved.
    pub fn write_config(&self, config: &Config) -> Result<()> {
        crate::files::write_atomic(&self.config_file(), config.to_toml()?.as_bytes())
    }

    /// Saves the teacher card as resolved: with another one the run would be another run.
    pub fn write_card(&self, card: &TeacherCard) -> Result<()> {
        let head = "# The teacher card that this run reads its teacher by, from all of its sources. A run goes on with this card.\n";
        crate::files::write_atomic(&self.card_file(), format!("{head}{}", card.to_toml()?).as_bytes())
    }

    /// Refuses a card that reads the teacher otherwise than the card of this run. `origins`: where its values come from.
    /// (A run of a version that kept no card has nothing to compare with.)
    pub fn check_card(&self, now: &TeacherCard, origins: &BTreeMap<String, CardOrigin>) -> Result<()> {
        let file = self.card_file();
        if !file.is_file() {
            return Ok(());
        }
        let shown = || file.display().to_string();
        let text = crate::files::read_text(&file, crate::files::SETTINGS).with_context(shown)?;
        let saved: TeacherCard = toml::from_str(&text)
            .map_err(|e| Error::of_text(Kind::Io, &format!("not a teacher card: {e}")))
            .with_context(shown)?;
        let Some((key, before, after)) = saved.differences(now)?.into_iter().next() else { return Ok(()) };
        let origin = origins.get(&key).map_or(String::new(), |o| format!(" ({o})"));
        Err(Error::usage(format!(
            "{}: the run reads its teacher with the card key `{key}` = {before}, now it is {after}{origin}",
            self.path.display()
        ))
        .hint(format!(
            "undo the change where the card comes from, or give --card {key}={before}; for another reading of the teacher \
             start another run"
        )))
    }

    /// The run directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// `config.toml`: the configuration as resolved.
    pub fn config_file(&self) -> PathBuf {
        self.path.join("config.toml")
    }
    /// `card.toml`: the teacher card as resolved.
    pub fn card_file(&self) -> PathBuf {
        self.path.join("card.toml")
    }
    /// Folder of the degradation trajectory.
    pub fn trajectory(&self) -> PathBuf {
        self.path.join("trajectory")
    }
    /// Folder of the checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }
    /// `metrics.jsonl`: losses and other measures of training, one row a line; see [`crate::distill::metrics::MetricsRow`].
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }
    /// Folder of the sample grids, PNG.
    pub fn samples(&self) -> PathBuf {
        self.path.join("samples")
    }
    /// Folder of the students that are kept while the run goes on (`log.snapshot_every`).
    pub fn snapshots(&self) -> PathBuf {
        self.path.join("snapshots")
    }
    /// `best.onnx`: the student with the lowest distance measured while training.
    pub fn best(&self) -> PathBuf {
        self.path.join("best.onnx")
    }
    /// `levels.jsonl`: denoising losses of target and fake score by noise level.
    pub fn levels(&self) -> PathBuf {
        self.path.join("levels.jsonl")
    }
    /// `student.onnx`: the student at the end of the run.
    pub fn student(&self) -> PathBuf {
        self.path.join("student.onnx")
    }
    /// The final weights (EMA) as safetensors, beside the ONNX student.
    pub fn student_weights(&self) -> PathBuf {
        self.path.join("student.safetensors")
    }
    /// The final weights of a further average (`ema.more`).
    pub fn average_weights(&self, half_life: f64) -> PathBuf {
        self.path.join(format!("student-ema-{half_life}.safetensors"))
    }
    /// `summary.json`: what the run was and what it cost.
    pub fn summary(&self) -> PathBuf {
        self.path.join("summary.json")
    }
    /// `report.html`: the run as a page for a browser.
    pub fn report(&self) -> PathBuf {
        self.path.join("report.html")
    }
}

/// Refuses a folder that holds more than what a start leaves that ended before its first step.
fn refuse_occupied(path: &Path) -> Result<()> {
    let occupied = match std::fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some() && !left_by_a_start(path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
        Err(e) => return Err(Error::from(e).context(path.display().to_string())),
    };
    match occupied {
        false => Ok(()),
        true => Err(Error::usage(format!("output folder {} is not empty", path.display()))
            .hint("--resume goes on with the run in it; otherwise give another folder")),
    }
}

/// Whether a folder holds nothing but what a start writes before its first step: lock, configuration, card, empty folders.
fn left_by_a_start(path: &Path) -> bool {
    let empty = |dir: &Path| std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    let harmless = |entry: std::io::Result<std::fs::DirEntry>| {
        let Ok(entry) = entry else { return false };
        let Ok(kind) = entry.file_type() else { return false };
        match entry.file_name().to_string_lossy().as_ref() {
            "config.toml" | "card.toml" | "identity.json" | lock::FILE => kind.is_file(),
            "checkpoints" | "samples" | "trajectory" | "snapshots" => kind.is_dir() && empty(&entry.path()),
            name if name.starts_with(REHEARSAL) => kind.is_dir(),
            name => kind.is_file() && crate::files::is_half_written(name),
        }
    };
    // Without one of these nothing says that a run made the folder.
    let ours = path.join("config.toml").is_file() || path.join(lock::FILE).is_file();
    ours && std::fs::read_dir(path).is_ok_and(|mut entries| entries.all(harmless))
}

/// Whether a run writes something of this name in its folder, or `inside` one of its folders.
fn writes(inside: &str, name: &str) -> bool {
    let ends = |suffix: &str| name.ends_with(suffix);
    match inside {
        "checkpoints" => name == "latest.json" || checkpoint::is_own_file(name),
        "trajectory" => name == trajectory::INDEX || trajectory::is_node_file(name),
        "samples" => ends(".png") || ends(".wav") || ["teacher.npy", "teacher-spread.txt"].contains(&name),
        "snapshots" => ends(".onnx") || ends(".onnx.data"),
        _ => {
            const NAMES: [&str; 19] = [
                "warnings.jsonl",
                "identity.json",
                lock::FILE,
                "checkpoints",
                "trajectory",
                "samples",
                "snapshots",
                "config.toml",
                "card.toml",
                "metrics.jsonl",
                "levels.jsonl",
                "evaluations.jsonl",
                "best.json",
                "summary.json",
                "report.html",
                "bench.json",
                "curve.json",
                "looks.json",
                "best.onnx",
            ];
            let weights = [".onnx", ".onnx.data", ".safetensors"];
            NAMES.contains(&name)
                || name.starts_with("events.out.tfevents.")
                || (name.starts_with("student") || name.starts_with("best.")) && weights.into_iter().any(ends)
        }
    }
}

/// Keys that may change when a run is resumed: they do not touch what was computed before.
const CHANGEABLE: [&str; 12] = [
    "distributed.shard",
    "device",
    "threads",
    "tf32",
    "cuda_graphs",
    "memory.format",
    "backtrack.updates",
    "optimizer.max_skips",
    "stop_on_divergence",
    "divergence_factor",
    "collapse_spread",
    "data.skip_broken",
];

/// Refuses to go on with a configuration that would make another run of what is there.
/// `same`: keys that name a file of the same content as before, wherever it lies now.
pub fn check_resumable(saved: &Config, wanted: &Config, same: &[&str]) -> Result<()> {
    let changed = saved.differences(wanted)?;
    if saved.backtrack.updates != wanted.backtrack.updates && saved.backtrack.cooldown > 0.0 {
        return Err(Error::usage("backtrack.updates cannot change on --resume where the learning rates cool down")
            .hint(
                "they fall over the last backtrack.cooldown of the updates; runs with cooldown = 0 can be prolonged",
            ));
    }
    match changed.iter().find(|(key, ..)| {
        !CHANGEABLE.contains(&key.as_str())
            && !same.contains(&key.as_str())
            && !["log.", "evaluate."].iter().any(|s| key.starts_with(s))
    }) {
        None => Ok(()),
        Some((key, before, now)) => {
            Err(Error::usage(format!("the run was started with {key} = {before}, now it is {now}"))
                .hint(format!("only {}, log.* and evaluate.* may change on --resume", CHANGEABLE.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_refused_start_left_blocks_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let first = RunDir::create(&path, &Config { batch: 3, ..Config::default() }).unwrap();
        first.write_card(&TeacherCard::plain(&[1, 8, 8])).unwrap();
        // As long as it lives it is a run.
        let e = RunDir::create(&path, &Config::default()).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("works in this run folder"), "{e}");
        assert!(RunDir::at(&path).take(false).is_err());
        first.check_taken().unwrap();
        drop(first);
        let second = RunDir::create(&path, &Config::default()).unwrap();
        assert_eq!(RunDir::open(&path).unwrap().1.batch, Config::default().batch);
        assert!(!second.card_file().exists());
        drop(second);
        // What has begun, and what a user put there, is not taken over.
        for name in ["metrics.jsonl", "checkpoints/latest.json", "notes.txt"] {
            std::fs::write(path.join(name), "x").unwrap();
            assert!(RunDir::create(&path, &Config::default()).unwrap_err().to_string().contains("not empty"), "{name}");
            std::fs::remove_file(path.join(name)).unwrap();
        }
        RunDir::create(&path, &Config::default()).unwrap();
    }

    #[test]
    fn a_folder_with_anything_in_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let config = Config { batch: 3, ..Config::default() };
        let run = RunDir::create(&path, &config).unwrap();
        std::fs::write(run.metrics(), "{}\n").unwrap();
        drop(run);
        let e = RunDir::create(&path, &config).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("--resume"), "{e}");
        assert_eq!(RunDir::open(&path).unwrap().1, config);
        assert!(RunDir::open(dir.path()).unwrap_err().to_string().contains("no config.toml"));
        RunDir::create(&dir.path().join("empty"), &config).unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        assert!(RunDir::create(&dir.path().join("file"), &config).is_err());
    }

    #[test]
    fn a_run_knows_its_card() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(&dir.path().join("run"), &Config::default()).unwrap();
        let card = TeacherCard::plain(&[1, 8, 8]);
        let mut other = card.clone();
        other.sigma_data = 0.9;
        // A run of an earlier version has no card.
        run.check_card(&other, &BTreeMap::new()).unwrap();
        run.write_card(&card).unwrap();
        run.check_card(&card, &BTreeMap::new()).unwrap();
        let mut named = card.clone();
        named.dataset = Some("digits".into());
        run.check_card(&named, &BTreeMap::new()).unwrap();
        let origins = BTreeMap::from([("sigma_data".to_owned(), CardOrigin::SideFile("teacher.card.toml".into()))]);
        let e = run.check_card(&other, &origins).unwrap_err();
        assert!(e.exit_code() == 2, "{e}");
        assert!(e.to_string().contains("`sigma_data` = 0.5, now it is 0.9 (from teacher.card.toml)"), "{e}");
        let mut ranged = card;
        ranged.range = Some([-1.0, 1.0]);
        let e = run.check_card(&ranged, &BTreeMap::new()).unwrap_err().to_string();
        assert!(e.contains("`range` = unset, now it is [-1.0, 1.0]"), "{e}");
    }

    #[cfg(unix)]
    #[test]
    fn links_in_the_places_of_a_run_are_refused() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = dir.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        let path = dir.path().join("run");
        let run = RunDir::create(&path, &Config::default()).unwrap();
        std::fs::create_dir(run.trajectory()).unwrap();
        // The folder itself may be reached through a link, and a user may keep links of other names in it.
        symlink(&path, dir.path().join("link")).unwrap();
        symlink(&elsewhere, path.join("dataset")).unwrap();
        symlink(&elsewhere, path.join("checkpoints/favourite.safetensors")).unwrap();
        RunDir::open(&dir.path().join("link")).unwrap();
        for name in [
            "snapshots",
            "metrics.jsonl",
            "student.onnx",
            "student-ema-500.safetensors",
            "events.out.tfevents.0000000001.host",
            "checkpoints/latest.json",
            "checkpoints/backtrack-00000100.safetensors",
            "trajectory/node-001.safetensors",
            "samples/teacher.png",
        ] {
            // Dangling ones too.
            symlink(elsewhere.join("nothing"), path.join(name)).unwrap();
            let e = RunDir::open(&path).unwrap_err();
            assert!(e.exit_code() == 2 && e.to_string().contains(name) && e.to_string().contains("link"), "{e}");
            std::fs::remove_file(path.join(name)).unwrap();
        }
        std::fs::remove_dir(path.join("samples")).unwrap();
        symlink(&elsewhere, path.join("samples")).unwrap();
        assert!(RunDir::open(&path).unwrap_err().to_string().contains("samples"));
        assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn only_harmless_keys_change_on_resume() {
        let mut saved = Config::default();
        let longer = |c: &Config| {
            let mut longer = c.clone();
            longer.backtrack.updates += 1;
            longer
        };
        assert!(check_resumable(&saved, &longer(&saved), &[]).unwrap_err().to_string().contains("cool down"));
        saved.backtrack.cooldown = 0.0;
        let mut wanted = saved.clone();
        wanted.backtrack.updates += 1;
        wanted.log.every = 3;
        check_resumable(&saved, &wanted, &[]).unwrap();
        wanted.gan.data = "elsewhere".into();
        check_resumable(&saved, &wanted, &["gan.data"]).unwrap();
        wanted.degrade.lr = 0.5;
        let e = check_resumable(&saved, &wanted, &["gan.data"]).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("degrade.lr = 0.0, now it is 0.5"), "{e}");
    }
}
