//! A process that is driven over its standard input: `run N` in, one line of JSON out.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use serde_json::Value;

pub struct Contender {
    child: Child,
    to: ChildStdin,
    lines: Receiver<String>,
    /// Why it takes no further part.
    pub failed: Option<String>,
}

impl Contender {
    /// Starts the process; its standard error goes to ours where `DISBACK_BENCH_VERBOSE` is set.
    pub fn start(command: &mut Command) -> std::io::Result<Self> {
        let loud = std::env::var_os("DISBACK_BENCH_VERBOSE").is_some();
        let stderr = if loud { Stdio::inherit() } else { Stdio::null() };
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(command, 0);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr).spawn()?;
        let to = child.stdin.take().expect("stdin is piped");
        let from = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in from.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, to, lines, failed: None })
    }

    /// The next answer, waited for so long.
    pub fn answer(&mut self, seconds: u64) -> Option<Value> {
        let why = match self.lines.recv_timeout(Duration::from_secs(seconds)) {
            Ok(line) => match serde_json::from_str::<Value>(&line) {
                Ok(value) if value.get("error").is_none() => return Some(value),
                Ok(value) => value["error"].as_str().unwrap_or("?").to_owned(),
                Err(_) => format!("said `{line}`"),
            },
            Err(RecvTimeoutError::Timeout) => format!("no answer within {seconds} s"),
            Err(RecvTimeoutError::Disconnected) => "ended (DISBACK_BENCH_VERBOSE=1 shows why)".into(),
        };
        self.failed = Some(why);
        None
    }

    /// Sends a command and waits for its answer.
    pub fn ask(&mut self, command: &str, seconds: u64) -> Option<Value> {
        if self.failed.is_some() {
            return None;
        }
        if writeln!(self.to, "{command}").is_err() {
            self.failed = Some("ended (DISBACK_BENCH_VERBOSE=1 shows why)".into());
            return None;
        }
        self.answer(seconds)
    }

    /// Ends a process that takes no further part, with those it has started (torch.compile's compilers).
    pub fn stop_if_failed(&mut self) {
        if self.failed.is_some() {
            kill_group(&self.child);
            let _ = self.child.wait();
        }
    }
}

#[cfg(unix)]
fn kill_group(child: &Child) {
    if let Ok(group) = i32::try_from(child.id()) {
        // SAFETY: a system call without memory of ours; the child leads a group of its own.
        unsafe { libc::kill(-group, libc::SIGKILL) };
    }
}

#[cfg(not(unix))]
fn kill_group(_child: &Child) {}

impl Drop for Contender {
    fn drop(&mut self) {
        let _ = writeln!(self.to, "quit");
        self.stop_if_failed();
        let _ = self.child.wait();
    }
}
