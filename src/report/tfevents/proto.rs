//! The messages of TensorBoard's event files, the fields that are written here (`tensorflow.Event` and what it holds; the
//! settings of the run as TensorBoard's `hparams` plug-in reads them).

use std::collections::BTreeMap;

use prost::Message;

/// `tensorflow.Event`.
#[derive(Clone, PartialEq, Message)]
pub struct Event {
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    #[prost(int64, tag = "2")]
    pub step: i64,
    #[prost(string, optional, tag = "3")]
    pub file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    pub summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Value {
    #[prost(string, tag = "1")]
    pub tag: String,
    #[prost(float, optional, tag = "2")]
    pub simple_value: Option<f32>,
    #[prost(message, optional, tag = "4")]
    pub image: Option<Image>,
    #[prost(message, optional, tag = "5")]
    pub histo: Option<Histogram>,
    #[prost(message, optional, tag = "8")]
    pub tensor: Option<NullTensor>,
    #[prost(message, optional, tag = "9")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Image {
    #[prost(int32, tag = "1")]
    pub height: i32,
    #[prost(int32, tag = "2")]
    pub width: i32,
    /// Number of channels.
    #[prost(int32, tag = "3")]
    pub colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    pub encoded: Vec<u8>,
}

/// `tensorflow.HistogramProto`: bucket `k` counts what lies below `bucket_limit[k]` and not below the limit before.
#[derive(Clone, PartialEq, Message)]
pub struct Histogram {
    #[prost(double, tag = "1")]
    pub min: f64,
    #[prost(double, tag = "2")]
    pub max: f64,
    #[prost(double, tag = "3")]
    pub num: f64,
    #[prost(double, tag = "4")]
    pub sum: f64,
    #[prost(double, tag = "5")]
    pub sum_squares: f64,
    #[prost(double, repeated, tag = "6")]
    pub bucket_limit: Vec<f64>,
    #[prost(double, repeated, tag = "7")]
    pub bucket: Vec<f64>,
}

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

/// `tensorflow.SummaryMetadata`.
#[derive(Clone, PartialEq, Message)]
pub struct Metadata {
    #[prost(message, optional, tag = "1")]
    pub plugin_data: Option<PluginData>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PluginData {
    #[prost(string, tag = "1")]
    pub plugin_name: String,
    #[prost(bytes = "vec", tag = "2")]
    pub content: Vec<u8>,
}

/// A `tensorflow.TensorProto` of no elements: summaries of plug-ins must hold a tensor.
#[derive(Clone, PartialEq, Message)]
pub struct NullTensor {
    #[prost(int32, tag = "1")]
    pub dtype: i32,
    #[prost(message, optional, tag = "2")]
    pub shape: Option<Shape>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Shape {
    #[prost(message, repeated, tag = "2")]
    pub dim: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Dim {
    #[prost(int64, tag = "1")]
    pub size: i64,
}

/// f32, shape [0].
pub fn null_tensor() -> NullTensor {
    NullTensor { dtype: 1, shape: Some(Shape { dim: vec![Dim { size: 0 }] }) }
}

/// `tensorboard.hparams.HParamsPluginData`.
#[derive(Clone, PartialEq, Message)]
pub struct HparamsData {
    #[prost(int32, tag = "1")]
    pub version: i32,
    #[prost(message, optional, tag = "2")]
    pub experiment: Option<Experiment>,
    #[prost(message, optional, tag = "3")]
    pub session_start: Option<SessionStart>,
    #[prost(message, optional, tag = "4")]
    pub session_end: Option<SessionEnd>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Experiment {
    #[prost(message, repeated, tag = "4")]
    pub hparam_infos: Vec<HparamInfo>,
    #[prost(message, repeated, tag = "5")]
    pub metric_infos: Vec<MetricInfo>,
}

#[derive(Clone, PartialEq, Message)]
pub struct HparamInfo {
    #[prost(string, tag = "1")]
    pub name: String,
    /// 1 text, 2 yes or no, 3 number.
    #[prost(int32, tag = "4")]
    pub data_type: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct MetricInfo {
    #[prost(message, optional, tag = "1")]
    pub name: Option<MetricName>,
}

#[derive(Clone, PartialEq, Message)]
pub struct MetricName {
    #[prost(string, tag = "1")]
    pub group: String,
    #[prost(string, tag = "2")]
    pub tag: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct SessionStart {
    #[prost(btree_map = "string, message", tag = "1")]
    pub hparams: BTreeMap<String, Scalar>,
    #[prost(double, tag = "5")]
    pub start_time_secs: f64,
}

#[derive(Clone, PartialEq, Message)]
pub struct SessionEnd {
    #[prost(int32, tag = "1")]
    pub status: i32,
    #[prost(double, tag = "2")]
    pub end_time_secs: f64,
}

/// `google.protobuf.Value`, the kinds that a setting has.
#[derive(Clone, PartialEq, Message)]
pub struct Scalar {
    #[prost(oneof = "Hparam", tags = "2, 3, 4")]
    pub kind: Option<Hparam>,
}

/// The value of a setting.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Hparam {
    #[prost(double, tag = "2")]
    Number(f64),
    #[prost(string, tag = "3")]
    Text(String),
    #[prost(bool, tag = "4")]
    Flag(bool),
}

impl HparamsData {
    pub fn new() -> Self {
        Self { version: 0, ..Self::default() }
    }

    pub fn experiment(settings: &[(String, Hparam)], metrics: &[&str]) -> Self {
        let kind = |v: &Hparam| match v {
            Hparam::Text(_) => 1,
            Hparam::Flag(_) => 2,
            Hparam::Number(_) => 3,
        };
        let infos = settings.iter().map(|(name, v)| HparamInfo { name: name.clone(), data_type: kind(v) });
        let metric = |tag: &&str| MetricInfo { name: Some(MetricName { group: String::new(), tag: tag.to_string() }) };
        let metric_infos = metrics.iter().map(metric).collect();
        Self { experiment: Some(Experiment { hparam_infos: infos.collect(), metric_infos }), ..Self::new() }
    }
}

impl SessionStart {
    pub fn new(settings: &[(String, Hparam)], at: f64) -> Self {
        let hparams = settings.iter().map(|(k, v)| (k.clone(), Scalar { kind: Some(v.clone()) })).collect();
        Self { hparams, start_time_secs: at }
    }
}
