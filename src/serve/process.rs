//! The process itself, under the names that Prometheus' own clients give: time, memory, descriptors.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

/// Looks at `/proc` whenever the page is asked for; where there is none it shows nothing.
#[derive(Debug)]
pub struct Process;

/// What is seen of this process.
#[derive(Debug)]
struct Seen {
    cpu_seconds: f64,
    /// Since 1970.
    start_seconds: f64,
    resident: u64,
    virtual_bytes: u64,
    threads: u64,
    open_files: u64,
    most_files: u64,
}

#[cfg(target_os = "linux")]
fn seen() -> Option<Seen> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{name}")).ok();
    let stat = read("self/stat")?;
    // (The program's name, in brackets, may hold anything.)
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    // SAFETY: sysconf takes a number and gives one.
    let (ticks, page) = unsafe { (libc::sysconf(libc::_SC_CLK_TCK), libc::sysconf(libc::_SC_PAGESIZE)) };
    let (ticks, page) = (ticks as f64, page as u64);
    let booted = read("stat")?.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse::<f64>().ok())?;
    let limits = read("self/limits")?;
    let files = limits.lines().find_map(|l| l.strip_prefix("Max open files"));
    Some(Seen {
        cpu_seconds: (field(14)? + field(15)?) as f64 / ticks,
        start_seconds: booted + field(22)? as f64 / ticks,
        resident: field(24)? * page,
        virtual_bytes: field(23)?,
        threads: field(20)?,
        open_files: std::fs::read_dir("/proc/self/fd").ok()?.count() as u64,
        most_files: files.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0),
    })
}

#[cfg(not(target_os = "linux"))]
fn seen() -> Option<Seen> {
    None
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Some(seen) = seen() else { return Ok(()) };
        let mut put = |name: &str, help: &str, unit: Option<&Unit>, metric: &dyn Put| {
            metric.put(encoder.encode_descriptor(name, help, unit, metric.kind())?)
        };
        let time = ConstCounter::new(seen.cpu_seconds);
        put("process_cpu", "Time of all processors, in user and system", Some(&Unit::Seconds), &time)?;
        let start = ConstGauge::new(seen.start_seconds);
        put("process_start_time", "When the process began, since 1970", Some(&Unit::Seconds), &start)?;
        let resident = ConstGauge::new(seen.resident);
        put("process_resident_memory", "Memory in use", Some(&Unit::Bytes), &resident)?;
        let whole = ConstGauge::new(seen.virtual_bytes);
        put("process_virtual_memory", "Address space in use", Some(&Unit::Bytes), &whole)?;
        put("process_threads", "Threads", None, &ConstGauge::new(seen.threads))?;
        put("process_open_fds", "Open file descriptors", None, &ConstGauge::new(seen.open_files))?;
        put("process_max_fds", "File descriptors that may be open", None, &ConstGauge::new(seen.most_files))
    }
}

/// A metric of one value.
trait Put {
    fn kind(&self) -> prometheus_client::metrics::MetricType;
    fn put(&self, encoder: prometheus_client::encoding::MetricEncoder<'_>) -> fmt::Result;
}

impl<T: EncodeMetric> Put for T {
    fn kind(&self) -> prometheus_client::metrics::MetricType {
        self.metric_type()
    }

    fn put(&self, encoder: prometheus_client::encoding::MetricEncoder<'_>) -> fmt::Result {
        self.encode(encoder)
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_seen_is_what_the_system_tells_elsewhere() {
        // Some time for the processor's counter.
        let began = std::time::Instant::now();
        while began.elapsed().as_millis() < 50 {
            std::hint::black_box(began.elapsed());
        }
        let file = std::fs::File::open("/proc/self/status").unwrap();
        let seen = seen().unwrap();
        drop(file);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let kib = |key: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap();
            line.split_whitespace().next().unwrap().parse::<f64>().unwrap() * 1024.0
        };
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 0.2;
        assert!(near(seen.resident as f64, kib("VmRSS:")), "{seen:?} {status}");
        assert!(near(seen.virtual_bytes as f64, kib("VmSize:")), "{seen:?} {status}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!(seen.start_seconds < now + 1.0 && now - seen.start_seconds < 3600.0, "{seen:?} at {now}");
        assert!(seen.cpu_seconds >= 0.03 && seen.threads >= 1 && seen.open_files >= 4, "{seen:?}");
        assert!(seen.most_files >= seen.open_files, "{seen:?}");
    }
}
