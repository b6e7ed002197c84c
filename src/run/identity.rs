//! What decides a run's course beside `config.toml` and `card.toml`: `identity.json`, the one place that lists it. A run goes on with
//! the same, or not at all.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::Device;

use crate::distill::{Config, RunDir};
use crate::error::{Context, Error, Result};
use crate::run::checks;
use crate::run::request::Request;
use crate::run::teacher::Teacher;

/// Bytes of a folder that are read whole for its hash; of a larger one the names and sizes, and the files that are read of it.
const WHOLE: u64 = 1 << 30;
const SOME_FILES: usize = 4096;

/// Everything beside configuration and card that decides what a run computes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    /// Version of the program that began the run.
    pub version: String,
    /// CPU threads in force, where the run computes on the CPU: its bytes depend on them. 0 elsewhere.
    pub threads: usize,
    /// `--freeze` and `--train`.
    pub freeze: Vec<String>,
    /// Globs over names of tensors that are trained whatever they are used for.
    pub train: Vec<String>,
    /// SHA-256 of the teacher's graph and weights, its metadata left out: what that says is in the card.
    pub teacher: String,
    /// SHA-256 of what the configuration's keys name, by key.
    pub files: BTreeMap<String, String>,
}

/// The keys of [`Config`] that name a file whose content decides what is computed.
pub const FILES: [&str; 3] = ["student.file", "conditions.file", "gan.data"];

/// The key of the network that guides, of which graph, weights and card decide.
const GUIDE: &str = "guidance_by";

