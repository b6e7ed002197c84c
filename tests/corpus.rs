//! Exports of diffusers, transformers and EDM networks against the modules they come from: values, gradients of every
//! parameter, that all and only the weights are trained, and the way back into ONNX; with and without fusing.
//!
//! One test an export, and one more for the student of each that is a teacher. Exports are made as tests ask for them, by
//! one Python process, and kept in cargo's target folder until the scripts or the pinned wheels change. `DISBACK_CORPUS=full`
//! runs the whole matrix, a list of names with commas those; a name may be the path of a folder that another program wrote.

#[path = "support/exporter.rs"]
mod exporter;
#[path = "support/reference.rs"]
mod reference;
#[path = "support/students.rs"]
mod students;
mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use disback::Kind;
use disback::graph::{Model, save};
use disback::parity::{Tolerance, check as parity, compare};
use disback::tensor::{DType, HostTensor};
use disback::torch::{Forward, ImportOptions, Network};
use exporter::Exporter;
use libtest_mimic::{Arguments, Trial};
use tch::{Device, Tensor};

/// What every `cargo test` imports: each network by both exporters, and over them the opsets, weights and shapes.
const CASES: &[&str] = &[
    "unet2d-drawn-legacy17-dynamic",
    "unet2d-drawn-legacy18-spatial",
    "unet2d-drawn-dynamo23-static",
    "unet2d-fresh-dynamo18-dynamic",
    "ncsnpp-drawn-legacy19-dynamic",
    "ncsnpp-drawn-dynamo20-static",
    "ncsnpp-half-dynamo20-dynamic",
    "sd-drawn-legacy17-static",
    "sd-drawn-dynamo22-dynamic",
    "sd-fresh-raw20-static",
    "sd-half-dynamo20-dynamic",
    "sdxl-drawn-legacy17-dynamic",
    "sdxl-drawn-dynamo21-static",
    "dit-drawn-legacy17-dynamic",
    "dit-drawn-dynamo23-dynamic",
    "dit-converted-legacy17-dynamic",
    "sd3-drawn-legacy17-dynamic",
    "sd3-fresh-dynamo20-dynamic",
    "sd3-half-dynamo23-static",
    "flux-drawn-dynamo20-dynamic",
    "flux-fresh-raw21-dynamic",
    "flux-half-dynamo18-dynamic",
    "pixart-drawn-legacy17-static",
    "pixart-fresh-dynamo20-static",
    "vae_decoder-drawn-legacy17-dynamic",
    "vae_decoder-drawn-dynamo21-spatial",
    "vae_encoder-drawn-legacy18-static",
    "vae_encoder-drawn-raw20-spatial",
    "clip-drawn-legacy17-dynamic",
    "clip-half-dynamo20-dynamic",
    "edm-drawn-legacy17-dynamic",
    "edm-drawn-dynamo20-dynamic",
    "edm-fresh-raw18-static",
    "edm_ncsnpp-drawn-dynamo23-dynamic",
    "traps-drawn-legacy17-dynamic",
    "traps-fresh-dynamo23-dynamic",
    "u_vit-fresh-dynamo20-dynamic",
    "rope_dit-drawn-raw18-dynamic",
    "convnext-drawn-legacy17-dynamic",
    "standardised-drawn-raw20-dynamic",
    "consistency-fresh-dynamo20-dynamic",
    "edm2-drawn-raw18-dynamic",
    "windows-drawn-raw18-dynamic",
    "branches-drawn-dynamo20-dynamic",
    "hunyuan-drawn-legacy17-dynamic",
    "cog-drawn-dynamo20-dynamic",
    "kandinsky-drawn-legacy17-dynamic",
    "cascade-drawn-dynamo20-dynamic",
    "sana-drawn-dynamo20-dynamic",
    "sana-drawn-raw18-dynamic",
    "t5-drawn-legacy17-dynamic",
    "unet1d-drawn-dynamo20-dynamic",
    "prior-drawn-raw18-static",
    "unet2d-drawn-ort17-dynamic",
    "sd-drawn-ort17-dynamic",
    "sd3-drawn-ort17-dynamic",
    "dit-drawn-ort20-dynamic",
    "unet2d-drawn-fused17-dynamic",
    "sd-drawn-fused17-dynamic",
    "sd3-drawn-fused17-dynamic",
    "dit-drawn-fused18-dynamic",
    "pixart-drawn-fused17-dynamic",
    "unet2d-brain-legacy17-dynamic",
    "sd-brain-dynamo20-dynamic",
    "sd3-brain-dynamo23-dynamic",
    "dit-brain-dynamo20-dynamic",
];

