//! Signals that end a run with a checkpoint: those of a person, and those that schedulers send before they end a job.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::run::Unbegun;

/// Exit code of a run that was stopped with a checkpoint by a signal or a time limit: `EX_TEMPFAIL`, to be started again.
pub const AGAIN: u8 = 75;
/// Exit code of a run that a person stopped with a checkpoint: Ctrl-C, or the stop key.
pub const INTERRUPTED: u8 = 130;

/// Raised by the first signal: the run stops after the present step, with a checkpoint.
pub(super) static STOP: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// The folder of a run that is not at work yet, which a signal removes.
pub(super) static UNBEGUN: LazyLock<Unbegun> = LazyLock::new(Unbegun::default);

/// Whether there is anything to save: before, a signal ends the process at once.
static AT_WORK: AtomicBool = AtomicBool::new(false);

/// The signal that came first; 0: none.
static FIRST: AtomicI32 = AtomicI32::new(0);

/// A second signal within this time is the same wish once more: `srun` and its batch script both hand one on.
const SAME_WISH: Duration = Duration::from_secs(1);

/// From now on the first signal asks the run to stop, and no longer ends the process.
pub(super) fn at_work() {
    AT_WORK.store(true, Ordering::SeqCst);
}

/// Exit code of a run that was stopped.
pub(super) fn exit_code() -> u8 {
    let by_key = FIRST.load(Ordering::SeqCst) == 0 && STOP.load(Ordering::SeqCst);
    if by_key || FIRST.load(Ordering::SeqCst) == INTERRUPT { INTERRUPTED } else { AGAIN }
}

/// Ends the process now. (No destructors: other threads are still computing.)
pub(super) fn end(code: i32) -> ! {
    #[cfg(feature = "tui")]
    super::tui::terminal::give_back();
    #[cfg(unix)]
    // SAFETY: ends the process.
    unsafe {
        libc::_exit(code)
    }
    #[cfg(not(unix))]
    std::process::exit(code)
}

/// What the watching thread does about a signal. `repeats`: the kernel sends it again and again. `before`: when the first one came.
fn received(signal: i32, repeats: bool, before: &mut Option<Instant>) {
    match before {
        None => {
            *before = Some(Instant::now());
            FIRST.store(signal, Ordering::SeqCst);
            STOP.store(true, Ordering::SeqCst);
            if !AT_WORK.load(Ordering::SeqCst) {
                UNBEGUN.discard();
                end(exit_code().into());
            }
        }
        Some(at) if repeats || at.elapsed() < SAME_WISH => {}
        Some(_) => end(128 + signal),
    }
}

#[cfg(unix)]
const INTERRUPT: i32 = libc::SIGINT;

/// Watches for signals from now on. SIGINT and SIGHUP that were ignored when the program started (`nohup`, a shell script's background
/// job) stay ignored.
#[cfg(unix)]
pub(super) fn watch() -> Result<()> {
    use std::io::Read;
    use std::os::fd::IntoRawFd;

    const WATCHED: [i32; 6] = [libc::SIGINT, libc::SIGHUP, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2, libc::SIGXCPU];
    /// Where the handler writes the signal's number, which a thread reads.
    static PIPE: AtomicI32 = AtomicI32::new(-1);

    extern "C" fn handler(signal: libc::c_int) {
        let byte = signal as u8;
        // SAFETY: write(2) may be called in a handler. (A pipe of ours does not fail, so errno stays as it was.)
        unsafe { libc::write(PIPE.load(Ordering::Relaxed), (&raw const byte).cast(), 1) };
    }

    let failed = |e: std::io::Error| Error::io(format!("cannot watch for signals: {e}"));
    if PIPE.load(Ordering::Relaxed) >= 0 {
        return Ok(());
    }
    let (mut reader, writer) = std::io::pipe().map_err(failed)?;
    PIPE.store(writer.into_raw_fd(), Ordering::Relaxed);
    let read = move || {
        let (mut byte, mut before) = ([0u8], None);
        while reader.read_exact(&mut byte).is_ok() {
            let signal = i32::from(byte[0]);
            received(signal, signal == libc::SIGXCPU, &mut before);
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(read).map_err(failed)?;
    for signal in WATCHED {
        // SAFETY: zeroed structures of plain data; the handler does nothing but write(2).
        let done = unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut old);
            let stays = [libc::SIGINT, libc::SIGHUP].contains(&signal) && old.sa_sigaction == libc::SIG_IGN;
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = handler as extern "C" fn(libc::c_int) as usize;
            new.sa_flags = libc::SA_RESTART;
            libc::sigemptyset(&mut new.sa_mask);
            stays || libc::sigaction(signal, &new, std::ptr::null_mut()) == 0
        };
        if !done {
            return Err(failed(std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

#[cfg(not(unix))]
const INTERRUPT: i32 = 2;

/// Watches for Ctrl-C from now on.
#[cfg(not(unix))]
pub(super) fn watch() -> Result<()> {
    let before = std::sync::Mutex::new(None);
    ctrlc::set_handler(move || received(INTERRUPT, false, &mut before.lock().unwrap_or_else(|e| e.into_inner())))
        .map_err(|e| Error::io(format!("cannot watch for Ctrl-C: {e}")))
}
