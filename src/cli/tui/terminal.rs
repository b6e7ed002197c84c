//! The terminal of standard input and standard error in raw mode, with another screen. Given back when dropped, when any
//! thread panics, and by [`give_back`] before the process ends at once.

use std::io::{BufWriter, IsTerminal, Stderr, stderr, stdin};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ratatui::Frame;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::event::{self, Event, KeyEvent, KeyEventKind};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};

use crate::error::{Error, Result};

/// Frames between two drawings of everything: what others (libtorch, say) wrote to standard error does not stay.
const FRAMES: u32 = 25;

/// Whether the terminal is in use here.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Refuses to take what is not there.
pub fn check() -> Result<()> {
    match stderr().is_terminal() && stdin().is_terminal() {
        true => Ok(()),
        false => Err(Error::usage("there is no terminal")
            .hint("leave --tui out: progress is then written line by line, and metrics.jsonl has every number")),
    }
}

/// Puts the terminal back as it was, if it was taken.
pub fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        let _ = execute!(stderr(), Show, LeaveAlternateScreen);
        let _ = disable_raw_mode();
    }
}

/// A panic is reported on the screen that the user comes back to.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            give_back();
            before(info);
        }));
    });
}

/// The terminal, as long as this lives.
pub struct Terminal {
    screen: ratatui::Terminal<CrosstermBackend<BufWriter<Stderr>>>,
    frames: u32,
}

impl Terminal {
    /// Takes the terminal.
    pub fn take() -> Result<Self> {
        check()?;
        watch_panics();
        enable_raw_mode()?;
        TAKEN.store(true, Ordering::SeqCst);
        let made = execute!(stderr(), EnterAlternateScreen, Hide)
            .and_then(|()| ratatui::Terminal::new(CrosstermBackend::new(BufWriter::new(stderr()))));
        match made {
            Ok(screen) => Ok(Self { screen, frames: 0 }),
            Err(e) => {
                give_back();
                Err(e.into())
            }
        }
    }

    /// Whether it has not been given back meanwhile.
    pub fn is_held(&self) -> bool {
        TAKEN.load(Ordering::SeqCst)
    }

    /// Shows what `draw` draws.
    pub fn show(&mut self, draw: impl FnOnce(&mut Frame)) -> std::io::Result<()> {
        if self.frames.is_multiple_of(FRAMES) {
            self.screen.clear()?;
        }
        self.frames = self.frames.wrapping_add(1);
        self.screen.draw(draw).map(|_| ())
    }

    /// Keys pressed within `wait`, as soon as there are any; a change of the terminal's size ends the waiting too.
    pub fn keys(&mut self, mut wait: Duration) -> std::io::Result<Vec<KeyEvent>> {
        let mut pressed = Vec::new();
        while event::poll(wait)? {
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press => pressed.push(key),
                _ => {}
            }
            wait = Duration::ZERO;
        }
        Ok(pressed)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        give_back();
    }
}
