//! One process a run folder: `run.lock`, locked (flock) and holding who works there. Where the file system is shared by several
//! machines the kernel's lock may not reach the others, so a record of another machine counts as long as its heartbeat is fresh.
//! The file is removed when the run ends; one that a killed process left is taken over.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// Name of the file in the run directory.
pub const FILE: &str = "run.lock";

/// Seconds between two heartbeats, and seconds without one after which a process of another machine counts as gone.
const BEAT: u64 = 20;
const GONE: u64 = 120;

/// Who works in a run folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Name of the machine.
    pub host: String,
    /// Process on that machine.
    pub pid: u32,
    /// Seconds since 1970 when the process took the folder.
    pub since: u64,
    /// Tells this taking from all others.
    token: String,
}

impl Holder {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let pid = std::process::id();
        Self { host: host(), pid, since: now.as_secs(), token: format!("{pid}-{:x}", now.as_nanos()) }
    }

    /// Whether the process is known to be gone: one of this machine that is not there.
    fn is_gone(&self) -> bool {
        self.host == host() && !alive(self.pid)
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} on {}", self.pid, self.host)
    }
}

/// A run folder that is this process's own for as long as this lives.
#[derive(Debug)]
pub struct RunLock {
    path: PathBuf,
    holder: Holder,
    /// The kernel's lock lasts as long as this is open.
    file: File,
    heart: Option<(Sender<()>, JoinHandle<()>)>,
}

/// What became of one try.
enum Tried {
    Taken(File),
    /// Somebody is taking or leaving the folder this moment.
    Again,
    Held(Option<Holder>),
}

impl RunLock {
    /// Takes the folder. `steal`: also from a process of another machine that cannot be asked whether it lives.
    ///
    /// Errors: another process works there (exit code 2); the file cannot be written.
    pub fn take(folder: &Path, steal: bool) -> Result<Self> {
        Self::take_on(folder, steal, is_shared(folder))
    }

