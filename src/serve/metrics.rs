//! Counters in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// A number that goes up, or up and down.
#[derive(Debug, Default)]
pub struct Number(AtomicI64);

impl Number {
    pub fn add(&self, by: i64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A histogram with fixed upper bounds.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    counts: Vec<AtomicU64>,
    /// Sum in millionths, so that one atomic integer holds it.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(), sum: AtomicU64::new(0) }
    }
    pub fn observe(&self, value: f64) {
        let place = self.bounds.iter().position(|b| value <= *b).unwrap_or(self.bounds.len());
        self.counts[place].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add((value * 1e6) as u64, Ordering::Relaxed);
    }
    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut total = 0;
        for (k, count) in self.counts.iter().enumerate() {
            total += count.load(Ordering::Relaxed);
            let bound = self.bounds.get(k).map_or("+Inf".to_owned(), f64::to_string);
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {total}");
        }
        let sum = self.sum.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum {sum}\n{name}_count {total}");
    }
}

const SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const IMAGES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Everything that `/metrics` shows.
#[derive(Debug)]
pub struct Metrics {
    requests: Mutex<BTreeMap<u16, u64>>,
    pub images: Number,
    pub waiting: Number,
    /// Images a call of the network.
    pub batches: Histogram,
    /// Seconds in the network.
    pub network: Histogram,
    /// Seconds from request to answer.
    pub latency: Histogram,
    engine: String,
}

impl Metrics {
    pub fn new(engine: String) -> Self {
        Self {
            requests: Mutex::default(),
            images: Number::default(),
            waiting: Number::default(),
            batches: Histogram::new(IMAGES),
            network: Histogram::new(SECONDS),
            latency: Histogram::new(SECONDS),
            engine,
        }
    }

    /// Counts an answered request.
    pub fn answered(&self, status: u16, seconds: f64) {
        *self.requests.lock().unwrap_or_else(|e| e.into_inner()).entry(status).or_insert(0) += 1;
        self.latency.observe(seconds);
    }

    /// The page.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let engine = self.engine.replace(['\\', '"', '\n'], " ");
        let _ = writeln!(
            out,
            "# HELP disback_info What runs the student.\n# TYPE disback_info gauge\n\
             disback_info{{version=\"{}\",engine=\"{engine}\"}} 1",
            env!("CARGO_PKG_VERSION")
        );
        let _ = writeln!(
            out,
            "# HELP disback_requests_total Answered requests for samples.\n# TYPE disback_requests_total counter"
        );
        for (code, n) in self.requests.lock().unwrap_or_else(|e| e.into_inner()).iter() {
            let _ = writeln!(out, "disback_requests_total{{code=\"{code}\"}} {n}");
        }
        let numbers = [
            ("disback_images_total", "counter", "Images made.", &self.images),
            ("disback_waiting_requests", "gauge", "Requests that wait for the network.", &self.waiting),
        ];
        for (name, kind, help, number) in numbers {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {}", number.get());
        }
        self.batches.write(&mut out, "disback_batch_images", "Images in a call of the network.");
        self.network.write(&mut out, "disback_network_seconds", "Seconds of a call of the network.");
        self.latency.write(&mut out, "disback_request_seconds", "Seconds from request to answer.");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_prometheus_text() {
        let m = Metrics::new("tract 0.23 (CPU)".into());
        m.answered(200, 0.004);
        m.answered(200, 20.0);
        m.answered(413, 0.0001);
        m.images.add(7);
        m.batches.observe(3.0);
        let text = m.text();
        for line in [
            "disback_requests_total{code=\"200\"} 2",
            "disback_requests_total{code=\"413\"} 1",
            "disback_images_total 7",
            "disback_batch_images_bucket{le=\"2\"} 0",
            "disback_batch_images_bucket{le=\"4\"} 1",
            "disback_request_seconds_bucket{le=\"10\"} 2",
            "disback_request_seconds_bucket{le=\"+Inf\"} 3",
            "disback_request_seconds_count 3",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        // Every sample line: a name, maybe labels, one number.
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (_, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
