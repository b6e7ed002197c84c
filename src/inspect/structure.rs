//! What names, types, shapes and the graph say about a card, before a number is computed.

use std::collections::HashSet;
use std::path::Path;

use crate::diffusion::InputSpec;
use crate::diffusion::card::joined;
use crate::graph::{Graph, Port, ValueId, op_schema};
use crate::inspect::axes;
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
    let conditions: Vec<&str> = known.keys().filter(|k| k[0] == "conditions" && k.len() > 1).map(|k| &*k[1]).collect();
    let (samples, what) = sample_candidates(graph, &conditions);
    take(&mut out, "sample", pick(&samples, &SAMPLE_NAMES, &what));
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
    let sample = out.text(&["sample"]).and_then(|n| graph.inputs.iter().find(|p| p.name == n));
    let wanted = sample.and_then(rank).unwrap_or(4);
    let outputs: Vec<&Port> =
        graph.outputs.iter().filter(|p| rank(p).is_none_or(|r| r == wanted || r == 0) && float(p)).collect();
    let what = format!("float output of rank {wanted}");
    take(&mut out, "output", pick(&outputs, &["denoised", "out_sample", "sample", "output"], &what));
    axes::read(graph, model, &mut out);
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

/// Inputs that could take the sample, and what they are called in a message: images where there are any, and otherwise what an
/// output has the shape of.
fn sample_candidates<'a>(graph: &'a Graph, conditions: &[&str]) -> (Vec<&'a Port>, String) {
    let rank = |p: &Port| p.shape.as_ref().map(Vec::len);
    let float = |p: &Port| p.dtype.is_none_or(|d| d.is_float());
    let images: Vec<&Port> = graph.inputs.iter().filter(|p| rank(p) == Some(4) && float(p)).collect();
    let out_of_images = graph.outputs.iter().any(|o| float(o) && rank(o).is_none_or(|r| r == 4 || r == 0));
    if !images.is_empty() && out_of_images {
        return (images, "float input of rank 4".into());
    }
    let arrays = |p: &&Port| {
        float(p)
            && rank(p).is_some_and(|r| r >= 2)
            && !one_number_a_row(p)
            && !conditions.contains(&p.name.as_str())
            && !is_named(p, &LABEL_NAMES)
    };
    let made = |p: &&Port| {
        graph.outputs.iter().filter(|o| float(o)).any(|o| match (p.dims(), o.dims()) {
            (Some(a), Some(b)) => {
                // (One of them may be twice as long: a learned variance behind the prediction.)
                let agree = |a: &Option<usize>, b: &Option<usize>| a.is_none() || b.is_none() || a == b;
                let apart: Vec<_> = a.iter().zip(&b).skip(1).filter(|(a, b)| !agree(a, b)).collect();
                let twice = |(a, b): &(&Option<usize>, &Option<usize>)| a.map(|n| 2 * n) == **b;
                a.len() == b.len() && (apart.is_empty() || apart.len() == 1 && apart.iter().all(twice))
            }
            _ => rank(o).is_none_or(|r| r == 0),
        })
    };
    let mut found: Vec<&Port> = graph.inputs.iter().filter(arrays).filter(made).collect();
    if found.is_empty() {
        // Conditions that the caller joins to the sample: it takes more channels than come out.
        let joins = |p: &&Port| {
            let input = InputSpec::from(*p);
            graph.outputs.iter().filter(|o| float(o)).any(|o| joined(&input, &InputSpec::from(o)).is_some())
        };
        let wider: Vec<&Port> = graph.inputs.iter().filter(arrays).filter(joins).collect();
        if !wider.is_empty() {
            return (wider, "float input of the shape of an output, but for more channels".into());
        }
    }
    if found.len() > 1 {
        let plain: Vec<&Port> = found.iter().copied().filter(|p| !is_named(p, &EMBEDDING_NAMES)).collect();
        found = if plain.is_empty() { found } else { plain };
    }
    (found, "float input of the shape of an output".into())
}

fn condition(graph: &Graph, p: &Port, out: &mut Findings) {
    let Some(dims) = out.dims_of(p) else {
        return out.undecided(&["conditions", &p.name, "kind"], "the input declares no shape");
    };
    let path = |field: &'static str| -> [String; 3] { ["conditions".into(), p.name.clone(), field.into()] };
    let set = |out: &mut Findings, field: &'static str, value: Option<toml::Value>, how, why: String| {
        let path = path(field);
        out.set(&[&path[0], &path[1], &path[2]], value, how, why);
    };
    if without_batch(graph, p, out) {
        let npy = format!("{}.npy", p.name);
        set(
            out,
            "kind",
            Some("constant".into()),
            How::Read,
            format!("does not begin with the batch ({})", p.describe()),
        );
        let why = format!("a file with the value that it has in every call, such as {npy:?} by numpy.save");
        set(out, "file", None, How::Undecided, why);
        if let Some(shape) = dims.iter().map(|d| d.map(|n| n as i64)).collect::<Option<Vec<_>>>() {
            set(out, "shape", Some(shape.into()), How::Read, format!("declared: {}", p.describe()));
        }
        return;
    }
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
    // A one-hot class is a row of floats of a fixed width: integers are tokens, booleans a mask.
    let no_class = !is_float || dims.len() > 2 || dims.get(1).is_some_and(|d| d.is_none());
    if dims.len() >= 2 && (no_class || is_named(p, &EMBEDDING_NAMES)) {
        set(out, "kind", Some("embedding".into()), How::Read, format!("its type and shape ({})", p.describe()));
        let row: Option<Vec<i64>> = dims[1..].iter().map(|d| d.map(|n| n as i64)).collect();
        let how = if row.is_some() { How::Read } else { How::Undecided };
        set(out, "shape", row.map(Into::into), how, format!("declared: {}", p.describe()));
        return;
    }
    set(out, "kind", None, How::Undecided, format!("{}: a one-hot class or an embedding", p.describe()));
}

/// Whether an input's first dimension is not the sample's batch, as far as the file says it: positions, rotary tables, masks.
fn without_batch(graph: &Graph, p: &Port, out: &Findings) -> bool {
    let first = |p: &Port| p.shape.as_ref().and_then(|dims| dims.first().cloned());
    let sample = out.text(&["sample"]).and_then(|n| graph.inputs.iter().find(|p| p.name == n));
    match (first(p), sample.and_then(first)) {
        (Some(Ok(n)), Some(Ok(batch))) => n != 1 && n != batch,
        (Some(Ok(n)), Some(Err(_))) => n != 1,
        // (A name that the exporter made says nothing.)
        (Some(Err(own)), Some(Err(batch))) => {
            let is_batch = |name: &str| name.to_lowercase().contains("batch");
            is_batch(&batch) && !is_batch(&own) && !own.is_empty() && !own.contains("dynamic_axes")
        }
        _ => false,
    }
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
