//! What names, types, shapes and the graph say about a card, before a number is computed.

use std::collections::HashSet;
use std::path::Path;

use crate::graph::{Graph, Port, ValueId, op_schema};
use crate::inspect::findings::{Findings, How, Known};

const TIME_NAMES: [&str; 9] =
    ["timestep", "timesteps", "time", "t", "sigma", "sigmas", "noise_labels", "noise_level", "c_noise"];
const LABEL_NAMES: [&str; 5] = ["label", "class", "y", "onehot", "one_hot"];
const EMBEDDING_NAMES: [&str; 6] = ["hidden_states", "embed", "text", "pooled", "context", "prompt"];
const SAMPLE_NAMES: [&str; 7] = ["sample", "x", "noisy", "latent", "x_t", "xt", "image"];

/// Finds values of the card that names, types, shapes and the graph tell. `known` is what the card's own sources say;
/// it is never replaced.
pub fn read(graph: &Graph, known: &Known, model: &Path) -> Findings {
    let mut out = Findings::default();
    let mut given: Vec<(&Vec<String>, &toml::Value, String)> =
        known.iter().map(|(path, (value, origin))| (path, value, origin.to_string())).collect();
    given.sort_by_key(|(path, ..)| (path.len(), order(path)));
    for (path, value, origin) in given {
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        out.value(&path, value.clone(), How::Given, origin);
    }
    let rank = |p: &Port| p.shape.as_ref().map(Vec::len);
    let float = |p: &Port| p.dtype.is_none_or(|d| d.is_float());
    let take = |out: &mut Findings, key: &str, found: Result<(&Port, String), String>| {
        if !out.given(&[key]) {
            match found {
                Ok((p, why)) => out.value(&[key], p.name.clone(), How::Read, why),
                Err(why) => out.undecided(&[key], why),
            }
        }
    };
    let images: Vec<&Port> = graph.inputs.iter().filter(|p| rank(p) == Some(4) && float(p)).collect();
    take(&mut out, "sample", pick(&images, &SAMPLE_NAMES, "float input of rank 4"));
    let conditions: Vec<&str> = known.keys().filter(|k| k[0] == "conditions" && k.len() > 1).map(|k| &*k[1]).collect();
    let scalars: Vec<&Port> = graph
        .inputs
        .iter()
        .filter(|p| !conditions.contains(&p.name.as_str()) && one_number_a_row(p) && !is_named(p, &LABEL_NAMES))
        .collect();
    // A table lookup by an input with a label's dtype is what labels do; times seldom.
    let floats: Vec<&Port> = scalars.iter().copied().filter(|p| float(p)).collect();
    let time = match (pick(&scalars, &TIME_NAMES, "input of one number a sample"), floats.as_slice()) {
        (Err(_), [only]) => Ok((*only, format!("the only float input of one number a sample ({})", only.describe()))),
        (found, _) => found,
    };
    take(&mut out, "time", time);
    let outputs: Vec<&Port> =
        graph.outputs.iter().filter(|p| rank(p).is_none_or(|r| r == 4 || r == 0) && float(p)).collect();
    take(&mut out, "output", pick(&outputs, &["denoised", "out_sample", "sample", "output"], "float output of rank 4"));
    shape(graph, model, &mut out);
    let taken: Vec<String> = ["sample", "time"].iter().filter_map(|k| out.text(&[k])).collect();
    for p in graph.inputs.iter().filter(|p| !taken.contains(&p.name)) {
        if known.keys().any(|k| k.len() > 1 && (k[0] == "conditions" || k[0] == "constants") && k[1] == p.name) {
            continue;
        }
        condition(graph, p, &mut out);
    }
    out
}

/// Keys of a card in the order in which a person reads them.
fn order(path: &[String]) -> usize {
    const KEYS: [&str; 8] = ["sample", "time", "output", "prediction", "time_unit", "shape", "layout", "range"];
    KEYS.iter().position(|k| *k == path[0]).unwrap_or(KEYS.len())
}