/// Operators that `onnxruntime.transformers.optimizer` writes for GPUs: ONNX Runtime has no CPU kernels for them.
const FOR_GPUS: &[&str] = &["NhwcConv", "GroupNorm", "SkipGroupNorm", "BiasSplitGelu", "BiasAdd"];

/// Teachers in bf16, with operators for GPUs, and in f16 with weights beside the file: distilled from end to end.
const DISTILLED: &[&str] =
    &["unet2d-brain-legacy17-dynamic", "unet2d-drawn-fused17-dynamic", "ncsnpp-half-dynamo20-dynamic"];

/// Networks of other families, with what no exporter of this style writes: a fixed batch, a layer it does not know, or weights
/// that are gone because they were folded into others.
const OTHERS: &[(&str, &[&str])] = &[
    ("u_vit", &[]),
    ("rope_dit", &["legacy", "fresh-dynamo23"]),
    ("convnext", &[]),
    ("standardised", &["dynamo"]),
    ("consistency", &[]),
    ("edm2", &["dynamo", "legacy"]),
    ("windows", &["dynamo", "legacy"]),
    ("branches", &["legacy"]),
    ("sana", &["fresh"]),
    ("hunyuan", &["dynamo"]),
    ("aura", &[]),
    ("cog", &[]),
    ("wan", &["legacy"]),
    ("kandinsky", &[]),
    ("cascade", &[]),
    ("prior", &["dynamo", "raw"]),
    ("unet1d", &["legacy"]),
    ("tiny", &[]),
    ("t5", &["dynamo", "raw"]),
];
const OTHER_STYLES: &[&str] = &[
    "drawn-legacy17-dynamic",
    "drawn-dynamo20-dynamic",
    "fresh-dynamo23-dynamic",
    "drawn-raw18-dynamic",
    "half-dynamo20-dynamic",
];

