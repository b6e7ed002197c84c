//! What a person sees of a run: a bar on a terminal, a line now and then elsewhere, nothing when silenced.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

use crate::distill::checkpoint::StageKind;
use crate::distill::metrics::MetricsRow;

/// A line on standard error. A terminal that was closed takes none, which is no reason for a run to end.
pub(crate) fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", crate::shown::lines(text));
}

/// Progress of one stage on standard error.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    stage: StageKind,
    total: u64,
    last: Option<usize>,
    silent: bool,
    lines: u64,
}

/// Without a terminal, one line for this many rows of metrics.
const ROWS_A_LINE: u64 = 10;

impl Progress {
    /// `total` iterations, `last` the number of the trajectory's last node, where it is known.
    pub fn new(stage: StageKind, total: u64, start: u64, last: Option<usize>, silent: bool) -> Self {
        let bar = (!silent && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(total).with_position(start);
            let style = "{prefix} {bar:24} {pos}/{len}  {msg}  ETA {eta}";
            bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(stage.name());
            bar.reset_eta();
            bar
        });
        Self { bar, stage, total, last, silent, lines: 0 }
    }

    /// One iteration is done.
    pub fn tick(&self, iteration: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(iteration);
        }
    }

    /// New numbers are there.
    pub fn row(&mut self, row: &MetricsRow) {
        if self.silent {
            return;
        }
        let text = self.describe(row);
        match &self.bar {
            Some(bar) => bar.set_message(crate::shown::line(&text).into_owned()),
            None => {
                if self.lines.is_multiple_of(ROWS_A_LINE) || row.iteration == self.total {
                    let left =
                        (self.total - row.iteration.min(self.total)) as f64 * row.seconds / row.iteration.max(1) as f64;
                    tell(&format!("{} {}/{}  {text}  ETA {left:.0} s", self.stage.name(), row.iteration, self.total));
                }
                self.lines += 1;
            }
        }
    }

    fn describe(&self, row: &MetricsRow) -> String {
        let node = match self.last {
            Some(last) => format!("node {}/{last}", row.node),
            None => format!("candidate {}", row.node),
        };
        let mut text = format!("{node}  {:.0} images/s", row.images_per_s);
        let mut number = |name: &str, v: Option<f64>| {
            if let Some(v) = v {
                text.push_str(&format!("  {name} {}", crate::report::text::number(v)));
            }
        };
        number("loss", row.loss_fake);
        number("generator", row.loss_generator);
        number("mismatch", row.mismatch);
        number("tracking", row.tracking);
        if row.skipped > 0 {
            text.push_str(&format!("  {} skipped", row.skipped));
        }
        text
    }

    /// A line for people beside the bar.
    pub fn note(&self, text: &str) {
        match &self.bar {
            _ if self.silent => {}
            Some(bar) => bar.println(crate::shown::lines(text)),
            None => tell(text),
        }
    }

    /// Leaves the bar as it stands.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}