/// The one candidate, or the one with a telling name.
fn pick<'a>(candidates: &[&'a Port], names: &[&str], what: &str) -> Result<(&'a Port, String), String> {
    match candidates {
        [] => Err(format!("the graph has no {what}")),
        [only] => Ok((*only, format!("the only {what} ({})", only.describe()))),
        several => {
            let exact: Vec<_> = several.iter().filter(|p| names.contains(&p.name.to_lowercase().as_str())).collect();
            let loose: Vec<_> = several.iter().filter(|p| is_named(p, names)).collect();
            match (exact.as_slice(), loose.as_slice()) {
                ([one], _) | ([], [one]) => Ok((**one, format!("its name, among {} of that kind", several.len()))),
                _ => {
                    let list: Vec<_> = several.iter().map(|p| format!("`{}`", p.name)).collect();
                    Err(format!("several could be it: {}", list.join(", ")))
                }
            }
        }
    }
}

/// Whether one of the words is the name, or a part of it (words of one letter must be the whole name).
fn is_named(p: &Port, words: &[&str]) -> bool {
    let name = p.name.to_lowercase();
    words.iter().any(|w| if w.len() < 3 { name == *w } else { name.contains(w) })
}

fn one_number_a_row(p: &Port) -> bool {
    p.shape.as_ref().is_some_and(|dims| dims.len() <= 1 || dims.iter().skip(1).all(|d| *d == Ok(1)))
}

fn shape(graph: &Graph, model: &Path, out: &mut Findings) {
    let Some(port) = out.text(&["sample"]).and_then(|n| graph.inputs.iter().find(|p| p.name == n)) else {
        return out.undecided(&["shape"], "the sample input is not known");
    };
    let Some(dims) = port.dims().filter(|d| d.len() == 4) else {
        return out.undecided(&["shape"], format!("`{}` declares no shape of rank 4", port.name));
    };
    let channels = |d: Option<usize>| d.is_some_and(|n| n <= 32);
    let (first, last) = (dims[1], dims[3]);
    match path_to_convolution(graph, port.value) {
        Some(true) => {
            out.value(&["layout"], "nhwc", How::Read, "transposed to N, C, H, W before the first convolution")
        }
        Some(false) => out.value(&["layout"], "nchw", How::Read, "reaches the first convolution as it is"),
        None if channels(first) && (!channels(last) || dims[2] == last) => {
            out.value(&["layout"], "nchw", How::Read, format!("dimensions {}", port.describe()));
        }
        None if channels(last) && (!channels(first) || first == dims[2]) => {
            out.value(&["layout"], "nhwc", How::Read, format!("dimensions {}", port.describe()));
        }
        None => out.undecided(&["layout"], format!("no convolution, and {} fits both", port.describe())),
    }
    let Some(layout) = out.text(&["layout"]) else { return out.undecided(&["shape"], "the layout is undecided") };
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

/// Whether a Transpose to NCHW lies between the sample and the first convolution; `None` where no convolution is met.
fn path_to_convolution(graph: &Graph, from: ValueId) -> Option<bool> {
    let consumers = graph.consumers();
    let mut queue = std::collections::VecDeque::from([(from, false)]);
    let mut seen = HashSet::from([from]);
    while let Some((value, moved)) = queue.pop_front() {
        for &(index, slot) in consumers.get(&value).into_iter().flatten() {
            let Some(node) = graph.nodes.get(index) else { continue };
            let moved = match node.op.as_str() {
                "Conv" if slot == 0 => return Some(moved),
                "Transpose" => match node.attributes.ints("perm").ok().flatten().as_deref() {
                    Some([0, 3, 1, 2]) => true,
                    Some([0, 2, 3, 1]) => false,
                    _ => continue,
                },
                // Beyond these the axes mean something else.
                "Reshape" | "Shape" | "Flatten" | "MatMul" | "Gemm" => continue,
                _ => moved,
            };
            for v in node.outputs.iter().flatten() {
                if seen.insert(*v) && seen.len() < 200 {
                    queue.push_back((*v, moved));
                }
            }
        }
    }
    None
}

/// diffusers' `sample_size` in the `config.json` beside the model: H and W.
fn sample_size(model: &Path) -> Option<[usize; 2]> {
    let text = std::fs::read_to_string(model.parent()?.join("config.json")).ok()?;
    let json: serde_json::Value = serde_json::from_str(&text).ok()?;
    let size = json.get("sample_size")?;
    let one = |v: &serde_json::Value| v.as_u64().map(|n| n as usize).filter(|n| (1..=65536).contains(n));
    match size.as_array().map(Vec::as_slice) {
        Some([h, w]) => Some([one(h)?, one(w)?]),
        _ => one(size).map(|n| [n, n]),
    }
}

fn condition(graph: &Graph, p: &Port, out: &mut Findings) {
    let Some(dims) = p.dims() else {
        return out.undecided(&["conditions", &p.name, "kind"], "the input declares no shape");
    };
    let path = |field: &'static str| -> [String; 3] { ["conditions".into(), p.name.clone(), field.into()] };
    let set = |out: &mut Findings, field: &'static str, value: Option<toml::Value>, how, why: String| {
        let path = path(field);
        out.set(&[&path[0], &path[1], &path[2]], value, how, why);
    };
    let is_float = p.dtype.is_none_or(|d| d.is_float());
    let rows = rows_looked_up(graph, p.value);
    if !is_float && one_number_a_row(p) {
        set(out, "kind", Some("class-index".into()), How::Read, format!("an integer a sample ({})", p.describe()));
        match rows {
            // Whether the last row is a null class is for the probe to say.
            Some((n, what)) => set(out, "classes", Some((n as i64).into()), How::Read, what),
            None => set(out, "classes", None, How::Undecided, "no table with a row a class was found".into()),
        }
        return;
    }
    if is_float && dims.len() <= 1 {
        return out.undecided(
            &["constants", &p.name],
            format!("{} is neither sample, time nor a class: a second number a sample", p.describe()),
        );
    }
    if is_float && dims.len() == 2 && dims[1].is_some() && is_named(p, &LABEL_NAMES) && !is_named(p, &EMBEDDING_NAMES) {
        set(out, "kind", Some("one-hot".into()), How::Read, format!("its name and shape ({})", p.describe()));
        set(out, "classes", dims[1].map(|n| (n as i64).into()), How::Read, "width of the input".into());
        return;
    }
    if is_float && dims.len() >= 2 && (dims.len() > 2 || is_named(p, &EMBEDDING_NAMES)) {
        set(out, "kind", Some("embedding".into()), How::Read, format!("its shape ({})", p.describe()));
        let row: Option<Vec<i64>> = dims[1..].iter().map(|d| d.map(|n| n as i64)).collect();
        let how = if row.is_some() { How::Read } else { How::Undecided };
        set(out, "shape", row.map(Into::into), how, format!("declared: {}", p.describe()));
        return;
    }
    set(out, "kind", None, How::Undecided, format!("{}: a one-hot class or an embedding", p.describe()));
}

