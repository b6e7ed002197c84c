//! What rewriting makes of graphs that have the forms in question, against the graphs as they were, in ONNX Runtime and tract.

mod eight_bits;
mod simplified;

use super::*;
use crate::graph::edit;
use crate::onnx::{GraphProto, ModelProto};
use crate::passes::portable;
use crate::runtime::student::{SampleRequest, Student, decode};
use crate::runtime::testing::{initializer, model, node, value};
use crate::runtime::{EngineKind, EngineOptions};
use crate::tensor::{DType, HostTensor};

const METADATA: &[(&str, &str)] = &[("disback.student.method", "test"), ("disback.range", "[-100.0, 100.0]")];

fn weights(shape: &[usize], seed: u64) -> HostTensor {
    let len = shape.iter().product();
    HostTensor::new(shape, &crate::noise::image_noise(seed, 0, len)).unwrap()
}

/// The graph's samples in an engine.
fn sample(model: &ModelProto, engine: EngineKind) -> Vec<f32> {
    let bytes = prost::Message::encode_to_vec(model);
    let options = EngineOptions { engine, ..EngineOptions::default() };
    let request = SampleRequest { seed: 4, batch: 3, ..SampleRequest::default() };
    Student::from_bytes(&bytes, &options).unwrap().sample(&request, 0, 3).unwrap().to_f32()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

fn count(model: &ModelProto, op: &str) -> usize {
    model.graph.as_ref().unwrap().node.iter().filter(|n| n.op_type() == op).count()
}

/// Everything that the portable form does not have, on images of 2x6x6.
fn awkward(batch: &str) -> ModelProto {
    let ints = |name: &str, v: &[i64]| initializer(name, &HostTensor::vec(v));
    let with = |mut n: crate::onnx::NodeProto, attributes: Vec<crate::onnx::AttributeProto>| {
        n.attribute = attributes;
        n
    };
    let graph = GraphProto {
        node: vec![
            node("Slice", &["noise", "starts", "ends", "axes", "steps"], "turned"),
            with(node("SplitToSequence", &["turned", "one"], "pieces"), vec![edit::int_attribute("axis", 1)]),
            node("SequenceAt", &["pieces", "one"], "second"),
            node("SequenceAt", &["pieces", "minus_two"], "first"),
            with(node("Concat", &["second", "first"], "joined"), vec![edit::int_attribute("axis", 1)]),
            with(
                node("Conv", &["joined", "w"], "down"),
                vec![
                    edit::text_attribute("auto_pad", "SAME_LOWER"),
                    edit::ints_attribute("kernel_shape", &[4, 3]),
                    edit::ints_attribute("strides", &[2, 2]),
                ],
            ),
            node("Shape", &["noise"], "shape"),
            node("Gather", &["shape", "zero"], "rows"),
            with(node("Concat", &["rows", "rest"], "target"), vec![edit::int_attribute("axis", 0)]),
            node("Reshape", &["down", "target"], "small"),
            with(
                node("ConvTranspose", &["small", "v"], "up"),
                vec![
                    edit::text_attribute("auto_pad", "SAME_UPPER"),
                    edit::ints_attribute("kernel_shape", &[3, 3]),
                    edit::ints_attribute("strides", &[2, 2]),
                ],
            ),
            node("Identity", &["up"], "same"),
            node("Identity", &["same"], "sample"),
        ],
        initializer: vec![
            ints("starts", &[-1, 1]),
            ints("ends", &[i64::MIN, 100]),
            ints("axes", &[3, 2]),
            ints("steps", &[-1, 1]),
            initializer("one", &HostTensor::scalar(1i64)),
            initializer("minus_two", &HostTensor::scalar(-2i64)),
            ints("zero", &[0]),
            ints("rest", &[2, 3, 3]),
            initializer("w", &weights(&[2, 2, 4, 3], 1)),
            initializer("v", &weights(&[2, 2, 3, 3], 2)),
        ],
        input: vec![value("noise", DType::F32, &[batch, "2", "6", "6"])],
        output: vec![value("sample", DType::F32, &[batch, "2", "6", "6"])],
        ..GraphProto::default()
    };
    decode(&model(graph, METADATA)).unwrap()
}

#[test]
fn awkward_forms_become_plain_ones_of_the_same_values() {
    for batch in ["batch", "3"] {
        let before = awkward(batch);
        let expected = sample(&before, EngineKind::Ort);
        assert_eq!(portable::left_over(before.graph.as_ref().unwrap()).len(), 6);
        let (after, report) = ship(before, &ShipOptions::default()).unwrap();
        assert!(report.not_portable.is_empty(), "{:?}", report.not_portable);
        assert_eq!(report.portable.len(), 4, "{:?}", report.portable);
        for gone in ["Shape", "SplitToSequence", "SequenceAt", "Constant"] {
            assert_eq!(count(&after, gone), 0, "{gone} at batch {batch}");
        }
        let simplified = report.simplified.unwrap();
        assert_eq!(simplified.reshapes, usize::from(batch == "batch"), "{simplified:?}");
        for engine in [EngineKind::Ort, EngineKind::Tract] {
            let error = worst(&sample(&after, engine), &expected);
            assert!(error < 1e-5, "{engine:?} at batch {batch}: {error}");
        }
        let (kept, _) =
            ship(awkward(batch), &ShipOptions { optimise: false, portable: false, ..Default::default() }).unwrap();
        assert!(count(&kept, "SplitToSequence") == 1 && count(&kept, "Shape") == 1);
    }
}

#[test]
fn what_breaks_in_sixteen_bits_is_kept_with_what_led_there() {
    // 1 / ((0 x + 1.0004)^256 - 1): the root of the power is 1 in f16, and the quotient infinite, though no value comes near
    // 65504 and no node by itself is off by more than twice what it reads.
    let numbers = [("nothing", 0f32), ("shift", 1.0004), ("unit", 1.0), ("scale", 0.1)];
    let mut nodes = vec![node("Mul", &["noise", "nothing"], "zeros"), node("Add", &["zeros", "shift"], "nearly")];
    let powers: Vec<String> = (1..=8).map(|k| format!("power{k}")).collect();
    let mut before = "nearly";
    for p in &powers {
        nodes.push(node("Mul", &[before, before], p));
        before = p;
    }
    nodes.extend([
        node("Sub", &[before, "unit"], "little"),
        node("Div", &["unit", "little"], "large"),
        node("Mul", &["large", "scale"], "about_one"),
        node("Mul", &["about_one", "noise"], "result"),
        node("Identity", &["result"], "sample"),
    ]);
    let graph = GraphProto {
        node: nodes,
        initializer: numbers.iter().map(|(n, v)| initializer(n, &HostTensor::scalar(*v))).collect(),
        input: vec![value("noise", DType::F32, &["batch", "1", "4", "4"])],
        output: vec![value("sample", DType::F32, &["batch", "1", "4", "4"])],
        ..GraphProto::default()
    };
    let before = decode(&model(graph, METADATA)).unwrap();
    let expected = sample(&before, EngineKind::Ort);
    let options = ShipOptions { precision: Precision::Fp16, ..ShipOptions::default() };
    let (after, report) = ship(before.clone(), &options).unwrap();
    let half = report.half.unwrap();
    let kept: Vec<&str> =
        half.kept.iter().filter(|k| k.reason.contains("not finite")).map(|k| k.node.as_str()).collect();
    assert!(kept.contains(&"Div node `Div-large`") && kept.contains(&"Add node `Add-nearly`"), "{:?}", half.kept);
    assert!(half.nodes >= 1 && worst(&sample(&after, EngineKind::Ort), &expected) < 2e-2, "{half:?}");
    // Told beforehand, nothing has to be found out.
    let told: Vec<String> = ["*-nearly", "*-power?", "*-little", "*-large"].map(Into::into).into();
    let (_, report) = ship(before, &ShipOptions { keep_f32: told, ..options }).unwrap();
    let half = report.half.unwrap();
    assert_eq!(half.kept.iter().filter(|k| k.reason == "asked for").count(), 11);
    assert!(half.kept.iter().all(|k| !k.reason.contains("not finite")), "{half:?}");
}

#[test]
fn what_loses_precision_in_sixteen_bits_is_kept_with_what_led_there() {
    // A time embedding whose batch is not known: sin(1001.7 f + 0 x), and beside it a difference of nearly equal values.
    // f16 has every half around 1000: the sine would be off by a third.
    let frequencies: Vec<f32> = (0..16).map(|k| (1e-4f32).powf(k as f32 / 15.0)).collect();
    let tensors = [
        ("nothing", HostTensor::scalar(0f32)),
        ("time", HostTensor::scalar(1001.7f32)),
        ("frequencies", HostTensor::new(&[1, 1, 4, 4], &frequencies).unwrap()),
        ("offset", HostTensor::scalar(3000f32)),
    ];
    let graph = GraphProto {
        node: vec![
            node("Mul", &["noise", "nothing"], "zeros"),
            node("Add", &["zeros", "time"], "times"),
            node("Mul", &["times", "frequencies"], "angles"),
            node("Sin", &["angles"], "features"),
            node("Mul", &["noise", "features"], "product"),
            node("Add", &["product", "offset"], "lifted"),
            node("Sub", &["lifted", "offset"], "back"),
            node("Mul", &["back", "noise"], "plain"),
            node("Add", &["back", "plain"], "result"),
            node("Identity", &["result"], "sample"),
        ],
        initializer: tensors.iter().map(|(n, t)| initializer(n, t)).collect(),
        input: vec![value("noise", DType::F32, &["batch", "1", "4", "4"])],
        output: vec![value("sample", DType::F32, &["batch", "1", "4", "4"])],
        ..GraphProto::default()
    };
    let before = decode(&model(graph, METADATA)).unwrap();
    let expected = sample(&before, EngineKind::Ort);
    for (precision, bound) in [(Precision::Fp16, 1e-2), (Precision::Bf16, 1e-1)] {
        // Constants would be folded into one.
        let options = ShipOptions { precision, optimise: false, ..ShipOptions::default() };
        let (after, report) = ship(before.clone(), &options).unwrap();
        let half = report.half.unwrap();
        let lossy = |name: &str| {
            half.kept.iter().any(|k| k.node.contains(name) && k.reason.contains("where what it reads is in"))
        };
        assert!(["-times", "-angles", "-lifted", "-back"].iter().all(|n| lossy(n)), "{half:?}");
        assert!(half.nodes >= 2 && !lossy("-plain") && !lossy("-product"), "{half:?}");
        assert!(half.max_abs < bound, "{half:?}");
        assert!(report.warnings.is_empty(), "{:?}", report.warnings);
        if precision == Precision::Fp16 {
            for engine in [EngineKind::Ort, EngineKind::Tract] {
                let error = worst(&sample(&after, engine), &expected);
                assert!(f64::from(error) < bound, "{engine:?}: {error}");
            }
        }
    }
}

#[test]
fn weights_that_eight_bits_do_not_hold_stay() {
    let w = weights(&[32, 36], 3).to_f32();
    let graph = GraphProto {
        node: vec![
            node("Flatten", &["noise"], "flat"),
            node("MatMul", &["flat", "good"], "a"),
            node("MatMul", &["a", "other"], "b"),
            node("Reshape", &["b", "target"], "sample"),
        ],
        initializer: vec![
            initializer("good", &weights(&[36, 32], 5)),
            initializer("other", &HostTensor::new(&[32, 36], &w).unwrap()),
            initializer("target", &HostTensor::vec(&[-1i64, 1, 6, 6])),
        ],
        input: vec![value("noise", DType::F32, &["batch", "1", "6", "6"])],
        output: vec![value("sample", DType::F32, &["batch", "1", "6", "6"])],
        ..GraphProto::default()
    };
    let before = decode(&model(graph, METADATA)).unwrap();
    let options = ShipOptions { precision: Precision::Int8, int8_limit: 1e6, ..ShipOptions::default() };
    let (after, report) = ship(before.clone(), &options).unwrap();
    let all = report.int8.unwrap();
    assert_eq!((all.tensors, count(&after, "DequantizeLinear")), (2, 2), "{all:?}");
    // A limit between what one and what both cost: the worse of the two stays, and is named.
    let options = ShipOptions { int8_limit: all.max_abs * 0.999, ..options };
    let (after, report) = ship(before, &options).unwrap();
    let q = report.int8.unwrap();
    assert!(q.tensors == 1 && q.max_abs < all.max_abs && count(&after, "DequantizeLinear") == 1, "{q:?} {all:?}");
    assert!(q.kept.iter().any(|(_, why)| why.contains("would be off by more than")), "{q:?}");
}

/// Norms, GELUs and attention as exporters write them, on images of 8x4x4, without a native operator.
fn chains(opset: i64) -> ModelProto {
    let ints = |name: &str, v: &[i64]| initializer(name, &HostTensor::vec(v));
    let with = |mut n: crate::onnx::NodeProto, attributes: Vec<crate::onnx::AttributeProto>| {
        n.attribute = attributes;
        n
    };
    let mean = |x: &str, y: &str| {
        let mut n = node("ReduceMean", &[x], y);
        match opset {
            18.. => n.input.push("last".into()),
            _ => n.attribute.push(edit::ints_attribute("axes", &[-1])),
        }
        n
    };
    let graph = GraphProto {
        node: vec![
            // GroupNorm of two groups, as PyTorch's exporters have it.
            node("Reshape", &["noise", "two"], "grouped"),
            with(
                node("InstanceNormalization", &["grouped", "ones", "zeros"], "normal"),
                vec![edit::float_attribute("epsilon", 1e-3)],
            ),
            node("Reshape", &["normal", "image"], "joined"),
            node("Mul", &["joined", "gn_scale"], "gn_scaled"),
            node("Add", &["gn_scaled", "gn_bias"], "gn"),
            node("Reshape", &["gn", "rows"], "x"),
            // LayerNorm with scale and bias.
            mean("x", "mean"),
            node("Sub", &["x", "mean"], "centred"),
            node("Mul", &["centred", "centred"], "squares"),
            mean("squares", "variance"),
            node("Add", &["variance", "epsilon"], "shifted"),
            node("Sqrt", &["shifted"], "deviation"),
            node("Div", &["centred", "deviation"], "ln_plain"),
            node("Mul", &["ln_plain", "ln_scale"], "ln_scaled"),
            node("Add", &["ln_scaled", "ln_bias"], "ln"),
            // The exact GELU, then the one by tanh.
            node("Div", &["ln", "root_two"], "g0"),
            node("Erf", &["g0"], "g1"),
            node("Add", &["g1", "one"], "g2"),
            node("Mul", &["ln", "g2"], "g3"),
            node("Mul", &["g3", "half"], "gelu"),
            node("Pow", &["gelu", "three"], "t0"),
            node("Mul", &["t0", "cubic"], "t1"),
            node("Add", &["gelu", "t1"], "t2"),
            node("Mul", &["t2", "root"], "t3"),
            node("Tanh", &["t3"], "t4"),
            node("Add", &["t4", "one"], "t5"),
            node("Mul", &["gelu", "t5"], "t6"),
            node("Mul", &["t6", "half"], "tanh_gelu"),
            // RMSNorm whose scale differs from row to row: it stays behind the norm.
            node("Mul", &["tanh_gelu", "tanh_gelu"], "r0"),
            mean("r0", "r1"),
            node("Add", &["r1", "epsilon"], "r2"),
            node("Sqrt", &["r2"], "r3"),
            node("Div", &["tanh_gelu", "r3"], "r4"),
            node("Mul", &["r4", "rms_scale"], "rms"),
            // Attention of one head with a mask, keys turned for the product, the scale on both.
            node("Mul", &["rms", "quarter"], "q"),
            with(node("Transpose", &["x"], "turned"), vec![edit::ints_attribute("perm", &[0, 2, 1])]),
            node("Mul", &["turned", "half"], "k"),
            node("MatMul", &["q", "k"], "scores"),
            node("Add", &["scores", "mask"], "masked"),
            with(node("Softmax", &["masked"], "weights"), vec![edit::int_attribute("axis", -1)]),
            node("MatMul", &["weights", "x"], "attended"),
            node("Reshape", &["attended", "image"], "sample"),
        ],
        initializer: vec![
            ints("two", &[0, 2, -1]),
            ints("image", &[-1, 8, 4, 4]),
            ints("rows", &[-1, 8, 16]),
            ints("last", &[-1]),
            initializer("ones", &HostTensor::vec(&[1f32; 2])),
            initializer("zeros", &HostTensor::vec(&[0f32; 2])),
            initializer("gn_scale", &weights(&[8, 1, 1], 1)),
            initializer("gn_bias", &weights(&[1, 8, 1, 1], 2)),
            initializer("ln_scale", &weights(&[16], 3)),
            initializer("ln_bias", &weights(&[1, 1, 16], 4)),
            initializer("rms_scale", &weights(&[8, 1], 5)),
            initializer("mask", &weights(&[8, 8], 6)),
            initializer("epsilon", &HostTensor::scalar(1e-6f32)),
            initializer("root_two", &HostTensor::scalar(std::f32::consts::SQRT_2)),
            initializer("one", &HostTensor::scalar(1f32)),
            initializer("half", &HostTensor::scalar(0.5f32)),
            initializer("quarter", &HostTensor::scalar(0.25f32)),
            initializer("three", &HostTensor::scalar(3f32)),
            initializer("cubic", &HostTensor::scalar(0.044715f32)),
            initializer("root", &HostTensor::scalar(std::f32::consts::FRAC_2_PI.sqrt())),
        ],
        input: vec![value("noise", DType::F32, &["batch", "8", "4", "4"])],
        output: vec![value("sample", DType::F32, &["batch", "8", "4", "4"])],
        ..GraphProto::default()
    };
    let mut made = decode(&model(graph, METADATA)).unwrap();
    made.opset_import[0].version = Some(opset);
    made.ir_version = Some(10);
    made
}

#[test]
fn chains_are_written_as_the_operators_that_they_are() {
    use crate::passes::fuse::{self, Fuse};
    let operators = |opset: i64, fuse: Fuse| {
        let before = chains(opset);
        let expected = sample(&before, EngineKind::Ort);
        let (after, report) = ship(before, &ShipOptions { fuse, ..ShipOptions::default() }).unwrap();
        for engine in [EngineKind::Ort, EngineKind::Tract] {
            let error = worst(&sample(&after, engine), &expected);
            assert!(error < 1e-5, "{engine:?}, opset {opset}, {fuse:?}: {error}");
        }
        let written = report.fused.unwrap_or_default();
        // (The chain that is written for Gelu by tanh is no operator.)
        for (operator, n) in written.operators.iter().filter(|(o, _)| !o.contains("chain")) {
            assert_eq!(count(&after, operator), *n, "{operator} at opset {opset}");
        }
        (written, after)
    };
    let names = |w: &fuse::Written| w.operators.iter().map(|(o, n)| format!("{o} {n}")).collect::<Vec<_>>();
    let (all, after) = operators(23, Fuse::All);
    let every = ["Attention 1", "Gelu 2", "GroupNormalization 1", "LayerNormalization 1", "RMSNormalization 1"];
    assert_eq!(names(&all), every, "{all:?}");
    assert!(all.kept.is_empty(), "{all:?}");
    for gone in ["InstanceNormalization", "Softmax", "Erf", "Tanh", "ReduceMean", "MatMul"] {
        assert_eq!(count(&after, gone), 0, "{gone}");
    }
    let (auto, _) = operators(23, Fuse::Auto);
    assert_eq!(names(&auto), ["Gelu 1", "Gelu by tanh (chain) 1", "LayerNormalization 1"], "{auto:?}");
    let left: Vec<&str> = auto.kept.iter().map(|c| c.operator.as_str()).collect();
    assert_eq!(left.len(), 3, "{auto:?}");
    let (old, _) = operators(17, Fuse::All);
    assert_eq!(names(&old), ["Gelu by tanh (chain) 1", "LayerNormalization 1"], "{old:?}");
    assert!(old.kept.iter().any(|c| c.reason == "Attention exists since opset 23, this is 17"), "{old:?}");
    let (none, after) = operators(23, Fuse::None);
    assert!(none.operators.is_empty() && count(&after, "Erf") == 1 && count(&after, "Softmax") == 1);
}

/// Two products with a bias and a convolution, images of 8x6x6.
fn products() -> ModelProto {
    let mut conv = node("Conv", &["noise", "kernel", "conv_bias"], "conv");
    conv.attribute.push(edit::ints_attribute("pads", &[1, 1, 1, 1]));
    let mut gemm = node("Gemm", &["flat", "turned", "gemm_bias"], "gemm");
    gemm.attribute.push(edit::int_attribute("transB", 1));
    let graph = GraphProto {
        node: vec![
            conv,
            node("Relu", &["conv"], "relu"),
            node("Flatten", &["relu"], "flat"),
            gemm,
            node("MatMul", &["gemm", "square"], "product"),
            node("Reshape", &["product", "target"], "sample"),
        ],
        initializer: vec![
            initializer("kernel", &weights(&[16, 8, 3, 3], 1)),
            initializer("conv_bias", &weights(&[16], 2)),
            initializer("turned", &weights(&[48, 576], 3)),
            initializer("gemm_bias", &weights(&[48], 4)),
            initializer("square", &weights(&[48, 288], 5)),
            initializer("target", &HostTensor::vec(&[-1i64, 8, 6, 6])),
        ],
        input: vec![value("noise", DType::F32, &["batch", "8", "6", "6"])],
        output: vec![value("sample", DType::F32, &["batch", "8", "6", "6"])],
        ..GraphProto::default()
    };
    decode(&model(graph, &[METADATA[0], ("disback.range", "[-10000.0, 10000.0]")])).unwrap()
}

#[test]
fn products_and_convolutions_are_computed_in_eight_bits() {
    let before = products();
    let expected = sample(&before, EngineKind::Ort);
    let size = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let options = ShipOptions { precision: Precision::Int8Dynamic, int8_limit: 1e9, ..ShipOptions::default() };
    let (after, report) = ship(before.clone(), &options).unwrap();
    let all = report.int8.unwrap();
    assert_eq!((count(&after, "ConvInteger"), count(&after, "MatMulInteger"), all.tensors), (1, 2, 3), "{all:?}");
    assert_eq!(count(&after, "Conv") + count(&after, "Gemm") + count(&after, "MatMul"), 0);
    assert_eq!(crate::runtime::student::metadata(&after)["student.precision"], "int8-dynamic");
    assert!(report.warnings.iter().any(|w| w.contains("one scale for a whole batch")), "{:?}", report.warnings);
    let (ort, tract) = (sample(&after, EngineKind::Ort), sample(&after, EngineKind::Tract));
    // Three roundings to 8 bits in a row: a few per cent; the engines round alike.
    let error = worst(&ort, &expected) / size;
    assert!(error > 1e-5 && error < 0.1, "{error}");
    assert!(worst(&ort, &tract) < 1e-3 * size, "{}", worst(&ort, &tract));
    // A tighter limit keeps the worst node in f32 and says so; none at all is an error.
    let tighter = ShipOptions { int8_limit: all.max_abs * 0.9, ..options.clone() };
    let (after, report) = ship(before.clone(), &tighter).unwrap();
    let some = report.int8.unwrap();
    assert!(some.tensors < 3 && some.max_abs < all.max_abs, "{some:?}");
    assert_eq!(count(&after, "ConvInteger") + count(&after, "MatMulInteger"), some.tensors);
    assert!(
        some.kept.iter().any(|(node, why)| node.contains("node `") && why.contains("in 8 bits its result moves by"))
    );
    let e = ship(before.clone(), &ShipOptions { int8_limit: 1e-9, ..options.clone() }).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("8 bits move a value of the sample by"), "{e}");
    // The limit that the hint names is enough.
    let named = e.hint_text().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    assert!(ship(before, &ShipOptions { int8_limit: named, ..options }).unwrap().1.int8.unwrap().tensors > 0);
}