/// Every network in every export style that the exporters can write.
fn full() -> Vec<String> {
    let names = CASES.iter().map(|c| c.split('-').next().expect("a name"));
    let networks: BTreeSet<_> = names.filter(|n| !OTHERS.iter().any(|o| o.0 == *n)).collect();
    let styles = [
        "drawn-legacy17-static",
        "drawn-legacy17-dynamic",
        "drawn-legacy18-static",
        "drawn-legacy19-dynamic",
        "drawn-legacy20-dynamic",
        "fresh-legacy17-static",
        "fresh-legacy20-dynamic",
        "half-legacy17-dynamic",
        "drawn-dynamo18-dynamic",
        "drawn-dynamo20-static",
        "drawn-dynamo20-dynamic",
        "drawn-dynamo21-dynamic",
        "drawn-dynamo22-static",
        "drawn-dynamo23-dynamic",
        "fresh-dynamo20-dynamic",
        "fresh-dynamo23-static",
        "half-dynamo20-dynamic",
        "drawn-raw18-dynamic",
        "drawn-raw20-static",
        "drawn-raw23-dynamic",
        "fresh-raw20-dynamic",
        "half-raw18-static",
        "drawn-ort17-dynamic",
        "drawn-fused17-dynamic",
        "brain-dynamo20-dynamic",
    ];
    let mut cases: Vec<String> = CASES.iter().map(|c| (*c).to_owned()).collect();
    for network in networks {
        for style in styles {
            // TorchScript knows no rms_norm; torch.export refuses a dynamic batch of SDXL and PixArt.
            let impossible = network == "flux" && ["legacy", "ort", "fused"].iter().any(|e| style.contains(e))
                // ONNX Runtime refuses its LayerNormalization of mixed types.
                || network == "clip" && style.contains("half-legacy")
                || ["sdxl", "pixart"].contains(&network) && ["dynamo", "raw"].iter().any(|e| style.contains(e)) && style.ends_with("dynamic")
                // Equal layers that are merged and called twice: nothing says which call is whose.
                || network == "traps" && style.contains("fresh-legacy")
                // A norm without weights, whose ones are merged with the fresh ones of a norm that has them.
                || network == "traps" && style.contains("fresh-dynamo20")
                // A token that is repeated for a fixed batch, and folded.
                || network == "traps" && style.contains("dynamo") && style.ends_with("static")
                // A file of mixed types.
                || network == "sdxl" && style.contains("half-raw")
                // Two norms of one value, equal while fresh, are one node of the file.
                || network == "ncsnpp" && style.contains("fresh-dynamo");
            let case = format!("{network}-{style}");
            if !impossible && !cases.contains(&case) {
                cases.push(case);
            }
        }
    }
    for (network, impossible) in OTHERS {
        for style in OTHER_STYLES.iter().filter(|s| !impossible.iter().any(|i| s.contains(i))) {
            let case = format!("{network}-{style}");
            if !cases.contains(&case) {
                cases.push(case);
            }
        }
    }
    cases
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn import(path: &Path, fuse: bool) -> Result<Network, String> {
    let options = ImportOptions { fuse, ..ImportOptions::default() };
    Network::import(Model::load(path).map_err(text)?, &options, Device::Cpu).map_err(text)
}

/// How the file holds its weights, and what its values and gradients may differ by from the module's in f32. Files in half
/// precision are compared with themselves too, computed in f64 (`said.npz`), to the bounds of the others: what is looser here is
/// what the exporter rounded.
#[derive(Clone, Copy)]
struct Precision {
    values: Tolerance,
    /// Relative L2 error of each gradient, and of all together.
    gradient: f64,
    together: f64,
}

impl Precision {
    fn of(case: &str) -> Self {
        if case.contains("-half-") {
            // Numbers of the code (scales of attention, epsilons) are rounded to f16 in the file, the module's are not.
            // Random Fourier features are of angles of a hundred radians.
            let gradient = if case.starts_with("edm_ncsnpp") { 1e-2 } else { 5e-3 };
            Self { values: Tolerance { atol: 1e-3, rtol: 2e-3 }, gradient, together: 2e-3 }
        } else if case.contains("-brain-") {
            // Eight times coarser.
            Self { values: Tolerance { atol: 8e-3, rtol: 1.6e-2 }, gradient: 4e-2, together: 1.6e-2 }
        } else if case.contains("-converted-") {
            // So are the frequencies of time: another function, of which only ONNX Runtime's values tell.
            Self { values: Tolerance { atol: f64::INFINITY, rtol: 0.0 }, gradient: f64::INFINITY, together: 0.2 }
        } else {
            Self { values: Tolerance::default(), gradient: 1e-4, together: 1e-4 }
        }
    }
}

type Named<T> = Vec<(String, T)>;

/// Inputs of a case in the element types that the network takes: numpy has no bf16.
fn inputs(net: &Network, folder: &Path, file: &str) -> (Named<HostTensor>, Named<Tensor>) {
    let mut arrays = reference::arrays(&folder.join(file));
    for (name, array) in &mut arrays {
        if net.inputs().iter().any(|p| p.name == *name && p.dtype == Some(DType::BF16)) {
            *array = array.cast(DType::BF16);
        }
    }
    let tensors = arrays.iter().map(|(n, a)| (n.clone(), disback::torch::convert::to_torch(a).unwrap())).collect();
    (arrays, tensors)
}

/// That ONNX Runtime computes the same, or says that it has no kernel where it has none.
fn in_onnx_runtime(net: &Network, inputs: &[(String, HostTensor)]) -> Result<(), String> {
    let nodes = &net.shared().model.proto.graph.as_ref().expect("imported").node;
    let for_gpus = nodes.iter().any(|n| n.domain() == "com.microsoft" && FOR_GPUS.contains(&n.op_type()));
    // It takes no mask that is the same for all rows.
    let masked = nodes.iter().any(|n| n.domain().is_empty() && n.op_type() == "Attention" && n.input.len() > 3);
    match (parity(net, inputs, None, Tolerance::default()), for_gpus) {
        (Err(e), _) if e.kind() == Kind::Unsupported && (for_gpus || masked) => Ok(()),
        (Ok(_), true) => Err("ONNX Runtime runs it after all".into()),
        (Err(e), _) => Err(text(e)),
        (Ok(result), false) if !result.ok => {
            Err(format!("ONNX Runtime differs: {}", serde_json::to_string(&result).unwrap()))
        }
        (Ok(_), false) => Ok(()),
    }
}

/// Values against ONNX Runtime and the module, at the exporter's shapes and at others.
///
/// Returns the largest difference from the module, in standard deviations of the output.
fn values(net: &Network, folder: &Path, precision: Precision) -> Result<f64, String> {
    let mut worst = 0f64;
    let sets = [("traced.npz", "traced_expected.npz"), ("inputs.npz", "expected.npz"), ("inputs.npz", "said.npz")];
    for (file, expected) in sets.into_iter().filter(|s| folder.join(s.1).exists()) {
        let said = expected == "said.npz";
        let (arrays, tensors) = inputs(net, folder, file);
        if !said {
            in_onnx_runtime(net, &arrays)?;
        }
        let ours = tch::no_grad(|| reference::forward(net, &tensors))?;
        for (name, theirs) in reference::arrays(&folder.join(expected)) {
            let ours = ours.iter().find(|(n, _)| *n == name).ok_or(format!("no output `{name}`"))?;
            let ours = disback::torch::convert::to_host(&ours.1).map_err(text)?;
            let tolerance = if said { Tolerance::default() } else { precision.values };
            let error = compare(&name, &ours, &theirs, tolerance).map_err(text)?;
            if !error.ok {
                let who = if said { "the file in f64" } else { "the module" };
                return Err(format!("{who} differs: {}", serde_json::to_string(&error).unwrap()));
            }
            if !said {
                worst = worst.max(error.max_rel);
            }
        }
    }
    Ok(worst)
}

/// Other weights into the file: the file written must compute what the network computes, in ONNX Runtime too.
fn write_back(net: &Network, folder: &Path, fuse: bool, exporter: &Exporter) -> Result<(), String> {
    let params = net.params().deep_copy(Device::Cpu).map_err(text)?;
    for (k, (t, p)) in params.tensors().iter().zip(&net.shared().parameters).enumerate() {
        let noise = disback::noise::image_noise(7, k as u64, t.numel());
        let noise = Tensor::from_slice(&noise).reshape(t.size());
        let mut moved = t + noise * t.std(false).clamp(0.05, 1.0) * 0.1;
        if p.dtype != DType::F32 {
            moved = moved.to_kind(disback::torch::convert::kind(p.dtype)).to_kind(tch::Kind::Float);
        }
        t.shallow_clone().copy_(&moved);
    }
    let proto = net.to_model(&params).map_err(text)?;
    let path = folder.join(if fuse { "written.onnx" } else { "written-plain.onnx" });
    save::write(&proto, &path).map_err(text)?;
    let moved = net.duplicate().map_err(text)?;
    moved.params().copy_from(&params).map_err(text)?;
    let back = import(&path, fuse)?;
    if back.params().elements() != params.elements() {
        return Err(format!("the written file trains {} elements", back.params().elements()));
    }
    let (arrays, inputs) = inputs(net, folder, "inputs.npz");
    let (ours, theirs) = tch::no_grad(|| -> Result<_, String> {
        Ok((reference::forward(&moved, &inputs)?, reference::forward(&back, &inputs)?))
    })?;
    for ((name, a), (_, b)) in ours.iter().zip(&theirs) {
        let error = (a - b).abs().max().double_value(&[]) / b.std(true).double_value(&[]);
        if !(error <= 1e-6) {
            return Err(format!("written back, `{name}` differs by {error:.1e} of its standard deviation"));
        }
    }
    in_onnx_runtime(&back, &arrays).map_err(|e| format!("written back, {e}"))?;
    // The tool that converts to f16 leaves nodes in no order, which the checker refuses from the start.
    if fuse && !folder.to_string_lossy().contains("-converted-") { exporter.check(&path) } else { Ok(()) }
}

fn case(name: &str, exporter: &Exporter) -> Result<(), String> {
    let folder = exporter.case(name)?;
    let precision = Precision::of(name);
    for fuse in [true, false] {
        let check = || -> Result<String, String> {
            let net = import(&folder.join("model.onnx"), fuse)?;
            let apart = values(&net, &folder, precision)?;
            net.params().set_requires_grad(true).map_err(text)?;
            let outputs = reference::forward(&net, &inputs(&net, &folder, "inputs.npz").1)?;
            let agreement = reference::gradients(&net, &outputs, &folder, precision.gradient)?;
            if agreement.together > precision.together {
                return Err(format!("the gradients differ by {:.1e} together", agreement.together));
            }
            // A file in half precision is held to what it says itself, as tightly as others to their modules.
            let said = match folder.join("said.npz").exists() {
                true => format!(", {:.1e} from the file's own", reference::file_gradients(&net, &folder, 1e-4)?),
                false => String::new(),
            };
            net.params().set_requires_grad(false).map_err(text)?;
            write_back(&net, &folder, fuse, exporter)?;
            Ok(format!(
                "values {apart:.1e}, gradients {:.1e} ({:.1e} together){said}, {:?}",
                agreement.worst,
                agreement.together,
                net.shared().fused.counts()
            ))
        };
        match check() {
            Ok(report) => println!("{name} fuse={fuse}: {report}"),
            Err(e) => {
                println!("{name} fuse={fuse}: {e}");
                return Err(format!("fuse={fuse}: {e}"));
            }
        }
    }
    Ok(())
}

fn main() {
    let arguments = Arguments::from_args();
    tch::set_num_threads(1);
    let exporter = Arc::new(Exporter::new());
    let cases = match std::env::var("DISBACK_CORPUS").as_deref() {
        Ok("full") => full(),
        Ok(names) if !names.is_empty() => names.split(',').map(str::to_owned).collect(),
        _ => CASES.iter().map(|c| (*c).to_owned()).collect(),
    };
    let trials = cases
        .into_iter()
        .flat_map(|name| {
            let (exporter, other) = (exporter.clone(), exporter.clone());
            let card = students::card(&name);
            let student = card.clone().map(|card| {
                let (title, name, exporter) = (format!("student-{name}"), name.clone(), exporter.clone());
                Trial::test(title, move || students::check(&name, &card, &exporter).map_err(Into::into))
            });
            let distilled = card.filter(|_| DISTILLED.contains(&name.as_str())).map(|card| {
                let (title, name) = (format!("distil-{name}"), name.clone());
                Trial::test(title, move || students::distil(&name, &card, &exporter).map_err(Into::into))
            });
            student
                .into_iter()
                .chain(distilled)
                .chain([Trial::test(name.clone(), move || case(&name, &other).map_err(Into::into))])
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit();
}