/// Rows of the table that this integer value picks from, or the depth of its one-hot.
pub fn rows_looked_up(graph: &Graph, from: ValueId) -> Option<(usize, String)> {
    let consumers = graph.consumers();
    let mut queue = vec![from];
    let mut seen = HashSet::from([from]);
    while let Some(value) = queue.pop() {
        for &(index, slot) in consumers.get(&value).into_iter().flatten() {
            let Some(node) = graph.nodes.get(index) else { continue };
            let constant = |i: usize| node.input(i).and_then(|v| graph.constants.get(&v));
            if node.is("Gather") && slot == 1 {
                let axis = node.attributes.int_or("axis", 0).unwrap_or(0);
                if let Some(table) = constant(0).filter(|c| axis == 0 && c.tensor.rank() >= 2) {
                    let name = &graph.names[node.input(0)?];
                    return Some((table.tensor.shape()[0], format!("rows of the table `{name}`")));
                }
            }
            if node.is("OneHot") && slot == 0 {
                let depth = constant(1).and_then(|c| c.tensor.to_i64().first().copied());
                return depth.filter(|d| *d > 0).map(|d| (d as usize, format!("depth of {}", node.label())));
            }
            // An index may be clipped to the rows of the table.
            if slot == 0 && (op_schema::hands_on(node) || node.is("Clip")) {
                for v in node.outputs.iter().flatten() {
                    if seen.insert(*v) && seen.len() < 64 {
                        queue.push(*v);
                    }
                }
            }
        }
    }
    None
}
