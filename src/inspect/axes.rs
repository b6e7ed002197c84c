//! Shape and layout of the sample, by what the graph declares and by the way to its first convolution.

use std::collections::{HashSet, VecDeque};
use std::path::Path;

use crate::graph::{Graph, Port, ValueId};
use crate::inspect::findings::{Findings, How};

/// Finds `shape`, `layout` and, for video, `modality` of the sample that `out` names.
pub fn read(graph: &Graph, model: &Path, out: &mut Findings) {
    let Some(port) = out.text(&["sample"]).and_then(|n| graph.inputs.iter().find(|p| p.name == n)) else {
        return out.undecided(&["shape"], "the sample input is not known");
    };
    let Some(dims) = out.dims_of(port).filter(|d| d.len() >= 2) else {
        return out.undecided(&["shape"], format!("`{}` declares no shape of a batch of samples", port.name));
    };
    if dims.len() == 4 {
        return images(graph, port, &dims, model, out);
    }
    other_layout(graph, port, &dims, out);
    if dims.len() == 5 && out.get(&["modality"]).is_none() {
        let names = port.shape.iter().flatten().filter_map(|d| d.as_ref().err().cloned());
        let frames = |name: &str| ["frame", "video"].iter().any(|w| name.to_lowercase().contains(w));
        if std::iter::once(port.name.clone()).chain(names).any(|name| frames(&name)) {
            out.value(&["modality"], "video", How::Read, format!("names of {}", port.describe()));
        }
    }
    declared(port, &dims[1..], out);
}

/// The shape as it is declared.
fn declared(port: &Port, row: &[Option<usize>], out: &mut Findings) {
    match row.iter().map(|d| d.map(|n| n as i64)).collect::<Option<Vec<i64>>>() {
        Some(shape) => out.value(&["shape"], shape, How::Read, format!("declared: {}", port.describe())),
        None => out.undecided(&["shape"], format!("free in the graph: {}", port.describe())),
    }
}

fn images(graph: &Graph, port: &Port, dims: &[Option<usize>], model: &Path, out: &mut Findings) {
    let channels = |d: Option<usize>| d.is_some_and(|n| n <= 32);
    let (first, last) = (dims[1], dims[3]);
    match first_layer(graph, port.value, 4, &[Layer::Convolution]).map(|(axis, _)| axis) {
        Some(3) => out.value(&["layout"], "nhwc", How::Read, "transposed to N, C, H, W before the first convolution"),
        Some(_) => out.value(&["layout"], "nchw", How::Read, "reaches the first convolution as it is"),
        None if channels(first) && (!channels(last) || dims[2] == last) => {
            out.value(&["layout"], "nchw", How::Read, format!("dimensions {}", port.describe()));
        }
        None if channels(last) && (!channels(first) || first == dims[2]) => {
            out.value(&["layout"], "nhwc", How::Read, format!("dimensions {}", port.describe()));
        }
        None => out.undecided(&["layout"], format!("no convolution, and {} fits both", port.describe())),
    }
    let Some(layout) = out.text(&["layout"]) else { return out.undecided(&["shape"], "the layout is undecided") };
    if !["nchw", "nhwc", "channels-first"].contains(&layout.as_str()) {
        return declared(port, &dims[1..], out);
    }
    let (c, mut h, mut w) = if layout == "nhwc" { (dims[3], dims[1], dims[2]) } else { (dims[1], dims[2], dims[3]) };
    let mut why = format!("declared: {}", port.describe());
    if let (None, Some(size)) = (h.and(w), sample_size(model)) {
        (h, w) = (h.or(Some(size[0])), w.or(Some(size[1])));
        why = "channels declared, sample_size of config.json beside the model".into();
    }
    match (c, h, w) {
        (Some(c), Some(h), Some(w)) => {
            out.value(&["shape"], vec![c as i64, h as i64, w as i64], How::Read, why);
        }
        _ => out.undecided(&["shape"], format!("free in the graph: {}", port.describe())),
    }
}