/// The configured paths that decide what is computed, by key.
fn files(config: &Config) -> [(&'static str, &str); 3] {
    let [student, conditions, data] = FILES;
    [(student, &config.student.file), (conditions, &config.conditions.file), (data, &config.gan.data)]
}

fn place(run: &RunDir) -> PathBuf {
    run.path().join("identity.json")
}

impl Request {
    /// What began the run that this request goes on with, or the trajectory that it takes; where it says nothing of the tensors to
    /// train, it takes over what was said then.
    pub(crate) fn remember(&mut self) -> Result<Option<Identity>> {
        let run = match &self.trajectory {
            _ if self.goes_on() => RunDir::at(&self.out),
            Some(dir) => RunDir::at(&checks::of_run(dir).join("..")),
            None => return Ok(None),
        };
        let begun = Identity::read(&run)?;
        if let Some(begun) = &begun {
            begun.fill(&mut self.freeze, &mut self.train);
        }
        Ok(begun)
    }

    /// Refuses to go on with what was begun by another request than this is.
    pub(crate) fn check_begun(&self, begun: Option<&Identity>, now: &Identity) -> Result<()> {
        let Some(begun) = begun else { return Ok(()) };
        if !self.goes_on() {
            let trajectory = self.trajectory.as_deref().unwrap_or(&self.out);
            return begun.check_trained(now, trajectory);
        }
        if let Some(warning) = begun.check(now, &self.out)? {
            self.monitor.warning(&warning);
        }
        Ok(())
    }
}

impl Identity {
    /// That of a run that is about to be computed on `device`, with `threads` CPU threads in force. `weaker`: the network of
    /// `guidance_by`.
    ///
    /// Errors: a file that cannot be read.
    pub fn of(
        request: &Request,
        config: &Config,
        (teacher, weaker): (&Teacher, Option<&Teacher>),
        device: Device,
        threads: usize,
    ) -> Result<Self> {
        let mut hashes = BTreeMap::new();
        if let Some(weaker) = weaker {
            let mut sha = Sha256::new();
            sha.update(&weaker.graph_hash);
            sha.update(weaker.card.card.to_toml()?);
            hashes.insert(GUIDE.to_owned(), hex(sha));
        }
        for (key, path) in files(config).into_iter().filter(|(_, path)| !path.is_empty()) {
            hashes.insert(key.to_owned(), content(Path::new(path)).context(key)?);
        }
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").into(),
            threads: if device == Device::Cpu { threads } else { 0 },
            freeze: request.freeze.clone(),
            train: request.train.clone(),
            teacher: teacher.graph_hash.clone(),
            files: hashes,
        })
    }

    /// That of a run that is there; `None`: an earlier version began it, or there is none.
    pub fn read(run: &RunDir) -> Result<Option<Self>> {
        let path = place(run);
        let text = match crate::files::read(&path, crate::files::JSON) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.with_context(|| path.display().to_string())?,
        };
        let read = serde_json::from_slice(&text).map_err(|e| Error::io(format!("not a run's identity: {e}")));
        read.map(Some).with_context(|| path.display().to_string())
    }

    /// Takes over what the run was begun with, each list where nothing is given.
    pub fn fill(&self, freeze: &mut Vec<String>, train: &mut Vec<String>) {
        for (mine, theirs) in [(freeze, &self.freeze), (train, &self.train)] {
            if mine.is_empty() {
                mine.clone_from(theirs);
            }
        }
    }

    /// Writes it into a run.
    pub fn write(&self, run: &RunDir) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::io(e.to_string()))?;
        crate::files::write_atomic(&place(run), &text)
    }

    /// Refuses to go on as `now` with a run that was begun as this. Gives what a person should know all the same.
    ///
    /// Errors: what would make another run of it, with the way out.
    pub fn check(&self, now: &Self, run: &Path) -> Result<Option<String>> {
        let refused = |what: String, hint: &str| Err(Error::usage(format!("{}: {what}", run.display())).hint(hint));
        self.check_trained(now, run)?;
        // (A run that computed elsewhere, or computes elsewhere now, has promised no bytes.)
        if self.threads != now.threads && self.threads > 0 && now.threads > 0 {
            return refused(
                format!("the run computes with {} CPU threads, now it is {}", self.threads, now.threads),
                "on the CPU the bytes of a run depend on the number of threads: leave --threads out, or give the run's",
            );
        }
        for (key, hash) in &self.files {
            if now.files.get(key).is_some_and(|found| found != hash) {
                return refused(
                    format!("{key}: what it names is not what the run began with (another content)"),
                    "undo the change, or start another run; the same content in another place may be given with --set",
                );
            }
        }
        Ok((self.version != now.version).then(|| {
            format!(
                "the run was begun by version {} of this program, this is {}: it may not end with the bytes that it would have",
                self.version, now.version
            )
        }))
    }

    /// Refuses another teacher, or other tensors of it that are trained.
    pub fn check_trained(&self, now: &Self, run: &Path) -> Result<()> {
        for (option, before, after) in [("--freeze", &self.freeze, &now.freeze), ("--train", &self.train, &now.train)] {
            if before != after {
                let text = |globs: &[String]| match globs {
                    [] => "nothing".to_owned(),
                    globs => globs.join(" "),
                };
                return Err(Error::usage(format!(
                    "{}: the run began with {option} {}, now it is {}",
                    run.display(),
                    text(before),
                    text(after)
                ))
                .hint(format!("leave {option} out: a run remembers it; for other tensors start another run")));
            }
        }
        if !self.teacher.is_empty() && self.teacher != now.teacher {
            return Err(Error::usage(format!(
                "{}: the run began with another teacher (its graph or its weights differ)",
                run.display()
            ))
            .hint("give the teacher that the run began with"));
        }
        Ok(())
    }

    /// Keys of files that have the same content as this one's, wherever they lie.
    pub fn same_files(&self, now: &Self) -> Vec<&str> {
        self.files.iter().filter(|(key, hash)| now.files.get(*key) == Some(hash)).map(|(key, _)| key.as_str()).collect()
    }
}