/// Attention over sequences first, in 16 bits: ONNX Runtime's optimiser ends the process on Transpose, Cast and MatMul.
#[test]
fn a_turned_product_in_16_bits_opens_in_onnx_runtime() {
    let turn = |from: &str, to: &str, perm: &[i64]| {
        let mut n = node("Transpose", &[from], to);
        n.attribute = vec![edit::ints_attribute("perm", perm)];
        n
    };
    let graph = |perm: &[i64], back: &[i64]| GraphProto {
        node: vec![
            node("Mul", &["noise", "half"], "x"),
            turn("x", "turned", perm),
            node("MatMul", &["turned", "w"], "product"),
            turn("product", "back", back),
            node("Identity", &["back"], "sample"),
        ],
        initializer: vec![initializer("half", &HostTensor::scalar(0.5f32)), initializer("w", &weights(&[6, 6], 1))],
        input: vec![value("noise", DType::F32, &["batch", "2", "6", "6"])],
        output: vec![value("sample", DType::F32, &["batch", "2", "6", "6"])],
        ..GraphProto::default()
    };
    // Batches to the middle; not the first dimension alone; the last two exchanged.
    for (perm, back, parted) in
        [([1, 2, 0, 3], [2, 0, 1, 3], 1), ([0, 2, 1, 3], [0, 2, 1, 3], 0), ([0, 1, 3, 2], [0, 1, 3, 2], 0)]
    {
        let plain = decode(&model(graph(&perm, &back), METADATA)).unwrap();
        for optimise in [true, false] {
            let options = ShipOptions { precision: Precision::Fp16, optimise, ..ShipOptions::default() };
            let (shipped, report) = ship(plain.clone(), &options).unwrap();
            let reshapes =
                shipped.graph.as_ref().unwrap().node.iter().filter(|n| n.output[0].ends_with("/same")).count();
            assert_eq!(reshapes, parted, "{perm:?}: {report:?}");
            assert!(!crate::runtime::cast_transpose::is_in(shipped.graph.as_ref().unwrap()));
            for engine in [EngineKind::Ort, EngineKind::Tract] {
                let apart = worst(&sample(&plain, engine), &sample(&shipped, engine));
                assert!(apart < 2e-2, "{perm:?} in {engine:?}: {apart}");
            }
            // A file as others write it: what was put in is taken out again.
            let mut bare = shipped.clone();
            let g = bare.graph.as_mut().unwrap();
            let same = g.node.iter().filter(|n| n.output[0].ends_with("/same"));
            let map = same.map(|n| (n.output[0].clone(), n.input[0].clone())).collect();
            g.node.retain(|n| !n.output[0].ends_with("/same"));
            edit::redirect(g, &map);
            let apart = worst(&sample(&shipped, EngineKind::Ort), &sample(&bare, EngineKind::Ort));
            assert!(apart < 2e-2, "{perm:?}: {apart}");
        }
    }
}
