//! Denoisers in every disguise: `D(x; sigma, class)` with its input, output and time converted inside the graph to what a
//! card calls prediction, time unit and schedule. The conversions are written as ONNX nodes from the formulas, not with the
//! library's own code.

use disback::graph::edit::{int_attribute, ints_attribute, node, rename, value_info};
use disback::graph::tensors::to_proto;
use disback::onnx::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto};
use disback::{DType, HostTensor};
use prost::Message;

/// What the network is to look like from outside.
#[derive(Debug, Clone, Copy)]
pub struct Disguise {
    pub prediction: &'static str,
    pub unit: &'static str,
    /// `edm`, `vp-linear`, `vp-scaled-linear`, `vp-cosine` or `flow`.
    pub schedule: &'static str,
    pub sigma_data: f64,
    /// Times are int64.
    pub integer: bool,
    /// Labels come as a one-hot; all zeros for none.
    pub one_hot: bool,
    pub nhwc: bool,
}

pub const PLAIN: Disguise = Disguise {
    prediction: "denoised",
    unit: "sigma",
    schedule: "edm",
    sigma_data: 0.5,
    integer: false,
    one_hot: false,
    nhwc: false,
};

/// A network with inputs `core_x` (f32 `[batch, 1, 8, 8]`), `core_sigma` (f32 `[batch]`), `core_labels` (i64 `[batch]`, the
/// last of `rows` for none) and output `core_denoised`.
pub struct Core {
    pub graph: GraphProto,
    pub rows: usize,
}

/// The trained digits teacher.
pub fn digits() -> Core {
    let bytes = std::fs::read("examples/digits/teacher.onnx").unwrap();
    let mut graph = ModelProto::decode(bytes.as_slice()).unwrap().graph.unwrap();
    for (from, to) in
        [("x", "core_x"), ("sigma", "core_sigma"), ("labels", "core_labels"), ("denoised", "core_denoised")]
    {
        rename(&mut graph, from, to);
    }
    Core { graph, rows: 11 }
}

/// The exact denoiser of a mixture of 40 Gaussians (standard deviation 0.15) around images of 8x8, ten for each of four
/// classes: `D = c x + (1 - c) sum_k w_k mu_k` with `c = s^2 / (s^2 + sigma^2)` and
/// `w = softmax(-|x - mu_k|^2 / (2 (s^2 + sigma^2)))` over the class.
pub fn mixture() -> Core {
    let (count, classes, len) = (40usize, 4usize, 64usize);
    let mut mu = Vec::with_capacity(count * len);
    for k in 0..count {
        let z = disback::noise::image_noise(77, k as u64, len);
        // Smooth along the rows, as images are, and within -1..1.
        mu.extend((0..len).map(|i| (0.7 * (z[i] + z[(i + 1) % len] + z[(i + 8) % len]) / 1.7).clamp(-1.0, 1.0)));
    }
    let norms: Vec<f32> = (0..count).map(|k| mu[k * len..(k + 1) * len].iter().map(|v| v * v).sum()).collect();
    let transposed: Vec<f32> =
        (0..len).flat_map(|i| (0..count).map(move |k| (i, k))).map(|(i, k)| mu[k * len + i]).collect();
    let mask: Vec<f32> = (0..=classes)
        .flat_map(|c| (0..count).map(move |k| if c == classes || k % classes == c { 0.0 } else { -1e6 }))
        .collect();
    let tensor = |name: &str, shape: &[usize], values: &[f32]| to_proto(name, &HostTensor::new(shape, values).unwrap());
    let mut square = node("Mul", &["core_x_flat", "core_x_flat"], "core_square");
    square.name = Some("core/square".into());
    let nodes = vec![
        node("Reshape", &["core_x", "core_flat_shape"], "core_x_flat"),
        node("Reshape", &["core_sigma", "core_column"], "core_s"),
        node("Mul", &["core_s", "core_s"], "core_s2"),
        node("Add", &["core_s2", "core_var"], "core_v"),
        square,
        with(node("ReduceSum", &["core_square", "core_axis"], "core_xx"), "keepdims", 1),
        node("MatMul", &["core_x_flat", "core_mu_t"], "core_xm"),
        node("Mul", &["core_xm", "core_two"], "core_xm2"),
        node("Sub", &["core_xx", "core_xm2"], "core_d_a"),
        node("Add", &["core_d_a", "core_norms"], "core_d2"),
        node("Div", &["core_d2", "core_v"], "core_ratio"),
        node("Mul", &["core_ratio", "core_minus_half"], "core_logits_open"),
        node("Gather", &["core_mask", "core_labels"], "core_class"),
        node("Add", &["core_logits_open", "core_class"], "core_logits"),
        with(node("Softmax", &["core_logits"], "core_w"), "axis", 1),
        node("MatMul", &["core_w", "core_mu"], "core_mean"),
        node("Div", &["core_var", "core_v"], "core_c"),
        node("Sub", &["core_x_flat", "core_mean"], "core_off"),
        node("Mul", &["core_off", "core_c"], "core_part"),
        node("Add", &["core_mean", "core_part"], "core_flat_out"),
        node("Reshape", &["core_flat_out", "core_image_shape"], "core_denoised"),
    ];
    let ints = |name: &str, v: &[i64]| to_proto(name, &HostTensor::vec(v));
    let graph = GraphProto {
        name: Some("mixture".into()),
        node: nodes,
        initializer: vec![
            tensor("core_mu", &[count, len], &mu),
            tensor("core_mu_t", &[len, count], &transposed),
            tensor("core_norms", &[1, count], &norms),
            tensor("core_mask", &[classes + 1, count], &mask),
            tensor("core_var", &[1], &[0.15f32.powi(2)]),
            tensor("core_two", &[1], &[2.0]),
            tensor("core_minus_half", &[1], &[-0.5]),
            ints("core_flat_shape", &[-1, len as i64]),
            ints("core_image_shape", &[-1, 1, 8, 8]),
            ints("core_column", &[-1, 1]),
            ints("core_axis", &[1]),
        ],
        output: vec![value_info("core_denoised", DType::F32, &[Err("batch"), Ok(1), Ok(8), Ok(8)])],
        ..GraphProto::default()
    };
    Core { graph, rows: classes + 1 }
}