    /// `shared`: other machines may write to the folder too.
    fn take_on(folder: &Path, steal: bool, shared: bool) -> Result<Self> {
        let path = folder.join(FILE);
        let shown = || path.display().to_string();
        let mut held = None;
        // A process that is just taking the folder has a moment to say who it is, one that ends a moment to leave.
        for _ in 0..50 {
            match try_once(&path, steal, shared).with_context(shown)? {
                Tried::Taken(file) => return Self::begin(path, file, shared),
                Tried::Again => held = None,
                Tried::Held(by) if by.as_ref().is_some_and(|h| !h.is_gone()) => {
                    let foreign = by.as_ref().is_some_and(|h| h.host != host());
                    if steal && foreign {
                        return Self::replace(path, shared);
                    }
                    return Err(refusal(folder, by.as_ref()));
                }
                Tried::Held(by) => held = by,
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // The kernel says that it is held, and the record names nobody who is there: a process of another container.
        if steal { Self::replace(path, shared) } else { Err(refusal(folder, held.as_ref())) }
    }

    /// Puts a new file into the place of one that somebody holds, who finds out by [`RunLock::check`].
    fn replace(path: PathBuf, shared: bool) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let made = || -> std::io::Result<File> {
            let file = tempfile::Builder::new().prefix(".disback-").tempfile_in(folder)?;
            let _ = file.as_file().try_lock();
            file.persist(&path).map_err(|e| e.error)
        };
        let file = made().with_context(|| path.display().to_string())?;
        Self::begin(path, file, shared)
    }

    fn begin(path: PathBuf, mut file: File, shared: bool) -> Result<Self> {
        let holder = Holder::new();
        let mut write = || -> std::io::Result<()> {
            let text = serde_json::to_vec(&holder)?;
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(&text)?;
            file.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        let heart = shared.then(|| beat(&path)).flatten();
        Ok(Self { path, holder, file, heart })
    }

    /// Refuses a folder in which another process works now, without taking it.
    pub fn refuse_held(folder: &Path) -> Result<()> {
        let Ok(mut file) = crate::files::open_inside(folder, FILE) else { return Ok(()) };
        match (file.try_lock(), read(&mut file)) {
            (Err(TryLockError::WouldBlock), Some(holder)) if !holder.is_gone() => Err(refusal(folder, Some(&holder))),
            _ => Ok(()),
        }
    }

    /// Errors where the folder has been taken by another process since: this one must not write there any more.
    pub fn check(&self) -> Result<()> {
        let found = crate::files::open(&self.path).ok().and_then(|mut f| read(&mut f));
        match found {
            Some(holder) if holder.token != self.holder.token => Err(Error::io(format!(
                "{}: the run was taken over by {holder}, so this process writes nothing more",
                self.path.display()
            ))
            .hint("one process works in a run folder; end one of the two")),
            _ => Ok(()),
        }
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.heart.take() {
            drop(stop);
            let _ = thread.join();
        }
        // (Of a folder that was removed or taken over, nothing is ours.)
        if same(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn try_once(path: &Path, steal: bool, shared: bool) -> std::io::Result<Tried> {
    let mut file = crate::files::open_to_change(path)?;
    let (held, known) = match file.try_lock() {
        Ok(()) => (false, true),
        Err(TryLockError::WouldBlock) => (true, true),
        // A file system without locks: the record alone decides.
        Err(TryLockError::Error(_)) => (false, false),
    };
    if !same(&file, path) {
        return Ok(Tried::Again);
    }
    let holder = read(&mut file);
    if held {
        return Ok(Tried::Held(holder));
    }
    let at_work = holder.as_ref().is_some_and(|h| match h.host == host() {
        true => !known && h.pid != std::process::id() && alive(h.pid),
        false => (shared || !known) && !steal && seconds_since_beat(&file) < GONE,
    });
    Ok(if at_work { Tried::Held(holder) } else { Tried::Taken(file) })
}

fn refusal(folder: &Path, holder: Option<&Holder>) -> Error {
    let by = holder.map_or("another process".to_owned(), ToString::to_string);
    let error = Error::usage(format!("{}: {by} works in this run folder", folder.display()));
    match holder.is_some_and(|h| h.host == host() && !h.is_gone()) {
        true => error.hint("wait for it or end it (kill PID): one process works in a run folder"),
        false => error.hint(format!(
            "one process works in a run folder; if that one is gone (a machine that went down counts as gone after {GONE} s), \
             --steal-lock takes the folder over"
        )),
    }
}

fn read(file: &mut File) -> Option<Holder> {
    file.rewind().ok()?;
    serde_json::from_slice(&crate::files::read_to_end(file, crate::files::LINE).ok()?).ok()
}

fn seconds_since_beat(file: &File) -> u64 {
    let modified = file.metadata().and_then(|m| m.modified());
    modified.ok().and_then(|t| SystemTime::now().duration_since(t).ok()).map_or(0, |d| d.as_secs())
}

/// Touches the file now and then, until the sender is dropped.
fn beat(path: &Path) -> Option<(Sender<()>, JoinHandle<()>)> {
    let (stop, stopped) = channel::<()>();
    let path = path.to_owned();
    let run = move || {
        while stopped.recv_timeout(Duration::from_secs(BEAT)) == Err(RecvTimeoutError::Timeout) {
            if let Ok(file) = OpenOptions::new().write(true).open(&path) {
                let _ = file.set_modified(SystemTime::now());
            }
        }
    };
    let thread = std::thread::Builder::new().name("run-lock".into()).spawn(run).ok()?;
    Some((stop, thread))
}

#[cfg(unix)]
fn same(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |m: std::fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata().map(id), std::fs::metadata(path).map(id)), (Ok(a), Ok(b)) if a == b)
}

#[cfg(not(unix))]
fn same(_file: &File, path: &Path) -> bool {
    path.is_file()
}

#[cfg(unix)]
fn host() -> String {
    let mut name = [0u8; 256];
    // SAFETY: writes at most the buffer's length.
    let failed = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) } != 0;
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    if failed { String::new() } else { String::from_utf8_lossy(&name[..end]).into_owned() }
}

#[cfg(not(unix))]
fn host() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_default()
}

#[cfg(unix)]
fn alive(pid: u32) -> bool {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return false };
    // SAFETY: signal 0 only asks whether there is such a process.
    let answer = unsafe { libc::kill(pid, 0) };
    answer == 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

#[cfg(not(unix))]
fn alive(_pid: u32) -> bool {
    true
}

