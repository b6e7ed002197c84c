//! The messages of event files, generated from `tfevents.proto`, and how they are made.

#![allow(missing_docs, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/tfevents.rs"));

pub use setting::Value as Hparam;

/// Buckets of a histogram.
const BUCKETS: usize = 40;

impl Histogram {
    /// Equal buckets from the least to the greatest value; nothing without a finite value.
    pub fn of(values: &[f32]) -> Option<Self> {
        let finite: Vec<f64> = values.iter().filter(|v| v.is_finite()).map(|&v| f64::from(v)).collect();
        let min = finite.iter().copied().reduce(f64::min)?;
        let max = finite.iter().copied().reduce(f64::max)?;
        let width = (max - min).max(min.abs().max(1.0) * 1e-9) / BUCKETS as f64;
        let mut bucket = vec![0.0; BUCKETS];
        finite.iter().for_each(|v| bucket[(((v - min) / width) as usize).min(BUCKETS - 1)] += 1.0);
        // The last limit lies above the greatest value: limits are exclusive.
        let mut bucket_limit: Vec<f64> = (1..=BUCKETS).map(|k| min + width * k as f64).collect();
        let last = bucket_limit[BUCKETS - 1];
        bucket_limit[BUCKETS - 1] = last.max(max + (max.abs() * 1e-9).max(1e-300));
        Some(Self {
            min,
            max,
            num: finite.len() as f64,
            sum: finite.iter().sum(),
            sum_squares: finite.iter().map(|v| v * v).sum(),
            bucket_limit,
            bucket,
        })
    }
}

/// f32, shape [0].
pub fn empty_tensor() -> EmptyTensor {
    EmptyTensor { dtype: 1, shape: Some(Shape { dim: vec![Dim { size: 0 }] }) }
}

impl HparamsData {
    /// The settings with their kinds, and the tags of scalars to set beside them.
    pub fn experiment(settings: &[(String, Hparam)], metrics: &[&str]) -> Self {
        let kind = |v: &Hparam| match v {
            Hparam::Text(_) => 1,
            Hparam::Flag(_) => 2,
            Hparam::Number(_) => 3,
        };
        let infos = settings.iter().map(|(name, v)| HparamInfo { name: name.clone(), data_type: kind(v) });
        let metric = |tag: &&str| MetricInfo { name: Some(MetricName { group: String::new(), tag: tag.to_string() }) };
        let metric_infos = metrics.iter().map(metric).collect();
        Self { experiment: Some(Experiment { hparam_infos: infos.collect(), metric_infos }), ..Self::default() }
    }
}

impl SessionStart {
    /// A run with these settings that began at this time.
    pub fn new(settings: &[(String, Hparam)], at: f64) -> Self {
        let hparams = settings.iter().map(|(k, v)| (k.clone(), Setting { value: Some(v.clone()) })).collect();
        Self { hparams, start_time_secs: at }
    }
}