/// SHA-256 of a file, or of a folder's files with their names. A zip archive's is that of its table, which holds a checksum of every
/// member; a folder of more than 1 GiB has the content of 4096 of its files in it, and names and sizes of all.
pub fn content(path: &Path) -> Result<String> {
    let mut sha = Sha256::new();
    let zip = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("zip"));
    if path.is_dir() {
        let mut all = Vec::new();
        list(path, path, &mut HashSet::new(), &mut all)?;
        all.sort();
        let bytes: u64 = all.iter().map(|(_, size)| size).sum();
        let step = if bytes <= WHOLE { 1 } else { all.len().div_ceil(SOME_FILES) };
        for (k, (name, size)) in all.iter().enumerate() {
            sha.update(name.as_bytes());
            sha.update(size.to_le_bytes());
            if k % step == 0 {
                add(&mut sha, &path.join(name))?;
            }
        }
    } else if zip {
        let open = || -> std::io::Result<zip::ZipArchive<std::io::BufReader<std::fs::File>>> {
            zip::ZipArchive::new(std::io::BufReader::new(crate::files::open(path)?)).map_err(std::io::Error::other)
        };
        let mut archive = open().with_context(|| path.display().to_string())?;
        for k in 0..archive.len() {
            let member =
                archive.by_index_raw(k).map_err(std::io::Error::other).with_context(|| path.display().to_string())?;
            sha.update(member.name().as_bytes());
            sha.update(member.size().to_le_bytes());
            sha.update(member.crc32().to_le_bytes());
        }
    } else {
        add(&mut sha, path)?;
    }
    Ok(hex(sha))
}

fn hex(sha: Sha256) -> String {
    sha.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Names below a folder, and their sizes. A folder that is met again (a link in a circle) is passed over.
fn list(root: &Path, folder: &Path, seen: &mut HashSet<PathBuf>, all: &mut Vec<(String, u64)>) -> Result<()> {
    if !seen.insert(folder.canonicalize().with_context(|| folder.display().to_string())?) {
        return Ok(());
    }
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry.with_context(|| folder.display().to_string())?.path();
        let found = std::fs::metadata(&path).with_context(|| path.display().to_string())?;
        if found.is_dir() {
            list(root, &path, seen, all)?;
        } else if found.is_file() {
            all.push((path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned(), found.len()));
        }
    }
    Ok(())
}

fn add(sha: &mut Sha256, path: &Path) -> Result<()> {
    let mut read = || -> std::io::Result<()> {
        let mut file = crate::files::open(path)?;
        let mut part = vec![0; 1 << 20];
        loop {
            match file.read(&mut part)? {
                0 => return Ok(()),
                n => sha.update(&part[..n]),
            }
        }
    };
    read().with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_what_counts_not_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
        };
        let of = |name: &str| content(&dir.path().join(name)).unwrap();
        for folder in ["a", "b"] {
            write(&format!("{folder}/0/x.png"), "one");
            write(&format!("{folder}/1/y.png"), "two");
        }
        assert_eq!(of("a"), of("b"));
        assert_eq!(of("a/0/x.png"), of("b/0/x.png"));
        write("b/1/y.png", "twO");
        assert_ne!(of("a"), of("b"));
        write("b/1/y.png", "two");
        std::fs::rename(dir.path().join("b/1"), dir.path().join("b/2")).unwrap();
        assert_ne!(of("a"), of("b"), "the folders are the classes");
        assert!(content(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
    }

    #[test]
    fn what_changed_is_named_with_the_way_out() {
        let begun = Identity {
            version: "1".into(),
            threads: 4,
            freeze: vec!["*bias".into()],
            teacher: "t".into(),
            files: [("gan.data".to_owned(), "d".to_owned())].into(),
            ..Identity::default()
        };
        let check = |now: &Identity| begun.check(now, Path::new("run"));
        assert_eq!(check(&begun).unwrap(), None);
        let says = |change: &dyn Fn(&mut Identity)| {
            let mut now = begun.clone();
            change(&mut now);
            let e = check(&now).unwrap_err();
            assert_eq!(e.exit_code(), 2);
            e.to_string()
        };
        assert!(says(&|i| i.freeze.clear()).contains("began with --freeze *bias, now it is nothing"));
        assert!(says(&|i| i.train.push("w".into())).contains("began with --train nothing, now it is w"));
        assert!(says(&|i| i.threads = 2).contains("4 CPU threads, now it is 2"));
        assert!(says(&|i| i.teacher.clear()).contains("another teacher"));
        assert!(says(&|i| drop(i.files.insert("gan.data".into(), "e".into()))).contains("gan.data"));
        let elsewhere = Identity { threads: 0, version: "2".into(), ..begun.clone() };
        assert!(check(&elsewhere).unwrap().unwrap().contains("version 1 of this program, this is 2"));
        assert_eq!(begun.same_files(&elsewhere), ["gan.data"]);
    }
}