/// The layout of what is no image. It plays no part in training: where the graph does not say it, what is usual will do.
fn other_layout(graph: &Graph, port: &Port, dims: &[Option<usize>], out: &mut Findings) {
    let rank = dims.len();
    if rank == 2 || rank > 5 {
        return;
    }
    let name = |axis: usize| match axis {
        1 => Some("channels-first"),
        2 if rank == 5 => Some("frames-first"),
        axis if axis + 1 == rank => Some("channels-last"),
        _ => None,
    };
    if let Some((axis, what)) = first_layer(graph, port.value, rank, &[Layer::Convolution, Layer::Product])
        && let Some(layout) = name(axis)
    {
        let why = match (axis, what) {
            (1, Layer::Convolution) => "reaches the first convolution as it is".to_owned(),
            (_, Layer::Convolution) => format!("dimension {axis} is the channels of the first convolution"),
            // Tokens [B, T, C] and their like: a matrix is applied to each.
            (_, Layer::Product) => format!("dimension {axis} is what the first matrix of weights is applied to"),
        };
        return out.value(&["layout"], layout, How::Read, why);
    }
    let size = |axis: usize| dims[axis].unwrap_or(usize::MAX);
    let axis = match rank {
        3 if size(1) < size(2) => 1,
        3 => 2,
        _ if size(2) < size(1) && size(2) <= 4 => 2,
        _ if size(4) < size(1) && size(4) <= 4 => 4,
        _ => 1,
    };
    let why = format!("no convolution; dimensions {}", port.describe());
    out.value(&["layout"], name(axis).unwrap_or("channels-first"), How::Assumed, why);
}

/// What shows which dimension the channels are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layer {
    Convolution,
    /// A product with a matrix of weights from the right.
    Product,
}

/// Which dimension of a sample of `rank` dimensions (the batch is one) is the channels of the first layer of these kinds, and its
/// kind; `None` where none is met.
fn first_layer(graph: &Graph, from: ValueId, rank: usize, kinds: &[Layer]) -> Option<(usize, Layer)> {
    let weights = |v: Option<ValueId>| {
        v.and_then(|v| graph.constants.get(&v)).is_some_and(|constant| constant.tensor.rank() == 2)
    };
    let consumers = graph.consumers();
    // With each value, which of the sample's dimensions its own are.
    let mut queue = VecDeque::from([(from, (0..rank).collect::<Vec<usize>>())]);
    let mut seen = HashSet::from([from]);
    while let Some((value, order)) = queue.pop_front() {
        for &(index, slot) in consumers.get(&value).into_iter().flatten() {
            let Some(node) = graph.nodes.get(index) else { continue };
            let order = match node.op.as_str() {
                "Conv" | "ConvTranspose" if slot == 0 => return Some((order[1], Layer::Convolution)),
                "MatMul" if slot == 0 && kinds.contains(&Layer::Product) && weights(node.input(1)) => {
                    return Some((order[rank - 1], Layer::Product));
                }
                "Transpose" => match node.attributes.ints("perm").ok().flatten() {
                    Some(perm) if perm.len() == rank => {
                        let turned: Option<Vec<usize>> =
                            perm.iter().map(|p| order.get(usize::try_from(*p).ok()?).copied()).collect();
                        let Some(turned) = turned else { continue };
                        turned
                    }
                    _ => continue,
                },
                // Beyond these the dimensions mean something else.
                "Reshape" | "Shape" | "Flatten" | "MatMul" | "Gemm" | "Unsqueeze" | "Squeeze" => continue,
                _ => order.clone(),
            };
            for v in node.outputs.iter().flatten() {
                if seen.insert(*v) && seen.len() < 200 {
                    queue.push_back((*v, order.clone()));
                }
            }
        }
    }
    None
}

/// diffusers' `sample_size` in the `config.json` beside the model: H and W.
pub(super) fn sample_size(model: &Path) -> Option<[usize; 2]> {
    let text = crate::files::read_text(&model.parent()?.join("config.json"), crate::files::SETTINGS).ok()?;
    let json: serde_json::Value = serde_json::from_str(&text).ok()?;
    let size = json.get("sample_size")?;
    let one = |v: &serde_json::Value| v.as_u64().map(|n| n as usize).filter(|n| (1..=65536).contains(n));
    match size.as_array().map(Vec::as_slice) {
        Some([h, w]) => Some([one(h)?, one(w)?]),
        _ => one(size).map(|n| [n, n]),
    }
}