fn with(mut n: NodeProto, attribute: &str, value: i64) -> NodeProto {
    n.attribute.push(int_attribute(attribute, value));
    n
}

/// Nodes under construction, in order; constants become initializers.
struct Build {
    graph: GraphProto,
    made: usize,
}

impl Build {
    fn constant(&mut self, t: HostTensor) -> String {
        self.made += 1;
        let name = format!("w_c{}", self.made);
        self.graph.initializer.push(to_proto(&name, &t));
        name
    }
    fn number(&mut self, v: f64) -> String {
        self.constant(HostTensor::vec(&[v as f32]))
    }
    fn op(&mut self, op: &str, inputs: &[&str]) -> String {
        self.made += 1;
        let out = format!("w_{}", self.made);
        self.graph.node.push(node(op, inputs, &out));
        out
    }
    fn attribute(&mut self, name: &str, value: i64) {
        self.graph.node.last_mut().unwrap().attribute.push(int_attribute(name, value));
    }
    fn with_number(&mut self, op: &str, a: &str, v: f64) -> String {
        let c = self.number(v);
        self.op(op, &[a, &c])
    }
    fn number_with(&mut self, op: &str, v: f64, b: &str) -> String {
        let c = self.number(v);
        self.op(op, &[&c, b])
    }
}

/// `ln sigma` of each step of a VP schedule, from diffusers' betas.
fn vp_table(betas: &str) -> Vec<f32> {
    let n = 1000;
    let ramp = |a: f64, b: f64, i: usize| a + (b - a) * i as f64 / (n - 1) as f64;
    let bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    let mut abar = 1.0;
    (0..n)
        .map(|i| {
            let beta = match betas {
                "vp-linear" => ramp(1e-4, 0.02, i),
                "vp-scaled-linear" => ramp(0.00085f64.sqrt(), 0.012f64.sqrt(), i).powi(2),
                _ => (1.0 - bar((i + 1) as f64 / n as f64) / bar(i as f64 / n as f64)).min(0.999),
            };
            abar *= 1.0 - beta;
            (0.5 * ((1.0 - abar) / abar).ln()) as f32
        })
        .collect()
}

