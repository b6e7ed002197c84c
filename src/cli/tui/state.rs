//! What the terminal view shows.

use std::collections::VecDeque;

use crate::distill::metrics::MetricsRow;

/// Points kept for the small curves.
const POINTS: usize = 240;
const NOTES: usize = 50;

/// Everything on the screen; plain values, so that drawing needs nothing else.
#[derive(Debug, Clone, Default)]
pub struct State {
    pub run: String,
    pub stage: String,
    pub iteration: u64,
    pub total: u64,
    pub node: usize,
    pub nodes: Option<usize>,
    /// The newest row of metrics.
    pub row: Option<MetricsRow>,
    pub loss_fake: VecDeque<f64>,
    pub loss_generator: VecDeque<f64>,
    pub mismatch: VecDeque<f64>,
    /// Frechet distances, or others, of the looks so far, with what they are called.
    pub distance: VecDeque<f64>,
    pub best: Option<f64>,
    /// Bytes of this process and of the device, where there is one.
    pub memory: Option<u64>,
    pub device_memory: Option<u64>,
    pub paused: bool,
    pub stopping: bool,
    pub notes: VecDeque<String>,
    /// Iteration and seconds of the first row shown.
    pub started: Option<(u64, f64)>,
}

fn push<T>(list: &mut VecDeque<T>, value: T, most: usize) {
    list.push_back(value);
    while list.len() > most {
        list.pop_front();
    }
}

impl State {
    /// A line below the curves.
    pub fn note(&mut self, text: impl Into<String>) {
        push(&mut self.notes, text.into(), NOTES);
    }

    /// A stage begins: its curves start anew.
    pub fn enter(&mut self, stage: &str) {
        if self.stage != stage {
            self.stage = stage.to_string();
            self.started = None;
            [&mut self.loss_fake, &mut self.loss_generator, &mut self.mismatch].into_iter().for_each(VecDeque::clear);
        }
    }

    /// A new row of metrics.
    pub fn row(&mut self, row: &MetricsRow) {
        self.enter(row.stage.name());
        for (list, value) in [
            (&mut self.loss_fake, row.loss_fake),
            (&mut self.loss_generator, row.loss_generator),
            (&mut self.mismatch, row.mismatch),
        ] {
            value.into_iter().for_each(|v| push(list, v, POINTS));
        }
        self.node = row.node;
        self.started.get_or_insert((row.iteration, row.seconds));
        self.memory = resident();
        self.row = Some(row.clone());
    }

    /// A distance was measured.
    pub fn measured(&mut self, distance: f64) {
        push(&mut self.distance, distance, POINTS);
        self.best = Some(self.best.map_or(distance, |b| b.min(distance)));
    }

    /// Seconds to the end of the stage, by the pace since the first row shown.
    pub fn eta(&self) -> Option<f64> {
        let (row, (iteration, seconds)) = (self.row.as_ref()?, self.started?);
        let done = row.iteration.checked_sub(iteration).filter(|n| *n > 0)?;
        let left = self.total.saturating_sub(self.iteration.max(row.iteration));
        Some((row.seconds - seconds) / done as f64 * left as f64)
    }
}

/// Bytes that this process holds in memory.
pub fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