/// Whether a folder may lie on a file system that other machines write to.
#[cfg(target_os = "linux")]
fn is_shared(folder: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    // NFS, SMB (two versions), CIFS, Lustre, GPFS, Ceph, AFS, 9p, BeeGFS, and what a FUSE server makes of anything.
    const SHARED: [u32; 11] = [
        0x6969,
        0x517b,
        0xfe53_4d42,
        0xff53_4d42,
        0x0bd0_0bd0,
        0x4750_4653,
        0x00c3_6400,
        0x5346_414f,
        0x0102_1997,
        0x1983_0326,
        0x6573_5546,
    ];
    let Ok(name) = std::ffi::CString::new(folder.as_os_str().as_bytes()) else { return false };
    // SAFETY: a zeroed structure of plain numbers, filled by the call.
    let kind = unsafe {
        let mut found: libc::statfs = std::mem::zeroed();
        if libc::statfs(name.as_ptr(), &mut found) != 0 {
            return false;
        }
        found.f_type as u32
    };
    SHARED.contains(&kind)
}

#[cfg(not(target_os = "linux"))]
fn is_shared(_folder: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(folder: &Path, host: &str, pid: u32, age: u64) {
        let text = serde_json::to_string(&Holder { host: host.into(), pid, since: 0, token: "other".into() }).unwrap();
        std::fs::write(folder.join(FILE), text).unwrap();
        let file = OpenOptions::new().write(true).open(folder.join(FILE)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
    }

    #[test]
    fn one_process_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let first = RunLock::take(dir, false).unwrap();
        first.check().unwrap();
        for steal in [false, true] {
            let e = RunLock::take(dir, steal).unwrap_err();
            let says = format!("process {} on {} works in this run folder", std::process::id(), host());
            assert!(e.exit_code() == 2 && e.to_string().contains(&says), "{e}");
        }
        assert!(RunLock::refuse_held(dir).is_err());
        drop(first);
        assert!(!dir.join(FILE).exists());
        RunLock::refuse_held(dir).unwrap();
        drop(RunLock::take(dir, false).unwrap());
    }

    #[test]
    fn what_a_killed_process_left_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        // A process of this machine that is gone, one that is not a record at all, and another machine's on a disk of our own.
        for (host, pid, shared) in [(host(), u32::MAX >> 1, true), ("elsewhere".into(), 1, false)] {
            record(dir, &host, pid, 0);
            drop(RunLock::take_on(dir, false, shared).unwrap());
        }
        std::fs::write(dir.join(FILE), "{\"host\":").unwrap();
        drop(RunLock::take(dir, false).unwrap());
    }

    #[test]
    fn on_a_shared_file_system_another_machine_counts_while_its_heart_beats() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        record(dir, "elsewhere", 1, GONE - 10);
        let e = RunLock::take_on(dir, false, true).unwrap_err().to_string();
        assert!(e.contains("process 1 on elsewhere") && e.contains("--steal-lock"), "{e}");
        let stolen = RunLock::take_on(dir, true, true).unwrap();
        stolen.check().unwrap();
        drop(stolen);
        record(dir, "elsewhere", 1, GONE + 10);
        let mine = RunLock::take_on(dir, false, true).unwrap();
        // Taken over by another, this process writes nothing more, and does not remove the other's file.
        record(dir, "third", 7, 0);
        let e = mine.check().unwrap_err().to_string();
        assert!(e.contains("taken over by process 7 on third"), "{e}");
        std::fs::rename(dir.join(FILE), dir.join("kept")).unwrap();
        record(dir, "third", 7, 0);
        drop(mine);
        assert!(dir.join(FILE).is_file());
    }

    /// The kernel's lock goes with the process, not with its record.
    #[test]
    fn a_lock_held_by_a_process_elsewhere_is_stolen_only_on_demand() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        record(dir, "elsewhere", 1, 0);
        let held = File::open(dir.join(FILE)).unwrap();
        held.try_lock().unwrap();
        let e = RunLock::take_on(dir, false, false).unwrap_err().to_string();
        assert!(e.contains("process 1 on elsewhere"), "{e}");
        let stolen = RunLock::take_on(dir, true, false).unwrap();
        stolen.check().unwrap();
        assert!(!same(&held, &dir.join(FILE)));
    }
}
