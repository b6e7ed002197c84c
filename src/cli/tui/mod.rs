//! The terminal view of a run (`--tui`): what it does, how it goes, and keys to checkpoint, sample, pause and stop it.

mod screen;
mod state;
pub(super) mod terminal;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::distill::metrics::MetricsRow;
use crate::distill::observer::Begin;
use crate::error::{Context, Result};
use crate::run::Monitor;
use terminal::Terminal;

pub use state::State;

/// Refuses `--tui` where there is no terminal, before anything is written.
pub fn check() -> Result<()> {
    terminal::check().context("--tui")
}

/// What a key asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Checkpoint,
    Sample,
    Pause,
    /// Stops after the present step, with a checkpoint; a second time ends the process at once.
    Stop,
}

/// What is shared between the training loop and the screen.
pub struct Shared {
    state: Mutex<State>,
    checkpoint: AtomicBool,
    sample: AtomicBool,
    pause: AtomicBool,
    /// Raised by the stop key, as by Ctrl-C.
    stop: Arc<AtomicBool>,
    over: AtomicBool,
}

impl Shared {
    pub fn new(stop: Arc<AtomicBool>) -> Arc<Self> {
        let off = || AtomicBool::new(false);
        let state = Mutex::new(State::default());
        Arc::new(Self { state, checkpoint: off(), sample: off(), pause: off(), stop, over: off() })
    }

    /// Changes what is shown.
    pub fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        change(&mut state);
    }

    /// Does what a key asks for. False: the process is to end at once.
    pub fn act(&self, action: Action) -> bool {
        match action {
            Action::Checkpoint => {
                self.checkpoint.store(true, Ordering::Relaxed);
                self.update(|s| s.note("a checkpoint follows after this step"));
            }
            Action::Sample => {
                self.sample.store(true, Ordering::Relaxed);
                self.update(|s| s.note("samples follow after this step"));
            }
            Action::Pause => {
                let paused = !self.pause.fetch_xor(true, Ordering::Relaxed);
                self.update(|s| s.paused = paused);
            }
            Action::Stop if self.stop.swap(true, Ordering::Relaxed) => return false,
            Action::Stop => self.update(|s| {
                s.stopping = true;
                s.note("stopping after this step, with a checkpoint; again: at once");
            }),
        }
        true
    }
}

impl Monitor for Shared {
    fn stage_begins(&self, run: &Path, begin: &Begin) {
        self.update(|s| {
            s.run = run.display().to_string();
            (s.total, s.iteration, s.nodes) = (begin.total, begin.iteration, begin.last);
            s.enter(begin.stage.name());
        });
    }
    fn iteration(&self, iteration: u64) {
        self.update(|s| s.iteration = iteration);
    }
    fn row(&self, row: &MetricsRow, device_bytes: Option<u64>) {
        self.update(|s| {
            s.row(row);
            s.device_memory = device_bytes;
        });
    }
    fn measured(&self, distance: f64) {
        self.update(|s| s.measured(distance));
    }
    fn note(&self, text: &str) {
        self.update(|s| s.note(text));
    }
    fn warning(&self, text: &str) {
        self.note(text);
    }
    fn wants_checkpoint(&self) -> bool {
        self.checkpoint.swap(false, Ordering::Relaxed)
    }
    fn wants_samples(&self) -> bool {
        self.sample.swap(false, Ordering::Relaxed)
    }
    /// Waits as long as the run is paused and not stopped.
    fn wait_while_paused(&self) {
        while self.pause.load(Ordering::Relaxed) && !self.stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// What a key means, if anything. Ctrl-C comes as a key: the terminal is in raw mode.
pub fn action(key: KeyEvent) -> Option<Action> {
    match (key.code, key.modifiers.contains(KeyModifiers::CONTROL)) {
        (KeyCode::Char('c'), true) => Some(Action::Stop),
        (KeyCode::Char('c'), false) => Some(Action::Checkpoint),
        (KeyCode::Char('s'), false) => Some(Action::Sample),
        (KeyCode::Char('p' | ' '), false) => Some(Action::Pause),
        (KeyCode::Char('q'), false) => Some(Action::Stop),
        _ => None,
    }
}

/// The screen; the terminal is given back when this is dropped.
pub struct View {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl View {
    /// Takes the terminal and shows `shared` until dropped.
    pub fn start(shared: Arc<Shared>) -> Result<Self> {
        let mut terminal = Terminal::take().context("--tui")?;
        let seen = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            while !seen.over.load(Ordering::Relaxed) && terminal.is_held() {
                let state = seen.state.lock().unwrap_or_else(|e| e.into_inner()).clone();
                // A terminal that has gone away ends the view, not the run.
                if terminal.show(|frame| screen::draw(&state, frame)).is_err() {
                    break;
                }
                let Ok(keys) = terminal.keys(Duration::from_millis(200)) else { break };
                for key in keys {
                    if action(key).is_some_and(|a| !seen.act(a)) {
                        drop(terminal);
                        super::signals::end(super::signals::INTERRUPTED.into());
                    }
                }
            }
        });
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_reach_the_run() {
        let stop = Arc::new(AtomicBool::new(false));
        let shared = Shared::new(stop.clone());
        let key = |c, modifiers| action(KeyEvent::new(KeyCode::Char(c), modifiers)).map(|a| shared.act(a));
        let press = |c| key(c, KeyModifiers::NONE);
        assert_eq!((press('x'), key('s', KeyModifiers::CONTROL)), (None, None));
        assert!(!shared.wants_checkpoint() && !shared.wants_samples());
        assert_eq!(press('c'), Some(true));
        assert!(shared.wants_checkpoint() && !shared.wants_checkpoint());
        press('s');
        assert!(shared.wants_samples());
        press('p');
        assert!(shared.state.lock().unwrap().paused);
        press(' ');
        assert!(!shared.state.lock().unwrap().paused);
        shared.wait_while_paused();
        press('p');
        assert_eq!(key('c', KeyModifiers::CONTROL), Some(true));
        assert!(stop.load(Ordering::Relaxed) && shared.state.lock().unwrap().stopping);
        // Stopped, a pause holds nothing up any more.
        shared.wait_while_paused();
        assert_eq!(press('q'), Some(false), "the second time ends the process");
    }
}
