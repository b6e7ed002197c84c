//! The terminal itself: another screen, single keys, its size. Given back when dropped, whatever ends the view.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use crate::error::{Error, Result};

const STDIN: i32 = 0;
const STDERR: i32 = 2;
/// Alternate screen, no cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[2J";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// A terminal in raw mode.
pub struct Terminal {
    before: libc::termios,
}

/// Refuses to take what is not there.
pub fn check() -> Result<()> {
    match std::io::stderr().is_terminal() && std::io::stdin().is_terminal() {
        true => Ok(()),
        false => Err(Error::usage("there is no terminal")
            .hint("leave --tui out: progress is then written line by line, and metrics.jsonl has every number")),
    }
}

impl Terminal {
    /// Takes the terminal of standard input and standard error.
    pub fn take() -> Result<Self> {
        check()?;
        // SAFETY: termios is plain data that tcgetattr fills; the descriptors are open.
        let before = unsafe {
            let mut settings: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(STDIN, &mut settings) != 0 {
                return Err(std::io::Error::last_os_error().into());
            }
            settings
        };
        let mut raw = before;
        raw.c_lflag &= !(libc::ICANON | libc::ECHO | libc::ISIG);
        // SAFETY: as above; `raw` is a changed copy of valid settings.
        if unsafe { libc::tcsetattr(STDIN, libc::TCSANOW, &raw) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        let terminal = Self { before };
        std::io::stderr().write_all(ENTER.as_bytes())?;
        Ok(terminal)
    }

    /// Columns and lines.
    pub fn size(&self) -> (usize, usize) {
        // SAFETY: winsize is plain data that the call fills.
        let (ok, size) = unsafe {
            let mut size: libc::winsize = std::mem::zeroed();
            (libc::ioctl(STDERR, libc::TIOCGWINSZ, &mut size) == 0, size)
        };
        match ok && size.ws_col > 0 && size.ws_row > 0 {
            true => (usize::from(size.ws_col), usize::from(size.ws_row)),
            false => (80, 24),
        }
    }

    /// Shows lines from the top, and nothing below them.
    pub fn show(&mut self, lines: &[String]) -> std::io::Result<()> {
        let mut out = String::from("\x1b[H");
        for (k, line) in lines.iter().enumerate() {
            if k > 0 {
                out.push_str("\r\n");
            }
            out.push_str(line);
            out.push_str("\x1b[K");
        }
        out.push_str("\x1b[J");
        let mut err = std::io::stderr().lock();
        err.write_all(out.as_bytes())?;
        err.flush()
    }

    /// Keys pressed within `wait`, as soon as there are any. Sequences of cursor keys and the like are passed over.
    pub fn keys(&mut self, wait: Duration) -> Vec<u8> {
        let mut ready = libc::pollfd { fd: STDIN, events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor, as many as is said.
        if unsafe { libc::poll(&mut ready, 1, wait.as_millis() as i32) } <= 0 || ready.revents & libc::POLLIN == 0 {
            if ready.revents & (libc::POLLHUP | libc::POLLERR) != 0 {
                std::thread::sleep(wait);
            }
            return Vec::new();
        }
        let mut bytes = [0u8; 64];
        // SAFETY: the buffer is as large as is said.
        let count = unsafe { libc::read(STDIN, bytes.as_mut_ptr().cast(), bytes.len()) };
        let pressed = &bytes[..usize::try_from(count).unwrap_or(0)];
        match pressed.first() {
            Some(0x1b) => Vec::new(),
            _ => pressed.to_vec(),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = std::io::stderr().write_all(LEAVE.as_bytes());
        // SAFETY: the settings are those the terminal had.
        unsafe { libc::tcsetattr(STDIN, libc::TCSANOW, &self.before) };
    }
}