/// The core in its disguise: inputs `sample`, `time` and `labels` (or `class_onehot`), output `out`; no metadata.
pub fn wrapped(core: Core, d: Disguise) -> ModelProto {
    let outer = GraphProto { initializer: core.graph.initializer, name: Some("wrapped".into()), ..Default::default() };
    let mut b = Build { graph: outer, made: 0 };
    let t = if d.integer {
        let t = b.op("Cast", &["time"]);
        b.attribute("to", DType::F32.to_onnx().into());
        t
    } else {
        "time".to_owned()
    };
    let sigma = match (d.schedule, d.unit) {
        (_, "sigma") => t,
        (_, "ln-sigma-4") => {
            let ln = b.with_number("Mul", &t, 4.0);
            b.op("Exp", &[&ln])
        }
        ("flow", unit) => {
            let t = if unit == "thousand" { b.with_number("Mul", &t, 1e-3) } else { t };
            let (low, high) = (b.constant(HostTensor::scalar(1e-4f32)), b.constant(HostTensor::scalar(1.0 - 1e-4f32)));
            let t = b.op("Clip", &[&t, &low, &high]);
            let rest = b.number_with("Sub", 1.0, &t);
            b.op("Div", &[&t, &rest])
        }
        (vp, unit) => {
            let index = if unit == "unit" { b.with_number("Mul", &t, 999.0) } else { t };
            let table = b.constant(HostTensor::vec(&vp_table(vp)));
            let floor = b.op("Floor", &[&index]);
            let (low, high) = (b.constant(HostTensor::scalar(0f32)), b.constant(HostTensor::scalar(998f32)));
            let floor = b.op("Clip", &[&floor, &low, &high]);
            let fraction = b.op("Sub", &[&index, &floor]);
            let next = b.with_number("Add", &floor, 1.0);
            let entry = |b: &mut Build, at: &str| {
                let at = b.op("Cast", &[at]);
                b.attribute("to", DType::I64.to_onnx().into());
                b.op("Gather", &[&table, &at])
            };
            let (here, there) = (entry(&mut b, &floor), entry(&mut b, &next));
            let rise = b.op("Sub", &[&there, &here]);
            let part = b.op("Mul", &[&rise, &fraction]);
            let ln = b.op("Add", &[&here, &part]);
            b.op("Exp", &[&ln])
        }
    };
    let (low, high) = (b.constant(HostTensor::scalar(1e-3f32)), b.constant(HostTensor::scalar(1e4f32)));
    let sigma = b.op("Clip", &[&sigma, &low, &high]);
    let column = b.constant(HostTensor::vec(&[-1i64, 1, 1, 1]));
    let s = b.op("Reshape", &[&sigma, &column]);
    let s2 = b.op("Mul", &[&s, &s]);
    let ones = b.op("Div", &[&s, &s]);
    let hypot = |b: &mut Build, c: f64| {
        let sum = b.with_number("Add", &s2, c * c);
        b.op("Sqrt", &[&sum])
    };
    // a of the schedule; v in EDM's coordinates has unit variance too.
    let a = match d.schedule {
        "edm" if d.prediction != "v" => ones.clone(),
        "flow" => {
            let sum = b.with_number("Add", &s, 1.0);
            b.op("Reciprocal", &[&sum])
        }
        _ => {
            let root = hypot(&mut b, 1.0);
            b.op("Reciprocal", &[&root])
        }
    };
    let noise = b.op("Mul", &[&a, &s]);
    // x0 = skip x_net + out F
    let (c_in, skip, out) = match d.prediction {
        "edm-raw" => {
            let root = hypot(&mut b, d.sigma_data);
            let scaled = b.with_number("Mul", &s, d.sigma_data);
            (
                b.op("Reciprocal", &[&root]),
                Some(b.number_with("Div", d.sigma_data * d.sigma_data, &root)),
                b.op("Div", &[&scaled, &root]),
            )
        }
        "epsilon" => (a.clone(), Some(b.op("Reciprocal", &[&a])), b.op("Neg", &[&s])),
        "v" => (a.clone(), Some(a.clone()), b.op("Neg", &[&noise])),
        "flow" => (a.clone(), Some(ones.clone()), b.op("Neg", &[&noise])),
        _ => (a.clone(), None, ones.clone()),
    };
    let x = if d.nhwc {
        let x = b.op("Transpose", &["sample"]);
        b.graph.node.last_mut().unwrap().attribute.push(ints_attribute("perm", &[0, 3, 1, 2]));
        x
    } else {
        "sample".to_owned()
    };
    let core_x = b.op("Div", &[&x, &c_in]);
    let labels = if d.one_hot {
        let axis = b.constant(HostTensor::vec(&[1i64]));
        let sum = b.op("ReduceSum", &["class_onehot", &axis]);
        b.attribute("keepdims", 1);
        let none = b.number_with("Sub", 1.0, &sum);
        let all = b.op("Concat", &["class_onehot", &none]);
        b.attribute("axis", 1);
        let labels = b.op("ArgMax", &[&all]);
        b.attribute("axis", 1);
        b.attribute("keepdims", 0);
        labels
    } else {
        "labels".to_owned()
    };
    // The core's inputs are whatever was made for them.
    for (name, made) in [("core_x", &core_x), ("core_sigma", &sigma), ("core_labels", &labels)] {
        b.graph.node.push(node("Identity", &[made], name));
    }
    b.graph.node.extend(core.graph.node);
    let mut y = "core_denoised".to_owned();
    if let Some(skip) = &skip {
        let kept = b.op("Mul", &[skip, &x]);
        let rest = b.op("Sub", &[&y, &kept]);
        y = b.op("Div", &[&rest, &out]);
    }
    if d.nhwc {
        y = b.op("Transpose", &[&y]);
        b.graph.node.last_mut().unwrap().attribute.push(ints_attribute("perm", &[0, 2, 3, 1]));
    }
    b.graph.node.push(node("Identity", &[&y], "out"));
    let image: [Result<usize, &str>; 4] =
        if d.nhwc { [Err("batch"), Ok(8), Ok(8), Ok(1)] } else { [Err("batch"), Ok(1), Ok(8), Ok(8)] };
    let time = if d.integer { DType::I64 } else { DType::F32 };
    b.graph.input = vec![
        value_info("sample", DType::F32, &image),
        value_info("time", time, &[Err("batch")]),
        if d.one_hot {
            value_info("class_onehot", DType::F32, &[Err("batch"), Ok(core.rows - 1)])
        } else {
            value_info("labels", DType::I64, &[Err("batch")])
        },
    ];
    b.graph.output = vec![value_info("out", DType::F32, &image)];
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(17) }],
        graph: Some(b.graph),
        ..Default::default()
    }
}
