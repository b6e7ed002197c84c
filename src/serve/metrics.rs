//! What `/metrics` shows, in OpenMetrics' text format, which Prometheus reads.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::process::Process;

/// What [`Metrics::text`] is, for the answer's Content-Type.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const SECONDS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const IMAGES: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Requests are counted by the status of their answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Status {
    code: u16,
}

/// Refused requests are counted by the reason.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfModel {
    model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Run {
    model: String,
    engine: String,
}

type Histograms = Family<OfModel, Histogram, fn() -> Histogram>;

/// Everything that `/metrics` shows.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<Status, Counter>,
    rejected: Family<Reason, Counter>,
    latency: Histogram,
    models: Family<Run, Gauge>,
    images: Family<OfModel, Counter>,
    waiting: Family<OfModel, Gauge>,
    abandoned: Family<OfModel, Counter>,
    batches: Histograms,
    network: Histograms,
}

/// What is counted of one model.
#[derive(Debug, Clone)]
pub struct ModelMetrics {
    /// Images made.
    pub images: Counter,
    /// Requests that wait for the network.
    pub waiting: Gauge,
    /// Requests whose caller had gone before their turn.
    pub abandoned: Counter,
    /// Images a call of the network.
    pub batches: Histogram,
    /// Seconds in the network.
    pub network: Histogram,
}

impl Default for Metrics {
    /// All at zero.
    fn default() -> Self {
        let mut whole = Registry::default();
        whole.register_collector(Box::new(Process));
        let registry = whole.sub_registry_with_prefix("disback");
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "Version of disback", build);
        let models = Family::default();
        registry.register("model_info", "The models, and what runs each; always 1", models.clone());
        let requests = Family::default();
        registry.register("requests", "Answered requests for samples, and refused ones of any kind", requests.clone());
        let rejected = Family::default();
        let help = "Requests that were refused though they may be right: no room, too late, not allowed";
        registry.register("rejected_requests", help, rejected.clone());
        let images = Family::default();
        registry.register("images", "Images made", images.clone());
        let waiting = Family::default();
        registry.register("waiting_requests", "Requests that wait for the network", waiting.clone());
        let abandoned = Family::default();
        let help = "Requests whose caller had gone before their turn; nothing was computed for them";
        registry.register("abandoned_requests", help, abandoned.clone());
        let batches = Histograms::new_with_constructor(|| Histogram::new(IMAGES));
        let unit = Unit::Other("images".into());
        registry.register_with_unit("batch", "Images in a call of the network", unit, batches.clone());
        let network = Histograms::new_with_constructor(|| Histogram::new(SECONDS));
        let help = "Duration of a call of the network";
        registry.register_with_unit("network_duration", help, Unit::Seconds, network.clone());
        let latency = Histogram::new(SECONDS);
        let help = "Time from request to answer";
        registry.register_with_unit("request_duration", help, Unit::Seconds, latency.clone());
        Self { registry: whole, requests, rejected, latency, models, images, waiting, abandoned, batches, network }
    }
}

impl Metrics {
    /// What is counted of the model of this name, which `engine` runs.
    pub fn of_model(&self, name: &str, engine: &str) -> ModelMetrics {
        self.models.get_or_create(&Run { model: name.into(), engine: engine.into() }).set(1);
        let model = OfModel { model: name.into() };
        ModelMetrics {
            images: self.images.get_or_create(&model).clone(),
            waiting: self.waiting.get_or_create(&model).clone(),
            abandoned: self.abandoned.get_or_create(&model).clone(),
            batches: self.batches.get_or_create(&model).clone(),
            network: self.network.get_or_create(&model).clone(),
        }
    }

    /// Counts an answered request.
    pub fn answered(&self, code: u16, seconds: f64) {
        self.requests.get_or_create(&Status { code }).inc();
        self.latency.observe(seconds);
    }

    /// Counts a request that was refused for this reason.
    pub fn rejected(&self, reason: &'static str) {
        self.rejected.get_or_create(&Reason { reason }).inc();
    }

    /// The page.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_openmetrics_text() {
        let m = Metrics::default();
        let of = m.of_model("digits", "tract 0.23 (CPU)");
        m.answered(200, 0.004);
        m.answered(200, 20.0);
        m.answered(413, 0.0001);
        m.rejected("queue");
        of.images.inc_by(7);
        of.waiting.inc();
        of.batches.observe(3.0);
        of.network.observe(0.002);
        let text = m.text().unwrap();
        let build = format!("disback_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
        for line in [
            build.as_str(),
            "# TYPE disback_requests counter",
            "disback_requests_total{code=\"200\"} 2",
            "disback_requests_total{code=\"413\"} 1",
            "disback_model_info{model=\"digits\",engine=\"tract 0.23 (CPU)\"} 1",
            "disback_rejected_requests_total{reason=\"queue\"} 1",
            "disback_images_total{model=\"digits\"} 7",
            "# HELP disback_waiting_requests Requests that wait for the network.",
            "# TYPE disback_waiting_requests gauge",
            "disback_waiting_requests{model=\"digits\"} 1",
            "disback_batch_images_bucket{le=\"2.0\",model=\"digits\"} 0",
            "disback_batch_images_bucket{le=\"4.0\",model=\"digits\"} 1",
            "# TYPE disback_request_duration_seconds histogram",
            "# UNIT disback_request_duration_seconds seconds",
            "disback_request_duration_seconds_bucket{le=\"10.0\"} 2",
            "disback_request_duration_seconds_bucket{le=\"+Inf\"} 3",
            "disback_request_duration_seconds_count 3",
            "disback_network_duration_seconds_count{model=\"digits\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"), "{text}");
        // Every sample line: a name, maybe labels, one number.
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (_, value) = line.rsplit_once(' ').unwrap();
            let ours = ["disback_", "process_"].iter().any(|prefix| line.starts_with(prefix));
            assert!(ours && value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
